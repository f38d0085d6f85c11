"""What is bought again is bought on purpose: replacing, rebuying, trying a failure again; the rest is refused."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from prefect_eachlabs.errors import (
    ContentRefused,
    DownloadFailed,
    ItemConflict,
    KeyRefused,
    NotSent,
    PictureMissing,
    PredictionFailed,
    Rejected,
)
from prefect_eachlabs.ledger.records import RecordState
from tests.protocol.kit import World, at_each_boundary, wanted

A = wanted(1)
OTHER = wanted(2, item_id="item-1")
"""Another input under the same item id."""


# --------------------------------------------------------------------------- replacing


async def test_the_same_item_id_with_another_input_is_refused_naming_both() -> None:
    world = World()
    await world.process().obtain(A)
    with pytest.raises(ItemConflict) as refused:
        await world.process().obtain(OTHER)
    assert repr(A.input["prompt"]) in str(refused.value)
    assert repr(OTHER.input["prompt"]) in str(refused.value)
    world.check([A])


async def test_replaced_on_purpose_the_new_picture_stands_in_the_place_of_the_old() -> None:
    world = World()
    old = await world.process().obtain(A)
    new = await world.process().obtain(OTHER, replace=True)
    assert new.uri == old.uri
    record = world.record(OTHER)
    assert (record.prediction_id, record.earlier, record.epoch) == (new.prediction_id, [old.prediction_id], 2)
    assert world.store.objects["kit/images/item-1.png"].metadata["prediction-id"] == new.prediction_id
    again = await world.process().obtain(OTHER, replace=True)
    assert again.reused
    assert len(world.bought()) == 2


def test_replacing_killed_at_any_boundary_ends_with_the_new_picture_bought_once() -> None:
    async def story(at: int | None) -> int:
        world = World()
        await world.process().obtain(A)
        process = world.process(die_at=at)
        await process.until_it_ends(process.obtain(OTHER, replace=True))
        assert process.dead is (at is not None)
        await world.process().obtain(OTHER, replace=True)
        assert len(world.bought_for(OTHER)) == 1
        assert len(world.bought()) == 2
        assert set(world.named().values()) == {1}
        record = world.record(OTHER)
        assert record.state is RecordState.STORED
        picture = world.store.objects["kit/images/item-1.png"]
        assert picture.metadata["prediction-id"] == record.prediction_id
        return len(process.boundaries)

    at_each_boundary(story)


async def test_what_a_replaced_dead_claim_has_bought_stays_on_the_books() -> None:
    world = World()
    first = world.process(die_at="after POST")
    await first.dies(first.obtain(A))
    await world.process().obtain(OTHER, replace=True)
    (old,), (new,) = world.bought_for(A), world.bought_for(OTHER)
    record = world.record(OTHER)
    assert (record.prediction_id, record.earlier) == (new.id, [old.id])


async def test_the_late_owner_of_what_was_replaced_is_told_and_its_prediction_is_reported() -> None:
    world = World(service_seconds=200.0)
    late = world.process(freeze_at="after POST")
    waiting = asyncio.ensure_future(late.obtain(A))
    await late.froze.wait()
    world.set_faults("executions:missing_rows")
    new = asyncio.ensure_future(world.process().obtain(OTHER, replace=True))
    await asyncio.sleep(250)
    late.thaw()
    with pytest.raises(ItemConflict, match="replaced"):
        await waiting
    await new
    (old,) = world.bought_for(A)
    assert world.record(OTHER).also_bought == [old.id]
    assert len(world.bought_for(OTHER)) == 1


# ------------------------------------------------------------------- what nothing was bought of


async def test_a_refused_input_costs_nothing_and_stands_as_failed() -> None:
    world = World("create:error,status=422,next=1")
    with pytest.raises(Rejected):
        await world.process().obtain(A)
    record = world.record(A)
    assert record.state is RecordState.FAILED
    assert record.error is not None
    with pytest.raises(PredictionFailed, match="retry-failed"):
        await world.process().obtain(A)
    assert not world.bought()
    await world.process().obtain(A, retry_failed=True)
    world.check([A])


async def test_a_refused_input_that_was_mended_is_bought_under_the_same_id() -> None:
    world = World("create:error,status=422,next=1")
    with pytest.raises(Rejected):
        await world.process().obtain(A)
    await world.process().obtain(OTHER)
    world.check([OTHER])


@pytest.mark.parametrize("status", [401, 403])
async def test_a_refused_key_leaves_no_item_failed_and_nobody_waits_for_its_claim(status: int) -> None:
    world = World(f"create:error,status={status},next=1")
    with pytest.raises(KeyRefused):
        await world.process().obtain(A)
    began = world.now()
    await world.process().obtain(A)
    assert world.now() - began < 10
    world.check([A])


async def test_a_redirect_is_a_fault_of_the_set_up_and_leaves_no_item_failed() -> None:
    world = World("create:redirect,next=1")
    with pytest.raises(Rejected, match="redirect"):
        await world.process().obtain(A)
    await world.process().obtain(A)
    world.check([A])


async def test_a_connection_that_never_came_about_leaves_a_claim_that_is_free_at_once() -> None:
    """`refuse` at the POST is a lost answer; here the connection itself is refused."""
    world = World()
    process = world.process()
    real = process.engine.account.client._http._transport.handle_async_request

    async def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused", request=request)

    process.engine.account.client._http._transport.handle_async_request = refuse
    with pytest.raises(NotSent):
        await process.obtain(A)
    process.engine.account.client._http._transport.handle_async_request = real
    began = world.now()
    await process.obtain(A)
    assert world.now() - began < 10
    world.check([A])


async def test_throttled_items_wait_and_are_bought_once() -> None:
    world = World("create:throttled=0.3", seed=3)
    items = [wanted(number) for number in range(20)]
    process = world.process()
    await asyncio.gather(*map(process.obtain, items))
    world.check(items)


# ------------------------------------------------------------------------------ failures


@pytest.mark.parametrize(
    ("fault", "bought"), [("fail_retryable", 3), ("fail", 1), ("fail_moderation", 1), ("fail_text", 1)]
)
async def test_a_failure_is_resubmitted_as_often_as_the_api_says_it_may_be(fault: str, bought: int) -> None:
    world = World(f"prediction:{fault}")
    with pytest.raises(ContentRefused if fault == "fail_moderation" else PredictionFailed):
        await world.process().obtain(A)
    assert len(world.bought()) == bought
    assert world.record(A).state is RecordState.FAILED
    assert set(world.named().values()) == {1}


async def test_a_failed_item_is_bought_again_only_when_asked() -> None:
    world = World("prediction:fail_text,next=1")
    with pytest.raises(PredictionFailed):
        await world.process().obtain(A)
    with pytest.raises(PredictionFailed, match="retry-failed"):
        await world.process().obtain(A)
    assert len(world.bought()) == 1
    image = await world.process().obtain(A, retry_failed=True)
    failed, good = world.bought()
    assert image.prediction_id == good.id
    assert world.record(A).earlier == [failed.id]


# ---------------------------------------------------------------------- pictures that are gone


async def test_a_stored_picture_that_is_gone_is_bought_again_only_when_asked() -> None:
    world = World()
    await world.process().obtain(A)
    del world.store.objects["kit/images/item-1.png"]
    with pytest.raises(PictureMissing, match="rebuy-missing"):
        await world.process().obtain(A)
    assert len(world.bought()) == 1
    await world.process().obtain(A, rebuy_missing=True)
    assert len(world.bought()) == 2
    assert "kit/images/item-1.png" in world.store.objects
    assert (await world.process().obtain(A, rebuy_missing=True)).reused
    assert len(world.bought()) == 2


async def test_a_bought_picture_that_the_vendor_has_deleted_is_bought_again_only_when_asked() -> None:
    world = World()
    first = world.process(die_at="after S3 PUT kit/records/item-1.json created")
    await first.dies(first.obtain(A))
    world.hidden[f"{world.bought()[0].id}.png"] = 404
    await asyncio.sleep(86_400)
    with pytest.raises(DownloadFailed):
        await world.process().obtain(A)
    assert world.record(A).state is RecordState.CREATED
    image = await world.process().obtain(A, rebuy_missing=True)
    gone, good = world.bought()
    assert image.prediction_id == good.id
    assert world.record(A).earlier == [gone.id]


async def test_a_prediction_that_the_api_does_not_know_any_more_is_bought_again_only_when_asked() -> None:
    world = World()
    first = world.process(die_at="after S3 PUT kit/records/item-1.json created")
    await first.dies(first.obtain(A))
    (gone,) = world.bought()
    world.hidden[gone.id] = 404
    await asyncio.sleep(3 * 86_400)
    with pytest.raises(PictureMissing, match="does not know"):
        await world.process().obtain(A)
    assert len(world.bought()) == 1
    image = await world.process().obtain(A, rebuy_missing=True)
    assert image.prediction_id == world.bought()[1].id
    assert world.record(A).earlier == [gone.id]


@pytest.mark.parametrize("picture", ["gone from the bucket", "deleted by the vendor"])
def test_buying_a_missing_picture_again_is_bought_once_whatever_is_killed(picture: str) -> None:
    async def story(at: int | None) -> int:
        world = World()
        if picture == "gone from the bucket":
            await world.process().obtain(A)
            del world.store.objects["kit/images/item-1.png"]
        else:
            first = world.process(die_at="after S3 PUT kit/records/item-1.json created")
            await first.dies(first.obtain(A))
            world.hidden[f"{world.bought()[0].id}.png"] = 404
            world.pass_unnoticed(86_400)
        process = world.process(die_at=at)
        await process.until_it_ends(process.obtain(A, rebuy_missing=True))
        if at is not None:
            await world.process().obtain(A, rebuy_missing=True)
        assert len(world.bought()) == 2
        assert set(world.named().values()) == {1}
        assert world.record(A).state is RecordState.STORED
        return len(process.boundaries)

    at_each_boundary(story)
