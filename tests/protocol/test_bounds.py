"""Orders, times and slots have bounds: whatever the API answers, an item's orders end and hold nobody else up."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable
from typing import Any

import pytest

from prefect_eachlabs.errors import ItemConflict, OutcomeUnknown, SetupError, StoreFailed
from prefect_eachlabs.ledger import purchase, rules
from prefect_eachlabs.ledger.records import RecordState
from prefect_eachlabs.ledger.rules import PurchaseOptions
from prefect_eachlabs.limits.limiter import Kind
from prefect_eachlabs.retry import until_it_succeeds
from prefect_eachlabs.storage.base import PreconditionFailed
from tests.protocol.kit import DESTINATION, World, play, wanted
from tests.protocol.losses import A, B
from tests.protocol.process import Bucket

OLD, NEW = wanted(1, prompt="the old text"), wanted(2, prompt="the new text", item_id="item-1")


async def outcome(work: Awaitable[Any]) -> Any:
    """What it returns or raises."""
    try:
        return await work
    except Exception as error:
        return error


# ------------------------------------------------------------------------------ replacing


@pytest.mark.parametrize("later_seconds", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("processes", [1, 2])
async def test_two_runs_that_replace_each_other_buy_once_each(later_seconds: float, processes: int) -> None:
    world = World(service_seconds=5.0)
    one = world.process()
    two = one if processes == 1 else world.process()
    first = asyncio.ensure_future(outcome(one.obtain(OLD, replace=True)))
    await asyncio.sleep(later_seconds)
    second = asyncio.ensure_future(outcome(two.obtain(NEW, replace=True)))
    ends = await asyncio.wait_for(asyncio.gather(first, second), 600)
    assert len(world.bought()) <= 2
    assert all(len(world.bought_for(item)) <= 1 for item in (OLD, NEW))
    assert any(isinstance(end, ItemConflict) for end in ends) or len(world.bought()) == 2
    assert world.record(OLD).state is RecordState.STORED
    assert set(world.named().values()) == {1}


async def test_two_batches_that_replace_the_same_rows_buy_each_row_once_each() -> None:
    """Each row is begun anew up to three times, as a task's retries do."""
    world = World(service_seconds=5.0)
    await asyncio.gather(*(world.process().obtain(wanted(number)) for number in range(12)))
    bought_before = len(world.bought())
    runs = [world.process(max_in_flight=3, jitter=number) for number in range(2)]

    async def row(run: int, number: int) -> Any:
        item = wanted(number, prompt=f"run {run}'s text {number}", item_id=f"item-{number}")
        for _ in range(3):
            end = await outcome(runs[run].obtain(item, replace=True))
            await asyncio.sleep(1)
        return end

    await asyncio.gather(*(row(run, number) for run in range(2) for number in range(12)))
    assert len(world.bought()) - bought_before <= 24
    assert set(world.named().values()) == {1}
    assert all(record.state is RecordState.STORED for record in world.records())


async def test_a_run_that_was_replaced_does_not_replace_in_turn() -> None:
    world = World()
    first = world.process(run_id="first")
    await first.obtain(OLD)
    await world.process(run_id="second").obtain(NEW, replace=True)
    with pytest.raises(ItemConflict, match="after this run had come to it"):
        await first.obtain(OLD, replace=True)
    with pytest.raises(ItemConflict, match="after this run had come to it"):
        await world.process(run_id="second").obtain(OLD, replace=True)
    assert len(world.bought()) == 2
    await world.process(run_id="third").obtain(OLD, replace=True)
    assert world.record(OLD).replaced_runs == ["first", "second"]
    assert len(world.bought()) == 3


# -------------------------------------------------------------------- orders without trace


async def test_an_order_that_the_api_always_answers_500_is_sent_twice_and_then_stands_as_ambiguous() -> None:
    world = World("create:error,status=500,matching=poison")
    process = world.process()
    # Something else is bought now and then: the list sees.
    await process.obtain(B)
    poison = wanted(1, prompt="poison in a green bottle")
    with pytest.raises(OutcomeUnknown) as told:
        await process.obtain(poison)
    for said in ("'gemini'", "poison in a green bottle", "--retry-ambiguous", "dashboard", "2 orders"):
        assert said in str(told.value)
    assert process.count("POST") == 1 + 2
    assert world.record(poison).state is RecordState.AMBIGUOUS
    for _ in range(3):
        await asyncio.sleep(3600)
        with pytest.raises(OutcomeUnknown):
            await world.process().obtain(poison)
    assert sum(each.count("POST") for each in world.processes) == 1 + 2


@pytest.mark.parametrize("late_by_seconds", [30, 61, 90, 300, 900])
async def test_lost_answers_under_a_late_list_buy_at_most_one_too_many(late_by_seconds: int) -> None:
    """Every answer is lost and the list is later than assumption (b) says."""
    world = World("create:lost_answer", listing_delay_seconds=float(late_by_seconds))
    await outcome(asyncio.wait_for(world.process().obtain(A), 3600))
    assert len(world.bought()) <= (1 if late_by_seconds < 60 else 2)


async def test_ten_orders_that_always_fail_hold_up_nobody() -> None:
    world = World("create:error,status=500,matching=poison", service_seconds=5.0)
    process = world.process(max_in_flight=10, requests_per_minute=60)
    bad = [asyncio.ensure_future(outcome(process.obtain(wanted(n, prompt=f"poison {n}")))) for n in range(10)]
    await asyncio.sleep(1)
    began = world.now()
    await asyncio.gather(*(process.obtain(wanted(n)) for n in range(10, 40)))
    assert world.now() - began < 90, "thirty pictures take some 35 s at 60 a minute"
    ends = await asyncio.wait_for(asyncio.gather(*bad), 600)
    assert all(isinstance(end, OutcomeUnknown) for end in ends)
    assert process.engine.account.limiter.pressure(Kind.IN_FLIGHT) == 0


async def test_what_a_lost_order_may_have_in_flight_keeps_its_slot_for_about_as_long_as_it_takes() -> None:
    world = World("create:lost_answer,next=10", service_seconds=8.0, max_in_flight=10)
    process = world.process(max_in_flight=10, requests_per_minute=None)
    await asyncio.gather(*(process.obtain(wanted(number)) for number in range(30)))
    assert world.emulator.tallies()["worst_in_flight"] <= 10
    assert world.emulator.tallies()["rejected_429"] == 0
    world.check([wanted(number) for number in range(30)])


@pytest.mark.parametrize("fault", ["throttled,next=5", "error,status=401,next=1"])
async def test_what_was_surely_not_bought_counts_as_no_order(fault: str) -> None:
    world = World(f"create:{fault}")
    await outcome(world.process().obtain(A))
    await world.process().obtain(A)
    assert world.record(A).orders_without_trace == 0
    world.check([A])


async def test_a_new_purchase_of_an_item_begins_to_count_anew() -> None:
    world = World("create:error,status=500,next=1")
    await world.process().obtain(B)
    world.set_faults("create:error,status=500,next=1")
    await world.process().obtain(A)
    assert world.record(A).orders_without_trace == 1
    del world.store.objects["kit/images/item-1.png"]
    world.set_faults("create:error,status=500,next=1")
    await asyncio.sleep(300)
    await world.process().obtain(A, rebuy_missing=True)
    assert world.record(A).state is RecordState.STORED
    assert len(world.bought_for(A)) == 2


async def test_a_process_that_stood_still_takes_new_slots_before_it_posts() -> None:
    """Slots that were leased end without their process."""
    world = World()
    process = world.process(freeze_at="after S3 PUT kit/records/item-1.json claimed", max_in_flight=1)
    limiter, taken = process.engine.account.limiter, []
    take = limiter.take_in_flight

    async def counted() -> Any:
        taken.append(process.count("POST"))
        return await take()

    limiter.take_in_flight = counted  # type: ignore[method-assign]
    working = asyncio.ensure_future(process.obtain(A))
    await process.froze.wait()
    await asyncio.sleep(80)
    process.thaw()
    await working
    assert taken == [0, 0]
    world.check([A])


# ------------------------------------------------------------------------ a person's word


async def ambiguous(world: World) -> None:
    """A stands as ambiguous: two orders left no trace."""
    world.set_faults("create:error,status=500")
    with pytest.raises(OutcomeUnknown):
        await world.process().obtain(A)
    world.set_faults()


async def test_on_a_persons_word_an_ambiguous_item_is_bought_once_and_the_record_keeps_it() -> None:
    world = World()
    await world.process().obtain(B)
    await ambiguous(world)
    with pytest.raises(OutcomeUnknown):
        await world.process().obtain(A)
    await world.process(run_id="told").obtain(A, retry_ambiguous=True)
    world.check([A, B])
    (said,) = world.record(A).statements
    assert said.run_id == "told"
    assert said.unsettled_since is not None
    assert "left no trace" in said.unsettled


async def test_the_same_run_uses_a_persons_word_once_for_an_item() -> None:
    world = World()
    await world.process().obtain(B)
    await ambiguous(world)
    world.set_faults("create:error,status=500")
    told = world.process(run_id="told")
    for _ in range(3):
        with pytest.raises(OutcomeUnknown):
            await told.obtain(A, retry_ambiguous=True)
    assert told.count("POST") == 1
    assert len(world.record(A).statements) == 1


async def test_a_persons_word_is_not_about_orders_that_are_lost_after_it_was_given() -> None:
    world = World()
    await world.process().obtain(B)
    world.set_faults("create:error,status=500")
    process = world.process()
    for _ in range(2):
        with pytest.raises(OutcomeUnknown):
            await process.obtain(A, retry_ambiguous=True)
    assert process.count("POST") == 2
    assert world.record(A).statements == []


async def test_a_persons_word_is_not_about_orders_that_another_run_loses_meanwhile() -> None:
    """Nothing is ever listed: the other's order stands as ambiguous when this run has just begun."""
    world = World("executions:missing")
    other, told = world.process(by_name=[("POST", "lose", 1)]), world.process(run_id="told")
    ends = await asyncio.gather(outcome(other.obtain(A)), outcome(told.obtain(A, retry_ambiguous=True)))
    assert [type(end) for end in ends] == [OutcomeUnknown, OutcomeUnknown]
    assert len(world.bought()) == 1


async def test_credentials_that_expire_for_good_do_not_hold_a_purchase_up_for_ever() -> None:
    calls = 0

    async def refused() -> None:
        nonlocal calls
        calls += 1
        raise SetupError("the token has expired")

    began = asyncio.get_running_loop().time()
    with pytest.raises(SetupError, match="expired"):
        await until_it_succeeds(refused, errors=(SetupError,), what="it cannot be written")
    assert 600 <= asyncio.get_running_loop().time() - began <= 660
    assert calls > 20


async def test_what_is_found_after_all_is_adopted_whatever_a_person_says() -> None:
    world = World("executions:missing")
    lost = world.process(by_name=[("POST", "lose", 1)])
    with pytest.raises(OutcomeUnknown):
        await lost.obtain(A)
    world.set_faults()
    await world.process().obtain(A, retry_ambiguous=True)
    world.check([A])
    assert world.record(A).statements == []


# ------------------------------------------------------------------------- another server


async def test_a_page_of_another_server_is_no_fault_of_the_item() -> None:
    world = World("create:html,status=404,next=1")
    with pytest.raises(SetupError, match="EACHLABS_BASE_URL"):
        await world.process().obtain(A)
    began = world.now()
    await world.process().obtain(A)
    assert world.now() - began < 10
    world.check([A])


@pytest.mark.parametrize("state", ["claimed", "created", "stored"])
def test_a_store_that_refuses_a_put_for_nothing_is_not_asked_without_a_pause(
    state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S3 answers 409 where it sees another request for the same key, also where there is none any more."""
    put = Bucket.put
    refused = 0

    async def refusing(self: Bucket, key: str, body: bytes, **given: Any) -> str:
        nonlocal refused
        if "/records/" in key and json.loads(body)["state"] == state and asyncio.get_running_loop().time() < until:
            refused += 1
            raise PreconditionFailed("409")
        return await put(self, key, body, **given)

    async def story() -> None:
        nonlocal until
        world = World()
        until = asyncio.get_running_loop().time() + 300
        process = world.process()
        ended = await process.until_it_ends(process.obtain(A))
        assert state == "created" or isinstance(ended, StoreFailed)
        assert 1 <= refused < 60
        await asyncio.sleep(300)
        await world.process().obtain(A)
        world.check([A])

    until = 0.0
    monkeypatch.setattr(Bucket, "put", refusing)
    play(story)


async def test_a_word_given_before_the_machine_slept_is_not_about_what_became_ambiguous_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asleep = 0.0
    for module in (purchase, rules):
        monkeypatch.setattr(module, "clock", lambda: asyncio.get_running_loop().time() + asleep)

    world = World("executions:empty_list")  # the list is blind: what is lost stays ambiguous
    await world.process().obtain(wanted(99))
    await asyncio.sleep(200)
    killed = world.process(die_at="before POST")
    await killed.dies(killed.obtain(A))
    await asyncio.sleep(200)
    settling = world.process()
    await settling.until_it_ends(settling.obtain(A))
    await asyncio.sleep(30)
    one, other = world.process(run_id="one"), world.process(run_id="other")
    given = PurchaseOptions(run_id="other", retry_ambiguous=True).begun()
    world.set_faults("executions:empty_list", "create:lost_answer,next=1")
    await one.until_it_ends(one.obtain(A, retry_ambiguous=True))
    assert len(world.bought_for(A)) == 1
    world.pass_unnoticed(900)
    asleep = 900.0
    with pytest.raises(OutcomeUnknown):
        await other.run(other.engine.generate_and_store(A, DESTINATION, options=given))
    assert len(world.bought_for(A)) == 1
