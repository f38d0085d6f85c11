"""A cost that the vendor tells late is written into the record that lacks it, and nothing else is changed."""

from __future__ import annotations

from typing import Any

import pytest

from prefect_eachlabs.ledger.late_costs import correct_cost
from prefect_eachlabs.ledger.records import Ledger, RecordState, VersionedRecord, amended, new_record
from prefect_eachlabs.models import Destination, Item
from tests.memory_store import MemoryStore

ITEM = Item.wanted("a fox", item_id="fox")


async def kept(ledger: Ledger, **fields: Any) -> VersionedRecord:
    said: dict[str, Any] = {"state": RecordState.STORED, "intent": None, "prediction_id": "p-1", **fields}
    return await ledger.write(amended(new_record(ITEM, run_id="r"), **said), replacing=None)


def ledger_of(store: MemoryStore) -> Ledger:
    return Ledger(store, Destination(bucket="bucket", prefix="p"))


async def test_a_late_cost_is_written_and_the_rest_stays() -> None:
    ledger = ledger_of(MemoryStore())
    held = await kept(ledger, uri="s3://bucket/p/images/fox.png", labels={"sku": "7"})
    written = await correct_cost(ledger, held, "p-1", 0.039)
    assert written is not None
    expected = amended(held.record, cost_usd=0.039, write_id=written.record.write_id)
    assert written.record.model_copy(update={"written_at": ""}) == expected.model_copy(update={"written_at": ""})
    again = await ledger.read("fox")
    assert again is not None
    assert again.record.cost_usd == 0.039


@pytest.mark.parametrize(
    ("fields", "cost_usd"),
    [
        ({"cost_usd": 0.039}, 0.039),
        ({"cost_usd": 0.1 + 0.2}, 0.3),
        ({}, 0.0),
        ({}, None),
        ({"prediction_id": "another"}, 0.039),
        ({"state": RecordState.CREATED}, 0.039),
    ],
    ids=["said already", "rounding", "not settled", "not told", "another prediction", "not closed"],
)
async def test_nothing_is_written_where_there_is_nothing_to_correct(
    fields: dict[str, Any], cost_usd: float | None
) -> None:
    store = MemoryStore()
    ledger = ledger_of(store)
    held = await kept(ledger, **fields)
    before = dict(store.objects)
    assert await correct_cost(ledger, held, "p-1", cost_usd) is None
    assert store.objects == before


@pytest.mark.parametrize("overtaken_by", ["a label", "another purchase"])
async def test_a_record_that_changes_meanwhile_is_corrected_as_it_is_now_or_left_alone(overtaken_by: str) -> None:
    ledger = ledger_of(MemoryStore())
    held = await kept(ledger)
    changes: dict[str, Any] = (
        {"labels": {"sku": "8"}} if overtaken_by == "a label" else {"prediction_id": "p-2", "earlier": ["p-1"]}
    )
    await ledger.write(amended(held.record, **changes), replacing=held)
    written = await correct_cost(ledger, held, "p-1", 0.039)
    now = await ledger.read("fox")
    assert now is not None
    if overtaken_by == "a label":
        assert written is not None
        assert (now.record.labels, now.record.cost_usd) == ({"sku": "8"}, 0.039)
    else:
        assert written is None
        assert (now.record.prediction_id, now.record.cost_usd) == ("p-2", None)
