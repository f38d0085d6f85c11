"""The ledger: a record is changed by conditional puts alone, and who wrote it can tell even when no answer comes.

`python -m tests.ledger.test_records > docs/record.schema.json` writes the published schema anew.
"""

from __future__ import annotations

import asyncio
import json
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefect_eachlabs.errors import SetupError, StoreFailed
from prefect_eachlabs.ledger.records import (
    MAX_RECORD_BYTES,
    SCHEMA,
    Intent,
    Ledger,
    Record,
    RecordChanged,
    RecordError,
    RecordState,
    VersionedRecord,
    amended,
    new_record,
)
from prefect_eachlabs.models import Item, Prediction
from tests.ledger.conftest import DESTINATION
from tests.memory_store import EPOCH, MemoryStore

ITEM = Item.wanted("a fox", item_id="fox", labels={"Category": "Animals"})
KEY = "kit/records/fox.json"
SCHEMA_FILE = Path(__file__).resolve().parents[2] / "docs" / "record.schema.json"


def claim(run_id: str = "run-1") -> Record:
    return new_record(ITEM, run_id=run_id)


# ----------------------------------------------------------------------- what it looks like


async def test_a_record_is_a_json_object_that_a_person_can_read(ledger: Ledger, store: MemoryStore) -> None:
    await ledger.write(claim(), replacing=None)
    said = store.json(KEY)
    assert said["schema"] == "eachlabs-record/1"
    assert (said["item_id"], said["state"], said["intent"], said["epoch"]) == ("fox", "claimed", "post", 1)
    assert said["input"] == {"prompt": "a fox"}
    assert said["labels"] == {"Category": "Animals"}
    assert said["run_id"] == "run-1"
    assert len(said["write_id"]) == 32
    datetime.fromisoformat(said["written_at"])
    assert "prediction_id" not in said, "what is not known is left out"
    assert store.objects[KEY].body.decode().count("\n") > 10, "a field a line"
    assert store.content_type(KEY) == "application/json"


def schema_text() -> str:
    """The JSON Schema of a record, version 1."""
    schema = Record.model_json_schema(by_alias=True)
    schema["properties"]["schema"] = {"const": SCHEMA, "default": SCHEMA, "title": "Schema", "type": "string"}
    schema["title"] = "A record of prefect-eachlabs"
    whole = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
    return json.dumps(whole, indent=2, ensure_ascii=False) + "\n"


def test_the_published_schema_is_the_code() -> None:
    assert SCHEMA_FILE.read_text(encoding="utf-8") == schema_text(), (
        "python -m tests.ledger.test_records > docs/record.schema.json"
    )


VALIDATOR = jsonschema.Draft202012Validator(json.loads(schema_text()))
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
records = st.builds(
    Record,
    item_id=st.from_regex(r"[A-Za-z0-9_-]{1,20}", fullmatch=True),
    fingerprint=texts,
    model=texts,
    version=st.none() | texts,
    input=st.dictionaries(texts, st.none() | st.integers() | texts | st.lists(texts, max_size=2), max_size=3),
    labels=st.dictionaries(texts, texts, max_size=2),
    state=st.sampled_from(RecordState),
    intent=st.none() | st.sampled_from(Intent),
    epoch=st.integers(1, 9),
    write_id=texts,
    run_id=texts,
    unsettled_since=st.none() | st.just(EPOCH),
    prediction_id=st.none() | texts,
    created_at=st.none() | st.just(EPOCH + timedelta(microseconds=1)),
    also_bought=st.lists(texts, max_size=2),
    earlier=st.lists(texts, max_size=2),
    cost_usd=st.none() | st.floats(0, 1),
    error=st.none() | st.builds(RecordError, kind=texts, message=texts),
    something_of_tomorrow=st.none() | st.dictionaries(texts, texts, max_size=2),
)


@settings(max_examples=30)
@given(records)
def test_every_record_fits_the_schema_and_is_read_back_unchanged(record: Record) -> None:
    body = record.to_bytes()
    VALIDATOR.validate(json.loads(body))
    again = Record.model_validate_json(body)
    assert again.to_bytes() == body
    assert again.input == record.input


def test_what_a_failure_says_is_written_down_even_when_it_is_no_unicode() -> None:
    record = amended(claim(), error=RecordError(kind="x", message="half \ud800 a character"))
    assert "half ? a character" in record.to_bytes().decode()


# ------------------------------------------------------------------------------- changes


async def test_the_first_write_must_find_nothing(ledger: Ledger) -> None:
    mine = await ledger.write(claim("run-1"), replacing=None)
    with pytest.raises(RecordChanged) as overtaken:
        await ledger.write(claim("run-2"), replacing=None)
    assert overtaken.value.current is not None
    assert overtaken.value.current.record.run_id == "run-1"
    assert overtaken.value.current.etag == mine.etag


async def test_a_change_must_find_what_it_replaces(ledger: Ledger, store: MemoryStore) -> None:
    first = await ledger.write(claim(), replacing=None)
    second = await ledger.write(amended(first.record, epoch=2), replacing=first)
    with pytest.raises(RecordChanged) as overtaken:
        await ledger.write(amended(first.record, epoch=3), replacing=first)
    assert overtaken.value.current is not None
    assert overtaken.value.current.etag == second.etag
    assert store.json(KEY)["epoch"] == 2


async def test_a_record_that_was_deleted_is_not_changed_back_into_being(ledger: Ledger, store: MemoryStore) -> None:
    held = await ledger.write(claim(), replacing=None)
    del store.objects[KEY]
    with pytest.raises(RecordChanged) as overtaken:
        await ledger.write(amended(held.record), replacing=held)
    assert overtaken.value.current is None
    assert KEY not in store.objects


async def test_every_write_has_an_id_of_its_own(ledger: Ledger) -> None:
    held = await ledger.write(claim(), replacing=None)
    ids = {held.record.write_id}
    for _ in range(5):
        held = await ledger.write(amended(held.record), replacing=held)
        ids.add(held.record.write_id)
    assert len(ids) == 6


@pytest.mark.parametrize("refused", [False, True], ids=["no answer", "told 412 by the repetition"])
@pytest.mark.parametrize("nth", [1, 2], ids=["the first", "a change"])
async def test_a_write_whose_answer_was_lost_is_known_by_its_id(
    ledger: Ledger, store: MemoryStore, nth: int, refused: bool
) -> None:
    held: VersionedRecord | None = None
    ledger._probed = True
    for number in (1, 2):
        if number == nth:
            store.lose_put(refused=refused)
        held = await ledger.write(claim() if held is None else amended(held.record, epoch=2), replacing=held)
        assert store.json(KEY)["write_id"] == held.record.write_id
        assert held.etag == store.objects[KEY].etag


async def test_a_write_that_did_not_take_place_is_a_failure_of_the_store(ledger: Ledger, store: MemoryStore) -> None:
    store.fail_put()
    with pytest.raises(StoreFailed):
        await ledger.write(claim(), replacing=None)
    held = await ledger.write(claim(), replacing=None)
    store.fail_put()
    with pytest.raises(StoreFailed):
        await ledger.write(amended(held.record), replacing=held)
    assert store.json(KEY)["write_id"] == held.record.write_id


async def test_a_write_that_failed_while_another_succeeded_is_overtaken(ledger: Ledger, store: MemoryStore) -> None:
    held = await ledger.write(claim(), replacing=None)
    other = Ledger(store.beside(), DESTINATION)
    await other.write(amended(held.record, run_id="other"), replacing=held)
    store.fail_put()
    with pytest.raises(RecordChanged):
        await ledger.write(amended(held.record), replacing=held)


async def test_fields_that_are_not_known_here_survive_a_change(ledger: Ledger, store: MemoryStore) -> None:
    await ledger.write(claim(), replacing=None)
    said = {**store.json(KEY), "of_tomorrow": {"a": [1, None]}, "note": "by hand"}
    await store.put(KEY, json.dumps(said).encode(), content_type="application/json")
    held = await ledger.read("fox")
    assert held is not None
    await ledger.write(amended(held.record, state=RecordState.CREATED, prediction_id="p-1"), replacing=held)
    assert store.json(KEY)["of_tomorrow"] == {"a": [1, None]}
    assert store.json(KEY)["note"] == "by hand"
    assert store.json(KEY)["state"] == "created"


# -------------------------------------------------------------------------------- reading


async def test_the_age_of_a_record_is_the_buckets(ledger: Ledger) -> None:
    """The machine's date and the bucket's are ten months apart here."""
    await asyncio.sleep(100.7)
    await ledger.write(claim(), replacing=None)
    await asyncio.sleep(61.5)
    held = await ledger.read("fox")
    assert held is not None
    assert held.age_seconds == 62.0
    assert held.modified_at == EPOCH + timedelta(seconds=100)


async def test_no_record_is_none(ledger: Ledger) -> None:
    assert await ledger.read("fox") is None


MINIMAL = b'"item_id": "a", "fingerprint": "f", "model": "m", "input": {}'


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b'{"schema": "eachlabs-record/1"}',
        b'{"schema": "eachlabs-record/2", ' + MINIMAL + b', "state": "stored"}',
        b"{" + MINIMAL + b', "state": "sold"}',
        b" " * (MAX_RECORD_BYTES + 1),
    ],
    ids=["empty", "cut", "no object", "no text", "too little", "of tomorrow", "strange state", "huge"],
)
async def test_what_is_no_record_stops_the_item_and_is_named(ledger: Ledger, store: MemoryStore, body: bytes) -> None:
    await store.put(KEY, body, content_type="application/json")
    with pytest.raises(StoreFailed, match=r"s3://bucket/kit/records/fox\.json.*nothing is bought"):
        await ledger.read("fox")
    with pytest.raises(StoreFailed):
        await ledger.write(claim(), replacing=None)
    assert store.objects[KEY].body == body


# --------------------------------------------------------- stores without conditional writes


async def test_the_store_is_tried_once_a_process(ledger: Ledger, store: MemoryStore) -> None:
    assert not ledger.is_proven
    held = await ledger.write(claim(), replacing=None)
    assert ledger.is_proven
    assert store.count("put") == 3, "the write and two that must be refused"
    await ledger.write(amended(held.record), replacing=held)
    assert store.count("put") == 4


async def test_trying_the_store_leaves_the_record_as_it_was_written(ledger: Ledger, store: MemoryStore) -> None:
    held = await ledger.write(claim(), replacing=None)
    assert store.objects[KEY].etag == held.etag
    assert store.json(KEY)["write_id"] == held.record.write_id


@pytest.mark.parametrize("lost", [False, True])
async def test_a_store_that_ignores_conditions_is_found_out_at_the_first_write(
    ledger: Ledger, store: MemoryStore, lost: bool
) -> None:
    store.honours_conditions = False
    if lost:
        store.lose_put()
    with pytest.raises(SetupError, match="EACHLABS_CONDITIONAL_WRITES=ignore"):
        await ledger.write(claim(), replacing=None)
    assert not ledger.is_proven


async def test_conditions_may_be_ignored_on_purpose() -> None:
    store = MemoryStore(honours_conditions=False)
    ledger = Ledger(store, DESTINATION, conditional=False)
    held = await ledger.write(claim(), replacing=None)
    await ledger.write(amended(held.record, epoch=2), replacing=held)
    assert store.json(KEY)["epoch"] == 2
    assert store.count("put") == 2
    assert not ledger.is_proven


# ------------------------------------------------------------------------------ what it means


@pytest.mark.parametrize(
    ("changes", "unseen", "may"),
    [
        ({}, True, True),
        ({"intent": Intent.SETTLE}, True, True),
        ({"intent": Intent.IDLE}, False, False),
        ({"intent": Intent.IDLE, "unsettled_since": EPOCH}, True, True),
        ({"intent": None}, True, True),
        ({"state": RecordState.AMBIGUOUS}, True, True),
        ({"state": RecordState.CREATED, "prediction_id": "p-1"}, False, True),
        ({"state": RecordState.STORED, "prediction_id": "p-1"}, False, True),
        ({"state": RecordState.FAILED}, False, False),
        ({"state": RecordState.FAILED, "prediction_id": "p-1"}, False, True),
        ({"state": RecordState.CANCELLED, "earlier": ["p-1"]}, False, True),
    ],
)
def test_a_record_says_whether_money_may_have_been_spent(changes: dict[str, Any], unseen: bool, may: bool) -> None:
    record = amended(claim(), **changes)
    assert record.may_have_bought_unseen is unseen
    assert record.may_have_bought is may


def test_a_record_names_every_prediction_that_it_accounts_for() -> None:
    record = amended(claim(), prediction_id="a", also_bought=["b"], earlier=["c", "d"])
    assert record.named_predictions == {"a", "b", "c", "d"}


def test_a_record_gives_its_prediction_with_what_is_known() -> None:
    assert claim().prediction() is None
    when = datetime(2026, 11, 22, tzinfo=timezone.utc)
    prediction = amended(claim(), prediction_id="p-1", created_at=when).prediction()
    assert isinstance(prediction, Prediction)
    assert (prediction.id, prediction.item_id, prediction.created_at) == ("p-1", "fox", when)
    assert (prediction.model, prediction.input) == (ITEM.model, ITEM.input)


if __name__ == "__main__":
    print(schema_text(), end="")
