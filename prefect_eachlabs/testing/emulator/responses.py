"""Answers as the vendor words them, and answers that go wrong on the wire."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from datetime import timedelta
from email.utils import format_datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from starlette.responses import JSONResponse, Response

from prefect_eachlabs.testing.emulator.clock import Clock
from prefect_eachlabs.testing.emulator.faults import AFTER, Fault

if TYPE_CHECKING:
    from prefect_eachlabs.testing.emulator.state import Emulator

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

CUT = "prefect_eachlabs.testing.emulator.cut"
"""Extension of the ASGI scope: a callable `(reset: bool) -> None` that ends the connection."""
_MAX_RETRY_AFTER_SECONDS = 3_600.0
_HTML_PAGE = (
    "<!DOCTYPE html>\n<html><head><title>{0}</title></head>\n"
    "<body><center><h1>{0}</h1></center><hr><center>cloudflare</center></body></html>\n"
)


class ConnectionCut(Exception):
    """The connection was cut where there is no socket: `InProcessTransport` turns it into what httpx would raise."""


def error(status: int, message: str, details: object = None, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """`{"error"}`, or `{"status", "error", "details"}` where there are details."""
    body: dict[str, Any] = {"error": message}
    if details is not None:
        body = {"status": status, "error": message, "details": details}
    return JSONResponse(body, status_code=status, headers=dict(headers or {}))


def html(status: int) -> Response:
    """The page of a proxy that got no answer."""
    return Response(_HTML_PAGE.format(f"{status} upstream"), status_code=status, media_type="text/html")


def xml_error(status: int, code: str) -> Response:
    """As the store behind a presigned URL words its refusals."""
    return Response(f"<Error><Code>{code}</Code></Error>", status_code=status, media_type="application/xml")


def no_balance() -> Response:
    return error(402, "insufficient balance", "Your balance does not cover the predictions in flight. Top up to go on.")


def throttled(details: str, *, emulator: Emulator, wait_seconds: float) -> Response:
    """429: the body names the cap; `Retry-After` says when to come again, if the options want it said."""
    wait = math.ceil(min(max(wait_seconds, 1.0), _MAX_RETRY_AFTER_SECONDS))
    headers: dict[str, str] = {}
    if emulator.options.retry_after == "seconds":
        headers["retry-after"] = str(wait)
    elif emulator.options.retry_after == "date":
        now = emulator.clock.date(emulator.clock.now())
        headers["retry-after"] = format_datetime(now + timedelta(seconds=wait), usegmt=True)
    return error(429, "Too many requests", details, headers)


class CutResponse(Response):
    """Sends the first part of an answer (nothing, by default), then cuts the connection.

    Args:
        whole: The answer that would have been sent, of which `part` of the body is.
        part: Between 0 and 1; None: not even the head is sent.
        more_bytes: Content-Length promises so many more than there are.
        reset: A TCP reset rather than an orderly end.
    """

    def __init__(
        self, whole: Response | None = None, *, part: float | None = None, more_bytes: int = 0, reset: bool = False
    ) -> None:
        super().__init__(bytes(whole.body) if whole is not None else b"")
        self._whole = whole
        self._part = part
        self._more_bytes = more_bytes
        self._reset = reset

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._whole is not None and self._part is not None:
            whole = bytes(self._whole.body)
            headers = [(name, value) for name, value in self._whole.raw_headers if name != b"content-length"]
            headers.append((b"content-length", str(len(whole) + self._more_bytes).encode()))
            await send({"type": "http.response.start", "status": self._whole.status_code, "headers": headers})
            sent = whole[: int(len(whole) * self._part)]
            await send({"type": "http.response.body", "body": sent, "more_body": True})
        cut = scope.get("extensions", {}).get(CUT)
        if cut is None:
            raise ConnectionCut("the emulator cut the connection")
        cut(self._reset)
        while (await receive())["type"] != "http.disconnect":  # returning earlier would be answered with a 500
            pass


class DripResponse(Response):
    """Sends an answer in small pieces over a time."""

    _PIECES = 20

    def __init__(self, whole: Response, clock: Clock, *, seconds: float, with_length: bool = True) -> None:
        super().__init__(bytes(whole.body))
        self._whole = whole
        self._clock = clock
        self._seconds = seconds
        self._with_length = with_length

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = bytes(self._whole.body)
        headers = [
            (name, value) for name, value in self._whole.raw_headers if self._with_length or name != b"content-length"
        ]
        await send({"type": "http.response.start", "status": self._whole.status_code, "headers": headers})
        step = max(1, -(-len(body) // self._PIECES))
        for begin in range(0, max(1, len(body)), step):
            await self._clock.sleep(self._seconds / self._PIECES)
            await send({"type": "http.response.body", "body": body[begin : begin + step], "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


# ------------------------------------------------------------- faults of the /v1 endpoints


async def answer_instead(fault: Fault, emulator: Emulator, *, path: str, key: str) -> Response | None:
    """The answer of a fault that keeps a request from taking effect; None: it takes effect now."""
    if fault.kind == "late":
        await emulator.clock.sleep(fault.wait_seconds)
        return None
    if fault.kind in ("cut", "reset"):
        return CutResponse(reset=fault.kind == "reset")
    if fault.kind == "html":
        return html(fault.status or 502)
    if fault.kind == "throttled":
        said = "Too many predictions were started at once; spread them out."
        return throttled(said, emulator=emulator, wait_seconds=fault.seconds or 1.0)
    if fault.kind == "no_balance":
        return no_balance()
    if fault.kind == "redirect":
        target = fault.value or (path[:-1] if path.endswith("/") else path + "/")
        return Response(status_code=fault.status or 307, headers={"location": quote(target, safe=":/?&=%")})
    if fault.kind == "quoted_key":
        return error(fault.status or 400, f"bad request (X-API-Key: {key})", f"upstream refused the key {key}")
    if fault.kind == "empty_error":
        return Response(b"{}", status_code=fault.status or 500, media_type="application/json")
    return error(fault.status or 503, "service temporarily unavailable", "injected before anything was done")


async def spoilt(answer: Response, faults: Mapping[str, Fault], clock: Clock) -> Response:
    """The answer to a request that took effect, as the first wire fault among those drawn spoils it."""
    fault = next((fault for kind, fault in faults.items() if kind in AFTER), None)
    if fault is None:
        return answer
    if fault.kind in ("lost_answer", "lost_reset"):
        return CutResponse(reset=fault.kind == "lost_reset")
    if fault.kind == "cut_body":
        return CutResponse(answer, part=0.5)
    if fault.kind == "html_after":
        return html(fault.status or 504)
    if fault.kind == "error_after":
        return error(fault.status or 500, "internal error", "injected after it was done")
    if fault.kind == "malformed":
        body = bytes(answer.body)
        wrong = fault.value.encode() if fault.value is not None else body[: len(body) // 2]
        return Response(wrong, status_code=answer.status_code, media_type="application/json")
    if fault.kind == "drip":
        return DripResponse(answer, clock, seconds=fault.wait_seconds)
    await clock.sleep(fault.wait_seconds)
    return answer
