"""The client says what an answer to an order means for money, once."""

from __future__ import annotations

import asyncio
import json
from datetime import datetime, timedelta, timezone
from typing import Any

import httpx
import pytest

from prefect_eachlabs.api.client import EachlabsClient, parse_retry_after, user_agent
from prefect_eachlabs.errors import (
    EachlabsError,
    InsufficientBalance,
    KeyRefused,
    NotSent,
    OutcomeUnknown,
    Rejected,
    SetupError,
    Throttled,
)
from prefect_eachlabs.models import Item, PredictionStatus
from tests.api.client_answers import BASE_URL, ITEM, KEY, answered, cancel, create, executions, get, settings

# ------------------------------------------------------------------------------- create


@pytest.mark.parametrize("name", ["predictionID", "prediction_id", "id", "exec_id"])
@pytest.mark.parametrize("status", [200, 201, 202])
def test_an_order_is_created_under_whichever_name_its_id_comes(name: str, status: int) -> None:
    prediction = answered(httpx.Response(status, json={"status": "success", name: "p-1"}), create)
    assert (prediction.id, prediction.status, prediction.item_id) == ("p-1", PredictionStatus.PENDING, "fox")
    assert prediction.input == ITEM.input
    assert prediction.created_at is not None


def test_the_order_is_sent_as_the_page_of_the_model_says() -> None:
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, json={"predictionID": "p-1"})

    item = Item.wanted("Ein Füchslein “im” Schnee 🦊", image_url="https://example.org/fox.png")
    answered(answer, lambda client: client.create(item))
    (request,) = seen
    assert (request.method, str(request.url)) == ("POST", f"{BASE_URL}/v1/prediction/")
    assert json.loads(request.content) == {
        "model": "gemini",
        "version": "2.0-flash-exp-image-generation",
        "input": {"prompt": "Ein Füchslein “im” Schnee 🦊", "image_url": "https://example.org/fox.png"},
    }
    assert "Füchslein".encode() in request.content, "UTF-8, not escaped"
    assert request.headers["content-type"] == "application/json"
    assert request.headers["x-api-key"] == KEY
    assert "authorization" not in request.headers
    assert request.headers["user-agent"] == user_agent()
    assert request.headers["x-request-id"]


def test_a_version_that_is_not_set_is_left_out() -> None:
    bodies: list[dict[str, Any]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        bodies.append(json.loads(request.content))
        return httpx.Response(200, json={"predictionID": "p-1"})

    answered(answer, lambda client: client.create(Item.wanted("a fox", model="flux-1-1-pro")))
    assert bodies == [{"model": "flux-1-1-pro", "input": {"prompt": "a fox"}}]


def test_the_key_goes_into_one_header_never_both() -> None:
    seen: list[httpx.Headers] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers)
        return httpx.Response(200, json={"predictionID": "p-1"})

    answered(answer, create, auth_scheme="bearer")
    assert seen[0]["authorization"] == f"Bearer {KEY}"
    assert "x-api-key" not in seen[0]


@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(200, json={"status": "success"}),
        httpx.Response(200, json={"predictionID": ""}),
        httpx.Response(200, json={"predictionID": "../../etc/passwd\n"}),
        httpx.Response(200, json={"predictionID": {"id": "p-1"}}),
        httpx.Response(200, json=[{"predictionID": "p-1"}]),
        httpx.Response(200, text="p-1"),
        httpx.Response(200, content=b""),
        httpx.Response(200, content=b'{"predictionID": "p-'),
        httpx.Response(200, content=b"\xff\xfe{}"),
        httpx.Response(204),
        httpx.Response(408),
        httpx.Response(500, json={}),
        httpx.Response(502, html="<html><body>Bad Gateway</body></html>"),
        httpx.Response(503, json={"error": "try later"}),
        httpx.Response(504),
        httpx.Response(599),
    ],
    ids=lambda answer: f"{answer.status_code} {answer.text[:20]!r}",
)
def test_an_answer_without_an_id_may_have_been_billed_and_is_not_repeated(answer: httpx.Response) -> None:
    with pytest.raises(OutcomeUnknown) as unknown:
        answered(answer, create)
    assert not unknown.value.retryable
    assert unknown.value.item_id == "fox"
    assert unknown.value.status_code == answer.status_code


@pytest.mark.parametrize(
    "error",
    [httpx.ConnectError("refused"), httpx.ConnectTimeout("slow"), httpx.PoolTimeout("busy")],
    ids=lambda error: type(error).__name__,
)
def test_a_connection_that_never_came_about_sent_nothing(error: httpx.HTTPError) -> None:
    with pytest.raises(NotSent) as not_sent:
        answered(error, create)
    assert not_sent.value.retryable
    assert not_sent.value.item_id == "fox"


@pytest.mark.parametrize(
    "error",
    [
        *(httpx.ReadError, httpx.WriteError, httpx.CloseError, httpx.ReadTimeout, httpx.WriteTimeout, httpx.ProxyError),
        *(httpx.RemoteProtocolError, httpx.LocalProtocolError, httpx.DecodingError, httpx.NetworkError),
        httpx.TransportError,
    ],
)
def test_an_order_that_was_cut_may_have_been_billed_and_is_not_repeated(error: type[httpx.RequestError]) -> None:
    with pytest.raises(OutcomeUnknown) as unknown:
        answered(error("cut"), create)
    assert not unknown.value.retryable


@pytest.mark.parametrize(("claim_seconds", "given_up_after"), [(60.0, 30.0), (20.0, 10.0), (600.0, 30.0)])
async def test_an_order_is_given_up_in_time(claim_seconds: float, given_up_after: float) -> None:
    async def for_ever(request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(3600)
        raise AssertionError

    given = settings(claim_seconds=claim_seconds)
    client = EachlabsClient(given, transport=httpx.MockTransport(for_ever))
    with pytest.raises(OutcomeUnknown, match="time-out"):
        await client.create(ITEM)
    assert asyncio.get_running_loop().time() == given_up_after


# ----------------------------------------------------- refusals: nothing was created


@pytest.mark.parametrize(("status", "kind"), [(429, Throttled), (402, InsufficientBalance)])
def test_a_throttled_order_created_nothing_and_keeps_what_the_api_says(status: int, kind: type[EachlabsError]) -> None:
    body = {"status": status, "error": "limit reached", "details": "10 predictions are in flight"}
    with pytest.raises(kind) as throttled:
        answered(httpx.Response(status, json=body, headers={"Retry-After": "7"}), create)
    assert throttled.value.retry_after_seconds == 7
    assert "10 predictions are in flight" in (throttled.value.details or "")
    assert "Nothing was created" in throttled.value.message
    assert throttled.value.retryable is (status == 429)


@pytest.mark.parametrize("status", [400, 404, 405, 409, 413, 415, 422, 451])
def test_a_wrong_order_is_refused_and_created_nothing(status: int) -> None:
    with pytest.raises(Rejected) as refused:
        answered(httpx.Response(status, json={"error": "input is required"}), create)
    assert refused.value.status_code == status
    assert "input is required" in refused.value.message
    assert "Nothing was created" in refused.value.message
    assert not isinstance(refused.value, SetupError)
    assert not refused.value.retryable


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("ask", [create, get, cancel, executions])
def test_a_refused_key_says_what_to_check(status: int, ask: Any) -> None:
    with pytest.raises(KeyRefused, match="EACHLABS_API_KEY") as refused:
        answered(httpx.Response(status, json={"error": "Invalid API key"}), ask)
    assert isinstance(refused.value, SetupError)


# -------------------------------------------------------------------------- Retry-After

NOW = datetime(2026, 11, 22, 12, 0, 0, tzinfo=timezone.utc)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        *(("0", 0.0), ("7", 7.0), (" 7 ", 7.0), ("1.5", 1.5)),
        ("Sun, 22 Nov 2026 12:00:30 GMT", 30.0),
        ("Sunday, 22-Nov-26 12:00:30 GMT", 30.0),
        ("Sun, 22 Nov 2026 11:00:00 GMT", 0.0),
        ("Sun, 22 Nov 2026 13:00:30 +0100", 30.0),
        *((none, None) for none in ("", None, "soon", "-5", "1e3", "٣", "9" * 18, "Sun, 99 Nov 2026 12:00:30 GMT")),
    ],
)
def test_retry_after_is_seconds_or_a_date(value: str | None, seconds: float | None) -> None:
    assert parse_retry_after(value, now=NOW) == seconds


def test_a_retry_after_date_counts_from_the_answers_own_date() -> None:
    """Our clock may be wrong by hours."""
    then = NOW - timedelta(days=400)
    headers = {
        "Date": then.strftime("%a, %d %b %Y %H:%M:%S GMT"),
        "Retry-After": (then + timedelta(seconds=20)).strftime("%a, %d %b %Y %H:%M:%S GMT"),
    }
    with pytest.raises(Throttled) as throttled:
        answered(httpx.Response(429, headers=headers), create)
    assert throttled.value.retry_after_seconds == 20
