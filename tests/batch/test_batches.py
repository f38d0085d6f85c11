"""Batches in virtual time: every row comes to one of five ends, and nothing is bought twice."""

from __future__ import annotations

import asyncio
import io
from collections import Counter

import pytest

from prefect_eachlabs.batch.outcomes import Outcome, RowState
from prefect_eachlabs.batch.plan import estimated_seconds, plan_batch
from prefect_eachlabs.batch.progress import Progress, duration
from prefect_eachlabs.batch.run import Chunk, Chunks, window_for
from prefect_eachlabs.batch.source import Source
from prefect_eachlabs.batch.tables import CsvTable, Lines
from prefect_eachlabs.errors import (
    BadInput,
    ContentRefused,
    EachlabsError,
    FormatNotAllowed,
    KeyRefused,
    OutcomeUnknown,
    PredictionFailed,
    PredictionTimedOut,
    StoreFailed,
)
from prefect_eachlabs.models import Item
from prefect_eachlabs.settings import AccountSettings
from tests.batch.batch_kit import (
    PRICE_USD,
    CountingShop,
    as_it_was,
    batch_of,
    lines_of,
    prompts,
    run,
    source_of,
    totals_of,
)
from tests.memory_store import MemoryStore

pytestmark = pytest.mark.usefixtures("undrawn")


def states_of(store: MemoryStore) -> list[str]:
    return [row["state"] for row in lines_of(store)]


def failing(*numbers: int, error: EachlabsError | None = None) -> dict[str, EachlabsError]:
    return {f"item-{number:05d}": error or PredictionFailed("the model fell over") for number in numbers}


# Every row comes to its end.


async def test_every_row_comes_to_one_of_five_ends_and_stands_in_the_report_in_order() -> None:
    ends = {
        "item-00002": PredictionFailed("the model fell over", prediction_id="p2"),
        "item-00003": OutcomeUnknown("nobody knows"),
        "item-00004": ContentRefused("no", kind="content refused"),
    }

    shop = CountingShop(MemoryStore(), ending=lambda item: ends.get(item.item_id))
    rows = [*prompts(6), {"id": "item-00000", "prompt": "again"}, {"id": "no id", "prompt": "x"}]
    result = await run(shop, source_of(rows))
    assert (result.stored, result.reused, result.failed, result.ambiguous, result.skipped) == (3, 0, 4, 1, 0)
    assert result.items == 8 == result.stored + result.reused + result.failed + result.ambiguous + result.skipped
    assert states_of(shop.store) == ["stored", "stored", "failed", "ambiguous", "failed", "stored", "failed", "failed"]
    assert [row["row"] for row in lines_of(shop.store)] == list(range(2, 10))
    assert (
        result.why == "4 failed (2 bad input, 1 content refused, 1 prediction failed), 1 ambiguous (1 outcome unknown)"
    )
    assert result.cost_usd == pytest.approx(3 * PRICE_USD)
    assert result.cost_by_model == {"gemini": {"pictures": 3, "cost_usd": 0.12, "mean_usd": 0.04}}


async def test_many_rows_are_in_the_air_but_never_more_than_the_window() -> None:
    shop = CountingShop(MemoryStore(), max_in_flight=10)
    result = await run(shop, source_of(prompts(200)), window=40)
    assert result.stored == 200
    assert shop.worst_in_the_air == 40
    # Ten at a time, five seconds each, and the first one alone for two.
    assert asyncio.get_running_loop().time() <= 200 * 5 / 10 + 5


async def test_equal_rows_without_ids_are_pictures_of_their_own() -> None:
    shop = CountingShop(MemoryStore())
    result = await run(shop, source_of("prompt\nfox\nfox\ndog\nfox\n"))
    assert result.stored == 4
    fingerprint = next(item_id for item_id in shop.bought if item_id.endswith("-2")).removesuffix("-2")
    assert {fingerprint, f"{fingerprint}-2", f"{fingerprint}-3"} < set(shop.bought)


async def test_what_may_be_repeated_is_and_only_so_often() -> None:
    attempts: Counter[str] = Counter()

    def ending(item: Item) -> EachlabsError | None:
        attempts[item.item_id] += 1
        if item.item_id == "item-00001" or (item.item_id == "item-00000" and attempts[item.item_id] < 3):
            return StoreFailed("the bucket is away", prediction_id="p")
        return None

    shop = CountingShop(MemoryStore(), ending=ending)
    result = await run(shop, source_of(prompts(3)))
    assert (result.stored, result.failed) == (2, 1)
    assert attempts == {"item-00000": 3, "item-00001": 5, "item-00002": 1}


async def test_a_fault_of_ours_is_a_failed_row_and_not_the_end() -> None:
    shop = CountingShop(MemoryStore(), ending=lambda item: 1 / 0 if item.item_id == "item-00001" else None)  # type: ignore[return-value]
    result = await run(shop, source_of(prompts(3)))
    assert (result.stored, result.failed) == (2, 1)
    assert lines_of(shop.store)[1]["error"]["kind"] == "unexpected"


# What ends a batch.


class TornStream(io.BytesIO):
    """A file that can be read once for each allowed line, and not on."""

    def __init__(self, data: bytes, lines: int) -> None:
        super().__init__(data)
        self._left = lines

    def readline(self, size: int | None = -1, /) -> bytes:
        if not self._left:
            raise StoreFailed("the source's bucket is away")
        self._left -= 1
        return super().readline(size)


async def test_a_source_that_cannot_be_read_on_leaves_a_run_that_the_next_one_completes() -> None:
    data = ("id,prompt\n" + "".join(f"i{number},fox {number}\n" for number in range(500))).encode()

    def source(lines: int) -> Source:
        return Source(CsvTable("x.csv", Lines(TornStream(data, lines))), "x.csv")

    shop = CountingShop(MemoryStore())
    result = await run(shop, source(251))
    assert (result.state, result.stored) == ("stopped", 200)
    assert totals_of(shop.store)["state"] == "stopped"
    assert len(lines_of(shop.store)) == 200
    assert not [key for key in shop.store.keys("p/batches/spring/runs/") if key.endswith("report.jsonl")]
    result = await run(shop, source(1_000), run_id="run-2")
    assert (result.state, result.stored, result.reused) == ("completed", 300, 200)
    assert max(Counter(shop.bought).values()) == 1


# Running it again.


async def test_a_finished_batch_costs_a_listing_and_its_report_and_no_question_to_anybody() -> None:
    shop = CountingShop(MemoryStore())
    store = shop.store
    lines = []
    for number, row in enumerate(prompts(500)):
        item = Item.wanted(row["prompt"], item_id=row["id"])
        found = Outcome(number + 2, RowState.STORED, item.item_id, item.fingerprint, "gemini", cost_usd=PRICE_USD)
        lines.append(found.to_line())
        await store.put(f"p/images/{row['id']}.png", b"", content_type="image/png")
    report = b"".join(lines)
    await store.put("p/batches/spring/runs/20260101T000000Z-a/report.jsonl", report, content_type="x")
    await store.put("p/batches/spring/contact-sheet.png", b"", content_type="image/png")
    store.operations.clear()
    result = await run(shop, source_of(prompts(500)))
    assert (result.reused, result.items) == (500, 500)
    assert shop.asked == []
    assert result.cost_usd == 0
    assert result.pictures_cost_usd == pytest.approx(500 * PRICE_USD)
    assert len(store.operations) <= 17, Counter(store.operations)
    assert store.count("get") == 1, "the page that it had"
    assert states_of(store) == ["reused"] * 500


async def test_what_failed_for_good_stays_failed_until_it_is_asked_for() -> None:
    ends = failing(1)

    shop = CountingShop(MemoryStore(), ending=lambda item: ends.get(item.item_id))
    await run(shop, source_of(prompts(3)))
    ends.clear()
    shop.asked.clear()
    result = await run(shop, source_of(prompts(3)), run_id="run-2")
    assert (result.reused, result.failed, shop.asked) == (2, 1, [])
    assert "the model fell over" in lines_of(shop.store)[1]["error"]["message"]
    result = await run(shop, source_of(prompts(3)), run_id="run-3", retry_failed=True)
    assert (result.reused, result.stored, shop.asked) == (2, 1, ["item-00001"])


@pytest.mark.parametrize(
    "error",
    [
        PredictionTimedOut("late", prediction_id="p"),
        OutcomeUnknown("who knows"),
        KeyRefused("the key"),
        StoreFailed("s3"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_what_did_not_fail_for_good_is_tried_again(error: EachlabsError) -> None:
    ends: dict[str, EachlabsError] = failing(0, error=error)

    shop = CountingShop(MemoryStore(), ending=lambda item: ends.get(item.item_id))
    await run(shop, source_of(prompts(2)))
    ends.clear()
    result = await run(shop, source_of(prompts(2)), run_id="run-2")
    assert result.stored + result.reused == 2


async def test_new_rows_are_bought_and_old_ones_reused_wherever_they_stand_unless_changed_or_gone() -> None:
    shop = CountingShop(MemoryStore())
    await run(shop, source_of("id,prompt,shelf\na,fox,A\nb,dog,A\nc,cow,A\nd,hen,A\n"))
    del shop.store.objects["p/images/c.png"]
    shop.asked.clear()
    result = await run(
        shop, source_of("id,prompt,shelf\ne,cat,B\nb,owl,B\nd,hen,B\nc,cow,B\na,fox,B\n"), run_id="run-2"
    )
    assert (set(shop.asked), shop.bought[4:]) == ({"e", "b", "c"}, ["e", "b"]), "of what is gone the engine knows"
    assert (result.stored, result.reused) == (2, 3)
    assert [row["labels"] for row in lines_of(shop.store)] == [{"shelf": "B"}] * 5
    assert [row["row"] for row in lines_of(shop.store)] == [2, 3, 4, 5, 6]


async def test_a_killed_run_leaves_a_true_report_and_the_next_one_goes_on_from_it() -> None:
    shop = CountingShop(MemoryStore())
    going = asyncio.ensure_future(run(shop, source_of(prompts(300)), window=40))
    await asyncio.sleep(100)
    killed = as_it_was(shop)
    going.cancel()
    await asyncio.wait({going})

    name = next(key for key in killed.store.keys("p/batches/") if "part-" in key)
    told = lines_of(killed.store, name.removeprefix("p/batches/spring/"))
    assert len(told) > 50
    assert all(row["uri"].removeprefix("s3://bucket/") in killed.store.objects for row in told)
    running = next(key for key in killed.store.keys("p/batches/") if key.endswith("report.json"))
    assert killed.store.json(running)["state"] == "running"

    result = await run(killed, source_of(prompts(300)), run_id="run-2")
    assert result.items == 300
    assert result.stored + result.reused == 300
    # Rows of the part cost no question; those between the part and the kill cost one each.
    assert len(killed.asked) == 300 - len(told)
    assert not set(killed.bought) & {row["item_id"] for row in told}


async def test_a_run_killed_twice_is_known_by_all_its_parts() -> None:
    shop = CountingShop(MemoryStore())
    for number in range(2):
        going = asyncio.ensure_future(run(shop, source_of(prompts(400)), run_id=f"run-{number}"))
        await asyncio.sleep(70)
        killed = as_it_was(shop)
        going.cancel()
        await asyncio.wait({going})
        shop = killed
    result = await run(shop, source_of(prompts(400)), run_id="last")
    assert result.stored + result.reused == 400
    assert len(shop.asked) < 200
    assert len(lines_of(shop.store)) == 400


async def test_a_cancelled_run_cancels_each_row_once_and_reports_what_came_of_every_row() -> None:
    shop = CountingShop(MemoryStore())
    going = asyncio.ensure_future(run(shop, source_of(prompts(300))))
    await asyncio.sleep(23)
    going.cancel()
    with pytest.raises(asyncio.CancelledError):
        await going
    assert shop.in_the_air == 0
    assert max(Counter(shop.cancelled).values()) == 1
    told = lines_of(shop.store)
    assert {row["item_id"] for row in told if row["state"] == "stored"} == set(shop.records)
    assert {row["item_id"] for row in told} == {*shop.records, *shop.cancelled}
    assert totals_of(shop.store)["state"] == "interrupted"
    assert "p/batches/spring/index.html" in shop.store.objects


@pytest.mark.parametrize("cut_seconds", [None, 23])
async def test_whoever_shows_the_chunks_sees_each_row_that_began_and_the_end_at_once(cut_seconds: float | None) -> None:
    """The buying does not wait for them, and a cancelled run leaves no chunk waiting."""

    loop, chunks = asyncio.get_running_loop(), Chunks(20)
    going = asyncio.ensure_future(
        batch_of(CountingShop(MemoryStore()), source_of(prompts(50))).run(window=40, chunks=chunks)
    )
    going.add_done_callback(lambda _: chunks.flush())
    if cut_seconds is not None:
        loop.call_later(cut_seconds, going.cancel)
    shown: list[Chunk] = []
    while not going.done():
        shown += await chunks.next(3_600)
    assert loop.time() < 60, "nobody waits for news after the end"
    ends = [len(await chunk.ended()) for chunk in shown]
    assert [chunk.name for chunk in shown][:2] == ["rows 2 to 21", "rows 22 to 41"]
    assert ends == [len(chunk.rows) for chunk in shown]
    if cut_seconds is None:
        assert ends == [20, 20, 10]
    else:
        assert going.cancelled()


# Money.


async def test_a_model_whose_pictures_cannot_be_stored_is_ordered_no_further() -> None:
    def ending(item: Item) -> EachlabsError | None:
        return FormatNotAllowed("Allow it: --formats png,jpeg.") if item.model == "jpegs" else None

    shop = CountingShop(MemoryStore(), ending=ending)
    rows = [{**row, "model": "pngs" if number % 2 else "jpegs"} for number, row in enumerate(prompts(100))]
    result = await run(shop, source_of(rows))
    bought = Counter(int(item_id[-1]) % 2 for item_id in shop.bought)
    assert bought[1] == result.stored == 50
    assert bought[0] == result.failed <= 3 + 10
    assert result.failures_by_kind["skipped"] == {"not tried: format not allowed": 50 - bought[0]}


async def test_an_unknown_price_is_learned_from_one_picture_before_others_are_bought() -> None:
    shop = CountingShop(MemoryStore())
    going = asyncio.ensure_future(run(shop, source_of(prompts(100)), budget_usd=1.0))
    await asyncio.sleep(4.9)
    assert len(shop.bought) == 1
    await asyncio.sleep(1)
    assert len(shop.bought) == 11
    await going


@pytest.mark.parametrize(("told_usd", "settled_usd"), [(PRICE_USD, PRICE_USD), (0.0, PRICE_USD), (None, None)])
async def test_of_many_models_whose_price_nobody_knows_one_picture_exceeds_the_budget(
    told_usd: float | None, settled_usd: float | None
) -> None:
    shop = CountingShop(MemoryStore(), told_usd=told_usd, settled_usd=settled_usd)
    rows = [{**row, "model": f"model-{number}"} for number, row in enumerate(prompts(20))]
    result = await run(shop, source_of(rows), budget_usd=0.01)
    assert (len(shop.bought), result.stored, result.skipped) == (1, 1, 19)


async def test_a_price_that_has_risen_is_met_by_one_picture_alone_although_costs_are_told_late() -> None:
    shop = CountingShop(MemoryStore())
    await run(shop, source_of(prompts(5)))
    shop.told_usd, shop.settled_usd = 0.0, 0.39
    before = len(shop.bought)
    await run(shop, source_of(prompts(40)), run_id="run-2", budget_usd=0.40)
    assert len(shop.bought) - before == 1


async def test_a_price_that_is_known_and_never_told_again_is_waited_for_once_and_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    shop = CountingShop(MemoryStore())
    await run(shop, source_of(prompts(5)))
    shop.told_usd, shop.settled_usd = None, None
    result = await run(shop, source_of(prompts(40)), run_id="run-2", budget_usd=10 * PRICE_USD)
    assert (result.stored, result.cost_unknown) == (10, 10)
    assert caplog.text.count("can be exceeded by what it rose") == 1


@pytest.mark.parametrize(("models", "most"), [(4, 10), (20, 40)])
async def test_models_whose_price_nobody_knows_are_learned_one_after_the_other_and_share_the_one_picture(
    models: int, most: int
) -> None:
    shop = CountingShop(MemoryStore())
    rows = [{**row, "model": f"model-{number % models}"} for number, row in enumerate(prompts(40))]
    result = await run(shop, source_of(rows), budget_usd=most * PRICE_USD)
    assert result.stored + result.skipped == 40
    assert most * PRICE_USD <= result.cost_usd + 1e-9 <= min(most + 1, 40) * PRICE_USD + 2e-9


async def test_a_price_that_is_settled_later_is_asked_for_until_it_is_told() -> None:
    shop = CountingShop(MemoryStore(), told_usd=0.0)
    result = await run(shop, source_of(prompts(100)), budget_usd=1.0)
    assert shop.price_questions == 1
    assert (result.stored, result.skipped) == (25, 75)


async def test_a_price_that_is_never_told_ends_buying_under_a_budget() -> None:
    shop = CountingShop(MemoryStore(), told_usd=None, settled_usd=None)
    result = await run(shop, source_of(prompts(10)), budget_usd=1.0)
    assert (result.stored, result.skipped) == (1, 9)
    assert "9 price unknown" in result.why


async def test_failed_predictions_cost_nothing_and_leave_their_share_to_others() -> None:
    ends = failing(*range(10))

    shop = CountingShop(MemoryStore(), ending=lambda item: ends.get(item.item_id))
    result = await run(shop, source_of(prompts(100)), budget_usd=1.0)
    assert (result.failed, result.stored, result.skipped) == (10, 25, 65)


async def test_a_budget_too_small_for_one_known_picture_buys_none() -> None:
    shop = CountingShop(MemoryStore())
    await run(shop, source_of(prompts(2)))
    shop.asked.clear()
    result = await run(shop, source_of(prompts(5)), run_id="run-2", budget_usd=0.01)
    assert (result.reused, result.stored, result.skipped) == (2, 0, 3)
    assert shop.asked == []


async def test_when_the_budget_is_spent_only_items_with_a_record_are_asked_for() -> None:
    shop = CountingShop(MemoryStore())
    await run(shop, source_of(prompts(1)))
    await shop.store.put("p/records/item-00003.json", b"{}", content_type="application/json")
    shop.asked.clear()
    shop.store.operations.clear()
    await run(shop, source_of(prompts(200)), run_id="run-2", budget_usd=0.001)
    assert shop.asked == ["item-00003"]
    assert shop.store.count("list", "records/") == 1


async def test_a_run_that_prefect_runs_again_has_one_budget() -> None:
    shop = CountingShop(MemoryStore())
    await run(shop, source_of(prompts(10)), run_id="flow-run", budget_usd=1.0)
    result = await run(shop, source_of(prompts(100)), run_id="flow-run", budget_usd=1.0)
    assert (result.reused, result.stored, result.skipped) == (0, 25, 75)
    result = await run(shop, source_of(prompts(100)), run_id="flow-run", budget_usd=1.0)
    assert (result.reused, result.stored, result.skipped) == (0, 25, 75)
    assert result.cost_usd == pytest.approx(25 * PRICE_USD)
    result = await run(shop, source_of(prompts(100)), run_id="another", budget_usd=1.0)
    assert (result.reused, result.stored) == (25, 25)


async def test_costs_that_are_told_late_are_in_the_report_and_in_the_records() -> None:
    shop = CountingShop(MemoryStore(), told_usd=0.0)
    result = await run(shop, source_of(prompts(250)))
    assert result.cost_usd == pytest.approx(250 * PRICE_USD)
    assert shop.pages_of_executions == 3
    assert {row["cost_usd"] for row in lines_of(shop.store)} == {PRICE_USD}
    assert shop.noted_usd == dict.fromkeys(shop.bought, PRICE_USD)


# Only looking.

LIMITED = AccountSettings(api_key="k")  # type: ignore[arg-type]  # pydantic makes a secret of it


async def test_a_dry_run_checks_everything_and_buys_and_writes_nothing() -> None:
    shop = CountingShop(MemoryStore())
    await run(shop, source_of(prompts(10)))
    before = dict(shop.store.objects)
    shop.asked.clear()
    rows = [*prompts(110), {"id": "item-00000", "prompt": "again"}]
    plan = await plan_batch(batch_of(shop, source_of(rows), run_id="dry"), LIMITED)
    assert (plan.items, plan.new, plan.reused, plan.failed) == (111, 100, 10, 1)
    assert plan.cost_usd == pytest.approx(100 * PRICE_USD)
    assert plan.seconds == pytest.approx(100 / 0.9 + 5, abs=1)
    assert shop.asked == []
    assert shop.checked == [90, 10], "a hundred rows at a time, less what is stored"
    assert shop.store.objects == before
    counts = plan.as_json()
    assert counts["items"] == sum(counts[s] for s in ("stored", "reused", "failed", "ambiguous", "skipped"))


def test_time_is_estimated_by_the_tighter_of_both_limits() -> None:
    unlimited = LIMITED.model_copy(update={"requests_per_minute": None, "max_in_flight": None})
    assert estimated_seconds(540, LIMITED, None) == pytest.approx(605)
    assert estimated_seconds(540, LIMITED, 60.0) == pytest.approx(540 * 6 + 60)
    assert estimated_seconds(540, unlimited, 5.0) is None
    assert estimated_seconds(0, LIMITED, 5.0) == 0
    assert duration(estimated_seconds(5_000, LIMITED, 5.0) or 0) == "93 min"
    assert (window_for(10), window_for(None)) == (40, 200)


# While it runs.


async def test_progress_tells_how_far_it_is_and_how_long_it_takes() -> None:
    seen: list[Progress] = []

    shop = CountingShop(MemoryStore(), max_in_flight=5)
    batch = batch_of(shop, source_of(prompts(300)), show=seen.append, show_seconds=30)
    await batch.run(window=40)
    assert 9 <= len(seen) <= 11
    middle = seen[4]
    assert middle.total == pytest.approx(300, rel=0.1)
    assert middle.per_minute == pytest.approx(60, rel=0.1)
    assert middle.left_seconds == pytest.approx(300 - 150, rel=0.2)
    assert middle.line().startswith(f"{middle.done} of ~")
    assert "a minute, $" in middle.line()


def test_an_unusable_batch_id_is_refused() -> None:
    shop = CountingShop(MemoryStore())
    for batch_id in ("", "..", "a/b", ".hidden", "x" * 200):
        with pytest.raises(BadInput, match="batch_id"):
            batch_of(shop, source_of(prompts(1)), batch_id=batch_id)
