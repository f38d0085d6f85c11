"""What the API says, as objects: read without an exception, and what was read can be written, logged and compared."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from datetime import timedelta
from typing import Any

from hypothesis import strategies as st

from prefect_eachlabs.api.catalogue import Model
from prefect_eachlabs.errors import BadInput, EachlabsError
from prefect_eachlabs.ledger.evidence import fit, may_share_an_echo, newest
from prefect_eachlabs.ledger.records import Record, RecordError, new_record
from prefect_eachlabs.models import Item, UploadSlot, created_id, is_http_url, parse_executions, parse_prediction
from prefect_eachlabs.net import safe_json
from tests.api.client_answers import ITEM
from tests.fuzz import hostile
from tests.fuzz.kit import fuzzed
from tests.fuzz.test_client import CREATED, ENDED, FAILED, MODEL, ROW, SLOT

SCHEMA = {
    "slug": "m",
    "title": "M",
    "output_type": "array",
    "request_schema": {
        "type": "object",
        "required": ["prompt"],
        "properties": {
            "prompt": {"type": "string", "maxLength": 100},
            "image_urls": {"anyOf": [{"type": "array", "items": {"type": "string", "format": "uri"}}]},
            "seed": {"$ref": "#/$defs/seed"},
        },
        "$defs": {"seed": {"type": "integer", "minimum": 0}},
        "additionalProperties": False,
    },
}
INPUT = {"prompt": "a fox", "image_url": "https://files.invalid/a.png", "seed": 1, "more": {"a": [1, 2.0, None, True]}}


def as_sent(data: bytes) -> Any:
    """As the client reads it; None where it is no JSON."""
    try:
        return safe_json.loads(data)
    except (ValueError, RecursionError):
        return None


@fuzzed(hostile.bytes_of(ENDED, FAILED, CREATED))
def test_a_prediction_can_be_written_down_whatever_was_said(data: bytes) -> None:
    said = as_sent(data)
    assert created_id(said) is None or created_id(said).isascii()
    if not isinstance(said, Mapping):
        return
    prediction = parse_prediction(said, prediction_id="p-1")
    assert all(map(is_http_url, prediction.output_urls))
    prediction.model_copy(update={"input": None}).model_dump_json()
    repr(prediction)
    try:
        prediction.raise_for_end()
    except EachlabsError as error:
        str(error).encode()
        new_record(ITEM, run_id="r").model_copy(
            update={"error": RecordError(kind=error.kind, message=str(error))}
        ).to_bytes()


@fuzzed(hostile.bytes_of([ROW, ROW], [ROW]))
def test_rows_of_executions_have_dates_that_can_be_reckoned_with(data: bytes) -> None:
    said = as_sent(data)
    rows = parse_executions(said if isinstance(said, list) else [])
    at = newest(rows)
    for row in rows:
        json.dumps(asdict(row), ensure_ascii=False, default=str).encode()
        if row.created_at is not None and at is not None:
            assert row.created_at <= at
            assert row.created_at - timedelta(days=2) < at + timedelta(days=2)


@fuzzed(hostile.bytes_of(SLOT, MODEL), st.booleans())
def test_an_upload_slot_is_whole_or_none(data: bytes, may_be_http: bool) -> None:
    slot = UploadSlot.parse(as_sent(data), may_be_http=may_be_http)
    if slot is not None:
        assert "files.invalid/p-1.png" not in repr(slot) or slot.public_url in repr(slot)


@fuzzed(hostile.bytes_of(SCHEMA, MODEL), hostile.objects_of(INPUT))
def test_a_schema_from_afar_refuses_an_input_or_does_not(data: bytes, input: Any) -> None:
    said = as_sent(data)
    if not isinstance(said, Mapping) or not isinstance(input, dict):
        return
    model = Model.parse(said, "m")
    try:
        placed = model.placed(Item.wanted("a fox", input=input).input)
    except BadInput as error:
        str(error).encode()
        return
    for fault in model.faults_of(placed)[0]:
        fault.encode()


@fuzzed(hostile.bytes_of(INPUT), hostile.objects_of(INPUT))
def test_any_echo_is_that_of_an_input_or_of_another(data: bytes, sent: Any) -> None:
    said = as_sent(data)
    prediction = parse_prediction({"status": "created", "input": said}, prediction_id="p-1")
    try:
        item = Item.wanted(prompt="a fox", input=sent if isinstance(sent, dict) else {})
    except BadInput:
        return
    if prediction.input is not None:
        fit(prediction.input, item.input)
        may_share_an_echo(prediction.input, item.input)


@fuzzed(hostile.bytes_of(INPUT), hostile.texts, st.dictionaries(hostile.texts, hostile.texts, max_size=3))
def test_an_item_has_a_record_that_can_be_read_back_or_is_refused(
    data: bytes, prompt: str, labels: dict[str, str]
) -> None:
    given = as_sent(data)
    try:
        item = Item.wanted(prompt, input=given if isinstance(given, dict) else {}, labels=labels)
        record = new_record(item, run_id="r")
    except BadInput as error:
        str(error).encode()
        return
    read = Record.model_validate_json(record.to_bytes())
    assert read.input == item.input
    assert read.fingerprint == item.fingerprint
