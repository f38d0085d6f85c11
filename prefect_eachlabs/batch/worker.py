"""The thread that does what blocks; and what its disk refuses, for a batch keeps its rows in temporary files."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import sqlite3
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

from prefect_eachlabs.errors import SetupError

T = TypeVar("T")

_DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ENOENT})
"""ENOENT, for Python finds no folder for a temporary file where the disk is full."""


@contextlib.contextmanager
def on_disk() -> Iterator[None]:
    """Whatever the disk refuses inside comes out as a SetupError that says what to do."""
    try:
        yield
    except (sqlite3.DatabaseError, OSError) as error:
        # Once the disk has refused a page, a database without a journal is "malformed", and that is a DatabaseError.
        is_sqlite = type(error) in (sqlite3.OperationalError, sqlite3.DatabaseError)
        if not is_sqlite and getattr(error, "errno", None) not in _DISK_ERRORS:
            raise
        raise SetupError(
            f"The disk does not take the batch's temporary files ({error}): make room there, or name another folder "
            "in TMPDIR, then run again; what was bought is in the bucket or known there, and not bought again."
        ) from error


class Worker(Protocol):
    """Runs what blocks, one after the other, beside the loop."""

    def __call__(self, work: Callable[..., T], /, *args: Any) -> Awaitable[T]: ...


class ThreadWorker:
    """One thread of its own."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="eachlabs-batch")

    async def __call__(self, work: Callable[..., T], /, *args: Any) -> T:
        with on_disk():
            return await asyncio.get_running_loop().run_in_executor(self._pool, work, *args)

    def close(self) -> None:
        self._pool.shutdown(wait=False)
