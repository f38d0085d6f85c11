"""Batches on the real engine, against the emulator, in virtual time: killed anywhere, billed once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import pytest

from prefect_eachlabs.batch.budget import Budget
from prefect_eachlabs.batch.buying import EngineBuyer
from prefect_eachlabs.batch.outcomes import BatchResult
from prefect_eachlabs.batch.plan import plan_batch
from prefect_eachlabs.batch.report import BatchFolder
from prefect_eachlabs.batch.run import Batch, BatchOptions
from prefect_eachlabs.engine.account import Interruption
from prefect_eachlabs.errors import ItemConflict, Skipped
from prefect_eachlabs.ledger.records import Intent, RecordState
from prefect_eachlabs.models import Item
from prefect_eachlabs.storage.base import ListedObject
from tests.batch.batch_kit import CountingShop, MemoryFiles, inline, prompts, source_of
from tests.memory_store import MemoryStore
from tests.protocol.kit import DESTINATION, Process, World, wanted
from tests.protocol.process import Bucket

PRICE_USD = 0.039
ITEM = wanted()

pytestmark = pytest.mark.usefixtures("undrawn")


def batch(process: Process, count: int, **options: Any) -> Coroutine[Any, Any, BatchResult]:
    """A run over so many prompts, as a process makes it."""

    async def run() -> BatchResult:
        store = process.engine.account.ledger(DESTINATION).store
        folder = BatchFolder(store, MemoryFiles(process.world.store), DESTINATION, "spring", inline)
        given = BatchOptions(**{"run_id": process.run_id, **options})
        made = Batch(EngineBuyer(process.engine), source_of(prompts(count)), folder, given, worker=inline)
        return await made.run(window=12)

    return process.run(run())


def billed_usd(world: World) -> float:
    """What the vendor's side says."""
    return float(world.emulator.tallies()["cost_usd"])


def items(count: int) -> list[Item]:
    return [Item.wanted(row["prompt"], item_id=row["id"]) for row in prompts(count)]


class Refusing:
    """A budget that says no."""

    def __init__(self, *, at: str) -> None:
        self.at = at
        self.asked = 0

    async def approve(self, item: Item) -> None:
        self.asked += 1
        if self.at == "approve":
            raise Skipped("no")

    def check(self, item: Item) -> None:
        if self.at == "check":
            raise Skipped("no")

    def ordered(self, item: Item, prediction_id: str | None) -> None:
        raise AssertionError("nothing may be ordered")


# What a batch may ask of the engine.


async def test_an_item_presumed_new_is_claimed_without_a_read() -> None:
    world = World()
    process = world.process()
    await process.obtain(ITEM, presume_new=True)
    read = process.count("S3 GET")  # what the first claim of a process looks at
    await process.obtain(wanted(2), presume_new=True)
    assert process.count("S3 GET") == read
    world.check([ITEM, wanted(2)])


async def test_an_item_wrongly_presumed_new_is_found_and_not_bought_again() -> None:
    world = World()
    await world.process().obtain(ITEM)
    process = world.process()
    image = await process.obtain(ITEM, presume_new=True)
    assert image.reused
    assert process.count("POST") == 0
    world.check([ITEM])


@pytest.mark.parametrize("at", ["approve", "check"])
async def test_a_purse_that_says_no_leaves_no_trace_and_no_place_taken(at: str) -> None:
    world = World(settings={"requests_per_minute": 60, "max_in_flight": 1})
    process = world.process()
    for number in range(3):
        with pytest.raises(Skipped):
            await process.obtain(wanted(number), budget=Refusing(at=at), presume_new=True)
    assert world.records() == []
    assert process.count("S3 PUT") == process.count("POST") == 0
    await process.obtain(ITEM)
    world.check([ITEM])


async def test_what_was_bought_already_is_stored_although_the_purse_is_empty() -> None:
    world = World()
    first = world.process(die_at="after POST")
    await first.dies(first.obtain(ITEM))
    budget = Refusing(at="approve")
    image = await world.process().obtain(ITEM, budget=budget)
    assert not image.reused or image.prediction_id
    assert budget.asked == 0
    world.check([ITEM])


async def test_a_dead_claim_that_bought_nothing_is_free_again_when_the_purse_says_no() -> None:
    world = World()
    first = world.process(die_at="before POST")
    await first.dies(first.obtain(ITEM))
    with pytest.raises(Skipped):
        await world.process().obtain(ITEM, budget=Refusing(at="approve"))
    record = world.record(ITEM)
    assert (record.state, record.intent, record.unsettled_since) == (RecordState.CLAIMED, Intent.IDLE, None)
    before = world.now()
    await world.process().obtain(ITEM)
    assert world.now() - before < 10
    world.check([ITEM])


# Whole batches.


@pytest.mark.parametrize("die_at", range(20, 180, 22))
async def test_a_batch_killed_anywhere_and_run_again_bills_each_row_once(die_at: int) -> None:
    world = World()
    first = world.process(die_at=die_at)
    await first.dies(batch(first, 16))
    result = await batch(world.process(), 16)
    assert result.stored + result.reused == 16
    world.check(items(16))


async def test_a_batch_killed_twice_with_lost_answers_bills_each_row_once() -> None:
    world = World("create:lost_answer=0.1", "create:error_after=0.05", "get:cut_body=0.05")
    for die_at in (150, 190):
        process = world.process(die_at=die_at)
        await process.dies(batch(process, 40))
    result = await batch(world.process(), 40)
    assert result.stored + result.reused == 40
    world.check(items(40))


@pytest.mark.parametrize(("price_usd", "stored"), [(PRICE_USD, 5), (0.019, 10)])
async def test_failing_downloads_do_not_hide_what_was_bought_from_the_budget(price_usd: float, stored: int) -> None:
    world = World("picture:error,status=503,first=4", cost_usd=price_usd)
    result = await batch(world.process(), 40, budget_usd=0.2)
    assert billed_usd(world) <= 0.2
    assert result.cost_usd == pytest.approx(billed_usd(world))
    assert (result.stored, result.reused, result.cost_unknown) == (stored, 0, 0)


async def test_pictures_that_cannot_be_downloaded_count_as_what_they_cost() -> None:
    world = World("picture:error,status=503")
    result = await batch(world.process(), 40, budget_usd=0.2)
    assert len(world.bought()) == 5 == result.failed
    assert result.cost_usd == pytest.approx(billed_usd(world)) == pytest.approx(5 * PRICE_USD)
    world.set_faults()
    again = await batch(world.process(), 40, budget_usd=0.0001)
    assert (again.reused, again.stored, again.cost_usd) == (5, 0, 0)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("is_price_known", [True, False])
async def test_lost_answers_that_are_reported_keep_their_price_set_aside(seed: int, is_price_known: bool) -> None:
    world = World("create:lost_answer=0.4" if is_price_known else "create:lost_answer,next=1", seed=seed)
    if is_price_known:
        await batch(world.process(run_id="price"), 1)
    before = billed_usd(world)
    result = await batch(world.process(), 60, budget_usd=0.2, on_ambiguous="fail")
    billed = billed_usd(world) - before
    assert billed <= 0.2
    assert result.cost_usd <= billed <= result.cost_usd + result.cost_unknown * PRICE_USD + 1e-9
    assert result.cost_unknown == result.ambiguous


@pytest.mark.parametrize("seed", range(3))
async def test_lost_answers_that_are_settled_cost_what_was_billed(seed: int) -> None:
    world = World("create:lost_answer=0.4", seed=seed)
    result = await batch(world.process(), 40, budget_usd=0.2)
    assert billed_usd(world) <= 0.2
    assert result.cost_usd == pytest.approx(billed_usd(world))
    assert (result.reused, result.cost_unknown) == (0, 0)


@pytest.mark.parametrize("die_at", [(40, 40, 60), (75, 100, 40)])
async def test_one_run_killed_three_times_keeps_its_one_budget(die_at: tuple[int, ...]) -> None:
    world = World("create:lost_answer=0.1", "picture:error,status=503,first=4", service_seconds=3.0)
    for boundary in die_at:
        process = world.process(run_id="flow-run", die_at=boundary)
        await process.until_it_ends(batch(process, 30, budget_usd=0.4))
    result = await batch(world.process(run_id="flow-run"), 30, budget_usd=0.4)
    assert [process.dead for process in world.processes] == [True, True, True, False]
    assert billed_usd(world) <= 0.4
    assert result.cost_usd == pytest.approx(billed_usd(world))
    assert (result.reused, result.cost_unknown) == (0, 0)
    assert result.stored == round(billed_usd(world) / PRICE_USD)


async def test_what_a_killed_run_had_ordered_is_billed_to_that_run_alone() -> None:
    world = World(service_seconds=30.0)
    first = world.process(die_at="after POST")
    await first.dies(batch(first, 1))
    result = await batch(world.process(), 1)
    assert (result.stored, result.reused, result.cost_usd) == (0, 1, 0)
    assert result.pictures_cost_usd == pytest.approx(PRICE_USD)
    world.check(items(1))


async def test_a_price_that_no_report_knows_is_told_by_the_accounts_executions() -> None:
    world = World()
    await world.process().obtain(wanted(99))
    result = await batch(world.process(), 5, budget_usd=0.01)
    assert (result.stored, result.skipped) == (0, 5)
    assert len(world.bought()) == 1


async def test_a_price_that_nobody_knows_is_warned_of_and_exceeds_a_budget_by_one_picture(
    caplog: pytest.LogCaptureFixture,
) -> None:
    world = World()
    result = await batch(world.process(), 20, budget_usd=0.01)
    assert (result.stored, result.skipped) == (1, 19)
    assert result.cost_usd == pytest.approx(PRICE_USD)
    assert "can be exceeded by its price" in caplog.text


async def test_an_interrupted_run_cancels_what_is_in_flight_past_its_deadline_too(
    caplog: pytest.LogCaptureFixture,
) -> None:
    world = World("prediction:stuck", settings={"max_in_flight": 3})
    process = world.process()
    going = asyncio.ensure_future(batch(process, 5, deadline_seconds=20.0))
    await asyncio.sleep(60)
    assert (process.engine.slots_past_deadline, process.engine.in_flight) == (3, 3)
    going.cancel()
    await asyncio.wait({going})
    assert [job.cancelled is not None for job in world.bought()] == [True] * 3
    assert set(process.engine.account.interruptions.values()) == {Interruption.CANCELLED}
    assert {record.state for record in world.records()} == {RecordState.CANCELLED}
    report = world.store.json(DESTINATION.key("batches/spring/report.json"))
    assert (report["failures_by_kind"]["failed"], report["cost_unknown"]) == ({"cancelled": 3}, 0)
    assert "held by predictions past their deadlines: 3." in caplog.text


async def test_a_row_whose_picture_was_stored_after_its_deadline_is_stored_in_the_report() -> None:
    world = World("prediction:slow,seconds=40,next=1", settings={"max_in_flight": 1})
    result = await batch(world.process(), 12, deadline_seconds=20.0)
    assert (result.stored, result.failed, result.cost_unknown) == (12, 0, 0)
    assert result.cost_usd == pytest.approx(billed_usd(world))
    world.check(items(12))


async def test_a_dry_run_reads_the_records_that_no_report_knows() -> None:
    world = World(service_seconds=30.0, settings={"max_in_flight": 4})
    process = world.process()
    going = asyncio.ensure_future(batch(process, 4))
    await asyncio.sleep(10)
    process.kill()
    changed = [*prompts(3), {"id": "item-00003", "prompt": "another"}, {"id": "item-00004", "prompt": "new"}]
    looking = world.process()
    looking.engine.account.catalogue.beside_the_loop = inline
    store = looking.engine.account.ledger(DESTINATION).store
    folder = BatchFolder(store, MemoryFiles(world.store), DESTINATION, "spring", inline)
    made = Batch(EngineBuyer(looking.engine), source_of(changed), folder, BatchOptions(run_id="dry"), worker=inline)
    plan = await looking.run(plan_batch(made, looking.settings))
    assert (plan.items, plan.new, plan.reused, plan.failed) == (5, 1, 3, 1)
    assert "item conflict" in plan.why
    going.cancel()


async def test_a_dry_run_knows_that_a_recorded_picture_is_gone() -> None:
    world = World()
    await batch(world.process(run_id="R"), 2)
    await asyncio.sleep(100)
    del world.store.objects["kit/images/item-00001.png"]
    looking = world.process()
    looking.engine.account.catalogue.beside_the_loop = inline
    store = looking.engine.account.ledger(DESTINATION).store
    folder = BatchFolder(store, MemoryFiles(world.store), DESTINATION, "spring", inline)
    for rebuy_missing, counts in ((False, (1, 0, 1)), (True, (1, 1, 0))):
        options = BatchOptions(run_id="dry", rebuy_missing=rebuy_missing)
        made = Batch(EngineBuyer(looking.engine), source_of(prompts(2)), folder, options, worker=inline)
        plan = await looking.run(plan_batch(made, looking.settings))
        assert (plan.reused, plan.new, plan.failed) == counts
    assert (await batch(world.process(run_id="S"), 2)).failed == 1


async def test_an_ambiguous_row_is_looked_at_again_by_the_next_run() -> None:
    world = World("create:lost_answer,next=1")
    result = await batch(world.process(), 3, on_ambiguous="fail")
    assert (result.stored, result.ambiguous) == (2, 1)
    result = await batch(world.process(), 3)
    assert (result.reused, result.ambiguous) == (3, 0)
    world.check(items(3))


async def test_a_killed_run_with_a_budget_still_stores_what_it_has_in_flight() -> None:
    world = World(service_seconds=30.0)
    first = world.process()
    # The price is learned from an earlier picture, so that many are in flight when it dies.
    await batch(first, 1)
    second = world.process(die_at=200)
    await second.dies(batch(second, 30, budget_usd=0.5))
    in_flight = len(world.bought()) - 1
    assert in_flight > 1
    result = await batch(world.process(), 30, budget_usd=0.0001)
    assert result.stored + result.reused == 1 + in_flight
    assert len(world.bought()) == 1 + in_flight


async def test_an_empty_balance_is_met_by_few_and_told() -> None:
    world = World(balance_usd=10 * PRICE_USD)
    process = world.process()
    result = await batch(process, 200)
    assert result.stored == 10
    assert result.failed <= 2
    assert "insufficient balance" in str(result.failures_by_kind)
    assert world.now() < 400


def test_a_purse_wants_no_more_than_a_model_of_its_own() -> None:
    budget = Budget(1.0, CountingShop(MemoryStore()))
    budget.learn("flux", 0.02, count=3)
    assert budget.price_of("flux") == (pytest.approx(0.02), 3, "report")
    assert budget.price_of("gemini") is None
    assert not budget.is_exhausted("gemini")
    budget.resume("flux", told=45, cost_usd=0.99, highest_usd=0.022, untold=0)
    assert budget.is_exhausted("flux")


async def test_a_bucket_that_is_slow_hides_nothing_that_the_run_had_bought_before_it_was_killed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    listed = Bucket.list

    async def slow(self: Bucket, prefix: str) -> AsyncIterator[ListedObject]:
        if "/images/" in prefix:
            await asyncio.sleep(20.0)
        async for row in listed(self, prefix):
            yield row

    world = World()
    await batch(world.process(run_id="earlier"), 1)
    await asyncio.sleep(300)
    first = world.process(run_id="R")
    work = asyncio.ensure_future(first.until_it_ends(batch(first, 30, budget_usd=0.45)))
    await asyncio.sleep(4.5)
    world.set_faults("create:lost_answer", "executions:error")
    await asyncio.sleep(10.5)
    first.kill()
    await work
    world.set_faults()
    await asyncio.sleep(5)
    monkeypatch.setattr(Bucket, "list", slow)
    await batch(world.process(run_id="R"), 30, budget_usd=0.45)
    assert billed_usd(world) - PRICE_USD <= 0.45


async def test_what_another_run_has_replaced_is_billed_to_the_run_that_had_bought_it() -> None:
    world = World()
    first = world.process(run_id="R")
    work = asyncio.ensure_future(first.until_it_ends(batch(first, 4, budget_usd=0.16)))
    while not world.store.keys("kit/records/") or world.records()[0].state is not RecordState.STORED:
        await asyncio.sleep(0.01)
    first.kill()
    await work
    await asyncio.sleep(100)
    stored = next(record.item_id for record in world.records() if record.state is RecordState.STORED)
    await world.process(run_id="S").obtain(wanted(0, item_id=stored, prompt="another"), replace=True)
    result = await batch(world.process(run_id="R"), 4, budget_usd=0.16)
    assert result.cost_usd == pytest.approx(billed_usd(world) - PRICE_USD)
    assert result.cost_unknown == 0


async def test_a_row_whose_picture_another_batch_has_replaced_since_is_reported_as_what_it_is_now() -> None:
    world = World()
    await batch(world.process(run_id="R"), 2)
    await asyncio.sleep(10)
    one, other = sorted(world.records(), key=lambda record: record.item_id)
    again = wanted(0, item_id=one.item_id, prompt=one.input["prompt"])
    bought = await world.process(run_id="S").obtain(again, replace=True)
    await world.process(run_id="T").obtain(wanted(0, item_id=other.item_id, prompt="another"), replace=True)
    result = await batch(world.process(run_id="U"), 2)
    assert (result.reused, result.failed) == (1, 1)
    report = world.store.objects["kit/batches/spring/report.jsonl"].body
    told, refused = (json.loads(line) for line in report.splitlines())
    assert told["prediction_id"] == bought.prediction_id
    assert refused["error"]["kind"] == ItemConflict.default_kind


async def test_a_run_that_is_interrupted_while_it_looks_for_costs_cancels_what_is_past_its_deadline() -> None:
    settings = {"requests_per_minute": None, "deadline_seconds": 30.0}
    world = World("prediction:slow,seconds=400", service_seconds=20.0, settings=settings)
    work = asyncio.ensure_future(batch(world.process(), 3))
    await asyncio.sleep(33)
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    assert [job.status_at(world.now()) for job in world.bought()] == ["cancelled"] * 3
