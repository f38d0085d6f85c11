"""Questions may be asked again: get, cancel and executions; and bodies that are hostile or repeat the key."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

import httpx
import pytest

from prefect_eachlabs.errors import EachlabsError, NotSent, OutcomeUnknown, Rejected, Throttled, Unanswered
from prefect_eachlabs.models import PredictionStatus
from tests.api.client_answers import KEY, answered, cancel, create, executions, get

QUESTIONS = pytest.mark.parametrize("ask", [get, cancel, executions])

# ---------------------------------------------------------------------------- questions


def test_get_asks_without_the_last_slash_and_quotes_the_id() -> None:
    asked: list[bytes] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.raw_path)
        return httpx.Response(200, json={"status": "starting"})

    prediction = answered(answer, lambda client: client.get("a/../b?c#d"))
    assert asked == [b"/v1/prediction/a%2F..%2Fb%3Fc%23d"]
    assert prediction.id == "a/../b?c#d"


def test_get_reads_the_end_with_its_picture_time_and_cost() -> None:
    body = {
        "id": "something-else",
        "status": "success",
        "output": "https://files.invalid/p-1.png",
        "metrics": {"predict_time": 4.2, "cost": 0.039},
        "input": {"prompt": "a fox"},
    }
    prediction = answered(httpx.Response(200, json=body), get)
    assert prediction.id == "p-1", "what was asked for counts"
    assert prediction.status is PredictionStatus.SUCCEEDED
    assert prediction.output_urls == ("https://files.invalid/p-1.png",)
    assert (prediction.predict_time_seconds, prediction.cost_usd) == (4.2, 0.039)
    assert prediction.input == {"prompt": "a fox"}


@QUESTIONS
@pytest.mark.parametrize("status", [408, 500, 502, 503, 504])
def test_a_question_without_an_answer_may_be_asked_again(ask: Any, status: int) -> None:
    with pytest.raises(Unanswered) as unanswered:
        answered(httpx.Response(status, html="<html></html>"), ask)
    assert unanswered.value.retryable
    assert unanswered.value.status_code == status


@QUESTIONS
@pytest.mark.parametrize(
    ("error", "kind"),
    [
        *((error, NotSent) for error in (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)),
        *((error, Unanswered) for error in (httpx.ReadError, httpx.ReadTimeout, httpx.RemoteProtocolError)),
    ],
)
def test_a_question_that_was_cut_may_be_asked_again(ask: Any, error: Any, kind: type[EachlabsError]) -> None:
    with pytest.raises(kind) as raised:
        answered(error("cut"), ask)
    assert raised.value.retryable


@QUESTIONS
def test_a_question_that_is_refused_does_not_speak_of_an_order(ask: Any) -> None:
    with pytest.raises(Rejected) as refused:
        answered(httpx.Response(404, json={"error": "not found"}), ask)
    assert refused.value.status_code == 404
    assert "reated" not in refused.value.message


@pytest.mark.parametrize("body", [b"", b"<html>404 Not Found</html>", b"default backend - 404"])
def test_a_page_in_place_of_the_apis_404_is_no_answer_about_a_prediction(body: bytes) -> None:
    """A gateway's: the API's own refusals are JSON, and only they say that it does not know the id."""
    with pytest.raises(Unanswered) as unanswered:
        answered(httpx.Response(404, content=body), get)
    assert unanswered.value.retryable


@QUESTIONS
def test_a_question_may_be_throttled(ask: Any) -> None:
    with pytest.raises(Throttled) as throttled:
        answered(httpx.Response(429, json={}, headers={"Retry-After": "3"}), ask)
    assert throttled.value.retry_after_seconds == 3


@pytest.mark.parametrize("body", [b"", b"null", b"[]", b'"success"', b"<html></html>", b"\xff", b'{"status": "succ'])
def test_get_without_a_json_object_is_unanswered(body: bytes) -> None:
    with pytest.raises(Unanswered):
        answered(httpx.Response(200, content=body), get)


@pytest.mark.parametrize("status", [200, 202, 204])
@pytest.mark.parametrize("body", [b"", b"OK", b'{"status": "cancelled"}', b"<html></html>"])
def test_any_2xx_accepts_a_cancel(status: int, body: bytes) -> None:
    assert answered(httpx.Response(status, content=b"" if status == 204 else body), cancel) is None


def test_executions_asks_for_a_page_and_reads_its_rows() -> None:
    asked: list[httpx.URL] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url)
        rows = [{"id": "p-2", "model": "gemini", "status": "success", "created_at": "2026-11-22T10:00:00Z"}]
        return httpx.Response(200, json={"executions": [*rows, {"id": None}, "nonsense"], "total_count": 1})

    rows = answered(answer, lambda client: client.executions(limit=50, offset=100))
    assert asked[0].path == "/v1/executions"
    assert dict(asked[0].params) == {"limit": "50", "offset": "100"}
    assert [row.id for row in rows] == ["p-2"]
    assert rows[0].created_at == datetime(2026, 11, 22, 10, tzinfo=timezone.utc)


@pytest.mark.parametrize("ask", [create, get, executions])
@pytest.mark.parametrize("status", [200, 404, 422])
@pytest.mark.parametrize("opening", ["[", '{"a":'])
@pytest.mark.parametrize("depth", [101, 900, 980, 100_000])
def test_an_answer_that_is_too_deep_to_be_written_down_is_unreadable(
    ask: Callable[..., Any], status: int, opening: str, depth: int
) -> None:
    """Python decodes what it cannot encode again: an answer to an order must not end in an error of Python's."""
    deep = opening * depth + "1" + ("]" if opening == "[" else "}") * depth
    body = f'{{"error": {deep}, "input": {deep}, "status": "success"}}'.encode()
    with pytest.raises(EachlabsError) as info:
        answered(httpx.Response(status, content=body), ask)
    if status == 200:
        assert isinstance(info.value, OutcomeUnknown if ask is create else Unanswered)


def test_an_echo_as_deep_as_an_input_may_be_is_read() -> None:
    deep = "[" * 64 + "]" * 64
    body = f'{{"status": "starting", "input": {{"prompt": "a fox", "more": {deep}}}}}'.encode()
    prediction = answered(httpx.Response(200, content=body), get)
    assert prediction.input is not None
    assert type(prediction).model_validate_json(prediction.model_dump_json()) == prediction


def test_a_page_of_more_rows_than_anybody_asks_for_is_read_as_far_as_1000() -> None:
    rows = [{"id": f"p-{number}", "status": "success"} for number in range(1_001)]
    page = answered(httpx.Response(200, json={"executions": rows}), lambda client: client.executions_page())
    assert (len(page.rows), page.row_count) == (1_000, 1_000)  # so that the next page begins with the row after them
    assert not page.is_last(1_000)


@pytest.mark.parametrize("body", [{}, {"executions": None}, {"executions": {}}, "x", 3, None])
def test_a_list_of_executions_that_is_none_is_unanswered(body: object) -> None:
    with pytest.raises(Unanswered):
        answered(httpx.Response(200, json=body), executions)


# ------------------------------------------------------------- hostile bodies, the secret

HOSTILE = {
    "error": {"error": f"Invalid API key {KEY}"},
    "details": {"error": "no", "details": {"key": KEY, "headers": [f"X-API-Key: {KEY}"]}},
    "message": {"message": f"key={KEY}" * 100},
    "split by the cut": {"error": "x" * 490 + KEY},
    "text": f"bad key {KEY}",
    "html": f"<html>{KEY}</html>",
    "long text": "y" * 495 + KEY + "z" * 100_000,
}


@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE.keys())
@pytest.mark.parametrize("status", [200, 302, 400, 401, 402, 404, 429, 500])
@pytest.mark.parametrize("ask", [create, get, executions])
def test_no_error_ever_holds_the_key(body: Any, status: int, ask: Any) -> None:
    answer = httpx.Response(status, json=body) if isinstance(body, dict) else httpx.Response(status, text=body)
    if status == 200 and ask is get and isinstance(body, dict):
        return  # any JSON object is an answer
    with pytest.raises(EachlabsError) as raised:
        answered(answer, ask)
    error = raised.value
    shown = f"{error} {error!r} {error.details} {vars(error)} {error.args} {error.__cause__!r}"
    assert KEY not in shown
    assert KEY[:12] not in shown, "not even a part of it"
    assert len(error.details or "") <= 500


@pytest.mark.parametrize(
    "body",
    [
        b'{"error": "\\ud800 half a character", "details": "\\udfff"}',
        b'{"error": {"a": [null, 1.5, {"b": "c"}]}}',
        b'{"error": "line\\u0000one\\nline two"}',
        b"[" * 100_000,
        b'{"error": ' + b"9" * 5_000 + b"}",
        b'{"error": NaN}',
    ],
    ids=["surrogates", "nested", "control characters", "deep", "long number", "NaN"],
)
def test_a_hostile_body_ends_as_an_error_of_ours_that_can_be_shown(body: bytes) -> None:
    with pytest.raises(Rejected) as refused:
        answered(httpx.Response(422, content=body), create)
    str(refused.value).encode()
    json.dumps(refused.value.details).encode()
