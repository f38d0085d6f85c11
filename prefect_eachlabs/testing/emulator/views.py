"""A prediction as the vendor's answers show it: GET by id, and a row of executions."""

from __future__ import annotations

import html
import json
import re
import unicodedata
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any
from urllib.parse import quote, urlsplit

from prefect_eachlabs.testing.emulator.catalogue import Model
from prefect_eachlabs.testing.emulator.clock import Calendar, rfc3339
from prefect_eachlabs.testing.emulator.ledger import Job, cost_of
from prefect_eachlabs.testing.emulator.options import EmulatorOptions
from prefect_eachlabs.testing.emulator.wire import seconds_of

EXECUTION_STATUS = {
    "starting": "created",
    "processing": "starting",
    "success": "success",
    "failed": "error",
    "cancelled": "cancelled",
}
"""The word of GET by id → the word of executions, which has a vocabulary of its own."""

_FAILURES = {
    "fail": ("PROVIDER_FAILED", "The provider could not make the picture.", False, "provider_error"),
    "fail_retryable": ("PROVIDER_UNAVAILABLE", "The provider is overloaded.", True, "provider_unavailable"),
    "fail_logs": ("PROVIDER_FAILED", "The provider could not make the picture.", False, "provider_error"),
    "fail_moderation": (
        "CONTENT_MODERATION",
        "The request was refused by the provider's safety system.",
        False,
        "content_moderation",
    ),
    "fail_under_success": ("PROVIDER_FAILED", "The provider returned no picture.", False, "provider_error"),
    "key_in_error": ("PROVIDER_FAILED", "Upstream refused the header X-API-Key: {key}", False, "provider_auth"),
    "fail_input": ("INVALID_INPUT", "The reference picture could not be fetched.", False, "invalid_user_input"),
}


def classification_of(job: Job) -> str | None:
    """The vendor's word for why it failed."""
    if job.failure is None:
        return None
    return _FAILURES[job.failure][3] if job.failure in _FAILURES else "unknown"


def envelope(job: Job) -> dict[str, Any]:
    """The error envelope of a failed prediction."""
    code, message, retryable, category = _FAILURES.get(job.failure or "fail", _FAILURES["fail"])
    fault = job.faults.get(job.failure or "fail")
    return {
        "error_code": fault.value if fault is not None and fault.value else code,
        "error_message": message.replace("{key}", job.secret),
        "retryable": retryable,
        "error_step": "provider",
        "classification": {"category": category, "source": "provider"},
    }


def picture_urls(job: Job, options: EmulatorOptions) -> list[str]:
    suffix = job.input.get("output_format") if job.input.get("output_format") in ("jpeg", "webp", "gif") else "png"
    query = options.picture_query
    if "key_in_output" in job.faults:
        query += f"{'&' if '?' in query else '?'}api_key={quote(job.secret, safe='')}"
    names = [job.id if number == 1 else f"{job.id}-{number}" for number in range(1, job.pictures + 1)]
    return [f"{job.base_url}/files/{name}.{suffix}{query}" for name in names]


def output_of(job: Job, model: Model | None, options: EmulatorOptions) -> object:
    """What a prediction that succeeded puts out, in the shape that its model or a fault asks for."""
    urls = picture_urls(job, options)
    if "output_empty" in job.faults:
        return ""
    if "output_null" in job.faults:
        return None
    if "output_object" in job.faults:
        return {"url": urls[0], "content_type": "image/png"}
    if "output_images" in job.faults:
        return {"images": [{"url": url, "content_type": "image/png"} for url in urls], "seed": job.number}
    if "output_json" in job.faults:
        return json.dumps({"images": urls})
    if "output_list" in job.faults or len(urls) > 1 or (model is not None and model.output_type == "array"):
        return urls
    return urls[0]


def _normalised(value: object) -> object:
    if isinstance(value, str):
        return re.sub(r"\s+", " ", unicodedata.normalize("NFC", value)).strip()
    if isinstance(value, Mapping):
        return {name: _normalised(inner) for name, inner in value.items()}
    return [_normalised(inner) for inner in value] if isinstance(value, list) else value


def echo_of(job: Job, model: Model | None) -> object:
    """The input as the API gives it back."""
    if "echo_normalised" in job.faults:
        return _normalised(job.input)
    if "echo_defaults" in job.faults:
        return {**(model.defaults if model else {}), "num_outputs": 1, "safety_tolerance": 2, **job.input}
    if "echo_text" in job.faults:
        return json.dumps(job.input)
    if (cut := job.faults.get("echo_cut")) is not None:
        return _with_texts(job.input, lambda text: text[: int(cut.value or 1_000)])
    if "echo_escaped" in job.faults:
        return _with_texts(job.input, html.escape)
    if "echo_rehosted" in job.faults:
        return _with_texts(job.input, _rehosted)
    if "echo_without_nulls" in job.faults:
        return {name: value for name, value in job.input.items() if value is not None}
    return job.input


def _with_texts(value: object, change: Callable[[str], str]) -> object:
    """The same with each text changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {name: _with_texts(inner, change) for name, inner in value.items()}
    return [_with_texts(inner, change) for inner in value] if isinstance(value, list) else value


def _rehosted(text: str) -> str:
    """The URL of the vendor's own copy of what another URL leads to."""
    parts = urlsplit(text)
    return f"https://storage.eachlabs.example{parts.path}" if parts.scheme in ("http", "https") else text


def cost_at(job: Job, options: EmulatorOptions, at: float) -> float:
    """The cost as it is told at a moment: 0 until it has settled."""
    late = job.faults.get("late_cost")
    settled = job.end + (seconds_of(late) if late is not None else options.settle_seconds)
    return cost_of(job, at) if job.ended_at(at) and at >= settled else 0


def output_is_there(job: Job, at: float) -> bool:
    late = job.faults.get("late_output")
    return late is None or at >= job.end + seconds_of(late)


def prediction_view(job: Job, model: Model | None, options: EmulatorOptions, *, at: float) -> dict[str, Any]:
    """The body of GET /v1/prediction/{id} at a moment."""
    status = job.status_at(at)
    ended = status in ("success", "failed", "cancelled")
    view: dict[str, Any] = {
        "id": job.id,
        "input": echo_of(job, model),
        "status": status,
        "output": "",
        "logs": None,
        "metrics": {
            "predict_time": round(max(0.0, (job.end if ended else at) - job.created), 3),
            "cost": cost_at(job, options, at),
        },
        "urls": {
            "cancel": f"{job.base_url}/v1/prediction/{job.id}/cancel",
            "get": f"{job.base_url}/v1/prediction/{job.id}",
        },
    }
    if status == "success":
        view["output"] = output_of(job, model, options) if job.failure is None else envelope(job)
        if not output_is_there(job, at):
            view["output"] = None
    elif status == "failed" and job.failure == "fail_logs":
        view["logs"] = json.dumps(envelope(job))
    elif status == "failed" and job.failure == "fail_text":
        view["logs"] = "Traceback: the model ran out of memory"
    elif status == "failed":
        view["output"] = envelope(job)
    if "key_in_logs" in job.faults:
        view["logs"] = f"{view['logs'] or ''}POST /generate X-API-Key: {job.secret}"
    if "echo_none" in job.faults:
        del view["input"]
    if status == "success" and "output_missing" in job.faults:
        del view["output"]
    return view


def execution_view(
    job: Job, model: Model | None, options: EmulatorOptions, calendar: Calendar, *, at: float
) -> dict[str, Any]:
    """A row of GET /v1/executions at a moment: no input, and one output at most."""
    status = job.status_at(at)
    ended = status in ("success", "failed", "cancelled")
    there = status == "success" and job.failure is None and output_is_there(job, at)
    output = output_of(job, model, options) if there else None

    def date(moment: float) -> str | None:
        return rfc3339(calendar.date(moment)) if moment <= at else None

    return {
        "id": job.id,
        "model": job.model,
        "requested_model": None,
        "status": EXECUTION_STATUS[status],
        "workflow_id": None,
        "workflow_execution_id": None,
        "execution_cost": cost_at(job, options, at),
        "run_time": round(job.end - job.created, 3) if ended else 0,
        "created_at": date(job.created),
        "started_at": date(min(job.started, job.end)),
        "completed_at": date(job.end) if ended else None,
        "output": picture_urls(job, options)[0] if output else None,
    }


def parse_date(text: str) -> datetime | None:
    """An RFC 3339 date; None when it is none."""
    # Python 3.10 reads neither Z nor a fraction of other than three or six digits.
    six_digits = re.sub(r"\.(\d+)", lambda fraction: f".{fraction[1][:6]:0<6}", text.strip())
    try:
        date = datetime.fromisoformat(re.sub(r"[zZ]$", "+00:00", six_digits))
    except ValueError:
        return None
    return date if date.tzinfo is not None else None
