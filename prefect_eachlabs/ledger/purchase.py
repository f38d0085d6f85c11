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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from prefect_eachlabs.api.client import EachlabsClient
from prefect_eachlabs.api.orders import Order, Orders, recorded
from prefect_eachlabs.api.waking import asleep_seconds
from prefect_eachlabs.errors import (
    EachlabsError,
    InsufficientBalance,
    ItemConflict,
    KeyRefused,
    NotSent,
    OutcomeUnknown,
    Rejected,
    SetupError,
    Skipped,
    StoreFailed,
    Throttled,
)
from prefect_eachlabs.ledger.adoption import take_adoption_marker
from prefect_eachlabs.ledger.reconcile import Reconciler
from prefect_eachlabs.ledger.records import (
    Intent,
    Ledger,
    Overtaken,
    Record,
    RecordError,
    RecordState,
    VersionedRecord,
    amended,
    new_record,
)
from prefect_eachlabs.ledger.rules import Budget, PurchaseOptions
from prefect_eachlabs.limits.limiter import RateLimiter, Slot
from prefect_eachlabs.models import Item, Prediction
from prefect_eachlabs.polling.poller import Poller
from prefect_eachlabs.settings import AccountSettings

logger = logging.getLogger(__name__)

RECLAIMS_BEFORE_GIVING_UP = 5
REFUSALS_FOR_WANT_OF_BALANCE = 3
FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 30.0


class _AnswerLost(Exception):
    """Our POST may have bought, under a claim of ours, and nobody told us what."""

    def __init__(self, claim: VersionedRecord, error: OutcomeUnknown) -> None:
        super().__init__("answer lost")
        self.claim = claim
        self.error = error


class _ToBeTriedAgain(Exception):
    """The account was throttled; the claim was given back and may be taken again."""

    def __init__(self, claim: VersionedRecord) -> None:
        super().__init__("throttled")
        self.claim = claim


@dataclass
class Job:
    """One item's way through the gateway: what it holds, and whether it may be interrupted right now."""

    run_id: str
    slot: Slot | None = None
    """The slot in flight it holds; None before, and after the watcher has taken it over."""
    prediction_id: str | None = None
    """What this job has bought (or adopted), once it is known."""
    budget: Budget | None = None
    """Told of every order of this job, whatever becomes of it."""
    may_be_interrupted: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.may_be_interrupted.set()

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

    def ordered(self, item: Item, prediction_id: str | None) -> None:
        if self.budget is not None:
            self.budget.ordered(item, prediction_id)

    def give_back_slot(self) -> None:
        if self.slot is not None:
            self.slot.done()
            self.slot = None


class Purchaser:
    """Buys predictions for items, each once."""

    def __init__(
        self, client: EachlabsClient, limiter: RateLimiter, poller: Poller, settings: AccountSettings, orders: Orders
    ) -> None:
        self._client = client
        self._limiter = limiter
        self._poller = poller
        self._settings = settings
        self._orders = orders

    async def buy(
        self,
        item: Item,
        ledger: Ledger,
        reconciler: Reconciler,
        replacing: VersionedRecord | None,
        options: PurchaseOptions,
        job: Job,
    ) -> VersionedRecord:
        """Buys the item under its record and returns the record that names a prediction. **Costs money.**

        Args:
            item: What is wanted.
            ledger: Where its record is.
            settler: Finds out about lost answers there.
            replacing: The record that this purchase replaces, just read; None: there is none.
            options: What may be done.
            job: Whose slot in flight it is, and who may not interrupt the purchase.

        Raises:
            Overtaken: Another writer changed the record: look again.
            NotSent, Throttled, InsufficientBalance, Rejected, StoreFailed, SetupError: Nothing was bought.
            OutcomeUnknown: Nobody can tell whether it was bought; it stands as ambiguous and is not repeated.
        """
        record = self._first_claim(item, replacing, options)
        job.budget = options.budget
        try:
            if replacing is not None and replacing.record.may_have_bought_unseen:
                if replacing.record.fingerprint == item.fingerprint:
                    replacing = await self._settle(ledger, reconciler, replacing, record, job, abandoned=True)
                    record = replacing.record
                else:
                    # What is replaced may have bought as well: that stays on the books.
                    old = replacing.record.model_copy(
                        update={"run_id": options.run_id, "epoch": replacing.record.epoch + 1}
                    )
                    replacing = await self._settle(ledger, reconciler, replacing, old, job, abandoned=True)
                    record = self._first_claim(item, replacing, options)
                if record.state is RecordState.CLAIMED and options.on_ambiguous == "fail":
                    await self._report_as_ambiguous(ledger, replacing)
            while record.state is not RecordState.CREATED:
                record = amended(record, intent=Intent.POST, unsettled_since=None, ordered_by=None)
                try:
                    order = await self._orders.prepare(
                        item, ledger.destination, ledger.access, anywhere=options.any_reference
                    )
                    request = await self._take_approved_slots(item, options, job)
                    sent = await self._sent(order, request)
                except EachlabsError:
                    await self._give_back_settled(ledger, replacing, options)
                    raise
                lost: _AnswerLost | None = None
                with job.critical():
                    try:
                        return await self._claim_and_post(sent, ledger, record, replacing, request, job)
                    except _ToBeTriedAgain as again:
                        replacing = again.claim
                    except _AnswerLost as error:
                        lost = error
                if lost is not None:
                    replacing = await self._after_a_lost_answer(ledger, reconciler, lost, options, job)
                    record = replacing.record
            assert replacing is not None
            self._adopt(item, replacing, job)
            return replacing
        finally:
            job.give_back_slot()

    async def settle_only(
        self,
        item: Item,
        ledger: Ledger,
        reconciler: Reconciler,
        held: VersionedRecord,
        options: PurchaseOptions,
        job: Job,
    ) -> VersionedRecord:
        """What a dead claim has bought, without buying: a created record, or an idle claim. Costs requests alone.

        Raises:
            Overtaken: Another writer changed the record.
            OutcomeUnknown: Nobody can tell; it stands as ambiguous.
        """
        if not held.record.may_have_bought_unseen:
            return held
        record = self._first_claim(item, held, options)
        settled = await self._settle(ledger, reconciler, held, record, job, abandoned=True)
        if settled.record.state is RecordState.CREATED:
            return settled
        return await ledger.write(amended(settled.record, intent=Intent.IDLE, unsettled_since=None), replacing=settled)

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

    async def _take_approved_slots(self, item: Item, options: PurchaseOptions, job: Job) -> Slot:
        """Both slots, when whoever holds the budget agrees before they are waited for and still does afterwards."""
        if options.budget is None:
            return await self._take_slots(job)
        await options.budget.approve(item)
        request = await self._take_slots(job)
        try:
            options.budget.check()
        except Skipped:
            request.unused()
            self._limiter.breaker.left()
            raise
        return request

    async def _sent(self, order: Order, request: Slot) -> Item:
        """The item as it is sent now, with fresh URLs of its reference pictures."""
        try:
            return await order.sent()
        except BaseException:
            request.unused()
            self._limiter.breaker.left()
            raise

    async def _give_back_settled(self, ledger: Ledger, held: VersionedRecord | None, options: PurchaseOptions) -> None:
        """Nothing is bought after all: a claim of ours that was settled, and bought nothing, is free at once."""
        if held is not None and held.record.intent is Intent.SETTLE and held.record.run_id == options.run_id:
            with suppress(Overtaken, StoreFailed):
                await ledger.write(amended(held.record, intent=Intent.IDLE, unsettled_since=None), replacing=held)

    def _first_claim(self, item: Item, replacing: VersionedRecord | None, options: PurchaseOptions) -> Record:
        record = new_record(item, run_id=options.run_id)
        if options.formats is not None:
            record.formats = list(options.formats)
        if replacing is None:
            return record
        old = replacing.record
        if old.fingerprint == item.fingerprint:
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
                "resubmissions": (
                    old.resubmissions + (old.state is RecordState.FAILED) if old.fingerprint == item.fingerprint else 0
                ),
            }
        )

    async def _claim_and_post(
        self, item: Item, ledger: Ledger, record: Record, replacing: VersionedRecord | None, request: Slot, job: Job
    ) -> VersionedRecord:
        posted = False
        try:
            record = amended(record, sent_input=recorded(item))
            for _ in range(RECLAIMS_BEFORE_GIVING_UP):
                claim_sent_at = self._now()
                claim = await ledger.write(amended(record), replacing=replacing)
                if self._now() - claim_sent_at <= self._settings.post_begins_within_seconds:
                    break
                # The bucket was so slow that the claim may be dead before the POST's answer: claim again.
                replacing = claim
            else:
                raise StoreFailed(
                    f"The bucket takes more than {self._settings.post_begins_within_seconds:g} s for one small write; "
                    "nothing was bought. Look at the bucket or raise EACHLABS_CLAIM_SECONDS.",
                    item_id=item.item_id,
                )
            posted = True
        finally:
            if not posted:
                request.unused()
                self._limiter.breaker.left()
        try:
            prediction = await self._post(item, request, job)
        except Throttled as error:
            claim = await self._give_back(ledger, claim)
            self._fail_without_balance(error)
            raise _ToBeTriedAgain(claim) from error
        except (NotSent, KeyRefused):
            await self._give_back(ledger, claim)
            raise
        except Rejected as error:
            if error.status_code is not None and 300 <= error.status_code < 400:
                await self._give_back(ledger, claim)  # the set-up is wrong, not the item
            else:
                await self._note_refusal(ledger, claim, error)
            raise
        except OutcomeUnknown as error:
            raise _AnswerLost(claim, error) from error
        return await self._note_created(item, ledger, claim, prediction, claim_sent_at)

    def _now(self) -> float:
        """The loop's time, and what it does not know of because the machine was asleep."""
        return asyncio.get_running_loop().time() + asleep_seconds()

    async def _post(self, item: Item, request: Slot, job: Job) -> Prediction:
        """One POST in its slots; the gate learns how it went, the watcher takes over what was created."""
        breaker = self._limiter.breaker
        try:
            prediction = await self._client.create(item)
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
                job.ordered(item, None)
            raise
        except asyncio.CancelledError:
            request.done()
            breaker.left()
            job.ordered(item, None)
            raise
        except Exception as error:
            request.done()
            breaker.left()
            job.ordered(item, None)
            raise OutcomeUnknown(
                f"The order ended in an unexpected {type(error).__name__}: it may have been billed.",
                item_id=item.item_id,
            ) from error
        request.done()
        breaker.passed()
        job.prediction_id = prediction.id
        job.ordered(item, prediction.id)
        slot, job.slot = job.slot, None
        self._poller.watch(prediction, slot=slot)
        return prediction

    def _fail_without_balance(self, error: Throttled) -> None:
        """402 that stays is not waited for, by nobody: somebody must top up."""
        breaker = self._limiter.breaker
        if isinstance(error, InsufficientBalance) and breaker.consecutive_throttles >= REFUSALS_FOR_WANT_OF_BALANCE:
            breaker.refuse(error)
            raise error

    def _adopt(self, item: Item, found: VersionedRecord, job: Job) -> None:
        """What settling found is in flight, perhaps: the slot that its POST took is its own."""
        prediction = found.record.prediction()
        if prediction is not None:
            if found.record.bought_by == job.run_id:
                job.ordered(item, prediction.id)
            job.prediction_id = prediction.id
            slot, job.slot = job.slot, None
            self._poller.watch(prediction, slot=slot)

    async def _give_back(self, ledger: Ledger, claim: VersionedRecord) -> VersionedRecord:
        """Nothing was created under our claim: say so, that nobody has to wait until it is dead. Best effort."""
        try:
            return await ledger.write(amended(claim.record, intent=Intent.IDLE), replacing=claim)
        except (StoreFailed, SetupError) as error:
            logger.warning("Item %s: its unused claim ends by itself (%s).", claim.record.item_id, error)
            return claim

    async def _note_refusal(self, ledger: Ledger, claim: VersionedRecord, error: Rejected) -> None:
        said = RecordError(kind=error.kind, message=error.message, code=error.code)
        try:
            refused = amended(claim.record, state=RecordState.FAILED, intent=None, error=said)
            await ledger.write(refused, replacing=claim)
        except (Overtaken, StoreFailed, SetupError):
            logger.warning("Item %s: the API's refusal could not be written down.", claim.record.item_id)

    async def _note_created(
        self, item: Item, ledger: Ledger, claim: VersionedRecord, prediction: Prediction, claim_sent_at: float
    ) -> VersionedRecord:
        """Writes the prediction's id down, as long as the process lives; it is paid for."""
        dead_at = claim_sent_at + self._settings.claim_seconds
        safe_until = dead_at - self._settings.freeze_margin_seconds
        base: VersionedRecord | None = claim
        created = self._created(claim.record, item, prediction)
        pause_seconds = FIRST_PAUSE_SECONDS
        marked = False
        while True:
            try:
                if not marked and self._now() > safe_until:
                    # The claim may be dead by now, and whoever settles for another item with the same input may
                    # adopt this prediction: so it is adopted first, which is exclusive.
                    await self._adopt_late(item, ledger, claim, prediction)
                    marked = True
                written = await ledger.write(created, replacing=base)
                if not marked and self._now() > dead_at:
                    claim = base = written
                    # The write took so long, or we were frozen in it, that the same may have happened meanwhile.
                    await self._adopt_late(item, ledger, written, prediction)
                return written
            except (StoreFailed, SetupError) as error:
                logger.warning(
                    "Item %s: prediction %s is bought and could not be written down yet (%s); trying on.",
                    item.item_id,
                    prediction.id,
                    error,
                )
                await asyncio.sleep(pause_seconds)
                pause_seconds = min(2 * pause_seconds, LONGEST_PAUSE_SECONDS)
            except Overtaken as overtaken:
                current = overtaken.current
                if current is None:
                    base, created = None, self._created(claim.record, item, prediction)
                elif prediction.id in current.record.named_predictions:
                    return current
                elif current.record.fingerprint == item.fingerprint and current.record.state in (
                    RecordState.CLAIMED,
                    RecordState.AMBIGUOUS,
                ):
                    safe_until = 0.0
                    base, created = current, self._created(current.record, item, prediction)
                    if current.record.run_id != claim.record.run_id:
                        created.ordered_by = claim.record.run_id
                else:
                    return await self._one_too_many(item, ledger, current, prediction)

    async def _adopt_late(self, item: Item, ledger: Ledger, held: VersionedRecord, prediction: Prediction) -> None:
        """Makes sure that no other item has adopted our prediction.

        Raises:
            _AnswerLost: One has. What its own order bought, if anything, is ours to find.
        """
        holder = await take_adoption_marker(ledger, prediction.id, item.item_id)
        if holder == item.item_id:
            return
        if held.record.prediction_id == prediction.id:
            claim = amended(
                held.record, state=RecordState.CLAIMED, intent=Intent.POST, prediction_id=None, created_at=None
            )
            held = await ledger.write(claim, replacing=held)
        error = OutcomeUnknown(
            f"Prediction {prediction.id} came late and was adopted by item {holder}, which has the same input.",
            item_id=item.item_id,
        )
        raise _AnswerLost(held, error)

    def _created(self, record: Record, item: Item, prediction: Prediction) -> Record:
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
            request = await self._limiter.take_request(question=True)
            try:
                await self._client.cancel(prediction.id)
            finally:
                request.done()
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
        pause_seconds = FIRST_PAUSE_SECONDS
        while True:
            noted = amended(current.record, also_bought=[*current.record.also_bought, prediction.id])
            try:
                return await ledger.write(noted, replacing=current)
            except Overtaken as overtaken:
                if overtaken.current is None or prediction.id in overtaken.current.record.named_predictions:
                    return overtaken.current or current
                current = overtaken.current
            except (StoreFailed, SetupError) as error:
                logger.warning("Prediction %s could not be written down yet (%s); trying on.", prediction.id, error)
                await asyncio.sleep(pause_seconds)
                pause_seconds = min(2 * pause_seconds, LONGEST_PAUSE_SECONDS)

    async def _after_a_lost_answer(
        self, ledger: Ledger, reconciler: Reconciler, lost: _AnswerLost, options: PurchaseOptions, job: Job
    ) -> VersionedRecord:
        """What our own POST without an answer has come to: a created record, or a claim that bought nothing."""
        held = await self._read_on(ledger, lost.claim.record.item_id)
        if held is None or held.etag != lost.claim.etag:
            # Our claim was dead, and somebody else's may be live: that one decides.
            raise Overtaken(held)
        logger.warning("Item %s: %s", held.record.item_id, lost.error.message)
        if options.on_ambiguous == "fail":
            await self._note_ambiguous(ledger, held, lost.error)
            raise lost.error
        return await self._settle(ledger, reconciler, held, held.record, job, abandoned=False)

    async def _report_as_ambiguous(self, ledger: Ledger, settled: VersionedRecord) -> None:
        """Nothing was found of what may have been bought; whoever asked for it is told rather than buying again.

        Raises:
            OutcomeUnknown: Always.
        """
        error = OutcomeUnknown(
            "An earlier order of this item got no answer, and no trace of it was found: it was probably not billed. "
            "It is not repeated (on_ambiguous=fail); run it with on_ambiguous=settle to buy it.",
            item_id=settled.record.item_id,
        )
        await self._note_ambiguous(ledger, settled, error)
        raise error

    async def _read_on(self, ledger: Ledger, item_id: str) -> VersionedRecord | None:
        """Reads a record that money depends on, for as long as it takes."""
        pause_seconds = FIRST_PAUSE_SECONDS
        while True:
            try:
                return await ledger.read(item_id)
            except StoreFailed as error:
                logger.warning("Item %s: its record cannot be read yet (%s); trying on.", item_id, error)
                await asyncio.sleep(pause_seconds)
                pause_seconds = min(2 * pause_seconds, LONGEST_PAUSE_SECONDS)

    async def _note_ambiguous(self, ledger: Ledger, held: VersionedRecord, error: OutcomeUnknown) -> None:
        since = held.record.unsettled_since or held.modified_at
        said = RecordError(kind=error.kind, message=error.message)
        note = amended(held.record, state=RecordState.AMBIGUOUS, intent=None, unsettled_since=since, error=said)
        try:
            await ledger.write(note, replacing=held)
        except (Overtaken, StoreFailed):
            logger.warning("Item %s: it could not be noted as ambiguous; its claim says the same.", held.record.item_id)

    async def _settle(
        self,
        ledger: Ledger,
        reconciler: Reconciler,
        held: VersionedRecord,
        record: Record,
        job: Job,
        *,
        abandoned: bool,
    ) -> VersionedRecord:
        """Takes the claim for settling and finds out: a created record, or our claim, under which nothing was bought.

        Args:
            held: The record as it was just read.
            record: What the new claim is made of.
            abandoned: The claim is another's, who may have begun its POST late and waited long for the answer.
        """
        loop = asyncio.get_running_loop()
        since = held.record.unsettled_since or held.modified_at
        since_seconds = (held.modified_at - since).total_seconds() + held.age_seconds + 1
        remaining_seconds = self._settings.settling_seconds
        if abandoned:
            longest_seconds = (
                self._settings.post_begins_within_seconds
                + self._settings.freeze_margin_seconds
                + self._settings.post_given_up_after_seconds
            )
            # The age is a difference of whole seconds.
            remaining_seconds += longest_seconds - held.age_seconds + 1
        now = loop.time()
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
            mine = await ledger.write(settling, replacing=held)
        try:
            return await reconciler.settle(
                mine, conclusive_at=now + max(0.0, remaining_seconds), since=now - since_seconds
            )
        except OutcomeUnknown as error:
            current = await self._read_on(ledger, record.item_id)
            if current is not None and current.record.state is RecordState.CLAIMED:
                await self._note_ambiguous(ledger, current, error)
            raise
