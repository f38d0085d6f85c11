"""What a lost POST has bought is found out through the API's executions: whatever they show, nothing is bought twice."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from prefect_eachlabs import settling
from prefect_eachlabs.errors import OutcomeUnknown
from prefect_eachlabs.models import Item
from prefect_eachlabs.records import RecordState
from tests.protocol.kit import Fault, Process, World, order, play, wanted

A, B, C = wanted(1), wanted(2), wanted(3)


async def lost(world: World, item: Item, **given: Any) -> Process:
    """A process that died when its POST had taken effect."""
    process = world.process(die_at="after POST", **given)
    await process.dies(process.obtain(item))
    return process


async def abandoned(world: World, item: Item) -> Process:
    """A process that died right before its POST."""
    process = world.process(die_at="before POST")
    await process.dies(process.obtain(item))
    return process


def others_buy(world: World, item: Item, times: int = 1) -> None:
    """Other keys of the organization."""
    for _ in range(times):
        world.emulator.announce_foreign(order(item), base_url="https://api.invalid")
        world.emulator.ledger.settle(world.now())


# ------------------------------------------------------------------- what the list shows


@pytest.mark.parametrize("skew_hours", [0, -1, 1, -14, 14])
@pytest.mark.parametrize("foreign_rows", [0, 25, 250])
def test_it_is_found_among_the_rows_of_others_whatever_the_clock_of_the_api_says(
    skew_hours: int, foreign_rows: int
) -> None:
    async def story() -> None:
        world = World(clock_skew_seconds=skew_hours * 3600)
        await lost(world, A)
        others_buy(world, C, foreign_rows)
        await world.process().obtain(A)
        world.check([A])

    play(story)


@pytest.mark.parametrize("skew_hours", [-14, 14])
@pytest.mark.parametrize("error_seconds", [-840.0, 840.0])
def test_it_is_found_whatever_the_clocks_of_the_workers_say(skew_hours: int, error_seconds: float) -> None:
    """S3 itself refuses a clock that is off by more than 15 minutes."""

    async def story() -> None:
        world = World(clock_skew_seconds=skew_hours * 3600)
        buyers = [world.process(clock_error_seconds=error_seconds) for _ in range(3)]
        await asyncio.gather(*(buyer.obtain(wanted(10 + number)) for number, buyer in enumerate(buyers)))
        await lost(world, A)
        others_buy(world, C, 120)
        await asyncio.sleep(5)
        await buyers[0].obtain(wanted(20))
        await world.process(clock_error_seconds=-error_seconds).obtain(A)
        world.check([A, *(wanted(number) for number in (10, 11, 12, 20))])

    play(story)


def test_a_list_that_is_late_is_asked_again_until_it_must_show_it() -> None:
    async def story() -> None:
        world = World(listing_delay_seconds=55.0)
        await lost(world, A)
        await world.process().obtain(A)
        world.check([A])

    play(story)


def test_of_a_list_without_an_end_nobody_can_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settling, "MOST_PAGES", 3)

    async def story() -> None:
        world = World()
        await lost(world, A)
        others_buy(world, C, 300)
        with pytest.raises(OutcomeUnknown, match="too long"):
            await world.process().obtain(A)
        assert len(world.bought()) == 1

    play(story)


@pytest.mark.parametrize("fault", ["executions:stale,seconds=600", "executions:missing_rows"])
def test_a_list_that_does_not_show_a_prediction_known_by_id_is_blind_and_nothing_is_repeated(fault: str) -> None:
    async def story() -> None:
        world = World()
        await world.process().obtain(B)
        await asyncio.sleep(200)
        world.emulator.faults.set(World(fault).emulator.options.faults)
        await abandoned(world, A)
        process = world.process()
        with pytest.raises(OutcomeUnknown, match="does not show prediction"):
            await process.obtain(A)
        assert world.record(A).state is RecordState.AMBIGUOUS
        assert not world.bought_for(A)
        world.emulator.faults.set(())
        await process.obtain(A)
        world.check([A, B])

    play(story)


def test_without_an_endpoint_for_executions_nothing_is_repeated() -> None:
    async def story() -> None:
        world = World("executions:missing")
        await lost(world, A)
        for _ in range(3):
            with pytest.raises(OutcomeUnknown, match="no listing"):
                await world.process().obtain(A)
        assert world.record(A).state is RecordState.AMBIGUOUS
        world.emulator.faults.set(())
        await world.process().obtain(A)
        world.check([A])

    play(story)


def test_an_endpoint_for_executions_that_never_answers_is_not_asked_for_ever() -> None:
    async def story() -> None:
        world = World("executions:error")
        await lost(world, A)
        with pytest.raises(OutcomeUnknown, match="gets no answer"):
            await world.process().obtain(A)
        assert world.now() < 61 + 120 + 300 + 60
        assert len(world.bought()) == 1

    play(story)


def test_a_cancelled_prediction_may_be_missing_from_the_list() -> None:
    async def story() -> None:
        world = World("prediction:unlisted,next=1", service_seconds=30.0)
        process = world.process()
        cancelled = asyncio.ensure_future(process.obtain(B))
        await asyncio.sleep(3)
        cancelled.cancel()
        await asyncio.wait({cancelled})
        assert world.record(B).state is RecordState.CANCELLED
        await asyncio.sleep(90)
        await abandoned(world, A)
        await world.process().obtain(A)
        assert len(world.bought_for(A)) == 1

    play(story)


# ------------------------------------------------------------------------ what GET shows


def test_a_prediction_that_is_listed_before_get_knows_it_is_waited_for() -> None:
    """It takes effect at the last moment, 55 s after it was given up, and GET says 404 for 20 s more."""

    async def story() -> None:
        world = World("create:late,seconds=85,at=1", "get:not_found,seconds=20")
        await world.process().obtain(A)
        world.check([A])

    play(story)


@pytest.mark.parametrize("status", [403, 404])
def test_a_row_of_another_key_that_get_does_not_show_us_holds_nothing_up(status: int) -> None:
    async def story() -> None:
        world = World()
        await abandoned(world, A)
        others_buy(world, A)
        (foreign,) = world.emulator.ledger.newest_first(world.now())
        world.hidden[foreign.id] = status
        await world.process().obtain(A)
        world.check([A])

    play(story)


@pytest.mark.parametrize("kind", ["echo_normalised", "echo_defaults", "echo_text"])
def test_an_echo_is_recognised_in_any_form(kind: str) -> None:
    async def story() -> None:
        world = World(f"prediction:{kind}")
        item = wanted(1, prompt="  Cafe\u0301   noir \n")
        await lost(world, item)
        await world.process().obtain(item)
        world.check([item])

    play(story)


def test_without_an_echo_nobody_can_tell_and_nothing_is_repeated() -> None:
    async def story() -> None:
        world = World("prediction:echo_none")
        await lost(world, A)
        with pytest.raises(OutcomeUnknown, match="what a prediction's input was"):
            await world.process().obtain(A)
        assert len(world.bought()) == 1

    play(story)


# --------------------------------------------------------------------------- adopting it


@pytest.mark.parametrize("write", ["S3 PUT kit/adopted", "S3 PUT kit/records/item-1.json created"])
@pytest.mark.parametrize("fault", ["refuse", "lose", "lose refused"])
def test_an_adoption_that_cannot_be_written_down_is_not_taken_for_nothing_found(write: str, fault: Fault) -> None:
    """It is listed so late that the look that finds it is the one that decides."""

    async def story() -> None:
        world = World("prediction:listed_late,seconds=110,next=1")
        await lost(world, A)
        await world.process(by_name=[(write, fault, 2)]).obtain(A)
        world.check([A])

    play(story)


CREATED = "S3 PUT kit/records/item-1.json created"


@pytest.mark.parametrize(
    "boundary", ["before S3 PUT kit/adopted", "after S3 PUT kit/adopted", f"before {CREATED}", f"after {CREATED}"]
)
def test_an_adoption_that_was_begun_is_resumed(boundary: str) -> None:
    async def story() -> None:
        world = World()
        await lost(world, A)
        second = world.process(die_at=boundary)
        await second.dies(second.obtain(A))
        await world.process().obtain(A)
        world.check([A])

    play(story)


def test_a_marker_whose_holder_has_another_prediction_by_now_is_taken_over() -> None:
    """B's settler marks A's prediction for B (equal input); meanwhile B's late owner writes its own down."""

    async def story() -> None:
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

    play(story)


def test_an_old_prediction_with_the_same_input_is_not_adopted_though_its_record_is_old() -> None:
    async def story() -> None:
        world = World()
        yesterday, today = wanted(1, prompt="same"), wanted(2, prompt="same")
        await world.process().obtain(yesterday)
        await asyncio.sleep(10 * 3600)
        await abandoned(world, today)
        await world.process().obtain(today)
        world.check([yesterday, today])

    play(story)


@pytest.mark.parametrize("first", ["a", "b"])
def test_an_input_that_is_part_of_another_does_not_take_its_picture(first: str) -> None:
    """The echo of {prompt, seed} holds all of {prompt}: the API might have added the seed."""

    async def story() -> None:
        world = World(strict_models=False)
        a, b = wanted(1, prompt="cat"), wanted(2, prompt="cat", seed=1)
        for item in (a, b) if first == "a" else (b, a):
            await lost(world, item)
        second = world.process()
        await asyncio.gather(second.obtain(a), second.obtain(b))
        world.check([a, b])

    play(story)


def test_it_waits_while_another_may_be_buying_an_input_that_holds_its_own() -> None:
    async def story() -> None:
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

    play(story)


def test_what_fits_an_unsettled_claim_of_another_item_better_is_left_to_it() -> None:
    async def story() -> None:
        world = World(strict_models=False)
        a, b = wanted(1, prompt="cat"), wanted(2, prompt="cat", seed=1)
        await abandoned(world, a)
        await lost(world, b)
        with pytest.raises(OutcomeUnknown, match="item-2"):
            await world.process().obtain(a)
        await world.process().obtain(b)
        await world.process().obtain(a)
        world.check([a, b])

    play(story)


# ------------------------------------------------------------------------ many at a time


def test_equal_inputs_that_were_lost_together_get_a_prediction_each() -> None:
    async def story() -> None:
        world = World("create:lost_answer")
        items = [wanted(number, prompt="same") for number in range(30)]
        process = world.process(requests_per_minute=None, max_in_flight=None)
        await asyncio.gather(*map(process.obtain, items))
        world.check(items)

    play(story)


def test_settling_that_takes_longer_than_a_claim_lives_keeps_its_claims_alive() -> None:
    """200 foreign executions of the model to ask about at 60 requests a minute, while another run stands by."""

    async def story() -> None:
        world = World()
        await abandoned(world, A)
        others_buy(world, C, 200)
        first = world.process()
        settling = asyncio.ensure_future(first.obtain(A))
        await asyncio.sleep(65)
        second = world.process()
        await asyncio.gather(settling, second.obtain(A))
        assert second.count("S3 PUT kit/records/item-1.json claimed") == 0, "the claim was taken from a run that was settling it"
        world.check([A])

    play(story)


def test_lost_answers_are_settled_in_one_look_together() -> None:
    async def story() -> None:
        world = World("create:lost_answer")
        items = [wanted(number) for number in range(20)]
        process = world.process(requests_per_minute=None, max_in_flight=None)
        await asyncio.gather(*map(process.obtain, items))
        world.check(items)
        assert process.count("GET /v1/executions") <= 3
        assert process.count("S3 LIST") <= 3

    play(story)


# ------------------------------------------------------------------------- on_ambiguous


def test_with_on_ambiguous_fail_a_lost_answer_is_reported_and_not_looked_for() -> None:
    async def story() -> None:
        world = World("create:lost_answer,next=1")
        process = world.process()
        with pytest.raises(OutcomeUnknown):
            await process.obtain(A, on_ambiguous="fail")
        assert world.record(A).state is RecordState.AMBIGUOUS
        assert process.count("GET /v1/executions") == 0
        await world.process().obtain(A)
        world.check([A])

    play(story)


def test_with_on_ambiguous_fail_a_dead_claim_is_not_bought_again() -> None:
    async def story() -> None:
        world = World()
        await abandoned(world, A)
        for _ in range(2):
            with pytest.raises(OutcomeUnknown, match="on_ambiguous=settle"):
                await world.process().obtain(A, on_ambiguous="fail")
        assert not world.bought()
        await world.process().obtain(A)
        world.check([A])

    play(story)


def test_with_on_ambiguous_fail_what_a_dead_claim_has_bought_is_stored() -> None:
    async def story() -> None:
        world = World()
        await lost(world, A)
        await world.process().obtain(A, on_ambiguous="fail")
        world.check([A])

    play(story)
