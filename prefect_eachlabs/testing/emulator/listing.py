"""GET /v1/executions, the catalogue of models, and the webhooks that were never sent."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from prefect_eachlabs.testing.emulator import wire
from prefect_eachlabs.testing.emulator.catalogue import CATALOGUE
from prefect_eachlabs.testing.emulator.core import Emulator
from prefect_eachlabs.testing.emulator.faults import Fault
from prefect_eachlabs.testing.emulator.ledger import Job
from prefect_eachlabs.testing.emulator.responses import error
from prefect_eachlabs.testing.emulator.views import EXECUTION_STATUS, classification_of, execution_view, parse_date

STATUS_TOKENS = ("created", "starting", "success", "error")
CLASSIFICATIONS = (
    "content_moderation",
    "execution_timeout",
    "invalid_user_input",
    "invalid_model_config",
    "provider_auth",
    "provider_error",
    "provider_rate_limit",
    "provider_unavailable",
    "internal_error",
    "unknown",
)
_DEFAULT_WINDOW = timedelta(days=90)


class BadQuery(Exception):
    """A query parameter that the API refuses."""


def _number(request: Request, name: str, default: int, least: int, most: int) -> int:
    text = request.query_params.get(name)
    if text is None or text == "":
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= 12 and least <= int(text) <= most):
        raise BadQuery(f"{name} must be an integer between {least} and {most}")
    return int(text)


def _tokens(request: Request, name: str, known: tuple[str, ...]) -> frozenset[str]:
    tokens = frozenset(token for token in request.query_params.get(name, "").split(",") if token)
    if tokens - set(known):
        raise BadQuery(f"invalid {name}: each must be one of {', '.join(known)}")
    return tokens


class Query:
    """What a GET of executions asks for.

    Raises:
        BadQuery: Something is out of its bounds; says what may stand there.
    """

    def __init__(self, emulator: Emulator, request: Request, *, at: float) -> None:
        self.limit = _number(request, "limit", 20, 1, 100)
        self.offset = _number(request, "offset", 0, 0, 10**11)
        self.model = request.query_params.get("model") or None
        self.statuses = _tokens(request, "status", STATUS_TOKENS)
        self.classifications = _tokens(request, "error_classification", CLASSIFICATIONS)
        self.none = bool(request.query_params.get("workflow_id") or request.query_params.get("workflow_execution_id"))
        dates = {}
        for name in ("from", "to"):
            text = request.query_params.get(name)
            dates[name] = parse_date(text.replace(" ", "+")) if text else None
            if text and dates[name] is None:
                raise BadQuery(f"{name} must be an RFC 3339 date")
        until = dates["to"] or emulator.calendar.date(emulator.clock.now())
        try:
            self.begin = emulator.calendar.moment(dates["from"] or until - _DEFAULT_WINDOW)
        except OverflowError:
            self.begin = float("-inf")
        self.end = emulator.calendar.moment(until)
        self.at = at

    def matching(self, emulator: Emulator) -> Iterator[Job]:
        """Newest first, as the world was at the moment `at`."""
        for job in () if self.none else emulator.ledger.newest_first(emulator.clock.now()):
            if job.created < self.begin:
                break
            if job.created > min(self.end, self.at) or "unlisted" in job.faults:
                continue
            late = job.faults.get("listed_late")
            if late is not None and job.created + wire.seconds_of(late) > self.at:
                continue
            status = job.status_at(self.at)
            if self.model is not None and job.model != self.model:
                continue
            if self.statuses and EXECUTION_STATUS[status] not in self.statuses:
                continue
            if self.classifications and not (status == "failed" and classification_of(job) in self.classifications):
                continue
            yield job


def executions_page(emulator: Emulator, request: Request, faults: dict[str, Fault]) -> dict[str, Any]:
    """A page of the organization's history.

    Raises:
        BadQuery: The query is refused.
    """
    now, options = emulator.clock.now(), emulator.options
    stale = faults.get("stale")
    query = Query(emulator, request, at=now - (wire.seconds_of(stale) if stale else options.listing_delay_seconds))
    missing = faults.get("missing_rows")
    short = faults.get("short_pages") or faults.get("short_pages_untold")
    if short is not None:
        query.limit = min(query.limit, int(short.value or 50))
    page: list[Job] = []
    matched = 0
    counted_up_to = max(query.offset + query.limit, options.total_cap)
    for job in () if "empty_list" in faults else query.matching(emulator):
        if missing is not None and _is_missing(emulator, missing, job):
            continue
        matched += 1
        if query.offset < matched <= query.offset + query.limit:
            page.append(job)
        if matched > counted_up_to:
            break
    capped = matched > counted_up_to
    rows = [execution_view(job, emulator.model(job.model), options, emulator.calendar, at=query.at) for job in page]
    for row in rows:
        _rename(row, faults)
    said = {
        "executions": rows,
        "total_count": options.total_cap if capped else matched,
        "total_capped": capped,
        "offset": query.offset,
        "limit": query.limit,
    }
    return {"executions": rows} if "short_pages_untold" in faults else said


def _rename(row: dict[str, Any], faults: dict[str, Fault]) -> None:
    """Model, id and dates as faults have a row say them."""
    if (renamed := faults.get("other_model")) is not None:
        row["model"] = (renamed.value or "{model}-2.0-flash-exp").replace("{model}", row["model"])
    if "other_ids" in faults:
        row["id"] = f"exec_{row['id']}"
    if "naive_dates" in faults:
        for name in ("created_at", "started_at", "completed_at"):
            row[name] = row[name] and row[name].rstrip("Z")


def _is_missing(emulator: Emulator, fault: Fault, job: Job) -> bool:
    """By the row alone: a row that is missing stays missing, however often one asks."""
    rate = 1.0 if fault.rate is None else fault.rate
    if emulator.faults.random("missing_rows", job.number).random() >= rate:
        return False
    emulator.faults.injected[fault.name] += 1
    return True


def listing_routes(emulator: Emulator) -> APIRouter:
    """The routes that list things."""
    router = APIRouter()

    @router.get("/v1/executions")
    @router.get("/v1/executions/")
    async def executions(request: Request) -> Response:
        if (answer := await wire.before(emulator, request, "executions")) is not None:
            return answer
        faults = wire.drawn_after(emulator, request, "executions", subject="executions")
        if "missing" in faults:
            return error(404, "Not Found")
        try:
            page = executions_page(emulator, request, faults)
        except BadQuery as bad:
            return error(400, str(bad))
        return await wire.after(emulator, JSONResponse(page), faults)

    @router.get("/v1/models")
    @router.get("/v1/models/")
    async def models(request: Request) -> Response:
        if (answer := await wire.before(emulator, request, "models")) is not None:
            return answer
        try:
            limit = _number(request, "limit", 50, 1, 500)
            offset = _number(request, "offset", 0, 0, 10**11)
        except BadQuery as bad:
            return error(400, str(bad))
        wanted = request.query_params.get("name", "").lower()
        found = [
            model.view()
            for model in CATALOGUE.values()
            if wanted in model.slug.lower() or wanted in model.title.lower()
        ]
        faults = wire.drawn_after(emulator, request, "models")
        return await wire.after(emulator, JSONResponse(found[offset : offset + limit]), faults)

    @router.get("/v1/model")
    @router.get("/v1/model/")
    async def model(request: Request) -> Response:
        if (answer := await wire.before(emulator, request, "models")) is not None:
            return answer
        slug = request.query_params.get("slug")
        if not slug:
            return error(400, "slug parameter is required")
        found = emulator.model(slug)
        if found is None:
            return error(404, "Failed to fetch model: model not found")
        faults = wire.drawn_after(emulator, request, "models")
        return await wire.after(emulator, JSONResponse(found.view()), faults)

    @router.get("/v1/webhooks")
    async def webhooks(request: Request) -> Response:
        try:
            limit = _number(request, "limit", 50, 1, 100)
            offset = _number(request, "offset", 0, 0, 10**11)
        except BadQuery as bad:
            return error(400, str(bad))
        return JSONResponse({"webhooks": [], "limit": limit, "offset": offset, "total_count": 0})

    @router.get("/v1/webhooks/{execution_id}")
    async def webhook(execution_id: str) -> Response:
        return error(404, "webhook not found")

    return router
