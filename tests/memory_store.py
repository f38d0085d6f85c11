"""A bucket in memory with S3's semantics, whose clock is the loop's, so that virtual time moves it.

    store = MemoryStore()
    store.fail_put(2)                       # the second put from now is refused and not applied
    store.lose_put(1)                       # the next put is applied and its answer lost
    other = store.beside(on_operation=hook) # another process at the same bucket, with faults of its own

`on_operation(name, key, phase)` is awaited before and after each operation takes effect: a test that never returns
from it froze its caller there, one that raises killed it.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from typing import Any, Literal, TypeVar

from prefect_eachlabs.errors import StoreFailed
from prefect_eachlabs.storage.base import ListedObject, PreconditionFailed, StoredObject, ascii_metadata

T = TypeVar("T")
Phase = Literal["before", "after"]
Operation = Literal["get", "head", "put", "list"]
Hook = Callable[[str, str, Phase], Awaitable[None]]

EPOCH = datetime(2026, 1, 1, tzinfo=timezone.utc)
"""The store's date when the loop's clock says 0."""


@dataclass
class _Object:
    body: bytes
    etag: str
    modified: float
    content_type: str
    metadata: dict[str, str]


@dataclass
class _Faults:
    fail: set[int] = field(default_factory=set)
    lose: dict[int, type[Exception]] = field(default_factory=dict)


class MemoryStore:
    """An `ObjectStore` without threads, network or real time.

    Args:
        bucket: Its name, in URIs.
        on_operation: Awaited before and after each operation takes effect.
        honours_conditions: False makes a store that ignores `If-Match` and `If-None-Match`.
        latency_seconds: How long each operation takes; half of it before it takes effect.
        page_size: How many rows one request of a listing brings.
    """

    def __init__(
        self,
        bucket: str = "bucket",
        *,
        on_operation: Hook | None = None,
        honours_conditions: bool = True,
        latency_seconds: float = 0.0,
        page_size: int = 1000,
    ) -> None:
        self.bucket = bucket
        self.on_operation = on_operation
        self.honours_conditions = honours_conditions
        self.latency_seconds = latency_seconds
        self.page_size = page_size
        self.objects: dict[str, _Object] = {}
        self.operations: list[tuple[Operation, str]] = []
        self._counts: Counter[Operation] = Counter()
        self._faults = _Faults()
        self.ahead_seconds = 0.0
        """How far its clock is ahead of the loop's."""

    def beside(self, *, on_operation: Hook | None = None) -> MemoryStore:
        """The same bucket as another process sees it: shared objects, own faults, own count of operations."""
        other = MemoryStore(
            self.bucket,
            on_operation=on_operation,
            honours_conditions=self.honours_conditions,
            latency_seconds=self.latency_seconds,
            page_size=self.page_size,
        )
        other.objects = self.objects
        return other

    # What a test arranges and looks at.

    def fail_put(self, nth: int = 1) -> None:
        """The n-th put from now raises StoreFailed and is not applied."""
        self._faults.fail.add(self.count("put") + nth)

    def lose_put(self, nth: int = 1, *, refused: bool = False) -> None:
        """The n-th put from now is applied, and its caller never learns: StoreFailed.

        With `refused` the caller meets PreconditionFailed, as when boto3 repeated a conditional put by itself.
        """
        self._faults.lose[self.count("put") + nth] = PreconditionFailed if refused else StoreFailed

    def count(self, name: Operation, key_contains: str = "") -> int:
        """How many operations of that name began."""
        if not key_contains:
            return self._counts[name]
        return sum(1 for done, key in self.operations if done == name and key_contains in key)

    def keys(self, prefix: str = "") -> list[str]:
        return sorted(key for key in self.objects if key.startswith(prefix))

    def json(self, key: str) -> Any:
        return json.loads(self.objects[key].body)

    def content_type(self, key: str) -> str:
        return self.objects[key].content_type

    def make_older(self, key: str, seconds: float) -> None:
        """Moves the object's Last-Modified into the past."""
        self.objects[key].modified -= seconds

    # The interface.

    def uri(self, key: str) -> str:
        return f"s3://{self.bucket}/{key}"

    async def get(self, key: str) -> StoredObject | None:
        async def read() -> StoredObject | None:
            found = self.objects.get(key)
            return None if found is None else self._described(key, found, found.body)

        return await self._perform("get", key, read)

    async def head(self, key: str) -> StoredObject | None:
        async def look() -> StoredObject | None:
            found = self.objects.get(key)
            return None if found is None else self._described(key, found, b"")

        return await self._perform("head", key, look)

    async def put(
        self,
        key: str,
        body: bytes,
        *,
        content_type: str,
        if_match: str | None = None,
        if_absent: bool = False,
        metadata: Mapping[str, str] | None = None,
        sha256: str | None = None,
        content_disposition: str | None = None,
    ) -> str:
        number = self.count("put") + 1

        async def write() -> str:
            if number in self._faults.fail:
                raise StoreFailed(f"{self.uri(key)}: HTTP 503, not applied. Run again.")
            if sha256 is not None and hashlib.sha256(body).hexdigest() != sha256:
                raise StoreFailed(f"{self.uri(key)}: the checksum does not fit the body. Run again.")
            there = self.objects.get(key)
            if self.honours_conditions:
                if if_match is not None and (there is None or there.etag != if_match):
                    raise PreconditionFailed(f"{self.uri(key)}: If-Match {if_match}")
                if if_absent and there is not None:
                    raise PreconditionFailed(f"{self.uri(key)}: If-None-Match *")
            etag = f'"{hashlib.md5(body, usedforsecurity=False).hexdigest()}"'
            # S3 keeps whole seconds, rounded down.
            modified = math.floor(self._now())
            self.objects[key] = _Object(bytes(body), etag, modified, content_type, ascii_metadata(metadata or {}))
            if number in self._faults.lose:
                raise self._faults.lose[number](f"{self.uri(key)}: applied, but the answer was lost.")
            return etag

        return await self._perform("put", key, write)

    async def list(self, prefix: str) -> AsyncIterator[ListedObject]:
        last = ""
        while True:

            async def page(after: str = last) -> tuple[ListedObject, ...]:
                keys = [key for key in self.keys(prefix) if key > after][: self.page_size]
                now = math.floor(self._now())
                date = EPOCH + timedelta(seconds=now)
                return tuple(
                    ListedObject(key, found.etag, len(found.body), float(now - found.modified), date)
                    for key, found in ((key, self.objects[key]) for key in keys)
                )

            rows = await self._perform("list", prefix, page)
            for row in rows:
                yield row
            if len(rows) < self.page_size:
                return
            last = rows[-1].key

    async def presigned_get(self, key: str, *, expires_seconds: int) -> str:
        return f"https://{self.bucket}.memory.invalid/{key}?expires={expires_seconds}&signature=secret"

    async def _perform(self, name: Operation, key: str, effect: Callable[[], Awaitable[T]]) -> T:
        self.operations.append((name, key))
        self._counts[name] += 1
        if self.on_operation is not None:
            await self.on_operation(name, key, "before")
        await asyncio.sleep(self.latency_seconds / 2)
        try:
            return await effect()
        finally:
            # Also after a refusal and a lost answer: what happened in the store has happened.
            await asyncio.sleep(self.latency_seconds / 2)
            if self.on_operation is not None:
                await self.on_operation(name, key, "after")

    def _now(self) -> float:
        return asyncio.get_running_loop().time() + self.ahead_seconds

    def _described(self, key: str, found: _Object, body: bytes) -> StoredObject:
        now = math.floor(self._now())
        return StoredObject(
            key=key,
            etag=found.etag,
            age_seconds=float(now - found.modified),
            date=EPOCH + timedelta(seconds=now),
            size_bytes=len(found.body),
            metadata=dict(found.metadata),
            body=body,
        )
