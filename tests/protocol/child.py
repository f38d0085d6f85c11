"""A process that obtains items, and kills or stops itself at its n-th boundary.

`python -m tests.protocol.child '{"items": [...], ...}'`

The product knows nothing of it: what is counted are its ways to the outer world, which are handed in. Each item's
outcome is printed as a line of JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import httpx

from prefect_eachlabs.api.client import EachlabsClient
from prefect_eachlabs.engine.engine import Engine
from prefect_eachlabs.errors import EachlabsError
from prefect_eachlabs.images.download import Downloader
from prefect_eachlabs.ledger.rules import PurchaseOptions
from prefect_eachlabs.models import Destination, Item
from prefect_eachlabs.settings import AccountSettings
from prefect_eachlabs.storage.base import ListedObject, StoredObject
from prefect_eachlabs.storage.s3 import S3Store
from prefect_eachlabs.storage.s3_client import S3Access
from tests.limits.local import local_limiter

T = TypeVar("T")


class Boundaries:
    """Counts them, and strikes at one."""

    def __init__(self, strike_at: int | None, strike_with: str) -> None:
        self._left = strike_at
        self._signal = signal.SIGKILL if strike_with == "kill" else signal.SIGSTOP

    def reached(self) -> None:
        if self._left is not None:
            self._left -= 1
            if self._left == 0:
                os.kill(os.getpid(), self._signal)

    async def around(self, work: Callable[[], Awaitable[T]]) -> T:
        self.reached()
        try:
            return await work()
        finally:
            self.reached()


class CountedStore:
    """The bucket."""

    def __init__(self, store: S3Store, boundaries: Boundaries) -> None:
        self._store = store
        self._boundaries = boundaries

    def uri(self, key: str) -> str:
        return self._store.uri(key)

    async def get(self, key: str) -> StoredObject | None:
        return await self._boundaries.around(lambda: self._store.get(key))

    async def head(self, key: str) -> StoredObject | None:
        return await self._boundaries.around(lambda: self._store.head(key))

    async def put(self, key: str, body: bytes, **given: Any) -> str:
        return await self._boundaries.around(lambda: self._store.put(key, body, **given))

    async def list(self, prefix: str) -> AsyncIterator[ListedObject]:
        async def rows() -> list[ListedObject]:
            return [row async for row in self._store.list(prefix)]

        for row in await self._boundaries.around(rows):
            yield row

    async def presigned_get(self, key: str, *, expires_seconds: int) -> str:
        return await self._store.presigned_get(key, expires_seconds=expires_seconds)


class CountedTransport(httpx.AsyncBaseTransport):
    """The network."""

    def __init__(self, boundaries: Boundaries) -> None:
        self._transport = httpx.AsyncHTTPTransport()
        self._boundaries = boundaries

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        return await self._boundaries.around(lambda: self._transport.handle_async_request(request))

    async def aclose(self) -> None:
        await self._transport.aclose()


async def obtain_all(told: dict[str, Any]) -> None:
    boundaries = Boundaries(told.get("strike_at"), told.get("strike_with", "kill"))
    settings = AccountSettings(**told["settings"])
    access = S3Access(endpoint_url=told["s3_url"], region="us-east-1", access_key_id="local", secret_access_key="local")
    engine = Engine(
        settings,
        local_limiter(requests_per_minute=settings.requests_per_minute, max_in_flight=settings.max_in_flight),
        lambda destination, _: CountedStore(S3Store(destination.bucket, access), boundaries),
        client=EachlabsClient(settings, transport=CountedTransport(boundaries)),
        downloader=Downloader(CountedTransport(boundaries)),
    )
    destination = Destination.parse(told["destination"])
    options = PurchaseOptions(run_id=told["run_id"])

    async def obtain(wanted: dict[str, str]) -> None:
        item = Item.wanted(wanted["prompt"], item_id=wanted["item_id"])
        said: dict[str, Any] = {}
        for _ in range(10):
            try:
                image = await engine.generate_and_store(item, destination, options=options)
                said = {"item_id": item.item_id, "prediction_id": image.prediction_id, "sha256": image.sha256}
                break
            except EachlabsError as error:
                said = {"item_id": item.item_id, "error": f"{type(error).__name__}: {error}"}
                if not error.retryable:
                    break
        print(json.dumps(said), flush=True)

    await asyncio.gather(*map(obtain, told["items"]))
    await engine.aclose()


if __name__ == "__main__":
    asyncio.run(obtain_all(json.loads(sys.argv[1])))
