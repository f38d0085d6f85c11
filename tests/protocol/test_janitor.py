"""The janitor settles what runs left behind and stores what was paid for; it buys nothing, whatever it is killed at."""

from __future__ import annotations

import asyncio

import pytest

from prefect_eachlabs.engine.cleanup import SettleReport
from prefect_eachlabs.ledger.records import Intent, RecordState
from prefect_eachlabs.models import Item
from tests.protocol.kit import Process, World, play, wanted

A = wanted(1)
OLD_SECONDS = 60 + 300 + 5
"""Older than a claim and a deadline."""

LEFT_BEHIND = {
    "claimed, nothing bought": "before POST",
    "claimed, bought": "after POST",
    "created": "after S3 PUT kit/records/item-1.json created",
    "created, downloaded": "after DOWNLOAD",
    "created, the picture is there": "after S3 PUT kit/images",
}


async def settle(process: Process) -> SettleReport:
    return await process.run(process.engine.settle(process.world.destination, run_id=process.run_id))


async def leave_behind(world: World, how: str, item: Item = A) -> None:
    process = world.process(die_at=LEFT_BEHIND[how].replace("item-1", item.item_id))
    await process.dies(process.obtain(item))


@pytest.mark.parametrize("how", LEFT_BEHIND)
def test_what_a_run_left_behind_is_settled_and_what_was_paid_for_is_stored(how: str) -> None:
    async def story() -> None:
        world = World()
        await leave_behind(world, how)
        await asyncio.sleep(OLD_SECONDS)
        janitor = world.process()
        report = await settle(janitor)
        assert (report.records, report.looked_at, report.problems) == (1, 1, {})
        assert janitor.count("POST") == 0
        if how == "claimed, nothing bought":
            assert report.nothing_bought == 1
            assert (world.record(A).state, world.record(A).intent) == (RecordState.CLAIMED, Intent.IDLE)
        else:
            assert report.stored == 1
            world.check([A])
        buyer = world.process()
        began = world.now()
        await buyer.obtain(A)
        assert world.now() - began < 10, "nobody waits for what the janitor has settled"
        world.check([A])

    play(story)


@pytest.mark.parametrize("how", ["claimed, bought", "created"])
def test_a_janitor_killed_at_any_boundary_buys_nothing_and_loses_nothing(how: str) -> None:
    async def story(at: int | None) -> int:
        world = World()
        await leave_behind(world, how)
        await asyncio.sleep(OLD_SECONDS)
        janitor = world.process(die_at=at)
        await janitor.until_it_ends(settle(janitor))
        if at is not None:
            await asyncio.sleep(OLD_SECONDS)
            await settle(world.process())
        world.check([A])
        return len(janitor.boundaries)

    boundaries = play(lambda: story(None))
    for at in range(1, boundaries + 1):
        play(lambda at=at: story(at))  # type: ignore[misc]  # mypy infers no lambda with a default


def test_young_records_and_finished_ones_are_left_alone() -> None:
    async def story() -> None:
        world = World("prediction:fail_text,at=3")
        first = world.process()
        await asyncio.gather(first.obtain(wanted(2)), first.obtain(wanted(3)))
        with pytest.raises(Exception, match="ran out of memory"):
            await first.obtain(wanted(4))
        await asyncio.sleep(OLD_SECONDS)
        await leave_behind(world, "created")
        janitor = world.process()
        report = await settle(janitor)
        assert (report.records, report.looked_at) == (4, 0)
        assert janitor.count("S3 GET") <= 1, "what is stored is known from the listing"
        assert janitor.count("S3 PUT") == 0
        assert world.record(A).state is RecordState.CREATED

    play(story)


def test_a_replaced_item_is_not_taken_for_finished_because_its_old_picture_is_there() -> None:
    async def story() -> None:
        world = World()
        await world.process().obtain(A)
        await asyncio.sleep(600)
        new = wanted(2, item_id="item-1")
        second = world.process(die_at="after POST")
        await second.dies(second.obtain(new, replace=True))
        await asyncio.sleep(OLD_SECONDS)
        report = await settle(world.process())
        assert report.stored == 1
        record = world.record(new)
        assert record.state is RecordState.STORED
        assert world.store.objects["kit/images/item-1.png"].metadata["prediction-id"] == record.prediction_id

    play(story)


def test_what_nobody_can_tell_is_named_and_tried_again_the_next_time() -> None:
    async def story() -> None:
        world = World("executions:missing")
        await leave_behind(world, "claimed, bought")
        for _ in range(2):
            await asyncio.sleep(OLD_SECONDS)
            report = await settle(world.process())
            assert (report.ambiguous, list(report.problems)) == (1, ["item-1"])
        assert world.record(A).state is RecordState.AMBIGUOUS
        world.set_faults()
        await asyncio.sleep(OLD_SECONDS)
        assert (await settle(world.process())).stored == 1
        world.check([A])

    play(story)


def test_what_has_not_ended_yet_is_pending_and_what_failed_has_ended() -> None:
    async def story() -> None:
        world = World("prediction:stuck,at=1", "prediction:fail_text,at=2")
        stuck, failed = wanted(2), wanted(3)
        for item in (stuck, failed):
            await leave_behind(world, "created", item)
        await asyncio.sleep(OLD_SECONDS)
        report = await settle(world.process())
        assert (report.pending, report.ended) == (1, 1)
        assert list(report.problems) == ["item-2"]
        assert world.record(failed).state is RecordState.FAILED

    play(story)


def test_many_left_behind_are_settled_together() -> None:
    async def story() -> None:
        world = World()
        items = [wanted(number) for number in range(10, 30)]
        for number, item in enumerate(items):
            await leave_behind(world, ["claimed, bought", "created", "claimed, nothing bought"][number % 3], item)
        await asyncio.sleep(OLD_SECONDS)
        janitor = world.process()
        report = await settle(janitor)
        assert (report.looked_at, report.stored, report.nothing_bought) == (20, 14, 6)
        assert janitor.count("GET /v1/executions") <= 6
        assert janitor.count("POST") == 0
        buyer = world.process()
        await asyncio.gather(*map(buyer.obtain, items))
        world.check(items)

    play(story)


def test_two_janitors_and_a_run_at_the_same_records_buy_and_store_once() -> None:
    async def story() -> None:
        world = World()
        for how, number in zip(LEFT_BEHIND, range(10, 20), strict=False):
            await leave_behind(world, how, wanted(number))
        items = [wanted(number) for number in range(10, 10 + len(LEFT_BEHIND))]
        await asyncio.sleep(OLD_SECONDS)
        run = world.process()
        await asyncio.gather(settle(world.process()), settle(world.process()), *map(run.obtain, items))
        world.check(items)

    play(story)
