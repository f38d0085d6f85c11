"""Receives the vendor's calls over HTTP: a small ASGI app, and a server for it in this process.

Whoever can reach it may send anything: what is read is bounded in size and time, every answer comes at once, and
nothing of a request is logged.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Iterator

import uvicorn
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from prefect_eachlabs.settings import host_and_port
from prefect_eachlabs.webhooks.calls import MAX_BODY_BYTES, Call
from prefect_eachlabs.webhooks.webhooks import Close, Take, Verdict, Way

logger = logging.getLogger(__name__)

BODY_WITHIN_SECONDS = 5.0
CONNECTIONS_AT_A_TIME = 200
CONNECTION_SECONDS = 10.0
"""For one request, its head included: whoever sends that slowly, or not at all, would keep its connection for ever."""
_STATUS = {Verdict.REFUSED: 401, Verdict.UNREADABLE: 400, Verdict.CONTRADICTS: 409}


def receiver_app(take: Take) -> ASGIApp:
    """The app: POST hands a call to `take` and is answered by what became of it; GET says that it is there.

    202: taken, or kept; 401: not from the vendor; 400: unreadable; 409: of another prediction; 413: too large; 408: too
    slow; 503: `take` cannot take it now (it raises OSError), the vendor calls again.
    """

    async def answer(request: Request) -> tuple[int, str]:
        if request.method in ("GET", "HEAD"):
            return 200, "receives the calls of Eachlabs"
        if request.method != "POST":
            return 405, "POST calls here"
        try:
            body = await asyncio.wait_for(_body(request), BODY_WITHIN_SECONDS)
        except asyncio.TimeoutError:
            return 408, "too slow"
        if body is None:
            return 413, "too large"
        try:
            verdict = take(Call.received(request.scope["query_string"].decode("latin-1"), request.headers, body))
        except OSError:
            return 503, "later"
        return _STATUS.get(verdict, 202), verdict.value

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            status, said = await answer(Request(scope, receive))
            await JSONResponse({"status": said}, status, {"connection": "close"})(scope, receive, send)

    return app


async def _body(request: Request) -> bytes | None:
    """None: there is more of it than is taken, or the caller has left."""
    body = bytearray()
    try:
        async for piece in request.stream():
            body += piece
            if len(body) > MAX_BODY_BYTES:
                return None
    except ClientDisconnect:
        return None
    return bytes(body)


class _Connection(H11Protocol):
    """One caller's. Who comes when there are too many takes the oldest one's place: strangers keep nobody out."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        super().connection_made(transport)
        self._ends = self.loop.call_later(CONNECTION_SECONDS, transport.abort)
        others = [one for one in self.connections if isinstance(one, _Connection) and not one.transport.is_closing()]
        if len(others) > CONNECTIONS_AT_A_TIME:
            min(others, key=lambda one: one._ends.when()).transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._ends.cancel()
        super().connection_lost(exc)


class _Server(uvicorn.Server):
    """uvicorn beside a program that has signals of its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def server_of(take: Take) -> uvicorn.Server:
    """A server that hands calls to `take`, logs none and leaves signals alone; `serve(sockets=[...])` runs it."""
    config = uvicorn.Config(
        receiver_app(take),
        http=_Connection,
        lifespan="off",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=2,
        h11_max_incomplete_event_size=16 * 1024,
    )
    return _Server(config)


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises OSError when it cannot."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=256)


class _Listener:
    """The server of this process at one place, for all accounts that receive there."""

    def __init__(self, place: str) -> None:
        self._socket = listening(*host_and_port(place))
        self.takers: list[Take] = []
        self._server = server_of(self._take)
        self._serving = asyncio.ensure_future(self._server.serve(sockets=[self._socket]))

    def _take(self, call: Call) -> Verdict:
        verdicts = [take(call) for take in self.takers]
        return next((one for one in verdicts if one is not Verdict.REFUSED), Verdict.REFUSED)

    async def aclose(self) -> None:
        self._server.should_exit = True
        await asyncio.wait({self._serving}, timeout=5)
        self._serving.cancel()
        self._socket.close()


_listeners: dict[tuple[int, str], _Listener] = {}


def listen_at(place: str) -> Way:
    """The way in through `HOST:PORT` of this process.

    Raises:
        OSError: On opening: the port is taken, or the host is not ours.
    """

    async def way(take: Take) -> Close:
        key = (id(asyncio.get_running_loop()), place)
        if key not in _listeners:
            _listeners[key] = _Listener(place)
        listener = _listeners[key]
        listener.takers.append(take)

        async def close() -> None:
            listener.takers.remove(take)
            if not listener.takers:
                del _listeners[key]
                await listener.aclose()

        return close

    return way
