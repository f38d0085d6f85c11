"""Nothing is concluded from a list that gives no sign of seeing, nor from a clock that stood still."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from prefect_eachlabs.errors import OutcomeUnknown
from prefect_eachlabs.ledger.adoption import marker_key
from prefect_eachlabs.ledger.records import RecordState
from prefect_eachlabs.ledger.rules import PurchaseOptions
from prefect_eachlabs.models import Destination, Item, StoredImage
from tests.protocol.kit import World, wanted
from tests.protocol.losses import A, B, C, abandoned, lost, others_buy

# --------------------------------------------------------------------------------- what the list says


@pytest.mark.parametrize("hours", [0.04, 3.0], ids=["known ids of 2 minutes", "known ids of 3 hours"])
@pytest.mark.parametrize("fault", ["empty_list", "other_ids"])
async def test_a_list_that_does_not_show_what_is_known_proves_nothing(fault: str, hours: float) -> None:
    world = World()
    for number in range(10, 15):
        await world.process().obtain(wanted(number))
    await asyncio.sleep(hours * 3600)
    world.set_faults(f"executions:{fault}")
    await lost(world, A)
    with pytest.raises(OutcomeUnknown, match="does not show prediction"):
        await world.process().obtain(A)
    assert len(world.bought_for(A)) == 1
    assert world.record(A).state is RecordState.AMBIGUOUS
    world.set_faults()
    await world.process().obtain(A)
    assert len(world.bought_for(A)) == 1
    assert set(world.named().values()) == {1}


async def test_ids_that_get_does_not_know_prove_nothing() -> None:
    world = World("executions:other_ids")
    await lost(world, A)
    with pytest.raises(OutcomeUnknown, match="does not know the predictions that its own list shows"):
        await world.process().obtain(A)
    assert len(world.bought()) == 1


async def test_a_lost_order_is_found_under_another_name_of_its_model() -> None:
    world = World("executions:other_model")
    items = [wanted(number) for number in range(10, 13)]
    for item in items:
        await world.process().obtain(item)
    await lost(world, A)
    await world.process().obtain(A)
    world.check([A, *items])


async def test_an_echo_under_a_model_name_that_nothing_confirms_is_named_rather_than_repeated() -> None:
    world = World("executions:other_model")
    await lost(world, A)
    (job,) = world.bought()
    with pytest.raises(OutcomeUnknown, match=job.id):
        await world.process().obtain(A)
    assert len(world.bought()) == 1


async def test_where_known_predictions_are_listed_under_another_name_nothing_is_concluded() -> None:
    world = World("executions:other_model")
    await world.process().obtain(B)
    await abandoned(world, A)
    with pytest.raises(OutcomeUnknown, match="another model's name"):
        await world.process().obtain(A)
    assert not world.bought_for(A)


@pytest.mark.parametrize("fault", ["short_pages", "short_pages_untold", "short_pages,value=7"])
async def test_pages_that_hold_fewer_rows_than_were_asked_for_do_not_end_the_walk(fault: str) -> None:
    world = World(f"executions:{fault}")
    await lost(world, A)
    others_buy(world, C, 80)
    await world.process().obtain(A)
    world.check([A])


async def test_dates_that_cannot_be_used_lead_to_no_second_purchase() -> None:
    world = World("executions:naive_dates")
    await lost(world, A)
    (job,) = world.bought()
    with pytest.raises(OutcomeUnknown, match=job.id):
        await world.process().obtain(A)
    assert len(world.bought()) == 1


# ------------------------------------------------------------------------------------ a new account


async def test_in_a_new_account_the_further_order_proves_that_the_empty_list_saw() -> None:
    world = World("create:error,status=500,next=1")
    process = world.process()
    await process.obtain(A)
    assert process.count("POST") == 2
    await asyncio.sleep(90)
    assert world.record(A).possible_loss is None
    world.check([A])


async def test_a_list_that_stays_empty_makes_the_lost_order_a_possible_loss_that_is_reported(
    caplog: pytest.LogCaptureFixture,
) -> None:
    world = World("executions:empty_list", "create:lost_answer,at=1")
    await world.process().obtain(A)
    await asyncio.sleep(200)
    assert len(world.bought()) == 2, "the one further order that is allowed"
    loss = world.record(A).possible_loss
    assert loss is not None
    assert "may have been billed" in loss
    assert any("does not show prediction" in record.message for record in caplog.records)


# ------------------------------------------------------------------------------------- near echoes


@pytest.mark.parametrize("prompt", ["x " * 900, 'a "fox" & a hen', "a fox"])
@pytest.mark.parametrize("kind", ["echo_cut", "echo_escaped", "echo_rehosted", "echo_without_nulls"])
async def test_an_echo_that_is_nearly_the_input_is_never_taken_for_nothing(kind: str, prompt: str) -> None:
    world = World(f"prediction:{kind}", strict_models=False, settings={"check_references": "no"})
    picture = "https://example.com/a.png"
    item = Item.wanted(prompt, image_url=picture, item_id="item-1", model="m", input={"negative": None})
    await lost(world, item)
    (job,) = world.bought()
    (end,) = await asyncio.gather(world.process().obtain(item), return_exceptions=True)
    assert isinstance(end, StoredImage) or (isinstance(end, OutcomeUnknown) and job.id in str(end))
    assert len(world.bought()) == 1


async def test_an_input_that_is_not_near_holds_nothing_up() -> None:
    world = World()
    long = wanted(2, prompt="a lighthouse at dusk, " * 30)
    await abandoned(world, A)
    others_buy(world, long)
    await world.process().obtain(A)
    world.check([A])


# --------------------------------------------------------------------------------------- the clocks


def suspend(process: Any, world: World, seconds: float) -> None:
    """What a loop whose clock stood still knows: its own times move along with the world's."""
    reconciler = process.engine.account.purchaser.reconciler_of(process.engine.account.ledger(world.destination))
    for entry in reconciler._waiting:
        for name in ("look_at", "given_up_at", "written_at"):
            setattr(entry, name, getattr(entry, name) + seconds)


@pytest.mark.parametrize("hours", [0.1, 8, 72])
@pytest.mark.parametrize("after_seconds", [0.5, 2.0, 30.0])
async def test_a_machine_that_sleeps_while_a_lost_answer_is_settled_buys_nothing_more(
    hours: float, after_seconds: float
) -> None:
    world = World()
    process = world.process(by_name=[("POST", "lose", 1)])
    world.set_faults("prediction:listed_late,seconds=55,next=1")
    working = asyncio.ensure_future(process.obtain(A))
    while not process.count("GET /v1/executions"):
        await asyncio.sleep(0.05)
    await asyncio.sleep(after_seconds)
    process.freeze()
    await asyncio.sleep(hours * 3600)
    others_buy(world, C)
    suspend(process, world, hours * 3600)
    process.thaw()
    await working
    world.check([A])


@pytest.mark.parametrize("after", [0.02, 0.5, 1.02, 1.07, 1.12, 1.2, 1.3, 1.5, 20.0, 63.0])
@pytest.mark.parametrize("posted", [True, False])
async def test_the_same_when_no_clock_of_the_machine_notices(after: float, posted: bool) -> None:
    """A virtual machine that was paused: its monotonic clock stood still with it."""
    world = World()
    process = world.process(by_name=[("POST", "lose" if posted else "refuse", 1)])
    working = asyncio.ensure_future(process.obtain(A))
    while not process.count("S3 PUT kit/records/item-1.json claimed settle"):
        await asyncio.sleep(0.01)
    await asyncio.sleep(after)
    world.pass_unnoticed(8 * 3600)
    others_buy(world, C)
    await working
    world.check([A])


async def test_a_bucket_whose_machines_disagree_about_the_time_proves_nothing() -> None:
    world = World()
    await lost(world, A)
    await asyncio.sleep(300)
    process = world.process()
    read = world.store._described

    def described(*given: Any) -> Any:
        """Every second answer comes from a machine that is 70 s ahead."""
        found = read(*given)
        ahead = 70.0 * (world.store.count("get") % 2)
        return replace(found, age_seconds=found.age_seconds + ahead, date=found.date + timedelta(seconds=ahead))

    world.store._described = described  # type: ignore[method-assign]
    with pytest.raises(OutcomeUnknown, match="do not agree about the time"):
        await process.obtain(A)
    assert len(world.bought()) == 1


@pytest.mark.parametrize("hours", [1, 10, 30, 24 * 30])
async def test_a_prediction_from_before_the_claim_is_never_adopted(hours: int) -> None:
    world = World()
    others_buy(world, A)
    await asyncio.sleep(hours * 3600)
    await abandoned(world, A)
    await world.process().obtain(A)
    world.check([A])


async def test_what_was_made_seconds_before_the_claim_is_named_rather_than_adopted_or_repeated() -> None:
    """Clocks that differ a little could have dated our own so."""
    world = World()
    others_buy(world, A)
    await asyncio.sleep(20)
    await abandoned(world, A)
    with pytest.raises(OutcomeUnknown, match="before this order's claim"):
        await world.process().obtain(A)
    assert not world.bought()


async def test_a_busy_account_is_asked_only_about_what_was_made_around_the_claim() -> None:
    world = World()
    await abandoned(world, A)
    for _ in range(30):
        await asyncio.sleep(60)
        others_buy(world, C, 50)
    await asyncio.sleep(600)
    process = world.process(requests_per_minute=60)
    began = world.now()
    await process.obtain(A)
    assert process.count("GET /v1/prediction") < 260
    assert world.now() - began < 420
    world.check([A])


# --------------------------------------------------------------------------- two destinations, one account

OTHER = Destination.parse("s3://bucket/dev")


def all_named(world: World) -> dict[str, list[str]]:
    """Prediction → the records of all destinations that name it."""
    named: dict[str, list[str]] = {}
    for key in (*world.store.keys("kit/records/"), *world.store.keys("dev/records/")):
        if key.endswith(".json"):
            named.setdefault(world.store.json(key).get("prediction_id"), []).append(key)
    return named


async def test_two_destinations_with_one_table_adopt_each_their_own() -> None:
    world = World(service_seconds=5.0)
    items = [wanted(number) for number in range(1, 21)]
    dev, prod = world.process(), world.process(by_name=[("POST", "lose", 20)])
    options = PurchaseOptions(run_id="dev")
    await asyncio.gather(*(dev.run(dev.engine.generate_and_store(item, OTHER, options=options)) for item in items))
    await asyncio.sleep(4)
    await asyncio.gather(*(prod.obtain(item) for item in items))
    named = all_named(world)
    assert len(world.bought()) == 40
    assert {job.id for job in world.bought()} == set(named)
    assert all(len(records) == 1 for records in named.values())


async def test_what_may_be_another_destinations_is_adopted_as_the_nearest_and_reported(
    caplog: pytest.LogCaptureFixture,
) -> None:
    world = World(service_seconds=5.0)
    prod = world.process(by_name=[("POST", "lose", 1)])
    working = asyncio.ensure_future(prod.obtain(A))
    while not world.bought():
        await asyncio.sleep(0.01)
    dev = world.process()
    await dev.run(dev.engine.generate_and_store(A, OTHER, options=PurchaseOptions(run_id="dev")))
    await working
    mine, theirs = world.bought()
    record = world.record(A)
    assert record.prediction_id == mine.id
    assert record.adopted_among == [theirs.id]
    assert any("fit as well" in record.message for record in caplog.records)


# ------------------------------------------------------------------------- a prediction of two items


async def test_who_finishes_what_it_did_not_buy_leaves_it_to_the_item_that_adopted_it() -> None:
    """A is frozen before its note; B's answer is lost, and B is given A's prediction; A notes it and is killed."""
    world = World()
    a, b = wanted(1, prompt="same"), wanted(2, prompt="same")
    first = world.process(freeze_at="before S3 PUT kit/records/item-1.json created")
    frozen = asyncio.ensure_future(first.until_it_ends(first.obtain(a)))
    await first.froze.wait()
    await asyncio.sleep(1)
    world.set_faults("prediction:listed_late,seconds=50,next=1")
    await lost(world, b)
    await asyncio.sleep(62)
    settling = asyncio.ensure_future(world.process().obtain(b))
    await asyncio.sleep(20)
    first.plan.die_at = "after S3 PUT kit/records/item-1.json created"
    first.thaw()
    await asyncio.gather(frozen, settling)
    await world.process().obtain(a)
    world.check([a, b])


async def test_a_marker_has_a_key_that_every_store_takes() -> None:
    world = World()
    ledger = world.process().engine.account.ledger(Destination.parse("s3://bucket/" + "p" * 700))
    assert len(marker_key(ledger, "/" * 256).encode()) <= 1024
