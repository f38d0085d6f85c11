"""What tests of batches share: a shop that counts, a bucket in memory, and a batch in virtual time."""

from __future__ import annotations

import asyncio
import copy
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from prefect_eachlabs.batch.outcomes import BatchResult
from prefect_eachlabs.batch.progress import Show
from prefect_eachlabs.batch.report import BatchFolder
from prefect_eachlabs.batch.run import Batch, BatchOptions
from prefect_eachlabs.batch.source import Source
from prefect_eachlabs.batch.tables import CsvTable, Lines
from prefect_eachlabs.errors import BadInput, EachlabsError, OutcomeUnknown, PredictionFailed, PredictionTimedOut
from prefect_eachlabs.ledger.rules import PurchaseOptions
from prefect_eachlabs.models import Destination, Execution, Item, Media, PredictionStatus, StoredImage
from prefect_eachlabs.storage.s3_client import S3Access
from tests.images.test_png import IEND, header, idat, png
from tests.memory_store import MemoryStore

T = TypeVar("T")
DESTINATION = Destination(bucket="bucket", prefix="p")
PRICE_USD = 0.04
Ending = Callable[[Item], EachlabsError | None]


def tiny_png(shade: int = 0) -> bytes:
    """A whole picture of four pixels."""
    return png(header(2, 2, 8, 2), idat((b"\0" + bytes([shade, 80, 160] * 2)) * 2), IEND)


class CountingShop:
    """Buys as the engine does, as far as a batch can tell: once an item, in limited places, asking the budget.

    Args:
        store: Where pictures go.
        service_seconds: How long a prediction takes.
        max_in_flight: RateLimiter.
        ending: What a purchase of an item ends with; None: its picture.
        told_usd: What the API says a picture costs when it has ended.
        is_seen: Whether whoever asks for it is shown a picture that is stored.
    """

    def __init__(
        self,
        store: MemoryStore,
        *,
        service_seconds: float = 5.0,
        max_in_flight: int = 10,
        ending: Ending = lambda item: None,
        told_usd: float | None = PRICE_USD,
        settled_usd: float | None = PRICE_USD,
        is_seen: bool = True,
    ) -> None:
        self.store = store
        self.is_seen = is_seen
        self.service_seconds = service_seconds
        self.ending = ending
        self.told_usd = told_usd
        self.settled_usd = settled_usd
        self.asked: list[str] = []
        self.bought: list[str] = []
        self.cancelled: list[str] = []
        self.price_questions = 0
        self.price_look_ups = 0
        self.past_usd: tuple[float, ...] = ()
        """What the account's executions of any model tell."""
        self.pages_of_executions = 0
        self.in_the_air = 0
        self.worst_in_the_air = 0
        self.checked: list[int] = []
        """How many items each look at a schema was about."""
        self.records: dict[str, StoredImage] = {}
        self.noted_usd: dict[str, float] = {}
        self._limiter = asyncio.Semaphore(max_in_flight)

    async def note_cost(
        self, item_id: str, prediction_id: str, cost_usd: float, destination: Destination, *, access: Any = None
    ) -> None:
        assert self.records[item_id].prediction_id == prediction_id
        self.noted_usd[item_id] = cost_usd

    async def check(self, items: Sequence[Item]) -> list[BadInput | None]:
        """Their model takes everything."""
        self.checked.append(len(items))
        return [None] * len(items)

    async def generate_and_store(
        self, item: Item, destination: Destination, *, options: PurchaseOptions, access: S3Access | None = None
    ) -> StoredImage:
        self.asked.append(item.item_id)
        self.in_the_air += 1
        self.worst_in_the_air = max(self.worst_in_the_air, self.in_the_air)
        try:
            known = self.records.get(item.item_id)
            if known is not None and known.prompt == item.input["prompt"]:
                return known.model_copy(update={"reused": True})
            assert options.budget is not None
            await options.budget.approve(item)
            async with self._limiter:
                options.budget.check(item)
                self.bought.append(item.item_id)
                error = self.ending(item)
                if error is None or isinstance(error, (PredictionFailed, PredictionTimedOut)):
                    options.budget.ordered(item, f"prediction-{item.item_id}")
                elif isinstance(error, OutcomeUnknown):
                    options.budget.ordered(item, None)
                await asyncio.sleep(self.service_seconds)
            if error is not None:
                raise error
            return await self._stored(item, destination, options)
        except asyncio.CancelledError:
            self.cancelled.append(item.item_id)
            raise
        finally:
            self.in_the_air -= 1

    async def _stored(self, item: Item, destination: Destination, options: PurchaseOptions) -> StoredImage:
        key = destination.image_key(item.item_id)
        picture = tiny_png(len(self.bought) % 256)
        await self.store.put(key, picture, content_type="image/png")
        sha256 = hashlib.sha256(item.item_id.encode()).hexdigest()
        if options.see is not None and self.is_seen:
            await options.see(Media(data=picture, sha256=sha256, format="png"))
        image = StoredImage(
            item_id=item.item_id,
            prediction_id=f"prediction-{item.item_id}",
            uri=self.store.uri(key),
            sha256=sha256,
            size_bytes=75,
            width_px=2,
            height_px=2,
            cost_usd=self.told_usd,
            predict_time_seconds=self.service_seconds,
            model=item.model,
            prompt=item.input["prompt"],
            bought_by=options.run_id,
        )
        self.records[item.item_id] = image
        return image

    async def cost_of(self, prediction_id: str) -> float | None:
        self.price_questions += 1
        return self.settled_usd if prediction_id.removeprefix("prediction-") in self.records else 0.0

    async def past_costs(self, model: str) -> list[float]:
        self.price_look_ups += 1
        return list(self.past_usd)

    slots_past_deadline = 0

    async def cancel_late(self, run_id: str) -> None: ...

    async def executions(self, offset: int) -> tuple[Execution, ...]:
        self.pages_of_executions += 1
        rows = [
            Execution(id=image.prediction_id, status=PredictionStatus.SUCCEEDED, cost_usd=self.settled_usd)
            for image in reversed(self.records.values())
        ]
        return tuple(rows[offset : offset + 100])


class MemoryFiles:
    """Large objects of a bucket in memory."""

    def __init__(self, store: MemoryStore) -> None:
        self._store = store
        self.opened: list[str] = []

    def open(self, key: str) -> BinaryIO:
        self.opened.append(key)
        if key not in self._store.objects:
            raise BadInput(f"{key} is not there.")
        return io.BytesIO(self._store.objects[key].body)

    def upload(self, key: str, path: Path, *, content_type: str) -> None:
        # What `put` does when it is not asked for anything special; it waits for nothing.
        put = self._store.put(key, path.read_bytes(), content_type=content_type)
        try:
            while True:
                put.send(None)
        except StopIteration:
            pass


async def inline(work: Callable[..., T], /, *args: Any) -> T:
    """A worker without a thread: virtual time has one."""
    return work(*args)


def source_of(rows: Iterable[Mapping[str, str]] | str, name: str = "prompts.csv") -> Source:
    """A source of these rows, or of CSV text."""
    if not isinstance(rows, str):
        listed = list(rows)
        columns = list(listed[0]) if listed else ["prompt"]
        quoted = [",".join('"' + row[column].replace('"', '""') + '"' for column in columns) for row in listed]
        rows = "\n".join([",".join(columns), *quoted]) + "\n"
    raw = rows.encode()
    return Source(CsvTable(name, Lines(io.BytesIO(raw))), name)


def prompts(count: int) -> list[dict[str, str]]:
    return [{"id": f"item-{number:05d}", "prompt": f"fox number {number}"} for number in range(count)]


def batch_of(
    shop: CountingShop,
    source: Source,
    *,
    show: Show | None = None,
    show_seconds: float = 30.0,
    batch_id: str = "spring",
    **options: Any,
) -> Batch:
    folder = BatchFolder(shop.store, MemoryFiles(shop.store), DESTINATION, batch_id, inline)
    given = BatchOptions(**{"run_id": "run-1", **options})
    return Batch(shop, source, folder, given, worker=inline, show=show, show_seconds=show_seconds)


async def run(shop: CountingShop, source: Source, *, window: int = 40, **options: Any) -> BatchResult:
    """A whole batch."""
    return await batch_of(shop, source, **options).run(window=window)


def lines_of(store: MemoryStore, name: str = "report.jsonl", batch_id: str = "spring") -> list[dict[str, Any]]:
    """The rows of a report in the bucket."""
    body = store.objects[f"p/batches/{batch_id}/{name}"].body
    return [json.loads(line) for line in body.splitlines()]


def totals_of(store: MemoryStore, batch_id: str = "spring") -> dict[str, Any]:
    found: dict[str, Any] = store.json(f"p/batches/{batch_id}/report.json")
    return found


def as_it_was(shop: CountingShop) -> CountingShop:
    """Bucket and records at this moment, for a run after this one was killed."""
    store = MemoryStore()
    store.objects = copy.copy(shop.store.objects)
    other = CountingShop(store, service_seconds=shop.service_seconds, ending=shop.ending)
    other.records = dict(shop.records)
    return other
