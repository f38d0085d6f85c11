"""The predictions: what was bought, where each stands at a moment, how answers show it, and what it all came to.

Nothing runs here. Where a prediction stands is a function of the clock, so that time can be moved at will.
"""

from __future__ import annotations

import hashlib
import heapq
import html
import json
import re
import unicodedata
import uuid
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, urlsplit

from prefect_eachlabs.testing.emulator.clock import Clock, rfc3339
from prefect_eachlabs.testing.emulator.faults import Fault
from prefect_eachlabs.testing.emulator.options import EmulatorOptions
from prefect_eachlabs.testing.emulator.outputs import MEDIA_TYPES

_STARTING_FRACTION = 0.15
_STARTING_SECONDS = 2.0
_EXECUTION_STATUS = {"starting": "created", "processing": "starting", "failed": "error"}
"""The word of GET by id → the word of executions, where that has another."""
_FAILURES = {
    "fail": ("PROVIDER_FAILED", "The provider could not make the picture.", False, "provider_error"),
    "fail_retryable": ("PROVIDER_UNAVAILABLE", "The provider is overloaded.", True, "provider_unavailable"),
    "fail_moderation": (
        "CONTENT_MODERATION",
        "The request was refused by the provider's safety system.",
        False,
        "content_moderation",
    ),
    "key_in_error": ("PROVIDER_FAILED", "Upstream refused the header X-API-Key: {key}", False, "provider_auth"),
    "fail_input": ("INVALID_INPUT", "The reference picture could not be fetched.", False, "invalid_user_input"),
}


@dataclass(eq=False)
class Job:
    """One prediction. `ends` is the moment of its natural end (infinite when it is stuck), `failure` how it fails."""

    number: int
    id: str
    key: str
    model: str
    version: str | None
    input: dict[str, Any]
    base_url: str
    created: float
    ends: float
    failure: str | None = None
    pictures: int = 1
    cost_usd: float = 0.0
    foreign: bool = False
    secret: str = field(default="", repr=False)
    """The API key in clear, for answers that quote it."""
    output_type: str = "string"
    defaults: Mapping[str, Any] = field(default_factory=dict)
    faults: dict[str, Fault] = field(default_factory=dict)
    cancelled: float | None = None
    landed: bool = False

    def status_at(self, moment: float) -> str:
        """starting, processing, success, failed or cancelled."""
        if self.cancelled is not None and moment >= self.cancelled:
            return "cancelled"
        if moment >= self.ends:
            return "success" if self.failure in (None, "fail_under_success") else "failed"
        return "starting" if moment < self.started else "processing"

    def ended_at(self, moment: float) -> bool:
        return self.status_at(moment) not in ("starting", "processing")

    @property
    def started(self) -> float:
        """The moment when `starting` becomes `processing`: after 15 % of its time, and 2 s at most."""
        return self.created + min(_STARTING_SECONDS, _STARTING_FRACTION * (self.ends - self.created))

    @property
    def end(self) -> float:
        """The moment of its end, as it stands now."""
        return self.ends if self.cancelled is None else self.cancelled

    @property
    def prompt(self) -> str:
        prompt = self.input.get("prompt")
        return prompt if isinstance(prompt, str) else ""

    def bill_at(self, moment: float) -> float:
        """Failed and cancelled predictions cost nothing; what has not ended has not cost anything yet."""
        return self.cost_usd if self.status_at(moment) == "success" and self.failure is None else 0.0

    def afflict(self, fault: Fault) -> None:
        """What a fault that was drawn for it makes of it."""
        self.faults[fault.kind] = fault
        if fault.kind.startswith("fail") or fault.kind == "key_in_error":
            self.failure = fault.kind
        elif fault.kind == "stuck":
            self.ends = float("inf")
        elif fault.kind == "slow":
            self.ends += fault.wait_seconds
        elif fault.kind == "output_several":
            self.pictures = min(16, max(1, int(fault.value or 2)))


class Predictions:
    """Every prediction of the organization, newest last; sums over those of our own keys."""

    _IDS_SHOWN = 20

    def __init__(self, *, keep: int) -> None:
        self._keep = keep
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._numbers = 0
        self._landings: list[tuple[float, int, Job]] = []
        self._announced: list[tuple[float, int, Job]] = []
        self._in_flight: Counter[str] = Counter()
        self._by_input: dict[bytes, list[Job]] = {}
        self.billed = 0
        self.foreign = 0
        self.ends: Counter[str] = Counter()
        self.cost_usd = 0.0
        self.worst_in_flight = 0

    def next_number(self) -> int:
        self._numbers += 1
        return self._numbers

    def add(self, job: Job) -> None:
        """Accepts a prediction: from now on it is billed (unless it is another key's)."""
        self.settle(job.created)
        self._keep_job(job)

    def _keep_job(self, job: Job) -> None:
        self._jobs[job.id] = job
        if job.foreign:
            self.foreign += 1
        else:
            self.billed += 1
            self._in_flight[job.key] += 1
            self.worst_in_flight = max(self.worst_in_flight, self._in_flight[job.key])
            heapq.heappush(self._landings, (job.ends, job.number, job))
            self._by_input.setdefault(_digest(job), []).append(job)
        while len(self._jobs) > self._keep and (oldest := next(iter(self._jobs.values()))).ended_at(job.created):
            del self._jobs[oldest.id]

    def announce(self, job: Job) -> None:
        """Another key's prediction that is there from its moment of creation on."""
        heapq.heappush(self._announced, (job.created, job.number, job))

    def settle(self, now: float) -> None:
        """Counts what has ended by now, and lets appear what was announced."""
        while self._announced and self._announced[0][0] <= now:
            self._keep_job(heapq.heappop(self._announced)[2])
        while self._landings and self._landings[0][0] <= now:
            self._land(heapq.heappop(self._landings)[2], now)

    def _land(self, job: Job, now: float) -> None:
        if job.landed:
            return
        job.landed = True
        self._in_flight[job.key] -= 1
        self.ends[job.status_at(now)] += 1
        self.cost_usd += job.bill_at(now)

    def cancel(self, job: Job, now: float) -> bool:
        """Ends a prediction now, at no cost. False: it had ended, or is not to be interrupted."""
        if job.ended_at(now) or "uncancellable" in job.faults:
            return False
        self.settle(now)
        job.cancelled = now
        if not job.foreign:
            self._land(job, now)
        return True

    def get(self, prediction_id: str, now: float) -> Job | None:
        self.settle(now)
        return self._jobs.get(prediction_id)

    def in_flight(self, key: str, now: float) -> int:
        self.settle(now)
        return self._in_flight[key]

    def next_end(self, key: str) -> float | None:
        """When the next prediction in flight of a key will end."""
        return min((job.ends for _, _, job in self._landings if job.key == key and not job.landed), default=None)

    def owed_usd(self, now: float) -> float:
        """What has been spent and what is in flight may still cost."""
        self.settle(now)
        return self.cost_usd + sum(job.cost_usd for _, _, job in self._landings if not job.landed)

    def newest_first(self, now: float) -> Iterator[Job]:
        self.settle(now)
        return reversed(self._jobs.values())

    def tallies(self, now: float) -> dict[str, Any]:
        self.settle(now)
        repeated = [jobs for jobs in self._by_input.values() if len(jobs) > 1]
        return {
            "billed": self.billed,
            "distinct_inputs": len(self._by_input),
            "billed_by_input": [
                {
                    "model": jobs[0].model,
                    "version": jobs[0].version,
                    "input": jobs[0].input,
                    "billed": len(jobs),
                    "prediction_ids": [job.id for job in jobs[: self._IDS_SHOWN]],
                }
                for jobs in repeated
            ],
            "billed_too_often": sum(len(jobs) - 1 for jobs in repeated),
            "succeeded": self.ends["success"],
            "failed": self.ends["failed"],
            "cancelled": self.ends["cancelled"],
            "in_flight": sum(self._in_flight.values()),
            "worst_in_flight": self.worst_in_flight,
            "foreign": self.foreign,
            "cost_usd": round(self.cost_usd, 6),
        }


def _digest(job: Job) -> bytes:
    """Stands for model, version and input: equal ones are the same purchase."""
    text = json.dumps([job.model, job.version, job.input], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).digest()[:16]


def new_id() -> str:
    """Unlike any other, also of another run: buckets outlive the emulator."""
    return str(uuid.uuid4())


# ------------------------------------------------------------------------ as answers show it


def prediction_view(job: Job, options: EmulatorOptions, *, at: float) -> dict[str, Any]:
    """The body of GET /v1/prediction/{id} at a moment."""
    status, ended = job.status_at(at), job.ended_at(at)
    view: dict[str, Any] = {
        "id": job.id,
        "input": _echo(job),
        "status": status,
        "output": "",
        "logs": None,
        "metrics": {
            "predict_time": round(max(0.0, (job.end if ended else at) - job.created), 3),
            "cost": _told_cost(job, options, at),
        },
        "urls": {
            "cancel": f"{job.base_url}/v1/prediction/{job.id}/cancel",
            "get": f"{job.base_url}/v1/prediction/{job.id}",
        },
    }
    if status in ("success", "failed"):
        if job.failure == "fail_logs":
            view["logs"] = json.dumps(_envelope(job))
        elif job.failure == "fail_text":
            view["logs"] = "Traceback: the model ran out of memory"
        else:
            view["output"] = _output(job, options, at) if job.failure is None else _envelope(job)
    if "key_in_logs" in job.faults:
        view["logs"] = f"{view['logs'] or ''}POST /generate X-API-Key: {job.secret}"
    if "echo_none" in job.faults:
        del view["input"]
    if status == "success" and "output_missing" in job.faults:
        del view["output"]
    return view


def execution_view(job: Job, options: EmulatorOptions, clock: Clock, *, at: float) -> dict[str, Any]:
    """A row of GET /v1/executions at a moment: no input, and one output at most."""
    status, ended = job.status_at(at), job.ended_at(at)
    there = status == "success" and job.failure is None and _output(job, options, at)

    def date(moment: float) -> str | None:
        return rfc3339(clock.date(moment)) if moment <= at else None

    return {
        "id": job.id,
        "model": job.model,
        "requested_model": None,
        "status": _EXECUTION_STATUS.get(status, status),
        "workflow_id": None,
        "workflow_execution_id": None,
        "execution_cost": _told_cost(job, options, at),
        "run_time": round(job.end - job.created, 3) if ended else 0,
        "created_at": date(job.created),
        "started_at": date(min(job.started, job.end)),
        "completed_at": date(job.end) if ended else None,
        "output": _picture_urls(job, options)[0] if there else None,
    }


def _told_cost(job: Job, options: EmulatorOptions, at: float) -> float:
    """The cost as it is told at a moment: 0 until it has settled."""
    late = job.faults.get("late_cost")
    settled = job.end + (options.settle_seconds if late is None else late.wait_seconds)
    return job.bill_at(at) if job.ended_at(at) and at >= settled else 0


def _envelope(job: Job) -> dict[str, Any]:
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


def _picture_urls(job: Job, options: EmulatorOptions) -> list[str]:
    other = job.faults.get("output_format")
    wanted = (other.value or "mp4") if other is not None else job.input.get("output_format")
    suffix = wanted if wanted in MEDIA_TYPES else "png"
    query = options.picture_query
    if "key_in_output" in job.faults:
        query += f"{'&' if '?' in query else '?'}api_key={quote(job.secret, safe='')}"
    names = [job.id, *(f"{job.id}-{number}" for number in range(2, job.pictures + 1))]
    return [f"{job.base_url}/files/{name}.{suffix}{query}" for name in names]


def _output(job: Job, options: EmulatorOptions, at: float) -> object:
    """What a prediction that succeeded puts out, in the shape that its model or a fault asks for."""
    urls = _picture_urls(job, options)
    late = job.faults.get("late_output")
    if "output_null" in job.faults or (late is not None and at < job.end + late.wait_seconds):
        return None
    if "output_empty" in job.faults:
        return ""
    if "output_object" in job.faults:
        return {"url": urls[0], "content_type": "image/png"}
    if "output_images" in job.faults:
        return {"images": [{"url": url, "content_type": "image/png"} for url in urls], "seed": job.number}
    if "output_json" in job.faults:
        return json.dumps({"images": urls})
    return urls if "output_list" in job.faults or len(urls) > 1 or job.output_type == "array" else urls[0]


def _echo(job: Job) -> object:
    """The input as the API gives it back."""
    if "echo_normalised" in job.faults:
        return _with_texts(job.input, lambda text: " ".join(unicodedata.normalize("NFC", text).split()))
    if "echo_defaults" in job.faults:
        return {**job.defaults, "num_outputs": 1, "safety_tolerance": 2, **job.input}
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
    is_url = re.match(r"https?://", text)
    return f"https://storage.eachlabs.example{urlsplit(text).path}" if is_url else text
