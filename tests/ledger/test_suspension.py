"""Time for a process that may be frozen and a machine that may be suspended."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

import pytest

from prefect_eachlabs.api.suspension import within_running_seconds
from prefect_eachlabs.ledger import purchase as purchasing
from prefect_eachlabs.limits import leases
from tests.protocol.kit import World, wanted


async def test_work_that_ends_in_time_gives_its_result_or_its_error() -> None:
    assert await within_running_seconds(asyncio.sleep(29.9, "done"), 30.0) == "done"

    async def fail() -> None:
        await asyncio.sleep(1)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await within_running_seconds(fail(), 30.0)


async def test_work_that_takes_too_long_is_cancelled() -> None:
    cancelled = False

    async def work() -> None:
        nonlocal cancelled
        try:
            await asyncio.sleep(100)
        except asyncio.CancelledError:
            cancelled = True
            raise

    with pytest.raises(asyncio.TimeoutError):
        await within_running_seconds(work(), 2.5)
    assert cancelled
    assert asyncio.get_running_loop().time() == 2.5


async def test_work_whose_result_comes_while_it_is_being_cancelled_is_not_lost() -> None:
    async def work() -> str:
        try:
            await asyncio.sleep(100)
        except asyncio.CancelledError:
            return "bought"
        return ""

    assert (await within_running_seconds(work(), 1.0)) == "bought"


async def test_a_caller_that_is_cancelled_cancels_the_work() -> None:
    ended = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.sleep(100)
        finally:
            ended.set()

    waiting = asyncio.ensure_future(within_running_seconds(work(), 30.0))
    await asyncio.sleep(1)
    waiting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await waiting
    assert ended.is_set()


async def test_a_process_that_was_frozen_hears_the_answer_to_what_it_sends_when_it_thaws() -> None:
    """The loop's clock jumps by five minutes; the answer comes a second after that."""
    loop: Any = asyncio.get_running_loop()

    async def work() -> str:
        await asyncio.sleep(0.5)
        loop._now += 300.0
        await asyncio.sleep(1.0)
        return "bought"

    assert (await within_running_seconds(work(), 30.0)) == "bought"


# ------------------------------------------------------------------------------- asleep


def test_a_machine_that_is_awake_has_slept_for_the_same_time_as_a_moment_ago() -> None:
    assert leases.suspended_seconds() >= 0.0
    assert leases.suspended_seconds() == pytest.approx(leases.suspended_seconds(), abs=1e-2)


@pytest.mark.skipif(not hasattr(time, "CLOCK_BOOTTIME"), reason="Linux")
def test_a_thread_that_is_stopped_between_two_clocks_has_not_slept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reading takes a microsecond, the first of the suspended machine's clock half a second."""
    now, stops = 400.0, iter([0.5])

    def read(seconds: float = 0.0) -> float:
        nonlocal now
        now += seconds + 1e-6
        return now

    monkeypatch.setattr(leases.time, "monotonic", read)
    monkeypatch.setattr(leases.time, "clock_gettime", lambda _: 600.0 + read(next(stops, 0.0)))
    assert leases.suspended_seconds() == 600.0


@pytest.mark.skipif(not hasattr(time, "CLOCK_BOOTTIME"), reason="Linux")
def test_what_the_loop_does_not_know_of_is_the_time_since_boot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases.time, "clock_gettime", {time.CLOCK_BOOTTIME: 1000.0}.__getitem__)
    monkeypatch.setattr(leases.time, "monotonic", lambda: 400.0)
    assert leases.suspended_seconds() == 600.0


@pytest.mark.parametrize("boundary", ["after S3 PUT kit/records", "after POST"])
async def test_a_machine_that_was_suspended_in_a_purchase_knows_that_its_claim_is_dead(
    boundary: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lid is closed for ten minutes, which its loop does not notice; another worker takes over meanwhile."""
    asleep = 0.0
    monkeypatch.setattr(purchasing, "clock", lambda: asyncio.get_running_loop().time() + asleep)
    item = wanted()
    world = World(service_seconds=0.5)
    laptop = world.process(freeze_at=boundary)
    slow = asyncio.ensure_future(laptop.obtain(item))
    await laptop.froze.wait()
    world.pass_unnoticed(600)
    began = world.now()
    await world.process().obtain(item)
    assert world.now() - began < 10, "so little passed on the laptop's own clock"
    asleep = 600.0
    laptop.thaw()
    await slow
    world.check([item])
