"""What the API's executions and the bucket's records say about orders whose answers were lost.

No machine's clock is trusted where money depends on it. Ages are the bucket's, and what they mean to the API is told
by the `Date` of the very answer that lists the executions.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from enum import Enum
from typing import Any

from prefect_eachlabs.ledger.records import Intent, Record, RecordState, VersionedRecord
from prefect_eachlabs.models import Execution, is_http_url, without_signature
from prefect_eachlabs.net.redaction import without_secrets

CLOCK_MARGIN = timedelta(seconds=60)
"""The API's dates need not come from one machine."""
ROUNDING = timedelta(seconds=3)
"""Three dates of whole seconds are reckoned with: of the claim, of the bucket's answer and of the list's."""
UNCERTAIN = timedelta(seconds=30)
"""How far apart two clocks may seem to be because answers took their time; by more, the look is repeated."""
READ_BACK_SECONDS = 300.0
"""Records are read back to so long before the oldest claim: those of all executions within the clocks' margin."""
WALKED_BACK_SECONDS = 3600.0
"""The walk over executions goes back to so long before the oldest claim: rows in between cost only their page."""
LISTED_FOR = timedelta(days=7)
"""A prediction that is younger is still listed (the vendor's list goes back 90 days)."""
LEAST_CUT_CHARACTERS = 100
"""Of an echo that was cut; two short texts may begin alike by chance."""
MOST_COMPARED_CHARACTERS = 20_000
"""Of two texts that are not the same, to see whether they nearly are."""
_MARKS = re.compile(r"[^\w\s\x00-\x7f]{31}")
"""More marks on one letter than any script has (Unicode's UAX 15 says 30): to sort 100,000 of them takes minutes."""


# ------------------------------------------------------------------------------------------------ echoes


def normalised(value: Any, *, most_characters: float = float("inf")) -> Any:
    """A form in which an input equals its echo: white space, Unicode form, number type and signatures do not count.

    Longer text stays as it is.
    """
    if isinstance(value, str):
        if len(value) > most_characters:
            return value
        # An echo comes without the secrets in use, so a prompt that happens to hold one is compared without it.
        text = without_secrets(value)
        text = text if _MARKS.search(text) else unicodedata.normalize("NFC", text)
        return without_signature(" ".join(text.split()))
    if value is None:
        return value
    if isinstance(value, bool):
        return f"\0{value}"  # to Python, True is 1
    if isinstance(value, (int, float)):
        try:
            return float(value)
        except OverflowError:  # JSON's numbers have no end
            return value
    if isinstance(value, Mapping):
        return {str(name): normalised(inner, most_characters=most_characters) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [normalised(inner, most_characters=most_characters) for inner in value]
    return value


def _both(echo: Mapping[str, Any], sent: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """An echo's fields that were sent, and what was sent, both normalised."""
    # Four times as long as all that was sent, and a signature more: no text of ours grows so by being echoed.
    most_characters = 4 * len(str(sent)) + 4_096
    of_ours = {name: value for name, value in echo.items() if name in sent}
    return normalised(of_ours, most_characters=most_characters), normalised(sent)


def fit(echo: Mapping[str, Any], sent: Mapping[str, Any]) -> int | None:
    """How many fields of an echo are what was sent; None when it is the echo of another input.

    The API may have added defaults, not left out or changed a field. So an echo can be that of several inputs, of
    which the one with the most fields fits best.
    """
    said, ours = _both(echo, sent)
    return len(ours) if all(name in said and said[name] == value for name, value in ours.items()) else None


def may_share_an_echo(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether one echo, completed by defaults, could be that of both inputs: no field of both differs."""
    ours, theirs = normalised(one), normalised(other)
    return all(theirs[name] == value for name, value in ours.items() if name in theirs)


def is_near(echo: Mapping[str, Any], sent: Mapping[str, Any]) -> bool:
    """Whether an echo may be that of an input although it differs: cut, escaped, re-hosted, or without its nulls."""
    return _is_near(*_both(echo, sent))


def _is_near(said: Any, ours: Any) -> bool:
    if said == ours:
        return True
    if isinstance(ours, Mapping):
        return isinstance(said, Mapping) and all(_is_near(said.get(name), value) for name, value in ours.items())
    if isinstance(ours, list):
        return isinstance(said, list) and len(said) == len(ours) and all(map(_is_near, said, ours))
    if said is None or ours is None or isinstance(said, (Mapping, list)):
        return False
    one, other = _bare_text(said), _bare_text(ours)
    shorter, longer = sorted((one, other), key=len)
    is_cut = len(shorter) >= LEAST_CUT_CHARACTERS and longer.startswith(shorter)
    are_urls = is_http_url(str(said)) and is_http_url(str(ours))
    return (one == other and bool(one)) or is_cut or are_urls


def _bare_text(value: Any) -> str:
    """Letters and digits alone, unescaped: what escaping, cutting and tidying leave as it is."""
    text = f"{value:g}" if isinstance(value, float) else str(value)[:MOST_COMPARED_CHARACTERS]
    with suppress(ValueError):  # at a number of more digits than Python takes for one
        text = html.unescape(html.unescape(text))
    return "".join(character for character in text.casefold() if character.isalnum())


# --------------------------------------------------------------------------------------- what is looked at


@dataclass(frozen=True)
class Listing:
    """The executions, as far back as a walk went.

    Attributes:
        rows: Newest first.
        is_whole: The walk went far enough back.
        has_end: It went to the end of the list.
        ahead_of_bucket: The API's clock (the `Date` of its answer) minus the bucket's, at least and at most; None: it
            gave no date.
    """

    rows: tuple[Execution, ...]
    is_whole: bool = True
    has_end: bool = True
    ahead_of_bucket: tuple[timedelta, timedelta] | None = None


@dataclass(frozen=True)
class Span:
    """When an order whose answer was lost may have created its prediction, by the bucket's clock.

    Attributes:
        since: When its claim was written.
        until: When an abandoned POST creates nothing more.
        tight_seconds: How long after its claim the POST was given up: most create within that.
    """

    since: datetime
    until: datetime
    tight_seconds: float


class Zone(int, Enum):
    """Where an execution stands to an order; lower is likelier to be what it bought."""

    TIGHT = 0
    WITHIN = 1
    DOUBTFUL = 2
    """So little before the claim that clocks may be to blame, or without a usable date: it is not adopted."""


@dataclass
class Evidence:
    """One look: a listing, and then the records read one after the other.

    Attributes:
        listing: The executions.
        began_at: Loop time before the walk began.
        oldest_seconds: Age of the oldest claim that is to be settled, then.
        named: Predictions that a record, or this process, accounts for.
        live: Model and input of others' claims whose POST may be under way.
        unsettled: Model, input and item of others' claims whose POST may have bought unseen.
        must_show: Predictions known by id that a list that sees must show.
        lost: Predictions that may be missing from a list (cancelled ones).
    """

    listing: Listing
    began_at: float
    oldest_seconds: float
    named: set[str] = field(default_factory=set)
    live: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    unsettled: list[tuple[str, dict[str, Any], str]] = field(default_factory=list)
    must_show: set[str] = field(default_factory=set)
    lost: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._by_id = {row.id: row for row in self.listing.rows}
        self._place = {row.id: place for place, row in enumerate(self.listing.rows)}
        self._names: dict[str, dict[str, str]] = {}
        self._ahead: timedelta | None = None
        self._known_from: list[tuple[datetime, int]] = []
        self._has_all_dates = all(row.created_at is not None for row in self.listing.rows)

    # ---- taken in

    def know(self, prediction_id: str, age_seconds: float, *, settling_seconds: float, now: float) -> None:
        """This process bought it so long before the loop's time `now`."""
        self.named.add(prediction_id)
        if self._listed_after(settling_seconds, now) < age_seconds < self.oldest_seconds + WALKED_BACK_SECONDS / 2:
            self.must_show.add(prediction_id)

    def _listed_after(self, settling_seconds: float, now: float) -> float:
        """The age that shows, at `now`, that something had to be listed when the walk began."""
        return settling_seconds + now - self.began_at

    def read(
        self,
        held: VersionedRecord,
        *,
        ours: Mapping[str, str],
        claim_seconds: float,
        settling_seconds: float,
        now: float,
    ) -> None:
        """Takes in what one record says, read at the loop's time `now`.

        `ours` are the items whose claims are being settled here, and the runs that settle them.
        """
        record = held.record
        self.named |= record.named_predictions
        if record.prediction_id is not None:
            self._read_prediction(held, record.prediction_id, self._listed_after(settling_seconds, now))
        if record.intent is Intent.SETTLE and ours.get(record.item_id) == record.run_id:
            return
        is_claim = record.state is RecordState.CLAIMED
        if is_claim and record.intent is Intent.POST and held.age_seconds <= claim_seconds + 1:
            self.live.append((record.model, record.order))
        elif record.may_have_bought_unseen:
            self.unsettled.append((record.model, record.order, record.item_id))

    def _read_prediction(self, held: VersionedRecord, prediction_id: str, listed_after_seconds: float) -> None:
        record = held.record
        if record.state is RecordState.CANCELLED or record.cancel_requested:
            self.lost.add(prediction_id)
        elif held.age_seconds > listed_after_seconds and self._is_within_reach(held):
            self.must_show.add(prediction_id)
        row = self._by_id.get(prediction_id)
        if row is None:
            return
        if row.model is not None:
            self._names.setdefault(record.model, {}).setdefault(row.model, prediction_id)
        if not self._has_all_dates:
            self._known_from.append((held.modified_at, self._place[prediction_id]))
        if row.created_at is not None:
            # The record was written after the execution was created: at most the true difference.
            ahead = row.created_at - held.modified_at
            self._ahead = ahead if self._ahead is None else max(self._ahead, ahead)

    def _is_within_reach(self, held: VersionedRecord) -> bool:
        """Whether the walk went as far back as a record's prediction, which may be older than the record."""
        created_at = held.record.created_at
        if created_at is None:
            return False
        age = datetime.now(timezone.utc) - created_at
        if self.listing.has_end:
            return age < LISTED_FOR
        return age.total_seconds() < self.oldest_seconds + WALKED_BACK_SECONDS / 2

    # ---- what it shows

    @property
    def shows_what_is_known(self) -> bool:
        """Whether a prediction that is known by id is among the rows: their ids are those of predictions."""
        return not self.named.isdisjoint(self._by_id)

    def candidates(self, spans: Sequence[tuple[str, Span]]) -> list[tuple[Zone, Execution]]:
        """The executions that no record names and that one of these orders may have bought, the likeliest first.

        Args:
            spans: Model and span of each order.
        """
        found: list[tuple[tuple[int, bool, float], Zone, Execution]] = []
        for row in self.listing.rows:
            if row.id in self.named:
                continue
            best: tuple[tuple[int, bool, float], Zone] | None = None
            for model, span in spans:
                zone = self.zone(row, span) if self.may_be_named(row, model) else None
                if zone is not None:
                    rank = (zone.value, row.model != model, self.distance_seconds(row, span))
                    best = min(best, (rank, zone)) if best is not None else (rank, zone)
            if best is not None:
                found.append((best[0], best[1], row))
        return [(zone, row) for _, zone, row in sorted(found, key=lambda entry: entry[0])]

    def may_be_named(self, row: Execution, model: str) -> bool:
        """Whether a row may be of the model: by its name, or where no known prediction shows the model's name."""
        names = self._names.get(model)
        return row.model is None or row.model == model or names is None or row.model in names

    def is_known_as(self, name: str | None, model: str) -> bool:
        """Whether predictions of the model that are known by id are listed under this name."""
        return name is not None and name in self._names.get(model, {})

    def zone(self, row: Execution, span: Span) -> Zone | None:
        """Where the row stands to the order; None: it cannot be what it bought."""
        low, high = self._ahead_bounds()
        if row.created_at is None:
            before = [place for modified_at, place in self._known_from if modified_at < span.since - CLOCK_MARGIN]
            return None if before and self._place[row.id] > min(before) else Zone.DOUBTFUL
        if low is None or high is None:
            latest = newest(self.listing.rows) or row.created_at
            oldest = latest - timedelta(seconds=self.oldest_seconds) - CLOCK_MARGIN
            return Zone.DOUBTFUL if row.created_at >= oldest else None
        if row.created_at < span.since + low - CLOCK_MARGIN or row.created_at > span.until + high + CLOCK_MARGIN:
            return None
        usable = low if high - low <= UNCERTAIN else high
        if row.created_at < span.since + usable - ROUNDING:
            return Zone.DOUBTFUL
        tight = timedelta(seconds=span.tight_seconds) + ROUNDING
        return Zone.TIGHT if row.created_at <= span.since + high + tight else Zone.WITHIN

    def distance_seconds(self, row: Execution, span: Span) -> float:
        """How far the row is from the claim; infinite without a date."""
        low, _ = self._ahead_bounds()
        if row.created_at is None or low is None:
            return float("inf")
        return abs((row.created_at - low - span.since).total_seconds())

    def _ahead_bounds(self) -> tuple[timedelta | None, timedelta | None]:
        """How far the list's dates are ahead of the bucket's clock, at least and at most.

        Its own `Date` says so, to about a second. Predictions that are known by id show where that cannot be.
        """
        told, seen = self.listing.ahead_of_bucket, self._ahead
        if told is None:
            return seen, None if seen is None else seen + CLOCK_MARGIN
        low, high = told
        if seen is None:
            return low, high
        if seen > high + CLOCK_MARGIN:
            return seen, seen + CLOCK_MARGIN
        if seen < low - CLOCK_MARGIN:
            return seen, high
        return max(low, seen), max(high, seen)  # a `Date` may be some seconds old

    def blind_for(self, model: str) -> str | None:
        """Why this list does not see what orders of the model bought; None when nothing speaks against it."""
        if not self.listing.is_whole:
            return "the API's list is too long to be read back to the lost order"
        missing = self.must_show - self.lost - self._by_id.keys()
        if missing:
            return f"the API's list does not show prediction {min(missing)}"
        for name, prediction_id in self._names.get(model, {}).items():
            if name != model:
                return f"the API lists prediction {prediction_id} under another model's name, {name[:80]!r}"
        return None

    def is_being_bought(self, model: str, input: dict[str, Any]) -> bool:
        """Whether another claim, whose POST may be under way, could buy what this input's echo looks like."""
        return any(model == other and may_share_an_echo(input, theirs) for other, theirs in self.live)

    def better_claim(self, model: str, echo: Mapping[str, Any], fields: int) -> str | None:
        """The item of another unsettled claim whose input an echo fits better than one with so many fields."""
        for other, theirs, item_id in self.unsettled:
            if model == other and (fit(echo, theirs) or 0) > fields:
                return item_id
        return None


def newest(rows: Iterable[Execution]) -> datetime | None:
    """The latest creation among the rows: the API's clock says at least that."""
    return max((row.created_at for row in rows if row.created_at is not None), default=None)


def are_related(name: str, record: Record) -> bool:
    """Whether a list may call the record's model so: the one name holds the other, or the version."""
    listed = _bare_text(name)
    known = [_bare_text(word) for word in (record.model, record.version or "") if word]
    return any(word in listed or listed in word for word in known if word and listed)
