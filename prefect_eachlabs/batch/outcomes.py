"""What became of each row of a batch, and what it all comes to; pure."""

from __future__ import annotations

import heapq
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Annotated, Any, NamedTuple, overload

import orjson
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as as_model

from prefect_eachlabs.batch.source import Wanted
from prefect_eachlabs.batch.tables import BadRow
from prefect_eachlabs.errors import (
    EachlabsError,
    ItemConflict,
    OutcomeUnknown,
    PredictionFailed,
    Rejected,
    SetupError,
    Skipped,
)
from prefect_eachlabs.models import Item, StoredImage
from prefect_eachlabs.net.redaction import shown

MESSAGE_CHARACTERS = 600
SLOWEST = 10
MOST = 2**53
"""Numbers of a report are less."""


class RowState(str, Enum):
    """The five ends that a row can come to."""

    STORED = "stored"
    """Bought in this run, safe in the bucket."""
    REUSED = "reused"
    """Safe in the bucket; this run bought nothing for it."""
    FAILED = "failed"
    AMBIGUOUS = "ambiguous"
    """Nobody can tell whether it was bought; it is not repeated."""
    SKIPPED = "skipped"
    """Left out on purpose; nothing was bought."""


THERE = (RowState.STORED, RowState.REUSED)
NOT_THERE = (RowState.FAILED, RowState.AMBIGUOUS, RowState.SKIPPED)


@dataclass(frozen=True)
class Outcome:
    """A row of the report.

    Attributes:
        row: The line of the source.
        table_row: The row of the table, from 1 on: a header is none, and a row may have several lines; in
            Excel the number that it shows.
        state: What became of it.
        item_id, fingerprint, model, version, prompt, image_url, labels: What was wanted, as far as it could be read.
        uri: Where its picture is.
        prediction_id: What was bought for it.
        bought_by: The id of the run that was billed for it; None: nobody was, or nobody knows.
        cost_usd: What the API has billed for it; None: nothing was ordered, or the vendor has not told.
        seconds: From its begin (places included) until its picture was safe.
        predict_time_seconds: The model's own time.
        error: Kind, message and the API's code, when there is no picture.
        final: It failed for good: it is tried again only when asked.
    """

    row: int
    state: RowState
    item_id: str | None = None
    fingerprint: str | None = None
    model: str | None = None
    version: str | None = None
    prompt: str | None = None
    image_url: str | None = None
    labels: dict[str, str] = field(default_factory=dict)
    uri: str | None = None
    prediction_id: str | None = None
    bought_by: str | None = None
    sha256: str | None = None
    size_bytes: int | None = None
    width_px: int | None = None
    height_px: int | None = None
    cost_usd: float | None = None
    seconds: float | None = None
    predict_time_seconds: float | None = None
    error: dict[str, str | None] | None = None
    final: bool = False
    table_row: int | None = None

    @property
    def place(self) -> str:
        """Where a person finds it: `row 3 (line 4)`, the table's row and the file's line, where those differ."""
        if self.table_row is None or self.table_row == self.row:
            return f"row {self.row}"
        return f"row {self.table_row} (line {self.row})"

    @property
    def why(self) -> str:
        """Why it has no picture: its kind, and what to do."""
        return f"{self.kind}: {(self.error or {}).get('message') or ''}"

    @property
    def kind(self) -> str:
        """The word by which reports count what is not there."""
        return shown(str((self.error or {}).get("kind") or self.state.value))[:140]

    @property
    def file_name(self) -> str:
        """Its picture's name in the folder of pictures."""
        return (self.uri or "").rpartition("/")[2] or f"{self.item_id}.png"

    def to_line(self) -> bytes:
        """One line of JSON, with its end."""
        # `asdict` copies deeply, ten times as slowly.
        body = {name: getattr(self, name) for name in _FIELDS}
        return orjson.dumps({**body, "state": self.state.value}) + b"\n"

    @classmethod
    def from_line(cls, line: bytes | str) -> Outcome | None:
        """The row that a line of a report holds; None when it holds none."""
        try:
            try:
                body = orjson.loads(line)
            except ValueError:  # of what orjson refuses, NaN and half characters cost their field, not the row
                body = json.loads(line)
            if not isinstance(body, dict):
                return None
            known = {name: body[name] for name in _FIELDS if name in body and _is_fit(name, body[name])}
            for name in ("labels", "error"):
                if name in known:
                    pairs = known[name].items()
                    known[name] = {word: text for word, text in pairs if _is_text(word) and _is_text(text)}
            return cls(**{**known, "row": known["row"], "state": RowState(body["state"])})
        except (ValueError, KeyError, TypeError, RecursionError):
            return None


_FIELDS = tuple(one.name for one in fields(Outcome))
_TYPES: dict[str, Any] = {
    **dict.fromkeys(("labels", "error"), dict),
    **dict.fromkeys(("row", "table_row", "size_bytes", "width_px", "height_px"), int),
    **dict.fromkeys(("cost_usd", "seconds", "predict_time_seconds"), (int, float)),
    "final": bool,
}
"""What a line of a report must hold where it is not text: reports are read back, and somebody may have edited them."""


def _is_fit(name: str, value: object) -> bool:
    kind = _TYPES.get(name, str)
    if kind is str:
        return _is_text(value)
    if kind in (bool, dict):
        return isinstance(value, kind)
    # A cost that is no number, or below nothing, would spoil a budget.
    return isinstance(value, kind) and not isinstance(value, bool) and 0 <= value < MOST


def _is_text(value: object) -> bool:
    """Text that a file can hold: no half characters."""
    return isinstance(value, str) and (value.isascii() or value.encode("utf-8", "ignore").decode() == value)


def _wanted(wanted: Wanted) -> dict[str, Any]:
    item: Item = wanted.item
    prompt, image_url = item.input.get("prompt"), item.input.get("image_url")
    return {
        "row": wanted.line,
        "table_row": wanted.number,
        "item_id": item.item_id,
        "fingerprint": item.fingerprint,
        "model": item.model,
        "version": item.version,
        "prompt": prompt if isinstance(prompt, str) else None,
        "image_url": image_url if isinstance(image_url, str) else None,
        "labels": item.labels,
    }


_OF_THE_PICTURE = (
    *("uri", "prediction_id", "bought_by", "sha256", "size_bytes"),
    *("width_px", "height_px", "predict_time_seconds"),
)


def stored(
    wanted: Wanted, image: StoredImage, *, is_ours: bool, cost_usd: float | None, seconds: float | None
) -> Outcome:
    """It is in the bucket: bought by this run, or found."""
    return Outcome(
        **_wanted(wanted),
        state=RowState.STORED if is_ours else RowState.REUSED,
        cost_usd=cost_usd,
        seconds=None if seconds is None else round(seconds, 3),
        **{name: getattr(image, name) for name in _OF_THE_PICTURE},
    )


def found(wanted: Wanted, prediction_id: str | None, cost_usd: float | None) -> Outcome:
    """It was bought by another run, says its record."""
    return Outcome(**_wanted(wanted), state=RowState.REUSED, prediction_id=prediction_id, cost_usd=cost_usd)


def not_there(
    wanted: Wanted,
    error: EachlabsError,
    *,
    seconds: float | None = None,
    bought_by: str | None = None,
    prediction_id: str | None = None,
    cost_usd: float | None = None,
) -> Outcome:
    """It is not in the bucket, and why; and what was ordered for it all the same."""
    state = RowState.FAILED
    if isinstance(error, Skipped):
        state = RowState.SKIPPED
    elif isinstance(error, OutcomeUnknown):
        state = RowState.AMBIGUOUS
    for_good = isinstance(error, (PredictionFailed, Rejected)) and not isinstance(error, (SetupError, ItemConflict))
    said = {"kind": error.kind, "message": error.message[:MESSAGE_CHARACTERS], "code": error.code}
    return Outcome(
        **_wanted(wanted),
        state=state,
        prediction_id=prediction_id or error.prediction_id,
        bought_by=bought_by,
        cost_usd=cost_usd,
        seconds=None if seconds is None else round(seconds, 3),
        error=said,
        final=for_good,
    )


def refused(row: BadRow) -> Outcome:
    """The row is no item."""
    said: dict[str, str | None] = {"kind": "bad input", "message": row.reason[:MESSAGE_CHARACTERS], "code": None}
    return Outcome(
        row=row.line, table_row=row.number, state=RowState.FAILED, item_id=row.item_id, prompt=row.prompt, error=said
    )


class Totals:
    """Counts outcomes as they come, in constant memory; what the run itself has spent, its budget knows."""

    def __init__(self) -> None:
        self.counts: Counter[RowState] = Counter()
        self.kinds: dict[RowState, Counter[str]] = {state: Counter() for state in RowState}
        self.pictures_cost_usd = 0.0
        self.without_cost = 0
        self._slowest: list[tuple[float, int, str]] = []

    def add(self, outcome: Outcome) -> None:
        self.counts[outcome.state] += 1
        if outcome.state not in THERE:
            self.kinds[outcome.state][outcome.kind] += 1
            return
        self.pictures_cost_usd += outcome.cost_usd or 0.0
        self.without_cost += not outcome.cost_usd
        if outcome.state is RowState.STORED and outcome.seconds is not None:
            heapq.heappush(self._slowest, (outcome.seconds, outcome.row, outcome.item_id or ""))
            if len(self._slowest) > SLOWEST:
                heapq.heappop(self._slowest)

    def cost_was_told(self, outcome: Outcome) -> None:
        """A row's cost, which had not been settled when it was counted."""
        if outcome.state in THERE:
            self.pictures_cost_usd += outcome.cost_usd or 0.0
            self.without_cost -= 1

    @property
    def items(self) -> int:
        return self.counts.total()

    @property
    def not_there(self) -> int:
        """Rows without a picture."""
        return self.items - self.counts[RowState.STORED] - self.counts[RowState.REUSED]

    def count(self, state: RowState) -> int:
        return self.counts[state]

    def why(self) -> str:
        """`3 failed (2 bad input, 1 timed out), 5 skipped (5 budget)`; empty when every row has its picture."""
        parts = []
        for state in NOT_THERE:
            if self.counts[state]:
                kinds = ", ".join(f"{count} {kind}" for kind, count in _commonest(self.kinds[state])[:8])
                parts.append(f"{self.counts[state]} {state.value} ({kinds})")
        return ", ".join(parts)

    def as_json(self) -> dict[str, Any]:
        """The totals of `report.json`."""
        return {
            "items": self.items,
            **{state.value: self.counts[state] for state in RowState},
            "pictures_cost_usd": money(self.pictures_cost_usd),
            "pictures_without_a_told_cost": self.without_cost,
            "failures_by_kind": {
                state.value: dict(_commonest(self.kinds[state])) for state in NOT_THERE if self.kinds[state]
            },
            "slowest": [
                {"seconds": seconds, "row": row, "item_id": item_id}
                for seconds, row, item_id in sorted(self._slowest, reverse=True)
            ],
        }


def _commonest(kinds: Counter[str]) -> list[tuple[str, int]]:
    return sorted(kinds.items(), key=lambda one: (-one[1], one[0]))


def money(usd: float) -> float:
    """Dollars without what floating point adds."""
    return round(usd, 6)


def spending(cost_usd: float, unknown: int, expected_usd: float | None) -> str:
    """What a run has spent, in words: what is not told is said, never taken for 0."""
    told = f"${cost_usd:,.4f}"
    if not unknown:
        return told
    about = "" if expected_usd is None else f", about ${expected_usd:,.4f}"
    return f"{told} and {unknown:,} {'order' if unknown == 1 else 'orders'} of unknown cost{about}"


class RowResult(NamedTuple):
    """What became of a row.

    Attributes:
        id: Its item's id: the row's own, or the fingerprint of its input; None where no id could be read.
        status: `stored`, `reused`, `failed`, `ambiguous` or `skipped`.
        uri: Where its picture is; None: it has none.
        cost_usd: What the API has billed for it; None: nothing, or not told yet.
        error: Why it has no picture: a kind, and what to do; None: it has one.
    """

    id: str | None
    status: str
    uri: str | None
    cost_usd: float | None
    error: str | None

    @classmethod
    def of(cls, outcome: Outcome) -> RowResult:
        error = None if outcome.error is None else outcome.why
        return cls(outcome.item_id, outcome.state.value, outcome.uri, outcome.cost_usd, error)


class RowResults(Sequence[RowResult]):
    """One entry a row, in the order of the rows. Not a list: Prefect looks into lists for futures, entry by entry."""

    def __init__(self, entries: Iterable[RowResult] = ()) -> None:
        self._entries = tuple(entries)

    def __len__(self) -> int:
        return len(self._entries)

    @overload
    def __getitem__(self, index: int) -> RowResult: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[RowResult]: ...

    def __getitem__(self, index: int | slice) -> RowResult | Sequence[RowResult]:
        return self._entries[index]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RowResults) and self._entries == other._entries

    def __hash__(self) -> int:
        return hash(self._entries)

    def __repr__(self) -> str:
        return f"<{len(self)} rows>"


@as_model(frozen=True, config=ConfigDict(arbitrary_types_allowed=True))
class BatchResult:
    """What a batch came to: totals, and an entry for each row that was handed over.

    `items` is the sum of the five counts; `not_there` of the last three. Iterating gives the entries.

    Attributes:
        cost_usd: What the API has billed to this run, as far as it has told, pictures that are not stored included.
        cost_unknown: Orders of this run whose cost is not told (lost, in flight, not settled); `cost_usd` lacks them.
        cost_unknown_expected_usd: What those come to at the prices that were told; None: nobody knows a price.
        pictures_cost_usd: What all its pictures cost, those of earlier runs included.
        cost_by_model: Of this run: model → pictures, cost_usd, mean_usd.
        report_uri: The totals (`report.json`); the rows, the page and the sheet lie beside it.
        index_uri: The page; None when the source could not be read to its end.
        state: `completed`, or `stopped` by what `stopped_by` says.
        why: What is not there, by kind; empty when every row has its picture.
        rows: Each row's id, status, uri, cost_usd and error, in the order of the rows; none of a file's, whose rows
            are in the report. Not kept where Prefect keeps results.
    """

    batch_id: str
    run: str
    state: str
    items: int
    stored: int
    reused: int
    failed: int
    ambiguous: int
    skipped: int
    cost_usd: float
    cost_unknown: int
    cost_unknown_expected_usd: float | None
    pictures_cost_usd: float
    seconds: float
    report_uri: str
    index_uri: str | None
    cost_by_model: Mapping[str, Any] = field(default_factory=dict)
    failures_by_kind: Mapping[str, Any] = field(default_factory=dict)
    why: str = ""
    stopped_by: str | None = None
    set_up_wrong: bool = False
    rows: Annotated[RowResults, Field(exclude=True)] = field(default_factory=RowResults, repr=False)

    def __iter__(self) -> Iterator[RowResult]:
        return iter(self.rows)

    @property
    def not_there(self) -> int:
        return self.failed + self.ambiguous + self.skipped

    @property
    def is_complete(self) -> bool:
        """Whether every row has its picture."""
        return not self.not_there and self.stopped_by is None

    @property
    def money(self) -> str:
        """`$0.1560`, and what is not told yet."""
        return spending(self.cost_usd, self.cost_unknown, self.cost_unknown_expected_usd)

    def in_words(self) -> str:
        """One sentence: the counts, why some are not there, what it cost, and where the report is."""
        words = "" if self.stopped_by is None else f"Stopped: {self.stopped_by} "
        words += f"{self.stored} stored, {self.reused} reused"
        if self.why:
            words += f", {self.why}"
        return f"{words} of {self.items}; {self.money}; {self.report_uri}"

    def exceeds(self, fail_above: float) -> bool:
        """Whether more rows than that have no picture (below 1 a share of all, from 1 on a number), or it stopped."""
        allowed = fail_above if fail_above >= 1 else fail_above * self.items
        return self.stopped_by is not None or self.not_there > allowed

    def records(self) -> list[dict[str, Any]]:
        """The entries as dicts, for `DataFrame(result.records())` or a database."""
        return [row._asdict() for row in self.rows]

    def as_json(self) -> dict[str, Any]:
        """What `--json` prints: the totals."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name != "rows"}
