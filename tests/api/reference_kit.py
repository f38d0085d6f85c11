"""What tests of reference pictures and models share: an emulator, a bucket and processes, all in virtual time."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx
from PIL import Image

from prefect_eachlabs.api.client import EachlabsClient
from prefect_eachlabs.engine.engine import Engine
from prefect_eachlabs.images.download import Downloader
from prefect_eachlabs.ledger.rules import PurchaseOptions
from prefect_eachlabs.models import Destination, Item, StoredImage
from prefect_eachlabs.settings import AccountSettings
from prefect_eachlabs.testing.emulator import EmulatorOptions, InProcessTransport
from tests.limits.local import local_limiter
from tests.memory_store import MemoryStore

DESTINATION = Destination.parse("s3://bucket/p")
API = "https://api.invalid"


def picture_bytes(shade: int = 0, format: str = "PNG") -> bytes:
    """A small picture, another one for each shade."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (shade % 256, shade // 256, 77)).save(buffer, format)
    return buffer.getvalue()


class Shop:
    """An emulator, a bucket, and as many processes at them as one likes."""

    def __init__(self, *faults: str, **settings: Any) -> None:
        options = EmulatorOptions(
            faults=faults,
            requests_per_minute=None,
            max_in_flight=None,
            service_seconds=1.0,
            pictures="plain",
            image_size_px=16,
        )
        self.transport = InProcessTransport(options)
        self.api = self.transport.emulator
        self.store = MemoryStore()
        self._processes: list[Engine] = []  # whose tasks are not to be forgotten
        given = {"check_references": "no", "reference_roots": "s3://bucket", **settings}
        self.settings = AccountSettings(api_key="kit-key", base_url=API, **given)

    def process(self, **settings: Any) -> Engine:
        """One more process: it remembers nothing of the others."""
        given = self.settings.model_copy(update=settings)

        def store_for(destination: Destination, _: object) -> MemoryStore:
            return self.store if destination.bucket == "bucket" else MemoryStore(destination.bucket)

        transport = _Unclosed(self.transport)
        engine = Engine(
            given,
            local_limiter(requests_per_minute=None, max_in_flight=None),
            store_for,
            client=EachlabsClient(given, transport=transport),
            downloader=Downloader(transport),
            outside=transport,
        )
        engine.account.catalogue.beside_the_loop = _here
        self._processes.append(engine)
        return engine

    @property
    def uploads(self) -> int:
        return self.api.uploads.received

    def requests(self) -> Counter[str]:
        return Counter(self.api.journal.by_endpoint)

    def sent(self) -> list[dict[str, Any]]:
        return [prediction["input"] for prediction in self.api.predictions()]


async def _here(work: Callable[..., Any], *args: Any) -> Any:
    return work(*args)


class _Unclosed(httpx.AsyncBaseTransport):
    """The emulator is everybody's: closing one process's connections leaves it standing."""

    def __init__(self, transport: httpx.AsyncBaseTransport) -> None:
        self._transport = transport

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        return await self._transport.handle_async_request(request)


async def buy(engine: Engine, prompt: str, image_url: object = None, **given: Any) -> StoredImage:
    options = PurchaseOptions(run_id="run", any_reference=given.pop("any_reference", False))
    item = Item.wanted(prompt, image_url=image_url, **given)
    return await engine.generate_and_store(item, DESTINATION, options=options)
