"""The predictions: what was bought, where each stands at a moment, and what it all came to.

Nothing runs here. Where a prediction stands is a function of the clock, so that time can be moved at will.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import uuid
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from prefect_eachlabs.testing.emulator.faults import Fault

_STARTING_FRACTION = 0.15
_STARTING_SECONDS = 2.0


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


@dataclass
class Repeated:
    """An input that was billed more than once."""

    model: str
    version: str | None
    input: dict[str, Any]
    billed: int
    prediction_ids: list[str]


class Ledger:
    """Every prediction of the organization, newest last; sums over those of our own keys."""

    _IDS_SHOWN = 20

    def __init__(self, *, keep: int) -> None:
        self._keep = keep
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._numbers = 0
        self._landings: list[tuple[float, int, Job]] = []
        self._announced: list[tuple[float, int, Job]] = []
        self._in_flight: Counter[str] = Counter()
        self._billed_by_input: Counter[bytes] = Counter()
        self._first_of_input: dict[bytes, str] = {}
        self._repeated: dict[bytes, Repeated] = {}
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
        self._jobs[job.id] = job
        if job.foreign:
            self.foreign += 1
        else:
            self.billed += 1
            self._in_flight[job.key] += 1
            self.worst_in_flight = max(self.worst_in_flight, self._in_flight[job.key])
            heapq.heappush(self._landings, (job.ends, job.number, job))
            self._count_input(job)
        self._forget(job.created)

    def announce(self, job: Job) -> None:
        """Another key's prediction that is there from its moment of creation on."""
        heapq.heappush(self._announced, (job.created, job.number, job))

    def _count_input(self, job: Job) -> None:
        same = digest(job.model, job.version, job.input)
        self._billed_by_input[same] += 1
        if self._billed_by_input[same] == 1:
            self._first_of_input[same] = job.id
            return
        repeated = self._repeated.setdefault(
            same, Repeated(job.model, job.version, job.input, 1, [self._first_of_input[same]])
        )
        repeated.billed += 1
        if len(repeated.prediction_ids) < self._IDS_SHOWN:
            repeated.prediction_ids.append(job.id)

    def _forget(self, now: float) -> None:
        while len(self._jobs) > self._keep:
            oldest = next(iter(self._jobs.values()))
            if not oldest.ended_at(now):
                break
            del self._jobs[oldest.id]

    def settle(self, now: float) -> None:
        """Counts what has ended by now, and lets appear what was announced."""
        while self._announced and self._announced[0][0] <= now:
            self.add(heapq.heappop(self._announced)[2])
        while self._landings and self._landings[0][0] <= now:
            self._land(heapq.heappop(self._landings)[2], now)

    def _land(self, job: Job, now: float) -> None:
        if job.landed:
            return
        job.landed = True
        self._in_flight[job.key] -= 1
        self.ends[job.status_at(now)] += 1
        self.cost_usd += cost_of(job, now)

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

    def next_end(self, key: str, now: float) -> float | None:
        """When the next prediction in flight of a key will end."""
        ends = [job.ends for _, _, job in self._landings if job.key == key and not job.landed]
        return min(ends, default=None)

    def owed_usd(self, now: float) -> float:
        """What has been spent and what is in flight may still cost."""
        self.settle(now)
        return self.cost_usd + sum(job.cost_usd for _, _, job in self._landings if not job.landed)

    def newest_first(self, now: float) -> Iterator[Job]:
        self.settle(now)
        return reversed(self._jobs.values())

    def __len__(self) -> int:
        return len(self._jobs)

    def tallies(self, now: float) -> dict[str, Any]:
        self.settle(now)
        return {
            "billed": self.billed,
            "distinct_inputs": len(self._billed_by_input),
            "billed_by_input": [vars(repeated) for repeated in self._repeated.values()],
            "billed_too_often": sum(repeated.billed - 1 for repeated in self._repeated.values()),
            "succeeded": self.ends["success"],
            "failed": self.ends["failed"],
            "cancelled": self.ends["cancelled"],
            "in_flight": sum(self._in_flight.values()),
            "worst_in_flight": self.worst_in_flight,
            "foreign": self.foreign,
            "cost_usd": round(self.cost_usd, 6),
        }


def cost_of(job: Job, now: float) -> float:
    """Failed and cancelled predictions cost nothing; what has not ended has not cost anything yet."""
    return job.cost_usd if job.status_at(now) == "success" and job.failure is None else 0.0


def digest(model: str, version: str | None, input: Mapping[str, Any]) -> bytes:
    """Stands for model, version and input: equal ones are the same purchase."""
    text = json.dumps([model, version, input], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).digest()[:16]


def new_id() -> str:
    """Unlike any other, also of another run: buckets outlive the emulator."""
    return str(uuid.uuid4())
