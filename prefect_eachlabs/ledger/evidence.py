"""What one look at the API's executions and at the records shows: which executions may be what a lost POST bought.

No machine's clock is trusted where money depends on it. Ages are the bucket's; how far the API's clock is off is
only ever bounded from the side that leaves no execution out.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from typing import Any

from prefect_eachlabs.ledger.echoes import fit, may_share_an_echo
from prefect_eachlabs.ledger.records import Intent, RecordState, VersionedRecord
from prefect_eachlabs.models import Execution

CLOCK_MARGIN = timedelta(seconds=120)
"""The API's dates need not come from one machine."""
READ_BACK_SECONDS = 300.0
"""Records are read back to so long before the oldest claim."""
WALKED_BACK_SECONDS = 3600.0
"""The walk over executions goes back to so long before the oldest claim: rows in between cost only their page."""


def newest(rows: Iterable[Execution]) -> datetime | None:
    """The latest creation among the rows: the API's clock says at least that."""
    return max((row.created_at for row in rows if row.created_at is not None), default=None)


@dataclass
class Evidence:
    """One look.

    Attributes:
        began_at: Loop time before the first page was asked for.
        oldest_seconds: Age of the oldest claim that is to be settled.
        rows: The executions, newest first.
        is_whole: The walk went far enough back.
        named: Predictions that a record, or this process, accounts for.
        live: Model and input of others' claims whose POST may be under way.
        unsettled: Model, input and item of others' claims whose POST may have bought unseen.
        must_show: Predictions known by id that a listing that sees must show.
        lost: Predictions that may be missing from a listing (cancelled ones).
    """

    began_at: float
    oldest_seconds: float
    rows: tuple[Execution, ...]
    is_whole: bool
    named: set[str] = field(default_factory=set)
    live: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    unsettled: list[tuple[str, dict[str, Any], str]] = field(default_factory=list)
    must_show: set[str] = field(default_factory=set)
    lost: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._by_id = {row.id: row for row in self.rows}
        self._bucket_then: datetime | None = None
        self._ahead_of_bucket: list[timedelta] = []
        self._ahead_of_us: list[timedelta] = []

    def know(self, prediction_id: str, age_seconds: float, *, settling_seconds: float, now: float) -> None:
        """This process bought it so long before the loop's time `now`."""
        self.named.add(prediction_id)
        if self._listed_after(settling_seconds, now) < age_seconds < self.oldest_seconds + WALKED_BACK_SECONDS / 2:
            self.must_show.add(prediction_id)

    def _listed_after(self, settling_seconds: float, now: float) -> float:
        """The age that shows, at `now`, that something had to be listed when the walk began."""
        return settling_seconds + now - self.began_at

    def read(
        self, held: VersionedRecord, *, ours: Collection[str], claim_seconds: float, settling_seconds: float, now: float
    ) -> None:
        """Takes in what one record says, read at the loop's time `now`.

        `ours` are the claims that are being settled, by their write ids.
        """
        record = held.record
        self.named |= record.named_predictions
        self._bucket_then = held.modified_at + timedelta(seconds=held.age_seconds - (now - self.began_at))
        if record.prediction_id is not None and record.created_at is not None:
            age_seconds = (datetime.now(timezone.utc) - record.created_at).total_seconds()
            if record.state is RecordState.CANCELLED or record.cancel_requested:
                self.lost.add(record.prediction_id)
            elif (
                held.age_seconds > self._listed_after(settling_seconds, now)
                and age_seconds < self.oldest_seconds + WALKED_BACK_SECONDS / 2
            ):
                self.must_show.add(record.prediction_id)
            row = self._by_id.get(record.prediction_id)
            if row is not None and row.created_at is not None:
                # The record was written after the execution was created: at most the true difference.
                self._ahead_of_bucket.append(row.created_at - held.modified_at)
                self._ahead_of_us.append(row.created_at - record.created_at)
        if record.write_id in ours:
            return
        is_claim = record.state is RecordState.CLAIMED
        if is_claim and record.intent is Intent.POST and held.age_seconds <= claim_seconds + 1:
            self.live.append((record.model, record.order))
        elif record.may_have_bought_unseen:
            self.unsettled.append((record.model, record.order, record.item_id))

    # ---- what it shows

    def candidates(self, models: Collection[str]) -> list[Execution]:
        """The executions of these models that no record names and that are not surely too old, oldest first."""
        since = self._since()
        free = [
            row
            for row in self.rows
            if row.id not in self.named
            and (row.model is None or row.model in models)
            and (row.created_at is None or since is None or row.created_at >= since)
        ]
        end = datetime.max.replace(tzinfo=timezone.utc)
        return sorted(free, key=lambda row: row.created_at or end)

    def _since(self) -> datetime | None:
        """What was created before this, by the API's clock, is older than the oldest claim."""
        bounds = [] if (last := newest(self.rows)) is None else [last]
        if self._bucket_then is not None and self._ahead_of_bucket:
            bounds.append(self._bucket_then + max(self._ahead_of_bucket))
        return max(bounds) - timedelta(seconds=self.oldest_seconds) - CLOCK_MARGIN if bounds else None

    def has_read_its_record(self, row: Execution) -> bool:
        """Whether the records read so far must hold the one that names this execution, if there is one."""
        if not self._ahead_of_us or row.created_at is None:
            return False
        age = datetime.now(timezone.utc) + statistics.median_low(self._ahead_of_us) - row.created_at
        return age.total_seconds() <= self.oldest_seconds + READ_BACK_SECONDS / 5

    def blind_for(self) -> str | None:
        """Why this listing does not see; None when it does."""
        if not self.is_whole:
            return "the API's listing is too long to be read back to the lost order"
        missing = self.must_show - self.lost - self._by_id.keys()
        return f"the API's listing does not show prediction {min(missing)}" if missing else None

    def is_being_bought(self, model: str, input: dict[str, Any]) -> bool:
        """Whether another claim, whose POST may be under way, could buy what this input's echo looks like."""
        return any(model == other and may_share_an_echo(input, theirs) for other, theirs in self.live)

    def better_claim(self, model: str, echo: dict[str, Any], fields: int) -> str | None:
        """The item of another unsettled claim whose input an echo fits better than one with so many fields."""
        for other, theirs, item_id in self.unsettled:
            if model == other and (fit(echo, theirs) or 0) > fields:
                return item_id
        return None
