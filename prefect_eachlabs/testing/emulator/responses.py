"""Answers as the vendor words them, and answers that go wrong on the wire."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from starlette.responses import JSONResponse, Response

from prefect_eachlabs.testing.emulator.clock import Clock

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

CUT = "prefect_eachlabs.testing.emulator.cut"
"""Extension of the ASGI scope: a callable `(reset: bool) -> None` that ends the connection."""

HTML_PAGE = (
    "<!DOCTYPE html>\n<html><head><title>{status} {phrase}</title></head>\n"
    "<body><center><h1>{status} {phrase}</h1></center><hr><center>cloudflare</center></body></html>\n"
)
_PHRASES = {200: "OK", 500: "Internal Server Error", 502: "Bad Gateway", 503: "Service Unavailable"}
_PHRASES[504] = "Gateway Time-out"


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
    page = HTML_PAGE.format(status=status, phrase=_PHRASES.get(status, "Error"))
    return Response(page, status_code=status, media_type="text/html")


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
        for begin in range(0, len(body), step):
            await self._clock.sleep(self._seconds / self._PIECES)
            await send({"type": "http.response.body", "body": body[begin : begin + step], "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
