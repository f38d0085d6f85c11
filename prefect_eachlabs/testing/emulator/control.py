"""The judge's desk: journal, tallies, faults and reset, under /_emulator."""

from __future__ import annotations

import json
from typing import Any

from fastapi import APIRouter, Request
from pydantic import ValidationError
from starlette.responses import JSONResponse, Response

from prefect_eachlabs.testing.emulator.api import BadBody, base_url, check_order, read_json
from prefect_eachlabs.testing.emulator.core import Emulator
from prefect_eachlabs.testing.emulator.faults import Endpoint, Fault, kinds_of
from prefect_eachlabs.testing.emulator.responses import error

ENDPOINTS: tuple[Endpoint, ...] = Endpoint.__args__  # type: ignore[attr-defined]


def parse_faults(given: object) -> tuple[Fault, ...]:
    """Faults from texts (`create:lost_answer=0.05`), objects, or `Fault`s.

    Raises:
        ValueError: One of them is no fault; says what is known.
    """
    if not isinstance(given, (list, tuple)):
        raise ValueError("faults must be a list")
    return tuple(
        fault if isinstance(fault, Fault) else Fault.parse(fault) if isinstance(fault, str) else Fault(**fault)
        for fault in given
    )


def journal_view(emulator: Emulator, *, after: int = 0, limit: int | None = None) -> dict[str, Any]:
    """Requests with a number above `after`, oldest first; `dropped` are those that the journal forgot."""
    kept = [entry.as_dict() for entry in emulator.journal.entries if entry.number > after]
    return {
        "requests": kept if limit is None else kept[:limit],
        "total": emulator.journal.total,
        "dropped": emulator.journal.total - len(emulator.journal.entries),
    }


def control_routes(emulator: Emulator) -> APIRouter:
    """Routes that the vendor does not have; they are not journaled."""
    router = APIRouter(prefix="/_emulator")

    @router.get("")
    @router.get("/")
    async def about() -> Response:
        options = json.loads(emulator.options.model_dump_json(exclude={"api_keys"}))
        kinds = {endpoint: kinds_of(endpoint) for endpoint in ENDPOINTS}
        return JSONResponse({"what": "an emulator of the Eachlabs API", "options": options, "fault_kinds": kinds})

    @router.get("/tallies")
    async def tallies() -> Response:
        return JSONResponse(emulator.tallies())

    @router.get("/journal")
    async def journal(after: int = 0, limit: int | None = None) -> Response:
        return JSONResponse(journal_view(emulator, after=after, limit=limit))

    @router.get("/predictions")
    async def predictions() -> Response:
        return JSONResponse(emulator.predictions())

    @router.get("/faults")
    async def faults() -> Response:
        return JSONResponse([fault.model_dump(exclude_defaults=True) for fault in emulator.faults.faults])

    @router.post("/faults")
    async def set_faults(request: Request) -> Response:
        try:
            given = parse_faults((await read_json(request)).get("faults"))
        except BadBody as bad:
            return bad.answer
        except ValidationError as wrong:
            return error(400, "no such fault", "; ".join(fault["msg"] for fault in wrong.errors())[:1_000])
        except (TypeError, ValueError) as wrong:
            return error(400, "no such fault", str(wrong)[:1_000])
        emulator.faults.set(given)
        return JSONResponse({"faults": len(given)})

    @router.post("/foreign")
    async def foreign(request: Request) -> Response:
        """Another key of the organization buys `{model, version, input}`, `count` times."""
        try:
            body = await read_json(request)
            check_order(emulator, body)
        except BadBody as bad:
            return bad.answer
        count = body.get("count", 1)
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= 1_000:
            return error(400, "count must be an integer between 1 and 1000")
        jobs = [emulator.announce_foreign(body, base_url=base_url(request)) for _ in range(count)]
        return JSONResponse({"prediction_ids": [job.id for job in jobs]})

    @router.post("/reset")
    async def reset() -> Response:
        emulator.reset()
        return JSONResponse({"reset": True})

    return router
