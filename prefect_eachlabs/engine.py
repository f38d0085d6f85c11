"""What the gateway runs on its loop: each item's way from the record to the picture, as coroutines."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import Any

from prefect_eachlabs.client import EachlabsClient
from prefect_eachlabs.decisions import PurchaseOptions, Step, next_step
from prefect_eachlabs.download import Downloader
from prefect_eachlabs.errors import (
    BadInput,
    DownloadFailed,
    EachlabsError,
    ItemConflict,
    NotSent,
    PictureMissing,
    PredictionFailed,
    PredictionTimedOut,
    Throttled,
    Unanswered,
)
from prefect_eachlabs.finishing import Finisher, stored_image
from prefect_eachlabs.models import (
    Destination,
    Item,
    Prediction,
    PredictionStatus,
    StoredImage,
)
from prefect_eachlabs.object_store import ObjectStore
from prefect_eachlabs.pacing import LotSource, Places
from prefect_eachlabs.purchasing import Job, Purchaser
from prefect_eachlabs.records import Held, Ledger, Overtaken, RecordState, amended
from prefect_eachlabs.s3_access import S3Access
from prefect_eachlabs.settings import AccountSettings
from prefect_eachlabs.settling import Settler
from prefect_eachlabs.watching import Watcher

logger = logging.getLogger(__name__)

LAST_WAIT_SECONDS = 30.0
"""A prediction that is found after its deadline gets so long to be asked about once more."""
LOOK_AGAIN_SECONDS = 2.0
CLEAN_UP_SECONDS = 8.0
"""How long a cancelled run may take to learn how its cancelled prediction ended (Prefect waits some 30 s)."""
REMEMBERED_PURCHASES = 10_000
MOST_RESUBMISSIONS = 2

StoreFor = Callable[[Destination, "S3Access | None"], ObjectStore]


@dataclass
class Books:
    """A destination's ledger, and who settles it."""

    ledger: Ledger
    settler: Settler


@dataclass
class Bought:
    """What this process remembers of a prediction that it bought."""

    at: float
    books: Books | None = None
    item_id: str | None = None
    run_id: str = ""


@dataclass
class Running:
    """A job under way, and how many callers wait for it."""

    job: Job
    fingerprint: str
    task: asyncio.Task[StoredImage]
    callers: int = field(default=0)


class Engine:
    """Buys, waits and stores for one account, on one loop.

    Args:
        settings: The account.
        source: Where the places of the account come from.
        store_for: Opens the bucket of a destination.
        client: Speaks to the API; replaced in tests.
        downloader: Fetches pictures; replaced in tests.
    """

    def __init__(
        self,
        settings: AccountSettings,
        source: LotSource,
        store_for: StoreFor,
        *,
        client: EachlabsClient | None = None,
        downloader: Downloader | None = None,
    ) -> None:
        self.settings = settings
        self.places = Places(source)
        self.client = client or EachlabsClient(settings)
        self.watcher = Watcher(self.client, self.places)
        self._source = source
        self._store_for = store_for
        self._purchaser = Purchaser(self.client, self.places, self.watcher, settings)
        self._finisher = Finisher(downloader or Downloader())
        self._books: dict[tuple[Destination, S3Access | None], Books] = {}
        self._running: dict[tuple[int, str], Running] = {}
        self._bought: OrderedDict[str, Bought] = OrderedDict()
        self._late: set[asyncio.Task[None]] = set()

    def books(self, destination: Destination, access: S3Access | None = None) -> Books:
        """The ledger of a destination, made once."""
        key = (destination, access)
        if key not in self._books:
            conditional = self.settings.conditional_writes == "require"
            ledger = Ledger(self._store_for(destination, access), destination, conditional=conditional)
            settler = Settler(self.client, self.places, ledger, self.settings, known=self._known)
            self._books[key] = Books(ledger, settler)
        return self._books[key]

    def _known(self) -> Mapping[str, float]:
        now = asyncio.get_running_loop().time()
        return {prediction_id: now - bought.at for prediction_id, bought in self._bought.items()}

    def _remember(self, job: Job, books: Books | None, item_id: str) -> None:
        if job.prediction_id is not None and job.prediction_id not in self._bought:
            now = asyncio.get_running_loop().time()
            self._bought[job.prediction_id] = Bought(now, books, item_id, job.run_id)
            while len(self._bought) > REMEMBERED_PURCHASES:
                self._bought.popitem(last=False)

    # The composite: from an item to its stored picture.

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
        books = self.books(destination, access)
        key = (id(books), item.item_id)
        running = self._running.get(key)
        if running is None or running.task.done() or running.fingerprint != item.fingerprint:
            job = Job(options.run_id)
            task = asyncio.ensure_future(self._obtain(item, books, options, job))
            running = self._running[key] = Running(job, item.fingerprint, task)
            started = running

            def forget(_: asyncio.Task[StoredImage]) -> None:
                if self._running.get(key) is started:
                    del self._running[key]

            task.add_done_callback(forget)
        running.callers += 1
        try:
            return await asyncio.shield(running.task)
        except asyncio.CancelledError:
            if running.callers == 1:
                await self._interrupt(running.task, running.job, books, item.item_id)
            raise
        finally:
            running.callers -= 1

    async def _obtain(self, item: Item, books: Books, options: PurchaseOptions, job: Job) -> StoredImage:
        ledger = books.ledger
        again = options
        while True:
            held = await ledger.read(item.item_id)
            step = next_step(held, item, again, claim_seconds=self.settings.claim_seconds)
            try:
                if step is Step.LOOK_AGAIN:
                    await asyncio.sleep(min(LOOK_AGAIN_SECONDS, self.settings.claim_seconds / 4))
                    continue
                if step is Step.REUSE and held is not None and await self._is_there(ledger, held, options):
                    return stored_image(held.record, reused=True)
                if step is Step.FINISH and held is not None:
                    bought, found_cancelled = False, held.record.cancel_requested
                    recovered = await self._finisher.recover(ledger, held)
                    if recovered is not None:
                        return stored_image(recovered.record, reused=True)
                else:
                    held = await self._purchaser.buy(item, ledger, books.settler, held, again, job)
                    self._remember(job, books, item.item_id)
                    bought, found_cancelled = True, False
                if held.record.state is not RecordState.CREATED:
                    continue
                done, end = await self._finish(books, held, options, fresh=bought)
            except Overtaken:
                continue
            except DownloadFailed as error:
                gone = error.status_code in (403, 404, 410)
                if not (gone and options.rebuy_missing and held is not None):
                    raise
                lost = amended(held.record, state=RecordState.FAILED)
                await ledger.write(lost, replacing=held)
                again = replace(options, retry_failed=True, rebuy_missing=False)
                options = again
                continue
            if done.record.state is RecordState.STORED:
                return stored_image(done.record, reused=not bought)
            if done.record.state is RecordState.CANCELLED and found_cancelled:
                again = options
                continue
            if _may_be_resubmitted(end, done):
                logger.info("Item %s: prediction %s failed and may be resubmitted.", item.item_id, end.id)
                again = replace(options, retry_failed=True)
                continue
            end.model_copy(update={"item_id": item.item_id}).raise_for_end()
            raise PredictionFailed(
                f"The item stands as {done.record.state.value}.", item_id=item.item_id, prediction_id=end.id
            )

    async def _is_there(self, ledger: Ledger, held: Held, options: PurchaseOptions) -> bool:
        """Whether a stored picture still is in the bucket; False: it is to be bought again, on purpose."""
        if await self._finisher.find(ledger, held.record) is not None:
            return True
        if options.rebuy_missing:
            return False
        raise PictureMissing(
            f"{held.record.uri} was stored and is gone from the bucket. Restore it, or buy it again on purpose "
            "(--rebuy-missing, rebuy_missing=True).",
            item_id=held.record.item_id,
            prediction_id=held.record.prediction_id,
        )

    async def _finish(
        self, books: Books, held: Held, options: PurchaseOptions, *, fresh: bool
    ) -> tuple[Held, Prediction]:
        """Waits for the record's prediction and stores it; when its deadline passes, goes on in the background."""
        prediction = held.record.prediction()
        assert prediction is not None
        future = self.watcher.watch(prediction, place=None)
        try:
            end = await self._end_within(future, prediction, options.deadline_seconds)
        except PredictionTimedOut:
            self._keep(self._finish_late(books, held, future))
            raise
        return await self._finisher.finish(books.ledger, held, end, fresh=fresh), end

    async def _finish_late(self, books: Books, held: Held, future: asyncio.Future[Prediction]) -> None:
        """It is paid for: as long as the process lives, it is stored when it ends."""
        try:
            end = await asyncio.shield(future)
            await self._finisher.finish(books.ledger, held, end, fresh=False)
            logger.info("Item %s: its prediction ended after its deadline and is stored.", held.record.item_id)
        except (EachlabsError, Overtaken) as error:
            logger.warning("Item %s: %s", held.record.item_id, error)

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._late.add(task)
        task.add_done_callback(self._late.discard)

    async def _end_within(
        self, future: asyncio.Future[Prediction], prediction: Prediction, deadline_seconds: float | None
    ) -> Prediction:
        deadline_seconds = self.settings.deadline_seconds if deadline_seconds is None else deadline_seconds
        age_seconds = 0.0
        if prediction.created_at is not None:
            age_seconds = max(0.0, (datetime.now(timezone.utc) - prediction.created_at).total_seconds())
        remaining = max(deadline_seconds - age_seconds, min(LAST_WAIT_SECONDS, deadline_seconds))
        try:
            return await asyncio.wait_for(asyncio.shield(future), timeout=remaining)
        except asyncio.TimeoutError:
            raise PredictionTimedOut(
                f"The prediction had not ended {deadline_seconds:g} s after its POST. It is paid for if it still ends: "
                "run the same again (or `prefect-eachlabs settle`) and it is stored.",
                item_id=prediction.item_id,
                prediction_id=prediction.id,
            ) from None

    # The steps one by one.

    async def create(
        self,
        item: Item,
        destination: Destination | None = None,
        *,
        options: PurchaseOptions,
        access: S3Access | None = None,
    ) -> Prediction:
        """Buys the item's prediction, or finds the one its record names. **Costs money.**

        Without a destination there is no record, and each call buys.
        """
        books = None if destination is None else self.books(destination, access)
        job = Job(options.run_id)
        task = asyncio.ensure_future(self._create(item, books, options, job))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            await self._interrupt(task, job, books, item.item_id)
            raise

    async def _create(self, item: Item, books: Books | None, options: PurchaseOptions, job: Job) -> Prediction:
        if books is None:
            prediction = await self._purchaser.buy_bare(item, job)
            self._remember(job, None, item.item_id)
            return prediction
        while True:
            held = await books.ledger.read(item.item_id)
            step = next_step(held, item, options, claim_seconds=self.settings.claim_seconds)
            if step is Step.LOOK_AGAIN:
                await asyncio.sleep(min(LOOK_AGAIN_SECONDS, self.settings.claim_seconds / 4))
                continue
            if step is Step.REUSE and held is not None:
                there = await self._finisher.find(books.ledger, held.record) is not None
                if there or not options.rebuy_missing:
                    return self._stored_prediction(held, books)
            if step is Step.FINISH and held is not None:
                return _named(held, books)
            try:
                held = await self._purchaser.buy(item, books.ledger, books.settler, held, options, job)
            except Overtaken:
                continue
            self._remember(job, books, item.item_id)
            if held.record.state is RecordState.CREATED:
                return _named(held, books)

    def _stored_prediction(self, held: Held, books: Books) -> Prediction:
        stored = {
            "status": PredictionStatus.SUCCEEDED,
            "status_word": "stored",
            "output_urls": (held.record.uri or "",),
            "cost_usd": held.record.cost_usd,
        }
        return _named(held, books).model_copy(update=stored)

    async def wait(self, prediction: Prediction | str, *, deadline_seconds: float | None = None) -> Prediction:
        """The prediction at its end, with its pictures' URLs. Free.

        Raises:
            PredictionTimedOut: Not ended by its deadline, counted from the POST (from now, for a bare id).
            PredictionFailed, PredictionCancelled: It ended otherwise.
            Rejected: The API does not know it.
        """
        if isinstance(prediction, str):
            prediction = Prediction(id=prediction)
        if prediction.status.ended:
            return prediction.raise_for_end()
        future = self.watcher.watch(prediction, place=None)
        bought = self._bought.get(prediction.id) or self._bought_under_a_record(prediction)
        try:
            end = await self._end_within(future, prediction, deadline_seconds)
        except asyncio.CancelledError:
            if prediction.id in self._bought:
                await self._cancel_and_note(prediction.id, bought)
            raise
        ours = ("item_id", "created_at", "destination", "model", "version", "input")
        end = end.model_copy(update={name: value for name in ours if (value := getattr(prediction, name)) is not None})
        try:
            return end.raise_for_end()
        except EachlabsError:
            # Nobody will store it, so its record is closed here.
            await self._note_end(end, bought)
            raise

    def _bought_under_a_record(self, prediction: Prediction) -> Bought:
        if prediction.destination is None:
            return Bought(0.0)
        return Bought(0.0, self.books(Destination.parse(prediction.destination)), prediction.item_id)

    async def _note_end(self, end: Prediction, bought: Bought) -> None:
        if bought.books is None or bought.item_id is None:
            return
        ledger = bought.books.ledger
        try:
            held = await ledger.read(bought.item_id)
            if held is not None and held.record.state is RecordState.CREATED and held.record.prediction_id == end.id:
                await self._finisher.finish(ledger, held, end, fresh=False)
        except (EachlabsError, Overtaken) as error:
            logger.warning("Item %s: its end could not be written down: %s", bought.item_id, error)

    async def store(
        self, prediction: Prediction, destination: Destination, *, access: S3Access | None = None
    ) -> StoredImage:
        """Downloads, verifies and uploads a finished prediction's pictures; its record, if it has one, says so then.

        Raises:
            NotYetSafe: The picture is paid for and could not be stored: run again.
            BadInput: The prediction has not ended.
            ItemConflict: The item's record names another prediction.
        """
        if not prediction.status.ended:
            raise BadInput("store_image wants a finished prediction: await it first.", prediction_id=prediction.id)
        books = self.books(destination, access)
        if prediction.item_id is None:
            return await self._finisher.store_bare(books.ledger.store, destination, prediction)
        while True:
            held = await books.ledger.read(prediction.item_id)
            if held is None:
                return await self._finisher.store_bare(books.ledger.store, destination, prediction)
            if held.record.prediction_id != prediction.id:
                raise ItemConflict(
                    f"{destination} holds a record of item {prediction.item_id!r} that names another prediction "
                    f"({held.record.prediction_id}): choose another item id or destination.",
                    item_id=prediction.item_id,
                    prediction_id=prediction.id,
                )
            if held.record.state is RecordState.STORED:
                if await self._finisher.find(books.ledger, held.record) is not None:
                    return stored_image(held.record, reused=True)
                if not any(url.startswith("http") for url in prediction.output_urls):
                    raise PictureMissing(
                        f"{held.record.uri} was stored and is gone from the bucket.", item_id=prediction.item_id
                    )
            try:
                done = await self._finisher.finish(books.ledger, held, prediction, fresh=False)
            except Overtaken:
                continue
            if done.record.state is RecordState.STORED:
                return stored_image(done.record, reused=False)
            prediction.raise_for_end()

    async def cancel(self, prediction_id: str) -> Prediction:
        """Asks the API to cancel, best effort, and returns what GET says then (it may have succeeded). Free."""
        await self._ask_to_cancel(prediction_id)
        self.watcher.watch(Prediction(id=prediction_id), place=None)
        self.watcher.hurry(prediction_id)
        future = self.watcher.watch(Prediction(id=prediction_id), place=None)
        with suppress(asyncio.TimeoutError):
            return await asyncio.wait_for(asyncio.shield(future), timeout=CLEAN_UP_SECONDS)
        return await self._ask_once(prediction_id)

    async def _ask_once(self, prediction_id: str) -> Prediction:
        request = await self.places.take_request(question=True)
        try:
            return await self.client.get(prediction_id)
        finally:
            request.done()

    async def _ask_to_cancel(self, prediction_id: str) -> None:
        for attempt in range(3):
            request = await self.places.take_request(question=True)
            try:
                await self.client.cancel(prediction_id)
                return
            except (Unanswered, NotSent, Throttled) as error:
                if attempt == 2:
                    raise
                logger.info("Cancelling prediction %s: %s", prediction_id, error)
                await asyncio.sleep(0.5)
            finally:
                request.done()

    # When a run is cancelled.

    async def _interrupt(
        self, task: asyncio.Task[StoredImage] | asyncio.Task[Prediction], job: Job, books: Books | None, item_id: str
    ) -> None:
        """Ends a job whose callers are gone: never between its claim and its note; what it bought is cancelled."""
        await job.may_be_interrupted.wait()
        if not task.done():
            task.cancel()
            await asyncio.wait({task})
        if job.prediction_id is not None:
            self._remember(job, books, item_id)
            await self._cancel_and_note(job.prediction_id, self._bought[job.prediction_id])

    async def _cancel_and_note(self, prediction_id: str, bought: Bought) -> None:
        """Cancels what a cancelled run has in flight, looks again and writes down the truth; a success is stored."""
        try:
            ledger = bought.books.ledger if bought.books is not None else None
            held = await ledger.read(bought.item_id) if ledger is not None and bought.item_id else None
            mine = (
                held is not None
                and held.record.state is RecordState.CREATED
                and held.record.prediction_id == prediction_id
                and held.record.run_id == bought.run_id
            )
            if held is not None and not mine:
                return
            if ledger is not None and held is not None:
                held = await ledger.write(amended(held.record, cancel_requested=True), replacing=held)
            end = await self.cancel(prediction_id)
            logger.info("Prediction %s was cancelled with its run; it ended as %s.", prediction_id, end.status.value)
            if ledger is not None and held is not None and end.status.ended:
                await self._finisher.finish(ledger, held, end, fresh=False)
        except (EachlabsError, Overtaken) as error:
            logger.warning("Prediction %s could not be cancelled cleanly: %s", prediction_id, error)

    async def aclose(self) -> None:
        """Ends cleanly: jobs are interrupted where they may be, connections closed, leased places given back."""
        tasks: list[asyncio.Future[object]] = []
        for running in list(self._running.values()):
            await running.job.may_be_interrupted.wait()
            running.task.cancel()
            tasks.append(running.task)  # type: ignore[arg-type]  # only waited for
        for late in list(self._late):
            late.cancel()
            tasks.append(late)  # type: ignore[arg-type]  # only waited for
        await asyncio.gather(*tasks, return_exceptions=True)
        for books in self._books.values():
            await books.settler.aclose()
        await self.watcher.close()
        await self.client.aclose()
        await self._finisher.aclose()
        await self._source.close()


def _may_be_resubmitted(end: Prediction, done: Held) -> bool:
    """A failure that the API calls retryable is bought again twice, one of the provider's once; both cost nothing."""
    if end.failure is None or not end.failure.may_be_resubmitted:
        return False
    return done.record.resubmissions < (MOST_RESUBMISSIONS if end.failure.retryable else 1)


def _named(held: Held, books: Books) -> Prediction:
    """The prediction that a record names, with where the record is."""
    prediction = held.record.prediction()
    assert prediction is not None, "a created or stored record names its prediction"
    return prediction.model_copy(update={"destination": str(books.ledger.destination)})
