"""The one place where money is spent: claim, POST, note; and what follows when any of it goes wrong.

What can fail between two lines, and what it leaves:

    take slots      nothing
    PUT claimed      a claim without a POST: dead after `claim_seconds`, settling finds nothing, bought then
    POST             a claim whose POST may have bought: settled by the API's executions before any other POST
    PUT created      a prediction known by id: the next run waits for it and stores it
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone

from prefect_eachlabs.api.catalogue import Catalogue
from prefect_eachlabs.api.client import EachlabsClient
from prefect_eachlabs.api.references import References, prepare_input, recorded
from prefect_eachlabs.errors import (
    EachlabsError,
    InsufficientBalance,
    ItemConflict,
    KeyRefused,
    NotSent,
    OutcomeUnknown,
    Rejected,
    SetupError,
    StoreFailed,
    Throttled,
)
from prefect_eachlabs.ledger.adoption import lock_prediction, marker_key, order_of
from prefect_eachlabs.ledger.evidence import Span
from prefect_eachlabs.ledger.reconcile import Reconciler, Settled, nobody_can_tell
from prefect_eachlabs.ledger.records import (
    Intent,
    Ledger,
    Record,
    RecordChanged,
    RecordError,
    RecordState,
    Statement,
    VersionedRecord,
    amended,
    new_record,
)
from prefect_eachlabs.ledger.rules import PurchaseOptions
from prefect_eachlabs.limits.leases import clock
from prefect_eachlabs.limits.limiter import RateLimiter, Slot
from prefect_eachlabs.models import Callback, Item, Prediction
from prefect_eachlabs.polling.poller import Poller
from prefect_eachlabs.retry import until_it_succeeds
from prefect_eachlabs.settings import AccountSettings
from prefect_eachlabs.webhooks.webhooks import Webhooks

logger = logging.getLogger(__name__)

RECLAIMS_BEFORE_GIVING_UP = 5
REFUSALS_FOR_WANT_OF_BALANCE = 3
EXPLAINED_WITHIN_SECONDS = 10.0
BUCKET_ERRORS = (StoreFailed, SetupError)
SLOTS_GOOD_FOR_SECONDS = 60.0
"""Whoever stood still for longer takes new slots: those leased from a Prefect server end after 75 s."""


MOST_ORDERS_WITHOUT_TRACE = 1
"""So many orders of a purchase may be concluded to have bought nothing and be followed by another."""
WHOLE_SECONDS = timedelta(seconds=2)
"""The bucket's dates are whole seconds: a difference of two may be off by one, and each by another."""
MOST_REPLACED_RUNS = 100
MOST_ORDERS_NAMED = 10
MOST_LOST_REMEMBERED = 1_000
LOST_SLOT_SECONDS = 10.0
"""A lost order's slot in flight is kept for so long where no prediction of its model was seen to end yet: twice what
the model's page states."""


@dataclass
class _Posted:
    """What a claim and its POST have come to.

    Attributes:
        held: The record now: `created`; or our claim, under which nothing was created, or whose answer is lost.
        lost: Why nobody told us what the POST has bought.
        is_unused: Nothing was created under our claim, which still stands: the same once more.
    """

    held: VersionedRecord
    lost: OutcomeUnknown | None = None
    is_unused: bool = False


@dataclass
class Job:
    """One item's way through the gateway: what is wanted and allowed, what it holds, and whether it may be interrupted
    right now.
    """

    item: Item
    ledger: Ledger
    options: PurchaseOptions
    slot: Slot | None = None
    """The slot in flight it holds; None before, and after the watcher has taken it over."""
    prediction_id: str | None = None
    """What this job has bought (or adopted), once it is known."""
    is_lost: bool = False
    """Its order got no answer, and what it has bought is not settled yet."""
    may_be_interrupted: asyncio.Event = field(default_factory=asyncio.Event)
    _lent: Slot | None = None
    _lent_until: asyncio.TimerHandle | None = None

    def __post_init__(self) -> None:
        self.may_be_interrupted.set()

    @property
    def run_id(self) -> str:
        return self.options.run_id

    @contextmanager
    def critical(self) -> Iterator[None]:
        """From the claim until the prediction's id is written down, no cancel and no time-out comes between."""
        self.may_be_interrupted.clear()
        try:
            yield
        finally:
            self.may_be_interrupted.set()

    async def until_it_may_be_interrupted(self) -> None:
        """Comes back outside of the critical section: a cancel that follows at once falls outside as well."""
        while not self.may_be_interrupted.is_set():
            # Between the event and this task's turn the next critical section may have begun.
            await self.may_be_interrupted.wait()

    def ordered(self, prediction_id: str | None) -> None:
        """Tells the budget, whatever becomes of the order."""
        if self.options.budget is not None:
            self.options.budget.ordered(self.item, prediction_id)

    def disown_unnamed(self, record: Record) -> None:
        """What this job's order bought is another item's if that has adopted it: its own is not known any more."""
        if self.prediction_id is None or self.prediction_id in record.named_predictions:
            return
        if self.options.budget is not None:
            self.options.budget.disown(self.item, self.prediction_id)
        self.prediction_id = None

    def give_back_slot(self) -> None:
        if self.slot is not None:
            self.slot.done()
            self.slot = None

    def lend_slot(self, seconds: float) -> None:
        """The slot of an order whose answer is lost: given back after so long, unless it is found before.

        What it may have bought counts as in flight until it ends, which takes about so long. Holding the slot until
        that is settled would let ten such orders stop the account.
        """
        if self.slot is not None:
            self._lent, self.slot = self.slot, None
            self._lent_until = asyncio.get_running_loop().call_later(seconds, self._give_back_lent)

    def slot_of_what_was_found(self) -> Slot | None:
        """The slot for a prediction that settling has found: the lent one, if it was not given back."""
        slot, self._lent = self._lent, None
        if self._lent_until is not None:
            self._lent_until.cancel()
            self._lent_until = None
        return slot

    def _give_back_lent(self) -> None:
        slot = self.slot_of_what_was_found()
        if slot is not None:
            slot.done()


class Purchaser:
    """Buys predictions for items, each once.

    Args:
        known: Predictions that this process bought itself (id → seconds since then), whatever the destination.
    """

    def __init__(
        self,
        client: EachlabsClient,
        limiter: RateLimiter,
        poller: Poller,
        settings: AccountSettings,
        *,
        catalogue: Catalogue,
        references: References,
        webhooks: Webhooks,
        known: Callable[[], Mapping[str, float]],
    ) -> None:
        self._client = client
        self._limiter = limiter
        self._poller = poller
        self._settings = settings
        self._catalogue = catalogue
        self._references = references
        self._webhooks = webhooks
        self._known = known
        self._reconcilers: dict[Ledger, Reconciler] = {}
        self._lost: OrderedDict[str, tuple[Ledger, str]] = OrderedDict()
        """`write_id` of an order whose answer was lost → its record."""
        self._noting: set[asyncio.Task[None]] = set()
        webhooks.named_listeners.append(self._is_named)

    async def buy(
        self,
        job: Job,
        replacing: VersionedRecord | None,
        *,
        check_place: Callable[[VersionedRecord | None], Awaitable[None]],
    ) -> VersionedRecord:
        """Buys the job's item under its record and returns the record that names a prediction. **Costs money.**

        Args:
            job: What is wanted, where its record is and what may be done; not to be interrupted in between.
            replacing: The record that this purchase replaces, just read; None: there is none.
            check_place: Looks, before anything is ordered, at where the picture goes; raises ItemConflict.

        Raises:
            RecordChanged: Another writer changed the record: look again.
            NotSent, Throttled, InsufficientBalance, Rejected, StoreFailed, SetupError: Nothing was bought.
            OutcomeUnknown: Nobody can tell whether it was bought; it stands as ambiguous and is not repeated.
        """
        record = self._first_claim(job, replacing)
        place_is_checked = False
        await self._webhooks.open()
        try:
            if replacing is not None and replacing.record.may_have_bought_unseen:
                replacing, record = await self._settle_what_is_there(job, replacing)
            while record.state is not RecordState.CREATED:
                record = amended(record, intent=Intent.POST, unsettled_since=None, ordered_by=None, error=None)
                try:
                    if not place_is_checked:
                        await check_place(replacing)
                        place_is_checked = True
                    sent, request = await self._input_and_slots(job)
                except EachlabsError:
                    await self._give_back_settled(job, replacing, record)
                    raise
                with job.critical():
                    posted = await self._claim_and_post(job, sent, record, replacing, request)
                job.disown_unnamed(posted.held.record)
                if posted.lost is not None:
                    settled = await self._after_a_lost_answer(job, posted.held, posted.lost)
                    replacing = settled.held
                    if replacing.record.state is RecordState.CREATED:
                        break
                    record = await self._may_order_again(job, settled)
                elif posted.is_unused:
                    replacing = posted.held  # throttled, or without slots
                elif (
                    posted.held.record.state in (RecordState.CLAIMED, RecordState.AMBIGUOUS)
                    or posted.held.record.fingerprint != job.item.fingerprint
                ):
                    # Ours was found by another, and a further order or another input stands there since: look again.
                    raise RecordChanged(posted.held)
                else:
                    created = posted.held.record
                    if created.possible_loss is not None and created.prediction_id is not None:
                        self.reconciler_of(job.ledger).prove(job.item.item_id, created.prediction_id)
                    return posted.held
            assert replacing is not None
            self._adopt(job, replacing)
            return replacing
        finally:
            job.give_back_slot()

    async def _settle_what_is_there(self, job: Job, held: VersionedRecord) -> tuple[VersionedRecord, Record]:
        """What an earlier order has come to, and the record that may be written next: created, or a claim."""
        is_same = held.record.fingerprint == job.item.fingerprint
        word = _may_be_overruled(held, job.options)
        # What is replaced may have bought as well: that stays on the books.
        other = amended(held.record, run_id=job.run_id, epoch=held.record.epoch + 1)
        settled = await self._settle(job, held, self._first_claim(job, held) if is_same else other, abandoned=True)
        record = await self._may_order_again(job, settled, word=word)
        if is_same:
            return settled.held, record
        first = self._first_claim(job, settled.held)
        return settled.held, amended(first, statements=record.statements, replaced_runs=_replaced_runs(held.record))

    async def settle_only(self, job: Job, held: VersionedRecord) -> VersionedRecord:
        """What a dead claim has bought, without buying: a created record, or an idle claim. Costs requests alone.

        Raises:
            RecordChanged: Another writer changed the record.
            OutcomeUnknown: Nobody can tell; it stands as ambiguous.
        """
        if not held.record.may_have_bought_unseen:
            return held
        settled = await self._settle(job, held, self._first_claim(job, held), abandoned=True)
        if settled.held.record.state is RecordState.CREATED:
            return settled.held
        idle = amended(await self._may_order_again(job, settled), intent=Intent.IDLE, unsettled_since=None)
        return await job.ledger.write(idle, replacing=settled.held)

    async def _take_slots(self, job: Job) -> Slot:
        """A slot in flight, which the job keeps, and then one for the request."""
        if job.slot is None:
            job.slot = await self._limiter.take_in_flight()
        breaker = self._limiter.breaker
        while True:
            was_open = not breaker.paused
            await breaker.enter()
            try:
                request = await self._limiter.take_request()
            except BaseException:
                if not was_open:
                    breaker.left()
                raise
            if not (was_open and breaker.paused):
                return request
            # The account was throttled while we waited for the slot: only a trial may post now.
            request.unused()

    async def _input_and_slots(self, job: Job) -> tuple[Item, Slot]:
        """The item as it is sent now, with fresh URLs of its reference pictures, and the slot for that request.

        Whoever holds the budget agrees before the slots are waited for and once more afterwards.
        """
        ledger, budget = job.ledger, job.options.budget
        prepared = await prepare_input(
            self._catalogue,
            self._references,
            job.item,
            ledger.destination,
            ledger.access,
            anywhere=job.options.any_reference,
        )
        await self._client.check_api(self._limiter)
        if budget is not None:
            await budget.approve(job.item)
        request = await self._take_slots(job)
        try:
            if budget is not None:
                budget.check(job.item)
            return await prepared(), request
        except BaseException:
            request.unused()
            self._limiter.breaker.left()
            raise

    async def _give_back_settled(self, job: Job, held: VersionedRecord | None, record: Record) -> None:
        """Nothing is bought after all: a claim of ours that was settled, and bought nothing, is free at once."""
        if held is not None and held.record.intent is Intent.SETTLE and held.record.run_id == record.run_id:
            free = record if record.fingerprint == held.record.fingerprint else held.record
            with suppress(RecordChanged, StoreFailed):
                await job.ledger.write(amended(free, intent=Intent.IDLE, unsettled_since=None), replacing=held)

    def _first_claim(self, job: Job, replacing: VersionedRecord | None) -> Record:
        record = new_record(job.item, run_id=job.run_id)
        record.formats = list(job.options.formats or ())
        if replacing is None:
            return record
        old = replacing.record
        is_same = old.fingerprint == job.item.fingerprint
        if is_same and old.state in (RecordState.CLAIMED, RecordState.AMBIGUOUS):
            # The purchase that was begun goes on.
            record.orders_without_trace = old.orders_without_trace
            record.possible_loss = old.possible_loss
            record.ordered_as = old.ordered_as
        if is_same:
            # What may have been bought unseen is known by what was sent for it.
            record.sent_input = old.sent_input
            record.formats = record.formats or old.formats
        return record.model_copy(
            update={
                # Fields that this version does not know survive a change.
                **(old.model_extra or {}),
                "epoch": old.epoch + 1,
                "earlier": [*old.earlier, *([old.prediction_id] if old.prediction_id else [])],
                "also_bought": old.also_bought,
                "statements": old.statements,
                "replaced_runs": old.replaced_runs if is_same else _replaced_runs(old),
                "resubmissions": old.resubmissions + (old.state is RecordState.FAILED) if is_same else 0,
            }
        )

    async def _claim_and_post(
        self, job: Job, item: Item, record: Record, replacing: VersionedRecord | None, request: Slot
    ) -> _Posted:
        ledger, posted = job.ledger, False
        try:
            record = amended(record, sent_input=recorded(item))
            earlier = record.ordered_as[-MOST_ORDERS_NAMED:]
            slots_seen_at = clock()
            for _ in range(RECLAIMS_BEFORE_GIVING_UP):
                name = self._webhooks.name()
                named = {"write_id": name, "ordered_as": [*earlier, name]} if name else {}
                claim_sent_at = clock()
                claim = await ledger.write(amended(record, **named), replacing=replacing)
                if clock() - claim_sent_at <= self._settings.post_begins_within_seconds:
                    break
                # The bucket was so slow that the claim may be dead before the POST's answer: claim again.
                replacing = claim
            else:
                raise StoreFailed(
                    f"The bucket takes more than {self._settings.post_begins_within_seconds:g} s for one small write; "
                    "nothing was bought. Look at the bucket or raise EACHLABS_CLAIM_SECONDS.",
                    item_id=item.item_id,
                )
            if clock() - slots_seen_at > SLOTS_GOOD_FOR_SECONDS:
                job.give_back_slot()
                return _Posted(await self._give_back(ledger, claim), is_unused=True)
            callback = self._webhooks.callback(name)
            posted = True
        finally:
            if not posted:
                request.unused()
                self._limiter.breaker.left()
        try:
            prediction = await self._post(job, item, request, callback)
        except Throttled as error:
            claim = await self._give_back(ledger, claim)
            breaker = self._limiter.breaker
            if isinstance(error, InsufficientBalance) and breaker.consecutive_throttles >= REFUSALS_FOR_WANT_OF_BALANCE:
                # 402 that stays is not waited for, by nobody: somebody must top up.
                breaker.refuse(error)
                raise
            return _Posted(claim, is_unused=True)
        except (NotSent, SetupError):
            await self._give_back(ledger, claim)
            raise
        except Rejected as error:
            if error.status_code is not None and 300 <= error.status_code < 400:
                await self._give_back(ledger, claim)  # the set-up is wrong, not the item
                raise
            error = await self._explained(item, error)
            said = RecordError(kind=error.kind, message=error.message, code=error.code)
            await self._note(ledger, claim, amended(claim.record, state=RecordState.FAILED, intent=None, error=said))
            raise error from None
        except OutcomeUnknown as error:
            return _Posted(claim, error)
        self._webhooks.bought([name], prediction)
        return await self._note_created(job, claim, prediction, claim_sent_at)

    async def _post(self, job: Job, item: Item, request: Slot, callback: Callback | None) -> Prediction:
        """One POST in its slots; the gate learns how it went, the watcher takes over what was created."""
        breaker = self._limiter.breaker
        try:
            prediction = await self._client.create(item, callback)
        except NotSent:
            request.unused()
            breaker.left()
            raise
        except Throttled as error:
            request.done()
            breaker.throttled(error)
            raise
        except EachlabsError as error:
            request.done()
            breaker.passed()
            if isinstance(error, OutcomeUnknown):
                job.ordered(None)
            raise
        except BaseException as error:
            request.done()
            breaker.left()
            job.ordered(None)
            if not isinstance(error, Exception):  # a cancel
                raise
            raise OutcomeUnknown(
                f"The order ended in an unexpected {type(error).__name__}: it may have been billed.",
                item_id=item.item_id,
            ) from error
        request.done()
        breaker.passed()
        job.prediction_id = prediction.id
        job.ordered(prediction.id)
        slot, job.slot = job.slot, None
        self._poller.watch(prediction, slot=slot)
        return prediction

    def _adopt(self, job: Job, found: VersionedRecord) -> None:
        """What settling found is in flight, perhaps: the slot that its POST took is its own, if it is still ours."""
        prediction = found.record.prediction()
        if prediction is not None:
            if found.record.bought_by == job.run_id:
                job.ordered(prediction.id)
            job.prediction_id = prediction.id
            self._poller.watch(prediction, slot=job.slot_of_what_was_found())
            self._webhooks.bought(found.record.ordered_as, prediction)

    async def _give_back(self, ledger: Ledger, claim: VersionedRecord) -> VersionedRecord:
        """Nothing was created under our claim: say so, that nobody has to wait until it is dead. Best effort."""
        try:
            return await ledger.write(amended(claim.record, intent=Intent.IDLE), replacing=claim)
        except (StoreFailed, SetupError) as error:
            logger.warning("Item %s: its unused claim ends by itself (%s).", claim.record.item_id, error)
            return claim

    async def _explained(self, item: Item, refusal: Rejected) -> Rejected:
        """The API's refusal with what the catalogue knows of its reason, where it does."""
        if isinstance(refusal, KeyRefused):
            return refusal
        try:
            why = await asyncio.wait_for(self._catalogue.why_refused(item), EXPLAINED_WITHIN_SECONDS)
        except (EachlabsError, asyncio.TimeoutError):
            why = None
        if why is None:
            return refusal
        return Rejected(
            f"{why}. Nothing was bought.",
            item_id=refusal.item_id,
            status_code=refusal.status_code,
            code=refusal.code,
        )

    async def _note(self, ledger: Ledger, held: VersionedRecord, end: Record) -> None:
        """Writes down how a purchase has ended that created nothing, as far as is known. Best effort."""
        try:
            await ledger.write(end, replacing=held)
        except (RecordChanged, StoreFailed, SetupError):
            logger.warning("Item %s: it could not be noted as %s.", end.item_id, end.state.value)

    async def _note_created(
        self, job: Job, claim: VersionedRecord, prediction: Prediction, claim_sent_at: float
    ) -> _Posted:
        """Writes the prediction's id down, as long as the process lives; it is paid for."""
        item, ledger = job.item, job.ledger
        dead_at = claim_sent_at + self._settings.claim_seconds
        safe_until = dead_at - self._settings.freeze_margin_seconds
        base: VersionedRecord | None = claim
        created = self._created(claim.record, prediction)
        marked = False

        async def write() -> _Posted:
            nonlocal base, marked
            if not marked and clock() > safe_until:
                # The claim may be dead by now, and whoever settles for another item with the same input may adopt
                # this prediction: so it is adopted first, which is exclusive.
                if (lost := await self._adopted_by_another(ledger, claim, prediction)) is not None:
                    return lost
                marked = True
            written = await ledger.write(created, replacing=base)
            if not marked and clock() > dead_at:
                base = written
                # The write took so long, or we were frozen in it, that the same may have happened meanwhile.
                if (lost := await self._adopted_by_another(ledger, written, prediction)) is not None:
                    return lost
            return _Posted(written)

        while True:
            what = f"Item {item.item_id}: prediction {prediction.id} is bought and could not be written down"
            try:
                return await until_it_succeeds(write, errors=BUCKET_ERRORS, what=what)
            except RecordChanged as changed:
                current = changed.current
                if current is None:
                    base, created = None, self._created(claim.record, prediction)
                elif prediction.id in current.record.named_predictions:
                    return _Posted(current)
                elif current.record.fingerprint == item.fingerprint and current.record.state in (
                    RecordState.CLAIMED,
                    RecordState.AMBIGUOUS,
                ):
                    safe_until = 0.0
                    base, created = current, self._created(current.record, prediction)
                    created.possible_loss = None  # it was about this very order
                    if current.record.run_id != claim.record.run_id:
                        created.ordered_by = claim.record.run_id
                else:
                    holder = await until_it_succeeds(
                        lambda: lock_prediction(ledger, prediction.id, item.item_id),
                        errors=BUCKET_ERRORS,
                        what=what,
                    )
                    if holder != item.item_id:
                        return _Posted(current)  # two equal items were given each other's: each is named once
                    return _Posted(await self._one_too_many(item, ledger, current, prediction))

    async def _adopted_by_another(
        self, ledger: Ledger, held: VersionedRecord, prediction: Prediction
    ) -> _Posted | None:
        """Makes sure that no other item has adopted our prediction; if one has, our order counts as lost.

        What the other's own order bought, if anything, is ours to find.
        """
        item_id = held.record.item_id
        holder = await lock_prediction(ledger, prediction.id, item_id)
        if holder == item_id:
            return None
        marker = await ledger.store.get(marker_key(ledger, prediction.id))
        claim = amended(
            held.record,
            state=RecordState.CLAIMED,
            intent=Intent.POST,
            prediction_id=None,
            created_at=None,
            unsettled_since=None if marker is None else order_of(marker),
        )
        held = await ledger.write(claim, replacing=held)
        error = OutcomeUnknown(
            f"Prediction {prediction.id} came late and was adopted by item {holder}, which has the same input.",
            item_id=item_id,
        )
        return _Posted(held, error)

    def _created(self, record: Record, prediction: Prediction) -> Record:
        return amended(
            record,
            state=RecordState.CREATED,
            intent=None,
            unsettled_since=None,
            error=None,
            prediction_id=prediction.id,
            created_at=prediction.created_at,
        )

    async def _one_too_many(
        self, item: Item, ledger: Ledger, current: VersionedRecord, prediction: Prediction
    ) -> VersionedRecord:
        """The item has another prediction by now: ours is noted, reported and cancelled."""
        logger.error(
            "Item %s was bought twice: prediction %s is one too many beside %s; it is being cancelled. "
            "This happens when an assumption of the guarantee is broken (see the docs, Guarantees).",
            item.item_id,
            prediction.id,
            current.record.prediction_id,
        )
        current = await self._note_one_too_many(ledger, current, prediction)
        try:
            await self._limiter.asked(lambda: self._client.cancel(prediction.id))
        except EachlabsError as error:
            logger.warning("Prediction %s could not be cancelled: %s", prediction.id, error)
        if current.record.fingerprint != item.fingerprint:
            raise ItemConflict(
                f"item_id {item.item_id!r} was replaced by another input while it was being bought.",
                item_id=item.item_id,
                prediction_id=prediction.id,
            )
        return current

    async def _note_one_too_many(
        self, ledger: Ledger, current: VersionedRecord, prediction: Prediction
    ) -> VersionedRecord:
        """Writes it down, as long as the process lives: it is paid for, perhaps."""

        async def write() -> VersionedRecord:
            also_bought = [*current.record.also_bought, prediction.id]
            return await ledger.write(amended(current.record, also_bought=also_bought), replacing=current)

        while True:
            what = f"Prediction {prediction.id} could not be written down"
            try:
                return await until_it_succeeds(write, errors=BUCKET_ERRORS, what=what)
            except RecordChanged as changed:
                if changed.current is None or prediction.id in changed.current.record.named_predictions:
                    return changed.current or current
                current = changed.current

    async def _after_a_lost_answer(self, job: Job, claim: VersionedRecord, lost: OutcomeUnknown) -> Settled:
        """What our own POST without an answer has come to: a created record, or a claim that bought nothing."""
        item, ledger = job.item, job.ledger
        job.is_lost = True
        job.lend_slot(self._poller.likely_seconds(item.model) or LOST_SLOT_SECONDS)
        held = await until_it_succeeds(
            lambda: ledger.read(item.item_id),
            errors=(StoreFailed,),
            what=f"Item {item.item_id}: its record cannot be read",
        )
        if held is None or held.etag != claim.etag:
            # Our claim was dead, and somebody else's may be live: that one decides.
            raise RecordChanged(held)
        logger.warning("Item %s: %s", item.item_id, lost.message)
        for name in held.record.ordered_as:
            self._lost[name] = ledger, item.item_id
        while len(self._lost) > MOST_LOST_REMEMBERED:
            self._lost.popitem(last=False)
        if job.options.on_ambiguous == "fail":
            await self._note_ambiguous(ledger, held, held.record, lost)
            raise lost
        settled = await self._settle(job, held, held.record, abandoned=False)
        job.is_lost = False
        return settled

    def _is_named(self, write_id: str) -> None:
        """A call names what a lost order bought: perhaps after another one was bought in its place."""
        if write_id in self._lost:
            task = asyncio.ensure_future(self._note_what_came_late(write_id, *self._lost[write_id]))
            self._noting.add(task)
            task.add_done_callback(self._noting.discard)

    async def _note_what_came_late(self, write_id: str, ledger: Ledger, item_id: str) -> None:
        prediction_id = self._webhooks.prediction_of([write_id])
        try:
            held = await ledger.read(item_id)
            if (
                prediction_id is None
                or held is None
                or held.record.prediction_id is None  # it is still being settled, and adopts it
                or write_id not in held.record.ordered_as
                or prediction_id in held.record.named_predictions
                or await lock_prediction(ledger, prediction_id, item_id) != item_id  # an equal item was given it
            ):
                return
            logger.error(
                "Item %s was bought twice: a call names prediction %s for an order that had left no trace. This "
                "happens when an assumption of the guarantee is broken (see the docs, Guarantees).",
                item_id,
                prediction_id,
            )
            await self._note_one_too_many(ledger, held, Prediction(id=prediction_id))
        except EachlabsError as error:
            logger.warning("Item %s: a late prediction could not be noted (%s).", item_id, error)

    async def _may_order_again(self, job: Job, settled: Settled, *, word: bool = False) -> Record:
        """The record of the one further order that may follow when settling has found nothing.

        Args:
            word: A person says that nothing was bought, should that stay open.

        Raises:
            OutcomeUnknown: Nobody can tell, or this was the further order already: the item stands as ambiguous.
        """
        held, record, doubt = settled.held, settled.held.record, settled.doubt
        if record.state is RecordState.CREATED:
            return record
        if doubt is None and job.options.on_ambiguous == "fail":
            doubt = OutcomeUnknown(
                "An earlier order of this item got no answer, and no trace of it was found: it was probably not "
                "billed. It is not repeated (on_ambiguous=fail); run it with on_ambiguous=settle to buy it.",
                item_id=record.item_id,
            )
        elif doubt is None:
            count = min(record.orders_without_trace, MOST_ORDERS_WITHOUT_TRACE) + 1
            record = amended(record, orders_without_trace=count)
            if count <= MOST_ORDERS_WITHOUT_TRACE:
                if not settled.unproven:
                    return record
                since = f" of {record.unsettled_since:%Y-%m-%d %H:%M:%S} UTC" if record.unsettled_since else ""
                loss = f"The order{since} got no answer, and the API's list of executions was empty: it may have been "
                loss += "billed. It was not, if the prediction that was bought after it is listed."
                return amended(record, possible_loss=loss)
            doubt = nobody_can_tell(record, f"{count} orders of this item got no answer and left no trace")
        if word:
            said = Statement(
                run_id=job.run_id,
                said_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
                unsettled_since=record.unsettled_since,
                unsettled=doubt.message,
            )
            logger.warning("Item %s: bought once more, on a person's word (retry_ambiguous).", record.item_id)
            return amended(
                record, orders_without_trace=MOST_ORDERS_WITHOUT_TRACE, statements=[*record.statements, said]
            )
        await self._note_ambiguous(job.ledger, held, record, doubt)
        raise doubt

    async def _note_ambiguous(
        self, ledger: Ledger, held: VersionedRecord, record: Record, error: OutcomeUnknown
    ) -> None:
        since = record.unsettled_since or held.modified_at
        said = RecordError(kind=error.kind, message=error.message)
        note = amended(record, state=RecordState.AMBIGUOUS, intent=None, unsettled_since=since, error=said)
        await self._note(ledger, held, note)

    async def _settle(self, job: Job, held: VersionedRecord, record: Record, *, abandoned: bool) -> Settled:
        """Takes the claim for settling and finds out: a created record, or our claim, under which nothing was bought.

        Args:
            held: The record as it was just read from the bucket.
            record: What the new claim is made of.
            abandoned: The claim is another's, who may have begun its POST late and waited long for the answer.
        """
        settings = self._settings
        tight_seconds = settings.post_begins_within_seconds + settings.post_given_up_after_seconds
        longest_seconds = tight_seconds + settings.freeze_margin_seconds + settings.settling_seconds
        since = held.record.unsettled_since or held.modified_at
        until = since + timedelta(seconds=longest_seconds) + WHOLE_SECONDS
        if abandoned:
            conclusive_at = until
        else:
            conclusive_at = held.read_at + timedelta(seconds=settings.settling_seconds) + WHOLE_SECONDS
        span = Span(since, max(until, conclusive_at), tight_seconds)
        settling = amended(
            record,
            state=RecordState.CLAIMED,
            intent=Intent.SETTLE,
            unsettled_since=since,
            error=None,
            # What it finds was billed to the run whose POST it was.
            ordered_by=None if held.record.bought_by == record.run_id else held.record.bought_by,
        )
        with job.critical():
            mine = await job.ledger.write(settling, replacing=held)
        age_seconds = (held.read_at - since).total_seconds()
        reconciler = self.reconciler_of(job.ledger)
        return await reconciler.settle(mine, span=span, conclusive_at=conclusive_at, age_seconds=age_seconds)

    def reconciler_of(self, ledger: Ledger) -> Reconciler:
        """Who settles the claims of this ledger, all together; made once."""
        if ledger not in self._reconcilers:
            self._reconcilers[ledger] = Reconciler(
                self._client, self._limiter, ledger, self._settings, known=self._known, webhooks=self._webhooks
            )
        return self._reconcilers[ledger]

    async def aclose(self) -> None:
        """Stops settling; the claims that wait are settled by the next run."""
        for reconciler in self._reconcilers.values():
            await reconciler.aclose()


def _may_be_overruled(held: VersionedRecord, options: PurchaseOptions) -> bool:
    """Whether a person's word counts: of what stood as ambiguous before this run began, and once for each run."""
    record = held.record
    if not options.retry_ambiguous or options.began_at is None or record.state is not RecordState.AMBIGUOUS:
        return False
    run_seconds = clock() - options.began_at
    return (
        held.age_seconds >= run_seconds  # to the second, which is the resolution of the bucket's times
        and options.run_id not in (record.run_id, *(said.run_id for said in record.statements))
    )


def _replaced_runs(old: Record) -> list[str]:
    """The runs whose purchases for this item id were replaced, once this record is replaced by another input."""
    if not old.may_have_bought or not old.bought_by or old.bought_by in old.replaced_runs:
        return old.replaced_runs
    return [*old.replaced_runs, old.bought_by][-MOST_REPLACED_RUNS:]
