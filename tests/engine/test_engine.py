"""What the gateway runs on its loop, as its callers see it; the protocol's own tests are in tests/protocol."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest

from prefect_eachlabs.errors import (
    BadInput,
    ItemConflict,
    PictureMissing,
    PredictionCancelled,
    PredictionTimedOut,
    StoreFailed,
)
from prefect_eachlabs.ledger.records import RecordState
from prefect_eachlabs.models import Destination, Prediction, PredictionStatus
from tests.protocol.kit import Process, World, options, wanted

A = wanted(1)


async def create(process: Process, **given: Any) -> Prediction:
    made = process.engine.create(A, process.world.destination, options=options(process.run_id, **given))
    return await process.run(made)


# ------------------------------------------------------------------------- the composite


async def test_an_item_becomes_a_picture_with_all_that_is_known_about_it() -> None:
    world = World(spread=0.0)
    image = await world.process().obtain(A)
    assert (image.item_id, image.uri) == ("item-1", "s3://bucket/kit/images/item-1.png")
    assert (image.width_px, image.height_px) == (16, 16)
    assert (image.cost_usd, image.predict_time_seconds) == (0.039, 2.0)
    assert (image.model, image.prompt, image.reused, image.more_uris) == ("gemini", "picture 1", False, ())
    stored = world.store.objects["kit/images/item-1.png"]
    assert image.size_bytes == len(stored.body)
    assert stored.content_type == "image/png"
    assert stored.metadata == {
        "prediction-id": image.prediction_id,
        "model": "gemini",
        "fingerprint": A.fingerprint,
        "outputs": "1",
        "cost-usd": "0.039",
        "predict-time-seconds": "2.0",
    }
    record = world.record(A)
    assert (record.sha256, record.size_bytes, record.cost_usd) == (image.sha256, image.size_bytes, 0.039)
    assert record.run_id == "run-1"


async def test_what_is_stored_costs_two_reads_and_nothing_else() -> None:
    world = World()
    first = await world.process().obtain(A)
    process = world.process()
    again = await process.obtain(A)
    assert again == first.model_copy(update={"reused": True})
    assert [operation.name.partition(" kit")[0] for operation in process.operations] == ["S3 GET", "S3 HEAD"]


async def test_the_same_item_asked_for_by_many_in_one_process_is_one_job() -> None:
    world = World()
    process = world.process()
    images = await asyncio.gather(*(process.obtain(A) for _ in range(20)))
    assert len({image.prediction_id for image in images}) == 1
    assert len(process.operations) == 11
    world.check([A])


async def test_the_same_item_in_two_destinations_is_two_pictures() -> None:
    world = World()
    process = world.process()
    other = Destination.parse("s3://bucket/other")
    await process.obtain(A)
    await process.run(process.engine.generate_and_store(A, other, options=options()))
    assert len(world.bought()) == 2
    assert world.store.keys("other/") == ["other/images/item-1.png", "other/records/item-1.json"]


async def test_another_input_under_the_same_id_is_refused_while_the_first_is_under_way() -> None:
    world = World()
    process = world.process()
    first = asyncio.ensure_future(process.obtain(A))
    await asyncio.sleep(1.0)
    with pytest.raises(ItemConflict):
        await process.obtain(wanted(2, item_id="item-1"))
    await first
    world.check([A])


async def test_an_error_reaches_every_caller_and_the_next_call_begins_anew() -> None:
    world = World()
    process = world.process(by_name=[("S3 GET", "refuse", 1)])
    outcomes = await asyncio.gather(process.obtain(A), process.obtain(A), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [StoreFailed, StoreFailed]
    await process.obtain(A)
    world.check([A])


async def test_a_picture_that_was_cut_on_the_way_is_downloaded_again() -> None:
    world = World("picture:truncated,at=1", "picture:bad_crc,at=2", "picture:html,at=3")
    process = world.process()
    await process.obtain(A)
    assert process.count("DOWNLOAD") == 4
    world.check([A])


async def test_a_picture_that_is_in_the_bucket_is_found_without_asking_the_api() -> None:
    world = World("prediction:output_several,value=2")
    first = world.process(die_at="before S3 PUT kit/records/item-1.json stored")
    await first.dies(first.obtain(A))
    second = world.process()
    image = await second.obtain(A)
    assert image.reused
    assert image.more_uris == ("s3://bucket/kit/images/item-1.2.png",)
    assert (image.cost_usd, image.predict_time_seconds) == (0.039, 2.0)
    assert second.count("GET") == second.count("DOWNLOAD") == 0
    world.check([A])


# ------------------------------------------------------------------------- step by step


async def test_create_finds_what_was_bought_and_buys_nothing_more() -> None:
    world = World()
    process = world.process()
    one, two = await create(process), await create(world.process())
    assert one.id == two.id
    assert (one.item_id, one.destination) == ("item-1", "s3://bucket/kit")
    assert len(world.bought()) == 1


async def test_create_of_what_is_stored_gives_it_back_ended() -> None:
    world = World()
    image = await world.process().obtain(A)
    process = world.process()
    prediction = await create(process)
    assert prediction.status is PredictionStatus.SUCCEEDED
    ended = await process.engine.wait(prediction)
    stored = await process.engine.store(ended, world.destination)
    assert stored == image.model_copy(update={"reused": True})
    world.check([A])


async def test_create_of_what_was_stored_and_is_gone_says_so_when_it_is_stored() -> None:
    world = World()
    await world.process().obtain(A)
    del world.store.objects["kit/images/item-1.png"]
    process = world.process()
    ended = await process.engine.wait(await create(process))
    with pytest.raises(PictureMissing):
        await process.engine.store(ended, world.destination)
    assert (await create(process, rebuy_missing=True)).id == world.bought()[1].id


async def test_wait_takes_an_id_alone() -> None:
    world = World()
    process = world.process()
    bought = await process.run(process.engine.create(A, world.destination, options=options()))
    ended = await process.engine.wait(bought.id)
    assert (ended.id, ended.status) == (bought.id, PredictionStatus.SUCCEEDED)
    assert ended.output_urls


async def test_store_wants_an_end_and_the_items_own_prediction() -> None:
    world = World()
    process = world.process()
    bought = await create(process)
    with pytest.raises(BadInput, match="await it first"):
        await process.engine.store(bought, world.destination)
    ended = await process.engine.wait(bought)
    other = ended.model_copy(update={"id": "another"})
    with pytest.raises(ItemConflict, match=bought.id):
        await process.engine.store(other, world.destination)
    await process.engine.store(ended, world.destination)
    world.check([A])


async def test_what_has_no_record_is_stored_under_one_of_its_own() -> None:
    """Ordered by hand, or for another destination: by its item's id if it has one, else by its own."""
    world = World()
    process = world.process()
    elsewhere = Destination.parse("s3://bucket/elsewhere")
    bought = await process.run(process.engine.create(A, world.destination, options=options()))
    ended = (await process.engine.wait(bought)).model_copy(update={"item_id": None})
    images = [await process.engine.store(ended, elsewhere) for _ in range(2)]
    assert {image.uri for image in images} == {f"s3://bucket/elsewhere/images/{bought.id}.png"}
    assert [image.reused for image in images] == [False, True]
    named = await process.engine.store(ended.model_copy(update={"item_id": "fox"}), elsewhere)
    assert named.uri == "s3://bucket/elsewhere/images/fox.png"
    assert world.store.keys("elsewhere/records/") == [
        f"elsewhere/records/{name}.json" for name in sorted([bought.id, "fox"])
    ]


async def test_what_was_stored_twice_at_once_is_stored_once() -> None:
    world = World()
    first, second = world.process(), world.process()
    ended = await first.engine.wait(await create(first))
    images = await asyncio.gather(*(p.engine.store(ended, world.destination) for p in (first, second, first)))
    assert len({image.sha256 for image in images}) == 1
    world.check([A])


# ----------------------------------------------------------------- deadlines and cancels


@pytest.mark.parametrize("seconds", [10.0, 100.0, 400.0])
async def test_a_deadline_counts_from_the_post_by_the_clock(seconds: float) -> None:
    world = World("prediction:stuck")
    process = world.process()
    with pytest.raises(PredictionTimedOut) as timed_out:
        await process.obtain(A, deadline_seconds=seconds)
    (job,) = world.bought()
    assert world.now() - job.created == pytest.approx(seconds, abs=0.2)
    assert timed_out.value.prediction_id == job.id
    assert timed_out.value.item_id == "item-1"


async def test_before_a_prediction_counts_as_timed_out_it_is_asked_about() -> None:
    """After one that took long nobody asks early, where requests are scarce."""
    world = World("prediction:slow,seconds=500,next=1")
    process = world.process(max_in_flight=1, deadline_seconds=10.0)
    with contextlib.suppress(PredictionTimedOut):
        await process.obtain(A)
    await process.obtain(wanted(2))
    assert world.record(wanted(2)).state is RecordState.STORED


async def test_cancel_says_how_it_ended() -> None:
    world = World(service_seconds=20.0)
    process = world.process()
    cancelled = await create(process)
    assert (await process.engine.cancel(cancelled.id)).status is PredictionStatus.CANCELLED
    with pytest.raises(PredictionCancelled):
        await process.engine.wait(cancelled)
    assert world.record(A).state is RecordState.CANCELLED


async def test_cancel_of_what_has_succeeded_says_so() -> None:
    world = World()
    process = world.process()
    bought = await create(process)
    await asyncio.sleep(10)
    assert (await process.engine.cancel(bought.id)).status is PredictionStatus.SUCCEEDED


# ------------------------------------------------------------------------------- the end


@pytest.mark.parametrize("seconds", [0.05, 0.15, 0.42, 0.47, 0.55, 1.0, 3.0])
async def test_closing_ends_jobs_where_they_may_be_interrupted_and_leaves_nothing_unwritten(seconds: float) -> None:
    world = World(service_seconds=20.0)
    process = world.process()
    work = asyncio.ensure_future(process.obtain(A))
    await asyncio.sleep(seconds)
    await process.engine.aclose()
    await asyncio.wait({work})
    named = world.named()
    assert all(named[job.id] == 1 for job in world.bought()), "bought, and nobody knows"
    await world.process().obtain(A)
    world.check([A])


async def test_closing_leaves_no_task_behind() -> None:
    world = World("create:lost_answer,next=1", "executions:missing_rows")
    before = asyncio.all_tasks()
    process = world.process()
    work = [asyncio.ensure_future(process.until_it_ends(process.obtain(wanted(number)))) for number in range(3)]
    await asyncio.sleep(3)
    await process.engine.aclose()
    await asyncio.sleep(1)
    left = [repr(task) for task in asyncio.all_tasks() - before - set(work) if "until_it_ends" not in repr(task)]
    assert left == [], left
