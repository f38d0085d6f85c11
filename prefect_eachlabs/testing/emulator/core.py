"""The emulator itself: options, clock, journal, ledger, faults and uploads in one place, and what may be bought."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from typing import Any

from prefect_eachlabs.testing.emulator.catalogue import CATALOGUE, Model
from prefect_eachlabs.testing.emulator.clock import Calendar, Clock, SystemClock, rfc3339
from prefect_eachlabs.testing.emulator.faults import Fault, FaultBook
from prefect_eachlabs.testing.emulator.journal import Entry, Journal
from prefect_eachlabs.testing.emulator.ledger import Job, Ledger, cost_of, new_id
from prefect_eachlabs.testing.emulator.options import EmulatorOptions
from prefect_eachlabs.testing.emulator.pictures import PictureShop
from prefect_eachlabs.testing.emulator.uploads import UploadShelf, expiry_of, texts_in

FOREIGN_KEY = "another-key"


class Emulator:
    """The state behind the app. Everything in it belongs to the loop that serves the app.

    Args:
        options: How it behaves.
        clock: Where time comes from; a real server's is `time.monotonic`.
        threads: Whether pictures may be drawn in threads (not under virtual time).
    """

    def __init__(
        self, options: EmulatorOptions | None = None, *, clock: Clock | None = None, threads: bool = True
    ) -> None:
        self.options = options or EmulatorOptions()
        self.clock = clock or SystemClock()
        self.calendar = Calendar(self.clock, skew_seconds=self.options.clock_skew_seconds)
        self.pictures = PictureShop(self.options, threads=threads)
        self.reset()

    def reset(self) -> None:
        """Forgets everything: predictions, journal, uploads, counted calls; the options and their faults stay."""
        self.journal = Journal(self.options.keep_requests)
        self.ledger = Ledger(keep=self.options.keep_predictions)
        self.faults = FaultBook(self.options.faults, seed=self.options.seed)
        self.uploads = UploadShelf()
        self.downloads = 0
        self.unauthorized = 0
        self._waiting: dict[str, list[asyncio.Future[None]]] = {}

    def model(self, slug: str) -> Model | None:
        return CATALOGUE.get(slug)

    def open_entry(self, method: str, path: str) -> Entry:
        now = self.clock.now()
        wall = rfc3339(self.calendar.true_date(now))
        return self.journal.open(at=now, wall=wall, method=method, path=path)

    def accept(self, body: Mapping[str, Any], *, key: str, base_url: str, secret: str = "") -> Job:
        """Takes an order that was found good: from here on it is billed. Faults may quote the `secret`, its API key."""
        now = self.clock.now()
        number = self.ledger.next_number()
        model = self.model(body["model"])
        job = Job(
            number=number,
            id=new_id(),
            key=key,
            model=body["model"],
            version=body.get("version"),
            input=dict(body["input"]),
            base_url=self.options.public_url or base_url,
            created=now,
            ends=now + self._service_seconds(number),
            cost_usd=self.options.cost_usd,
            secret=secret,
            pictures=model.pictures_in(body["input"]) if model else 1,
        )
        job.cost_usd *= job.pictures
        for fault in self.faults.draw_all("prediction", text=job.prompt, subject=job.id):
            self._afflict(job, fault)
        if job.failure is None and (missing := self.uploads.missing_from(job.input, job.base_url)):
            job.failure = "fail_input"
            self.journal.violations["reference_not_uploaded"] += len(missing)
        self._note_early_expiries(job)
        self.ledger.add(job)
        if (twin := job.faults.get("foreign_twin")) is not None:
            self.announce_foreign(body, base_url=base_url, after_seconds=twin.seconds or 0.0)
        return job

    def _note_early_expiries(self, job: Job) -> None:
        """A reference picture must be there until the end: a provider may fetch it late."""
        end = self.calendar.true_date(job.ends) if job.ends != float("inf") else None
        for url in texts_in(job.input):
            expiry = expiry_of(url)
            if expiry is not None and end is not None and expiry < end:
                self.journal.violations["reference_expires_too_early"] += 1

    def _service_seconds(self, number: int) -> float:
        mean, spread = self.options.service_seconds, self.options.spread
        drawn = self.faults.random("service", number).gauss(mean, spread * mean)
        return min(max(drawn, mean / 5), mean * 3)

    def _afflict(self, job: Job, fault: Fault) -> None:
        job.faults[fault.kind] = fault
        if fault.kind.startswith("fail") or fault.kind == "key_in_error":
            job.failure = fault.kind
        elif fault.kind == "stuck":
            job.ends = float("inf")
        elif fault.kind == "slow":
            job.ends += 60.0 if fault.seconds is None else fault.seconds
        elif fault.kind == "output_several":
            job.pictures = min(16, max(1, int(fault.value or 2)))

    def announce_foreign(self, body: Mapping[str, Any], *, base_url: str, after_seconds: float = 0.0) -> Job:
        """Another key of the organization buys the same; it costs us nothing and shows in executions."""
        number = self.ledger.next_number()
        created = self.clock.now() + after_seconds
        job = Job(
            number=number,
            id=new_id(),
            key=FOREIGN_KEY,
            model=body["model"],
            version=body.get("version"),
            input=dict(body["input"]),
            base_url=self.options.public_url or base_url,
            created=created,
            ends=created + self._service_seconds(number),
            cost_usd=self.options.cost_usd,
            foreign=True,
        )
        self.ledger.announce(job)
        return job

    def cancel(self, job: Job) -> None:
        if self.ledger.cancel(job, self.clock.now()):
            for waiting in self._waiting.pop(job.id, []):
                if not waiting.done():
                    waiting.set_result(None)

    async def hold(self, job: Job) -> None:
        """Long poll: comes back at the job's end, or after `long_poll_seconds`."""
        now = self.clock.now()
        seconds = min(job.end - now, self.options.long_poll_seconds)
        if seconds <= 0 or job.ended_at(now):
            return
        changed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(job.id, []).append(changed)
        slept = asyncio.ensure_future(self.clock.sleep(seconds))
        try:
            await asyncio.wait({changed, slept}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            slept.cancel()
            waiting = self._waiting.get(job.id, [])
            with contextlib.suppress(ValueError):
                waiting.remove(changed)
            if not waiting:
                self._waiting.pop(job.id, None)

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
                "cost_usd": cost_of(job, now),
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
        }
