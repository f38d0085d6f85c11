"""Never over the limit, whatever the arrivals and latencies; and the whole limit is there to be used."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefect_eachlabs.limits.limiter import Kind, RateLimiter
from tests.limits.local import local_limiter
from tests.virtual_time import run

WINDOW = 60.0
seconds = st.floats(min_value=0, max_value=100, allow_nan=False).map(lambda x: x * x / 100)
"""Short gaps are likelier than long ones, and all sizes of floats are met."""
requests = st.lists(st.tuples(seconds, seconds, st.floats(min_value=0, max_value=1)), min_size=1, max_size=60)
"""Each: the gap to the request before it, how long its answer takes, and where in between the API sees it."""


def now() -> float:
    return asyncio.get_running_loop().time()


def local(requests_per_minute: int | None = 60, max_in_flight: int | None = 10) -> RateLimiter:
    return local_limiter(requests_per_minute=requests_per_minute, max_in_flight=max_in_flight)


def assert_no_window_holds_more(times: Sequence[float], limit: int) -> None:
    """In the closed sense: not even an interval of exactly 60 s."""
    times = sorted(times)
    for first, one_too_many in zip(times, times[limit:], strict=False):
        assert one_too_many - first > WINDOW, f"{limit + 1} requests within {one_too_many - first} s"


# ---- slots


async def test_done_and_unused_count_once_and_the_first_of_them_counts() -> None:
    limiter = local(2, None)
    first, second = await limiter.take_request(), await limiter.take_request()
    third = asyncio.ensure_future(limiter.take_request())
    await asyncio.sleep(1)
    assert limiter.pressure(Kind.REQUESTS) == 1.0
    for _ in range(3):
        first.done()
        first.unused()
    await asyncio.sleep(1)
    assert not third.done()
    for _ in range(3):
        second.unused()
        second.done()
    (await third).unused()
    assert (now(), limiter.pressure(Kind.REQUESTS)) == (2, 0.5)
    await asyncio.sleep(WINDOW)
    assert limiter.pressure(Kind.REQUESTS) == 0.0


@pytest.mark.parametrize("answered_at", [0.0, 0.1, 1e-9, 1234.567])
async def test_a_slot_is_back_just_after_its_window_never_at_its_very_end(answered_at: float) -> None:
    limiter = local(1)
    slot = await limiter.take_request()
    await asyncio.sleep(answered_at)
    slot.done()
    await limiter.take_request()
    assert WINDOW < (now() - answered_at) < WINDOW + 0.2


# ---- the line


@settings(max_examples=40, deadline=None)
@given(requests=requests, limit=st.integers(min_value=1, max_value=6), questions=st.sets(st.integers(0, 59)))
def test_the_line_is_exact_and_alive_for_any_arrivals(
    requests: list[tuple[float, float, float]], limit: int, questions: set[int]
) -> None:
    """Everybody gets a place, nobody is one too many, and no place is idle while somebody waits."""
    seen: list[float] = []

    async def one(places: RateLimiter, latency: float, share: float, *, question: bool) -> None:
        place = await places.take_request(question=question)
        seen.append(now() + share * latency)
        await asyncio.sleep(latency)
        place.done()

    async def story() -> None:
        places = local(limit)
        tasks = []
        for number, (gap, latency, share) in enumerate(requests):
            await asyncio.sleep(gap)
            tasks.append(asyncio.ensure_future(one(places, latency, share, question=number in questions)))
        await asyncio.gather(*tasks)
        assert places.requests_waiting == 0
        await asyncio.sleep(WINDOW + 0.2)
        assert places.pressure(Kind.REQUESTS) == 0

    run(story())
    assert len(seen) == len(requests)
    assert_no_window_holds_more(seen, limit)


@settings(max_examples=40, deadline=None)
@given(
    cancels=st.lists(st.tuples(st.integers(0, 19), st.floats(0, 130)), max_size=20),
    limit=st.integers(min_value=1, max_value=5),
)
def test_cancelling_those_who_wait_leaks_nothing(cancels: list[tuple[int, float]], limit: int) -> None:
    async def one(places: RateLimiter) -> None:
        place = await places.take_in_flight()
        try:
            request = await places.take_request()
            try:
                await asyncio.sleep(1)
            finally:
                request.done()
            await asyncio.sleep(1)
        finally:
            place.done()

    async def story() -> None:
        places = local(limit, limit)
        tasks = [asyncio.ensure_future(one(places)) for _ in range(20)]
        for number, at in cancels:
            asyncio.get_running_loop().call_at(at, tasks[number].cancel)
        await asyncio.sleep(500)
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(WINDOW + 0.2)
        assert [places.pressure(kind) for kind in Kind] == [0, 0]
        assert (places.requests_waiting, places.in_flight_waiting) == (0, 0)
        assert len([await asyncio.wait_for(places.take_in_flight(), 1) for _ in range(limit)]) == limit

    run(story())


async def test_a_waiter_cancelled_in_the_turn_of_its_grant_passes_the_place_on() -> None:
    places = local(1, 1)
    held = await places.take_in_flight()
    first = asyncio.ensure_future(places.take_in_flight())
    second = asyncio.ensure_future(places.take_in_flight())
    await asyncio.sleep(0)
    held.done()
    first.cancel()
    (await second).done()
    third = await places.take_in_flight()
    fourth = asyncio.ensure_future(places.take_in_flight())
    fifth = asyncio.ensure_future(places.take_in_flight())
    await asyncio.sleep(0)
    fourth.cancel()  # cancelled, and its task has not run when the place comes back
    third.done()
    (await fifth).done()
    assert (f"{places.in_flight_waiting} {places.pressure(Kind.IN_FLIGHT)}") == "0 0.0"


def arrivals_of(*asked: tuple[str, bool], limit: int = 1) -> list[str]:
    """The order in which callers get their places, when all wait for the same window."""
    order: list[str] = []

    async def one(places: RateLimiter, name: str, question: bool) -> None:
        place = await places.take_request(question=question)
        order.append(name)
        place.done()

    async def story() -> None:
        places = local(limit)
        for _ in range(limit):
            (await places.take_request()).done()
        await asyncio.gather(*(one(places, name, question) for name, question in asked))

    run(story())
    return order


def test_first_come_first_served() -> None:
    names = [f"c{number}" for number in range(9)]
    assert arrivals_of(*((name, False) for name in names), limit=4) == names


def test_questions_come_before_creates_and_neither_starves() -> None:
    creates = [(f"c{number}", False) for number in range(4)]
    questions = [(f"q{number}", True) for number in range(8)]
    order = arrivals_of(*creates, *questions)
    assert order == ["q0", "q1", "q2", "c0", "q3", "q4", "q5", "c1", "q6", "q7", "c2", "c3"]


async def test_a_place_in_flight_goes_to_the_next_as_soon_as_an_end_is_seen() -> None:
    places = local(None, 2)
    at: list[float] = []

    async def one() -> None:
        place = await places.take_in_flight()
        at.append(now())
        await asyncio.sleep(5)
        place.done()

    tasks = [asyncio.ensure_future(one()) for _ in range(5)]
    await asyncio.sleep(1)
    assert places.in_flight_waiting == 3
    await asyncio.gather(*tasks)
    assert at == [0, 0, 5, 5, 10]


async def test_without_limits_nobody_waits() -> None:
    places = local(None, None)
    for _ in range(500):
        await places.take_in_flight()
        (await places.take_request()).done()
    assert now() == 0
