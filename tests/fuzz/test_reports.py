"""Reports are read back, and somebody may have edited them: a line is a row that can be used, or none."""

from __future__ import annotations

import asyncio
import io
import math
from contextlib import closing
from datetime import datetime, timezone
from typing import Any

from prefect_eachlabs.batch.outcomes import Outcome, RowState, Totals
from prefect_eachlabs.batch.pages import index_page
from prefect_eachlabs.batch.report import BatchFolder, EarlierRuns
from prefect_eachlabs.batch.state import Scratch
from prefect_eachlabs.models import Destination
from prefect_eachlabs.storage.base import ListedObject
from tests.fuzz import hostile
from tests.fuzz.kit import fuzzed
from tests.memory_store import MemoryStore

ROW: dict[str, Any] = {
    "row": 2,
    "state": "stored",
    "item_id": "fox",
    "fingerprint": "0" * 32,
    "model": "gemini",
    "version": "v",
    "prompt": "a fox",
    "image_url": None,
    "labels": {"sku": "1"},
    "uri": "s3://bucket/images/fox.png",
    "prediction_id": "p-1",
    "bought_by": "r",
    "sha256": "0" * 64,
    "size_bytes": 70,
    "width_px": 2,
    "height_px": 2,
    "cost_usd": 0.04,
    "seconds": 5.5,
    "predict_time_seconds": 5.1,
    "error": None,
    "final": False,
}
FAILED = {**ROW, "state": "failed", "final": True, "error": {"kind": "rejected", "message": "no", "code": None}}

TOLD = ListedObject("key", "etag", 1, 0.0, datetime(2026, 1, 1, tzinfo=timezone.utc))


class Lines:
    """A bucket's file with these bytes."""

    def __init__(self, body: bytes) -> None:
        self._body = body

    def open(self, key: str) -> Any:
        return io.BytesIO(self._body)


@fuzzed(hostile.bytes_of(ROW, FAILED, names=tuple(ROW)))
def test_an_edited_report_is_read_without_a_fall_and_counts_no_nonsense(line: bytes) -> None:
    folder = BatchFolder(MemoryStore(), Lines(line), Destination.parse("s3://bucket"), "b", asyncio.to_thread)  # type: ignore[arg-type]
    earlier = EarlierRuns()
    with closing(Scratch()) as scratch:
        folder._load(TOLD, scratch, earlier)
        scratch.count_earlier()
        scratch.earlier("fox")
        for _, told, spent_usd, _, untold in scratch.stored_by(["r", "run-1"]):
            assert 0 <= spent_usd < math.inf
            assert told + untold > 0
        scratch.not_stored_by(["r", "run-1"])
    for count, cost_usd in earlier.costs.values():
        assert 0 <= cost_usd / count < math.inf
    assert earlier.mean_seconds is None or 0 <= earlier.mean_seconds < math.inf


@fuzzed(hostile.bytes_of(ROW, FAILED, names=tuple(ROW)))
def test_what_was_read_back_can_be_written_counted_and_shown(line: bytes) -> None:
    outcome = Outcome.from_line(line)
    if outcome is None:
        return
    assert isinstance(outcome.state, RowState)
    assert Outcome.from_line(outcome.to_line()) == outcome
    totals = Totals()
    totals.add(outcome)
    page = "".join(index_page(totals.as_json(), pictures=[outcome], not_there=[outcome]))
    page.encode()
    assert "<script" not in page
    with closing(Scratch()) as scratch:
        scratch.add(outcome, outcome.to_line())
        scratch.flush()
        assert list(scratch.lines())
