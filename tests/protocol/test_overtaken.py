"""Another run has gone on with an item while this one stood still: its orders are its own, and are left to it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from prefect_eachlabs.errors import ItemConflict
from prefect_eachlabs.ledger.records import RecordState
from tests.protocol.kit import Process, World, wanted

X = wanted(1, item_id="x", prompt="one")
OTHER = wanted(1, item_id="x", prompt="two")
CLAIM = "S3 PUT kit/records/x.json claimed post"
POST = "POST /v1/prediction"


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


def is_named_once(world: World) -> None:
    named = world.named()
    assert [named[job.id] for job in world.bought()] == [1] * len(world.bought())


def posted_and_stood_still(world: World, how: str) -> Process:
    freeze = {"freeze_at": f"after {POST}"} if how == "frozen" else {}
    return world.process(run_id="first", **freeze)


@pytest.mark.parametrize("killed_after", [CLAIM, POST])
@pytest.mark.parametrize("how", ["frozen", "without its bucket"])
async def test_a_further_order_of_another_run_is_settled_before_any_is_made(how: str, killed_after: str) -> None:
    """The first order fails, the other run adopts it, orders again and is killed: that order is found, not repeated."""
    world = World("prediction:fail_retryable,next=1")
    first = posted_and_stood_still(world, how)
    work = asyncio.ensure_future(first.until_it_ends(first.obtain(X)))
    if how == "frozen":
        await first.froze.wait()
    else:
        await until(lambda: first.count("POST") == 1)
        first.plan.by_name = [("S3", "refuse", 10**6)]
    await asyncio.sleep(75)
    second = world.process(run_id="second")

    async def kill() -> None:
        await until(lambda: second.count(killed_after) >= 1 and f"after {killed_after}" in second.boundaries)
        second.kill()

    killer = asyncio.ensure_future(kill())
    await second.dies(second.obtain(X))
    await killer
    first.thaw()
    first.plan.by_name = []
    await asyncio.wait_for(work, 3000)
    await world.process(run_id="third").obtain(X)
    assert len(world.bought()) <= 2
    assert [job.status_at(world.now()) for job in world.bought()].count("success") == 1
    is_named_once(world)


@pytest.mark.parametrize("killed_after", [CLAIM, POST, None])
async def test_what_another_run_replaced_meanwhile_is_not_ordered_over(killed_after: str | None) -> None:
    world = World()
    first = world.process(run_id="first", freeze_at=f"after {POST}")
    work = asyncio.ensure_future(first.until_it_ends(first.obtain(X)))
    await first.froze.wait()
    await asyncio.sleep(70)
    if killed_after is None:
        second = world.process(run_id="second", freeze_at=f"before {POST}")
        replacing = asyncio.ensure_future(second.until_it_ends(second.obtain(OTHER, replace=True)))
        await second.froze.wait()
        first.thaw()
        await asyncio.sleep(5)
        second.thaw()
        await replacing
    else:
        second = world.process(run_id="second", die_at=f"after {killed_after}")
        await second.dies(second.obtain(OTHER, replace=True))
        first.thaw()
    assert isinstance(await asyncio.wait_for(work, 3000), ItemConflict)
    await world.process(run_id="third").obtain(OTHER, replace=True)
    assert len(world.bought()) == 2
    is_named_once(world)


async def test_the_picture_of_another_input_is_not_given_back_for_the_one_that_it_replaced() -> None:
    """The other run's prediction is still in flight when the first one goes on."""
    world = World(service_seconds=200.0)
    first = world.process(run_id="first", freeze_at=f"after {POST}")
    work = asyncio.ensure_future(first.until_it_ends(first.obtain(X)))
    await first.froze.wait()
    await asyncio.sleep(70)
    second = world.process(run_id="second")
    replacing = asyncio.ensure_future(second.obtain(OTHER, replace=True))
    await until(lambda: len(world.bought()) == 2 and world.record(OTHER).state is RecordState.CREATED)
    first.thaw()
    assert isinstance(await asyncio.wait_for(work, 3000), ItemConflict)
    assert (await replacing).prediction_id == world.record(OTHER).prediction_id
    is_named_once(world)


async def test_a_strangers_object_is_told_before_anything_is_bought_after_settling_too() -> None:
    world = World()
    await world.process().obtain(wanted(9))
    killed = world.process(die_at=f"after {CLAIM}")
    await killed.dies(killed.obtain(X))
    await world.store.put("kit/images/x.png", b"a stranger's", content_type="image/png")
    await asyncio.sleep(100)
    with pytest.raises(ItemConflict, match="Nothing was bought"):
        await world.process().obtain(X)
    assert len(world.bought()) == 1


@pytest.mark.parametrize("bought", [True, False])
async def test_a_run_that_replaces_goes_on_after_it_was_killed_between_settling_and_its_claim(bought: bool) -> None:
    world = World()
    await world.process().obtain(wanted(9))
    killed = world.process(die_at=f"after {POST if bought else CLAIM}")
    await killed.dies(killed.obtain(X))
    await asyncio.sleep(100)
    settled = "created" if bought else "claimed settle"
    replacing = world.process(run_id="R", die_at=f"after S3 PUT kit/records/x.json {settled}")
    await replacing.dies(replacing.obtain(OTHER, replace=True))
    await asyncio.sleep(300)
    await world.process(run_id="R").obtain(OTHER, replace=True)
    assert world.record(OTHER).state is RecordState.STORED
    assert len(world.bought()) == 2 + bought
    is_named_once(world)


@pytest.mark.parametrize("service_seconds", [2.0, 200.0])
@pytest.mark.parametrize("how", ["frozen", "without its bucket"])
async def test_two_equal_items_that_were_given_each_others_predictions_name_each_once(
    how: str, service_seconds: float
) -> None:
    world = World(latency_seconds=3.0, service_seconds=service_seconds)
    x, y, other = wanted(1, prompt="the same"), wanted(2, prompt="the same"), wanted(9)
    first = world.process(run_id="first")
    await first.obtain(other)

    async def a_little_later() -> object:
        await asyncio.sleep(2)
        return await first.obtain(y)

    work = [asyncio.ensure_future(first.obtain(x)), asyncio.ensure_future(a_little_later())]
    if how == "frozen":
        first.plan.freeze_at = "before S3 PUT kit/records/item-1.json created"
    await until(lambda: len(world.bought()) == 3)
    if how != "frozen":
        first.plan.by_name.append(("S3", "refuse", 10**6))
    await asyncio.sleep(93)
    second = world.process(run_id="second")
    work += [asyncio.ensure_future(second.obtain(item)) for item in (x, y)]
    await asyncio.sleep(60)
    if how == "frozen":
        first.thaw()
    else:
        first.plan.by_name.clear()
    await asyncio.wait_for(asyncio.gather(*work), 5000)
    world.check([x, y, other])
