"""A bucket that an earlier version wrote is read, finished and resumed: nothing in it is bought twice.

`earlier_bucket.json` holds the objects that the code of November 2026 (commit bfa21da) left behind in this kit: an
item in every state, killed before and after its POST, adopted, and a batch that had ended; and what its API knew.
"""

from __future__ import annotations

import asyncio
import base64
import json
from pathlib import Path
from typing import Any

import pytest

from prefect_eachlabs.errors import PredictionFailed
from prefect_eachlabs.ledger.records import RecordState
from prefect_eachlabs.testing.emulator.predictions import Job
from tests.batch import batch_kit
from tests.memory_store import MemoryStore
from tests.protocol.kit import KEY, World, wanted

EARLIER = json.loads((Path(__file__).parent / "earlier_bucket.json").read_bytes())
HOUR_SECONDS = 3600.0


async def restore(store: MemoryStore, objects: list[dict[str, Any]]) -> None:
    for one in objects:
        body = base64.b64decode(one["body"])
        await store.put(one["key"], body, content_type=one["content_type"], metadata=one["metadata"])
        store.make_older(one["key"], one.get("age_seconds", HOUR_SECONDS))


async def earlier_world() -> World:
    """The world as the earlier version left it."""
    world = World()
    await asyncio.sleep(EARLIER["seconds"])  # records hold dates of that moment
    await restore(world.store, EARLIER["objects"])
    now = world.now()
    for number, one in enumerate(EARLIER["predictions"], start=1):
        cancelled_ago = one["cancelled_ago"]
        world.emulator.ledger.add(
            Job(
                number=number,
                id=one["id"],
                key=KEY,
                model=one["model"],
                version=one["version"],
                input=one["input"],
                base_url="https://api.invalid",
                created=now - one["created_ago"],
                ends=now - one["ended_ago"],
                failure=one["failure"],
                cost_usd=one["cost_usd"],
                cancelled=None if cancelled_ago is None else now - cancelled_ago,
            )
        )
    world.emulator.ledger.settle(now)
    return world


@pytest.mark.slow
async def test_every_record_of_an_earlier_version_is_finished_and_nothing_in_it_is_bought_twice() -> None:
    world = await earlier_world()
    already = {job.id for job in world.bought()}
    items = {number: wanted(number) for number in range(1, 10)}
    stored = [await world.process().obtain(items[number]) for number in (1, 2, 3, 4, 6, 7, 8, 9)]
    assert [image.reused for image in stored[:1]] == [True]
    with pytest.raises(PredictionFailed):
        await world.process().obtain(items[5])
    new = [job.prompt for job in world.bought() if job.id not in already]
    # What was killed before its POST, and what had been cancelled: the rest was paid for and is found.
    assert sorted(new) == ["picture 2", "picture 6"]
    assert {record.item_id for record in world.records() if record.state is RecordState.STORED} == {
        item.item_id for number, item in items.items() if number != 5
    }


@pytest.mark.slow
async def test_a_batch_of_an_earlier_version_goes_on_where_it_ended() -> None:
    store = MemoryStore()
    await restore(store, EARLIER["batch"])
    shop = batch_kit.CountingShop(store)
    result = await batch_kit.run(shop, batch_kit.source_of(batch_kit.prompts(5)), run_id="run-2")
    assert (result.stored, result.reused) == (2, 3)
    assert shop.bought == ["item-00003", "item-00004"]
