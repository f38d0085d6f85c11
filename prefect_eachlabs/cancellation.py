"""Coming to an end although one is cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

T = TypeVar("T")


async def to_its_end(work: Coroutine[Any, Any, T] | asyncio.Task[T]) -> T:
    """What the work returns. A cancel does not reach it: it waits until the work has ended, and is raised then."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        if not task.cancelled():
            task.exception()  # seen
        raise cancelled
    return task.result()


async def all_ended(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Waits for all of them, whatever they end with. A cancel is passed on to each, once, and waits for their ends.

    `asyncio.gather` would end with the first of them that is cancelled, while others still clean up.
    """
    waiting = set(tasks)
    if not waiting:
        return
    try:
        await asyncio.wait(waiting)
    except asyncio.CancelledError:
        for task in waiting:
            task.cancel()
        await to_its_end(_wait(waiting))
        raise


async def _wait(tasks: Iterable[asyncio.Task[Any]]) -> None:
    await asyncio.wait(set(tasks))
