"""What the disk refuses: a batch keeps its rows in temporary files, and says what to do when there is no room."""

from __future__ import annotations

import contextlib
import errno
import sqlite3
from collections.abc import Iterator

from prefect_eachlabs.errors import SetupError

_DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS})


@contextlib.contextmanager
def on_disk(*errors: int) -> Iterator[None]:
    """Whatever the disk refuses inside comes out as a SetupError that says what to do.

    Args:
        errors: Further numbers of an OSError that mean the disk here.
    """
    try:
        yield
    except (sqlite3.OperationalError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _DISK_ERRORS.union(errors):
            raise
        raise SetupError(
            f"The disk does not take the batch's temporary files ({error}): make room there, or name another folder "
            "in TMPDIR, then run again; what was bought is in the bucket or known there, and not bought again."
        ) from error
