"""No remote word is trusted: whatever the API says is read once, without ever raising, and means what it must."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_eachlabs import models
from prefect_eachlabs.errors import ContentRefused, OutputMissing, PredictionCancelled, PredictionFailed
from prefect_eachlabs.models import (
    Prediction,
    PredictionStatus,
    created_id,
    is_http_url,
    parse_executions,
    parse_prediction,
    parse_prediction_id,
    parse_status,
)

URL = "https://files.invalid/p-1.png"
OTHER = "https://files.invalid/p-2.png"

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from([URL, "success", "error"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                ["id", "status", "output", "logs", "input", "metrics", "url", "images", "error_code", "error_message",
                 "retryable", "classification", "category", "cost", "predict_time", "executions", "created_at"]
            )
            | st.text(max_size=5),
            inner,
            max_size=5,
        )
    ),
    max_leaves=20,
)  # fmt: skip
"""What a hostile or a future API might send."""


def ended(output: object, status: str = "success") -> Prediction:
    return parse_prediction({"status": status, "output": output, "logs": output}, prediction_id="p-1")


@given(anything)
def test_whatever_the_api_says_is_read_without_an_error(said: Any) -> None:
    parse_status(said)
    created_id(said)
    assert all(map(is_http_url, ended(said).output_urls))
    for row in parse_executions([said]):
        assert parse_prediction_id(row.id) == row.id
    if isinstance(said, dict):
        prediction = parse_prediction(said, prediction_id="p-1")
        assert prediction.id == "p-1"
        Prediction.model_validate_json(prediction.model_dump_json())


# ------------------------------------------------------------------------------- status


WORDS: dict[PredictionStatus, tuple[object, ...]] = {
    PredictionStatus.SUCCEEDED: ("success", "SUCCESS", "succeeded", "Completed", " success "),
    PredictionStatus.FAILED: ("error", "ERROR", "failed", "Failed"),
    PredictionStatus.CANCELLED: ("cancelled", "canceled", "CANCELED"),
    PredictionStatus.PENDING: ("created", "starting", "processing", "", None, "warming_up", 3, [], {"a": 1}, True),
}


@pytest.mark.parametrize(("status", "word"), [(status, word) for status, words in WORDS.items() for word in words])
def test_three_vocabularies_say_how_it_ended_and_any_other_word_means_not_finished(
    status: PredictionStatus, word: object
) -> None:
    assert parse_status(word) is status


def test_a_word_that_is_not_known_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    models._warn_of.cache_clear()
    for _ in range(3):
        parse_status("Pondering\x1b[2J" + "x" * 1_000)
        parse_status("processing")
    (said,) = [record.getMessage() for record in caplog.records]
    assert "pondering" in said
    assert "\x1b" not in said
    assert len(said) < 250


# ----------------------------------------------------------------------------------- id


@pytest.mark.parametrize("value", ["p-1", "4bb426c5-7b17-4e52-9c9e-ed275d589a7e", "a/b", 12345, "x" * 256])
def test_an_id_is_printable_text_or_a_number(value: object) -> None:
    assert parse_prediction_id(value) == str(value)


@pytest.mark.parametrize("value", [None, "", " ", "a b", "a\nb", "é", "x" * 257, ".", "..", True, 1.5, ["p-1"], {}])
def test_what_is_no_safe_id_is_none(value: object) -> None:
    assert parse_prediction_id(value) is None


def test_the_first_name_that_holds_an_id_counts() -> None:
    assert created_id({"predictionID": "", "prediction_id": None, "id": "b", "exec_id": "c"}) == "b"
    assert created_id({"status": "success"}) is None
    assert created_id("p-1") is None


# ------------------------------------------------------------------------------- output


@pytest.mark.parametrize(
    ("output", "urls"),
    [
        (URL, (URL,)),
        (f"  {URL}\n", (URL,)),
        ([URL, OTHER], (URL, OTHER)),
        ([URL, URL], (URL,)),
        ({"url": URL}, (URL,)),
        ({"image_url": URL, "content_type": "image/png"}, (URL,)),
        ({"images": [{"url": URL}, {"url": OTHER}]}, (URL, OTHER)),
        ({"seed": 1, "thumbnail": OTHER, "url": URL}, (URL, OTHER)),
        (json.dumps({"images": [URL]}), (URL,)),
        ({"a": {"b": [{"c": URL}]}}, (URL,)),
        ("", ()),
        (None, ()),
        ([], ()),
        ("data:image/png;base64,AAAA", ()),
        ("ftp://files.invalid/p.png", ()),
        ("https://", ()),
        ("https://files.invalid/a b.png", ()),
        ("javascript:alert(1)", ()),
        (["file:///etc/passwd", "http://[::1", "http://h:99999/"], ()),
        (3, ()),
        ("{broken", ()),
    ],
)
def test_urls_are_collected_from_any_documented_shape_in_order(output: object, urls: tuple[str, ...]) -> None:
    assert ended(output).output_urls == urls


def test_nesting_and_number_of_urls_are_bounded() -> None:
    deep: Any = URL
    for _ in range(20):
        deep = [deep]
    assert ended(deep).output_urls == ()
    assert len(ended([f"https://files.invalid/{number}.png" for number in range(1000)]).output_urls) == 64
    assert ended("[" * 100_000).output_urls == ()


# ----------------------------------------------------------------------------- failures

ENVELOPE = {
    "error_code": "PROVIDER_FAILED",
    "error_message": "The provider could not make it.",
    "retryable": True,
    "error_step": "provider",
    "classification": {"category": "provider_error"},
}


@pytest.mark.parametrize(
    "answer",
    [
        {"status": "failed", "output": ENVELOPE},
        {"status": "error", "output": json.dumps(ENVELOPE)},
        {"status": "failed", "output": None, "logs": json.dumps(ENVELOPE)},
        {"status": "success", "output": ENVELOPE},
        {"status": "success", "output": {**ENVELOPE, "url": URL}},
    ],
)
def test_an_error_envelope_is_found_wherever_it_is_even_under_success(answer: dict[str, Any]) -> None:
    prediction = parse_prediction(answer, prediction_id="p-1")
    assert prediction.failure is not None
    assert prediction.failure.may_be_resubmitted
    with pytest.raises(PredictionFailed) as failed:
        prediction.raise_for_end()
    assert failed.value.code == "PROVIDER_FAILED"
    assert "could not make it" in failed.value.message
    assert failed.value.prediction_id == "p-1"


@pytest.mark.parametrize("name", ["error", "error_message", "logs", "message"])
def test_a_failure_in_plain_words_keeps_them(name: str) -> None:
    prediction = parse_prediction({"status": "failed", name: "out of memory"}, prediction_id="p-1")
    with pytest.raises(PredictionFailed, match="out of memory"):
        prediction.raise_for_end()


@pytest.mark.parametrize(
    "envelope",
    [
        {**ENVELOPE, "classification": {"category": "content_moderation"}},
        {**ENVELOPE, "error_code": "CONTENT_MODERATION"},
        {"error_code": "SAFETY", "error_message": "no", "retryable": True},
    ],
)
def test_a_refusal_by_moderation_is_never_resubmitted(envelope: dict[str, Any]) -> None:
    prediction = parse_prediction({"status": "failed", "output": envelope}, prediction_id="p-1")
    assert prediction.failure is not None
    assert not prediction.failure.may_be_resubmitted
    with pytest.raises(ContentRefused):
        prediction.raise_for_end()


@pytest.mark.parametrize(
    ("envelope", "may"),
    [
        ({"error_code": "X", "retryable": True}, True),
        ({"error_code": "X", "retryable": False}, False),
        ({"error_code": "X"}, False),
        ({"error_code": "PROVIDER_FAILED"}, True),
        ({"error_code": "PROVIDER_FAILED", "retryable": False}, False),
        ({"error_code": "X", "retryable": "true"}, False),
    ],
)
def test_what_may_be_resubmitted_is_what_the_api_says(envelope: dict[str, Any], may: bool) -> None:
    failure = ended(envelope, "error").failure
    assert failure is not None
    assert failure.may_be_resubmitted is may


@pytest.mark.parametrize("output", [None, "", [], {}, "no picture"])
def test_success_without_a_picture_is_an_error_of_its_own(output: object) -> None:
    with pytest.raises(OutputMissing):
        parse_prediction({"status": "success", "output": output}, prediction_id="p-1").raise_for_end()


def test_a_cancelled_prediction_says_so() -> None:
    with pytest.raises(PredictionCancelled):
        parse_prediction({"status": "canceled"}, prediction_id="p-1").raise_for_end()


def test_what_has_not_ended_and_what_succeeded_is_itself() -> None:
    for answer in ({"status": "starting"}, {"status": "success", "output": URL}):
        prediction = parse_prediction(answer, prediction_id="p-1")
        assert prediction.raise_for_end() is prediction


def test_an_error_word_before_the_end_is_no_failure() -> None:
    prediction = parse_prediction({"status": "processing", "output": ENVELOPE, "error": "x"}, prediction_id="p-1")
    assert prediction.failure is None


# ---------------------------------------------------------------------- the other fields


@pytest.mark.parametrize(
    ("metrics", "seconds", "cost"),
    [
        ({"predict_time": 4.2, "cost": 0.039}, 4.2, 0.039),
        ({"predict_time": "4.2", "cost": "0.039"}, 4.2, 0.039),
        ({"predict_time": None, "cost": 0}, None, 0.0),
        ({"predict_time": -1, "cost": float("nan")}, None, None),
        ({"predict_time": float("inf"), "cost": 10**400}, None, None),
        ({"predict_time": True, "cost": []}, None, None),
        ("fast", None, None),
        (None, None, None),
    ],
)
def test_numbers_that_are_none_count_as_not_told(metrics: object, seconds: float | None, cost: float | None) -> None:
    prediction = parse_prediction({"status": "success", "metrics": metrics}, prediction_id="p-1")
    assert (prediction.predict_time_seconds, prediction.cost_usd) == (seconds, cost)


@pytest.mark.parametrize(
    ("echo", "read"),
    [
        ({"prompt": "a"}, {"prompt": "a"}),
        ('{"prompt": "a"}', {"prompt": "a"}),
        ("a", None),
        (None, None),
        (["prompt"], None),
    ],
)
def test_the_echoed_input_is_an_object_or_json_of_one(echo: object, read: object) -> None:
    assert parse_prediction({"status": "x", "input": echo}, prediction_id="p-1").input == read


@pytest.mark.parametrize(
    ("text", "date"),
    [
        ("2026-11-22T10:00:00Z", datetime(2026, 11, 22, 10, tzinfo=timezone.utc)),
        ("2026-11-22T10:00:00.123456789Z", datetime(2026, 11, 22, 10, 0, 0, 123456, tzinfo=timezone.utc)),
        ("2026-11-22T10:00:00+02:00", datetime(2026, 11, 22, 10, tzinfo=timezone(timedelta(hours=2)))),
        ("2026-11-22T10:00:00", None),
        ("yesterday", None),
        (1_700_000_000, None),
        (None, None),
    ],
)
def test_a_row_of_executions_has_a_date_or_none(text: object, date: datetime | None) -> None:
    (row,) = parse_executions([{"id": "p-1", "created_at": text}])
    assert row.created_at == date


def test_rows_without_an_id_are_left_out() -> None:
    rows = parse_executions([{"id": "p-1", "output": URL}, {"id": ""}, {}, "x", None, {"id": 7, "output": ENVELOPE}])
    assert [(row.id, row.output_urls) for row in rows] == [("p-1", (URL,)), ("7", ())]


def test_of_a_page_only_those_are_read_that_somebody_asks_for() -> None:
    page = [{"id": "p-1", "output": URL}, {"id": "p-2", "output": URL}, {"id": 7}]
    assert [row.id for row in parse_executions(page, of={"p-1", "7"})] == ["p-1", "7"]
