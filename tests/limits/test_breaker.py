"""One 429 pauses the account; one trial opens it again."""

from __future__ import annotations

import asyncio
import logging

import pytest

from prefect_eachlabs.errors import InsufficientBalance, Throttled
from prefect_eachlabs.limits.breaker import CircuitBreaker
from tests.virtual_time import run


def now() -> float:
    return asyncio.get_running_loop().time()


def throttled(retry_after_seconds: float | None = None) -> Throttled:
    return Throttled("no", status_code=429, details="10 at a time", retry_after_seconds=retry_after_seconds)


class Callers:
    """Tasks that enter the gate and note when they got in."""

    def __init__(self, gate: CircuitBreaker) -> None:
        self.breaker = gate
        self.entered: dict[str, float] = {}

    def start(self, *names: str) -> list[asyncio.Task[None]]:
        return [asyncio.ensure_future(self._enter(name)) for name in names]

    async def _enter(self, name: str) -> None:
        await self.breaker.enter()
        self.entered[name] = now()


def paused() -> tuple[CircuitBreaker, Callers]:
    """For five seconds."""
    gate = CircuitBreaker()
    gate.throttled(throttled(5))
    return gate, Callers(gate)


async def test_an_open_gate_lets_everybody_in_at_once() -> None:
    callers = Callers(CircuitBreaker())
    await asyncio.gather(*callers.start("a", "b", "c"))
    assert callers.entered == {"a": 0, "b": 0, "c": 0}


async def test_after_the_pause_one_tries_and_its_success_opens_for_all() -> None:
    gate, callers = paused()
    assert gate.paused
    tasks = callers.start("a", "b", "c")
    await asyncio.sleep(7)
    assert callers.entered == {"a": 5}
    gate.passed()
    await asyncio.gather(*tasks)
    assert not gate.paused
    assert callers.entered == {"a": 5, "b": 7, "c": 7}


async def test_who_comes_when_the_pause_is_over_and_nobody_waits_is_the_trial() -> None:
    _, callers = paused()
    await asyncio.sleep(10)
    callers.start("a", "b")
    await asyncio.sleep(1)
    assert dict(callers.entered) == {"a": 10}


async def test_a_trial_that_is_throttled_pauses_again_and_longer() -> None:
    gate = CircuitBreaker()
    pauses = []
    gate.throttled(throttled())
    for number in range(1, 9):
        assert gate.consecutive_throttles == number
        before = now()
        await gate.enter()
        pauses.append(now() - before)
        gate.throttled(throttled())
    for pause, grown in zip(pauses, (1, 2, 4, 8, 16, 30, 30, 30), strict=True):
        assert 0.75 * grown <= pause <= grown


async def test_a_post_that_passed_begins_the_count_anew() -> None:
    gate = CircuitBreaker()
    gate.throttled(throttled(1))
    await gate.enter()
    gate.throttled(throttled(1))
    assert gate.consecutive_throttles == 2
    await gate.enter()
    gate.passed()
    assert gate.consecutive_throttles == 0


def test_retry_after_is_honoured_up_to_its_cap_and_never_nothing() -> None:
    async def pause_of(seconds: float) -> float:
        gate = CircuitBreaker()
        gate.throttled(throttled(seconds))
        await gate.enter()
        return now()

    assert run(pause_of(7.5)) == 7.5
    assert run(pause_of(3600)) == 120
    assert run(pause_of(0)) == 0.25


async def test_many_posts_refused_at_once_are_one_pause_and_one_line_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    gate = CircuitBreaker()
    for seconds in (2, 5, 3):
        gate.throttled(throttled(seconds))
    gate.throttled(throttled())
    assert gate.consecutive_throttles == 1
    await gate.enter()
    with caplog.at_level(logging.WARNING):
        assert now() == 5
    assert [record.getMessage().endswith("It says: 10 at a time") for record in caplog.records] == [True]


async def test_a_post_sent_before_the_pause_does_not_open_the_gate() -> None:
    gate = CircuitBreaker()
    gate.throttled(throttled(5))
    gate.passed()
    assert gate.consecutive_throttles == 1
    gate.left()
    await gate.enter()
    assert now() == 5


async def test_402_pauses_like_429() -> None:
    gate = CircuitBreaker()
    gate.throttled(InsufficientBalance("top up", status_code=402, retry_after_seconds=4))
    await gate.enter()
    assert now() == 4


async def test_who_waits_in_vain_is_told_at_once_and_the_next_one_may_try() -> None:
    gate, callers = paused()
    tasks = callers.start("a", "b", "c")
    await asyncio.sleep(1)
    gate.refuse(InsufficientBalance("top up", status_code=402, item_id="of another"))
    ends = await asyncio.gather(*tasks, return_exceptions=True)
    assert [(type(end), str(end)) for end in ends] == [(InsufficientBalance, "top up")] * 3
    assert len(set(map(id, ends))) == 3, "an exception that several raise grows a traceback of all of them"
    assert (now(), gate.paused) == (1, True)
    await asyncio.gather(*callers.start("d"))
    assert callers.entered == {"d": 5}


async def test_a_trial_that_leaves_hands_its_turn_on() -> None:
    gate, callers = paused()
    callers.start("a", "b", "c")
    await asyncio.sleep(6)
    gate.left()
    await asyncio.sleep(1)
    assert dict(callers.entered) == {"a": 5, "b": 6}


async def test_a_cancelled_waiter_does_not_take_the_trial_with_it() -> None:
    _, callers = paused()
    first, second, _ = callers.start("a", "b", "c")
    await asyncio.sleep(1)
    first.cancel()
    asyncio.get_running_loop().call_at(5, second.cancel)  # in the very turn in which it is let in, or just before
    await asyncio.sleep(9)
    assert dict(callers.entered) == {"c": 5}


async def test_a_trial_cancelled_as_it_is_let_in_hands_its_turn_on() -> None:
    _, callers = paused()
    first, _ = callers.start("a", "b")
    await asyncio.sleep(0)
    asyncio.get_running_loop().call_at(5, first.cancel)
    await asyncio.sleep(9)
    assert dict(callers.entered) == {"b": 5}


async def test_a_trial_that_never_reports_does_not_shut_the_gate_for_ever() -> None:
    _, callers = paused()
    callers.start("a", "b")
    await asyncio.sleep(1000)
    assert dict(callers.entered) == {"a": 5, "b": 125}
