"""What may go wrong on purpose: at a rate, at the n-th call, or for the next n calls; seeded.

A fault is written `ENDPOINT:KIND[=RATE][,NAME=VALUE]...`, for example `create:lost_answer=0.05`,
`create:error,at=3+7,status=500`, `get:late_answer,next=2,seconds=40` or `prediction:fail_moderation,matching=naked`.
"""

from __future__ import annotations

import random
from collections import Counter, OrderedDict
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Endpoint = Literal["create", "get", "cancel", "executions", "models", "presign", "upload", "prediction", "picture"]
Phase = Literal["before", "after"]

BEFORE: dict[str, str] = {
    "cut": "the connection is cut before anything is done",
    "reset": "the same, by a TCP reset",
    "error": "an error (`status`, 503) with a JSON body before anything is done",
    "empty_error": "an error (`status`, 500) with the body {} before anything is done",
    "html": "an HTML page (`status`, 502) before anything is done",
    "throttled": "429 before anything is done",
    "no_balance": "402 before anything is done",
    "redirect": "a redirect (`status`, 307) to `value` (the path itself with the other slash)",
    "late": "held for `seconds` (60), then done and answered, whether or not the client is still there",
}
"""Kinds of every `/v1` endpoint that happen before the request takes effect; the n-th call counts all of them."""

AFTER: dict[str, str] = {
    "lost_answer": "it takes effect, then the connection is cut and nothing is answered",
    "lost_reset": "the same, by a TCP reset",
    "cut_body": "it takes effect, half of the answer is sent, then the connection is cut",
    "error_after": "it takes effect, the answer is an error (`status`, 500)",
    "html_after": "it takes effect, the answer is an HTML page (`status`, 504)",
    "malformed": "it takes effect, the answer is no JSON (`value`, else the real one cut in half)",
    "late_answer": "it takes effect at once, the answer comes `seconds` (60) later",
    "drip": "it takes effect, the answer's body drips over `seconds` (60)",
}
"""Kinds of every `/v1` endpoint that happen after it took effect; the n-th call counts requests that did."""

SPECIAL: dict[str, dict[str, str]] = {
    "create": {
        "no_id": "accepted, but the 2xx answer holds no id",
        "id_name": "accepted; the id comes under the name `value` (prediction_id, id, exec_id)",
    },
    "get": {
        "not_found": "404; with `seconds`, only for so long after the POST",
        "status_word": "the status is the word `value` (warming_up)",
        "stale": "the answer is `seconds` (5) old",
        "no_echo": "the answer holds no input",
    },
    "executions": {
        "missing": "404: the endpoint is not there",
        "stale": "the answer is `seconds` (60) old",
        "missing_rows": "each row is left out at the rate, drawn row by row",
    },
    "prediction": {
        "fail": "it fails, with the error envelope in `output` (code `value`, PROVIDER_FAILED)",
        "fail_retryable": "the same with `retryable: true`",
        "fail_logs": "it fails, with the error envelope in `logs`",
        "fail_text": "it fails, with plain text in `logs`",
        "fail_moderation": "content moderation refuses it",
        "fail_under_success": "the error envelope comes under the status `success`",
        "stuck": "it never ends",
        "slow": "it takes `seconds` (60) longer",
        "output_list": "its output is a list",
        "output_object": 'its output is {"url"}',
        "output_images": 'its output is {"images": [{"url"}]}',
        "output_json": "its output is JSON in a string",
        "output_several": "it has `value` (2) pictures",
        "output_empty": 'it succeeds, its output is ""',
        "output_null": "it succeeds, its output is null",
        "output_missing": "it succeeds, without a field `output`",
        "echo_normalised": "its input is echoed in NFC, trimmed, with spaces collapsed",
        "echo_defaults": "its input is echoed with the model's defaults added",
        "echo_text": "its input is echoed as JSON in a string",
        "echo_none": "its input is not echoed",
        "unlisted": "it never appears in executions",
        "listed_late": "it appears in executions `seconds` (60) after its POST",
        "foreign_twin": "another key of the organization buys the identical input `seconds` (0) later",
        "uncancellable": "a cancel is accepted and has no effect",
    },
    "picture": {
        "truncated": "its last third is missing, the length says so",
        "cut": "the connection is cut half-way",
        "reset": "the connection is reset before anything is sent",
        "wrong_length": "Content-Length promises 64 bytes more than come",
        "no_length": "chunked, without Content-Length; the picture is whole",
        "trailing": "bytes follow after its end",
        "bad_crc": "a bit in the image data is wrong",
        "html": "an HTML page with status 200",
        "jpeg": "JPEG bytes under the name .png",
        "empty": "no bytes, with status 200",
        "not_found": "404",
        "error": "an error (`status`, 503)",
        "throttled": "429",
        "slow": "it drips over `seconds` (60)",
        "bomb": "a small PNG whose image data inflates to 1 GiB",
        "bomb_wide": "a PNG of 100,000 x 100,000 px",
        "redirect": "a redirect to the picture",
        "redirect_loop": "redirects without end",
    },
}

ASPECTS = {
    **{kind: "outcome" for kind in SPECIAL["prediction"] if kind.startswith("fail")},
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
    return dict(special) if endpoint in ("prediction", "picture") else {**BEFORE, **AFTER, **special}


class Fault(BaseModel):
    """One thing that goes wrong. Without `rate`, `at` and `next` it happens at each call.

    Attributes:
        on: The endpoint, or `prediction` (drawn once for each accepted POST) or `picture` (each download).
        kind: What happens: see `kinds_of`.
        rate: Between 0 and 1.
        at: At the n-th calls, counted from 1 since the start or the last reset.
        next: At the next n calls since it was set.
        matching: Only where the prompt contains this text.
        sticky: What was hit once (a prediction, a picture) is hit again at each further call.
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
    def phase(self) -> Phase:
        return "before" if self.kind in BEFORE or self.on in ("prediction", "picture") else "after"

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


class FaultBook:
    """Decides which call is hit. Counts calls by endpoint and phase; the same seed decides the same."""

    _REMEMBERED = 100_000

    def __init__(self, faults: Iterable[Fault] = (), *, seed: int = 0) -> None:
        self._seed = seed
        self._calls: Counter[tuple[str, Phase]] = Counter()
        self._stuck_to: OrderedDict[tuple[int, str], None] = OrderedDict()
        self.injected: Counter[str] = Counter()
        self.set(faults)

    def set(self, faults: Iterable[Fault]) -> None:
        """These faults from now on, in place of those before; calls are counted on."""
        self.faults = tuple(faults)
        self._left = [fault.next for fault in self.faults]
        self._stuck_to.clear()

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

    def random(self, *what: object) -> random.Random:
        """A generator that depends on the seed and on `what` alone, whatever else happens at the same time."""
        return random.Random("/".join(map(str, (self._seed, *what))))
