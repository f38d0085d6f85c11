"""An audit of many executions takes no more memory than one of few: what it remembers is on disk."""

from __future__ import annotations

import asyncio
import json
import tracemalloc
from collections.abc import AsyncIterator
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace
from typing import Any

from prefect_eachlabs.api.client import ExecutionsPage
from prefect_eachlabs.audit.auditor import Auditor
from prefect_eachlabs.audit.report import Kind
from prefect_eachlabs.ledger.records import Ledger, Record
from prefect_eachlabs.models import Destination, Execution, PredictionStatus
from prefect_eachlabs.settings import AccountSettings
from prefect_eachlabs.storage.base import ListedObject, StoredObject
from tests.limits.local import local_limiter
from tests.memory_store import MemoryStore
from tests.virtual_time import run

NOW = datetime(2026, 11, 27, tzinfo=timezone.utc)
PLACE = Destination.parse("s3://bucket/p")
FEW, MANY = 100, 1_000
MORE_BYTES = 300_000
"""A walk that was kept would take 450 kB more, its records several MB."""


class MadeUp(MemoryStore):
    """A bucket and an account of so many pictures, made up as they are asked for."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count_ = count
        self.body = json.loads(
            Record(
                item_id="x", fingerprint="f" * 32, model="gemini", input={"prompt": "a fox " * 60}, state="stored"
            ).to_bytes()
        )

    async def executions_page(self, *, limit: int, offset: int, **_: Any) -> ExecutionsPage:
        rows = tuple(
            Execution(
                id=f"prediction-{number:08}",
                model="gemini",
                status=PredictionStatus.SUCCEEDED,
                cost_usd=0.039,
                created_at=NOW - timedelta(seconds=60 + number),
            )
            for number in range(offset, min(offset + limit, self.count_))
        )
        return ExecutionsPage(rows, len(rows), NOW, limit, self.count_)

    async def list(self, prefix: str) -> AsyncIterator[ListedObject]:
        suffix = "png" if "images" in prefix else "json"
        for number in range(self.count_):
            yield ListedObject(f"{prefix}item-{number:08}.{suffix}", '"e"', 1_000, 30.0, NOW)

    async def get(self, key: str) -> StoredObject | None:
        number = key.rpartition("-")[2].removesuffix(".json")
        said = {
            "item_id": f"item-{number}",
            "prediction_id": f"prediction-{number}",
            "uri": f"s3://bucket/p/images/item-{number}.png",
            "size_bytes": 1_000,
            "cost_usd": 0.039,
        }
        return StoredObject(key, '"e"', 30.0, NOW, 1_000, {}, json.dumps({**self.body, **said}).encode())


def peak_bytes(count: int) -> int:
    async def story() -> int:
        made_up = MadeUp(count)
        account: Any = SimpleNamespace(
            settings=AccountSettings(api_key="key-0123456789"),  # type: ignore[arg-type]  # pydantic makes a secret of it
            client=made_up,
            limiter=local_limiter(requests_per_minute=None, max_in_flight=None),
            ledger=lambda place, access: Ledger(made_up, place),
        )
        await asyncio.sleep(0)
        tracemalloc.start()
        report = await Auditor(account).audit([(PLACE, None)])
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert report[Kind.STORED].count == report.executions == count
        assert report.requests == count / 100
        assert report.is_accounted_for
        return peak

    return run(story())


def test_ten_times_as_many_executions_take_no_more_memory() -> None:
    peak_bytes(FEW)  # what is imported and cached on the way
    assert peak_bytes(MANY) < peak_bytes(FEW) + MORE_BYTES
