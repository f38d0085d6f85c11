"""What the emulator remembers: models, predictions, the journal of requests, uploads; and what it all came to."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import re
import secrets
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]  # it ships no types

from prefect_eachlabs.testing.emulator.clock import Clock, rfc3339
from prefect_eachlabs.testing.emulator.faults import FaultRules
from prefect_eachlabs.testing.emulator.options import EmulatorOptions
from prefect_eachlabs.testing.emulator.pictures import Pictures
from prefect_eachlabs.testing.emulator.predictions import Job, Predictions, new_id
from prefect_eachlabs.testing.emulator.webhooks import Webhooks

WINDOW_SECONDS = 60.0
MAX_UPLOAD_BYTES = 100_000_000
_KEPT_UPLOADS = 1_000
_FOREIGN_KEY = "another-key"
_SUFFIXES = {"image/png": "png", "image/jpeg": "jpg", "image/webp": "webp", "image/gif": "gif", "video/mp4": "mp4"}

# Schemas of every kind: closed and open, URLs under several names, one picture and a list; they are the emulator's own.
MODELS: dict[str, dict[str, Any]] = {
    model["slug"]: {**model, "version": "0.0.1"}  # what the vendor always says
    for model in json.loads(Path(__file__).with_name("models.json").read_text(encoding="utf-8"))
}


def _defaults(model: Mapping[str, Any]) -> dict[str, Any]:
    properties = model.get("request_schema", {}).get("properties", {})
    return {name: schema["default"] for name, schema in properties.items() if "default" in schema}


def objections(model: Mapping[str, Any], input: Mapping[str, Any]) -> list[dict[str, str]]:
    """What a model's schema has against an input, field by field."""
    return [
        {"field": ".".join(["input", *map(str, fault.absolute_path)]), "message": fault.message[:200]}
        for fault in Draft202012Validator(model.get("request_schema", {})).iter_errors(dict(input))
    ]


# ------------------------------------------------------------------------------ requests


def key_hash(key: str) -> str:
    """How a key is called in journal and tallies: never by itself."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:12]


@dataclass
class Entry:
    """One request. `status` is None while it is under way, and for ever when its connection was cut.

    Attributes:
        at: Seconds of the emulator's clock at its arrival; `wall` is the date, without the emulator's skew.
        key: Hash of the API key, None when it carried none.
        fault: What was injected, as `create:lost_answer`.
        seconds: From arrival to the end of the answer.
    """

    number: int
    at: float
    wall: str
    method: str
    path: str
    endpoint: str = "other"
    key: str | None = None
    status: int | None = None
    prediction_id: str | None = None
    fault: str | None = None
    request_id: str | None = None
    seconds: float | None = None


class _Window:
    """Moments of the last 60 s: a moment exactly 60 s old has left."""

    def __init__(self) -> None:
        self._moments: deque[float] = deque()

    def count(self, now: float) -> int:
        while self._moments and self._moments[0] + WINDOW_SECONDS <= now:
            self._moments.popleft()
        return len(self._moments)

    def add(self, now: float) -> int:
        self._moments.append(now)
        return self.count(now)

    def free_in(self, now: float, limit: int) -> float:
        """Seconds until fewer than `limit` are left."""
        over = self.count(now) - limit
        return 0.0 if over < 0 else self._moments[over] + WINDOW_SECONDS - now


class Journal:
    """Who asked what and when: what makes the emulator a judge."""

    def __init__(self, *, keep: int) -> None:
        self.entries: deque[Entry] = deque(maxlen=keep)
        self.total = 0
        self.by_endpoint: Counter[str] = Counter()
        self.by_status: Counter[str] = Counter()
        self.violations: Counter[str] = Counter()
        self.worst_window = 0
        self.rejected_429 = 0
        self._arrived: dict[str, _Window] = {}
        self._admitted: dict[str, _Window] = {}

    def open(self, *, at: float, wall: str, method: str, path: str) -> Entry:
        self.total += 1
        entry = Entry(number=self.total, at=at, wall=wall, method=method, path=path)
        self.entries.append(entry)
        return entry

    def close(self, entry: Entry, *, at: float) -> None:
        entry.seconds = at - entry.at
        self.by_endpoint[entry.endpoint] += 1
        self.by_status["cut" if entry.status is None else str(entry.status)] += 1
        self.rejected_429 += entry.status == 429 and entry.key is not None

    def admit(self, key: str, now: float, limit: int | None, *, count_rejected: bool) -> float | None:
        """Counts a request of a key. None: it is let in; else seconds until one would be."""
        self.worst_window = max(self.worst_window, self._arrived.setdefault(key, _Window()).add(now))
        if limit is None:
            return None
        admitted = self._admitted.setdefault(key, _Window())
        if admitted.count(now) < limit:
            admitted.add(now)
            return None
        self.violations["over_requests_per_minute"] += 1
        wait_seconds = admitted.free_in(now, limit)
        if count_rejected:
            admitted.add(now)
        return wait_seconds

    def view(self, *, after: int = 0, limit: int | None = None) -> dict[str, Any]:
        """Requests with a number above `after`, oldest first; `dropped` are those that were forgotten."""
        kept = [dict(vars(entry)) for entry in self.entries if entry.number > after]
        return {
            "requests": kept if limit is None else kept[:limit],
            "total": self.total,
            "dropped": self.total - len(self.entries),
        }


# ------------------------------------------------------------------------------- uploads


@dataclass
class Upload:
    """A presigned upload: `body` is None until the PUT came."""

    id: str
    content_type: str
    signature: str
    body: bytes | None = None

    @property
    def required_headers(self) -> dict[str, str]:
        return {"content-type": self.content_type, "x-amz-meta-file-id": self.id}

    @property
    def name(self) -> str:
        return f"{self.id}.{_SUFFIXES.get(self.content_type, 'bin')}"


class Uploads:
    """Reference pictures that were uploaded through presigned URLs, the last thousand of them."""

    def __init__(self) -> None:
        self._uploads: OrderedDict[str, Upload] = OrderedDict()
        self._by_sha256: Counter[str] = Counter()
        self.received = 0

    def presign(self, content_type: str) -> Upload:
        upload = Upload(new_id(), content_type, secrets.token_hex(16))
        self._uploads[upload.id] = upload
        while len(self._uploads) > _KEPT_UPLOADS:
            self._uploads.popitem(last=False)
        return upload

    def get(self, upload_id: str) -> Upload | None:
        return self._uploads.get(upload_id)

    def receive(self, upload: Upload, body: bytes) -> None:
        upload.body = body
        self.received += 1
        self._by_sha256[hashlib.sha256(body).hexdigest()] += 1

    def repeated(self) -> dict[str, int]:
        """SHA-256 → how often, of what was uploaded more than once."""
        return {sha256: count for sha256, count in self._by_sha256.items() if count > 1}

    def missing_from(self, texts: list[str], base_url: str) -> int:
        """How many texts are URLs of this server's uploads that lead to no uploaded file."""
        found = (re.match(re.escape(base_url) + r"/uploads/([^/.?#]+)", text) for text in texts)
        uploads = [self.get(match[1]) for match in found if match]
        return sum(upload is None or upload.body is None for upload in uploads)


def _expiry_of(url: str) -> datetime | None:
    """When a presigned URL of S3's kind ends; None: it is not one."""
    said = parse_qs(urlsplit(url).query)
    try:
        signed = datetime.strptime(said["X-Amz-Date"][0], "%Y%m%dT%H%M%SZ").replace(tzinfo=timezone.utc)
        return signed + timedelta(seconds=int(said["X-Amz-Expires"][0]))
    except (KeyError, ValueError, OverflowError):
        return None


def _texts_in(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (Mapping, list)):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _texts_in(inner)


# --------------------------------------------------------------------------- all of it


class Emulator:
    """The state behind the app. Everything in it belongs to the loop that serves the app.

    Args:
        options: How it behaves.
        clock: Where time comes from; the loop's when None.
        threads: Whether pictures may be drawn in threads (not under virtual time).
        outwards: Carries the calls to webhooks; the network when None.
    """

    def __init__(
        self,
        options: EmulatorOptions | None = None,
        *,
        clock: Clock | None = None,
        threads: bool = True,
        outwards: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.options = options or EmulatorOptions()
        self.clock = clock or Clock()
        self.clock.skew_seconds = self.options.clock_skew_seconds
        self.pictures = Pictures(self.options, threads=threads)
        self._outwards = outwards
        self.webhooks = Webhooks(self, outwards)
        self.reset()

    def reset(self) -> None:
        """Forgets everything: predictions, journal, uploads, counted calls; the options and their faults stay."""
        self.journal = Journal(keep=self.options.keep_requests)
        self.ledger = Predictions(keep=self.options.keep_predictions)
        self.faults = FaultRules(self.options.faults, seed=self.options.seed)
        self.uploads = Uploads()
        self.webhooks.stop()
        self.webhooks = Webhooks(self, self._outwards)
        self.downloads = 0
        self.unauthorized = 0
        self._held: dict[str, list[asyncio.Future[None]]] = {}

    def open_entry(self, method: str, path: str) -> Entry:
        now = self.clock.now()
        return self.journal.open(at=now, wall=rfc3339(self.clock.true_date(now)), method=method, path=path)

    def accept(self, body: Mapping[str, Any], *, key: str, base_url: str, secret: str = "") -> Job:
        """Takes an order that was found good: from here on it is billed. Faults may quote the `secret`, its API key."""
        job = self._job(body, base_url=base_url, created=self.clock.now())
        job.key, job.secret = key, secret
        for fault in self.faults.draw_all("prediction", text=job.prompt, subject=job.id):
            job.afflict(fault)
        texts = list(_texts_in(job.input))
        if job.failure is None and (missing := self.uploads.missing_from(texts, job.base_url)):
            job.failure = "fail_input"
            self.journal.violations["reference_not_uploaded"] += missing
        if job.ends != float("inf"):  # a provider may fetch a reference picture late
            end = self.clock.true_date(job.ends)
            expiries = [expiry for text in texts if (expiry := _expiry_of(text)) is not None]
            if early := sum(expiry < end for expiry in expiries):
                self.journal.violations["reference_expires_too_early"] += early
        self.ledger.add(job)
        if self.options.webhooks != "none" and body.get("webhook_url"):
            self.webhooks.watch(job, body["webhook_url"], body.get("webhook_secret") or "")
        if (twin := job.faults.get("foreign_twin")) is not None:
            self.announce_foreign(body, base_url=base_url, after_seconds=twin.seconds or 0.0)
        return job

    def announce_foreign(self, body: Mapping[str, Any], *, base_url: str, after_seconds: float = 0.0) -> Job:
        """Another key of the organization buys the same; it costs us nothing and shows in executions."""
        job = self._job(body, base_url=base_url, created=self.clock.now() + after_seconds)
        job.foreign = True
        self.ledger.announce(job)
        return job

    def _job(self, body: Mapping[str, Any], *, base_url: str, created: float) -> Job:
        number, model = self.ledger.next_number(), MODELS.get(body["model"], {})
        defaults = _defaults(model)
        wanted = body["input"].get("num_images", defaults.get("num_images", 1))
        pictures = wanted if type(wanted) is int and 1 <= wanted <= 16 else 1
        mean = self.options.service_seconds
        seconds = self.faults.random("service", number).gauss(mean, self.options.spread * mean)
        return Job(
            number=number,
            id=new_id(),
            key=_FOREIGN_KEY,
            model=body["model"],
            version=body.get("version"),
            input=dict(body["input"]),
            base_url=self.options.public_url or base_url,
            created=created,
            ends=created + min(max(seconds, mean / 5), mean * 3),
            cost_usd=self.options.cost_usd * pictures,
            pictures=pictures,
            output_type=model.get("output_type", "string"),
            defaults=defaults,
        )

    def cancel(self, job: Job) -> None:
        if self.ledger.cancel(job, self.clock.now()):
            for held in self._held.pop(job.id, []):
                if not held.done():
                    held.set_result(None)

    async def hold(self, job: Job) -> None:
        """Long poll: comes back at the job's end, or after `long_poll_seconds`."""
        now = self.clock.now()
        seconds = min(job.end - now, self.options.long_poll_seconds)
        if seconds <= 0 or job.ended_at(now):
            return
        cancelled: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._held.setdefault(job.id, []).append(cancelled)
        slept = asyncio.ensure_future(self.clock.sleep(seconds))
        try:
            await asyncio.wait({cancelled, slept}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            slept.cancel()
            with contextlib.suppress(KeyError, ValueError):
                self._held[job.id].remove(cancelled)

    def predictions(self) -> list[dict[str, Any]]:
        """Every prediction that is kept, oldest first, as it stands now; others' are `foreign`."""
        now = self.clock.now()
        return [
            {
                "id": job.id,
                "model": job.model,
                "version": job.version,
                "input": job.input,
                "status": job.status_at(now),
                "foreign": job.foreign,
                "cost_usd": job.bill_at(now),
                "faults": sorted(job.faults),
            }
            for job in reversed(list(self.ledger.newest_first(now)))
        ]

    def tallies(self) -> dict[str, Any]:
        """What it all came to, as one JSON object.

        `billed` counts accepted POSTs, `billed_by_input` names the inputs that were billed more than once,
        `worst_window` is the most requests that a key sent in any 60 s (those that were refused too),
        `worst_in_flight` the most of its predictions that were in flight at once.
        """
        return {
            **self.ledger.tallies(self.clock.now()),
            "worst_window": self.journal.worst_window,
            "rejected_429": self.journal.rejected_429,
            "unauthorized": self.unauthorized,
            "requests": self.journal.total,
            "requests_by_endpoint": dict(self.journal.by_endpoint),
            "requests_by_status": dict(self.journal.by_status),
            "faults": dict(self.faults.injected),
            "violations": dict(self.journal.violations),
            "downloads": self.downloads,
            "uploads": self.uploads.received,
            "uploaded_more_than_once": self.uploads.repeated(),
            "webhooks": dict(self.webhooks.answers),
        }
