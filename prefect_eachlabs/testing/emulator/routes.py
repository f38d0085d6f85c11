"""The API's routes: predictions, executions, models, files and uploads; and the judge's own, under /_emulator."""

from __future__ import annotations

import hmac
import json
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

from pydantic import ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from prefect_eachlabs.testing.emulator.clock import parse_date, rfc3339
from prefect_eachlabs.testing.emulator.faults import ENDPOINTS, Endpoint, Fault, kinds_of, parse_faults
from prefect_eachlabs.testing.emulator.outputs import MEDIA_TYPES
from prefect_eachlabs.testing.emulator.pictures import redirected_again, spoil
from prefect_eachlabs.testing.emulator.predictions import Job, execution_view, prediction_view
from prefect_eachlabs.testing.emulator.responses import (
    answer_instead,
    error,
    no_balance,
    spoilt,
    throttled,
    xml_error,
)
from prefect_eachlabs.testing.emulator.state import MAX_UPLOAD_BYTES, MODELS, Emulator, Entry, objections

ENTRY = "prefect_eachlabs.testing.emulator.entry"
"""Where the ASGI scope carries the journal's entry of the request."""
KEY = "prefect_eachlabs.testing.emulator.key"
"""Where it carries the API key in clear, for the faults that quote it; the journal knows its hash alone."""

Handler = Callable[[Request], Awaitable[Response]]

MAX_BODY_BYTES = 4 * 1024 * 1024
RETENTION_SECONDS = 180 * 86_400
_DEFAULT_WINDOW = timedelta(days=90)
_OTHER_FILTERS = {"status", "error_classification", "workflow_id", "workflow_execution_id"}
"""The vendor's filters of executions that the emulator does not have."""
_ENDINGS = "|".join(MEDIA_TYPES)
_ENDINGS = "|".join(MEDIA_TYPES)
_OUTPUT = re.compile(r"([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})(?:-([0-9]{1,2}))?\.(" + _ENDINGS + ")")


class Refused(Exception):
    """The request is not what the contract asks for: the answer says what is wrong."""

    def __init__(self, message: str, details: object = None, *, status: int = 400) -> None:
        super().__init__(message)
        self.answer = error(status, message, details)


async def read_json(request: Request) -> dict[str, Any]:
    """The body as a JSON object of valid Unicode.

    Raises:
        Refused: It is something else, or too long.
    """
    body = b""
    try:
        async for part in request.stream():
            body += part
            if len(body) > MAX_BODY_BYTES:
                raise Refused("request body too large", status=413)
    except ClientDisconnect:
        raise Refused("the client left before its body was read") from None
    try:
        read = json.loads(body)
        json.dumps(read, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        raise Refused("invalid request body", "The body must be a JSON object of valid Unicode.") from None
    if not isinstance(read, dict):
        raise Refused("invalid request body", "The body must be a JSON object.")
    return read


def number_of(request: Request, name: str, default: int, least: int, most: int) -> int:
    """A number of the query. Raises Refused when it is out of bounds."""
    text = request.query_params.get(name)
    if text is None or text == "":
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= 12 and least <= int(text) <= most):
        raise Refused(f"{name} must be an integer between {least} and {most}")
    return int(text)


def base_url(request: Request) -> str:
    return str(request.base_url).rstrip("/")


def entry_of(request: Request) -> Entry:
    entry: Entry = request.scope[ENTRY]
    return entry


def note(request: Request, fault: Fault) -> None:
    """Writes the fault into the journal, beside any that hit the request already."""
    entry = entry_of(request)
    entry.fault = fault.name if entry.fault is None else f"{entry.fault} {fault.name}"


class Routes:
    """Collects routes, each with and without its last slash. A GET is answered to HEAD, too."""

    def __init__(self) -> None:
        self.all: list[Route] = []

    def on(self, method: str, path: str) -> Callable[[Handler], Handler]:
        def add(handler: Handler) -> Handler:
            self.all += [Route(one, handler, methods=[method]) for one in (path, f"{path}/")]
            return handler

        return add


class Call:
    """A request to an endpoint that knows faults: `before` it takes effect, and its answer `after` it did."""

    def __init__(self, emulator: Emulator, request: Request, endpoint: Endpoint) -> None:
        self._emulator, self._request, self._endpoint = emulator, request, endpoint
        self.text = ""
        """The prompt that it is about."""
        self.faults: dict[str, Fault] = {}

    async def before(self) -> Response | None:
        """The answer of a fault that keeps it from taking effect; None: go on."""
        path = self._request.url.path
        subject = self.text if self._endpoint == "create" else path
        fault = self._emulator.faults.draw(self._endpoint, "before", text=self.text, subject=subject)
        if fault is None:
            return None
        note(self._request, fault)
        return await answer_instead(fault, self._emulator, path=path, key=str(self._request.scope.get(KEY, "")))

    def took_effect(self, subject: str = "") -> dict[str, Fault]:
        """Draws the faults that hit it after it took effect, by kind."""
        hits = self._emulator.faults.draw_all(self._endpoint, "after", text=self.text, subject=subject)
        for fault in hits:
            note(self._request, fault)
        self.faults = {fault.kind: fault for fault in hits}
        return self.faults

    async def after(self, answer: Response) -> Response:
        return await spoilt(answer, self.faults, self._emulator.clock)


# ------------------------------------------------------------------------- predictions


def check_order(emulator: Emulator, body: Mapping[str, Any]) -> None:
    """Whether a POST is one that the API would take.

    Raises:
        Refused: It is not; says which field and why.
    """
    if not isinstance(body.get("model"), str) or not body["model"].strip():
        raise Refused("model is required")
    if not isinstance(body.get("input"), dict):
        raise Refused("input is required", "input must be an object")
    if "version" not in body and emulator.options.require_version:
        raise Refused("version is required")
    if "version" in body and not isinstance(body["version"], str):
        raise Refused("version must be a string")
    for name in ("webhook_url", "webhook_secret"):
        if name in body and (not isinstance(body[name], str) or not body[name]):
            raise Refused(f"{name} must be a string that is not empty, or left out")
    if "webhook_url" in body and urlsplit(body["webhook_url"]).scheme not in ("http", "https"):
        raise Refused("webhook_url must be an http(s) URL")
    if emulator.options.strict_models:
        model = MODELS.get(body["model"])
        if model is None:
            raise Refused("Failed to fetch model: model not found", status=404)
        if wrong := objections(model, body["input"]):
            raise Refused("input does not match the model's request_schema", wrong)


def over_the_account(emulator: Emulator, key: str) -> Response | None:
    """429 or 402 when the account's predictions in flight or its balance leave no slot for one more."""
    options, now = emulator.options, emulator.clock.now()
    in_flight = emulator.ledger.in_flight(key, now)
    if options.max_in_flight is not None and in_flight >= options.max_in_flight:
        emulator.journal.violations["over_max_in_flight"] += 1
        next_end = emulator.ledger.next_end(key)
        return throttled(
            f"Concurrent prediction limit reached: {in_flight} predictions are in flight and at most "
            f"{options.max_in_flight} may be. Wait until one has ended.",
            emulator=emulator,
            wait_seconds=1.0 if next_end is None else next_end - now,
        )
    if options.balance_usd is not None and emulator.ledger.owed_usd(now) + options.cost_usd > options.balance_usd:
        return no_balance()
    return None


def prediction_routes(emulator: Emulator, routes: Routes) -> None:
    @routes.on("POST", "/v1/prediction")
    async def create(request: Request) -> Response:
        """What is accepted is billed, whatever becomes of the answer."""
        entry, call = entry_of(request), Call(emulator, request, "create")
        body = await read_json(request)
        prompt = body["input"].get("prompt") if isinstance(body.get("input"), dict) else None
        call.text = prompt if isinstance(prompt, str) else ""
        if (answer := await call.before()) is not None:
            return answer
        check_order(emulator, body)
        if (refused := over_the_account(emulator, entry.key or "")) is not None:
            return refused
        secret = str(request.scope.get(KEY, ""))
        job = emulator.accept(body, key=entry.key or "", secret=secret, base_url=base_url(request))
        entry.prediction_id = job.id
        faults = call.took_effect(job.id)
        created: dict[str, Any] = {"status": "success", "message": "Prediction created successfully"}
        if "no_id" not in faults:
            renamed = faults.get("id_name")
            created[(renamed.value or "prediction_id") if renamed else "predictionID"] = job.id
        return await call.after(JSONResponse(created))

    async def called(request: Request, endpoint: Endpoint) -> tuple[Call, Job | Response]:
        """A question about a prediction: the prediction, or what is answered instead."""
        prediction_id = str(request.path_params["prediction_id"])
        entry_of(request).prediction_id = prediction_id
        call, job = Call(emulator, request, endpoint), emulator.ledger.get(prediction_id, emulator.clock.now())
        call.text = job.prompt if job else ""
        answer = await call.before()
        return call, answer or job or error(404, "Prediction not found")

    @routes.on("GET", "/v1/prediction/{prediction_id}")
    async def get(request: Request) -> Response:
        """Where a prediction stands; held until its end with long polling."""
        call, job = await called(request, "get")
        if isinstance(job, Response):
            return job
        await emulator.hold(job)
        faults, now = call.took_effect(job.id), emulator.clock.now()
        lost, stale = faults.get("not_found"), faults.get("stale")
        if lost is not None and (lost.seconds is None or now < job.created + lost.seconds):
            return error(404, "Prediction not found")
        at = now if stale is None else max(job.created, now - (5.0 if stale.seconds is None else stale.seconds))
        view = prediction_view(job, emulator.options, at=at)
        if (unknown := faults.get("status_word")) is not None:
            view["status"] = unknown.value or "warming_up"
        if "no_echo" in faults:
            view.pop("input", None)
        return await call.after(JSONResponse(view))

    @routes.on("POST", "/v1/prediction/{prediction_id}/cancel")
    async def cancel(request: Request) -> Response:
        """Accepted always; whether it had an effect, GET says."""
        call, job = await called(request, "cancel")
        if isinstance(job, Response):
            return job
        emulator.cancel(job)
        call.took_effect(job.id)
        said = {"status": "cancelled", "message": "Prediction canceled successfully", "predictionID": job.id}
        return await call.after(JSONResponse(said))


# ------------------------------------------------------------------------- lists


def executions_page(emulator: Emulator, request: Request, faults: Mapping[str, Fault]) -> dict[str, Any]:
    """A page of the organization's history, newest first.

    Raises:
        Refused: Something of the query is out of its bounds.
    """
    limit, offset = number_of(request, "limit", 20, 1, 100), number_of(request, "offset", 0, 0, 10**11)
    stale, missing = faults.get("stale"), faults.get("missing_rows")
    short = faults.get("short_pages") or faults.get("short_pages_untold")
    if short is not None:
        limit = min(limit, int(short.value or 50))
    at = emulator.clock.now() - (stale.wait_seconds if stale else emulator.options.listing_delay_seconds)
    page: list[Job] = []
    matched, counted_up_to = 0, max(offset + limit, emulator.options.total_cap)
    for job in () if "empty_list" in faults else _listed(emulator, request, at=at):
        if missing is not None and _is_missing(emulator, missing, job):
            continue
        matched += 1
        if offset < matched <= offset + limit:
            page.append(job)
        if matched > counted_up_to:
            break
    capped = matched > counted_up_to
    rows = [_as_said(execution_view(job, emulator.options, emulator.clock, at=at), faults) for job in page]
    if "short_pages_untold" in faults:
        return {"executions": rows}
    total = emulator.options.total_cap if capped else matched
    return {"executions": rows, "total_count": total, "total_capped": capped, "offset": offset, "limit": limit}


def _listed(emulator: Emulator, request: Request, *, at: float) -> Iterator[Job]:
    """What the list shows at a moment, of a model and between two dates if asked so."""
    if other := sorted(_OTHER_FILTERS & set(request.query_params)):
        raise Refused(f"the emulator does not filter by {other[0]}", status=501)
    clock, now = emulator.clock, emulator.clock.now()
    dates = {}
    for name in ("from", "to"):
        text = request.query_params.get(name)
        dates[name] = parse_date(text) if text else None
        if text and dates[name] is None:
            raise Refused(f"{name} must be an RFC 3339 date")
    until = dates["to"] or clock.date(now)
    model, end = request.query_params.get("model"), min(clock.moment(until), at)
    try:
        begin = clock.moment(dates["from"] or until - _DEFAULT_WINDOW)
    except OverflowError:
        begin = float("-inf")
    for job in emulator.ledger.newest_first(now):
        if job.created < begin:
            break
        late = job.faults.get("listed_late")
        seen_from = job.created + (late.wait_seconds if late is not None else 0.0)
        if job.created <= end and seen_from <= at and "unlisted" not in job.faults and model in (None, "", job.model):
            yield job


def _is_missing(emulator: Emulator, fault: Fault, job: Job) -> bool:
    """By the row alone: a row that is missing stays missing, however often one asks."""
    rate = 1.0 if fault.rate is None else fault.rate
    if emulator.faults.random("missing_rows", job.number).random() >= rate:
        return False
    emulator.faults.injected[fault.name] += 1
    return True


def _as_said(row: dict[str, Any], faults: Mapping[str, Fault]) -> dict[str, Any]:
    """A row with model, id and dates as faults have it say them."""
    if (renamed := faults.get("other_model")) is not None:
        row["model"] = (renamed.value or "{model}-2.0-flash-exp").replace("{model}", row["model"])
    if "other_ids" in faults:
        row["id"] = f"exec_{row['id']}"
    if "naive_dates" in faults:
        for name in ("created_at", "started_at", "completed_at"):
            row[name] = row[name] and row[name].rstrip("Z")
    return row


def list_routes(emulator: Emulator, routes: Routes) -> None:
    @routes.on("GET", "/v1/executions")
    async def executions(request: Request) -> Response:
        call = Call(emulator, request, "executions")
        if (answer := await call.before()) is not None:
            return answer
        faults = call.took_effect("executions")
        if "missing" in faults:
            return error(404, "Not Found")
        return await call.after(JSONResponse(executions_page(emulator, request, faults)))

    @routes.on("GET", "/v1/webhooks")
    async def webhooks(request: Request) -> Response:
        call = Call(emulator, request, "webhooks")
        if (answer := await call.before()) is not None:
            return answer
        limit, offset = number_of(request, "limit", 20, 1, 100), number_of(request, "offset", 0, 0, 10**11)
        call.took_effect()
        if emulator.options.webhooks == "none":
            return error(404, "Not Found")
        return await call.after(JSONResponse(emulator.webhooks.page(limit=limit, offset=offset)))

    @routes.on("GET", "/v1/webhooks/{execution_id}")
    async def webhook(request: Request) -> Response:
        found = emulator.webhooks.one(str(request.path_params["execution_id"]))
        return error(404, "Webhook not found") if found is None else JSONResponse(found)

    @routes.on("GET", "/v1/models")
    async def models(request: Request) -> Response:
        call = Call(emulator, request, "models")
        if (answer := await call.before()) is not None:
            return answer
        limit, offset = number_of(request, "limit", 50, 1, 500), number_of(request, "offset", 0, 0, 10**11)
        wanted = request.query_params.get("name", "").lower()
        found = [model for model in MODELS.values() if wanted in f"{model['slug']} {model['title']}".lower()]
        call.took_effect()
        return await call.after(JSONResponse(found[offset : offset + limit]))

    @routes.on("GET", "/v1/model")
    async def model(request: Request) -> Response:
        call = Call(emulator, request, "models")
        if (answer := await call.before()) is not None:
            return answer
        slug = request.query_params.get("slug")
        if not slug:
            return error(400, "slug parameter is required")
        if slug not in MODELS:
            return error(404, "Failed to fetch model: model not found")
        call.took_effect()
        return await call.after(JSONResponse(MODELS[slug]))


# ------------------------------------------------------------------------- files


def presign_objection(body: Mapping[str, object]) -> str | None:
    """What is wrong with the body of a presign request, if anything."""
    content_type, seconds = body.get("content_type"), body.get("expires_in_seconds", RETENTION_SECONDS)
    if not isinstance(content_type, str) or not re.fullmatch(r"[a-z0-9.+-]+/[a-z0-9.+-]+", content_type, re.I):
        return "content_type is required"
    if body.get("file_type", "image") not in ("image", "video", "audio", "other"):
        return "file_type must be one of image, video, audio, other"
    return None if type(seconds) is int else "expires_in_seconds must be an integer"


async def _upload_body(request: Request) -> bytes | None:
    """None: it is longer than 100 MB."""
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size <= MAX_UPLOAD_BYTES:
            parts.append(part)
    return b"".join(parts) if size <= MAX_UPLOAD_BYTES else None


def file_routes(emulator: Emulator, routes: Routes) -> None:
    @routes.on("GET", "/files/{name}")
    async def download(request: Request) -> Response:
        name = str(request.path_params["name"])
        match, now = _OUTPUT.fullmatch(name), emulator.clock.now()
        job = emulator.ledger.get(match[1], now) if match else None
        number = int(match[2] or 1) if match else 1
        if match is None or job is None or job.status_at(now) != "success" or not 1 <= number <= job.pictures:
            return error(404, "Not Found")
        entry_of(request).prediction_id = job.id
        path, hop = request.url.path, request.query_params.get("hop", "")
        if (again := redirected_again(path, hop)) is not None:
            return again
        media_type = MEDIA_TYPES[match[3]]
        picture = await emulator.pictures.picture(job, number, match[3])
        if request.method == "HEAD":
            return Response(headers={"content-length": str(len(picture))}, media_type=media_type)
        emulator.downloads += 1
        fault = None if hop else emulator.faults.draw("picture", text=job.prompt, subject=name)
        if fault is None:
            return Response(picture, media_type=media_type)
        note(request, fault)
        return spoil(picture, media_type, fault, emulator.clock, path=path)

    @routes.on("POST", "/v1/upload/presign")
    async def presign(request: Request) -> Response:
        call = Call(emulator, request, "presign")
        if (answer := await call.before()) is not None:
            return answer
        body = await read_json(request)
        if (wrong := presign_objection(body)) is not None:
            return error(400, wrong)
        upload = emulator.uploads.presign(str(body["content_type"]))
        kept_seconds = min(max(int(str(body.get("expires_in_seconds", RETENTION_SECONDS))), 60), 31_536_000)
        base = emulator.options.public_url or base_url(request)
        said = {
            "id": upload.id,
            "presigned_url": f"{base}/storage/uploads/{upload.id}?X-Amz-Expires=900&X-Amz-Signature={upload.signature}",
            "public_url": f"{base}/uploads/{upload.name}",
            "expires_at": rfc3339(emulator.clock.date(emulator.clock.now()) + timedelta(seconds=kept_seconds)),
            "required_headers": upload.required_headers,
        }
        call.took_effect()
        return await call.after(JSONResponse(said))

    @routes.on("PUT", "/storage/uploads/{upload_id}")
    async def put(request: Request) -> Response:
        call = Call(emulator, request, "upload")
        if (answer := await call.before()) is not None:
            return answer
        upload = emulator.uploads.get(str(request.path_params["upload_id"]))
        signature = request.query_params.get("X-Amz-Signature", "")
        if upload is None or not hmac.compare_digest(signature.encode(), upload.signature.encode()):
            return xml_error(403, "SignatureDoesNotMatch")
        if any(request.headers.getlist(name) != [value] for name, value in upload.required_headers.items()):
            return xml_error(403, "SignatureDoesNotMatch")
        try:
            body = await _upload_body(request)
        except ClientDisconnect:
            return xml_error(400, "IncompleteBody")
        if body is None:
            return xml_error(400, "EntityTooLarge")
        emulator.uploads.receive(upload, body)
        call.took_effect()
        return await call.after(Response(headers={"etag": f'"{upload.id}"'}))

    @routes.on("GET", "/uploads/{name}")
    async def uploaded(request: Request) -> Response:
        name = str(request.path_params["name"])
        upload = emulator.uploads.get(name.partition(".")[0])
        if upload is None or upload.body is None or name != upload.name:
            return xml_error(404, "NoSuchKey")
        return Response(upload.body, media_type=upload.content_type)


# ------------------------------------------------------------------------- the judge


def judge_routes(emulator: Emulator, routes: Routes) -> None:
    """Routes that the vendor does not have; they are not journaled."""

    @routes.on("GET", "/_emulator")
    async def about(_: Request) -> Response:
        options = json.loads(emulator.options.model_dump_json(exclude={"api_keys"}))
        kinds = {endpoint: kinds_of(endpoint) for endpoint in ENDPOINTS}
        return JSONResponse({"what": "an emulator of the Eachlabs API", "options": options, "fault_kinds": kinds})

    @routes.on("GET", "/_emulator/tallies")
    async def tallies(_: Request) -> Response:
        return JSONResponse(emulator.tallies())

    @routes.on("GET", "/_emulator/journal")
    async def journal(request: Request) -> Response:
        after, limit = (number_of(request, name, 0, 0, 10**11) for name in ("after", "limit"))
        return JSONResponse(emulator.journal.view(after=after, limit=limit or None))

    @routes.on("GET", "/_emulator/predictions")
    async def predictions(_: Request) -> Response:
        return JSONResponse(emulator.predictions())

    @routes.on("GET", "/_emulator/faults")
    async def faults(_: Request) -> Response:
        return JSONResponse([fault.model_dump(exclude_defaults=True) for fault in emulator.faults.faults])

    @routes.on("POST", "/_emulator/faults")
    async def set_faults(request: Request) -> Response:
        try:
            given = parse_faults((await read_json(request)).get("faults"))
        except ValidationError as wrong:
            return error(400, "no such fault", "; ".join(fault["msg"] for fault in wrong.errors())[:1_000])
        except ValueError as wrong:
            return error(400, "no such fault", str(wrong)[:1_000])
        emulator.faults.set(given)
        return JSONResponse({"faults": len(given)})

    @routes.on("POST", "/_emulator/foreign")
    async def foreign(request: Request) -> Response:
        """Another key of the organization buys `{model, version, input}`, `count` times."""
        body = await read_json(request)
        check_order(emulator, body)
        count = body.get("count", 1)
        if type(count) is not int or not 1 <= count <= 1_000:
            return error(400, "count must be an integer between 1 and 1000")
        jobs = [emulator.announce_foreign(body, base_url=base_url(request)) for _ in range(count)]
        return JSONResponse({"prediction_ids": [job.id for job in jobs]})

    @routes.on("POST", "/_emulator/reset")
    async def reset(_: Request) -> Response:
        emulator.reset()
        return JSONResponse({"reset": True})


def routes_of(emulator: Emulator) -> list[Route]:
    routes = Routes()
    for add in (prediction_routes, list_routes, file_routes, judge_routes):
        add(emulator, routes)
    return routes.all
