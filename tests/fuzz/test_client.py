"""The client against answers of any kind: a result or an error of the tree, and an order is sent once."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import AsyncIterator
from typing import Any

import httpx
from hypothesis import strategies as st

from prefect_eachlabs.api.client import parse_retry_after
from prefect_eachlabs.errors import EachlabsError, NotSent, OutcomeUnknown, Rejected, Throttled
from prefect_eachlabs.models import Prediction
from tests.api.client_answers import ITEM, KEY
from tests.fuzz import hostile
from tests.fuzz.kit import Wire, asked, fuzzed

URL = "https://files.invalid/p-1.png"
CREATED = {"status": "success", "message": "Prediction created", "predictionID": "p-1"}
ENDED = {
    "predictionID": "p-1",
    "status": "success",
    "output": [URL, {"url": URL}],
    "logs": None,
    "model": "gemini",
    "version": "v",
    "input": {"prompt": "a fox", "seed": 1},
    "metrics": {"predict_time": 5.1, "cost": 0.04},
}
FAILED = {
    "status": "error",
    "output": {
        "error_code": "PROVIDER_FAILED",
        "error_message": "no",
        "retryable": True,
        "classification": {"category": "provider"},
    },
}
ROW = {
    "id": "p-1",
    "model": "gemini",
    "status": "success",
    "execution_cost": 0.04,
    "run_time": 5.0,
    "created_at": "2026-11-22T10:00:00Z",
    "output": URL,
}
REFUSED = {"status": "error", "error": "limit reached", "message": "wait", "details": {"in_flight": [1, 2]}}
MODEL = {
    "slug": "m",
    "title": "M",
    "output_type": "string",
    "request_schema": {"properties": {"image": {"type": "string"}}},
}
SLOT = {"presigned_url": URL, "public_url": URL, "required_headers": {"Content-Type": "image/png"}, "expires_at": "x"}

bodies = hostile.bytes_of(
    CREATED, ENDED, FAILED, {"executions": [ROW, ROW]}, [ROW], REFUSED, MODEL, {"models": [MODEL]}, SLOT
)
statuses = st.sampled_from(
    (200, 200, 200, 200, 201, 204, 301, 304, 400, 401, 402, 403, 404, 408, 422, 429, 500, 503, 599)
)
dates = st.sampled_from(
    (
        *("5", "0", "-1", "1e9", "9" * 400, ".", "1.5.", "٣", "Sun, 22 Nov 2026 10:00:00 GMT", "Sun, 99 Foo 2026"),
        *("Mon, 01 Jan 0001 00:00:00 +2359", "Fri, 31 Dec 9999 23:59:59 -2359", "Sun, 22 Nov 2026 10:00:00 +9999"),
        "1 Jan 99999999999 0:0:0",
    )
)
headers = st.dictionaries(
    st.sampled_from(
        ("Location", "Retry-After", "Date", "Set-Cookie", "Content-Encoding", "Content-Type", "Link", "Vary")
    ),
    dates
    | st.sampled_from(
        (
            *("http://[::1", "//", "http://\x7f/", "https://xn--/", "http://a:b/", "gzip", "gzip, gzip", "br"),
            *("deflate", "zstd", "text/html; charset=utf-7", "a=b; expires=9; domain=.invalid; max-age=9e9", "=;;;="),
            *("\xff\xfe", "http://" + "a" * 300, "http://é.invalid:99999999/", "javascript:1", "?" * 2_000),
        )
    )
    | st.text(st.characters(min_codepoint=32, max_codepoint=255), max_size=12),
    max_size=3,
)

ASKED = {
    "create": lambda client: client.create(ITEM),
    "get": lambda client: client.get("p-1"),
    "cancel": lambda client: client.cancel("p-1"),
    "executions": lambda client: client.executions(),
    "model": lambda client: client.model("m"),
    "models": lambda client: client.models("m"),
    "presign": lambda client: client.presign(content_type="image/png", expires_in_seconds=60),
}


def outcome_of(transport: httpx.AsyncBaseTransport, question: str) -> Any:
    """The result, or the error of the tree; anything else is a finding."""
    try:
        result = asked(transport, ASKED[question])
    except EachlabsError as error:
        told = f"{error} {error.details} {error.code}"
        told.encode()  # it can be logged and written down
        assert KEY not in told
        return error
    if isinstance(result, Prediction):
        result.model_dump_json()
        try:
            result.raise_for_end()
        except EachlabsError as error:
            f"{error} {error.details} {error.code}".encode()
    return result


@fuzzed(statuses, headers, bodies, st.sampled_from(sorted(ASKED)))
def test_whatever_the_api_answers_is_a_result_or_an_error_of_the_tree(
    status: int, headers: dict[str, str], body: bytes, question: str
) -> None:
    requests: list[httpx.Request] = []

    async def pieces() -> AsyncIterator[bytes]:
        yield body

    def handler(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        raw = [(name.encode(), value.encode("latin-1", "replace")) for name, value in headers.items()]
        return httpx.Response(status, headers=raw, content=pieces())

    outcome = outcome_of(httpx.MockTransport(handler), question)
    assert len(requests) == 1
    if question == "create":
        # Money: nothing is said to be certain that is not.
        assert not isinstance(outcome, NotSent)
        if status < 300 or status in (408, 500, 503, 599):
            assert isinstance(outcome, (Prediction, OutcomeUnknown)), outcome
        if isinstance(outcome, Prediction):
            assert status < 300
            json.loads(body)


HEADS = (
    *(b"HTTP/1.1 200 OK\r\n", b"HTTP/1.0 200\r\n", b"HTTP/1.1 999 \r\n", b"HTTP/1.1 -1 x\r\n"),
    *(b"HTTP/9.9 200 OK\r\n", b"ICY 200 OK\r\n", b"HTTP/1.1 200 \xff\xfe\r\n", b"HTTP/1.1 204 No\r\n"),
    *(b"HTTP/1.1 304 Not\r\n", b"HTTP/1.1 101 Switching\r\nUpgrade: h2c\r\n"),
    *(b"HTTP/1.1 100 Continue\r\n\r\n" * 50 + b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 429 Slow\r\nRetry-After: 1\r\n"),
    *(b"\r\n\r\n", b"", b"HTTP/1.1 307 Go\r\nLocation: http://\x00/\r\n"),
    *(b"HTTP/1.1 302 Go\r\nLocation: http://[\r\n", b"\x16\x03\x01\x02\x00", b"HTTP/2 200\r\n"),
)
LINES = (
    *(b"Content-Length: 5\r\n", b"Content-Length: 4294967296\r\n", b"Content-Length: -1\r\n"),
    *(b"Content-Length: 5, 6\r\n", b"Content-Length: " + b"9" * 5_000 + b"\r\n", b"Content-Length: 0x5\r\n"),
    *(b"Transfer-Encoding: chunked\r\n", b": x\r\n", b"Transfer-Encoding: gzip, chunked\r\n"),
    *(b"Content-Encoding: gzip\r\n", b"Content-Encoding: deflate\r\n", b" folded\r\n"),
    *(b"X: " + b"a" * 200_000 + b"\r\n", b"X\r\n", b"X : y\r\n", b"X: \0\r\n", b"Connection: upgrade\r\n"),
    *(b"Set-Cookie: a=b\r\n" * 30, b"Content-Encoding: gzip, br, gzip\r\n", b"Content-Encoding: identity\r\n"),
    b"Content-Encoding: GZIP\r\n",
)
FRAMES = (
    lambda body: body,
    lambda body: b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body),
    lambda body: b"%x;ext=1\r\n%b\r\n0\r\nTrailer: x\r\n\r\n" % (len(body), body),
    lambda body: b"ffffffffffffffffffff\r\n" + body,
    lambda body: b"-1\r\n" + body,
    lambda body: b"1\r\n" * 99 + body,
    gzip.compress,
    zlib.compress,
)


@st.composite
def wires(draw: Any) -> list[bytes]:
    """An HTTP answer, more or less, in pieces."""
    body = draw(st.sampled_from(FRAMES))(draw(bodies))
    lines = b"".join(draw(st.lists(st.sampled_from(LINES), max_size=3)))
    data = draw(st.sampled_from(HEADS)) + lines + b"\r\n" + body
    return draw(hostile.pieces_of(hostile.damaged(data, draw)))


@fuzzed(wires(), st.sampled_from(sorted(ASKED)))
def test_whatever_comes_over_the_wire_is_a_result_or_an_error_of_the_tree(pieces: list[bytes], question: str) -> None:
    wire = Wire(piece for piece in pieces if piece)  # an empty one would be the end
    outcome = outcome_of(wire.transport(), question)
    assert wire.sent.count(b" HTTP/1.1\r\n") == 1
    if question == "create":
        assert isinstance(outcome, (Prediction, OutcomeUnknown, Throttled, Rejected)), outcome


@fuzzed(dates | hostile.texts)
def test_a_retry_after_is_a_number_of_seconds_or_none(text: str) -> None:
    seconds = parse_retry_after(text)
    assert seconds is None or 0 <= seconds < float("inf")
