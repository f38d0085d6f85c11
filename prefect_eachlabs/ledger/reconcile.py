"""Finds out what a POST without an answer has bought: through the account's executions and the echoed input.

All unresolved claims of a destination are settled together: one walk over the executions, then one listing of the
records (in this order, so that a claim whose prediction the walk showed is seen as a claim), then a question for each
candidate that no record names. Adopting a prediction is exclusive: a marker `adopted/PREDICTION_ID` names its item.

"Nothing was bought" is concluded only from a list that was seen to see, and by the bucket's clock: a process or a
machine may have stood still at any moment.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta, timezone
from functools import partial
from typing import TypeVar

from prefect_eachlabs.api.client import EachlabsClient, ExecutionsPage
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
from prefect_eachlabs.ledger.adoption import lock_prediction
from prefect_eachlabs.ledger.evidence import (
    READ_BACK_SECONDS,
    UNCERTAIN,
    WALKED_BACK_SECONDS,
    Evidence,
    Listing,
    Span,
    Zone,
    are_related,
    fit,
    is_near,
    newest,
)
from prefect_eachlabs.ledger.records import (
    Ledger,
    Record,
    RecordChanged,
    RecordState,
    VersionedRecord,
    amended,
)
from prefect_eachlabs.limits.limiter import RateLimiter
from prefect_eachlabs.models import Execution, Prediction
from prefect_eachlabs.polling.schedule import CALL_SECONDS
from prefect_eachlabs.settings import AccountSettings
from prefect_eachlabs.webhooks.calls import write_id_in
from prefect_eachlabs.webhooks.webhooks import Webhooks

logger = logging.getLogger(__name__)

T = TypeVar("T")

FIRST_LOOK_SECONDS = 1.0
"""A lost answer's prediction is often listed at once; only "there is none" needs the whole settling time."""
SHORTEST_PAUSE_SECONDS = 0.001
"""A loop may call its timers a nanosecond early."""
UNKNOWN_ID_GRACE_SECONDS = 30.0
"""A prediction that is listed may be invisible right after its creation; later a 404 means that it is not ours."""
PAGE_ROWS = 100
MOST_PAGES = 1_000
"""A hundred thousand executions: so many may come after a machine's death before others settle what it had claimed."""
READS_AT_A_TIME = 16
REMEMBERED = 10_000
MOST_RIVALS_ASKED = 20
"""So many further executions are asked about, when each order has found one: whether another fits as well."""
MOST_SIGNS_ASKED = 3
"""So many rows of a list are asked about before it counts as one whose ids nobody knows."""
OLDER_RECORDS_READ = 16
"""Where the list shows nothing that is known, so many older records say whether it should."""
MOST_LOOKS_AT_MOVING_CLOCKS = 5
CLOCKS_MOVED_SECONDS = 5.0
"""The bucket's clock and the loop's disagree by more only when the machine stood still in between."""
MOST_DISAGREEMENT_SECONDS = 20.0
"""Between the clocks of a bucket's machines: as much as a process may stand still."""
LISTED_AFTER_SECONDS = 40.0
"""The vendor calls three times, some 10 s apart: by then a prediction that ended has its webhook listed."""
LISTED_AGAIN_SECONDS = 10.0
WITHOUT_WEBHOOKS_SECONDS = 600.0
"""A list of webhooks that is missing or refused is left alone for so long."""
MOST_PAGES_OF_WEBHOOKS = 20
MOST_WRITES_OF_A_PROOF = 5
PROOF_PAUSES_SECONDS = (2.0, 5.0, 10.0, 15.0, 30.0)


@dataclass(frozen=True)
class Settled:
    """What settling has found: a `created` record; or our claim, and what that means.

    Attributes:
        held: The record now.
        doubt: Why nobody can tell whether the order bought; None with a claim: nothing was bought.
        unproven: Nothing speaks for the list that shows nothing: it is empty, and nothing is known by id.
    """

    held: VersionedRecord
    doubt: OutcomeUnknown | None = None
    unproven: bool = False


@dataclass(eq=False)
class Unsettled:
    """A claim that waits to be told what its POST has bought; `span` is the bucket's time, the rest the loop's."""

    held: VersionedRecord
    span: Span
    conclusive_at: datetime
    look_at: float
    given_up_at: float
    written_at: float
    heard_until: float
    """Until then the vendor's call may still name what it bought."""
    result: asyncio.Future[Settled] = field(repr=False)
    writing: asyncio.Lock = field(default_factory=asyncio.Lock, repr=False)

    @property
    def record(self) -> Record:
        return self.held.record

    @property
    def item_id(self) -> str:
        return self.record.item_id


@dataclass(frozen=True)
class _Moment:
    """The bucket's time, and the loop's before and after its answer."""

    bucket: datetime
    before: float
    after: float


@dataclass
class _Look:
    """What one look has found out.

    Attributes:
        evidence: The list and the records.
        began: Before the walk.
        fits: (row, its zone, entry, how many fields fit) of rows whose echo is what an entry's order sent.
        taken: Rows that were adopted in this look.
        asked: Whether GET knew a row of the list.
        again_at: Loop time when an execution that is not visible yet must be.
        doubts: Item → why nobody can tell.
        near: Item → executions that may be what it bought, and why they are not adopted.
        webhooks: Execution → the order that the vendor calls about it, by the list of webhooks; None: not one of ours.
    """

    evidence: Evidence
    began: _Moment
    fits: list[tuple[Execution, Zone, Unsettled, int]] = field(default_factory=list)
    taken: set[str] = field(default_factory=set)
    asked: bool = False
    again_at: float = 0.0
    doubts: dict[str, str] = field(default_factory=dict)
    near: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    webhooks: Mapping[str, str | None] = field(default_factory=dict)

    def candidates_of(self, entry: Unsettled) -> list[Execution]:
        """Rows that the entry may adopt, the nearest to its claim first."""
        rows = [
            row
            for row, zone, other, _ in self.fits
            if other is entry and zone is not Zone.DOUBTFUL and row.id not in self.taken
        ]
        return sorted(rows, key=lambda row: self.evidence.distance_seconds(row, entry.span))


class Reconciler:
    """Settles the claims of one destination, all that wait together in one look; each question takes a request slot.

    Args:
        known: Predictions that this process bought itself (id → seconds since then), whatever the destination.
        webhooks: The calls: they and the vendor's list of them name what an order bought.
    """

    def __init__(
        self,
        client: EachlabsClient,
        limiter: RateLimiter,
        ledger: Ledger,
        settings: AccountSettings,
        *,
        known: Callable[[], Mapping[str, float]],
        webhooks: Webhooks,
    ) -> None:
        self._client = client
        self._limiter = limiter
        self._ledger = ledger
        self._settings = settings
        self._known = known
        self._waiting: list[Unsettled] = []
        self._runner: asyncio.Task[None] | None = None
        self._heart: asyncio.Task[None] | None = None
        self._proofs: set[asyncio.Task[None]] = set()
        self._echoes: OrderedDict[str, Prediction] = OrderedDict()
        self._invisible_since: OrderedDict[str, float] = OrderedDict()
        self._other_models: set[str] = set()
        self._webhooks = webhooks
        self._woken = asyncio.Event()
        self._webhooks_not_before = 0.0
        self._ended_since: OrderedDict[str, float] = OrderedDict()
        self._called_and_stored: set[str] = set()
        webhooks.named_listeners.append(self._is_named)

    # ------------------------------------------------------------------------------------------- waiting

    async def settle(
        self, held: VersionedRecord, *, span: Span, conclusive_at: datetime, age_seconds: float
    ) -> Settled:
        """What the claim's POST has come to. Costs requests, no money.

        Args:
            held: Our own claim with the intent to settle, just written.
            span: When its POST may have created a prediction.
            conclusive_at: The bucket's time from which "it is not listed" means that it was not created.
            age_seconds: How long ago the order's claim was written, by the bucket's clock.

        Raises:
            RecordChanged: Another writer changed the record.
            StoreFailed, SetupError: The bucket is missing or refuses us.
        """
        loop = asyncio.get_running_loop()
        now = loop.time()
        # Only a look that begins later concludes; the longest it can be until then is known without the bucket.
        longest_seconds = (span.until - span.since).total_seconds()
        given_up_at = now + longest_seconds + self._settings.deadline_seconds
        look_at, heard_until = self._first_look_at(held.record, age_seconds, now)
        entry = Unsettled(held, span, conclusive_at, look_at, given_up_at, now, heard_until, loop.create_future())
        self._waiting.append(entry)
        if self._runner is None or self._runner.done():
            self._runner = asyncio.ensure_future(self._run())
        if self._heart is None or self._heart.done():
            self._heart = asyncio.ensure_future(self._keep_claims_alive())
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
                # A new entry may be due before; those of some seconds are looked at together.
                self._woken.clear()
                with suppress(asyncio.TimeoutError):
                    pause = max(min(due_at - loop.time(), self._settings.claim_seconds / 4), SHORTEST_PAUSE_SECONDS)
                    await asyncio.wait_for(self._woken.wait(), pause)
                continue
            try:
                await self._look()
                pause_seconds = 1.0
            except (Unanswered, NotSent, Throttled, StoreFailed) as error:
                logger.warning("Settling is held up (%s); trying on.", error)
                pause_seconds = min(2 * pause_seconds, 30.0)
                overdue = [entry for entry in self._waiting if loop.time() > entry.given_up_at]
                self._doubt_all(overdue, f"what must be asked gets no answer ({error.message})", error)
                for entry in self._waiting:
                    entry.look_at = max(entry.look_at, loop.time() + pause_seconds)
            except (Rejected, KeyRefused) as error:
                self._doubt_all(self._waiting, "the API has no listing of executions", error)
            except SetupError as error:
                for entry in list(self._waiting):
                    self._end(entry, error)
            except Exception as error:
                logger.exception("Settling failed.")
                self._doubt_all(self._waiting, "settling failed", error)

    def _doubt_all(self, entries: Iterable[Unsettled], reason: str, cause: BaseException | None = None) -> None:
        for entry in list(entries):
            self._end(entry, Settled(entry.held, nobody_can_tell(entry.record, reason, cause)))

    def _end(self, entry: Unsettled, outcome: Settled | BaseException) -> None:
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
        loop = asyncio.get_running_loop()
        while self._waiting:
            await asyncio.sleep(self._settings.claim_seconds / 8)
            for entry in list(self._waiting):
                if loop.time() - entry.written_at > self._settings.claim_seconds / 2:
                    try:
                        await self._rewrite(entry)
                    except (StoreFailed, SetupError) as error:
                        logger.warning("Item %s: its claim could not be kept alive (%s).", entry.item_id, error)

    async def _rewrite(self, entry: Unsettled, **changes: object) -> bool:
        """Whether the entry's record was written; a claim that somebody else has changed ends here."""
        async with entry.writing:
            if entry not in self._waiting:
                return False
            try:
                entry.held = await self._ledger.write(amended(entry.record, **changes), replacing=entry.held)
            except RecordChanged as changed:
                self._end(entry, changed)
                return False
            entry.written_at = asyncio.get_running_loop().time()
            return True

    # ------------------------------------------------------------------------------------------- one look

    async def _look(self) -> None:
        webhooks = await self._adopt_what_is_named()
        now = asyncio.get_running_loop().time()
        for entry in self._waiting:
            if entry.heard_until > now:
                entry.look_at = min(entry.heard_until, now + LISTED_AGAIN_SECONDS)
        if not any(entry.heard_until <= now for entry in self._waiting):
            return
        entries, look = await self._see()
        look.webhooks = webhooks
        ask = look.evidence.candidates([(entry.record.model, entry.span) for entry in entries])
        tight = [row for zone, row in ask if zone is Zone.TIGHT]
        asked = await self._ask_about(tight, entries, look)
        await self._adopt_the_nearest(entries, look)
        for _, row in ask[asked:]:
            if not any(entry in self._waiting for entry in entries):
                return
            await self._ask_about([row], entries, look)
            await self._adopt_the_nearest(entries, look)
        for entry in entries:
            if entry in self._waiting:
                await self._conclude(entry, look)

    async def _see(self) -> tuple[list[Unsettled], _Look]:
        """The list and the records; again when the machine stood still meanwhile, for they do not fit together then."""
        now = asyncio.get_running_loop().time()
        for _ in range(MOST_LOOKS_AT_MOVING_CLOCKS):
            entries = [entry for entry in self._waiting if entry.heard_until <= now]
            began = await self._moment(entries)
            oldest_seconds = (began.bucket - min(entry.span.since for entry in entries)).total_seconds() + 1
            listing = await self._walk(began, oldest_seconds)
            evidence = Evidence(listing, began.after, oldest_seconds)
            ended = await self._moment(entries)
            passed_seconds = (ended.bucket - began.bucket).total_seconds()
            moved_seconds = passed_seconds - (ended.after - began.before)
            if passed_seconds < ended.before - began.after - MOST_DISAGREEMENT_SECONDS:
                raise StoreFailed("The bucket's machines do not agree about the time: no age can be told.")
            low, high = listing.ahead_of_bucket or (timedelta(0), timedelta(0))
            if moved_seconds <= CLOCKS_MOVED_SECONDS and high - low <= UNCERTAIN:
                await self._read_records(evidence)
                return entries, _Look(evidence, began)
            logger.warning("This process stood still while it looked; looking again.")
        raise StoreFailed("The bucket or the API takes too long to answer to compare their clocks.")

    async def _moment(self, entries: Sequence[Unsettled]) -> _Moment:
        """What time it is, by the bucket."""
        loop = asyncio.get_running_loop()
        for entry in entries:
            before = loop.time()
            read = await self._ledger.read(entry.item_id)
            if read is not None:
                return _Moment(read.read_at, before, loop.time())
            self._end(entry, RecordChanged(None))
        raise StoreFailed("The records that are to be settled are gone.")

    async def _walk(self, began: _Moment, oldest_seconds: float) -> Listing:
        """The executions since the oldest claim, newest first, and how far they go back.

        The end is where the answer's own figures say so, else an empty page; or far enough back, by the API's clock
        alone: its newest date is not later than now.
        """
        loop = asyncio.get_running_loop()
        rows: dict[str, Execution] = {}
        offset = 0
        latest: datetime | None = None
        ahead: tuple[timedelta, timedelta] | None = None
        back = timedelta(seconds=oldest_seconds + WALKED_BACK_SECONDS)
        for _ in range(MOST_PAGES):
            page, sent_at = await self._page(offset)
            if ahead is None and page.date is not None:
                # Both answers were dated between their sending and their coming, to the second.
                apart = page.date - began.bucket
                ahead = (
                    apart - timedelta(seconds=loop.time() - began.before),
                    apart - timedelta(seconds=sent_at - began.after),
                )
            offset += page.row_count
            rows.update((row.id, replace(row, output_urls=())) for row in page.rows)  # half of what a row takes
            if page.is_last(offset):
                return Listing(tuple(rows.values()), has_end=True, ahead_of_bucket=ahead)
            if (on_page := newest(page.rows)) is None:
                continue
            latest = on_page if latest is None else max(latest, on_page)
            if on_page < latest - back:
                return Listing(tuple(rows.values()), has_end=False, ahead_of_bucket=ahead)
        return Listing(tuple(rows.values()), is_whole=False, has_end=False, ahead_of_bucket=ahead)

    async def _page(self, offset: int) -> tuple[ExecutionsPage, float]:
        """A page, and the loop time when it was asked for."""

        async def page() -> tuple[ExecutionsPage, float]:
            sent_at = asyncio.get_running_loop().time()
            return await self._client.executions_page(limit=PAGE_ROWS, offset=offset), sent_at

        return await self._limiter.asked(page)

    async def _read_records(self, evidence: Evidence) -> None:
        """Takes in what this process knows and what the young records say; of the older ones some, where need be."""
        loop = asyncio.get_running_loop()
        self._called_and_stored.clear()
        for prediction_id, age_seconds in self._known().items():
            evidence.know(prediction_id, age_seconds, settling_seconds=self._settings.settling_seconds, now=loop.time())
        young: list[str] = []
        older: list[tuple[float, str]] = []
        async for item_id, listed in self._ledger.listed():
            if listed.age_seconds <= evidence.oldest_seconds + READ_BACK_SECONDS + loop.time() - evidence.began_at:
                young.append(item_id)
            else:
                older.append((listed.age_seconds, item_id))
                if len(older) > 2 * OLDER_RECORDS_READ:
                    older = sorted(older)[:OLDER_RECORDS_READ]
        await self._read_each(young, evidence)
        if not evidence.shows_what_is_known:
            await self._read_each([item_id for _, item_id in sorted(older)[:OLDER_RECORDS_READ]], evidence)

    async def _read_each(self, item_ids: Sequence[str], evidence: Evidence) -> None:
        """Several at a time, and no task for each: since a dead claim a batch may have bought tens of thousands."""
        left = iter(item_ids)

        async def some() -> None:
            for item_id in left:
                held = await self._ledger.read(item_id)
                if held is None:
                    continue
                record, is_old = held.record, held.age_seconds > LISTED_AFTER_SECONDS
                if record.ordered_as and record.state is RecordState.STORED and is_old:
                    self._called_and_stored.add(record.prediction_id or "")
                evidence.read(
                    held,
                    ours={entry.item_id: entry.record.run_id for entry in self._waiting},
                    claim_seconds=self._settings.claim_seconds,
                    settling_seconds=self._settings.settling_seconds,
                    now=asyncio.get_running_loop().time(),
                )

        await asyncio.gather(*(some() for _ in range(READS_AT_A_TIME)))

    # ------------------------------------------------------------------------------------------ webhooks

    def _first_look_at(self, record: Record, age_seconds: float, now: float) -> tuple[float, float]:
        """When to look at a claim first, and until when the vendor's call may name what it bought."""
        if not record.ordered_as or (patience := self._webhooks.seconds_until_heard(record.model)) <= 0:
            return now + FIRST_LOOK_SECONDS, now
        heard_until = now + max(0.0, patience - age_seconds)
        ended_at = now + max(FIRST_LOOK_SECONDS, patience - CALL_SECONDS - age_seconds)
        return min(heard_until, ended_at) if heard_until > now else now + FIRST_LOOK_SECONDS, heard_until

    def _is_named(self, write_id: str) -> None:
        """A call names an order."""
        for entry in self._waiting:
            if write_id in entry.record.ordered_as:
                entry.look_at = 0.0
                self._woken.set()

    async def _adopt_what_is_named(self) -> Mapping[str, str | None]:
        """Adopts what a call has named, or the vendor's list of webhooks; returns what that list says."""
        called = [entry for entry in self._waiting if entry.record.ordered_as]
        for entry in called:
            found = self._webhooks.prediction_of(entry.record.ordered_as)
            if found is not None:
                await self._adopt_named(entry, found, "a call")
        called = [entry for entry in called if entry in self._waiting]
        if not called or asyncio.get_running_loop().time() < self._webhooks_not_before:
            return {}
        try:
            listed = await self._listed_webhooks(min(entry.span.since for entry in called))
        except EachlabsError as error:
            # It is a help, no more: without it an order is found by the echo of its input.
            logger.info("The list of webhooks tells nothing (%s).", error)
            self._webhooks_not_before = asyncio.get_running_loop().time() + WITHOUT_WEBHOOKS_SECONDS
            return {}
        for entry in called:
            named = [one for one, write_id in listed.items() if write_id in entry.record.ordered_as]
            if named:
                await self._adopt_named(entry, named[0], "the list of webhooks")
        return listed

    async def _listed_webhooks(self, since: datetime) -> dict[str, str | None]:
        """Execution → the order of ours that its webhook names, back to an hour before `since`."""
        listed: dict[str, str | None] = {}
        offset = 0
        for _ in range(MOST_PAGES_OF_WEBHOOKS):
            rows, count = await self._limiter.asked(partial(self._client.webhooks, limit=PAGE_ROWS, offset=offset))
            listed.update((row.execution_id, write_id_in(row.url)) for row in rows)
            offset += count
            dates = [row.created_at for row in rows if row.created_at is not None]
            if count < PAGE_ROWS or (dates and max(dates) < since - timedelta(seconds=WALKED_BACK_SECONDS)):
                break
        return listed

    async def _adopt_named(self, entry: Unsettled, prediction_id: str, by: str) -> None:
        """The vendor's own word names what an order bought: neither its echo nor other buyers matter."""
        holder = await lock_prediction(self._ledger, prediction_id, entry.item_id, since=entry.span.since)
        if holder != entry.item_id:
            entry.heard_until = 0.0  # an equal item was given it: what that one's order bought is this one's
            return
        moment = await self._moment([entry])
        age_seconds = (moment.bucket - entry.span.since).total_seconds()
        if await self._write_adoption(entry, prediction_id, age_seconds, []):
            logger.info(
                "Item %s: %s names prediction %s for its lost order; adopted.", entry.item_id, by, prediction_id
            )
            self._end(entry, Settled(entry.held))

    def _is_not_its(self, entry: Unsettled, row: Execution, look: _Look) -> bool:
        """Whether the list of webhooks shows that an execution is not what this order bought, or will yet show it."""
        if not entry.record.ordered_as or not look.webhooks:
            return False
        if row.id in look.webhooks:
            return look.webhooks[row.id] not in entry.record.ordered_as
        known = self._webhooks.ended_within(LISTED_AFTER_SECONDS, WALKED_BACK_SECONDS / 2) | self._called_and_stored
        if not known or not known <= look.webhooks.keys():
            return False  # it gives no sign of seeing
        now = asyncio.get_running_loop().time()
        if row.status.ended:
            since = _remember(self._ended_since, row.id, now)
            if now - since < LISTED_AFTER_SECONDS:
                look.again_at = max(look.again_at, since + LISTED_AFTER_SECONDS)
            return True
        if now > entry.given_up_at:
            return False
        look.again_at = max(look.again_at, now + LISTED_AGAIN_SECONDS)
        return True

    # ------------------------------------------------------------------------------------------ candidates

    async def _ask_about(self, rows: Sequence[Execution], entries: Sequence[Unsettled], look: _Look) -> int:
        """Asks what each execution's input was, and notes whose order that is; returns how many were asked about.

        When every entry has found one, a few more show whether another fits as well; the rest is left.
        """
        rivals_asked = 0
        for number, row in enumerate(rows):
            waiting = [entry for entry in self._open(entries, look) if not self._is_not_its(entry, row, look)]
            has_one = {id(entry) for _, _, entry, _ in look.fits}
            if len(rows) > 1 and all(id(entry) in has_one for entry in waiting):
                rivals_asked += 1
                if rivals_asked > MOST_RIVALS_ASKED:
                    return number
            if row.model in self._other_models and not any(row.model == entry.record.model for entry in waiting):
                continue
            prediction = await self._echo(row.id, look) if waiting else None
            if prediction is not None:
                self._match(row, prediction, waiting, look)
        return len(rows)

    def _open(self, entries: Sequence[Unsettled], look: _Look) -> list[Unsettled]:
        """The entries that may be given an execution: nobody is buying their input this moment."""
        return [
            entry
            for entry in entries
            if entry in self._waiting and not look.evidence.is_being_bought(entry.record.model, entry.record.order)
        ]

    async def _echo(self, prediction_id: str, look: _Look) -> Prediction | None:
        """What the API says it was; None when it does not show it to us."""
        if prediction_id not in self._echoes:
            try:
                prediction = await self._limiter.asked(lambda: self._client.get(prediction_id))
            except Rejected:
                # The key is good for the list: what it is not good for is not ours, or too young to be seen.
                now = asyncio.get_running_loop().time()
                since = _remember(self._invisible_since, prediction_id, now)
                look.again_at = max(look.again_at, since + UNKNOWN_ID_GRACE_SECONDS)
                return None
            look.asked = True
            if prediction.input is None:
                return prediction
            _remember(self._echoes, prediction_id, prediction)
        look.asked = True
        return self._echoes[prediction_id]

    def _match(self, row: Execution, prediction: Prediction, entries: Sequence[Unsettled], look: _Look) -> None:
        echo, model = prediction.input, prediction.model or row.model
        for entry in entries:
            zone = look.evidence.zone(row, entry.span)
            if zone is None:
                continue
            if echo is None:
                if model is None or are_related(model, entry.record):
                    look.doubts.setdefault(entry.item_id, "the API does not say what a prediction's input was")
                continue
            fields = fit(echo, entry.record.order)
            is_ours = (
                model is None
                or entry.record.model in (prediction.model, row.model)
                or (prediction.model is None and look.evidence.is_known_as(row.model, entry.record.model))
            )
            if fields is not None and is_ours:
                look.fits.append((row, zone, entry, fields))
            elif (fields is not None or is_near(echo, entry.record.order)) and (
                is_ours or are_related(model or "", entry.record)
            ):
                look.near.setdefault(entry.item_id, []).append((row.id, "its input is echoed a little differently"))
            elif row.model is not None and row.model == prediction.model and not are_related(row.model, entry.record):
                self._other_models.add(row.model)

    async def _adopt_the_nearest(self, entries: Sequence[Unsettled], look: _Look) -> None:
        """Gives each entry the execution that its order bought: more fitting fields first, then the nearer."""

        def rank(entry: Unsettled) -> tuple[int, float]:
            fields = max(fields for _, _, other, fields in look.fits if other is entry)
            nearest = look.candidates_of(entry)
            return -fields, look.evidence.distance_seconds(nearest[0], entry.span) if nearest else float("inf")

        fitting = {id(other) for _, _, other, _ in look.fits}
        for entry in sorted((entry for entry in entries if id(entry) in fitting), key=rank):
            for row in look.candidates_of(entry):
                if entry in self._waiting and await self._is_its_own(entry, row, look):
                    await self._adopt(entry, row, look)
                    break

    async def _is_its_own(self, entry: Unsettled, row: Execution, look: _Look) -> bool:
        """Whether a row that fits an entry is not another item's: by its unsettled order, or by the marker."""
        fields = next(fields for found, _, other, fields in look.fits if found is row and other is entry)
        echo = self._echoes[row.id].input or {}
        rival = look.evidence.better_claim(entry.record.model, echo, fields)
        if rival is not None:
            look.doubts[entry.item_id] = f"what was found may be item {rival}'s, which is not settled"
            return False
        holder = await lock_prediction(self._ledger, row.id, entry.item_id, since=entry.span.since)
        return holder == entry.item_id

    async def _adopt(self, entry: Unsettled, row: Execution, look: _Look) -> None:
        """Writes down what the order has bought, and which other executions it could have been.

        Raises:
            StoreFailed: It could not be written down: nothing may be concluded, look again.
        """
        look.taken.add(row.id)
        adopted_among = self._fitting_as_well(entry, row, look)
        age_seconds = (look.began.bucket - entry.span.since).total_seconds()
        item_id = entry.item_id
        if await self._write_adoption(entry, row.id, age_seconds, adopted_among):
            logger.info("Item %s: its lost order had bought prediction %s; adopted.", item_id, row.id)
            if adopted_among:
                logger.warning(
                    "Item %s: prediction %s was adopted as the nearest to its lost order, but %s fit as well: one of "
                    "them may be what another destination or program bought.",
                    item_id,
                    row.id,
                    ", ".join(adopted_among),
                )
            self._end(entry, Settled(entry.held))

    async def _write_adoption(
        self, entry: Unsettled, prediction_id: str, age_seconds: float, adopted_among: list[str]
    ) -> bool:
        return await self._rewrite(
            entry,
            state=RecordState.CREATED,
            intent=None,
            unsettled_since=None,
            error=None,
            prediction_id=prediction_id,
            created_at=datetime.now(timezone.utc) - timedelta(seconds=age_seconds),
            adopted_among=adopted_among,
            possible_loss=None,
        )

    def _fitting_as_well(self, entry: Unsettled, row: Execution, look: _Look) -> list[str]:
        """Other executions that could be what the order bought, unless as many equal orders were lost."""
        others = look.candidates_of(entry)
        echo = self._echoes[row.id].input or {}
        lost_too = {id(other) for found, _, other, _ in look.fits if found in others and other in self._waiting}
        lost_elsewhere = [item for _, order, item in look.evidence.unsettled if fit(echo, order) is not None]
        spare = len(others) - len(lost_too - {id(entry)}) - len(lost_elsewhere)
        return [other.id for other in others] if spare > 0 else []

    # ------------------------------------------------------------------------------------------ conclusions

    async def _conclude(self, entry: Unsettled, look: _Look) -> None:
        now = asyncio.get_running_loop().time()
        record, evidence = entry.record, look.evidence
        if now > entry.given_up_at and evidence.is_being_bought(record.model, record.order):
            self._doubt_all([entry], "others keep buying the same input")
        elif evidence.is_being_bought(record.model, record.order):
            # Somebody may be buying the same input this moment: what the walk shows may be theirs.
            entry.look_at = now + max(1.0, self._settings.claim_seconds / 4)
        elif look.began.bucket < entry.conclusive_at:
            remaining_seconds = (entry.conclusive_at - look.began.bucket).total_seconds()
            entry.look_at = max(now, look.began.after + remaining_seconds)
        elif look.again_at > now:
            entry.look_at = look.again_at
        elif (reason := await self._doubt(entry, look)) is not None:
            self._doubt_all([entry], reason)
        else:
            self._end(entry, Settled(entry.held, unproven=not evidence.listing.rows))

    async def _doubt(self, entry: Unsettled, look: _Look) -> str | None:
        """Why nobody can tell whether the order bought anything; None: nothing was bought."""
        record, evidence = entry.record, look.evidence
        blind_for = evidence.blind_for(record.model)
        if blind_for is not None:
            return blind_for
        if record.item_id in look.doubts:
            return look.doubts[record.item_id]
        near = look.near.get(record.item_id, [])
        near += [
            (row.id, "it is dated a little before this order's claim, or has no date that can be used")
            for row, zone, other, _ in look.fits
            if other is entry and zone is Zone.DOUBTFUL and row.id not in look.taken
        ]
        for prediction_id, why in near:
            if prediction_id not in look.taken:
                return f"prediction {prediction_id} may be what it bought ({why})"
        # The list is seen to see when one of its rows is a prediction that is known.
        if not evidence.listing.rows or look.asked or evidence.shows_what_is_known:
            return None
        for row in evidence.listing.rows[:MOST_SIGNS_ASKED]:
            if await self._echo(row.id, look) is not None:
                return None
        return "the API does not know the predictions that its own list shows"

    # ------------------------------------------------------------------------------------------ proofs

    def prove(self, item_id: str, prediction_id: str) -> None:
        """Sees, off the item's way, whether the list shows this prediction: only then it saw when it was empty.

        The record calls the earlier order a possible loss until then.
        """
        task = asyncio.ensure_future(self._prove(item_id, prediction_id))
        self._proofs.add(task)
        task.add_done_callback(self._proofs.discard)

    async def _prove(self, item_id: str, prediction_id: str) -> None:
        waited_seconds = 0.0
        pauses = iter((*PROOF_PAUSES_SECONDS, self._settings.settling_seconds))
        while waited_seconds <= self._settings.settling_seconds:
            pause_seconds = next(pauses, 30.0)
            await asyncio.sleep(pause_seconds)
            waited_seconds += pause_seconds
            try:
                page, _ = await self._page(0)
                if any(row.id == prediction_id for row in page.rows):
                    for _ in range(MOST_WRITES_OF_A_PROOF):
                        held = await self._ledger.read(item_id)
                        if held is None or held.record.possible_loss is None:
                            break
                        with suppress(RecordChanged):
                            await self._ledger.write(amended(held.record, possible_loss=None), replacing=held)
                            break
                    return
            except EachlabsError as error:
                logger.info("Whether prediction %s is listed is not known yet (%s).", prediction_id, error)
        logger.error(
            "Item %s: the API's list does not show prediction %s either, which was bought after an order without an "
            "answer. That order may have been billed too; its record says so (possible_loss).",
            item_id,
            prediction_id,
        )

    async def aclose(self) -> None:
        """Stops; the claims that wait stay as they are and are settled by the next run."""
        tasks = [task for task in (self._runner, self._heart, *self._proofs) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _remember(memory: OrderedDict[str, T], name: str, value: T) -> T:
    """What is remembered under the name: the first value, of the last 10,000 names."""
    value = memory.setdefault(name, value)
    while len(memory) > REMEMBERED:
        memory.popitem(last=False)
    return value


def nobody_can_tell(record: Record, reason: str, cause: BaseException | None = None) -> OutcomeUnknown:
    """The error of an order that may have been billed: what a person should look for, and how to go on then."""
    prompt = record.order.get("prompt")
    shown = f" whose prompt begins {prompt[:60]!r}" if isinstance(prompt, str) else ""
    since = (
        f" of {record.unsettled_since:%Y-%m-%d %H:%M:%S} UTC or a few minutes later" if record.unsettled_since else ""
    )
    error = OutcomeUnknown(
        f"Nobody can tell whether the lost order was billed: {reason}. It is not repeated. Look in the vendor's "
        f"dashboard for a prediction of model {record.model!r}{since}{shown}. If there is none, run it again with "
        "--retry-ambiguous (retry_ambiguous=True), which buys it once; otherwise run it again, to settle once more.",
        item_id=record.item_id,
    )
    error.__cause__ = cause
    return error
