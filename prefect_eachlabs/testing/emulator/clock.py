"""Time as the emulator knows it: handed in, so that tests move it by assignment and a real server lets it run."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import time
from datetime import datetime, timedelta, timezone
from typing import Protocol


class Clock(Protocol):
    """What the emulator asks of time."""

    def now(self) -> float:
        """Seconds that only grow."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Comes back when so many seconds have passed, or when the clock is stopped."""
        ...

    def stop(self) -> None:
        """Ends every sleep at once, those to come too: the server goes down and holds nobody back."""
        ...

    def start(self) -> None:
        """Lets sleeps be sleeps again, after a stop."""
        ...


class SystemClock:
    """`time.monotonic`, for a real server."""

    def __init__(self) -> None:
        self._stopped = asyncio.Event()

    def now(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        if self._stopped.is_set() or seconds <= 0:
            return
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._stopped.wait(), seconds)

    def stop(self) -> None:
        self._stopped.set()

    def start(self) -> None:
        self._stopped = asyncio.Event()  # a new one: an Event belongs to the loop that first waited for it


class LoopClock:
    """The running loop's own clock: what a loop with virtual time needs (`InProcessTransport`).

    Outside of a loop, when its tallies are read after a test, say, it stands where it was last looked at.
    """

    def __init__(self) -> None:
        self._seen = 0.0

    def now(self) -> float:
        with contextlib.suppress(RuntimeError):
            self._seen = asyncio.get_running_loop().time()
        return self._seen

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(max(0.0, seconds))

    def stop(self) -> None:
        """Nothing to do: who owns the loop ends its tasks."""

    def start(self) -> None:
        """Nothing to do."""


class ManualClock:
    """Stands still until somebody assigns `time`.

    >>> clock = ManualClock()
    >>> clock.time += 60
    >>> clock.now()
    60.0
    """

    def __init__(self, time: float = 0.0) -> None:
        self._time = float(time)
        self._order = itertools.count()
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []

    @property
    def time(self) -> float:
        return self._time

    @time.setter
    def time(self, value: float) -> None:
        if value < self._time:
            raise ValueError(f"time only grows: {value} is before {self._time}")
        self._time = float(value)
        self._wake(self._time)

    def now(self) -> float:
        return self._time

    async def sleep(self, seconds: float) -> None:
        if seconds <= 0:
            return
        woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self._time + seconds, next(self._order), woken))
        await woken

    def stop(self) -> None:
        self._wake(float("inf"))

    def start(self) -> None:
        """Nothing to do."""

    def _wake(self, until: float) -> None:
        while self._sleepers and self._sleepers[0][0] <= until:
            woken = heapq.heappop(self._sleepers)[2]
            if not woken.done():
                woken.set_result(None)


class Calendar:
    """Dates for a clock: the wall time when it was first asked plus what has passed since."""

    def __init__(self, clock: Clock, *, began: datetime | None = None, skew_seconds: float = 0.0) -> None:
        self._clock = clock
        self._began = began
        self._zero: float | None = None
        self.skew_seconds = skew_seconds

    def _origin(self) -> tuple[datetime, float]:
        if self._zero is None or self._began is None:
            self._zero = self._clock.now()
            self._began = self._began or datetime.now(timezone.utc)
        return self._began, self._zero

    def date(self, at: float) -> datetime:
        """The vendor's date for a moment of the clock, its skew included."""
        return self.true_date(at) + timedelta(seconds=self.skew_seconds)

    def true_date(self, at: float) -> datetime:
        """The date for a moment of the clock, without skew."""
        began, zero = self._origin()
        return began + timedelta(seconds=at - zero)

    def moment(self, date: datetime) -> float:
        """The moment of the clock that the vendor would date so."""
        began, zero = self._origin()
        return zero + (date - began).total_seconds() - self.skew_seconds


def rfc3339(date: datetime) -> str:
    """`2026-01-01T00:00:00.123Z`, as the vendor writes dates."""
    return date.astimezone(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
