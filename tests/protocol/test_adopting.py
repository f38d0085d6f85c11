"""What is found is adopted exclusively, by the item whose order it was; nothing that was found is bought again."""

from __future__ import annotations

import asyncio

import pytest

from prefect_eachlabs.errors import OutcomeUnknown
from prefect_eachlabs.ledger.records import RecordState
from tests.protocol.kit import Fault, World, wanted
from tests.protocol.losses import A, C, abandoned, lost, others_buy

# --------------------------------------------------------------------------- adopting it


@pytest.mark.parametrize("write", ["S3 PUT kit/adopted", "S3 PUT kit/records/item-1.json created"])
@pytest.mark.parametrize("fault", ["refuse", "lose", "lose refused"])
async def test_an_adoption_that_cannot_be_written_down_is_not_taken_for_nothing_found(write: str, fault: Fault) -> None:
    """It is listed so late that the look that finds it is the one that decides."""
    world = World("prediction:listed_late,seconds=110,next=1")
    await lost(world, A)
    await world.process(by_name=[(write, fault, 2)]).obtain(A)
    world.check([A])


CREATED = "S3 PUT kit/records/item-1.json created"


@pytest.mark.parametrize(
    "boundary", ["before S3 PUT kit/adopted", "after S3 PUT kit/adopted", f"before {CREATED}", f"after {CREATED}"]
)
async def test_an_adoption_that_was_begun_is_resumed(boundary: str) -> None:
    world = World()
    await lost(world, A)
    second = world.process(die_at=boundary)
    await second.dies(second.obtain(A))
    await world.process().obtain(A)
    world.check([A])


async def test_a_marker_whose_holder_has_another_prediction_by_now_is_taken_over() -> None:
    """B's settler marks A's prediction for B (equal input); meanwhile B's late owner writes its own down."""
    world = World()
    a, b = wanted(1, prompt="same"), wanted(2, prompt="same")
    await lost(world, a)
    late = world.process(freeze_at="after POST")
    waiting = asyncio.ensure_future(late.obtain(b))
    await late.froze.wait()
    await asyncio.sleep(62)
    settler = world.process(freeze_at="after S3 PUT kit/adopted")
    settling = asyncio.ensure_future(settler.obtain(b))
    await settler.froze.wait()
    (of_a,) = world.bought_for(a)[:1]
    assert world.store.json(f"kit/adopted/{of_a.id}")["item_id"] == b.item_id
    late.thaw()
    await waiting
    settler.thaw()
    await settling
    await world.process().obtain(a)
    world.check([a, b])


async def test_an_old_prediction_with_the_same_input_is_not_adopted_though_its_record_is_old() -> None:
    world = World()
    yesterday, today = wanted(1, prompt="same"), wanted(2, prompt="same")
    await world.process().obtain(yesterday)
    await asyncio.sleep(10 * 3600)
    await abandoned(world, today)
    await world.process().obtain(today)
    world.check([yesterday, today])


@pytest.mark.parametrize("first", ["a", "b"])
async def test_an_input_that_is_part_of_another_does_not_take_its_picture(first: str) -> None:
    """The echo of {prompt, seed} holds all of {prompt}: the API might have added the seed."""
    world = World(strict_models=False)
    a, b = wanted(1, prompt="cat"), wanted(2, prompt="cat", seed=1)
    for item in (a, b) if first == "a" else (b, a):
        await lost(world, item)
    second = world.process()
    await asyncio.gather(second.obtain(a), second.obtain(b))
    world.check([a, b])


async def test_it_waits_while_another_may_be_buying_an_input_that_holds_its_own() -> None:
    world = World(strict_models=False)
    a, b = wanted(1, prompt="cat"), wanted(2, prompt="cat", seed=1)
    await abandoned(world, a)
    settling = asyncio.ensure_future(world.process().obtain(a))
    await asyncio.sleep(61)
    buyer = world.process(freeze_at="after POST")
    buying = asyncio.ensure_future(buyer.obtain(b))
    await buyer.froze.wait()
    await asyncio.sleep(55)
    buyer.thaw()
    await asyncio.gather(settling, buying)
    world.check([a, b])


async def test_what_fits_an_unsettled_claim_of_another_item_better_is_left_to_it() -> None:
    world = World(strict_models=False)
    a, b = wanted(1, prompt="cat"), wanted(2, prompt="cat", seed=1)
    await abandoned(world, a)
    await lost(world, b)
    with pytest.raises(OutcomeUnknown, match="item-2"):
        await world.process().obtain(a)
    await world.process().obtain(b)
    await world.process().obtain(a)
    world.check([a, b])


async def test_what_one_order_finds_does_not_keep_another_from_being_looked_for() -> None:
    """Of two lost orders the first fits thirty executions; that of the second was made after all of them."""
    late = "create:late,seconds=25,matching=picture 2"
    world = World(late, "executions:error")
    a, b = wanted(1), wanted(2)
    process = world.process(by_name=[("POST", "lose", 2)])
    both = asyncio.gather(process.obtain(a), process.obtain(b))
    await asyncio.sleep(1)
    others_buy(world, a, 30)
    await asyncio.sleep(120)
    world.set_faults()
    await both
    assert len(world.bought()) == 2
    assert world.record(b).prediction_id == world.bought_for(b)[0].id
    assert len(world.record(a).adopted_among) > 10


# ------------------------------------------------------------------------ many at a time


async def test_equal_inputs_that_were_lost_together_get_a_prediction_each() -> None:
    world = World("create:lost_answer")
    items = [wanted(number, prompt="same") for number in range(30)]
    process = world.process(requests_per_minute=None, max_in_flight=None)
    await asyncio.gather(*map(process.obtain, items))
    world.check(items)


async def test_settling_that_takes_longer_than_a_claim_lives_keeps_its_claims_alive() -> None:
    """200 foreign executions of the model to ask about at 60 requests a minute, while another run stands by."""
    world = World()
    await abandoned(world, A)
    others_buy(world, C, 200)
    first = world.process()
    settling = asyncio.ensure_future(first.obtain(A))
    await asyncio.sleep(65)
    second = world.process()
    await asyncio.gather(settling, second.obtain(A))
    assert second.count("S3 PUT kit/records/item-1.json claimed") == 0, (
        "the claim was taken from a run that was settling it"
    )
    world.check([A])


async def test_lost_answers_are_settled_in_one_look_together() -> None:
    world = World("create:lost_answer")
    items = [wanted(number) for number in range(20)]
    process = world.process(requests_per_minute=None, max_in_flight=None)
    await asyncio.gather(*map(process.obtain, items))
    world.check(items)
    assert process.count("GET /v1/executions") <= 3
    assert process.count("S3 LIST") <= 3


# ------------------------------------------------------------------------- on_ambiguous


async def test_with_on_ambiguous_fail_a_lost_answer_is_reported_and_not_looked_for() -> None:
    world = World("create:lost_answer,next=1")
    process = world.process()
    with pytest.raises(OutcomeUnknown):
        await process.obtain(A, on_ambiguous="fail")
    assert world.record(A).state is RecordState.AMBIGUOUS
    assert process.count("GET /v1/executions") == 0
    await world.process().obtain(A)
    world.check([A])


async def test_with_on_ambiguous_fail_a_dead_claim_is_not_bought_again() -> None:
    world = World()
    await abandoned(world, A)
    for _ in range(2):
        with pytest.raises(OutcomeUnknown, match="on_ambiguous=settle"):
            await world.process().obtain(A, on_ambiguous="fail")
    assert not world.bought()
    await world.process().obtain(A)
    world.check([A])


async def test_with_on_ambiguous_fail_what_a_dead_claim_has_bought_is_stored() -> None:
    world = World()
    await lost(world, A)
    await world.process().obtain(A, on_ambiguous="fail")
    world.check([A])
