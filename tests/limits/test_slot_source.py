"""A line whose places come from elsewhere, later: leased lots behave like this."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from prefect_eachlabs.limits.limiter import Kind, RateLimiter, Slot
from tests.virtual_time import run


def now() -> float:
    return asyncio.get_running_loop().time()


class LeasedLots:
    """Like lots leased over a network: nothing at hand, delivered some time after they were wanted."""

    def __init__(self, *, after_seconds: float, lot: int) -> None:
        self.after_seconds = after_seconds
        self.lot = lot
        self.at_hand = dict.fromkeys(Kind, 0)
        self.cooling: list[float] = []
        self.told: list[tuple[str, int]] = []
        self.listeners: list[Callable[[], None]] = []
        self.fetching = False

    def try_take(self, kind: Kind) -> Slot | None:
        back = [at for at in self.cooling if at <= now()]
        for at in back:
            self.cooling.remove(at)
            self.at_hand[Kind.REQUESTS] += 1
        if not self.at_hand[kind]:
            return None
        self.at_hand[kind] -= 1
        source = self

        class Leased:
            def done(self) -> None:  # says nothing to the listeners: only `next_change_at` has moved
                source.cooling.append(now() + 60)

            def unused(self) -> None:
                source.at_hand[kind] += 1

        return Leased()

    def wanted(self, kind: Kind, count: int) -> None:
        self.told.append((kind.value, count))
        if count and not self.fetching and kind is Kind.REQUESTS:
            self.fetching = True
            asyncio.get_running_loop().call_later(self.after_seconds, self._deliver)

    def _deliver(self) -> None:
        self.at_hand[Kind.REQUESTS] += self.lot
        for listener in self.listeners:
            listener()

    def next_change_at(self, kind: Kind) -> float | None:
        return min(self.cooling, default=None)

    def pressure(self, kind: Kind) -> float:
        return 0.0

    def limit(self, kind: Kind) -> int | None:
        return 60

    def held_by_others(self, kind: Kind) -> str | None:
        return None

    def on_change(self, listener: Callable[[], None]) -> None:
        self.listeners.append(listener)

    async def close(self) -> None: ...


def test_a_source_is_told_who_waits_and_those_get_what_it_delivers_later() -> None:
    async def story() -> tuple[list[float], list[tuple[str, int]]]:
        source = LeasedLots(after_seconds=2, lot=3)
        places = RateLimiter(source)
        granted: list[float] = []

        async def one() -> None:
            place = await places.take_request()
            granted.append(now())
            await asyncio.sleep(1)
            place.done()

        await asyncio.gather(*(one() for _ in range(5)))
        return granted, source.told

    granted, told = run(story())
    assert granted == [2, 2, 2, 63, 63]  # the lot's own places again, 60 s after their answers
    assert told == [("requests", count) for count in (1, 2, 3, 4, 5, 2, 0)]


def test_a_source_whose_places_change_nothing_it_announces_still_moves_the_line() -> None:
    """A place that ends tells the line itself; `on_change` alone would leave the second caller waiting."""

    async def story() -> float:
        source = LeasedLots(after_seconds=1, lot=1)
        places = RateLimiter(source)
        first = await places.take_request()
        second = asyncio.ensure_future(places.take_request())
        await asyncio.sleep(1)
        first.unused()
        await second
        return now()

    assert run(story()) == 2


def test_a_source_that_names_a_time_gone_by_is_not_asked_without_end() -> None:
    class Confused(LeasedLots):
        def next_change_at(self, kind: Kind) -> float | None:
            return 0.0

    async def story() -> int:
        source = Confused(after_seconds=1, lot=1)
        places = RateLimiter(source)
        await places.take_request()
        return len(source.told)

    assert run(story()) == 2
