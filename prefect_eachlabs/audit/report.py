"""What an audit has found, for programs and for people; pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from typing import Any

ELSEWHERE = "elsewhere"
"""Where what no record names went: another tool, another destination."""
MOST_NAMED = 10_000
"""Of each finding so many are named one by one; all are counted."""


class Kind(str, Enum):
    """What an execution of the bill, or a record, comes to, and that in words. Each execution is of one kind."""

    words: str

    def __new__(cls, value: str, words: str = "") -> Kind:
        kind = str.__new__(cls, value)
        kind._value_, kind.words = value, words
        return kind

    STORED = "stored", "paid and stored"
    IN_FLIGHT = "in_flight", "in flight, or being stored"
    NOT_STORED = "not_stored", "paid and not stored"
    ONE_TOO_MANY = "one_too_many", "paid one too many"
    REPLACED = "replaced", "replaced, or bought again on purpose"
    ENDED = "ended", "failed or cancelled, at no cost"
    WITHOUT_RECORD = "without_record", "paid, and a picture without a record"
    UNKNOWN_ORDERS = "unknown_orders", "orders that may be ours and lost"
    FOREIGN = "foreign", "of other tools or destinations"
    # Of records alone: nothing in the bill is theirs, or it is counted above.
    AMBIGUOUS = "ambiguous", "orders that nobody can tell about"
    NOT_LISTED = "not_listed", "recorded and not on the bill"
    NAMED_TWICE = "named_twice", "named by two records"
    UNREADABLE = "unreadable", "records that cannot be read"
    STRAYS = "strays", "pictures without a record that name no execution of the bill"
    CORRECTED = "corrected", "costs settled late, now in their records"
    NOT_CORRECTED = "not_corrected", "costs that could not be written into their records"


ON_THE_BILL = tuple(Kind)[:9]
"""They add up to it."""
RECORDED = ON_THE_BILL[:6]
"""What records name."""
OPEN = (
    Kind.NOT_STORED,
    Kind.ONE_TOO_MANY,
    Kind.UNKNOWN_ORDERS,
    Kind.AMBIGUOUS,
    Kind.NOT_LISTED,
    Kind.NAMED_TWICE,
    Kind.UNREADABLE,
)
"""Something is paid and not stored, or cannot be told."""
NAMED = tuple(kind for kind in Kind if kind not in (Kind.STORED, Kind.ENDED))
"""Their entries are named one by one: every difference, and what is in flight."""


@dataclass(frozen=True)
class Named:
    """One difference.

    Attributes:
        prediction_id: The execution; None: of an order without one, or of an object that names none.
        destination: Whose record it is; None: nobody's.
        created_at: When it was created, by the API's clock.
        cost_usd: What the vendor says it cost; None: not told.
        said: What is the matter, and what to do.
    """

    prediction_id: str | None = None
    item_id: str | None = None
    destination: str | None = None
    model: str | None = None
    created_at: str | None = None
    cost_usd: float | None = None
    said: str = ""


@dataclass
class Finding:
    """All of a kind: how many, what they were billed, and the first 10,000 by name."""

    count: int = 0
    usd: float = 0.0
    named: list[Named] = field(default_factory=list)


@dataclass(frozen=True)
class Spent:
    """What was billed for a day, a model or a destination: `pictures` are those of what cost anything."""

    name: str
    usd: float
    pictures: int

    @property
    def usd_each(self) -> float:
        """What a picture cost."""
        return self.usd / self.pictures if self.pictures else 0.0


@dataclass(frozen=True)
class Dear:
    """A picture among the dearest of these destinations."""

    usd: float
    uri: str
    item_id: str
    model: str
    day: str
    prediction_id: str


@dataclass
class AuditReport:
    """The account's bill of a window, accounted for.

    Attributes:
        destinations: Whose records were read.
        since: Where the window begins; None: as far back as the vendor lists.
        until: Where it ends: as was asked, or when the API answered.
        executions: How many the account has in the window.
        requests: What the audit has asked the API.
        billed_usd: What all of them cost.
        recorded_usd: What those cost that records of these destinations name.
        unsettled: Pictures whose cost the vendor has not told yet: the sums lack it.
        findings: All kinds.
        by_day, by_model, by_destination: What was spent; the account's, not these destinations' alone.
        dearest: The ten dearest pictures of these destinations.
    """

    destinations: list[str]
    since: datetime | None = None
    until: datetime | None = None
    executions: int = 0
    requests: int = 0
    billed_usd: float = 0.0
    recorded_usd: float = 0.0
    unsettled: int = 0
    findings: dict[Kind, Finding] = field(default_factory=lambda: {kind: Finding() for kind in Kind})
    by_day: list[Spent] = field(default_factory=list)
    by_model: list[Spent] = field(default_factory=list)
    by_destination: list[Spent] = field(default_factory=list)
    dearest: list[Dear] = field(default_factory=list)

    def __getitem__(self, kind: Kind) -> Finding:
        return self.findings[kind]

    @property
    def is_accounted_for(self) -> bool:
        """Whether every cent of these destinations is: nothing is paid and not stored, and nothing is in doubt."""
        return not self.of(OPEN)

    def of(self, kinds: Sequence[Kind]) -> list[tuple[Kind, Finding]]:
        """Those of these kinds that there are."""
        return [(kind, self[kind]) for kind in kinds if self[kind].count]

    @property
    def window(self) -> str:
        """`2026-11-01 00:00 to 2026-11-27 09:30 UTC`."""
        since = "the beginning of the vendor's list" if self.since is None else f"{self.since:%Y-%m-%d %H:%M}"
        return f"{since} to {self.until:%Y-%m-%d %H:%M} UTC" if self.until else f"{since} to now"

    def in_words(self) -> str:
        """One sentence: the sums, and what is open."""
        said = f"${self.billed_usd:,.4f} billed for {self.executions:,} executions, ${self.recorded_usd:,.4f} of it "
        said += "accounted for by records"
        if self.is_accounted_for:
            return f"{said}; every cent of these destinations is accounted for."
        return f"{said}; open: " + ", ".join(f"{found.count:,} {kind.words}" for kind, found in self.of(OPEN)) + "."

    def as_json(self, *, most: int = MOST_NAMED) -> dict[str, Any]:
        """What `--json` prints; of each finding at most so many are named."""
        return {
            "destinations": self.destinations,
            "since": self.since and self.since.isoformat(),
            "until": self.until and self.until.isoformat(),
            "executions": self.executions,
            "requests": self.requests,
            "billed_usd": self.billed_usd,
            "recorded_usd": self.recorded_usd,
            "unsettled": self.unsettled,
            "accounted_for": self.is_accounted_for,
            **{
                kind.value: {
                    "count": found.count,
                    "usd": found.usd,
                    **({"named": [vars(one) for one in found.named[:most]]} if kind in NAMED else {}),
                }
                for kind, found in self.findings.items()
            },
            **{
                name: [{**vars(one), "usd_each": round(one.usd_each, 6)} for one in getattr(self, name)]
                for name in ("by_day", "by_model", "by_destination")
            },
            "dearest": [vars(one) for one in self.dearest],
        }
