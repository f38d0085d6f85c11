"""The slots of an account: not more than its limits allow in any 60 s, and not less than that by much.

A *slot* is the right to one request in the window, or to one prediction in flight. `RateLimiter` is the line of those
who wait for one; where slots come from is a `SlotSource` (see `window`), and the clock is the loop's.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import TypeVar

from prefect_eachlabs.limits.breaker import CircuitBreaker
from prefect_eachlabs.limits.window import Kind, LocalSlots, SlidingWindow, Slot, SlotSource

__all__ = ["CircuitBreaker", "Kind", "LocalSlots", "RateLimiter", "SlidingWindow", "Slot", "SlotSource"]

logger = logging.getLogger(__name__)
T = TypeVar("T")

STANDS_STILL_AFTER_SECONDS = 5.0
"""Who waits for longer, for slots that others hold, says so."""
SAY_AGAIN_SECONDS = 120.0
QUESTIONS_IN_A_ROW = 3
"""So many questions may go before a create that waits; then the create has its turn."""


class _TakenSlot:
    """A source's slot, so that the line moves on when it ends, whatever the source says of it."""

    def __init__(self, slot: Slot, limiter: RateLimiter) -> None:
        self._slot = slot
        self._limiter = limiter

    def done(self) -> None:
        self._slot.done()
        self._limiter.look_if_anybody_waits()

    def unused(self) -> None:
        self._slot.unused()
        self._limiter.look_if_anybody_waits()


_Queue = OrderedDict["asyncio.Future[Slot]", None]


class RateLimiter:
    """The line of those who wait for slots: first come, first served; questions before creates.

    A question (a poll, a sweep) frees slots in flight, so it goes before the creates; but after three in a row a
    create that waits has its turn, so neither starves.

    Args:
        source: Where the slots come from.
    """

    def __init__(self, source: SlotSource) -> None:
        self._source = source
        self._questions: _Queue = OrderedDict()
        self._creates: _Queue = OrderedDict()
        self._in_flight: _Queue = OrderedDict()
        self._questions_in_a_row = 0
        self._told = {Kind.REQUESTS: 0, Kind.IN_FLIGHT: 0}
        self._waits_since: dict[Kind, float] = {}
        """Kind → since when callers wait for it and none has been given any."""
        self._said_at = dict.fromkeys(Kind, -math.inf)
        self.standstill: str | None = None
        """What everybody here waits for, when others hold it and nothing has moved for 5 s: for progress displays."""
        self._look_at: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._looking = False
        self._look_again = False
        self.breaker = CircuitBreaker()
        source.on_change(self.look_if_anybody_waits)

    def __repr__(self) -> str:
        return (
            f"<RateLimiter of {self._source!r}; waiting: "
            f"{len(self._questions)} questions, {len(self._creates)} creates, "
            f"{len(self._in_flight)} for a slot in flight>"
        )

    @property
    def requests_waiting(self) -> int:
        """Creates that wait for a request slot."""
        return len(self._creates)

    @property
    def in_flight_waiting(self) -> int:
        """Callers that wait for a slot in flight."""
        return len(self._in_flight)

    def pressure(self, kind: Kind) -> float:
        """From 0.0 (free, or no limit) to 1.0 (every slot is taken)."""
        return self._source.pressure(kind)

    def limit(self, kind: Kind) -> int | None:
        """The account's limit; None: there is none."""
        return self._source.limit(kind)

    async def take_in_flight(self) -> Slot:
        """Waits for a slot in flight: `done` when the prediction's end was seen, `unused` when it was not made."""
        return await self._take(Kind.IN_FLIGHT, self._in_flight)

    async def take_request(self, *, question: bool = False) -> Slot:
        """Waits for a request slot: `done` when the answer came or was lost, `unused` when nothing was sent.

        Args:
            question: It is about a prediction that exists; goes before creates.
        """
        return await self._take(Kind.REQUESTS, self._questions if question else self._creates)

    async def asked(self, question: Callable[[], Awaitable[T]]) -> T:
        """The answer to a question (a GET), in a request slot of its own."""
        request = await self.take_request(question=True)
        try:
            return await question()
        finally:
            request.done()

    async def _take(self, kind: Kind, line: _Queue) -> Slot:
        if not self._waiting(kind):
            slot = self._source.try_take(kind)
            if slot is not None:
                return _TakenSlot(slot, self)
        mine: asyncio.Future[Slot] = asyncio.get_running_loop().create_future()
        line[mine] = None
        self._look()
        try:
            return await mine
        except asyncio.CancelledError:
            if mine in line:
                del line[mine]
                self._look()
            elif not mine.cancelled():  # granted and cancelled in the same turn of the loop
                mine.result().unused()
            raise

    def look_if_anybody_waits(self) -> None:
        """Something has changed: the line may move on."""
        if self._questions or self._creates or self._in_flight:
            self._look()

    def _look(self) -> None:
        """Hands out what there is, tells the source who still waits, and sets the one timer."""
        if self._looking:  # a source may call its listener from within try_take
            self._look_again = True
            return
        self._looking = True
        now = asyncio.get_running_loop().time()
        try:
            for kind in Kind:
                granted = False
                while (line := self._next_line(kind)) is not None:
                    slot = self._source.try_take(kind)
                    if slot is None:
                        break
                    self._count_turns(line)
                    waiter, _ = line.popitem(last=False)
                    waiter.set_result(_TakenSlot(slot, self))
                    granted = True
                count = self._waiting(kind)
                if granted or not count:
                    self._waits_since.pop(kind, None)
                if count:
                    self._waits_since.setdefault(kind, now)
                if count != self._told[kind]:
                    self._told[kind] = count
                    self._source.wanted(kind, count)
            self._say_whether_it_stands_still(now)
            self._set_timer()
        finally:
            self._looking = False
        if self._look_again:
            self._look_again = False
            asyncio.get_running_loop().call_soon(self.look_if_anybody_waits)

    def _lines(self, kind: Kind) -> tuple[_Queue, ...]:
        return (self._in_flight,) if kind is Kind.IN_FLIGHT else (self._questions, self._creates)

    def _waiting(self, kind: Kind) -> int:
        return sum(len(line) for line in self._lines(kind))

    def _next_line(self, kind: Kind) -> _Queue | None:
        """The line whose turn it is, a caller that still waits at its head; None when nobody waits."""
        lines = self._lines(kind)
        for line in lines:
            while line and next(iter(line)).done():  # cancelled, its task has not run since
                line.popitem(last=False)
        if kind is Kind.REQUESTS and self._creates and self._questions_in_a_row >= QUESTIONS_IN_A_ROW:
            return self._creates
        return next((line for line in lines if line), None)

    def _count_turns(self, line: _Queue) -> None:
        if line is self._creates:
            self._questions_in_a_row = 0
        elif line is self._questions:
            self._questions_in_a_row = self._questions_in_a_row + 1 if self._creates else 0

    def _say_whether_it_stands_still(self, now: float) -> None:
        self.standstill = None
        self._look_at = None
        for kind, since in self._waits_since.items():
            if (held := self._source.held_by_others(kind)) is None:
                continue
            if now - since >= STANDS_STILL_AFTER_SECONDS:
                self.standstill = f"Waiting for {held}."
                if now - self._said_at[kind] >= SAY_AGAIN_SECONDS:
                    self._said_at[kind] = now
                    logger.warning("%s", self.standstill)
            # The source may have nothing to tell meanwhile.
            self._look_at = now + STANDS_STILL_AFTER_SECONDS if self.standstill else since + STANDS_STILL_AFTER_SECONDS

    def _set_timer(self) -> None:
        times = [at for kind in Kind if self._waiting(kind) and (at := self._source.next_change_at(kind)) is not None]
        if self._look_at is not None:
            times.append(self._look_at)
        at = min(times, default=None)
        if self._timer is not None:
            if self._timer.when() == at:
                return
            self._timer.cancel()
            self._timer = None
        if at is not None:
            loop = asyncio.get_running_loop()
            now = loop.time()  # a source that names a time gone by is asked again soon, not at once for ever
            self._timer = loop.call_at(at if at > now else now + 0.01, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._look()
