"""What a lost POST has bought is found out through the API's executions, whatever they show."""

from __future__ import annotations

import asyncio

import pytest

from prefect_eachlabs.errors import OutcomeUnknown
from prefect_eachlabs.ledger import reconcile
from prefect_eachlabs.ledger.records import RecordState
from tests.protocol.kit import World, wanted
from tests.protocol.losses import A, B, C, abandoned, lost, others_buy

# ------------------------------------------------------------------- what the list shows


@pytest.mark.parametrize("skew_hours", [0, -1, 1, -14, 14])
@pytest.mark.parametrize("foreign_rows", [0, 120])
async def test_it_is_found_among_the_rows_of_others_whatever_the_clock_of_the_api_says(
    skew_hours: int, foreign_rows: int
) -> None:
    world = World(clock_skew_seconds=skew_hours * 3600)
    await lost(world, A)
    others_buy(world, C, foreign_rows)
    await world.process().obtain(A)
    world.check([A])


@pytest.mark.parametrize("skew_hours", [-14, 14])
@pytest.mark.parametrize("error_seconds", [-840.0, 840.0])
async def test_it_is_found_whatever_the_clocks_of_the_workers_say(skew_hours: int, error_seconds: float) -> None:
    """S3 itself refuses a clock that is off by more than 15 minutes."""
    world = World(clock_skew_seconds=skew_hours * 3600)
    buyers = [world.process(clock_error_seconds=error_seconds) for _ in range(3)]
    await asyncio.gather(*(buyer.obtain(wanted(10 + number)) for number, buyer in enumerate(buyers)))
    await lost(world, A)
    others_buy(world, C, 120)
    await asyncio.sleep(5)
    await buyers[0].obtain(wanted(20))
    await world.process(clock_error_seconds=-error_seconds).obtain(A)
    world.check([A, *(wanted(number) for number in (10, 11, 12, 20))])


async def test_a_list_that_is_late_is_asked_again_until_it_must_show_it() -> None:
    world = World(listing_delay_seconds=55.0)
    await lost(world, A)
    await world.process().obtain(A)
    world.check([A])


async def test_an_order_is_found_below_thousands_that_came_after_it() -> None:
    assert reconcile.MOST_PAGES * 100 == 100_000
    world = World()
    await lost(world, A)
    others_buy(world, C, 2_500)
    await world.process().obtain(A)
    world.check([A])


async def test_of_a_list_without_an_end_nobody_can_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconcile, "MOST_PAGES", 1)

    world = World()
    await lost(world, A)
    others_buy(world, C, 100)
    with pytest.raises(OutcomeUnknown, match="too long"):
        await world.process().obtain(A)
    assert len(world.bought()) == 1


@pytest.mark.parametrize("fault", ["executions:stale,seconds=600", "executions:missing_rows"])
async def test_a_list_that_does_not_show_a_prediction_known_by_id_is_blind_and_nothing_is_repeated(fault: str) -> None:
    world = World()
    await world.process().obtain(B)
    await asyncio.sleep(200)
    world.set_faults(fault)
    await abandoned(world, A)
    process = world.process()
    with pytest.raises(OutcomeUnknown, match="does not show prediction"):
        await process.obtain(A)
    assert world.record(A).state is RecordState.AMBIGUOUS
    assert not world.bought_for(A)
    world.set_faults()
    await process.obtain(A)
    world.check([A, B])


async def test_without_an_endpoint_for_executions_nothing_is_repeated() -> None:
    world = World("executions:missing")
    await lost(world, A)
    for _ in range(3):
        with pytest.raises(OutcomeUnknown, match="no listing"):
            await world.process().obtain(A)
    assert world.record(A).state is RecordState.AMBIGUOUS
    world.set_faults()
    await world.process().obtain(A)
    world.check([A])


async def test_an_endpoint_for_executions_that_never_answers_is_not_asked_for_ever() -> None:
    world = World("executions:error")
    await lost(world, A)
    with pytest.raises(OutcomeUnknown, match="gets no answer"):
        await world.process().obtain(A)
    assert world.now() < 61 + 120 + 300 + 60
    assert len(world.bought()) == 1


async def test_a_cancelled_prediction_may_be_missing_from_the_list() -> None:
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


# ------------------------------------------------------------------------ what GET shows


async def test_a_prediction_that_is_listed_before_get_knows_it_is_waited_for() -> None:
    """It takes effect at the last moment, 55 s after it was given up, and GET says 404 for 20 s more."""
    world = World("create:late,seconds=85,at=1", "get:not_found,seconds=20")
    await world.process().obtain(A)
    world.check([A])


@pytest.mark.parametrize("status", [403, 404])
async def test_a_row_of_another_key_that_get_does_not_show_us_holds_nothing_up(status: int) -> None:
    world = World()
    await world.process().obtain(B)
    await abandoned(world, A)
    others_buy(world, A)
    foreign = next(iter(world.emulator.ledger.newest_first(world.now())))
    world.hidden[foreign.id] = status
    await world.process().obtain(A)
    world.check([A, B])


@pytest.mark.parametrize("kind", ["echo_normalised", "echo_defaults", "echo_text"])
async def test_an_echo_is_recognised_in_any_form(kind: str) -> None:
    world = World(f"prediction:{kind}")
    item = wanted(1, prompt="  Cafe\u0301   noir \n")
    await lost(world, item)
    await world.process().obtain(item)
    world.check([item])


async def test_without_an_echo_nobody_can_tell_and_nothing_is_repeated() -> None:
    world = World("prediction:echo_none")
    await lost(world, A)
    with pytest.raises(OutcomeUnknown, match="what a prediction's input was"):
        await world.process().obtain(A)
    assert len(world.bought()) == 1


async def test_an_echo_that_is_missing_once_is_asked_for_again() -> None:
    world = World("get:no_echo,next=1")
    await lost(world, A)
    await world.process().obtain(A)
    world.check([A])
