"""Records that people, other versions or a broken store have written: understood, or named; never taken for absent."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

from prefect_eachlabs.errors import EachlabsError, StoreFailed
from prefect_eachlabs.ledger.adoption import lock_prediction
from prefect_eachlabs.ledger.records import Ledger, RecordState, VersionedRecord, amended
from prefect_eachlabs.models import Destination, parse_prediction_id
from tests.fuzz import hostile
from tests.fuzz.kit import fuzzed, says
from tests.memory_store import MemoryStore
from tests.virtual_time import run

DESTINATION = Destination.parse("s3://bucket/daily")
KEY = DESTINATION.record_key("fox")
CLAIM: dict[str, Any] = {
    "schema": "eachlabs-record/1",
    "item_id": "fox",
    "fingerprint": "0" * 32,
    "model": "gemini",
    "version": "v",
    "input": {"prompt": "a fox", "more": [1, {"a": None}]},
    "labels": {"sku": "1"},
    "state": "claimed",
    "intent": "post",
    "epoch": 1,
    "write_id": "w",
    "run_id": "r",
    "written_at": "2026-11-22T10:00:00.000+00:00",
}
CREATED = {**CLAIM, "state": "created", "intent": None, "prediction_id": "p-1", "created_at": "2026-11-22T10:00:00Z"}
STORED = {
    **CREATED,
    "state": "stored",
    "uri": "s3://bucket/daily/images/fox.png",
    "sha256": "0" * 64,
    "size_bytes": 70,
    "width_px": 2,
    "height_px": 2,
    "cost_usd": 0.04,
    "predict_time_seconds": 5.1,
    "also_bought": ["p-2"],
    "earlier": ["p-0"],
    "of_tomorrow": {"x": [1]},
}
FAILED = {**CREATED, "state": "failed", "error": {"kind": "prediction failed", "message": "no", "code": "X"}}
NAMES = tuple(STORED)


@fuzzed(hostile.bytes_of(CLAIM, CREATED, STORED, FAILED, names=NAMES))
def test_a_record_is_understood_or_named_and_never_taken_for_absent(body: bytes) -> None:
    async def story() -> None:
        store = MemoryStore()
        ledger = Ledger(store, DESTINATION)
        await store.put(KEY, body, content_type="application/json")
        try:
            held = await ledger.read("fox")
        except StoreFailed as error:
            says(error, f"s3://bucket/{KEY}", "nothing is bought")
            return
        assert isinstance(held, VersionedRecord)
        record = held.record
        assert record.may_have_bought or record.state in RecordState
        assert record.prediction() is None or parse_prediction_id(record.prediction_id)
        assert record.state is not RecordState.CREATED or record.prediction()
        # What is understood can be changed, and is still understood.
        after = await ledger.write(amended(record, cancel_requested=True), replacing=held)
        again = await ledger.read("fox")
        assert again is not None
        assert again.record.model_copy(update={"written_at": ""}).to_bytes() == (
            after.record.model_copy(update={"written_at": ""}).to_bytes()
        )

    run(story())


@fuzzed(
    hostile.bytes_of({"item_id": "fox", "prediction_id": "p-1", "write_id": "w"}, {"item_id": "hare"}), st.booleans()
)
def test_an_adoption_marker_that_cannot_be_read_is_nobodys_to_take(body: bytes, absent: bool) -> None:
    async def story() -> None:
        store = MemoryStore()
        if not absent:
            await store.put("daily/adopted/p-1", body, content_type="application/json")
        try:
            holder = await lock_prediction(Ledger(store, DESTINATION), "p-1", "cat")
        except EachlabsError:
            return
        assert isinstance(holder, str)
        if not absent and holder == "cat":
            # Taken over, for nobody else wants it: that was said by a marker that names an item, which has no record.
            assert isinstance(json.loads(body)["item_id"], str)

    run(story())
