"""One item, killed, frozen or left without an answer at every boundary: bought once, stored once, named once."""

from __future__ import annotations

import asyncio
import random

import pytest

from prefect_eachlabs.errors import EachlabsError, OutcomeUnknown
from tests.protocol.kit import Fault, World, play, wanted

ITEM = wanted()

OPERATIONS = (
    "S3 GET kit/records/item-1.json",
    "S3 HEAD kit/images/item-1.png",
    "S3 PUT kit/records/item-1.json claimed post",
    # The first claim of a process is put twice more, against conditions that must be refused.
    "S3 PUT kit/records/item-1.json claimed post",
    "S3 PUT kit/records/item-1.json claimed post",
    "POST /v1/prediction",
    "S3 PUT kit/records/item-1.json created",
    "GET /v1/prediction/ID",
    "DOWNLOAD /files/ID.png",
    "S3 PUT kit/images/item-1.png",
    "S3 PUT kit/records/item-1.json stored",
)
"""All that a purchase without faults does to the outer world, in this order."""

BOUNDARIES = [f"{phase} {name}" for name in OPERATIONS for phase in ("before", "after")]
NUMBERED = list(enumerate(BOUNDARIES, start=1))
BEFORE_THE_POST = BOUNDARIES.index("before POST /v1/prediction") + 1


def named(numbered: tuple[int, str]) -> str:
    return "{:02} {}".format(*numbered)


async def test_a_purchase_without_faults_has_these_boundaries() -> None:
    world = World()
    process = world.process()
    await process.obtain(ITEM)
    world.check([ITEM])
    prediction_id = world.record(ITEM).prediction_id or ""
    assert [boundary.replace(prediction_id, "ID") for boundary in process.boundaries] == BOUNDARIES


# ---------------------------------------------------------------------------- killed


@pytest.mark.parametrize("boundary", NUMBERED, ids=named)
async def test_killed_at_any_boundary_and_run_again_it_is_bought_once_and_stored_once(
    boundary: tuple[int, str],
) -> None:
    world = World()
    first = world.process(die_at=boundary[0])
    await first.dies(first.obtain(ITEM))
    await world.process().obtain(ITEM)
    world.check([ITEM])


def killed_twice(first_at: int, second_at: int) -> None:
    """Two orders that left no trace, because both runs died right before their POST, need a person's word."""

    async def story() -> None:
        world = World()
        first = world.process(die_at=first_at)
        await first.dies(first.obtain(ITEM))
        second = world.process(die_at=second_at)
        await second.until_it_ends(second.obtain(ITEM))
        try:
            await world.process().obtain(ITEM)
        except OutcomeUnknown:
            assert not world.bought()
            assert world.record(ITEM).orders_without_trace == 2
            await world.process().obtain(ITEM, retry_ambiguous=True)
        world.check([ITEM])

    play(story)


MOST_BOUNDARIES_OF_A_TAKEOVER = 130
"""A takeover looks at the record every 2 s until the claim is dead, then settles, then buys."""


@pytest.mark.parametrize("seed", range(20))
def test_killed_twice_at_random_boundaries_it_is_bought_once_and_stored_once(seed: int) -> None:
    draw = random.Random(seed)
    killed_twice(draw.randint(6, 22), draw.randint(1, MOST_BOUNDARIES_OF_A_TAKEOVER))


@pytest.mark.slow
@pytest.mark.parametrize("boundary", NUMBERED, ids=named)
def test_killed_at_any_two_boundaries_it_is_bought_once_and_stored_once(boundary: tuple[int, str]) -> None:
    for second_at in range(1, MOST_BOUNDARIES_OF_A_TAKEOVER, 3 if boundary[0] in (6, 10, 12, 13) else 7):
        killed_twice(boundary[0], second_at)


@pytest.mark.slow
@pytest.mark.parametrize("boundary", range(1, 27))
async def test_of_several_pictures_of_one_prediction_all_are_stored_whatever_is_killed(boundary: int) -> None:
    world = World("prediction:output_several,value=3")
    first = world.process(die_at=boundary)
    await first.until_it_ends(first.obtain(ITEM))
    image = await world.process().obtain(ITEM)
    world.check([ITEM])
    assert image.more_uris == tuple(f"s3://bucket/kit/images/item-1.{number}.png" for number in (2, 3))
    assert len(world.store.keys("kit/images/")) == 3


# -------------------------------------------------------------- answers lost or refused

FAULTS: list[tuple[int, str, Fault]] = [
    (number, name, fault)
    for number, name in enumerate(OPERATIONS, start=1)
    for fault in (("refuse", "lose", "lose refused") if "PUT" in name else ("refuse", "lose"))
]


@pytest.mark.parametrize(
    ("number", "name", "fault"), FAULTS, ids=[f"{number:02} {name} {fault}" for number, name, fault in FAULTS]
)
async def test_each_answer_may_be_refused_or_lost_once(number: int, name: str, fault: Fault) -> None:
    """Most of them are mended by the run itself; what is not is an error after which the next run finishes."""
    world = World()
    process = world.process(faults={number: fault})
    try:
        await process.obtain(ITEM)
    except EachlabsError as error:
        if not error.retryable:
            raise
        await world.process().obtain(ITEM)
    world.check([ITEM])


@pytest.mark.parametrize("fault", ["refuse", "lose", "lose refused"])
async def test_a_bucket_that_is_away_for_minutes_after_the_post_costs_nothing(fault: Fault) -> None:
    world = World()
    process = world.process(by_name=[("S3 PUT kit/records/item-1.json created", fault, 12)])
    await process.obtain(ITEM)
    world.check([ITEM])


async def test_the_same_while_another_process_takes_over_and_settles() -> None:
    world = World()
    first = world.process(by_name=[("S3 PUT kit/records/item-1.json created", "refuse", 9)])
    await asyncio.gather(first.obtain(ITEM), world.process().obtain(ITEM))
    assert first.count("S3 PUT kit/records/item-1.json created") > 8
    world.check([ITEM])


# ---------------------------------------------------------------------------- frozen


def frozen(at: int, *, thawed_after: float | None) -> None:
    async def story() -> None:
        world = World()
        first = world.process(freeze_at=at)
        slow = asyncio.ensure_future(first.obtain(ITEM))
        await first.froze.wait()
        quick = asyncio.ensure_future(world.process().obtain(ITEM))
        await (asyncio.wait({quick}) if thawed_after is None else asyncio.sleep(thawed_after))
        first.thaw()
        await quick
        try:
            await slow
        except EachlabsError as error:
            # After so long its deadlines have passed, and it says so.
            if thawed_after is None or thawed_after < 300:
                raise error
        # Frozen between its last check and its POST, for longer than 20 s: assumption (d) is broken.
        world.check([ITEM], allow_one_too_many=at == BEFORE_THE_POST)

    play(story)


@pytest.mark.parametrize("boundary", NUMBERED, ids=named)
def test_frozen_at_any_boundary_while_another_takes_over_it_buys_nothing_more(boundary: tuple[int, str]) -> None:
    frozen(boundary[0], thawed_after=None)


@pytest.mark.slow
@pytest.mark.parametrize("boundary", NUMBERED, ids=named)
def test_frozen_at_any_boundary_for_any_time_it_buys_nothing_more(boundary: tuple[int, str]) -> None:
    for seconds in (15.0, 61.5, 65.0, 90.0, 100.5, 119.5, 121.9, 122.4, 123.0, 127.0, 300.0):
        frozen(boundary[0], thawed_after=seconds)


async def test_one_prediction_too_many_is_cancelled_and_stands_in_the_record() -> None:
    """The one case the promise leaves open: frozen for more than 20 s right before the POST."""
    world = World(service_seconds=60.0)
    first = world.process(freeze_at=BEFORE_THE_POST)
    slow = asyncio.ensure_future(first.obtain(ITEM))
    await first.froze.wait()
    quick = await world.process().obtain(ITEM)
    first.thaw()
    image = await slow
    assert image.prediction_id == quick.prediction_id
    kept, too_many = world.bought()
    assert world.record(ITEM).prediction_id == kept.id
    assert world.record(ITEM).also_bought == [too_many.id]
    assert too_many.status_at(world.now()) == "cancelled"


async def test_a_freeze_that_is_allowed_is_reckoned_with_before_anything_is_bought_again() -> None:
    """Frozen for 19 s, then killed while its POST is under way, which takes effect a minute after that."""
    world = World("create:late,seconds=88,at=1")
    first = world.process(freeze_at=BEFORE_THE_POST)
    dying = asyncio.ensure_future(first.until_it_ends(first.obtain(ITEM)))
    await first.froze.wait()
    await asyncio.sleep(19)
    first.thaw()
    await asyncio.sleep(29)
    first.kill()
    await dying
    await world.process().obtain(ITEM)
    world.check([ITEM])


async def test_an_owner_that_thaws_after_a_lost_answer_leaves_the_live_claim_of_another_alone() -> None:
    """Its own order never arrived; another has taken over, is killed, and that order takes effect a minute later."""
    world = World("create:late,seconds=88,at=1")
    first = world.process(freeze_at="after POST", by_name=[("POST", "refuse", 1)])
    slow = asyncio.ensure_future(first.obtain(ITEM))
    await first.froze.wait()
    second = world.process()
    dying = asyncio.ensure_future(second.until_it_ends(second.obtain(ITEM)))
    while not second.count("POST"):
        await asyncio.sleep(0.1)
    await asyncio.sleep(0.5)
    first.thaw()
    await asyncio.sleep(28)
    second.kill()
    await asyncio.gather(slow, dying)
    world.check([ITEM])
