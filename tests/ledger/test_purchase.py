"""The critical section, buying without a ledger, and buckets that are slow: what money depends on, by itself."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest

from prefect_eachlabs.errors import InsufficientBalance, NotSent, OutcomeUnknown, Rejected, StoreFailed, Throttled
from prefect_eachlabs.ledger.purchase import LOST_SLOT_SECONDS, Job
from prefect_eachlabs.ledger.records import RecordState
from prefect_eachlabs.limits.limiter import Kind
from prefect_eachlabs.models import Item, Prediction
from tests.protocol.kit import Process, World, options, wanted

ITEM = wanted()


async def create(process: Process, item: Item = ITEM, **given: Any) -> Prediction:
    return await process.run(process.engine.create(item, process.world.destination, options=options(**given)))


# ---------------------------------------------------------------------- the critical section


def a_job() -> Job:
    ledger: Any = None
    return Job(ITEM, ledger, options())


async def test_a_cancel_waits_for_the_end_of_the_critical_section() -> None:
    job, said = a_job(), []

    async def work() -> None:
        with job.critical():
            await asyncio.sleep(5)
            said.append("noted")
        await asyncio.sleep(100)

    task = asyncio.ensure_future(work())
    await asyncio.sleep(1)
    await job.until_it_may_be_interrupted()
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert said == ["noted"]


async def test_a_critical_section_that_begins_anew_at_once_is_waited_for_as_well() -> None:
    """Between the end of the first and the turn of whoever waits for it, the second has begun."""
    job, interrupted = a_job(), 0

    async def work() -> None:
        nonlocal interrupted
        for _ in range(3):
            with job.critical():
                try:
                    await asyncio.sleep(1)
                except asyncio.CancelledError:
                    interrupted += 1
                    raise
        await asyncio.sleep(100)

    task = asyncio.ensure_future(work())
    await asyncio.sleep(0.5)
    await job.until_it_may_be_interrupted()
    assert asyncio.get_running_loop().time() == 3
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert interrupted == 0


async def test_a_job_that_may_be_interrupted_is_not_waited_for() -> None:
    await a_job().until_it_may_be_interrupted()
    assert asyncio.get_running_loop().time() == 0


# ------------------------------------------------------------------------ without a ledger


@pytest.mark.parametrize(("fault", "kind"), [("create:error,status=422", Rejected), ("create:cut", OutcomeUnknown)])
async def test_a_refusal_gives_the_slots_back(fault: str, kind: type[Exception]) -> None:
    world = World(f"{fault},next=30")
    process = world.process(max_in_flight=1)
    for number in range(3):
        with pytest.raises(kind):
            await create(process, wanted(number), on_ambiguous="fail")
    if kind is OutcomeUnknown:
        # What it may have bought may be in flight for about so long.
        await asyncio.sleep(LOST_SLOT_SECONDS)
    assert process.engine.account.limiter.pressure(Kind.IN_FLIGHT) == 0


async def test_a_throttled_order_waits_and_is_sent_again() -> None:
    world = World("create:throttled,next=3", retry_after="seconds")
    process = world.process()
    await create(process)
    assert len(world.bought()) == 1
    assert process.count("POST") == 4


@pytest.mark.parametrize("at_once", [True, False])
async def test_a_balance_that_stays_too_low_ends_with_what_the_api_says(at_once: bool) -> None:
    world = World("create:no_balance")
    process = world.process()
    with pytest.raises(InsufficientBalance, match="Top"):
        await (process.obtain(ITEM) if at_once else create(process))
    assert not world.bought()
    assert process.count("POST") == 3
    world.set_faults()
    began = world.now()
    await process.obtain(ITEM)
    assert world.now() - began < 45, "its claim was given back"
    world.check([ITEM])


async def test_an_empty_balance_is_not_waited_for_by_one_item_after_the_other() -> None:
    world = World("create:no_balance")
    process = world.process()
    items = [wanted(number) for number in range(10)]
    began = world.now()
    ends = await asyncio.gather(*(process.obtain(item) for item in items), return_exceptions=True)
    assert {type(end) for end in ends} == {InsufficientBalance}
    assert world.now() - began < 15, "ten trials one after the other take minutes"
    world.set_faults()
    await asyncio.gather(*(process.obtain(item) for item in items))
    world.check(items)


async def test_a_cancelled_order_is_cancelled_at_the_api() -> None:
    world = World(service_seconds=20.0)
    process = world.process()
    work = asyncio.ensure_future(create(process))
    while not process.count("POST"):
        await asyncio.sleep(0.01)
    work.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await work
    (job,) = world.bought()
    assert job.cancelled is not None


async def test_an_unexpected_error_of_the_client_may_have_bought() -> None:
    world = World()
    process = world.process()

    async def strange(*_: object) -> Prediction:
        raise ZeroDivisionError("a bug")

    process.engine.account.client.create = strange  # type: ignore[method-assign]  # a bug, for this test
    with pytest.raises(OutcomeUnknown, match="ZeroDivisionError"):
        await create(process, on_ambiguous="fail")


# ---------------------------------------------------------------------------- slow buckets


async def test_a_claim_that_took_too_long_is_claimed_again_before_the_post() -> None:
    world = World()
    process = world.process(freeze_at="after S3 PUT kit/records/item-1.json claimed")
    work = asyncio.ensure_future(process.obtain(ITEM))
    await process.froze.wait()
    await asyncio.sleep(11)
    process.thaw()
    await work
    world.check([ITEM])
    names = [operation.name for operation in process.operations]
    assert names.count("S3 PUT kit/records/item-1.json claimed post") == 2 + 2, "two claims and two probes"


async def test_a_bucket_that_is_always_too_slow_buys_nothing_and_says_so() -> None:
    world = World(latency_seconds=12.0)
    process = world.process()
    with pytest.raises(StoreFailed, match="EACHLABS_CLAIM_SECONDS"):
        await process.obtain(ITEM)
    assert process.count("POST") == 0
    assert process.engine.account.limiter.pressure(Kind.IN_FLIGHT) == 0
    assert process.engine.account.limiter.pressure(Kind.REQUESTS) == 0


# ------------------------------------------------------------------- places always come back

LEAKS = [
    "create:lost_answer,next=1",
    "create:error,status=422,next=1",
    "create:error,status=401,next=1",
    "create:throttled,next=2",
    "create:redirect,next=1",
    "create:cut,next=1",
    "prediction:fail_text,next=1",
    "prediction:stuck,next=1",
    "picture:not_found,next=3",
    "executions:missing",
]


@pytest.mark.parametrize("fault", LEAKS)
async def test_no_place_in_flight_is_lost_whatever_goes_wrong(fault: str) -> None:
    world = World(fault)
    process = world.process(max_in_flight=1, requests_per_minute=None, deadline_seconds=60.0)
    for number in range(1, 4):
        with contextlib.suppress(OutcomeUnknown, NotSent, Throttled, Exception):
            await process.obtain(wanted(number))
        if "stuck" in fault:
            for job in world.bought():
                world.emulator.cancel(job)
        await asyncio.sleep(30)
    assert process.engine.account.limiter.pressure(Kind.IN_FLIGHT) == 0
    await process.obtain(wanted(9))
    assert world.record(wanted(9)).state is RecordState.STORED


async def test_a_prediction_that_has_not_ended_keeps_its_place_though_nobody_waits_for_it() -> None:
    world = World("prediction:slow,seconds=500,next=1")
    process = world.process(max_in_flight=1, deadline_seconds=10.0)
    with contextlib.suppress(TimeoutError):
        await process.obtain(ITEM)
    assert process.engine.account.limiter.pressure(Kind.IN_FLIGHT) == 1
    await process.obtain(wanted(2))
    assert world.emulator.tallies()["worst_in_flight"] == 1
