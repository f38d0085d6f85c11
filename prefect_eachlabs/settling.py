"""Finds out what a POST without an answer has bought: through the account's executions and the echoed input.

All unresolved claims of a destination are settled together: one walk over the executions, then one listing of the
records (in this order, so that a claim whose prediction the walk showed is seen as a claim), then a question for each
candidate that no record names. Adopting a prediction is exclusive: a marker `adopted/PREDICTION_ID` names its item.
"""

from __future__ import annotations

import asyncio
import json
import logging
import statistics
import unicodedata
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from typing import Any
from urllib.parse import quote

from prefect_eachlabs.client import EachlabsClient
from prefect_eachlabs.errors import (
    KeyRefused,
    NotSent,
    OutcomeUnknown,
    Rejected,
    StoreFailed,
    Throttled,
    Unanswered,
)
from prefect_eachlabs.models import Execution, Prediction, without_signature
from prefect_eachlabs.object_store import PreconditionFailed
from prefect_eachlabs.pacing import Places
from prefect_eachlabs.records import Held, Intent, Ledger, Overtaken, Record, RecordState, amended
from prefect_eachlabs.settings import AccountSettings

logger = logging.getLogger(__name__)

FIRST_LOOK_SECONDS = 1.0
"""A lost answer's prediction is often listed at once; only "there is none" needs the whole settling time."""
CLOCK_MARGIN_SECONDS = 120.0
LARGEST_SKEW = timedelta(hours=15)
PAGE_ROWS = 100
MOST_PAGES = 100
UNCALIBRATED_CANDIDATES = 20
MOST_READS_FOR_CLOCK = 2000
READS_AT_A_TIME = 16


def normalised(value: Any) -> Any:
    """A form in which an input equals its echo: white space, Unicode form, number type and signatures do not count."""
    if isinstance(value, str):
        return without_signature(" ".join(unicodedata.normalize("NFC", value).split()))
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, (int, float)):
        return float(value)
    if isinstance(value, Mapping):
        return {str(name): normalised(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [normalised(inner) for inner in value]
    return value


def echoes(echo: Mapping[str, Any], sent: Mapping[str, Any]) -> bool:
    """Whether an echoed input is what was sent; the API may have added defaults, not left out or changed a field."""
    said, ours = normalised(echo), normalised(sent)
    return all(name in said and said[name] == value for name, value in ours.items())


async def take_adoption_marker(ledger: Ledger, prediction_id: str, item_id: str) -> str:
    """Claims a prediction for an item, exclusively and for ever; returns the item that has it (which may be another).

    Raises:
        StoreFailed: The bucket did not answer.
    """
    key = ledger.destination.key(f"adopted/{quote(prediction_id, safe='')}")
    body = json.dumps({"item_id": item_id, "prediction_id": prediction_id, "write_id": uuid.uuid4().hex}).encode()
    try:
        await ledger.store.put(key, body, content_type="application/json", if_absent=True)
        return item_id
    except (PreconditionFailed, StoreFailed) as error:
        found = await ledger.store.get(key)
        if found is None:
            raise StoreFailed(f"The marker {ledger.store.uri(key)} could not be written.", item_id=item_id) from error
        try:
            return str(json.loads(found.body)["item_id"])
        except (ValueError, KeyError, TypeError):
            return "(an unreadable marker)"


@dataclass
class Unsettled:
    """A claim that waits to be told what its POST has bought; all times are the loop's."""

    held: Held
    since: float
    conclusive_at: float
    look_at: float
    written_at: float
    result: asyncio.Future[Held] = field(repr=False)

    @property
    def record(self) -> Record:
        return self.held.record


@dataclass
class Sight:
    """What one look showed: the executions, and what the records say about them."""

    began_at: float
    rows: tuple[Execution, ...]
    named: set[str] = field(default_factory=set)
    live_fingerprints: set[str] = field(default_factory=set)
    must_show: dict[str, float] = field(default_factory=dict)
    """Predictions known by id → their age in seconds."""
    skews_seconds: list[float] = field(default_factory=list)
    """The API's clock minus ours, from each execution whose record says when it was bought."""

    def read(self, held: Held, *, ours: Collection[str], claim_seconds: float) -> None:
        """Takes in what one record says."""
        record = held.record
        self.named |= record.named_predictions
        if record.prediction_id is not None and record.created_at is not None:
            age_seconds = (datetime.now(timezone.utc) - record.created_at).total_seconds()
            self.must_show[record.prediction_id] = age_seconds
            row = next((row for row in self.rows if row.id == record.prediction_id), None)
            if row is not None and row.created_at is not None:
                self.skews_seconds.append((row.created_at - record.created_at).total_seconds())
        if (
            record.state is RecordState.CLAIMED
            and record.intent is Intent.POST
            and record.write_id not in ours
            and held.age_seconds <= claim_seconds + 1
        ):
            self.live_fingerprints.add(record.fingerprint)

    def blind_for(self, *, older_than_seconds: float, younger_than_seconds: float) -> str | None:
        """A prediction that must be listed by now and is not; None when the listing sees."""
        shown = {row.id for row in self.rows}
        for prediction_id, age_seconds in self.must_show.items():
            if prediction_id not in shown and older_than_seconds < age_seconds < younger_than_seconds:
                return prediction_id
        return None


class Settler:
    """Settles the claims of one destination, all that wait together in one look.

    Args:
        known: Predictions that this process bought itself (id → seconds since then), whatever the destination.
    """

    def __init__(
        self,
        client: EachlabsClient,
        places: Places,
        ledger: Ledger,
        settings: AccountSettings,
        *,
        known: Callable[[], Mapping[str, float]],
    ) -> None:
        self._client = client
        self._places = places
        self._ledger = ledger
        self._settings = settings
        self._known = known
        self._waiting: list[Unsettled] = []
        self._echoes: dict[str, Prediction] = {}
        self._runner: asyncio.Task[None] | None = None

    async def settle(self, held: Held, *, conclusive_at: float, since: float) -> Held:
        """What the claim's POST has come to: a `created` record that adopted its prediction, or the claim: nothing.

        Args:
            held: Our own claim with the intent to settle, just written.
            conclusive_at: Loop time from which "it is not listed" means that it was not created.
            since: Loop time of the first claim that may have bought (before this process began, perhaps).

        Raises:
            OutcomeUnknown: The listing is blind or missing: nobody can tell.
            Overtaken: Another writer changed the record.
        """
        loop = asyncio.get_running_loop()
        now = loop.time()
        look_at = min(max(conclusive_at, now), now + FIRST_LOOK_SECONDS)
        entry = Unsettled(held, since, conclusive_at, look_at, now, loop.create_future())
        self._waiting.append(entry)
        if self._runner is None or self._runner.done():
            self._runner = asyncio.ensure_future(self._run())
        try:
            return await entry.result
        finally:
            if entry in self._waiting:
                self._waiting.remove(entry)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        pause_seconds = 1.0
        while self._waiting:
            due_at = min(entry.look_at for entry in self._waiting)
            if due_at > loop.time():
                await asyncio.sleep(min(due_at - loop.time(), self._settings.claim_seconds / 4))
                await self._keep_claims_alive()
                continue
            try:
                await self._look()
                pause_seconds = 1.0
            except (Unanswered, NotSent, Throttled, StoreFailed) as error:
                logger.warning("Settling is held up (%s); trying on.", error)
                pause_seconds = min(2 * pause_seconds, 30.0)
                for entry in self._waiting:
                    entry.look_at = max(entry.look_at, loop.time() + pause_seconds)
            except (Rejected, KeyRefused) as error:
                self._end_all(self._why_unknown("the API has no listing of executions", error))
            except asyncio.CancelledError:
                raise
            except Exception as error:
                logger.exception("Settling failed.")
                self._end_all(self._why_unknown("settling failed", error))

    def _why_unknown(self, reason: str, cause: BaseException | None = None) -> OutcomeUnknown:
        error = OutcomeUnknown(
            f"Nobody can tell whether the lost order was billed: {reason}. It is not repeated. Look at the vendor's "
            "dashboard; run it again to look once more."
        )
        error.__cause__ = cause
        return error

    def _end_all(self, error: OutcomeUnknown) -> None:
        for entry in list(self._waiting):
            self._end(entry, OutcomeUnknown(error.message, item_id=entry.record.item_id))

    def _end(self, entry: Unsettled, outcome: Held | BaseException) -> None:
        if entry in self._waiting:
            self._waiting.remove(entry)
        if entry.result.done():
            return
        if isinstance(outcome, BaseException):
            entry.result.set_exception(outcome)
        else:
            entry.result.set_result(outcome)

    async def _keep_claims_alive(self) -> None:
        """A claim whose settling takes longer than a claim lives is written again, that nobody takes it over."""
        now = asyncio.get_running_loop().time()
        for entry in list(self._waiting):
            if now - entry.written_at > self._settings.claim_seconds / 2:
                await self._rewrite(entry, amended(entry.record))

    async def _rewrite(self, entry: Unsettled, record: Record) -> bool:
        try:
            entry.held = await self._ledger.write(record, replacing=entry.held)
            entry.written_at = asyncio.get_running_loop().time()
        except Overtaken as overtaken:
            self._end(entry, overtaken)
            return False
        except StoreFailed as error:
            logger.warning("Item %s: its claim could not be kept alive (%s).", entry.record.item_id, error)
            return False
        return True

    async def _look(self) -> None:
        entries = list(self._waiting)
        sight = await self._see(entries)
        unreadable: set[str] = set()
        for row in self._candidates(entries, sight):
            waiting = [
                entry
                for entry in entries
                if entry in self._waiting and entry.record.fingerprint not in sight.live_fingerprints
            ]
            if not waiting:
                break
            prediction = await self._echo(row.id)
            if prediction is None:
                continue
            if prediction.input is None:
                unreadable.add(row.model or "")
                continue
            for entry in waiting:
                if (row.model or prediction.model or entry.record.model) != entry.record.model:
                    continue
                if echoes(prediction.input, entry.record.input) and await self._adopt(entry, prediction):
                    break
        for entry in entries:
            if entry in self._waiting:
                self._conclude(entry, sight, unreadable)

    def _conclude(self, entry: Unsettled, sight: Sight, unreadable: Collection[str]) -> None:
        now = asyncio.get_running_loop().time()
        blind_for = sight.blind_for(
            older_than_seconds=self._settings.settling_seconds, younger_than_seconds=now - entry.since
        )
        if entry.record.fingerprint in sight.live_fingerprints:
            # Somebody may be buying the same input this moment: what the walk shows may be theirs.
            entry.look_at = now + max(1.0, self._settings.claim_seconds / 4)
        elif sight.began_at < entry.conclusive_at:
            entry.look_at = entry.conclusive_at
        elif blind_for is not None:
            self._end(entry, self._unknown(entry, f"the API's listing does not show prediction {blind_for}"))
        elif entry.record.model in unreadable or "" in unreadable:
            self._end(entry, self._unknown(entry, "the API does not say what a prediction's input was"))
        else:
            self._end(entry, entry.held)

    def _unknown(self, entry: Unsettled, reason: str) -> OutcomeUnknown:
        error = self._why_unknown(reason)
        error.item_id = entry.record.item_id
        return error

    async def _see(self, entries: Collection[Unsettled]) -> Sight:
        loop = asyncio.get_running_loop()
        began_at = loop.time()
        oldest_seconds = began_at - min(entry.since for entry in entries)
        sight = Sight(began_at, await self._walk(oldest_seconds))
        ours = {entry.record.write_id for entry in entries}
        sight.named |= set(self._known())
        sight.must_show |= self._known()
        listed = await self._listing()
        recent = [id for id, age in listed.items() if age <= oldest_seconds + CLOCK_MARGIN_SECONDS]
        rest = [id for id in listed if id not in set(recent)]
        for held in await self._read_all(recent):
            sight.read(held, ours=ours, claim_seconds=self._settings.claim_seconds)
        if not sight.skews_seconds and len(rest) <= MOST_READS_FOR_CLOCK:
            # Nothing recent tells how the API's clock stands to ours: older records do, and name older predictions.
            for held in await self._read_all(rest):
                sight.read(held, ours=ours, claim_seconds=self._settings.claim_seconds)
        return sight

    async def _walk(self, oldest_seconds: float) -> tuple[Execution, ...]:
        """The executions since the oldest claim: page by page, newest first, until a page is short or old enough."""
        rows: dict[str, Execution] = {}
        # Rows in between cost nothing but their page: an hour more allows for clocks.
        old_enough = datetime.now(timezone.utc) - timedelta(seconds=oldest_seconds, hours=1)
        for page in range(MOST_PAGES):
            request = await self._places.take_request(question=True)
            try:
                found = await self._client.executions(limit=PAGE_ROWS, offset=page * PAGE_ROWS)
            finally:
                request.done()
            rows.update((row.id, row) for row in found)
            times = [row.created_at for row in found if row.created_at is not None]
            if len(found) < PAGE_ROWS or (times and max(times) < old_enough):
                break
        return tuple(rows.values())

    async def _listing(self) -> dict[str, float]:
        """Item id → age of its record in seconds, by the bucket's clock."""
        prefix = self._ledger.destination.key("records/")
        return {
            listed.key[len(prefix) : -len(".json")]: listed.age_seconds
            async for listed in self._ledger.store.list(prefix)
            if listed.key.endswith(".json")
        }

    async def _read_all(self, item_ids: Iterable[str]) -> list[Held]:
        limit = asyncio.Semaphore(READS_AT_A_TIME)

        async def read(item_id: str) -> Held | None:
            async with limit:
                return await self._ledger.read(item_id)

        return [held for held in await asyncio.gather(*map(read, item_ids)) if held is not None]

    def _candidates(self, entries: Iterable[Unsettled], sight: Sight) -> list[Execution]:
        """The executions that may be what the claims bought, oldest first."""
        models = {entry.record.model for entry in entries}
        free = [row for row in sight.rows if row.id not in sight.named and (row.model is None or row.model in models)]
        age_seconds = asyncio.get_running_loop().time() - min(entry.since for entry in entries)
        now = datetime.now(timezone.utc)
        if sight.skews_seconds:
            now += timedelta(seconds=statistics.median(sight.skews_seconds))
            oldest = now - timedelta(seconds=age_seconds + CLOCK_MARGIN_SECONDS)
        else:
            # Nothing told how far the API's clock is off, a time zone perhaps: the newest rows of a day count.
            free = free[:UNCALIBRATED_CANDIDATES]
            oldest = now - timedelta(seconds=age_seconds) - LARGEST_SKEW
        within = [row for row in free if row.created_at is None or row.created_at >= oldest]
        return sorted(within, key=lambda row: row.created_at or now)

    async def _echo(self, prediction_id: str) -> Prediction | None:
        if prediction_id not in self._echoes:
            request = await self._places.take_request(question=True)
            try:
                self._echoes[prediction_id] = await self._client.get(prediction_id)
            except Rejected as error:
                if isinstance(error, KeyRefused):
                    raise
                return None
            finally:
                request.done()
        return self._echoes[prediction_id]

    async def _adopt(self, entry: Unsettled, prediction: Prediction) -> bool:
        item_id = entry.record.item_id
        if await take_adoption_marker(self._ledger, prediction.id, item_id) != item_id:
            return False
        created = amended(
            entry.record,
            state=RecordState.CREATED,
            intent=None,
            unsettled_since=None,
            error=None,
            prediction_id=prediction.id,
            created_at=datetime.now(timezone.utc),
        )
        if await self._rewrite(entry, created):
            logger.info("Item %s: its lost order had bought prediction %s; adopted.", item_id, prediction.id)
            self._end(entry, entry.held)
        return True

    async def aclose(self) -> None:
        """Stops; the claims that wait stay as they are and are settled by the next run."""
        if self._runner is not None:
            self._runner.cancel()
            await asyncio.gather(self._runner, return_exceptions=True)
