"""POST, GET and cancel of predictions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from fastapi import APIRouter, Request
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

from prefect_eachlabs.testing.emulator import wire
from prefect_eachlabs.testing.emulator.core import Emulator
from prefect_eachlabs.testing.emulator.limits import throttled
from prefect_eachlabs.testing.emulator.responses import error
from prefect_eachlabs.testing.emulator.views import prediction_view

MAX_BODY_BYTES = 4 * 1024 * 1024


class BadBody(Exception):
    """The body is not what the contract asks for: the answer says what is wrong."""

    def __init__(self, message: str, details: object = None, *, status: int = 400) -> None:
        super().__init__(message)
        self.answer = error(status, message, details)


async def read_json(request: Request) -> dict[str, Any]:
    """The body as a JSON object of valid Unicode.

    Raises:
        BadBody: It is something else, or too long.
    """
    body = b""
    try:
        async for part in request.stream():
            body += part
            if len(body) > MAX_BODY_BYTES:
                raise BadBody("request body too large", status=413)
    except ClientDisconnect:
        raise BadBody("the client left before its body was read") from None
    try:
        read = json.loads(body)
        json.dumps(read, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        raise BadBody("invalid request body", "The body must be a JSON object of valid Unicode.") from None
    if not isinstance(read, dict):
        raise BadBody("invalid request body", "The body must be a JSON object.")
    return read


def base_url(request: Request) -> str:
    return str(request.base_url).rstrip("/")


def check_order(emulator: Emulator, body: Mapping[str, Any]) -> None:
    """Whether a POST is one that the API would take.

    Raises:
        BadBody: It is not; says which field and why.
    """
    if not isinstance(body.get("model"), str) or not body["model"].strip():
        raise BadBody("model is required")
    if not isinstance(body.get("input"), dict):
        raise BadBody("input is required", "input must be an object")
    version = body.get("version")
    if version is None and "version" not in body and emulator.options.require_version:
        raise BadBody("version is required")
    if "version" in body and not isinstance(version, str):
        raise BadBody("version must be a string")
    for name in ("webhook_url", "webhook_secret"):
        if name in body and (not isinstance(body[name], str) or not body[name]):
            raise BadBody(f"{name} must be a string that is not empty, or left out")
    if "webhook_url" in body and urlsplit(body["webhook_url"]).scheme not in ("http", "https"):
        raise BadBody("webhook_url must be an http(s) URL")
    if emulator.options.strict_models:
        model = emulator.model(body["model"])
        if model is None:
            raise BadBody("Failed to fetch model: model not found", status=404)
        if faults := model.faults_of(body["input"]):
            raise BadBody("input does not match the model's request_schema", faults)


async def _create(emulator: Emulator, request: Request) -> Response:
    """From the body to the answer; what is accepted is billed whatever becomes of the answer."""
    entry = wire.entry_of(request)
    try:
        body = await read_json(request)
    except BadBody as bad:
        return bad.answer
    prompt = body["input"].get("prompt") if isinstance(body.get("input"), dict) else ""
    text = prompt if isinstance(prompt, str) else ""
    if (answer := await wire.before(emulator, request, "create", text=text)) is not None:
        return answer
    try:
        check_order(emulator, body)
    except BadBody as bad:
        return bad.answer
    key = entry.key or ""
    if (refused := _over_the_account(emulator, key)) is not None:
        return refused
    job = emulator.accept(body, key=key, secret=wire.secret_of(request), base_url=base_url(request))
    entry.prediction_id = job.id
    faults = wire.drawn_after(emulator, request, "create", text=text, subject=job.id)
    created: dict[str, Any] = {"status": "success", "message": "Prediction created successfully"}
    if "no_id" not in faults:
        renamed = faults.get("id_name")
        created[(renamed.value or "prediction_id") if renamed else "predictionID"] = job.id
    return await wire.after(emulator, JSONResponse(created), faults)


async def _get(emulator: Emulator, request: Request, prediction_id: str) -> Response:
    """Where a prediction stands; held until its end with long polling."""
    entry = wire.entry_of(request)
    entry.prediction_id = prediction_id
    job = emulator.ledger.get(prediction_id, emulator.clock.now())
    text = job.prompt if job else ""
    if (answer := await wire.before(emulator, request, "get", text=text)) is not None:
        return answer
    if job is None:
        return error(404, "Prediction not found")
    await emulator.hold(job)
    faults = wire.drawn_after(emulator, request, "get", text=text, subject=job.id)
    now = emulator.clock.now()
    if (lost := faults.get("not_found")) is not None and (lost.seconds is None or now < job.created + lost.seconds):
        return error(404, "Prediction not found")
    stale = faults.get("stale")
    at = max(job.created, now - wire.seconds_of(stale, 5.0)) if stale else now
    view = prediction_view(job, emulator.model(job.model), emulator.options, at=at)
    if (unknown := faults.get("status_word")) is not None:
        view["status"] = unknown.value or "warming_up"
    if "no_echo" in faults:
        view.pop("input", None)
    return await wire.after(emulator, JSONResponse(view), faults)


async def _cancel(emulator: Emulator, request: Request, prediction_id: str) -> Response:
    """Accepted always; whether it had an effect, GET says."""
    wire.entry_of(request).prediction_id = prediction_id
    job = emulator.ledger.get(prediction_id, emulator.clock.now())
    text = job.prompt if job else ""
    if (answer := await wire.before(emulator, request, "cancel", text=text)) is not None:
        return answer
    if job is None:
        return error(404, "Prediction not found")
    emulator.cancel(job)
    faults = wire.drawn_after(emulator, request, "cancel", text=text, subject=job.id)
    said = {"status": "cancelled", "message": "Prediction canceled successfully", "predictionID": job.id}
    return await wire.after(emulator, JSONResponse(said), faults)


def _over_the_account(emulator: Emulator, key: str) -> Response | None:
    """429 or 402 when the account's predictions in flight or its balance leave no place for one more."""
    options, now = emulator.options, emulator.clock.now()
    in_flight = emulator.ledger.in_flight(key, now)
    if options.max_in_flight is not None and in_flight >= options.max_in_flight:
        emulator.journal.violations["over_max_in_flight"] += 1
        next_end = emulator.ledger.next_end(key, now)
        return throttled(
            f"Concurrent prediction limit reached: {in_flight} predictions are in flight and at most "
            f"{options.max_in_flight} may be. Wait until one has ended.",
            emulator=emulator,
            wait_seconds=1.0 if next_end is None else next_end - now,
        )
    if options.balance_usd is not None and emulator.ledger.owed_usd(now) + options.cost_usd > options.balance_usd:
        return wire.no_balance()
    return None


def prediction_routes(emulator: Emulator) -> APIRouter:
    """The routes of predictions, each with and without its last slash."""
    router = APIRouter()

    @router.post("/v1/prediction")
    @router.post("/v1/prediction/")
    async def create(request: Request) -> Response:
        return await _create(emulator, request)

    @router.post("/v1/prediction/run")
    async def run(request: Request) -> Response:
        try:
            await read_json(request)
        except BadBody as bad:
            return bad.answer
        return error(400, "this model does not support synchronous execution")

    @router.get("/v1/prediction/{prediction_id}")
    @router.get("/v1/prediction/{prediction_id}/")
    async def get(request: Request, prediction_id: str) -> Response:
        return await _get(emulator, request, prediction_id)

    @router.post("/v1/prediction/{prediction_id}/cancel")
    @router.post("/v1/prediction/{prediction_id}/cancel/")
    async def cancel(request: Request, prediction_id: str) -> Response:
        return await _cancel(emulator, request, prediction_id)

    return router
