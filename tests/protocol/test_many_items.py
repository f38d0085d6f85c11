"""Several processes at the same items, half of them with equal inputs: one prediction each, whoever dies or freezes."""

from __future__ import annotations

import asyncio
import random
from functools import partial
from itertools import product

import pytest

from prefect_eachlabs.batch.budget import Budget
from prefect_eachlabs.batch.buying import EngineBuyer
from prefect_eachlabs.errors import EachlabsError, OutcomeUnknown
from prefect_eachlabs.ledger.records import RecordState
from prefect_eachlabs.models import Item
from tests.protocol.kit import Fault, Process, World, play, wanted
from tests.protocol.test_one_item import BOUNDARIES, NUMBERED, named

UNLIMITED = {"requests_per_minute": None, "max_in_flight": None}
ITEMS = [wanted(number, prompt=f"picture {number}" if number < 15 else "the same picture") for number in range(30)]
"""Half of them with equal inputs."""


async def obtain_all(process: Process, items: list[object] | None = None) -> None:
    """All items at once; what fails and may be repeated is repeated, as Prefect does."""

    async def one(item: object) -> None:
        for _ in range(5):
            try:
                await process.obtain(item)  # type: ignore[arg-type]  # an Item
                return
            except OutcomeUnknown:
                return  # two orders left no trace: what is left over is seen by `World.check`
            except EachlabsError as error:
                if not error.retryable:
                    raise

    await asyncio.gather(*map(one, ITEMS if items is None else items))


async def a_person_looks(world: World) -> None:
    """What stands as ambiguous was not bought: a person saw that, and says so."""
    world.set_faults()
    last = world.process()
    for item in ITEMS:
        if world.record(item).state is RecordState.AMBIGUOUS:
            assert world.record(item).orders_without_trace == 2
            await last.obtain(item, retry_ambiguous=True)


@pytest.mark.parametrize("seed", range(2))
async def test_two_processes_racing_for_the_same_items_buy_each_once(seed: int) -> None:
    world = World(settings=UNLIMITED)
    await asyncio.gather(*(obtain_all(world.process(jitter=2 * seed + racer)) for racer in range(2)))
    world.check(ITEMS)


@pytest.mark.parametrize("seed", range(2))
async def test_the_same_where_answers_are_lost_on_both_sides(seed: int) -> None:
    world = World("create:lost_answer=0.1", "create:error=0.05", seed=seed, settings=UNLIMITED)
    draw = random.Random(seed)
    racers = [
        world.process(
            jitter=2 * seed + racer,
            faults={draw.randint(1, 300): draw.choice(["refuse", "lose"]) for _ in range(15)},
        )
        for racer in range(2)
    ]
    await asyncio.gather(*map(obtain_all, racers))
    await a_person_looks(world)
    world.check(ITEMS)


@pytest.mark.parametrize("seed", range(2))
async def test_the_same_where_both_are_killed_and_a_third_finishes(seed: int) -> None:
    world = World("create:lost_answer=0.05", seed=seed, settings=UNLIMITED)
    draw = random.Random(seed)
    racers = [world.process(jitter=2 * seed + racer, die_at=draw.randint(20, 540)) for racer in range(2)]
    await asyncio.gather(*(racer.until_it_ends(obtain_all(racer)) for racer in racers))
    await obtain_all(world.process())
    await a_person_looks(world)
    world.check(ITEMS)


async def test_within_the_limits_of_an_account_one_process_keeps_to_them_while_it_settles() -> None:
    world = World("create:lost_answer=0.1", requests_per_minute=60, max_in_flight=10, service_seconds=5.0)
    await obtain_all(world.process())
    world.check(ITEMS)
    tallies = world.emulator.tallies()
    assert tallies["rejected_429"] == 0
    assert tallies["worst_window"] <= 60
    assert tallies["worst_in_flight"] <= 10


# ------------------------------------------------------- two items with the same input

A, B = wanted(1, prompt="the same picture"), wanted(2, prompt="the same picture")


async def counted(process: Process, item: Item, budget: Budget) -> None:
    """A row of a batch: its picture, and what that cost."""
    await budget.ended(item, await process.obtain(item, budget=budget), None)


@pytest.mark.parametrize("boundary", NUMBERED, ids=named)
async def test_a_frozen_owner_and_a_lost_answer_for_the_same_input_end_with_a_prediction_each(
    boundary: tuple[int, str],
) -> None:
    """B's answer is lost while A is frozen, and A's claim dies: B may take what A has bought. A thaws, and knows.

    Each run says that it was billed for one picture, whichever order bought it.
    """
    world = World()
    first = world.process(freeze_at=boundary[0])
    second = world.process(by_name=[("POST", "lose", 1)])
    budgets = [Budget(None, EngineBuyer(one.engine), ours=frozenset({one.run_id})) for one in (first, second)]
    slow = asyncio.ensure_future(counted(first, A, budgets[0]))
    await first.froze.wait()
    await asyncio.sleep(1)
    await counted(second, B, budgets[1])
    first.thaw()
    await slow
    world.check([A, B])
    assert [budget.spent_usd for budget in budgets] == [0.039, 0.039]
    assert [budget.untold for budget in budgets] == [0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("boundary", NUMBERED, ids=named)
def test_the_same_whenever_it_thaws(boundary: tuple[int, str]) -> None:
    async def story(seconds: float, lost: Fault) -> None:
        world = World()
        first = world.process(freeze_at=boundary[0])
        slow = asyncio.ensure_future(first.obtain(A))
        await first.froze.wait()
        second = world.process(by_name=[("POST", lost, 1)])
        other = asyncio.ensure_future(second.obtain(B))
        await asyncio.sleep(seconds)
        first.thaw()
        await asyncio.gather(slow, other)
        world.check([A, B])

    losses: tuple[Fault, ...] = ("lose", "refuse")  # after the POST, before it
    for seconds, lost in product((40.0, 61.0, 66.0, 95.0), losses):
        play(partial(story, seconds, lost))


@pytest.mark.slow
@pytest.mark.parametrize("boundary", NUMBERED, ids=named)
def test_two_items_with_the_same_input_killed_at_any_two_boundaries(boundary: tuple[int, str]) -> None:
    async def story(second_at: int) -> None:
        world = World()
        first, second = world.process(die_at=boundary[0]), world.process(die_at=second_at)
        await asyncio.gather(first.dies(first.obtain(A)), second.dies(second.obtain(B)))
        third = world.process()
        await asyncio.gather(third.obtain(A), third.obtain(B))
        world.check([A, B])

    for second_at in range(boundary[0], len(BOUNDARIES) + 1):
        play(partial(story, second_at))
