"""The janitor settles what runs left behind and stores what was paid for; it buys nothing, whatever it is killed at."""

from __future__ import annotations

import asyncio

import pytest

from prefect_eachlabs.engine.cleanup import SettleReport
from prefect_eachlabs.ledger.records import Intent, RecordState
from prefect_eachlabs.models import Item
from tests.protocol.kit import Process, World, at_each_boundary, wanted

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
async def test_what_a_run_left_behind_is_settled_and_what_was_paid_for_is_stored(how: str) -> None:
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

    at_each_boundary(story)


async def test_young_records_and_finished_ones_are_left_alone() -> None:
    world = World("prediction:fail_text,at=3")
    first = world.process()
    await asyncio.gather(first.obtain(wanted(2)), first.obtain(wanted(3)))
    with pytest.raises(Exception, match="ran out of memory"):
        await first.obtain(wanted(4))
    await asyncio.sleep(OLD_SECONDS)
    await leave_behind(world, "created")
    report = await settle(world.process())
    assert (report.records, report.looked_at, report.too_young) == (4, 0, 1)
    assert world.record(A).state is RecordState.CREATED


async def test_what_is_too_young_to_settle_is_counted_and_told_when_it_is_not_any_more() -> None:
    """`settle` right after Ctrl-C: ten are paid for, and "0 to settle" would say that there are none."""
    world = World()
    for number in range(10, 20):
        await leave_behind(world, "created", wanted(number))
    report = await settle(world.process())
    assert (report.looked_at, report.too_young) == (0, 10)
    assert report.look_again_seconds is not None
    assert "10 more are too young to settle yet: look again in" in report.in_words()
    await asyncio.sleep(report.look_again_seconds + 1)
    report = await settle(world.process())
    assert (report.stored, report.too_young, report.look_again_seconds) == (10, 0, None)
    assert "too young" not in report.in_words()


async def test_each_record_is_read_once_after_each_change_and_what_was_left_open_every_time() -> None:
    world = World("prediction:stuck,at=5")
    process = world.process()
    await asyncio.gather(*(process.obtain(wanted(number)) for number in range(1, 5)))
    await leave_behind(world, "created", wanted(5))
    await asyncio.sleep(600)
    reads = []
    for _ in range(3):
        janitor = world.process()
        assert (await settle(janitor)).pending == 1
        reads.append(janitor.count("S3 GET kit/records/"))
        assert janitor.count("S3 LIST kit/records/") == 1
        await asyncio.sleep(600)
    assert reads == [5, 1, 1]
    await world.process().obtain(wanted(6))
    janitor = world.process()
    await settle(janitor)
    assert janitor.count("S3 GET kit/records/") == 2


@pytest.mark.parametrize("die_at", ["after POST", "after S3 PUT kit/records/item-1.json created"])
@pytest.mark.parametrize("gap_seconds", [0, 55, 3600])
@pytest.mark.parametrize("looked_before", [True, False])
async def test_a_purchase_that_was_killed_right_after_another_was_stored_is_found(
    gap_seconds: int, looked_before: bool, die_at: str
) -> None:
    """The old picture's date says nothing about the new purchase, and the old picture is not its picture."""
    world = World()
    process = world.process()
    await process.obtain(A)
    if looked_before:
        await settle(world.process())
    await asyncio.sleep(gap_seconds)
    new = wanted(2, item_id="item-1")
    killed = world.process(die_at=die_at)
    await killed.dies(killed.obtain(new, replace=True))
    await asyncio.sleep(12 * 3600)
    assert (await settle(world.process())).stored == 1
    record = world.record(new)
    assert record.state is RecordState.STORED
    assert world.store.objects["kit/images/item-1.png"].metadata["prediction-id"] == record.prediction_id


@pytest.mark.parametrize(
    "body", [b"the shop's settled invoices", b"{}", b'{"schema": "eachlabs-settled/1", "left": []}']
)
async def test_an_object_in_the_place_of_its_memory_is_left_alone(body: bytes) -> None:
    world = World()
    await world.store.put("kit/settled.json", body, content_type="application/json")
    await leave_behind(world, "created")
    await asyncio.sleep(OLD_SECONDS)
    assert (await settle(world.process())).stored == 1
    assert world.store.objects["kit/settled.json"].body == body


async def test_a_record_that_nobody_can_read_is_told_and_the_others_are_settled() -> None:
    world = World()
    await leave_behind(world, "created")
    await world.store.put("kit/records/spoilt.json", b"{", content_type="application/json")
    await asyncio.sleep(OLD_SECONDS)
    for stored in (1, 0):
        report = await settle(world.process())
        assert (report.stored, report.pending, list(report.problems)) == (stored, 1, ["spoilt"])


async def test_what_nobody_can_tell_is_named_and_tried_again_the_next_time() -> None:
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


async def test_what_has_not_ended_yet_is_pending_and_what_failed_has_ended() -> None:
    world = World("prediction:stuck,at=1", "prediction:fail_text,at=2")
    stuck, failed = wanted(2), wanted(3)
    for item in (stuck, failed):
        await leave_behind(world, "created", item)
    await asyncio.sleep(OLD_SECONDS)
    report = await settle(world.process())
    assert (report.pending, report.ended) == (1, 1)
    assert list(report.problems) == ["item-2"]
    assert world.record(failed).state is RecordState.FAILED


async def test_many_left_behind_are_settled_together() -> None:
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


async def test_two_janitors_and_a_run_at_the_same_records_buy_and_store_once() -> None:
    world = World()
    for how, number in zip(LEFT_BEHIND, range(10, 20), strict=False):
        await leave_behind(world, how, wanted(number))
    items = [wanted(number) for number in range(10, 10 + len(LEFT_BEHIND))]
    await asyncio.sleep(OLD_SECONDS)
    run = world.process()
    await asyncio.gather(settle(world.process()), settle(world.process()), *map(run.obtain, items))
    world.check(items)
