"""What may go wrong on purpose: at a rate, at the n-th call, or for the next n calls; seeded.

A fault is written `ENDPOINT:KIND[=RATE][,NAME=VALUE]...`, for example `create:lost_answer=0.05`,
`create:error,at=3+7,status=500`, `get:late_answer,next=2,seconds=40`, `prediction:fail_moderation,matching=naked` or
`picture:not_found,first=2`, which hits the first two downloads of each picture.
"""

from __future__ import annotations

import json
import random
from collections import Counter, OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

Endpoint = Literal[
    "create",
    "get",
    "cancel",
    "executions",
    "models",
    "presign",
    "upload",
    "webhooks",
    "prediction",
    "webhook",
    "picture",
]
ENDPOINTS: tuple[Endpoint, ...] = get_args(Endpoint)
Phase = Literal["before", "after"]
DEFAULT_SECONDS = 60.0

# In a file of its own, which `prefect-eachlabs emulator --help` reads without importing the emulator.
_KINDS: dict[str, dict[str, str]] = json.loads(Path(__file__).with_name("fault_kinds.json").read_text(encoding="utf-8"))

BEFORE = _KINDS.pop("before")
"""Kinds of every `/v1` endpoint that happen before the request takes effect; the n-th call counts all of them."""

AFTER = _KINDS.pop("after")
"""Kinds of every `/v1` endpoint that happen after it took effect; the n-th call counts requests that did."""

SPECIAL = _KINDS
"""Kinds that one endpoint alone knows. `prediction` is drawn at each accepted POST, `picture` at each download,
`webhook` at each call that is to be made."""

ON_THEIR_OWN = ("prediction", "webhook", "picture")
"""What is no endpoint, and knows the kinds of its own alone."""

ASPECTS = {
    **{kind: "outcome" for kind in SPECIAL["prediction"] if kind.startswith("fail")},
    "key_in_error": "outcome",
    **{kind: "shape" for kind in SPECIAL["prediction"] if kind.startswith("output")},
    **{kind: "echo" for kind in SPECIAL["prediction"] if kind.startswith("echo")},
    "stuck": "time",
    "slow": "time",
    "unlisted": "listing",
    "listed_late": "listing",
}
"""Kinds of `prediction` that exclude each other; kinds of different aspects may hit the same prediction."""


def kinds_of(endpoint: str) -> dict[str, str]:
    """Every kind of fault that an endpoint knows, with one line about each."""
    special = SPECIAL.get(endpoint, {})
    return dict(special) if endpoint in ON_THEIR_OWN else {**BEFORE, **AFTER, **special}


class Fault(BaseModel):
    """One thing that goes wrong. Without `rate`, `at`, `next` and `first` it happens at each call.

    Attributes:
        on: The endpoint, or `prediction` (drawn once for each accepted POST), `webhook` (for each call that is to be
            made) or `picture` (each download).
        kind: What happens: see `kinds_of`.
        rate: Between 0 and 1.
        at: At the n-th calls, counted from 1 since the start or the last reset.
        next: At the next n calls since it was set.
        first: At the first n calls of each subject since it was set: a prompt's POSTs, a prediction's GETs, a picture's
            downloads. With a rate: of so many of the subjects.
        matching: Only where the prompt contains this text.
        sticky: What was hit once (a prompt, a prediction, a picture) is hit again at each further call.
        seconds: See the kind.
        status: See the kind.
        value: See the kind.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    on: Endpoint
    kind: str
    rate: Annotated[float, Field(ge=0, le=1)] | None = None
    at: tuple[Annotated[int, Field(ge=1)], ...] = ()
    next: Annotated[int, Field(ge=0)] | None = None
    first: Annotated[int, Field(ge=1)] | None = None
    matching: str | None = None
    sticky: bool = False
    seconds: Annotated[float, Field(ge=0)] | None = None
    status: Annotated[int, Field(ge=200, le=599)] | None = None
    value: str | None = None

    @model_validator(mode="after")
    def _known(self) -> Fault:
        if self.kind not in kinds_of(self.on):
            raise ValueError(f"{self.on} knows no fault {self.kind!r}; it knows {', '.join(kinds_of(self.on))}")
        return self

    @property
    def name(self) -> str:
        """`create:lost_answer`: what journal and tallies call it."""
        return f"{self.on}:{self.kind}"

    @property
    def wait_seconds(self) -> float:
        """How long what takes long takes."""
        return DEFAULT_SECONDS if self.seconds is None else self.seconds

    @property
    def phase(self) -> Phase:
        return "before" if self.kind in BEFORE or self.on in ON_THEIR_OWN else "after"

    @classmethod
    def parse(cls, text: str) -> Fault:
        """Reads `ENDPOINT:KIND[=RATE][,NAME=VALUE]...`.

        Raises:
            ValueError: It is something else; says what is known.
        """
        head, *options = text.strip().split(",")
        name, _, rate = head.partition("=")
        endpoint, _, kind = name.partition(":")
        fields: dict[str, Any] = {"on": endpoint, "kind": kind}
        if rate:
            fields["rate"] = float(rate[:-1]) / 100 if rate.endswith("%") else float(rate)
        for option in options:
            field, equals, value = option.partition("=")
            fields[field] = value.split("+") if field == "at" else value if equals else True
        return cls(**fields)


def parse_faults(given: object) -> tuple[Fault, ...]:
    """Faults from texts (`create:lost_answer=0.05`), objects, or `Fault`s.

    Raises:
        ValueError: One of them is not a fault; says what is known.
    """
    if not isinstance(given, (list, tuple)):
        raise ValueError("faults must be a list")
    return tuple(Fault.parse(fault) if isinstance(fault, str) else Fault.model_validate(fault) for fault in given)


class FaultRules:
    """Decides which call is hit. Counts calls by endpoint and phase; the same seed decides the same."""

    _REMEMBERED = 100_000

    def __init__(self, faults: Iterable[Fault] = (), *, seed: int = 0) -> None:
        self._seed = seed
        self._calls: Counter[tuple[str, Phase]] = Counter()
        self._stuck_to: OrderedDict[tuple[int, str], None] = OrderedDict()
        self._seen: OrderedDict[tuple[int, str], int] = OrderedDict()
        self.injected: Counter[str] = Counter()
        self.set(faults)

    def set(self, faults: Iterable[Fault]) -> None:
        """These faults from now on, in place of those before; calls are counted on."""
        self.faults = tuple(faults)
        self._left = [fault.next for fault in self.faults]
        self._stuck_to.clear()
        self._seen.clear()

    def draw(self, endpoint: Endpoint, phase: Phase = "before", *, text: str = "", subject: str = "") -> Fault | None:
        """The fault that hits this call, if any: the first of those set. Counts the call and the fault."""
        return next(iter(self.draw_all(endpoint, phase, text=text, subject=subject, only_one=True)), None)

    def draw_all(
        self, endpoint: Endpoint, phase: Phase = "before", *, text: str = "", subject: str = "", only_one: bool = False
    ) -> list[Fault]:
        """All faults that hit this call, at most one of each aspect."""
        self._calls[endpoint, phase] += 1
        hits: list[Fault] = []
        for number, fault in enumerate(self.faults):
            if fault.on != endpoint or fault.phase != phase or (fault.matching and fault.matching not in text):
                continue
            aspect = ASPECTS.get(fault.kind, fault.kind)
            if any(ASPECTS.get(hit.kind, hit.kind) == aspect for hit in hits):
                continue
            if self._hits(number, fault, self._calls[endpoint, phase], subject):
                hits.append(fault)
                if fault.kind != "missing_rows":  # counted row by row, where it strikes
                    self.injected[fault.name] += 1
                if only_one:
                    break
        return hits

    def _hits(self, number: int, fault: Fault, call: int, subject: str) -> bool:
        if fault.sticky and (number, subject) in self._stuck_to:
            return True
        left = self._left[number]
        if left is not None:
            hit = left > 0
            self._left[number] = max(0, left - 1)
        elif fault.first is not None:
            hit = self._calls_of(number, subject) <= fault.first and (
                fault.rate is None or self.random(fault.name, number, subject).random() < fault.rate
            )
        elif fault.at:
            hit = call in fault.at
        elif fault.rate is None or fault.kind == "missing_rows":
            hit = True
        else:
            hit = self.random(fault.name, number, call).random() < fault.rate
        if hit and fault.sticky:
            self._stuck_to[number, subject] = None
            while len(self._stuck_to) > self._REMEMBERED:
                self._stuck_to.popitem(last=False)
        return hit

    def _calls_of(self, number: int, subject: str) -> int:
        """Which call of a subject this is for a fault, counted from 1."""
        calls = self._seen.pop((number, subject), 0) + 1
        self._seen[number, subject] = calls
        while len(self._seen) > self._REMEMBERED:
            self._seen.popitem(last=False)
        return calls

    def random(self, *what: object) -> random.Random:
        """A generator that depends on the seed and on `what` alone, whatever else happens at the same time."""
        return random.Random("/".join(map(str, (self._seed, *what))))
