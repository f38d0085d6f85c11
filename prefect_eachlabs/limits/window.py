"""Where an account's slots come from: the exact window that counts them, and the limits of this process alone.

`SlidingWindow` is pure, with the time handed in. A `RateLimiter` takes from a `SlotSource`; `LocalSlots` is the one
for a process on its own; on a Prefect server another one leases lots from global limits.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from enum import Enum
from typing import Protocol

WINDOW_SECONDS = 60.0
SAFETY_SECONDS = 0.01
"""Added to the window: the API's clock need not run exactly like ours, nor floats add up exactly."""


def asleep_seconds() -> float:
    """How long this machine has been suspended since its start: a laptop with its lid closed, say.

    The loop's clock stands still meanwhile and the bucket's does not: what must not be older than a claim, or a
    lease, is measured with this added. 0 where the loop's clock goes on.
    """
    # Linux has a clock of its own for it; on macOS CLOCK_MONOTONIC goes on and Python's `monotonic` does not.
    clock = getattr(time, "CLOCK_BOOTTIME", getattr(time, "CLOCK_MONOTONIC", None))
    if clock is None:
        return 0.0
    # A thread that a busy machine stops between the two reads too much, and a slot would come back too early.
    return round(min(-time.monotonic() + time.clock_gettime(clock) for _ in range(3)), 2)


class Kind(str, Enum):
    """The two limits of an account."""

    REQUESTS = "requests"
    IN_FLIGHT = "in-flight"


class Slot(Protocol):
    """The right to one request, or to one prediction in flight. Exactly one of the two methods ends it."""

    def done(self) -> None:
        """A request: its answer came, or was lost; its 60 s begin now. In flight: the end was seen. Idempotent."""

    def unused(self) -> None:
        """Nothing was sent: free again at once. Idempotent; after `done` it does nothing."""


class SlotSource(Protocol):
    """Where slots come from. Every method is called on the gateway's loop and never blocks."""

    def try_take(self, kind: Kind) -> Slot | None:
        """A slot, when there is one now."""

    def wanted(self, kind: Kind, count: int) -> None:
        """So many callers wait now (0: nobody); the source may fetch for them."""

    def next_change_at(self, kind: Kind) -> float | None:
        """The loop time at which `try_take` may succeed by the passing of time alone."""

    def pressure(self, kind: Kind) -> float:
        """From 0.0 (free, or no limit) to 1.0 (every slot is taken)."""

    def limit(self, kind: Kind) -> int | None:
        """The account's limit; None: there is none."""

    def held_by_others(self, kind: Kind) -> str | None:
        """What callers here wait for, as it ends the sentence "Waiting for ..."; None: for nobody but themselves."""

    def on_change(self, listener: Callable[[], None]) -> None:
        """The listener is called, on the loop, when `try_take` may succeed now."""

    async def close(self) -> None:
        """Gives back what is not in use, within a few seconds."""


class SlidingWindow:
    """An exact sliding window; pure: `now` is passed into every method and never goes backwards.

    A slot is held from before its request is sent until `window_seconds` after its answer. The API sees the
    request somewhere between the two, so whatever the latency, it never sees more than `limit` in any window.

    Args:
        limit: Slots there are; may be changed while in use.
        window_seconds: How long a slot stays held after it is done; 0 for predictions in flight.
    """

    def __init__(self, limit: int, window_seconds: float = WINDOW_SECONDS) -> None:
        self.limit = limit
        self._hold_seconds = window_seconds + SAFETY_SECONDS if window_seconds > 0 else 0.0
        self._open = 0
        self._free_at: deque[float] = deque()

    def __repr__(self) -> str:
        return f"<SlidingWindow {self._open} open + {len(self._free_at)} cooling of {self.limit}>"

    def held(self, now: float) -> int:
        """How many slots are taken."""
        while self._free_at and self._free_at[0] <= now:
            self._free_at.popleft()
        return self._open + len(self._free_at)

    def try_take(self, now: float) -> bool:
        """Takes a slot when there is one."""
        if self.held(now) >= self.limit:
            return False
        self._open += 1
        return True

    def done(self, now: float) -> None:
        """One of the slots taken is used up: it comes back when its window has passed."""
        self._open -= 1
        if self._hold_seconds:
            self._free_at.append(now + self._hold_seconds)

    def unused(self) -> None:
        """One of the slots taken was not needed: it is back at once."""
        self._open -= 1

    def next_free_at(self, now: float) -> float | None:
        """When a slot comes back by the passing of time alone; None when none will."""
        self.held(now)
        return self._free_at[0] if self._free_at else None


class _FreePlace:
    """A slot where there is no limit."""

    def done(self) -> None: ...

    def unused(self) -> None: ...


_FREE = _FreePlace()


class _WindowPlace:
    def __init__(self, lots: LocalSlots, window: SlidingWindow) -> None:
        self._lots = lots
        self._window: SlidingWindow | None = window

    def done(self) -> None:
        if (window := self._window) is not None:
            self._window = None
            window.done(self._lots.now())
            self._lots.changed()

    def unused(self) -> None:
        if (window := self._window) is not None:
            self._window = None
            window.unused()
            self._lots.changed()


class LocalSlots:
    """The limits of this process alone.

    Args:
        requests_per_minute: At most so many requests in any 60 s; None: no limit.
        max_in_flight: At most so many predictions between POST and end; None: no limit.
        clock: The loop's time when not given.
        window_seconds: The window of the requests.
    """

    def __init__(
        self,
        *,
        requests_per_minute: int | None,
        max_in_flight: int | None,
        clock: Callable[[], float] | None = None,
        window_seconds: float = WINDOW_SECONDS,
    ) -> None:
        self._clock = clock
        self._listeners: list[Callable[[], None]] = []
        self._windows = {
            Kind.REQUESTS: None if requests_per_minute is None else SlidingWindow(requests_per_minute, window_seconds),
            Kind.IN_FLIGHT: None if max_in_flight is None else SlidingWindow(max_in_flight, 0.0),
        }

    def __repr__(self) -> str:
        return f"<LocalSlots {', '.join(f'{kind.value}: {window}' for kind, window in self._windows.items())}>"

    def now(self) -> float:
        return asyncio.get_running_loop().time() if self._clock is None else self._clock()

    def changed(self) -> None:
        for listener in self._listeners:
            listener()

    def try_take(self, kind: Kind) -> Slot | None:
        window = self._windows[kind]
        if window is None:
            return _FREE
        return _WindowPlace(self, window) if window.try_take(self.now()) else None

    def wanted(self, kind: Kind, count: int) -> None:
        """Nothing to fetch from: all there is, is here."""

    def next_change_at(self, kind: Kind) -> float | None:
        window = self._windows[kind]
        return None if window is None else window.next_free_at(self.now())

    def pressure(self, kind: Kind) -> float:
        window = self._windows[kind]
        return 0.0 if window is None else min(1.0, window.held(self.now()) / window.limit)

    def limit(self, kind: Kind) -> int | None:
        window = self._windows[kind]
        return None if window is None else window.limit

    def held_by_others(self, kind: Kind) -> str | None:
        """There are no others."""
        return None

    def on_change(self, listener: Callable[[], None]) -> None:
        self._listeners.append(listener)

    async def close(self) -> None:
        """Nothing to give back."""
