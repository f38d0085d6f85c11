"""Finds out what a POST without an answer has bought: through the account's executions and the echoed input.

All unresolved claims of a destination are settled together: one walk over the executions, then one listing of the
records (in this order, so that a claim whose prediction the walk showed is seen as a claim), then a question for each
candidate that no record names. Adopting a prediction is exclusive: a marker `adopted/PREDICTION_ID` names its item.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from typing import Any

from prefect_eachlabs.api.client import EachlabsClient
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
from prefect_eachlabs.ledger.adoption import take_adoption_marker
from prefect_eachlabs.ledger.echoes import fit
from prefect_eachlabs.ledger.evidence import Evidence
from prefect_eachlabs.ledger.looking import Looker
from prefect_eachlabs.ledger.records import Ledger, Overtaken, Record, RecordState, VersionedRecord, amended
from prefect_eachlabs.limits.limiter import RateLimiter
from prefect_eachlabs.models import Execution
from prefect_eachlabs.settings import AccountSettings

logger = logging.getLogger(__name__)

FIRST_LOOK_SECONDS = 1.0
"""A lost answer's prediction is often listed at once; only "there is none" needs the whole settling time."""


@dataclass
class Unsettled:
    """A claim that waits to be told what its POST has bought; all times are the loop's."""

    held: VersionedRecord
    since: float
    conclusive_at: float
    look_at: float
    written_at: float
    result: asyncio.Future[VersionedRecord] = field(repr=False)

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


class Reconciler:
    """Settles the claims of one destination, all that wait together in one look.

    Args:
        known: Predictions that this process bought itself (id → seconds since then), whatever the destination.
    """

    def __init__(
        self,
        client: EachlabsClient,
        limiter: RateLimiter,
        ledger: Ledger,
        settings: AccountSettings,
        *,
        known: Callable[[], Mapping[str, float]],
    ) -> None:
        self._ledger = ledger
        self._settings = settings
        self._looker = Looker(
            client,
            limiter,
            ledger,
            settings,
            known=known,
            ours=lambda: {entry.record.write_id for entry in self._waiting},
            meanwhile=self._keep_claims_alive,
        )
        self._waiting: list[Unsettled] = []
        self._runner: asyncio.Task[None] | None = None

    async def settle(self, held: VersionedRecord, *, conclusive_at: float, since: float) -> VersionedRecord:
        """What the claim's POST has come to: a `created` record that adopted a prediction, or the claim, without one.

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
        self._looker.forget()

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

    def _end(self, entry: Unsettled, outcome: VersionedRecord | BaseException) -> None:
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
        now = asyncio.get_running_loop().time()
        evidence = await self._looker.see(now - min(entry.since for entry in entries))
        doubts = _Doubts()
        for row in evidence.candidates({entry.record.model for entry in entries}):
            waiting = [
                entry
                for entry in entries
                if entry in self._waiting and not evidence.is_being_bought(entry.record.model, entry.record.order)
            ]
            if not waiting:
                break
            prediction = await self._looker.echo(row.id)
            if isinstance(prediction, float):
                doubts.again_at = max(doubts.again_at, prediction)
            elif prediction.input is None:
                doubts.models.add(row.model or "")
            else:
                await self._match(row, prediction.input, row.model or prediction.model, waiting, evidence, doubts)
        for entry in entries:
            if entry in self._waiting:
                self._conclude(entry, evidence, doubts)

    async def _match(
        self,
        row: Execution,
        echo: Mapping[str, Any],
        model: str | None,
        waiting: Iterable[Unsettled],
        evidence: Evidence,
        doubts: _Doubts,
    ) -> None:
        """Gives an execution to the claim that its echo fits best."""
        fits = [
            (fields, entry)
            for entry in waiting
            if (model or entry.record.model) == entry.record.model
            and (fields := fit(echo, entry.record.order)) is not None
        ]
        if fits and not evidence.has_read_its_record(row):
            await self._looker.see_everything(evidence)
            if row.id in evidence.named:
                return
        for fields, entry in sorted(fits, key=lambda pair: -pair[0]):
            rival = evidence.better_claim(entry.record.model, dict(echo), fields)
            if rival is not None:
                doubts.rivals[entry.record.item_id] = rival
            elif entry in self._waiting and await self._adopt(entry, row.id):
                return

    def _conclude(self, entry: Unsettled, evidence: Evidence, doubts: _Doubts) -> None:
        now = asyncio.get_running_loop().time()
        record = entry.record
        if evidence.is_being_bought(record.model, record.order):
            # Somebody may be buying the same input this moment: what the walk shows may be theirs.
            entry.look_at = now + max(1.0, self._settings.claim_seconds / 4)
        elif evidence.began_at < entry.conclusive_at:
            entry.look_at = entry.conclusive_at
        elif doubts.again_at > now:
            entry.look_at = doubts.again_at
        elif (blind_for := evidence.blind_for()) is not None:
            self._end(entry, _nobody_can_tell(entry, blind_for))
        elif record.model in doubts.models or "" in doubts.models:
            self._end(entry, _nobody_can_tell(entry, "the API does not say what a prediction's input was"))
        elif (rival := doubts.rivals.get(record.item_id)) is not None:
            self._end(entry, _nobody_can_tell(entry, f"what was found may be item {rival}'s, which is not settled"))
        else:
            self._end(entry, entry.held)

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
