"""Time for a process that may be frozen and a machine that may be suspended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def asleep_seconds() -> float:
    """How long this machine has been suspended since its start: a laptop with its lid closed, say.

    The loop's clock stands still meanwhile and the bucket's does not: what must not be older than a claim is measured
    with this added. 0 where the loop's clock goes on.
    """
    # Linux has a clock of its own for it; on macOS CLOCK_MONOTONIC goes on and Python's `monotonic` does not.
    clock = getattr(time, "CLOCK_BOOTTIME", getattr(time, "CLOCK_MONOTONIC", None))
    return 0.0 if clock is None else time.clock_gettime(clock) - time.monotonic()


async def within_waking_seconds(work: Coroutine[Any, Any, T], seconds: float) -> T:
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
