"""What a picture costs beside its price: four S3 writes, one POST, and the questions about its end."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from prefect_eachlabs.models import Item, PredictionStatus
from tests.protocol.kit import World, options, play, wanted

ITEMS = [wanted(number) for number in range(20)]


async def test_each_picture_costs_four_writes_two_reads_and_one_post() -> None:
    """A look for its record, and one at where its picture goes.

    The two puts more of a process's first claim must be refused: they find out whether the store honours
    conditions, and S3 does not charge them as writes that took place."""
    world = World()
    process = world.process(max_in_flight=None)
    await asyncio.gather(*map(process.obtain, ITEMS))
    world.check(ITEMS)
    counted = Counter(" ".join(operation.name.split(" ")[:2]) for operation in process.operations)
    probes = 2
    assert counted["S3 PUT"] == 4 * len(ITEMS) + probes
    assert counted["S3 GET"] == len(ITEMS)
    assert counted["S3 HEAD"] == len(ITEMS)
    assert counted["S3 LIST"] == 0
    assert world.store.count("put") == 4 * len(ITEMS) + probes
    posts = [operation for operation in process.operations if operation.name == "POST /v1/prediction"]
    assert len(posts) == len(ITEMS)
    assert process.count("DOWNLOAD") == len(ITEMS)


async def test_what_is_presumed_new_is_not_even_read() -> None:
    world = World()
    process = world.process()
    await process.obtain(ITEMS[0])
    before = process.count("S3 GET")
    await asyncio.gather(*(process.obtain(item, presume_new=True) for item in ITEMS[1:9]))
    assert process.count("S3 GET") == before


@pytest.mark.parametrize("limits", [(60, 10), (None, None)], ids=["60 a minute, 10 in flight", "no limits"])
def test_the_api_is_asked_for_nothing_but_orders_and_their_ends(limits: tuple[int | None, int | None]) -> None:
    """The ledger and the storing ask the API nothing: the requests are those of buying and awaiting alone."""

    async def story(*, is_stored: bool) -> Counter[str]:
        world = World(service_seconds=5.0)
        process = world.process(requests_per_minute=limits[0], max_in_flight=limits[1])
        if is_stored:
            await asyncio.gather(*map(process.obtain, ITEMS))
        else:

            async def create_and_await(item: Item) -> None:
                prediction = await process.engine.create(item, world.destination, options=options())
                ended = await process.engine.wait(prediction)
                assert ended.status is PredictionStatus.SUCCEEDED

            await asyncio.gather(*(process.run(create_and_await(item)) for item in ITEMS))
        asked = Counter(world.emulator.journal.by_endpoint)
        assert asked["create"] == len(ITEMS)
        assert asked["cancel"] == asked["models"] == asked["model"] == 0
        return asked

    stored, awaited = play(lambda: story(is_stored=True)), play(lambda: story(is_stored=False))
    ends = ("get", "executions")
    assert sum(stored[name] for name in ends) <= 1.1 * sum(awaited[name] for name in ends) + 3


async def test_a_finished_item_costs_no_request_of_the_api() -> None:
    world = World()
    await world.process().obtain(ITEMS[0])
    process = world.process()
    await process.obtain(ITEMS[0])
    assert process.count("GET /v1") == process.count("POST") == process.count("DOWNLOAD") == 0


async def test_a_lost_answer_costs_a_walk_a_listing_and_a_question_for_each_candidate() -> None:
    world = World()
    process = world.process(by_name=[("POST", "lose", 1)])
    await process.obtain(ITEMS[0])
    world.check(ITEMS[:1])
    assert process.count("POST") == 1
    assert process.count("GET /v1/executions") <= 2
    assert process.count("S3 LIST") <= 2
    # claimed, settled, adopted, created, picture, stored
    assert process.count("S3 PUT") == 6 + 2
