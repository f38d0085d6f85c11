"""Faults of the `/v1` endpoints: what happens to a request before it takes effect, and to its answer after."""

from __future__ import annotations

from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import Response

from prefect_eachlabs.testing.emulator.core import Emulator
from prefect_eachlabs.testing.emulator.faults import AFTER, Endpoint, Fault
from prefect_eachlabs.testing.emulator.journal import Entry
from prefect_eachlabs.testing.emulator.limits import throttled
from prefect_eachlabs.testing.emulator.responses import CutResponse, DripResponse, error, html

ENTRY = "prefect_eachlabs.testing.emulator.entry"
"""Where the ASGI scope carries the journal's entry of the request."""
KEY = "prefect_eachlabs.testing.emulator.key"
"""Where it carries the API key in clear, for the faults that quote it; the journal knows its hash alone."""

DEFAULT_SECONDS = 60.0


def entry_of(request: Request) -> Entry:
    entry: Entry = request.scope[ENTRY]
    return entry


def secret_of(request: Request) -> str:
    """The API key that came with a request."""
    return str(request.scope.get(KEY, ""))


def seconds_of(fault: Fault, default: float = DEFAULT_SECONDS) -> float:
    return default if fault.seconds is None else fault.seconds


def note(request: Request, fault: Fault) -> None:
    """Writes the fault into the journal, beside any that hit the request already."""
    entry = entry_of(request)
    entry.fault = fault.name if entry.fault is None else f"{entry.fault} {fault.name}"


async def before(emulator: Emulator, request: Request, endpoint: Endpoint, *, text: str = "") -> Response | None:
    """The answer of a fault that keeps the request from taking effect; None: go on."""
    subject = text if endpoint == "create" else request.url.path
    fault = emulator.faults.draw(endpoint, "before", text=text, subject=subject)
    if fault is None:
        return None
    note(request, fault)
    if fault.kind == "late":
        await emulator.clock.sleep(seconds_of(fault))
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
        path = request.url.path
        target = fault.value or (path[:-1] if path.endswith("/") else path + "/")
        return Response(status_code=fault.status or 307, headers={"location": quote(target, safe=":/?&=%")})
    if fault.kind == "quoted_key":
        key = secret_of(request)
        return error(fault.status or 400, f"bad request (X-API-Key: {key})", f"upstream refused the key {key}")
    if fault.kind == "empty_error":
        return Response(b"{}", status_code=fault.status or 500, media_type="application/json")
    return error(fault.status or 503, "service temporarily unavailable", "injected before anything was done")


def no_balance() -> Response:
    return error(402, "insufficient balance", "Your balance does not cover the predictions in flight. Top up to go on.")


def drawn_after(
    emulator: Emulator, request: Request, endpoint: Endpoint, *, text: str = "", subject: str = ""
) -> dict[str, Fault]:
    """The faults that hit a request after it took effect, by kind."""
    hits = emulator.faults.draw_all(endpoint, "after", text=text, subject=subject)
    for fault in hits:
        note(request, fault)
    return {fault.kind: fault for fault in hits}


async def after(emulator: Emulator, answer: Response, faults: dict[str, Fault]) -> Response:
    """The answer as the first wire fault among those drawn spoils it."""
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
        spoilt = fault.value.encode() if fault.value is not None else body[: len(body) // 2]
        return Response(spoilt, status_code=answer.status_code, media_type="application/json")
    if fault.kind == "drip":
        return DripResponse(answer, emulator.clock, seconds=seconds_of(fault))
    await emulator.clock.sleep(seconds_of(fault))
    return answer
