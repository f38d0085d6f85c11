"""The bill, accounted for: each cent and each name, in a world where everything has happened."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterable
from datetime import timedelta
from typing import Any, NamedTuple

import pytest

from prefect_eachlabs.audit.auditor import Auditor
from prefect_eachlabs.audit.report import NAMED, ON_THE_BILL, AuditReport, Kind
from prefect_eachlabs.errors import EachlabsError, Unanswered
from prefect_eachlabs.ledger.records import RecordState
from prefect_eachlabs.ledger.rules import PurchaseOptions
from prefect_eachlabs.models import Destination, Item
from tests.protocol.kit import Process, World, order, wanted

HERE, THERE = Destination.parse("s3://bucket/kit"), Destination.parse("s3://bucket/other")
OLD_SECONDS = 60 + 300 + 5
"""Older than a claim and a deadline."""


async def audited(world: World, *places: Destination, process: Process | None = None, **window: Any) -> AuditReport:
    process = process or world.process()
    auditor = Auditor(process.engine.account, **window)
    return await process.run(auditor.audit([(place, None) for place in places or (HERE,)]))


async def buy(process: Process, item: Item, place: Destination = HERE, **given: Any) -> None:
    options = PurchaseOptions(run_id=process.run_id, **given)
    await process.run(process.engine.generate_and_store(item, place, options=options))


def names(report: AuditReport, kind: Kind) -> set[str | None]:
    return {one.item_id for one in report[kind].named}


def ids(report: AuditReport, kind: Kind) -> set[str | None]:
    return {one.prediction_id for one in report[kind].named}


def bill(world: World) -> dict[str, dict[str, Any]]:
    """What the API itself says it has billed, by prediction."""
    return {one["id"]: one for one in world.emulator.predictions()}


def usd(rows: Iterable[dict[str, Any]]) -> float:
    return math.fsum(row["cost_usd"] for row in rows)


def announce(world: World, prompt: str, *, count: int = 1, **more: Any) -> list[str]:
    """Another tool of the organization buys."""
    body = {"model": "gemini", "version": None, "input": {"prompt": prompt}, **more}
    return [world.emulator.announce_foreign(body, base_url="https://api.invalid").id for _ in range(count)]


def rewrite(world: World, place: Destination, item_id: str, **changes: Any) -> None:
    """Somebody changes a record by hand."""
    kept = world.store.objects[place.record_key(item_id)]
    kept.body = json.dumps({**json.loads(kept.body), **changes}).encode()
    kept.etag = '"by-hand"'


class Busy(NamedTuple):
    """2,000 listed executions of three tools, and whose they are."""

    world: World
    foreign: set[str | None]
    superfluous: str
    in_flight: asyncio.Future[None]


async def busy_world() -> Busy:
    """Two destinations; kills, lost answers, late costs, a failure, a replacement; objects deleted by hand."""
    world = World(
        "prediction:late_cost,seconds=3000,matching=late cost",
        "prediction:fail,matching=fails",
        "prediction:unlisted,matching=unlisted",
        "prediction:slow,seconds=100000,matching=slow",
        latency_seconds=0.01,
        total_cap=100,
    )
    buyer, other = world.process(), world.process()
    loser = world.process(by_name=[("POST /v1/prediction", "lose", 5)])
    here = [wanted(n, prompt=f"here {n}{' late cost' if n <= 7 else ''}", item_id=f"h-{n}") for n in range(1, 141)]
    await asyncio.gather(
        *(buy(buyer, item) for item in here),
        *(buy(other, wanted(prompt=f"there {n}", item_id=f"t-{n}"), THERE) for n in range(1, 101)),
        *(buy(loser, wanted(prompt=f"lost {n}", item_id=f"lost-{n}")) for n in range(1, 6)),
        buy(buyer, wanted(prompt="one that fails", item_id="failed")),
        buy(buyer, wanted(prompt="one that is unlisted", item_id="unlisted")),
        return_exceptions=True,
    )
    await buy(world.process(), wanted(prompt="here 140, otherwise", item_id="h-140"), replace=True)
    for item_id, die_at in (("claimed", "after POST"), ("created", "after S3 PUT kit/records/created.json created")):
        killed = world.process(die_at=die_at)
        await killed.dies(killed.obtain(wanted(prompt=f"killed when {item_id}", item_id=item_id)))
    (superfluous,) = announce(world, "one too many")
    rewrite(world, HERE, "h-10", also_bought=[superfluous])
    del world.store.objects[HERE.image_key("h-20")]
    del world.store.objects[THERE.record_key("t-30")]
    await asyncio.sleep(OLD_SECONDS)
    slow = buy(world.process(), wanted(prompt="a slow one", item_id="flying"), deadline_seconds=1e6)
    in_flight = asyncio.ensure_future(slow)
    await asyncio.sleep(10)
    others = announce(world, "another tool's", count=1200) + announce(world, "a third's", count=300, model="flux")
    others += announce(world, "the rest", count=2_001 - len(bill(world)))
    await asyncio.sleep(3_000)
    return Busy(world, set(others), superfluous, in_flight)


async def test_two_thousand_executions_of_three_tools_are_accounted_for_to_the_cent_and_by_name() -> None:
    busy = await busy_world()
    auditor = busy.world.process()
    report = await audited(busy.world, HERE, THERE, process=auditor)

    # Each cent, by what the API itself says.
    listed = {id: one for id, one in bill(busy.world).items() if "unlisted" not in one["input"]["prompt"]}
    no_record = ("killed when claimed", "there 30")
    recorded = [one for one in listed.values() if not one["foreign"] and one["input"]["prompt"] not in no_record]
    assert report.executions == len(listed) == 2_000
    assert report.billed_usd == pytest.approx(usd(listed.values()), abs=1e-9)
    assert report.recorded_usd == pytest.approx(usd([*recorded, listed[busy.superfluous]]), abs=1e-9)
    assert sum(report[kind].count for kind in ON_THE_BILL) == report.executions
    for sums in ([report[kind].usd for kind in ON_THE_BILL], [one.usd for one in report.by_day]):
        assert math.fsum(sums) == pytest.approx(report.billed_usd, abs=1e-6)

    # Each name.
    assert report[Kind.STORED].count == 140 + 5 + 100 - 2
    assert report[Kind.ENDED].count == 1
    assert ids(report, Kind.ONE_TOO_MANY) == {busy.superfluous}
    assert ids(report, Kind.FOREIGN) == busy.foreign
    assert {kind: names(report, kind) for kind in NAMED if kind is not Kind.FOREIGN and report[kind].count} == {
        Kind.NOT_STORED: {"created", "h-20"},
        Kind.ONE_TOO_MANY: {"h-10"},
        Kind.UNKNOWN_ORDERS: {"claimed"},
        Kind.AMBIGUOUS: {"claimed"},
        Kind.REPLACED: {"h-140"},
        Kind.IN_FLIGHT: {"flying"},
        Kind.WITHOUT_RECORD: {"t-30"},
        Kind.NOT_LISTED: {"unlisted"},
        Kind.CORRECTED: {f"h-{n}" for n in range(1, 8)},
    }
    assert not report.is_accounted_for
    (settle,) = (one.said for one in report[Kind.NOT_STORED].named if one.item_id == "created")
    assert settle == "prefect-eachlabs settle s3://bucket/kit"
    assert {one.name for one in report.by_destination} == {str(HERE), str(THERE), "elsewhere"}
    assert {one.name for one in report.by_model} == {"gemini", "flux"}
    assert len(report.dearest) == 10

    # What it took: a page for each hundred, one question about the lost order, no change but the costs.
    assert auditor.count("GET /v1/executions") == 20
    assert report.requests == auditor.count("GET") == 21
    two_tries = 2  # a process proves once that its store refuses what it must
    assert (auditor.count("POST"), auditor.count("S3 PUT")) == (0, 7 + two_tries)
    again = await audited(busy.world, HERE, THERE)
    assert (again[Kind.CORRECTED].count, again.billed_usd) == (0, report.billed_usd)
    busy.in_flight.cancel()


async def test_a_purchase_that_went_well_is_accounted_for_and_asks_for_one_page() -> None:
    world = World()
    for number in range(3):
        await world.process().obtain(wanted(number))
    announce(world, "another tool's")
    await asyncio.sleep(10)
    auditor = world.process()
    report = await audited(world, process=auditor)
    assert report.is_accounted_for
    assert (report[Kind.STORED].count, report[Kind.FOREIGN].count, report.requests) == (3, 1, 1)
    assert auditor.count("S3 PUT") == 0
    assert auditor.count("S3 HEAD") == 0


async def test_an_empty_account_is_accounted_for() -> None:
    assert (await audited(World())).is_accounted_for


@pytest.mark.parametrize(
    "die_at",
    ["before POST", "after POST", "after S3 PUT kit/records/item-1.json created", "after S3 PUT kit/images"],
)
async def test_what_a_kill_leaves_behind_is_open_until_it_is_settled(die_at: str) -> None:
    world = World()
    announce(world, "another tool's")
    killed = world.process(die_at=die_at)
    await killed.dies(killed.obtain(wanted()))
    await asyncio.sleep(OLD_SECONDS)
    assert not (await audited(world)).is_accounted_for
    janitor = world.process()
    await janitor.run(janitor.engine.settle(HERE, run_id="janitor"))
    report = await audited(world)
    assert report.is_accounted_for, report.in_words()
    assert report.billed_usd == pytest.approx(report.recorded_usd + report[Kind.FOREIGN].usd)


async def test_a_failure_that_is_listed_as_a_success_cost_nothing_and_leaves_nothing_open() -> None:
    world = World("prediction:fail_under_success,next=1", settings={"settling_seconds": 10.0})
    with pytest.raises(EachlabsError):
        await buy(world.process(), wanted())
    await asyncio.sleep(100)
    report = await audited(world)
    assert (report.executions, report.billed_usd, report.unsettled) == (1, 0.0, 0)
    assert report[Kind.ENDED].count == 1
    assert report.is_accounted_for


async def test_what_a_run_is_at_work_on_is_in_flight_and_nothing_is_open() -> None:
    world = World()
    frozen = world.process(freeze_at="after POST")
    task = asyncio.ensure_future(frozen.obtain(wanted()))
    await frozen.froze.wait()
    await asyncio.sleep(5)
    report = await audited(world)
    assert names(report, Kind.IN_FLIGHT) == {"item-1"}
    assert report.is_accounted_for
    frozen.thaw()
    await task


async def test_an_order_without_a_trace_that_turns_up_later_is_told_as_one_that_may_be_ours() -> None:
    world = World("prediction:listed_late,seconds=1000", "create:lost_answer")
    announce(world, "another tool's")
    task = asyncio.ensure_future(world.process().obtain(wanted()))
    await asyncio.sleep(10)
    world.set_faults()
    await task
    assert world.record(wanted()).orders_without_trace == 1
    await asyncio.sleep(1_000)
    report = await audited(world)
    late, stored = world.bought()
    assert ids(report, Kind.UNKNOWN_ORDERS) == {late.id}
    assert names(report, Kind.UNKNOWN_ORDERS) == {"item-1"}
    assert world.record(wanted()).prediction_id == stored.id
    assert report.billed_usd == pytest.approx(3 * 0.039)
    assert report.recorded_usd == pytest.approx(0.039)


async def test_a_window_holds_what_was_created_in_it_and_only_its_records_are_read() -> None:
    world = World()
    await world.process().obtain(wanted(1))
    await asyncio.sleep(20 * 86_400)
    await world.process().obtain(wanted(2))
    auditor = world.process()
    now = world.clock.date(world.now())
    report = await audited(world, process=auditor, since=now - timedelta(days=1))
    assert (report.executions, report[Kind.STORED].count) == (1, 1)
    assert auditor.count("S3 GET kit/records/") == 1
    assert report.is_accounted_for
    before = await audited(world, until=now - timedelta(days=1))
    assert (before.executions, before[Kind.STORED].count) == (1, 1)
    assert before.is_accounted_for
    assert (await audited(world)).executions == 2


async def test_a_record_of_a_cancelled_prediction_that_was_billed_is_open() -> None:
    world = World()
    await world.process().obtain(wanted())
    rewrite(world, HERE, "item-1", state=RecordState.CANCELLED.value, cost_usd=0.0)
    report = await audited(world)
    assert names(report, Kind.NOT_STORED) == {"item-1"}
    assert report[Kind.NOT_STORED].usd == pytest.approx(0.039)


async def test_a_prediction_that_two_destinations_name_is_billed_once_and_told() -> None:
    world = World()
    await world.process().obtain(wanted())
    for key in (HERE.record_key("item-1"), HERE.image_key("item-1")):
        world.store.objects[key.replace("kit/", "other/")] = world.store.objects[key]
    report = await audited(world, HERE, THERE)
    assert report.recorded_usd == report.billed_usd == pytest.approx(0.039)
    assert report[Kind.NAMED_TWICE].count == 1
    assert not report.is_accounted_for


@pytest.mark.parametrize("by_hand", ["gone", "another file", "its metadata lost"])
async def test_a_picture_that_was_deleted_or_overwritten_by_hand_is_not_stored(by_hand: str) -> None:
    world = World()
    await world.process().obtain(wanted())
    key = HERE.image_key("item-1")
    if by_hand == "gone":
        del world.store.objects[key]
    elif by_hand == "another file":
        world.store.objects[key].body = b"something else"
        world.store.objects[key].metadata = {}
    else:
        world.store.objects[key].metadata = {}
    report = await audited(world)
    assert report.is_accounted_for is (by_hand == "its metadata lost")


async def test_a_picture_that_nobody_bought_is_a_stray_and_no_cent_is_open() -> None:
    world = World()
    await world.store.put(HERE.image_key("by-hand"), b"x", content_type="image/png")
    report = await audited(world)
    assert names(report, Kind.STRAYS) == {"by-hand"}
    assert report.is_accounted_for


async def test_a_record_that_cannot_be_read_is_told_and_the_others_are_read() -> None:
    world = World()
    await world.process().obtain(wanted(1))
    await world.store.put(HERE.record_key("broken"), b"{", content_type="application/json")
    report = await audited(world)
    assert names(report, Kind.UNREADABLE) == {"broken"}
    assert report[Kind.STORED].count == 1
    assert not report.is_accounted_for


async def test_short_pages_without_figures_are_walked_to_the_end() -> None:
    world = World("executions:short_pages_untold,value=7")
    announce(world, "another tool's", count=30)
    await asyncio.sleep(10)
    assert (await audited(world)).executions == 30


async def test_a_list_without_an_end_is_not_an_audit(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World("executions:short_pages_untold,value=7")
    announce(world, "another tool's", count=30)
    await asyncio.sleep(10)
    process = world.process()
    page = process.engine.account.client.executions_page
    process.engine.account.client.executions_page = (  # type: ignore[method-assign]
        lambda **asked: page(**{**asked, "offset": 0})
    )
    with pytest.raises(Unanswered, match="no end"):
        await audited(world, process=process)


async def test_pages_keep_the_account_limits() -> None:
    world = World(settings={"requests_per_minute": 3}, requests_per_minute=3)
    announce(world, "another tool's", count=800)
    await asyncio.sleep(10)
    report = await audited(world)
    assert (report.executions, report.requests) == (800, 8)
    assert not world.emulator.tallies()["violations"]


async def test_what_an_order_of_another_tool_wanted_is_not_asked_where_nothing_was_lost() -> None:
    world = World()
    item = wanted()
    announce(world, item.input["prompt"], version=order(item)["version"])
    await world.process().obtain(item)
    report = await audited(world)
    assert report.requests == 1
    assert report[Kind.FOREIGN].count == 1
