"""The clock of the tests keeps its own promises."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest

from tests.virtual_time import run


def now() -> float:
    return asyncio.get_running_loop().time()


def test_an_hour_of_sleep_is_an_hour_on_the_clock_alone() -> None:
    async def story() -> float:
        await asyncio.sleep(3600)
        return now()

    assert run(story()) == 3600


def test_sleepers_wake_in_the_order_of_their_times() -> None:
    woken: list[tuple[float, str]] = []

    async def sleeper(name: str, seconds: float) -> None:
        await asyncio.sleep(seconds)
        woken.append((now(), name))

    async def story() -> None:
        await asyncio.gather(sleeper("c", 0.3), sleeper("a", 0.1), sleeper("b", 0.2))

    run(story())
    assert woken == [(0.1, "a"), (0.2, "b"), (0.3, "c")]


def test_wait_for_times_out_at_its_virtual_time() -> None:
    async def story() -> float:
        with pytest.raises((asyncio.TimeoutError, TimeoutError)):
            await asyncio.wait_for(asyncio.Event().wait(), 7)
        return now()

    assert run(story()) == 7


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


def test_the_error_of_the_story_comes_out() -> None:
    async def story() -> None:
        await asyncio.sleep(1)
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        run(story())


def test_tasks_left_behind_are_cancelled_and_may_clean_up() -> None:
    cleaned: list[float] = []

    async def forgotten() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(1)
            cleaned.append(now())

    async def story() -> asyncio.Task[None]:
        task = asyncio.ensure_future(forgotten())
        await asyncio.sleep(1)
        return task

    assert run(story()).cancelled()
    assert cleaned == [2]


def test_a_callback_that_raises_where_nobody_looks_fails_the_test() -> None:
    async def story() -> None:
        asyncio.get_running_loop().call_later(1, lambda: 1 / 0)
        await asyncio.sleep(2)

    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        run(story())


def test_a_forgotten_async_generator_is_closed() -> None:
    closed: list[bool] = []

    async def numbers() -> AsyncIterator[int]:
        try:
            yield 1
            yield 2
        finally:
            closed.append(True)

    async def story() -> None:
        async for _ in numbers():
            break
        await asyncio.sleep(1)

    run(story())
    assert closed == [True]


def test_executors_are_refused_in_words() -> None:
    async def story() -> None:
        await asyncio.to_thread(print)

    with pytest.raises(RuntimeError, match="not supported"):
        run(story())


def test_other_threads_are_refused_in_words() -> None:
    refused: list[BaseException] = []

    async def story() -> None:
        loop = asyncio.get_running_loop()

        def elsewhere() -> None:
            try:
                loop.call_soon_threadsafe(print)
            except RuntimeError as error:
                refused.append(error)

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()

    run(story())
    assert "another one is not supported" in str(refused[0])
