"""With webhooks: a call is worth what GET's answer is, a lost order is settled by its name, nothing forged counts."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

import pytest

from prefect_eachlabs.errors import EachlabsError
from prefect_eachlabs.ledger.records import RecordState
from prefect_eachlabs.models import Item
from prefect_eachlabs.testing.emulator.webhooks import FORGED_URL
from tests.protocol.kit import World, order, play, wanted

LOST = [("POST /v1/prediction", "lose", 1)]


def questions(world: World, name: str) -> int:
    return world.emulator.journal.by_endpoint[name]


def counts(world: World) -> dict[str, int]:
    return dict(world.emulator.webhooks.answers)


async def one_by_one(world: World, items: Sequence[Item]) -> None:
    process = world.process()
    for item in items:
        await process.obtain(item)


@pytest.mark.parametrize("form", ["newest", "older"])
async def test_once_calls_come_nobody_is_asked_but_for_costs(form: str) -> None:
    world = World(calls=True, webhooks=form, service_seconds=20.0)
    process = world.process()
    await process.obtain(wanted(1))
    asked, listed = questions(world, "get"), questions(world, "executions")
    items = [wanted(number) for number in range(2, 14)]
    await asyncio.gather(*map(process.obtain, items))
    world.check([wanted(1), *items])
    assert questions(world, "get") == asked
    assert questions(world, "executions") - listed <= 2
    assert counts(world) == {"real 202": 13}
    await asyncio.sleep(120)
    told = [world.record(item) for item in items]
    assert all(record.cost_usd == pytest.approx(0.039) for record in told), "costs come from the list"


async def test_a_process_that_ends_writes_down_what_its_pictures_cost() -> None:
    world = World(calls=True, service_seconds=5.0)
    process = world.process()
    items = [wanted(number) for number in range(6)]
    await asyncio.gather(*map(process.obtain, items))
    await process.engine.aclose()
    assert [world.record(item).cost_usd for item in items] == [pytest.approx(0.039)] * 6


async def test_the_last_in_flight_is_told_its_cost_at_once() -> None:
    world = World(calls=True)
    images = [await world.process().obtain(wanted(number)) for number in range(3)]
    assert [image.cost_usd for image in images] == [pytest.approx(0.039)] * 3


@pytest.mark.parametrize("fault", ["fail", "fail_retryable", "fail_moderation", "fail_text", "output_null"])
def test_what_a_call_leaves_open_is_asked(fault: str) -> None:
    """A failure's call does not say whether it may be bought again: whoever has no webhooks comes to the same end."""

    async def story(calls: bool) -> tuple[str, int]:
        world = World(f"prediction:{fault},next=2", calls=calls)
        try:
            await world.process().obtain(wanted())
        except EachlabsError as error:
            return type(error).__name__ + str(error.code), len(world.bought())
        return "stored", len(world.bought())

    assert play(lambda: story(True)) == play(lambda: story(False))


# ---------------------------------------------------------------------------------------------- who is believed


@pytest.mark.parametrize("fault", ["forged", "stolen", "malformed", "huge", "twice", "attempt_lost", "late,seconds=90"])
@pytest.mark.parametrize("form", ["newest", "older"])
async def test_bad_calls_change_nothing(fault: str, form: str) -> None:
    world = World(f"webhook:{fault}", calls=True, webhooks=form, service_seconds=5.0)
    process = world.process()
    items = [wanted(number) for number in range(6)]
    await asyncio.gather(*map(process.obtain, items))
    await asyncio.sleep(200)
    world.check(items)
    assert not any("forged" in str(record) for record in world.records())
    for answer, count in counts(world).items():
        what, status = answer.split()
        assert count
        if what == "forged":
            assert status == "401"
        elif what == "stolen":
            assert status == "409", "it proves to know one order and names another's prediction"
        elif fault in ("malformed", "huge") and what == "real":
            # A body cannot be signed in half; what is too large is not read.
            assert status == ("413" if fault == "huge" else "400")
        else:
            assert status == "202"


async def test_a_forged_output_is_never_fetched_and_a_good_one_goes_through_the_same_guard() -> None:
    world = World("webhook:forged", "webhook:stolen", calls=True)
    process = world.process()
    await asyncio.gather(*(process.obtain(wanted(number)) for number in range(8)))
    downloads = [one.name for one in process.operations if one.name.startswith("DOWNLOAD")]
    assert len(downloads) == 8
    assert not any(FORGED_URL.rpartition("/")[2] in name for name in downloads)


async def test_a_tenth_lost_a_fifth_twice_a_fifth_forged_all_stored_and_billed_once() -> None:
    world = World(
        "webhook:lost=0.1", "webhook:twice=0.2", "webhook:forged=0.2", "create:lost_answer=0.05", calls=True, seed=7
    )
    process = world.process(requests_per_minute=120, max_in_flight=10)
    items = [wanted(number) for number in range(60)]
    await asyncio.gather(*map(process.obtain, items))
    world.check(items)
    said = counts(world)
    assert said["forged 401"] >= 20
    assert said["repeated 202"] >= 5
    assert process.engine.account.webhooks.given_up is False


# ------------------------------------------------------------------------------------------- whether they come


async def test_calls_that_do_not_come_are_given_up_with_one_warning_and_counted_on_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING)

    world = World(calls=True, service_seconds=5.0)
    process = world.process(max_in_flight=5)
    webhooks = process.engine.account.webhooks
    await process.obtain(wanted(0))
    assert process.engine.account.poller.calls_come
    world.receivers.are_away = True
    began = world.now()
    items = [wanted(number) for number in range(1, 41)]
    await asyncio.gather(*map(process.obtain, items))
    assert webhooks.given_up
    # Eight rounds of 5 s, and one that waited for its calls.
    assert world.now() - began <= 8 * 5.5 + 45
    world.receivers.are_away = False
    await asyncio.sleep(60)
    await process.obtain(wanted(41))
    assert not webhooks.given_up
    world.check([wanted(0), *items, wanted(41)])
    assert len([record for record in caplog.records if "calls do not come" in record.message]) == 1


@pytest.mark.parametrize("in_flight", [2, 5])
def test_where_none_ever_comes_it_takes_no_longer(in_flight: int) -> None:
    async def story(calls: bool) -> float:
        world = World("webhook:lost", calls=calls, service_seconds=5.0, spread=0.1)
        process = world.process(max_in_flight=in_flight)
        items = [wanted(number) for number in range(10 * in_flight)]
        await asyncio.gather(*map(process.obtain, items))
        world.check(items)
        return world.now()

    without = play(lambda: story(False))
    assert play(lambda: story(True)) <= 1.02 * without


async def test_a_receiver_that_is_killed_and_started_again_costs_time_alone() -> None:
    world = World(calls=True, service_seconds=30.0)
    first = world.process()
    items = [wanted(number) for number in range(6)]
    tasks = [asyncio.ensure_future(first.until_it_ends(first.obtain(item))) for item in items]
    await asyncio.sleep(10)
    first.kill()  # all are bought, and the calls come while nobody receives
    await asyncio.gather(*tasks)
    await asyncio.sleep(120)
    assert counts(world) == {"real unreachable": 18}
    second = world.process()
    await asyncio.gather(*map(second.obtain, items))
    world.check(items)


# --------------------------------------------------------------------------------------------- lost answers


async def test_a_lost_answer_is_settled_by_the_call_that_names_it_in_seconds() -> None:
    world = World("prediction:unlisted", "prediction:echo_none", calls=True, service_seconds=5.0)
    process = world.process(by_name=LOST)
    await process.obtain(wanted())
    assert world.now() <= 30 + 12, "30 s until the answer counts as lost at most, and the call"
    world.check([wanted()])


async def test_equal_inputs_whose_answers_are_lost_are_told_apart_by_their_calls() -> None:
    """Without an echo (assumption c), and while somebody else buys the same (e)."""
    world = World("prediction:echo_none", calls=True, service_seconds=5.0, webhook_retry_seconds=1.0)
    process = world.process(by_name=[("POST /v1/prediction", "lose", 4)])
    items = [wanted(prompt="the same for all", item_id=f"item-{number}") for number in range(4)]
    world.emulator.announce_foreign(order(items[0]), base_url="https://api.invalid", after_seconds=0.2)
    await asyncio.gather(*map(process.obtain, items))
    records = [world.record(item) for item in items]
    assert {record.prediction_id for record in records} == {job.id for job in world.bought()}
    assert [record.adopted_among for record in records] == [[]] * 4, "there was no doubt"
    urls = {row["execution_id"]: row["url"] for row in world.emulator.webhooks.rows}
    for record in records:
        assert any(f"write_id={one}" in urls[record.prediction_id or ""] for one in record.ordered_as)
    world.check(items)
    assert world.now() < 40


async def test_the_vendors_list_of_webhooks_settles_what_no_call_told() -> None:
    world = World("prediction:echo_none", calls=True, service_seconds=5.0)
    world.receivers.are_away = True
    process = world.process(by_name=LOST)
    item = wanted()
    world.emulator.announce_foreign(order(item), base_url="https://api.invalid", after_seconds=0.2)
    await process.obtain(item)
    world.check([item])
    assert questions(world, "webhooks") >= 1
    assert world.now() < 60


async def test_a_killed_runs_order_is_found_by_name_by_the_next_run() -> None:
    world = World("prediction:echo_none", calls=True, service_seconds=5.0)
    item = wanted()
    first = world.process(die_at="after POST")
    await first.dies(first.obtain(item))
    world.emulator.announce_foreign(order(item), base_url="https://api.invalid", after_seconds=0.2)
    await asyncio.sleep(70)  # its call found nobody
    await world.process().obtain(item)
    world.check([item])


async def test_an_order_that_takes_effect_after_all_is_reported_by_its_call() -> None:
    """Assumption (b) broken: the abandoned POST buys when another was bought in its place."""
    world = World("create:late,next=1,seconds=300", calls=True, service_seconds=5.0)
    process = world.process()
    await process.obtain(wanted())
    assert world.now() < 300
    await asyncio.sleep(400)
    late = next(job for job in world.bought() if job.id != world.record(wanted()).prediction_id)
    assert world.record(wanted()).also_bought == [late.id]
    world.check([wanted()], allow_one_too_many=True)


@pytest.mark.parametrize("echo", ["echoed", "echo_none"])
async def test_an_order_that_bought_nothing_is_not_given_what_somebody_else_bought(echo: str) -> None:
    """The vendor's list of webhooks shows that the foreign prediction is not ours: bought once more, and once only."""
    faults = ["prediction:echo_none"] if echo == "echo_none" else []
    world = World(*faults, calls=True, service_seconds=5.0)
    process = world.process()
    await process.obtain(wanted(1))
    await asyncio.sleep(60)
    item = wanted(2)
    world.set_faults("create:cut,next=1", *faults)  # read as lost: nothing was created
    foreign = world.emulator.announce_foreign(order(item), base_url="https://api.invalid", after_seconds=0.3)
    await process.obtain(item)
    record = world.record(item)
    assert record.prediction_id != foreign.id
    assert record.state is RecordState.STORED
    assert len(world.bought_for(item)) == 1
    world.check([wanted(1), item])


async def test_without_a_list_of_webhooks_and_without_calls_it_is_as_it_was() -> None:
    world = World(calls=True, webhooks="none", service_seconds=5.0)
    process = world.process(by_name=LOST)
    await process.obtain(wanted())
    world.check([wanted()])
    assert questions(world, "webhooks") <= 1, "left alone once it is missing"


async def test_records_name_their_orders_and_never_a_secret() -> None:
    world = World(calls=True)
    await world.process().obtain(wanted())
    record = world.record(wanted())
    assert len(record.ordered_as) == 1
    assert "whs_" not in record.to_bytes().decode()
    without = World()
    await without.process().obtain(wanted())
    assert without.record(wanted()).ordered_as == []
    assert without.emulator.webhooks.rows == []
