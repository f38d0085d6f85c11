"""A cancelled run cancels what it has in flight, looks again and writes down the truth; what is late is stored."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter

import pytest

from prefect_eachlabs.engine.account import Interruption
from prefect_eachlabs.errors import PredictionTimedOut
from prefect_eachlabs.ledger.records import RecordState
from prefect_eachlabs.models import StoredImage
from tests.protocol.kit import Process, World, at_each_boundary, options, play, wanted

A = wanted(1)


async def settle_down(process: Process, work: asyncio.Task[StoredImage]) -> None:
    work.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await work


def cancelled_at(boundary: int, *faults: str, service_seconds: float = 2.0) -> None:
    async def story() -> None:
        world = World(*faults, service_seconds=service_seconds)
        process = world.process(freeze_at=boundary)
        work = asyncio.ensure_future(process.obtain(A))
        froze = asyncio.ensure_future(process.froze.wait())
        await asyncio.wait({froze, work}, return_when=asyncio.FIRST_COMPLETED)
        froze.cancel()
        # The very moment of a boundary: the request goes on, its caller is cancelled.
        work.cancel()
        process.thaw()
        await asyncio.wait({work})
        if work.cancelled() and A.item_id + ".json" in "".join(world.store.keys("kit/records/")):
            record = world.record(A)
            assert record.state in (RecordState.CANCELLED, RecordState.CLAIMED, RecordState.STORED)
            in_flight = [job for job in world.bought() if not job.ended_at(world.now())]
            assert not in_flight, "a cancelled run left a prediction in flight"
            if record.state is RecordState.CLAIMED:
                assert not world.bought(), "a cancelled run lost sight of what it had bought"
        image = await world.process().obtain(A)
        assert world.record(A).state is RecordState.STORED
        assert world.named() == {job.id: 1 for job in world.bought()}
        kept = [job for job in world.bought() if job.cancelled is None]
        assert [job.id for job in kept] == [image.prediction_id]

    play(story)


@pytest.mark.parametrize("boundary", range(1, 21))
def test_cancelled_at_any_boundary_it_leaves_nothing_in_flight_and_the_truth_in_the_record(boundary: int) -> None:
    cancelled_at(boundary, service_seconds=20.0)


@pytest.mark.parametrize("boundary", [10, 11, 12, 13])
@pytest.mark.parametrize("fault", ["prediction:uncancellable", "cancel:lost_answer", "cancel:error,next=1"])
def test_what_succeeds_although_it_was_cancelled_is_stored(boundary: int, fault: str) -> None:
    cancelled_at(boundary, fault, service_seconds=5.0)


@pytest.mark.parametrize("at_once", [1, 6])
async def test_a_cancel_never_falls_between_the_claim_and_the_note(at_once: int) -> None:
    """Throttled again and again: the critical section ends and begins anew in one turn of the loop."""
    world = World("create:throttled,next=5,seconds=0", service_seconds=20.0, retry_after="none")
    process = world.process()
    work = asyncio.ensure_future(process.obtain(A))
    while process.count("POST") < at_once:
        await asyncio.sleep(0.01)
    await settle_down(process, work)
    names = [operation.name for operation in process.operations]
    claims, probes = names.count("S3 PUT kit/records/item-1.json claimed post"), 2
    assert claims - probes == names.count("POST /v1/prediction")
    for job in world.bought():
        assert job.cancelled is not None
    await world.process().obtain(A)
    assert world.named() == {job.id: 1 for job in world.bought()}


async def test_a_caller_that_is_cancelled_leaves_the_picture_to_another_that_waits_for_it() -> None:
    world = World()
    process = world.process()
    first, second = (asyncio.ensure_future(process.obtain(A)) for _ in range(2))
    await asyncio.sleep(1)
    await settle_down(process, first)
    await second
    world.check([A])


async def test_who_asks_for_it_while_it_is_being_cancelled_gets_it_all_the_same() -> None:
    world = World(service_seconds=20.0)
    process = world.process()
    first = asyncio.ensure_future(process.obtain(A))
    await asyncio.sleep(3)
    first.cancel()
    await asyncio.sleep(0.05)
    second = asyncio.ensure_future(process.obtain(A))
    await asyncio.wait({first})
    image = await second
    cancelled, kept = world.bought()
    assert (cancelled.cancelled is not None, kept.id) == (True, image.prediction_id)
    assert world.record(A).earlier == [cancelled.id]


async def test_only_the_run_that_bought_it_cancels_it() -> None:
    world = World(service_seconds=20.0)
    buyer, other = world.process(), world.process()
    buying = asyncio.ensure_future(buyer.obtain(A))
    await asyncio.sleep(2)
    waiting = asyncio.ensure_future(other.obtain(A))
    await asyncio.sleep(2)
    await settle_down(other, waiting)
    await buying
    world.check([A])
    assert other.count("POST") == 0


async def test_a_cancelled_item_is_bought_by_the_next_run() -> None:
    world = World(service_seconds=20.0)
    process = world.process()
    work = asyncio.ensure_future(process.obtain(A))
    await asyncio.sleep(3)
    await settle_down(process, work)
    assert world.record(A).state is RecordState.CANCELLED
    assert world.record(A).cancel_requested
    await world.process().obtain(A)
    cancelled, kept = world.bought()
    record = world.record(A)
    assert (record.earlier, record.prediction_id, record.cancel_requested) == ([cancelled.id], kept.id, False)


def test_a_run_that_dies_while_it_cancels_leaves_a_record_that_the_next_run_understands() -> None:
    async def story(die_at: int | None) -> int:
        world = World(service_seconds=20.0)
        process = world.process()
        work = asyncio.ensure_future(process.obtain(A))
        await asyncio.sleep(3)
        begun = len(process.boundaries)
        process.plan.die_at = None if die_at is None else begun + die_at
        work.cancel()
        await process.until_it_ends(asyncio.wait({work}))
        if die_at is not None:
            image = await world.process().obtain(A)
            assert world.named() == {job.id: 1 for job in world.bought()}
            kept = [job for job in world.bought() if job.cancelled is None]
            assert [job.id for job in kept] == [image.prediction_id]
        return len(process.boundaries) - begun

    at_each_boundary(story)


# ---------------------------------------------------------------------------- too late


async def test_what_ends_after_its_deadline_is_stored_by_the_process_as_long_as_it_lives() -> None:
    world = World("prediction:slow,seconds=400")
    with pytest.raises(PredictionTimedOut):
        await world.process().obtain(A)
    await asyncio.sleep(200)
    world.check([A])


async def test_what_ends_after_its_deadline_is_stored_by_the_next_run() -> None:
    world = World("prediction:slow,seconds=400")
    process = world.process()
    with pytest.raises(PredictionTimedOut):
        await process.obtain(A)
    process.kill()
    with pytest.raises(PredictionTimedOut):
        await world.process().obtain(A)
    await asyncio.sleep(100)
    await world.process().obtain(A)
    world.check([A])


# ------------------------------------------------------------------------ step by step


async def step_by_step(process: Process) -> StoredImage:
    """As the tasks of the same names do it."""
    engine, destination = process.engine, process.world.destination
    bought = await engine.create(A, destination, options=options(process.run_id))
    ended = await engine.wait(bought, run_id=process.run_id)
    return await engine.store(ended, destination)


def test_create_wait_and_store_killed_at_any_boundary_end_with_one_picture() -> None:
    async def story(at: int | None) -> int:
        world = World()
        process = world.process(die_at=at)
        await process.until_it_ends(process.run(step_by_step(process)))
        if at is not None:
            again = world.process()
            await again.run(step_by_step(again))
        world.check([A])
        return len(process.boundaries)

    at_each_boundary(story)


@pytest.mark.parametrize("seconds", [0.25, 0.35, 0.45, 0.55, 1.0, 3.0])
async def test_a_cancelled_create_or_wait_leaves_nothing_in_flight(seconds: float) -> None:
    world = World(service_seconds=20.0)
    process = world.process()
    work = asyncio.ensure_future(process.run(step_by_step(process)))
    await asyncio.sleep(seconds)
    work.cancel()
    await asyncio.wait({work})
    assert all(job.cancelled is not None for job in world.bought())
    await world.process().obtain(A)
    assert world.named() == {job.id: 1 for job in world.bought()}


async def test_a_failure_seen_by_wait_is_written_down() -> None:
    world = World("prediction:fail_moderation")
    process = world.process()
    with pytest.raises(Exception, match="refused by the provider"):
        await process.run(step_by_step(process))
    assert world.record(A).state is RecordState.FAILED


# ------------------------------------------------------------------------ whose prediction it is


@pytest.mark.parametrize("other", ["the run that bought it waits on", "nobody waits any more"])
async def test_a_wait_that_is_cancelled_in_another_run_cancels_nobodys_prediction(other: str) -> None:
    """Two flows in one process: only the run that bought it cancels it, and not while somebody waits."""
    world = World(service_seconds=20.0)
    process = world.process()
    engine = process.engine
    bought = await engine.create(A, world.destination, options=options("mine"))
    mine = asyncio.ensure_future(engine.wait(bought, run_id="mine")) if other.startswith("the run") else None
    theirs = asyncio.ensure_future(engine.wait(bought.id, run_id="theirs"))
    await asyncio.sleep(1)
    theirs.cancel()
    await asyncio.wait({theirs})
    assert world.bought()[0].cancelled is None
    assert engine.account.interruptions == {}
    if mine is not None:
        assert (await mine).output_urls


async def test_the_run_that_bought_it_does_not_cancel_while_another_waits() -> None:
    world = World(service_seconds=20.0)
    process = world.process()
    engine = process.engine
    bought = await engine.create(A, world.destination, options=options("mine"))
    mine = asyncio.ensure_future(engine.wait(bought, run_id="mine"))
    theirs = asyncio.ensure_future(engine.wait(bought.id, run_id="theirs"))
    await asyncio.sleep(1)
    mine.cancel()
    await asyncio.wait({mine})
    assert world.bought()[0].cancelled is None
    assert (await theirs).output_urls


@pytest.mark.parametrize("gap_seconds", [None, 0.0, 0.05, 0.5])
@pytest.mark.parametrize("seconds", [0.25, 0.45, 1.0, 3.0])
async def test_each_prediction_is_asked_to_cancel_once_however_many_go_away_and_whoever_is_impatient(
    seconds: float, gap_seconds: float | None
) -> None:
    """Two callers of each of five items; a second cancel (a time-out around a clean-up) does not cut it short."""
    world = World(service_seconds=20.0)
    process = world.process()
    items = [wanted(number) for number in range(5)]
    callers = [asyncio.ensure_future(process.obtain(item)) for item in (*items, *items)]
    await asyncio.sleep(seconds)
    for _ in range(1 if gap_seconds is None else 2):
        for caller in callers:
            caller.cancel()
        await asyncio.sleep(gap_seconds or 0.0)
    await asyncio.wait(callers)
    await process.engine.aclose()
    assert world.now() < seconds + 12
    bought = world.bought()
    assert all(job.cancelled is not None for job in bought)
    assert process.count("POST /v1/prediction/") == len(bought), "one request to cancel each"
    assert process.engine.account.interruptions == {job.id: Interruption.CANCELLED for job in bought}


async def test_what_the_api_confirmed_is_told_apart_from_what_stays_paid_for() -> None:
    world = World("prediction:uncancellable,at=2", service_seconds=20.0)
    process = world.process()
    callers = [asyncio.ensure_future(process.obtain(wanted(number))) for number in range(3)]
    await asyncio.sleep(15)
    for caller in callers:
        caller.cancel()
    await asyncio.wait(callers)
    told = Counter(process.engine.account.interruptions.values())
    assert told == {Interruption.CANCELLED: 2, Interruption.STORED: 1}

    world.set_faults("prediction:uncancellable")
    late = asyncio.ensure_future(process.obtain(wanted(4)))
    await asyncio.sleep(2)
    late.cancel()
    await asyncio.wait({late})
    assert Counter(process.engine.account.interruptions.values())[Interruption.OPEN] == 1
