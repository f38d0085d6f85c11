"""Finds out what a POST without an answer has bought: through the account's executions and the echoed input.

All unresolved claims of a destination are settled together: one walk over the executions, then one listing of the
records (in this order, so that a claim whose prediction the walk showed is seen as a claim), then a question for each
candidate that no record names. Adopting a prediction is exclusive: a marker `adopted/PREDICTION_ID` names its item.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from typing import Any, TypeVar

from prefect_eachlabs.client import EachlabsClient
from prefect_eachlabs.echoes import fit
from prefect_eachlabs.errors import (
    EachlabsError,
    KeyRefused,
    NotSent,
    OutcomeUnknown,
    Rejected,
    SetupError,
    StoreFailed,
    Throttled,
    Unanswered,
)
from prefect_eachlabs.markers import take_adoption_marker
from prefect_eachlabs.models import Execution, Prediction
from prefect_eachlabs.pacing import Place, Places
from prefect_eachlabs.records import Held, Ledger, Overtaken, Record, RecordState, amended
from prefect_eachlabs.settings import AccountSettings
from prefect_eachlabs.sight import READ_BACK_SECONDS, WALKED_BACK_SECONDS, Sight, newest

logger = logging.getLogger(__name__)
T = TypeVar("T")

FIRST_LOOK_SECONDS = 1.0
"""A lost answer's prediction is often listed at once; only "there is none" needs the whole settling time."""
UNKNOWN_ID_GRACE_SECONDS = 30.0
"""A prediction that is listed may be invisible right after its creation; later a 404 means that it is not ours."""
PAGE_ROWS = 100
MOST_PAGES = 100
READS_AT_A_TIME = 16
REMEMBERED = 10_000


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
class _Doubts:
    """What one look leaves open."""

    models: set[str] = field(default_factory=set)
    """Of executions whose input nobody says ("": of an execution whose model nobody says)."""
    again_at: float = 0.0
    """Loop time when an execution that is not visible yet must be."""
    rivals: dict[str, str] = field(default_factory=dict)
    """Item → the other item whose own lost order it must not take."""


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
        self._echoes: OrderedDict[str, Prediction] = OrderedDict()
        self._invisible_since: OrderedDict[str, float] = OrderedDict()
        self._old_names: dict[str, tuple[str, set[str]]] = {}
        self._runner: asyncio.Task[None] | None = None

    async def settle(self, held: Held, *, conclusive_at: float, since: float) -> Held:
        """What the claim's POST has come to: a `created` record that adopted a prediction, or the claim, which bought nothing.

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
                self._put_off(loop.time() + pause_seconds, error)
            except (Rejected, KeyRefused) as error:
                self._end_all(self._waiting, "the API has no listing of executions", error)
            except SetupError as error:
                for entry in list(self._waiting):
                    self._end(entry, error)
            except asyncio.CancelledError:
                raise
            except Exception as error:
                logger.exception("Settling failed.")
                self._end_all(self._waiting, "settling failed", error)
        self._old_names.clear()

    def _put_off(self, until: float, error: EachlabsError) -> None:
        """Looks again later; whoever has waited a deadline beyond what would have been conclusive is told so."""
        now = asyncio.get_running_loop().time()
        overdue = [e for e in self._waiting if now > e.conclusive_at + self._settings.deadline_seconds]
        self._end_all(overdue, f"what must be asked gets no answer ({error.message})", error)
        for entry in self._waiting:
            entry.look_at = max(entry.look_at, until)

    def _end_all(self, entries: Iterable[Unsettled], reason: str, cause: BaseException) -> None:
        for entry in list(entries):
            self._end(entry, _nobody_can_tell(entry, reason, cause))

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
            if entry in self._waiting and now - entry.written_at > self._settings.claim_seconds / 2:
                try:
                    await self._rewrite(entry, amended(entry.record))
                except StoreFailed as error:
                    logger.warning("Item %s: its claim could not be kept alive (%s).", entry.record.item_id, error)

    async def _take_request(self) -> Place:
        """A place for a question; claims are kept alive while it is waited for."""
        taking = asyncio.ensure_future(self._places.take_request(question=True))
        try:
            while not taking.done():
                await asyncio.wait({taking}, timeout=self._settings.claim_seconds / 4)
                await self._keep_claims_alive()
            return taking.result()
        except BaseException:
            taking.cancel()
            with suppress(asyncio.CancelledError):
                (await taking).unused()
            raise

    async def _rewrite(self, entry: Unsettled, record: Record) -> bool:
        """Whether the record was written; a claim that somebody else has changed ends here."""
        try:
            entry.held = await self._ledger.write(record, replacing=entry.held)
        except Overtaken as overtaken:
            self._end(entry, overtaken)
            return False
        entry.written_at = asyncio.get_running_loop().time()
        return True

    async def _look(self) -> None:
        entries = list(self._waiting)
        sight = await self._see(entries)
        doubts = _Doubts()
        for row in sight.candidates({entry.record.model for entry in entries}):
            waiting = [
                entry
                for entry in entries
                if entry in self._waiting and not sight.is_being_bought(entry.record.model, entry.record.order)
            ]
            if not waiting:
                break
            prediction = await self._echo(row.id, doubts)
            if prediction is None:
                continue
            if prediction.input is None:
                doubts.models.add(row.model or "")
                continue
            await self._match(row, prediction.input, row.model or prediction.model, waiting, sight, doubts)
        for entry in entries:
            if entry in self._waiting:
                self._conclude(entry, sight, doubts)

    async def _match(
        self,
        row: Execution,
        echo: Mapping[str, Any],
        model: str | None,
        waiting: Iterable[Unsettled],
        sight: Sight,
        doubts: _Doubts,
    ) -> None:
        """Gives an execution to the claim that its echo fits best."""
        fits = [
            (fields, entry)
            for entry in waiting
            if (model or entry.record.model) == entry.record.model
            and (fields := fit(echo, entry.record.order)) is not None
        ]
        if fits and not sight.has_read_its_record(row):
            await self._read_everything(sight)
            if row.id in sight.named:
                return
        for fields, entry in sorted(fits, key=lambda pair: -pair[0]):
            rival = sight.better_claim(entry.record.model, dict(echo), fields)
            if rival is not None:
                doubts.rivals[entry.record.item_id] = rival
            elif entry in self._waiting and await self._adopt(entry, row.id):
                return

    def _conclude(self, entry: Unsettled, sight: Sight, doubts: _Doubts) -> None:
        now = asyncio.get_running_loop().time()
        record = entry.record
        if sight.is_being_bought(record.model, record.order):
            # Somebody may be buying the same input this moment: what the walk shows may be theirs.
            entry.look_at = now + max(1.0, self._settings.claim_seconds / 4)
        elif sight.began_at < entry.conclusive_at:
            entry.look_at = entry.conclusive_at
        elif doubts.again_at > now:
            entry.look_at = doubts.again_at
        elif (blind_for := sight.blind_for()) is not None:
            self._end(entry, _nobody_can_tell(entry, blind_for))
        elif record.model in doubts.models or "" in doubts.models:
            self._end(entry, _nobody_can_tell(entry, "the API does not say what a prediction's input was"))
        elif (rival := doubts.rivals.get(record.item_id)) is not None:
            self._end(entry, _nobody_can_tell(entry, f"what was found may be item {rival}'s, which is not settled"))
        else:
            self._end(entry, entry.held)

    async def _see(self, entries: Collection[Unsettled]) -> Sight:
        began_at = asyncio.get_running_loop().time()
        oldest_seconds = began_at - min(entry.since for entry in entries)
        rows, is_whole = await self._walk(oldest_seconds)
        sight = Sight(began_at, oldest_seconds, rows, is_whole)
        for prediction_id, age_seconds in self._known().items():
            sight.know(prediction_id, age_seconds, settling_seconds=self._settings.settling_seconds)
        await self._read_records(sight, younger_than_seconds=oldest_seconds + READ_BACK_SECONDS)
        return sight

    async def _walk(self, oldest_seconds: float) -> tuple[tuple[Execution, ...], bool]:
        """The executions since the oldest claim, newest first, and whether that is all of them.

        The end is found by the API's clock alone: its newest date is not later than now.
        """
        rows: dict[str, Execution] = {}
        offset = 0
        back = timedelta(seconds=oldest_seconds + WALKED_BACK_SECONDS)
        for _ in range(MOST_PAGES):
            request = await self._take_request()
            try:
                found = await self._client.executions(limit=PAGE_ROWS, offset=offset)
            finally:
                request.done()
            offset += len(found)
            rows.update((row.id, row) for row in found)
            on_page, of_all = newest(found), newest(rows.values())
            # A page may hold less than its limit because of rows that are no predictions.
            if len(found) <= PAGE_ROWS // 2:
                return tuple(rows.values()), True
            if on_page is not None and of_all is not None and on_page < of_all - back:
                return tuple(rows.values()), True
        return tuple(rows.values()), False

    async def _read_everything(self, sight: Sight) -> None:
        """Also the records that are older than the walk: one of them may name what looks like a lost order's."""
        await self._read_records(sight, younger_than_seconds=float("inf"))

    async def _read_records(self, sight: Sight, *, younger_than_seconds: float) -> None:
        prefix = self._ledger.destination.key("records/")
        wanted: list[str] = []
        async for listed in self._ledger.store.list(prefix):
            if listed.key.endswith(".json") and listed.age_seconds <= younger_than_seconds:
                item_id = listed.key[len(prefix) : -len(".json")]
                etag, names = self._old_names.get(item_id, ("", set()))
                if etag == listed.etag:
                    sight.named |= names
                else:
                    wanted.append(item_id)
        ours = {entry.record.write_id for entry in self._waiting}
        for begin in range(0, len(wanted), 10 * READS_AT_A_TIME):
            found = await self._read_some(wanted[begin : begin + 10 * READS_AT_A_TIME])
            await self._keep_claims_alive()
            ours |= {entry.record.write_id for entry in self._waiting}
            for held in found:
                self._take_in(held, sight, ours)

    def _take_in(self, held: Held, sight: Sight, ours: Collection[str]) -> None:
        settings = self._settings
        sight.read(held, ours=ours, claim_seconds=settings.claim_seconds, settling_seconds=settings.settling_seconds)
        if held.age_seconds > sight.oldest_seconds + READ_BACK_SECONDS and not held.record.may_have_bought_unseen:
            self._old_names[held.record.item_id] = (held.etag, held.record.named_predictions)

    async def _read_some(self, item_ids: Sequence[str]) -> list[Held]:
        limit = asyncio.Semaphore(READS_AT_A_TIME)

        async def read(item_id: str) -> Held | None:
            async with limit:
                return await self._ledger.read(item_id)

        return [held for held in await asyncio.gather(*map(read, item_ids)) if held is not None]

    async def _echo(self, prediction_id: str, doubts: _Doubts) -> Prediction | None:
        """What the API says it was; None when it does not show it to us (yet)."""
        if prediction_id in self._echoes:
            return self._echoes[prediction_id]
        request = await self._take_request()
        try:
            prediction = await self._client.get(prediction_id)
        except Rejected:
            # The key is good for the listing: what it is not good for is not ours, or too young to be seen.
            now = asyncio.get_running_loop().time()
            visible_at = _remember(self._invisible_since, prediction_id, now) + UNKNOWN_ID_GRACE_SECONDS
            if visible_at > now:
                doubts.again_at = max(doubts.again_at, visible_at)
            return None
        finally:
            request.done()
        return _remember(self._echoes, prediction_id, prediction)

    async def _adopt(self, entry: Unsettled, prediction_id: str) -> bool:
        """Whether the prediction has found its claim.

        Raises:
            StoreFailed: It could not be written down: nothing may be concluded, look again.
        """
        item_id = entry.record.item_id
        if await take_adoption_marker(self._ledger, prediction_id, item_id) != item_id:
            return False
        since_seconds = asyncio.get_running_loop().time() - entry.since
        created = amended(
            entry.record,
            state=RecordState.CREATED,
            intent=None,
            unsettled_since=None,
            error=None,
            prediction_id=prediction_id,
            created_at=datetime.now(timezone.utc) - timedelta(seconds=since_seconds),
        )
        if await self._rewrite(entry, created):
            logger.info("Item %s: its lost order had bought prediction %s; adopted.", item_id, prediction_id)
            self._end(entry, entry.held)
        return True

    async def aclose(self) -> None:
        """Stops; the claims that wait stay as they are and are settled by the next run."""
        if self._runner is not None:
            self._runner.cancel()
            await asyncio.gather(self._runner, return_exceptions=True)


def _nobody_can_tell(entry: Unsettled, reason: str, cause: BaseException | None = None) -> OutcomeUnknown:
    error = OutcomeUnknown(
        f"Nobody can tell whether the lost order was billed: {reason}. It is not repeated. Look at the vendor's "
        "dashboard; run it again to look once more.",
        item_id=entry.record.item_id,
    )
    error.__cause__ = cause
    return error


def _remember(memory: OrderedDict[str, T], name: str, value: T) -> T:
    """What is remembered under the name: the first value, of the last 10,000 names."""
    value = memory.setdefault(name, value)
    while len(memory) > REMEMBERED:
        memory.popitem(last=False)
    return value
