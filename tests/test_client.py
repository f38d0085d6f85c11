"""The client says what an answer means for money, once; and its key goes to one host alone."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import datetime, timedelta, timezone
from typing import Any

import httpx
import pytest

from prefect_eachlabs.client import (
    MAX_ANSWER_BYTES,
    EachlabsClient,
    parse_retry_after,
    user_agent,
    within_waking_seconds,
)
from prefect_eachlabs.errors import (
    EachlabsError,
    InsufficientBalance,
    KeyRefused,
    NotSent,
    OutcomeUnknown,
    Rejected,
    SetupError,
    Throttled,
    Unanswered,
)
from prefect_eachlabs.models import Item, Prediction, PredictionStatus
from prefect_eachlabs.settings import AccountSettings
from tests.virtual_time import run

KEY = "sk-very-secret-0123456789"
ITEM = Item.wanted("a fox in the snow", item_id="fox")
BASE_URL = "https://api.eachlabs.invalid"

Answer = Callable[[httpx.Request], httpx.Response] | Callable[[httpx.Request], Awaitable[httpx.Response]]


def settings(**given: Any) -> AccountSettings:
    return AccountSettings(**{"api_key": KEY, "base_url": BASE_URL, **given})


def answered(answer: Any, ask: Callable[[EachlabsClient], Awaitable[Any]], **given: Any) -> Any:
    """What the client makes of an answer (a response, an exception, or a handler), in virtual time."""

    def handler(request: httpx.Request) -> httpx.Response:
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, httpx.Response):
            return answer
        response: httpx.Response = answer(request)
        return response

    async def story() -> Any:
        client = EachlabsClient(settings(**given), transport=httpx.MockTransport(handler))
        try:
            return await ask(client)
        finally:
            await client.aclose()

    return run(story())


def create(client: EachlabsClient) -> Awaitable[Prediction]:
    return client.create(ITEM)


def get(client: EachlabsClient) -> Awaitable[Prediction]:
    return client.get("p-1")


def cancel(client: EachlabsClient) -> Awaitable[None]:
    return client.cancel("p-1")


def executions(client: EachlabsClient) -> Awaitable[Any]:
    return client.executions()


QUESTIONS = pytest.mark.parametrize("ask", [get, cancel, executions])

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
        httpx.ReadError("cut"),
        httpx.WriteError("cut"),
        httpx.CloseError("cut"),
        httpx.ReadTimeout("slow"),
        httpx.WriteTimeout("slow"),
        httpx.RemoteProtocolError("Server disconnected without sending a response."),
        httpx.LocalProtocolError("strange"),
        httpx.ProxyError("the proxy said no"),
        httpx.DecodingError("no gzip"),
        httpx.NetworkError("network"),
        httpx.TransportError("transport"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_order_that_was_cut_may_have_been_billed_and_is_not_repeated(error: httpx.HTTPError) -> None:
    with pytest.raises(OutcomeUnknown) as unknown:
        answered(error, create)
    assert not unknown.value.retryable


@pytest.mark.parametrize(("claim_seconds", "given_up_after"), [(60.0, 30.0), (20.0, 10.0), (600.0, 30.0)])
def test_an_order_is_given_up_in_time(claim_seconds: float, given_up_after: float) -> None:
    async def story() -> float:
        async def for_ever(request: httpx.Request) -> httpx.Response:
            await asyncio.sleep(3600)
            raise AssertionError

        given = settings(claim_seconds=claim_seconds)
        client = EachlabsClient(given, transport=httpx.MockTransport(for_ever))
        with pytest.raises(OutcomeUnknown, match="time-out"):
            await client.create(ITEM)
        return asyncio.get_running_loop().time()

    assert run(story()) == given_up_after


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


@pytest.mark.parametrize("status", [300, 301, 302, 303, 304, 307, 308])
@pytest.mark.parametrize("ask", [create, get, cancel, executions])
def test_a_redirect_is_never_followed(status: int, ask: Any) -> None:
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(str(request.url))
        return httpx.Response(status, headers={"Location": "https://elsewhere.invalid/v1/prediction"})

    with pytest.raises(Rejected, match="EACHLABS_BASE_URL"):
        answered(answer, ask)
    assert len(asked) == 1


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
        (httpx.ConnectError("refused"), NotSent),
        (httpx.ConnectTimeout("slow"), NotSent),
        (httpx.PoolTimeout("busy"), NotSent),
        (httpx.ReadError("cut"), Unanswered),
        (httpx.ReadTimeout("slow"), Unanswered),
        (httpx.RemoteProtocolError("cut"), Unanswered),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_question_that_was_cut_may_be_asked_again(ask: Any, error: Exception, kind: type[EachlabsError]) -> None:
    with pytest.raises(kind) as raised:
        answered(error, ask)
    assert raised.value.retryable


@QUESTIONS
def test_a_question_that_is_refused_does_not_speak_of_an_order(ask: Any) -> None:
    with pytest.raises(Rejected) as refused:
        answered(httpx.Response(404, json={"error": "not found"}), ask)
    assert refused.value.status_code == 404
    assert "reated" not in refused.value.message


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


@pytest.mark.parametrize("body", [{}, {"executions": None}, {"executions": {}}, "x", 3, None])
def test_a_list_of_executions_that_is_none_is_unanswered(body: object) -> None:
    with pytest.raises(Unanswered):
        answered(httpx.Response(200, json=body), executions)


# -------------------------------------------------------------------------- Retry-After

NOW = datetime(2026, 11, 22, 12, 0, 0, tzinfo=timezone.utc)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("0", 0.0),
        ("7", 7.0),
        (" 7 ", 7.0),
        ("1.5", 1.5),
        ("Sun, 22 Nov 2026 12:00:30 GMT", 30.0),
        ("Sunday, 22-Nov-26 12:00:30 GMT", 30.0),
        ("Sun, 22 Nov 2026 11:00:00 GMT", 0.0),
        ("Sun, 22 Nov 2026 13:00:30 +0100", 30.0),
        ("", None),
        (None, None),
        ("soon", None),
        ("-5", None),
        ("1e3", None),
        ("٣", None),
        ("999999999999999999", None),
        ("Sun, 99 Nov 2026 12:00:30 GMT", None),
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
    try:
        answered(answer, ask)
    except EachlabsError as error:
        shown = f"{error} {error!r} {error.details} {vars(error)} {error.args} {error.__cause__!r}"
        assert KEY not in shown
        assert KEY[:12] not in shown, "not even a part of it"
        assert len(error.details or "") <= 500
    else:
        assert ask is get  # any JSON object is an answer


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


# -------------------------------------------------------------------------- real sockets

Served = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def serving(handler: Served) -> AsyncIterator[int]:
    """A server on a free port that speaks what the handler writes."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await handler(reader, writer)
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        await server.wait_closed()


async def read_request(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    for line in head.split(b"\r\n"):
        if line.lower().startswith(b"content-length:"):
            return head + await reader.readexactly(int(line.split(b":")[1]))
    return head


def over_the_wire(answer: bytes | None, ask: Callable[[EachlabsClient], Awaitable[Any]]) -> tuple[Any, list[bytes]]:
    """The outcome (or the error) of an answer that was sent byte by byte, and the requests that came; None: cut."""
    requests: list[bytes] = []

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        requests.append(await read_request(reader))
        if answer is not None:
            writer.write(answer)
            await writer.drain()

    async def story() -> Any:
        async with serving(handler) as port:
            client = EachlabsClient(settings(base_url=f"http://127.0.0.1:{port}"))
            try:
                return await ask(client)
            except EachlabsError as error:
                return error
            finally:
                await client.aclose()

    return asyncio.run(story()), requests


def test_an_order_over_the_wire_is_one_request() -> None:
    outcome, requests = over_the_wire(b'HTTP/1.1 200 OK\r\nContent-Length: 23\r\n\r\n{"predictionID": "p-1"}', create)
    assert isinstance(outcome, Prediction)
    assert len(requests) == 1
    assert requests[0].startswith(b"POST /v1/prediction/ HTTP/1.1\r\n")


@pytest.mark.parametrize(
    "answer",
    [
        None,
        b"HTTP/1.1 200 OK\r\nContent-Len",
        b'HTTP/1.1 200 OK\r\nContent-Length: 23\r\n\r\n{"predictionID"',
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 5\r\n\r\nhello",
    ],
    ids=["cut", "cut head", "cut body", "bad chunks", "not HTTP", "not gzip"],
)
def test_an_order_whose_answer_is_broken_is_never_sent_again(answer: bytes | None) -> None:
    outcome, requests = over_the_wire(answer, create)
    assert isinstance(outcome, OutcomeUnknown)
    assert len(requests) == 1


def test_an_order_on_a_kept_connection_that_the_server_has_closed_is_not_sent_twice() -> None:
    """The first answer keeps the connection open, then the server cuts it: httpx must not repeat the POST by itself."""
    requests: list[bytes] = []

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        requests.append(await read_request(reader))
        writer.write(b'HTTP/1.1 200 OK\r\nContent-Length: 23\r\n\r\n{"predictionID": "p-1"}')
        await writer.drain()
        requests.append(await read_request(reader))

    async def story() -> None:
        async with serving(handler) as port:
            client = EachlabsClient(settings(base_url=f"http://127.0.0.1:{port}"))
            await client.create(ITEM)
            with pytest.raises(OutcomeUnknown):
                await client.create(ITEM)
            await client.aclose()

    asyncio.run(story())
    assert len(requests) == 2


def test_nobody_listening_means_that_nothing_was_sent() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]

        async def story() -> None:
            client = EachlabsClient(settings(base_url=f"http://127.0.0.1:{port}"))
            with pytest.raises(NotSent):
                await client.create(ITEM)
            with pytest.raises(NotSent):
                await client.get("p-1")
            await client.aclose()

        asyncio.run(story())


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_the_key_never_follows_a_redirect_to_another_host(status: int) -> None:
    elsewhere: list[bytes] = []

    async def other(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        elsewhere.append(await reader.read(100))

    async def story() -> None:
        async with serving(other) as other_port:

            async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                await read_request(reader)
                location = f"http://127.0.0.1:{other_port}/v1/prediction/"
                writer.write(f"HTTP/1.1 {status} X\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode())
                await writer.drain()

            async with serving(handler) as port:
                client = EachlabsClient(settings(base_url=f"http://127.0.0.1:{port}"))
                for ask in (create, get, cancel, executions):
                    with pytest.raises(Rejected):
                        await ask(client)
                await client.aclose()

    asyncio.run(story())
    assert elsewhere == []


def test_a_huge_answer_is_not_read_to_its_end() -> None:
    size = 20 * MAX_ANSWER_BYTES
    sent = 0

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await read_request(reader)
        writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {size}\r\n\r\n".encode())
        with contextlib.suppress(OSError):
            while sent < size:
                writer.write(b" " * 65_536)
                sent += 65_536
                await writer.drain()

    async def story() -> None:
        async with serving(handler) as port:
            client = EachlabsClient(settings(base_url=f"http://127.0.0.1:{port}"))
            with pytest.raises(Unanswered):
                await client.get("p-1")
            await client.aclose()

    asyncio.run(story())
    assert sent < size / 2


def test_an_answer_that_inflates_is_not_kept() -> None:
    bomb = gzip.compress(b" " * (4 * MAX_ANSWER_BYTES))
    head = f"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: {len(bomb)}\r\n\r\n"
    outcome, _ = over_the_wire(head.encode() + bomb, get)
    assert isinstance(outcome, Unanswered)


def test_neither_logs_nor_reprs_show_the_key(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    over_the_wire(b'HTTP/1.1 200 OK\r\nContent-Length: 23\r\n\r\n{"predictionID": "p-1"}', create)
    over_the_wire(b"HTTP/1.1 500 X\r\nContent-Length: 0\r\n\r\n", get)
    assert caplog.text
    assert KEY not in caplog.text

    async def shown() -> str:
        client = EachlabsClient(settings())
        try:
            return f"{client!r} {settings()!r} {settings()}"
        finally:
            await client.aclose()

    assert KEY not in asyncio.run(shown())


def test_a_proxy_of_the_environment_does_not_see_what_goes_to_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    outcome, requests = over_the_wire(b'HTTP/1.1 200 OK\r\nContent-Length: 23\r\n\r\n{"predictionID": "p-1"}', create)
    assert isinstance(outcome, Prediction)
    assert len(requests) == 1


# ------------------------------------------------------------------------ waking seconds


def test_work_that_ends_in_time_gives_its_result_or_its_error() -> None:
    async def story() -> None:
        assert await within_waking_seconds(asyncio.sleep(29.9, "done"), 30.0) == "done"

        async def fail() -> None:
            await asyncio.sleep(1)
            raise ValueError("no")

        with pytest.raises(ValueError, match="no"):
            await within_waking_seconds(fail(), 30.0)

    run(story())


def test_work_that_takes_too_long_is_cancelled() -> None:
    async def story() -> float:
        cancelled = False

        async def work() -> None:
            nonlocal cancelled
            try:
                await asyncio.sleep(100)
            except asyncio.CancelledError:
                cancelled = True
                raise

        with pytest.raises(asyncio.TimeoutError):
            await within_waking_seconds(work(), 2.5)
        assert cancelled
        return asyncio.get_running_loop().time()

    assert run(story()) == 2.5


def test_work_whose_result_comes_while_it_is_being_cancelled_is_not_lost() -> None:
    async def story() -> str:
        async def work() -> str:
            try:
                await asyncio.sleep(100)
            except asyncio.CancelledError:
                return "bought"
            return ""

        return await within_waking_seconds(work(), 1.0)

    assert run(story()) == "bought"


def test_a_caller_that_is_cancelled_cancels_the_work() -> None:
    async def story() -> bool:
        ended = asyncio.Event()

        async def work() -> None:
            try:
                await asyncio.sleep(100)
            finally:
                ended.set()

        waiting = asyncio.ensure_future(within_waking_seconds(work(), 30.0))
        await asyncio.sleep(1)
        waiting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await waiting
        return ended.is_set()

    assert run(story())


def test_a_process_that_was_frozen_hears_the_answer_to_what_it_sends_when_it_thaws() -> None:
    """The loop's clock jumps by five minutes; the answer comes a second after that."""

    async def story() -> str:
        loop: Any = asyncio.get_running_loop()

        async def work() -> str:
            await asyncio.sleep(0.5)
            loop._now += 300.0
            await asyncio.sleep(1.0)
            return "bought"

        return await within_waking_seconds(work(), 30.0)

    assert run(story()) == "bought"
