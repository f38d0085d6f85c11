"""The app: the routes, and at its gate the key, the request limit and the journal."""

from __future__ import annotations

import hmac
import logging
import uuid
from collections.abc import Mapping
from email.utils import format_datetime
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from prefect_eachlabs.net.redaction import shown
from prefect_eachlabs.testing.emulator.options import EmulatorOptions
from prefect_eachlabs.testing.emulator.responses import Receive, Scope, Send, error, throttled
from prefect_eachlabs.testing.emulator.routes import ENTRY, KEY, Refused, routes_of
from prefect_eachlabs.testing.emulator.state import Emulator, Entry, key_hash

logger = logging.getLogger(__name__)

_PUBLIC = ("/v1/models", "/v1/model")


def endpoint_of(method: str, path: str) -> str:
    """What journal and tallies call a request."""
    parts = [part for part in path.split("/") if part]
    if parts[:1] != ["v1"]:
        known = {"files": "picture", "uploads": "uploaded", "storage": "upload"}
        return known.get(parts[0] if parts else "", "other")
    if parts[1:] in (["executions"], ["models"], ["model"], ["webhooks"]):
        return parts[1]
    if parts[1:] == ["upload", "presign"]:
        return "presign"
    if parts[1:2] == ["prediction"]:
        if len(parts) == 2:
            return "create" if method == "POST" else "other"
        if len(parts) == 3:
            return "get" if method == "GET" else "other"
        return "cancel" if parts[3:] == ["cancel"] else "other"
    return "other"


class Gate:
    """Every request but those to /_emulator passes here: it is journaled, known by its key, and counted."""

    def __init__(self, app: ASGIApp, emulator: Emulator) -> None:
        self._app = app
        self._emulator = emulator

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith("/_emulator"):
            await self._app(scope, receive, send)
            return
        emulator, headers = self._emulator, Headers(scope=scope)
        entry = emulator.open_entry(scope["method"], scope["path"])
        entry.endpoint = endpoint_of(entry.method, entry.path)
        entry.request_id = headers.get("x-request-id") or str(uuid.uuid4())
        scope[ENTRY] = entry
        scope[KEY] = self._key_of(headers) or ""

        async def noting_send(message: Any) -> None:
            if message["type"] == "http.response.start":
                entry.status = message["status"]
                date = emulator.clock.date(emulator.clock.now())  # the whole vendor's clock is off by the skew
                MutableHeaders(scope=message)["date"] = format_datetime(date, usegmt=True)
                if entry.path.startswith("/v1/"):
                    MutableHeaders(scope=message)["x-request-id"] = entry.request_id or ""
            await send(message)

        journal = emulator.journal
        try:
            answer = self._answer_at_the_gate(entry, headers)
            if answer is None:
                await self._app(scope, receive, noting_send)
            else:
                await answer(scope, receive, noting_send)
        finally:
            journal.close(entry, at=emulator.clock.now())
            logger.info("%s %s: %s", shown(entry.method), shown(entry.path), entry.status or "no answer")

    def _answer_at_the_gate(self, entry: Entry, headers: Headers) -> Response | None:
        emulator = self._emulator
        key = self._key_of(headers)
        if not entry.path.startswith("/v1/"):
            if key is not None:
                emulator.journal.violations["key_sent_to_a_file_host"] += 1
            return None
        if "x-api-key" in headers and "authorization" in headers:
            emulator.journal.violations["both_auth_headers"] += 1
        if key is None or not self._is_good(key):
            if key is None and entry.path.rstrip("/") in _PUBLIC:
                return None
            emulator.unauthorized += 1
            return error(401, "Invalid or missing API key")
        entry.key = key_hash(key)
        options, now = emulator.options, emulator.clock.now()
        limit = options.requests_per_minute
        wait_seconds = emulator.journal.admit(entry.key, now, limit, count_rejected=options.count_rejected)
        if wait_seconds is None:
            return None
        return throttled(
            f"Request limit reached: at most {limit} requests in 60 seconds.",
            emulator=emulator,
            wait_seconds=wait_seconds,
        )

    @staticmethod
    def _key_of(headers: Mapping[str, str]) -> str | None:
        key = headers.get("x-api-key", "").strip()
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        return key or (bearer.strip() if scheme.lower() == "bearer" else "") or None

    def _is_good(self, key: str) -> bool:
        keys = self._emulator.options.api_keys
        return keys is None or any(hmac.compare_digest(key.encode(), good.encode()) for good in keys)


def create_app(emulator: Emulator | EmulatorOptions | None = None) -> Starlette:
    """The app of an emulator; `app.state.emulator` is the state behind it."""
    state = emulator if isinstance(emulator, Emulator) else Emulator(emulator)

    async def as_the_vendor_says_it(request: Request, wrong: Exception) -> Response:
        if isinstance(wrong, Refused):
            return wrong.answer
        assert isinstance(wrong, HTTPException), "registered for these two"
        return error(wrong.status_code, str(wrong.detail), headers=wrong.headers)

    app = Starlette(
        routes=routes_of(state),
        middleware=[Middleware(Gate, emulator=state)],
        exception_handlers={HTTPException: as_the_vendor_says_it, Refused: as_the_vendor_says_it},
    )
    app.router.redirect_slashes = False
    app.state.emulator = state
    return app
