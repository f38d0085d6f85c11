"""What the gateway runs on its loop: each item's way from the record to the picture, whole or step by step."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import httpx

from prefect_eachlabs.api.client import EachlabsClient
from prefect_eachlabs.engine.account import CLEAN_UP_SECONDS, Account, StoreFor
from prefect_eachlabs.engine.cleanup import SettleReport, settle
from prefect_eachlabs.errors import (
    BadInput,
    DownloadFailed,
    EachlabsError,
    ItemConflict,
    NotYetSafe,
    PictureMissing,
    PredictionFailed,
    PredictionTimedOut,
    Rejected,
    StoreFailed,
)
from prefect_eachlabs.images.download import RETENTION_HOURS, Downloader
from prefect_eachlabs.images.store import MAY_BE_GONE_AFTER_SECONDS, is_gone, stored_image
from prefect_eachlabs.ledger.late_costs import correct_cost
from prefect_eachlabs.ledger.purchase import Job
from prefect_eachlabs.ledger.records import (
    Ledger,
    Record,
    RecordChanged,
    RecordError,
    RecordState,
    VersionedRecord,
    amended,
    new_record,
)
from prefect_eachlabs.ledger.rules import PurchaseOptions, Rules, Step
from prefect_eachlabs.limits.limiter import RateLimiter
from prefect_eachlabs.models import (
    ITEM_ID_PATTERN,
    Destination,
    Item,
    Prediction,
    PredictionStatus,
    StoredImage,
    fingerprint_of,
)
from prefect_eachlabs.settings import AccountSettings
from prefect_eachlabs.storage.s3_client import S3Access
from prefect_eachlabs.webhooks.webhooks import Way

__all__ = ["CLEAN_UP_SECONDS", "Engine"]

logger = logging.getLogger(__name__)

LOOK_AGAIN_SECONDS = 2.0
COST_PAUSES_SECONDS = (2.0, 4.0, 8.0)
"""Between looks for a cost that is not settled; what is settled later still, an audit finds."""
MOST_RESUBMISSIONS = 2


_Key = tuple[int, str, str]
"""Ledger, item id and fingerprint: another input under the same id is another job, as in another process."""


@dataclass
class Running:
    """A job under way, and how many callers wait for it."""

    job: Job
    task: asyncio.Task[StoredImage]
    callers: int = 0
    interrupted: asyncio.Event | None = None
    """Set when what its last caller's cancel began has come to its end; None before."""


class Engine:
    """Buys, waits and stores for one account, on one loop.

    Args:
        settings: The account.
        limiter: Gives out the slots of the account; closed with the engine.
        store_for: Opens the bucket of a destination.
        client, downloader, outside: Reach the API, pictures' hosts, and those of reference pictures; replaced in tests.
        way: How the vendor's calls come in; None: they do not.
    """

    def __init__(
        self,
        settings: AccountSettings,
        limiter: RateLimiter,
        store_for: StoreFor,
        *,
        client: EachlabsClient | None = None,
        downloader: Downloader | None = None,
        outside: httpx.AsyncBaseTransport | None = None,
        way: Way | None = None,
    ) -> None:
        self.settings = settings
        self.account = Account(settings, limiter, store_for, client, downloader, outside, way=way)
        self._running: dict[_Key, Running] = {}
        self._late: dict[asyncio.Task[None], str] = {}
        """Who waits for an end past its deadline → the prediction."""
        self._left_lost = 0
        """Jobs that were cancelled before it was known what their lost orders had bought."""

    @property
    def in_flight(self) -> int:
        """How many jobs of this process have ordered what has not ended, or are ordering this moment."""
        jobs = [running.job for running in list(self._running.values())]
        return (
            len(self._late)
            + self._left_lost
            + sum(job.prediction_id is not None or job.is_lost or not job.may_be_interrupted.is_set() for job in jobs)
        )

    @property
    def slots_past_deadline(self) -> int:
        """How many slots in flight are held by predictions past their deadlines: the vendor counts them too."""
        return sum(map(self.account.poller.holds_slot, list(self._late.values())))

    async def cancel_late(self, run_id: str) -> None:
        """Cancels what this run bought and what goes on past its deadline, and writes down the truth. Free."""
        late = [(task, one, self.account.bought_here(one)) for task, one in self._late.items()]
        ours = [(task, one, bought) for task, one, bought in late if bought is not None and bought.run_id == run_id]
        for task, _, _ in ours:
            task.cancel()
        clean_up, cancel = self.account.clean_up, self.account.cancel_and_note
        await asyncio.gather(*(clean_up(cancel(one, bought)) for _, one, bought in ours))

    async def generate_and_store(
        self,
        item: Item,
        destination: Destination,
        *,
        options: PurchaseOptions,
        access: S3Access | None = None,
    ) -> StoredImage:
        """The item's picture, safe in the bucket; bought only where the record allows. **Costs money.**

        The same item asked for twice in one process is one job. A caller that is cancelled cancels the prediction in
        flight, unless another caller waits for it.

        Raises:
            EachlabsError: As `errors.py` draws them; each says what to do next.
        """
        job = Job(item, self.account.ledger(destination, access), options.begun())
        key = (id(job.ledger), item.item_id, item.fingerprint)
        while (running := self._running.get(key)) is not None and running.interrupted is not None:
            # It is being cancelled with its run: this one comes after it, and is not cancelled with it.
            await running.interrupted.wait()
        if running is None or running.task.done():
            running = self._begin(key, job)
        running.callers += 1
        try:
            return await asyncio.shield(running.task)
        except asyncio.CancelledError:
            # A job that is done was ended by `aclose`, or has come to its end in this very moment.
            if running.callers == 1 and not running.task.done():
                await self._interrupt(key, running)
            raise
        finally:
            running.callers -= 1

    def _begin(self, key: _Key, job: Job) -> Running:
        running = self._running[key] = Running(job, asyncio.ensure_future(self._obtain(job)))

        def ended(_: asyncio.Task[StoredImage]) -> None:
            if running.interrupted is None:
                self._forget(key, running)

        running.task.add_done_callback(ended)
        return running

    def _forget(self, key: _Key, running: Running) -> None:
        if self._running.get(key) is running:
            del self._running[key]

    async def _interrupt(self, key: _Key, running: Running) -> None:
        interrupted = running.interrupted = asyncio.Event()

        async def interrupt() -> None:
            try:
                await self.account.interrupt(running.task, running.job)
            finally:
                self._forget(key, running)
                self._left_lost += running.job.is_lost and running.job.prediction_id is None
                interrupted.set()

        await self.account.clean_up(interrupt())

    async def _obtain(self, job: Job) -> StoredImage:
        """Follows the record's next step until the picture is stored, or until there is a reason why not."""
        item, options = job.item, job.options
        allowed = options
        rules = Rules(item, options, claim_seconds=self.settings.claim_seconds)
        # A store that ignores conditions would lose the record that is there.
        presumed_new = options.presume_new and job.ledger.is_proven
        while True:
            held, bought = await self._ordered(job, rules, allowed, presumed_new=presumed_new)
            presumed_new = False
            if held.record.state is RecordState.STORED:
                if not options.rebuy_missing and await self.account.image_store.find(job.ledger, held.record) is None:
                    raise PictureMissing(
                        f"{held.record.uri} was stored and is gone from the bucket. Restore it, or buy it again on "
                        "purpose (--rebuy-missing, rebuy_missing=True).",
                        item_id=item.item_id,
                        prediction_id=held.record.prediction_id,
                    )
                return stored_image(held.record, reused=True)
            try:
                if not bought:
                    recovered = await self.account.image_store.recover(job.ledger, held, formats=options.formats)
                    if recovered is not None:
                        return stored_image(recovered.record, reused=True)
                done, end = await self._finish(job, held, fresh=bought)
            except RecordChanged:
                continue
            if done.record.state is RecordState.STORED:
                return stored_image(done.record, reused=not bought)
            # What the API calls retryable is bought again twice, a failure of the provider once; both cost nothing.
            most = MOST_RESUBMISSIONS if end.failure is not None and end.failure.retryable else 1
            is_passing = end.failure is not None and end.failure.may_be_resubmitted
            if done.record.state is RecordState.CANCELLED and not bought:
                # The run that bought it was cancelled; this one wants the picture.
                allowed = options
            elif (is_passing and done.record.resubmissions < most) or (
                done.record.picture_is_gone and options.rebuy_missing and not allowed.retry_failed
            ):
                logger.info("Item %s: prediction %s gave no picture; it is bought again.", item.item_id, end.id)
                allowed = replace(options, retry_failed=True)
            else:
                end.model_copy(update={"item_id": item.item_id}).raise_for_end()
                raise PredictionFailed(
                    f"The item stands as {done.record.state.value}.", item_id=item.item_id, prediction_id=end.id
                )

    async def _ordered(
        self, job: Job, rules: Rules, allowed: PurchaseOptions, *, presumed_new: bool = False
    ) -> tuple[VersionedRecord, bool]:
        """The record once it is created or stored, and whether that was bought just now. **Costs money.**"""
        ledger, item_id = job.ledger, job.item.item_id
        while True:
            held = None if presumed_new else await ledger.read(item_id)
            step = Step.BUY if presumed_new else rules.next_step(held, allowed)
            presumed_new = False
            if step is Step.LOOK_AGAIN:  # it is another run's turn
                await asyncio.sleep(min(LOOK_AGAIN_SECONDS, self.settings.claim_seconds / 4))
                continue
            if held is not None and (step is Step.FINISH or (step is Step.REUSE and not job.options.rebuy_missing)):
                return held, False
            if held is not None and step is Step.REUSE and await self.account.image_store.find(ledger, held.record):
                return held, False
            try:
                held = await self.account.purchaser.buy(
                    job,
                    held,
                    check_place=lambda settled: self.account.image_store.check_place(
                        ledger, item_id, settled, job.options.formats
                    ),
                )
            except RecordChanged:
                continue
            self.account.remember(job)
            if held.record.state is RecordState.CREATED:
                return held, True

    async def _finish(self, job: Job, held: VersionedRecord, *, fresh: bool) -> tuple[VersionedRecord, Prediction]:
        """Waits for the record's prediction and stores it; when its deadline passes, goes on in the background."""
        prediction = held.record.prediction()
        assert prediction is not None, "a created record names its prediction"
        future = self.account.poller.watch(prediction, slot=None)
        try:
            end = await self.account.end_within(future, prediction, job.options.deadline_seconds)
        except PredictionTimedOut:
            task = asyncio.ensure_future(self._finish_late(job, held, future))
            self._late[task] = prediction.id
            task.add_done_callback(self._late.pop)
            raise
        except Rejected as error:
            if error.status_code != 404:
                raise
            if held.age_seconds < MAY_BE_GONE_AFTER_SECONDS:
                raise NotYetSafe(
                    f"The API does not know prediction {prediction.id}, although it was bought within the last "
                    f"{RETENTION_HOURS} h: it is kept, run the same again. If it stays so, look at the prediction in "
                    "the vendor's dashboard.",
                    item_id=held.record.item_id,
                    prediction_id=prediction.id,
                ) from error
            lost = PictureMissing(
                f"The API does not know prediction {prediction.id} any more, and its picture was never stored. Buy it "
                "again on purpose (--rebuy-missing, rebuy_missing=True).",
                item_id=held.record.item_id,
                prediction_id=prediction.id,
            )
            return await self._picture_is_gone(job, held, lost), prediction
        try:
            finish, options = self.account.image_store.finish, job.options
            done = await finish(job.ledger, held, end, fresh=fresh, formats=options.formats, see=options.see)
            return done, end
        except DownloadFailed as error:
            if not is_gone(error) or held.age_seconds < MAY_BE_GONE_AFTER_SECONDS:
                raise
            return await self._picture_is_gone(job, held, error), end

    async def _picture_is_gone(self, job: Job, held: VersionedRecord, error: EachlabsError) -> VersionedRecord:
        """Writes down that a picture cannot be had any more, when it may be bought again; else raises the error."""
        if not job.options.rebuy_missing:
            raise error
        said = RecordError(kind=PictureMissing.default_kind, message=error.message)
        gone = amended(held.record, state=RecordState.FAILED, error=said)
        return await job.ledger.write(gone, replacing=held)

    async def _finish_late(self, job: Job, held: VersionedRecord, future: asyncio.Future[Prediction]) -> None:
        """It is paid for: as long as the process lives, it is stored when it ends."""
        try:
            end = await asyncio.shield(future)
            await self.account.image_store.finish(job.ledger, held, end, fresh=False, formats=job.options.formats)
            logger.info("Item %s: its prediction ended after its deadline and is stored.", held.record.item_id)
        except (EachlabsError, RecordChanged) as error:
            logger.warning("Item %s: %s", held.record.item_id, error)

    async def create(
        self,
        item: Item,
        destination: Destination,
        *,
        options: PurchaseOptions,
        access: S3Access | None = None,
    ) -> Prediction:
        """Buys the item's prediction, or finds the one its record names. **Costs money.**"""
        job = Job(item, self.account.ledger(destination, access), options.begun())
        rules = Rules(item, job.options, claim_seconds=self.settings.claim_seconds)
        task = asyncio.ensure_future(self._ordered(job, rules, job.options))
        try:
            held, _ = await asyncio.shield(task)
        except asyncio.CancelledError:
            await self.account.clean_up(self.account.interrupt(task, job))
            raise
        prediction = held.record.prediction()
        assert prediction is not None, "a created or stored record names its prediction"
        said: dict[str, Any] = {"destination": str(destination)}
        if held.record.state is RecordState.STORED:  # as if it had just been awaited
            said |= {
                "status": PredictionStatus.SUCCEEDED,
                "status_word": "stored",
                "output_urls": (held.record.uri or "",),
                "cost_usd": held.record.cost_usd,
            }
        return prediction.model_copy(update=said)

    async def wait(
        self, prediction: Prediction | str, *, deadline_seconds: float | None = None, run_id: str = ""
    ) -> Prediction:
        """The prediction at its end, with its pictures' URLs. Free.

        When it is cancelled, the prediction is cancelled by the run that bought it alone, and not while others wait.

        Raises:
            PredictionTimedOut: Not ended by its deadline, counted from the POST (from now, for a bare id).
            PredictionFailed, PredictionCancelled: It ended otherwise.
            NotYetSafe: It succeeded and has no picture yet: ask again.
            Rejected: The API does not know it.
        """
        if isinstance(prediction, str):
            prediction = Prediction(id=prediction)
        if prediction.status.ended:
            return prediction.raise_for_end()
        future = self.account.poller.watch(prediction, slot=None)
        bought = self.account.bought_here(prediction.id)
        try:
            end = await self.account.end_within(future, prediction, deadline_seconds)
        except asyncio.CancelledError:
            if bought is not None and bought.run_id == run_id:
                await self.account.clean_up(self.account.cancel_and_note(prediction.id, bought))
            raise
        ours = ("item_id", "created_at", "destination", "model", "version", "input")
        end = end.model_copy(update={name: value for name in ours if (value := getattr(prediction, name)) is not None})
        try:
            return end.raise_for_end()
        except EachlabsError:
            # Nobody will store it, so its record is closed here.
            if bought is not None:
                await self._note_end(bought.ledger, bought.item_id, end)
            elif end.destination is not None and end.item_id is not None:
                await self._note_end(self.account.ledger(Destination.parse(end.destination)), end.item_id, end)
            raise

    async def _note_end(self, ledger: Ledger, item_id: str, end: Prediction) -> None:
        try:
            held = await ledger.read(item_id)
            if held is not None and held.record.state is RecordState.CREATED and held.record.prediction_id == end.id:
                await self.account.image_store.finish(ledger, held, end, fresh=False)
        except (EachlabsError, RecordChanged) as error:
            if isinstance(error, NotYetSafe) and not isinstance(error, StoreFailed):
                raise  # it succeeded, and its picture may still come
            logger.warning("Item %s: its end could not be written down: %s", item_id, error)

    async def store(
        self,
        prediction: Prediction,
        destination: Destination,
        *,
        access: S3Access | None = None,
        formats: Sequence[str] | None = None,
    ) -> StoredImage:
        """Downloads, verifies and uploads a finished prediction's pictures; its record says so then.

        A prediction without a record in the destination (ordered elsewhere, or by another tool) gets one: under its
        item's id if it has one, else under its own. `formats` is what the pictures may be; None: what the record says.

        Raises:
            NotYetSafe: The picture is paid for and could not be stored: run again.
            BadInput: The prediction has not ended.
            PredictionFailed, PredictionCancelled: There is no picture.
            ItemConflict: The item's record names another prediction.
        """
        if not prediction.status.ended:
            raise BadInput("store_image wants a finished prediction: await it first.", prediction_id=prediction.id)
        ledger = self.account.ledger(destination, access)
        item_id = item_id_of(prediction)
        while True:
            held = await ledger.read(item_id)
            if held is None:
                prediction.raise_for_end()
                try:
                    held = await ledger.write(record_of(prediction), replacing=None)
                except RecordChanged:
                    continue
            if held.record.prediction_id != prediction.id:
                raise ItemConflict(
                    f"{destination} holds a record of item {item_id!r} that names another prediction "
                    f"({held.record.prediction_id}): choose another item id or destination.",
                    item_id=item_id,
                    prediction_id=prediction.id,
                )
            if held.record.state is RecordState.STORED:
                if await self.account.image_store.find(ledger, held.record) is not None:
                    return stored_image(held.record, reused=True)
                if not any(url.startswith("http") for url in prediction.output_urls):
                    raise PictureMissing(f"{held.record.uri} was stored and is gone from the bucket.", item_id=item_id)
            try:
                done = await self.account.image_store.finish(ledger, held, prediction, fresh=False, formats=formats)
            except RecordChanged:
                continue
            if done.record.state is RecordState.STORED:
                return stored_image(done.record, reused=False)
            prediction.raise_for_end()

    async def with_cost(
        self, image: StoredImage, destination: Destination, *, access: S3Access | None = None
    ) -> StoredImage:
        """The stored picture with what it cost, where the vendor tells that after its end; its record learns it, too.

        Takes 14 s at most of what was just bought, one question of what was there already. Raises nothing; free.
        """
        if image.cost_usd is None and self.account.lists_cost(image.prediction_id):
            return image
        for pause_seconds in (0.0, *(() if image.reused else COST_PAUSES_SECONDS)):
            if image.cost_usd is not None:
                break
            await asyncio.sleep(pause_seconds)
            try:
                end = await self.account.ask_once(image.prediction_id)
                if end.cost_usd is None:  # it is not told at all
                    break
                if end.cost_usd:
                    image = image.model_copy(update={"cost_usd": end.cost_usd})
                    await self.note_cost(image.item_id, end.id, end.cost_usd, destination, access=access)
            except EachlabsError as error:
                logger.info("Item %s: what it cost is not known yet: %s", image.item_id, error)
                break
        return image

    async def note_cost(
        self,
        item_id: str,
        prediction_id: str,
        cost_usd: float,
        destination: Destination,
        *,
        access: S3Access | None = None,
    ) -> None:
        """Writes what a prediction cost into its item's record, where that lacks it. Raises nothing; free."""
        try:
            ledger = self.account.ledger(destination, access)
            if (held := await ledger.read(item_id)) is not None:
                await correct_cost(ledger, held, prediction_id, cost_usd)
        except EachlabsError as error:
            logger.info("Item %s: what it cost is not in its record: %s", item_id, error)

    async def cancel(self, prediction_id: str) -> Prediction:
        """Asks the API to cancel, best effort, and returns what GET says then (it may have succeeded). Free."""
        return await self.account.cancel(prediction_id)

    async def settle(self, destination: Destination, *, run_id: str, access: S3Access | None = None) -> SettleReport:
        """Settles what other runs have left in a bucket, and buys nothing; see `cleanup.settle`."""
        return await settle(self.account, destination, run_id=run_id, access=access)

    async def aclose(self) -> None:
        """Ends cleanly: jobs are interrupted where they may be, connections closed, leased slots given back."""
        tasks: list[asyncio.Task[Any]] = [*self._late]
        for running in list(self._running.values()):
            await running.job.until_it_may_be_interrupted()
            running.task.cancel()
            tasks.append(running.task)
        for late in self._late:
            late.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.account.aclose()


def item_id_of(prediction: Prediction) -> str:
    """The item that a prediction was bought for; its own id, for what was ordered without one."""
    if prediction.item_id is not None:
        return prediction.item_id
    if ITEM_ID_PATTERN.fullmatch(prediction.id):
        return prediction.id
    return hashlib.sha256(prediction.id.encode()).hexdigest()[:32]


def record_of(prediction: Prediction) -> Record:
    """The record of a prediction that was bought without one, as far as its answer tells what was ordered."""
    model, input = prediction.model or "", prediction.input or {}
    item = Item(
        item_id=item_id_of(prediction),
        model=model,
        version=prediction.version,
        input=input,
        fingerprint=fingerprint_of(model, prediction.version, input),
    )
    try:
        record = new_record(item, run_id="")
    except BadInput:  # it holds a whole picture, say, and is paid for all the same
        record = new_record(item.model_copy(update={"input": {}}), run_id="")
    return amended(
        record,
        state=RecordState.CREATED,
        intent=None,
        prediction_id=prediction.id,
        created_at=prediction.created_at,
    )
