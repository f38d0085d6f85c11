"""Never over the limit, whatever the arrivals and latencies; and the whole limit is there to be used."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefect_eachlabs.limits.limiter import Kind, LocalSlots, RateLimiter, SlidingWindow
from tests.virtual_time import run

WINDOW = 60.0
seconds = st.floats(min_value=0, max_value=100, allow_nan=False).map(lambda x: x * x / 100)
"""Short gaps are likelier than long ones, and all sizes of floats are met."""
requests = st.lists(st.tuples(seconds, seconds, st.floats(min_value=0, max_value=1)), min_size=1, max_size=60)
"""Each: the gap to the request before it, how long its answer takes, and where in between the API sees it."""


def now() -> float:
    return asyncio.get_running_loop().time()


def local(requests_per_minute: int | None = 60, max_in_flight: int | None = 10) -> RateLimiter:
    return RateLimiter(LocalSlots(requests_per_minute=requests_per_minute, max_in_flight=max_in_flight))


def assert_no_window_holds_more(times: Sequence[float], limit: int) -> None:
    """In the closed sense: not even an interval of exactly 60 s."""
    times = sorted(times)
    for first, one_too_many in zip(times, times[limit:], strict=False):
        assert one_too_many - first > WINDOW, f"{limit + 1} requests within {one_too_many - first} s"


# ---- the window


@given(requests=requests, limit=st.integers(min_value=1, max_value=8))
def test_no_60_seconds_hold_more_than_the_limit_wherever_the_api_sees_the_requests(
    requests: list[tuple[float, float, float]], limit: int
) -> None:
    window = SlidingWindow(limit)
    time, seen, answers = 0.0, [], []
    for gap, latency, share in requests:
        time += gap
        for answered_at in sorted(at for at in answers if at <= time):
            window.done(answered_at)
            answers.remove(answered_at)
        if window.try_take(time):
            seen.append(time + share * latency)
            answers.append(time + latency)
    assert_no_window_holds_more(seen, limit)


@given(requests=requests, limit=st.integers(min_value=1, max_value=8))
def test_a_minute_after_the_last_answer_the_whole_limit_is_back(
    requests: list[tuple[float, float, float]], limit: int
) -> None:
    window = SlidingWindow(limit)
    time = 0.0
    for gap, latency, share in requests:
        time += gap
        if window.try_take(time):
            time += latency
            if share < 0.3:
                window.unused()
            else:
                window.done(time)
    time += WINDOW + 0.011
    assert window.held(time) == 0
    assert [window.try_take(time) for _ in range(limit + 1)] == [True] * limit + [False]


def test_a_place_that_was_not_used_is_back_at_once() -> None:
    window = SlidingWindow(1)
    assert window.try_take(0)
    assert not window.try_take(0)
    window.unused()
    assert window.try_take(0)


def test_a_place_in_flight_is_back_at_once_when_it_is_done() -> None:
    window = SlidingWindow(1, 0.0)
    assert window.try_take(5)
    window.done(5)
    assert window.try_take(5)
    assert window.next_free_at(5) is None


@pytest.mark.parametrize("answered_at", [0.0, 0.1, 1e-9, 1234.567, 3e7 / 7])
def test_the_place_is_back_just_after_its_window_never_at_its_very_end(answered_at: float) -> None:
    window = SlidingWindow(1)
    assert window.try_take(answered_at)
    window.done(answered_at)
    assert not window.try_take(answered_at + WINDOW)
    free_at = window.next_free_at(answered_at + WINDOW)
    assert free_at is not None
    assert WINDOW < free_at - answered_at < WINDOW + 0.1
    assert window.try_take(free_at)


# ---- the lots of one process


def test_done_and_unused_count_once_and_done_comes_first() -> None:
    clock = [0.0]
    lots = LocalSlots(requests_per_minute=2, max_in_flight=None, clock=lambda: clock[0])
    first, second = lots.try_take(Kind.REQUESTS), lots.try_take(Kind.REQUESTS)
    assert first is not None
    assert second is not None
    assert lots.try_take(Kind.REQUESTS) is None
    assert lots.pressure(Kind.REQUESTS) == 1.0
    assert lots.next_change_at(Kind.REQUESTS) is None
    for _ in range(3):
        first.done()
        first.unused()
    assert lots.next_change_at(Kind.REQUESTS) == pytest.approx(WINDOW, abs=0.1)
    for _ in range(3):
        second.unused()
        second.done()
    assert lots.pressure(Kind.REQUESTS) == 0.5
    clock[0] = 61
    assert lots.pressure(Kind.REQUESTS) == 0.0
    assert [lots.try_take(Kind.REQUESTS) is None for _ in range(3)] == [False, False, True]


def test_no_limit_means_places_for_all_and_no_pressure() -> None:
    lots = LocalSlots(requests_per_minute=None, max_in_flight=None, clock=lambda: 0.0)
    for kind in Kind:
        places = [lots.try_take(kind) for _ in range(1000)]
        assert None not in places
        assert lots.limit(kind) is None
        assert lots.pressure(kind) == 0.0
        assert lots.next_change_at(kind) is None


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
        await asyncio.sleep(WINDOW + 0.1)
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
        await asyncio.sleep(WINDOW + 0.1)
        assert [places.pressure(kind) for kind in Kind] == [0, 0]
        assert (places.requests_waiting, places.in_flight_waiting) == (0, 0)
        assert len([await asyncio.wait_for(places.take_in_flight(), 1) for _ in range(limit)]) == limit

    run(story())


def test_a_waiter_cancelled_in_the_turn_of_its_grant_passes_the_place_on() -> None:
    async def story() -> str:
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
        return f"{places.in_flight_waiting} {places.pressure(Kind.IN_FLIGHT)}"

    assert run(story()) == "0 0.0"


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


def test_a_place_in_flight_goes_to_the_next_as_soon_as_an_end_is_seen() -> None:
    async def story() -> list[float]:
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
        return at

    assert run(story()) == [0, 0, 5, 5, 10]


def test_without_limits_nobody_waits() -> None:
    async def story() -> float:
        places = local(None, None)
        for _ in range(500):
            await places.take_in_flight()
            (await places.take_request()).done()
        return now()

    assert run(story()) == 0
