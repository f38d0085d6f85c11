"""What was paid for gets into the bucket, late or not, over nobody's object; nothing is bought in its place."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest

from prefect_eachlabs.errors import DownloadFailed, ItemConflict, NotYetSafe, OutputMissing, PredictionFailed
from prefect_eachlabs.images.store import DOWNLOADS_AT_A_TIME
from prefect_eachlabs.ledger.records import RecordState
from prefect_eachlabs.models import Media
from tests.protocol.kit import World, options, wanted

A = wanted(1)
OTHER = wanted(2, item_id="item-1")
RECORD, PICTURE = "kit/records/item-1.json", "kit/images/item-1.png"
LOGO = b"the company's own logo"


# ------------------------------------------------------------------------------ a picture that is late


@pytest.mark.parametrize("rebuy_missing", [True, False])
async def test_a_picture_that_is_some_seconds_late_is_fetched_not_bought_again(rebuy_missing: bool) -> None:
    """Its host answers 404 at first, as hosts do whose copies are not everywhere yet."""
    world = World("picture:not_found,next=3")
    await world.process().obtain(A, rebuy_missing=rebuy_missing)
    world.check([A])


async def test_a_picture_younger_than_a_day_is_never_taken_for_gone() -> None:
    """The vendor keeps outputs for 24 h: a host that denies one before that is wrong, and is asked again."""
    world = World("picture:not_found")
    for hours in (0, 23):
        await asyncio.sleep(hours * 3600)
        began = world.now()
        with pytest.raises(DownloadFailed):
            await world.process().obtain(A, rebuy_missing=True)
        assert world.now() - began < 120, "it is looked for within bounds"
    assert world.record(A).state is RecordState.CREATED
    world.set_faults()
    await world.process().obtain(A, rebuy_missing=True)
    world.check([A])


async def test_a_prediction_younger_than_a_day_that_the_api_denies_is_kept() -> None:
    world = World()
    first = world.process(die_at=f"after S3 PUT {RECORD} created")
    await first.dies(first.obtain(A))
    world.hidden[world.bought()[0].id] = 404
    with pytest.raises(NotYetSafe, match="does not know"):
        await world.process().obtain(A, rebuy_missing=True)
    world.hidden.clear()
    await world.process().obtain(A, rebuy_missing=True)
    world.check([A])


# ------------------------------------------------------------------------------ an output that is late


@pytest.mark.parametrize("items", [1, 12])
async def test_a_success_that_is_told_before_its_output_is_waited_for(items: int) -> None:
    """Seen by id or in the list; the slot in flight is free meanwhile."""
    world = World("prediction:late_output,seconds=20", service_seconds=5.0)
    wanted_items = [wanted(number) for number in range(items)]
    process = world.process(requests_per_minute=60, max_in_flight=10)
    await asyncio.gather(*map(process.obtain, wanted_items))
    world.check(wanted_items)


async def test_an_output_that_is_minutes_late_is_stored_by_the_next_run() -> None:
    """The run that bought it reports it after a minute; the item has not failed, and nothing is bought again."""
    world = World("prediction:late_output,seconds=600")
    process = world.process()
    with pytest.raises(NotYetSafe, match="no picture yet"):
        await process.obtain(A, retry_failed=True)
    assert 55 < world.now() < 90
    assert world.record(A).state is RecordState.CREATED
    await asyncio.sleep(600)
    for run in (process, world.process()):
        await run.obtain(A)
    world.check([A])


async def test_await_and_store_in_steps_wait_for_a_late_output_as_well() -> None:
    world = World("prediction:late_output,seconds=600")
    engine = world.process().engine
    bought = await engine.create(A, world.destination, options=options("run"))
    with pytest.raises(NotYetSafe, match="no picture yet") as late:
        await engine.wait(bought, run_id="run")
    assert late.value.retryable
    assert world.record(A).state is RecordState.CREATED
    await asyncio.sleep(600)
    await engine.store(await engine.wait(bought, run_id="run"), world.destination)
    world.check([A])


async def test_a_page_in_place_of_the_api_says_nothing_about_a_prediction() -> None:
    """A gateway's HTML 404 for two minutes: the API itself would say so in JSON."""
    world = World()
    process = world.process()
    work = asyncio.ensure_future(process.obtain(A))
    while not process.count("POST"):
        await asyncio.sleep(0.1)
    world.set_faults("get:html,status=404", "executions:html,status=404")
    await asyncio.sleep(120)
    assert not work.done()
    world.set_faults()
    await work
    world.check([A])


async def test_an_output_that_never_comes_fails_its_item_after_an_hour_and_is_bought_again_only_when_asked() -> None:
    world = World("prediction:output_null,next=1")
    with pytest.raises(NotYetSafe):
        await world.process().obtain(A)
    await asyncio.sleep(3700)
    with pytest.raises(OutputMissing):
        await world.process().obtain(A)
    with pytest.raises(PredictionFailed, match="only when asked"):
        await world.process().obtain(A)
    assert world.record(A).state is RecordState.FAILED
    assert len(world.bought()) == 1
    await world.process().obtain(A, retry_failed=True)
    assert len(world.bought()) == 2


# ------------------------------------------------------------------------------ several outputs


@pytest.mark.parametrize(("items", "limit"), [(1, None), (12, 60), (12, None)])
async def test_every_output_that_was_paid_for_is_stored(items: int, limit: int | None) -> None:
    """Also of the default model, and when the list of executions, whose rows show one output, told the end."""
    world = World("prediction:output_several,value=2", service_seconds=5.0)
    process = world.process(requests_per_minute=limit, max_in_flight=10)
    wanted_items = [wanted(number) for number in range(items)]
    await asyncio.gather(*map(process.obtain, wanted_items))
    world.check(wanted_items)
    assert [len(world.record(item).more_uris) for item in wanted_items] == [1] * items


async def test_whoever_wants_to_see_pictures_is_shown_each_items_first_when_it_is_stored_a_few_at_a_time() -> None:
    """They are in memory until they were seen: not more of them than downloads at a time."""
    world = World("prediction:output_several,value=2", service_seconds=5.0)
    process = world.process(max_in_flight=None)
    wanted_items = [wanted(number) for number in range(3 * DOWNLOADS_AT_A_TIME)]
    shown, now, most = [], 0, 0

    async def see(media: Media) -> None:
        nonlocal now, most
        shown.append(media.sha256)
        now += 1
        most = max(most, now)
        await asyncio.sleep(10)
        now -= 1

    await asyncio.gather(*(process.obtain(item, see=see) for item in wanted_items))
    world.check(wanted_items)
    assert sorted(shown) == sorted(str(world.record(item).sha256) for item in wanted_items)
    assert most == DOWNLOADS_AT_A_TIME
    await process.obtain(wanted_items[0], see=see)
    assert len(shown) == len(wanted_items), "what is there already is not read to be seen"


async def test_a_run_that_is_cancelled_while_a_picture_is_seen_has_stored_it() -> None:
    world = World()
    process = world.process()
    is_seen = asyncio.Event()

    async def see(_: Media) -> None:
        is_seen.set()
        await asyncio.sleep(3600)

    work = asyncio.ensure_future(process.obtain(A, see=see))
    await is_seen.wait()
    work.cancel()
    with suppress(asyncio.CancelledError):
        await work
    assert world.record(A).state is RecordState.STORED
    world.check([A])


# ------------------------------------------------------------------------------ what stands in the bucket


@pytest.mark.parametrize("given", [{}, {"presume_new": True}, {"rebuy_missing": True}, {"replace": True}])
async def test_an_object_that_is_nobodys_item_is_a_conflict_before_anything_is_bought(given: dict[str, bool]) -> None:
    world = World()
    process = world.process()
    await process.obtain(wanted(3))  # its bucket is proven by then
    await world.store.put(PICTURE, LOGO, content_type="image/png")
    with pytest.raises(ItemConflict, match=r"images/item-1\.png .*Nothing was bought"):
        await process.obtain(A, **given)
    assert world.store.objects[PICTURE].body == LOGO
    assert len(world.bought()) == 1
    assert not world.store.keys(RECORD)


async def test_another_items_picture_is_not_replaced_either() -> None:
    """A picture of a prediction that this item's record does not name: its own record was lost, or it was copied."""
    world = World()
    image = await world.process().obtain(A)
    del world.store.objects[RECORD]
    with pytest.raises(ItemConflict):
        await world.process().obtain(OTHER, replace=True)
    assert world.store.objects[PICTURE].metadata["prediction-id"] == image.prediction_id
    assert len(world.bought()) == 1


async def test_an_object_that_came_while_the_picture_was_made_is_left_alone_and_the_picture_is_kept() -> None:
    world = World(service_seconds=5.0)
    process = world.process()
    work = asyncio.ensure_future(process.obtain(A))
    while not process.count("POST"):
        await asyncio.sleep(0.1)
    await world.store.put(PICTURE, LOGO, content_type="image/png")
    with pytest.raises(ItemConflict, match="move that object away"):
        await work
    assert world.store.objects[PICTURE].body == LOGO
    assert world.record(A).state is RecordState.CREATED
    with pytest.raises(ItemConflict):
        await world.process().obtain(A)
    del world.store.objects[PICTURE]
    await world.process().obtain(A)
    world.check([A])


async def test_a_picture_that_lost_its_metadata_is_known_by_its_bytes() -> None:
    """Tools that copy a bucket may drop user metadata."""
    world = World()
    await world.process().obtain(A)
    world.store.objects[PICTURE].metadata = {}
    for given in ({}, {"rebuy_missing": True}):
        assert (await world.process().obtain(A, **given)).reused
    world.check([A])
    world.store.objects[PICTURE].metadata = {}
    await world.process().obtain(OTHER, replace=True)
    assert len(world.bought()) == 2
    assert world.store.objects[PICTURE].metadata["prediction-id"] == world.record(OTHER).prediction_id


async def test_other_bytes_without_metadata_are_not_the_items_picture() -> None:
    world = World()
    await world.process().obtain(A)
    whole = world.store.objects[PICTURE]
    whole.metadata, whole.body = {}, bytes(len(whole.body))
    with pytest.raises(ItemConflict):
        await world.process().obtain(A, rebuy_missing=True)
    assert len(world.bought()) == 1


@pytest.mark.parametrize("metadata", ["kept", "lost"])
async def test_what_an_earlier_version_stored_in_a_format_that_this_one_does_not_know_is_there(metadata: str) -> None:
    world = World()
    await world.process().obtain(A)
    video = world.store.objects[PICTURE.replace(".png", ".mp4")] = world.store.objects.pop(PICTURE)
    if metadata == "lost":
        video.metadata = {}
    record = world.record(A).model_copy(
        update={"formats": ["mp4"], "uri": "s3://bucket/kit/images/item-1.mp4", "write_id": "by-an-older-one"}
    )
    await world.store.put(RECORD, record.to_bytes(), content_type="application/json")
    image = await world.process().obtain(A, rebuy_missing=True)
    assert (image.reused, image.format, image.uri) == (True, "mp4", record.uri)
    assert len(world.bought()) == 1


# ------------------------------------------------------------------------------ what it cost


async def test_a_cost_that_the_vendor_has_not_settled_is_unknown_not_nothing() -> None:
    world = World("prediction:late_cost,seconds=3600")
    image = await world.process().obtain(A)
    assert image.cost_usd is None
    assert world.record(A).cost_usd is None
    assert "cost-usd" not in world.store.objects[PICTURE].metadata
    assert (await world.process().obtain(A)).cost_usd is None


@pytest.mark.parametrize(("late_seconds", "is_told"), [(10, True), (3600, False)])
async def test_a_cost_that_is_settled_late_is_waited_for_a_little_and_reaches_the_record(
    late_seconds: int, is_told: bool
) -> None:
    world = World(f"prediction:late_cost,seconds={late_seconds}")
    process = world.process()
    image = await process.obtain(A)
    began = asyncio.get_running_loop().time()
    image = await process.run(process.engine.with_cost(image, world.destination))
    assert asyncio.get_running_loop().time() - began < 20
    assert (image.cost_usd is not None, world.record(A).cost_usd) == (is_told, image.cost_usd)
    await asyncio.sleep(3600)
    questions = process.count("GET /v1/prediction/")
    found = await process.obtain(A)
    again = await process.run(process.engine.with_cost(found, world.destination))
    assert again.cost_usd == world.record(A).cost_usd is not None, "whoever meets it later learns what it cost"
    assert process.count("GET /v1/prediction/") - questions == (0 if is_told else 1)
