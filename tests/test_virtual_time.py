"""The clock of the tests keeps its own promises."""

from __future__ import annotations

import asyncio

import pytest

from tests.virtual_time import run


def now() -> float:
    return asyncio.get_running_loop().time()


def test_an_hour_of_sleep_is_an_hour_on_the_clock_alone() -> None:
    async def story() -> float:
        await asyncio.sleep(3600)
        return now()

    assert run(story()) == 3600


def test_a_deadlock_is_named_with_its_time() -> None:
    async def story() -> None:
        await asyncio.sleep(2.5)
        await asyncio.Event().wait()

    with pytest.raises(AssertionError, match=r"deadlock at t=2\.5"):
        run(story())


def test_an_endless_loop_is_named_with_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.virtual_time._STANDSTILL_LIMIT", 100)

    async def story() -> None:
        while True:
            await asyncio.sleep(0)

    with pytest.raises(AssertionError, match=r"endless loop at t=0"):
        run(story())


def test_a_callback_that_raises_where_nobody_looks_fails_the_test() -> None:
    async def story() -> None:
        asyncio.get_running_loop().call_later(1, lambda: 1 / 0)
        await asyncio.sleep(2)

    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        run(story())
