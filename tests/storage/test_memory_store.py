"""The tests' store in memory moves with the loop's clock and strikes where it is told to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import pytest

from prefect_eachlabs.errors import StoreFailed
from prefect_eachlabs.storage.base import (
    ListedObject,
    ObjectStore,
    PreconditionFailed,
    StoredObject,
    honours_conditions,
)
from tests.memory_store import MemoryStore

JSON = "application/json"


async def listed(rows: AsyncIterator[ListedObject]) -> list[ListedObject]:
    return [row async for row in rows]


async def found(store: ObjectStore, key: str) -> StoredObject:
    stored = await store.get(key)
    assert stored is not None
    return stored


async def refusal(write: Coroutine[Any, Any, object]) -> bool:
    """Whether a conditional put was refused."""
    try:
        await write
    except PreconditionFailed:
        return True
    return False


async def test_a_store_that_honours_if_absent_alone_is_found_out() -> None:
    class Half(MemoryStore):
        async def put(self, key: str, body: bytes, **arguments: Any) -> str:
            return await super().put(key, body, **{**arguments, "if_match": None})

    store = Half()
    await store.put("probe", b"", content_type=JSON)
    assert not await honours_conditions(store, "probe", b"", content_type=JSON)


async def test_the_clock_of_the_memory_store_is_the_loops_in_whole_seconds() -> None:
    store = MemoryStore()
    await asyncio.sleep(10.9)
    await store.put("a", b"", content_type=JSON)
    await asyncio.sleep(60)
    stored = await found(store, "a")
    assert stored.age_seconds == 60
    await asyncio.sleep(0.2)
    assert (await found(store, "a")).age_seconds == 61
    assert (await listed(store.list("a")))[0].age_seconds == 61
    store.make_older("a", 30)
    assert (await found(store, "a")).age_seconds == 91


async def test_faults_of_the_memory_store_strike_the_put_they_are_set_for() -> None:
    store = MemoryStore()
    store.fail_put(2)
    store.lose_put(3)
    store.lose_put(4, refused=True)
    await store.put("a", b"1", content_type=JSON)
    with pytest.raises(StoreFailed):
        await store.put("a", b"2", content_type=JSON)
    assert (await found(store, "a")).body == b"1"
    with pytest.raises(StoreFailed):
        await store.put("a", b"3", content_type=JSON)
    assert (await found(store, "a")).body == b"3"
    assert await refusal(store.put("b", b"4", content_type=JSON, if_absent=True))
    assert (await found(store, "b")).body == b"4"
    await store.put("a", b"5", content_type=JSON)
    assert store.count("put") == 5
    assert store.count("put", "b") == 1
    assert store.keys() == ["a", "b"]


async def test_a_process_can_be_frozen_at_each_side_of_an_operation_of_the_memory_store() -> None:
    seen: list[tuple[str, str, str]] = []
    gate = asyncio.Event()

    async def freeze(name: str, key: str, phase: str) -> None:
        seen.append((name, key, phase))
        if phase == "after":
            await gate.wait()

    store = MemoryStore()
    frozen = asyncio.ensure_future(store.beside(on_operation=freeze).put("a", b"mine", content_type=JSON))
    await asyncio.sleep(100)
    assert (await found(store, "a")).body == b"mine", "applied, but its owner does not know"
    assert not frozen.done()
    gate.set()
    await frozen
    assert seen == [("put", "a", "before"), ("put", "a", "after")]
