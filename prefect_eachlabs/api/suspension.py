"""Time for a process that may be frozen."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def within_running_seconds(work: Coroutine[Any, Any, T], seconds: float) -> T:
    """What `work` returns, within so many seconds during which this process ran.

    A process that was frozen when it was about to send sends when it thaws, and then must hear what it has bought:
    a plain time-out, long over by then, would hang up on the answer.

    Raises:
        asyncio.TimeoutError: It took longer; the work was cancelled.
    """
    task = asyncio.ensure_future(work)
    try:
        while seconds > 0 and not task.done():
            await asyncio.wait({task}, timeout=min(seconds, 1.0))
            seconds -= 1.0
        if not task.done():
            task.cancel()
            await asyncio.wait({task})
    except asyncio.CancelledError:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        raise
    if task.cancelled():
        raise asyncio.TimeoutError
    return task.result()
