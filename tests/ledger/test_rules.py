"""What a record asks for: a table of cases, without network."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

import pytest

from prefect_eachlabs.errors import ContentRefused, ItemConflict, PredictionFailed
from prefect_eachlabs.ledger.records import (
    Intent,
    Record,
    RecordError,
    RecordState,
    VersionedRecord,
    amended,
    new_record,
)
from prefect_eachlabs.ledger.rules import PurchaseOptions, Step, next_step
from prefect_eachlabs.models import Item

ITEM = Item.wanted("a fox", item_id="fox")
OTHER = Item.wanted("a hare", item_id="fox")
NOW = datetime(2026, 11, 22, tzinfo=timezone.utc)
CLAIM_SECONDS = 60.0


def held(age_seconds: float = 0.0, **changes: Any) -> VersionedRecord:
    record = amended(new_record(ITEM, run_id="run-1"), **changes)
    return VersionedRecord(record, '"etag"', age_seconds, NOW)


def step(found: VersionedRecord | None, item: Item = ITEM, **allowed: Any) -> Step:
    return next_step(found, item, PurchaseOptions(**allowed), claim_seconds=CLAIM_SECONDS)


BOUGHT = {"prediction_id": "p-1"}


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (None, Step.BUY),
        (held(0), Step.LOOK_AGAIN),
        (held(61), Step.LOOK_AGAIN),
        (held(62), Step.BUY),
        (held(-3), Step.LOOK_AGAIN),
        (held(0, intent=Intent.SETTLE), Step.LOOK_AGAIN),
        (held(62, intent=Intent.SETTLE), Step.BUY),
        (held(0, intent=Intent.IDLE), Step.BUY),
        (held(62, intent=Intent.IDLE, unsettled_since=NOW), Step.BUY),
        (held(0, state=RecordState.AMBIGUOUS), Step.BUY),
        (held(0, state=RecordState.CREATED, **BOUGHT), Step.FINISH),
        (held(99, state=RecordState.CREATED, cancel_requested=True, **BOUGHT), Step.FINISH),
        (held(0, state=RecordState.STORED, **BOUGHT), Step.REUSE),
        (held(0, state=RecordState.CANCELLED, **BOUGHT), Step.BUY),
    ],
)
def test_a_record_of_the_same_input_asks_for(found: VersionedRecord | None, expected: Step) -> None:
    assert step(found) is expected


@pytest.mark.parametrize("found", [held(state=RecordState.FAILED), held(state=RecordState.FAILED, **BOUGHT)])
def test_what_failed_is_tried_again_only_when_asked(found: VersionedRecord) -> None:
    with pytest.raises(PredictionFailed, match="--retry-failed"):
        step(found)
    assert step(found, retry_failed=True) is Step.BUY


def test_a_failure_keeps_its_reason_code_and_kind() -> None:
    said = RecordError(kind="rejected", message="input is required", code="X")
    with pytest.raises(PredictionFailed, match="input is required") as failed:
        step(held(state=RecordState.FAILED, error=said, **BOUGHT))
    assert (failed.value.kind, failed.value.code, failed.value.prediction_id) == ("rejected", "X", "p-1")
    refused = RecordError(kind=ContentRefused.default_kind, message="no")
    with pytest.raises(ContentRefused):
        step(held(state=RecordState.FAILED, error=refused, **BOUGHT))


def test_a_picture_that_was_found_missing_is_bought_again_by_who_asks_for_missing_ones() -> None:
    """A run may have died between writing that down and buying."""
    found = held(state=RecordState.FAILED, error=RecordError(kind="picture missing", message="gone"), **BOUGHT)
    assert step(found, rebuy_missing=True) is Step.BUY
    with pytest.raises(PredictionFailed):
        step(found)
    with pytest.raises(PredictionFailed):
        step(held(state=RecordState.FAILED, **BOUGHT), rebuy_missing=True)


SPENT = [
    held(0),
    held(99),
    held(99, intent=Intent.SETTLE),
    held(state=RecordState.AMBIGUOUS),
    held(state=RecordState.CREATED, **BOUGHT),
    held(state=RecordState.STORED, **BOUGHT),
    held(state=RecordState.FAILED, **BOUGHT),
    held(state=RecordState.CANCELLED, **BOUGHT),
    held(intent=Intent.IDLE, earlier=["p-0"]),
]


@pytest.mark.parametrize("found", SPENT)
@pytest.mark.parametrize("allowed", [{}, {"retry_failed": True, "rebuy_missing": True}])
def test_an_id_that_stands_for_another_input_is_refused_where_money_may_have_been_spent(
    found: VersionedRecord, allowed: dict[str, Any]
) -> None:
    with pytest.raises(ItemConflict) as conflict:
        step(found, OTHER, **allowed)
    prompts = (repr(ITEM.input["prompt"]), repr(OTHER.input["prompt"]))
    for named in ("fox", *prompts, "--replace"):
        assert named in str(conflict.value)


def test_a_conflict_names_what_differs_cut_to_a_line() -> None:
    other = Item.wanted(ITEM.input["prompt"], item_id="fox", input={"seed": 7})
    with pytest.raises(ItemConflict, match="its seed is None, here it is 7"):
        step(held(99), other)
    with pytest.raises(ItemConflict, match=r"here it is 'x{79}… \(20,002 characters\)") as conflict:
        step(held(99), Item.wanted("x" * 20_000, item_id="fox"))
    assert len(str(conflict.value)) < 400


@pytest.mark.parametrize("found", SPENT)
def test_it_is_replaced_on_purpose_but_not_under_a_live_claim(found: VersionedRecord) -> None:
    live = found.record.state is RecordState.CLAIMED and found.record.intent is Intent.POST and found.age_seconds == 0
    assert step(found, OTHER, replace=True) is (Step.LOOK_AGAIN if live else Step.BUY)


@pytest.mark.parametrize(
    "found",
    [held(intent=Intent.IDLE), held(state=RecordState.FAILED, error=RecordError(kind="rejected", message="no"))],
)
def test_an_id_under_which_nothing_was_bought_is_free_for_a_mended_input(found: VersionedRecord) -> None:
    assert step(found, OTHER) is Step.BUY


def test_the_defaults_allow_nothing_that_costs_twice() -> None:
    allowed = PurchaseOptions()
    assert not any([allowed.replace, allowed.rebuy_missing, allowed.retry_failed, allowed.presume_new])
    assert allowed.on_ambiguous == "settle"


@pytest.mark.parametrize("state", RecordState)
def test_every_state_has_an_answer(state: RecordState) -> None:
    record = Record(item_id="fox", fingerprint=ITEM.fingerprint, model="m", input={}, state=state)
    assert isinstance(step(VersionedRecord(record, "e", 99.0, NOW), retry_failed=True), Step)
