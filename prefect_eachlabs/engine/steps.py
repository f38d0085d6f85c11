"""The steps one by one: create, await, store, as the tasks of the same names do them."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Sequence

from prefect_eachlabs.engine.account import Account, Books, named
from prefect_eachlabs.errors import BadInput, EachlabsError, ItemConflict, NotYetSafe, PictureMissing, StoreFailed
from prefect_eachlabs.images.store import stored_image
from prefect_eachlabs.ledger.purchase import Job
from prefect_eachlabs.ledger.records import (
    Ledger,
    Overtaken,
    Record,
    RecordState,
    VersionedRecord,
    amended,
    new_record,
)
from prefect_eachlabs.ledger.rules import PurchaseOptions, Rules, Step
from prefect_eachlabs.models import (
    ITEM_ID_PATTERN,
    Destination,
    Item,
    Prediction,
    PredictionStatus,
    StoredImage,
    fingerprint_of,
)
from prefect_eachlabs.storage.s3_client import S3Access

logger = logging.getLogger(__name__)

LOOK_AGAIN_SECONDS = 2.0


class Steps:
    """Buying, awaiting and storing apart from each other."""

    def __init__(self, account: Account) -> None:
        self._account = account

    async def create(
        self,
        item: Item,
        destination: Destination,
        *,
        options: PurchaseOptions,
        access: S3Access | None = None,
    ) -> Prediction:
        """Buys the item's prediction, or finds the one its record names. **Costs money.**"""
        books = self._account.books(destination, access)
        options = options.begun()
        job = Job(options.run_id)
        task = asyncio.ensure_future(self._create(item, books, options, job))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            await asyncio.shield(self._account.clean_up(self._account.interrupt(task, job, books, item.item_id)))
            raise

    async def _create(self, item: Item, books: Books, options: PurchaseOptions, job: Job) -> Prediction:
        rules = Rules(item, options, claim_seconds=self._account.settings.claim_seconds)
        while True:
            held = await books.ledger.read(item.item_id)
            step = rules.next_step(held, options)
            if step is Step.LOOK_AGAIN:
                await asyncio.sleep(min(LOOK_AGAIN_SECONDS, self._account.settings.claim_seconds / 4))
                continue
            if step is Step.REUSE and held is not None:
                there = await self._account.image_store.find(books.ledger, held.record) is not None
                if there or not options.rebuy_missing:
                    return self._stored_prediction(held, books)
            if step is Step.FINISH and held is not None:
                return named(held, books)
            try:
                await self._account.image_store.check_place(books.ledger, item.item_id, held, options.formats)
                held = await self._account.purchaser.buy(item, books.ledger, books.reconciler, held, options, job)
            except Overtaken:
                continue
            self._account.remember(job, books, item.item_id)
            if held.record.state is RecordState.CREATED:
                return named(held, books)

    def _stored_prediction(self, held: VersionedRecord, books: Books) -> Prediction:
        stored = {
            "status": PredictionStatus.SUCCEEDED,
            "status_word": "stored",
            "output_urls": (held.record.uri or "",),
            "cost_usd": held.record.cost_usd,
        }
        return named(held, books).model_copy(update=stored)

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
        future = self._account.poller.watch(prediction, slot=None)
        bought = self._account.bought_here(prediction.id)
        try:
            end = await self._account.end_within(future, prediction, deadline_seconds)
        except asyncio.CancelledError:
            if bought is not None and bought.run_id == run_id:
                await asyncio.shield(self._account.clean_up(self._account.cancel_and_note(prediction.id, bought)))
            raise
        ours = ("item_id", "created_at", "destination", "model", "version", "input")
        end = end.model_copy(update={name: value for name in ours if (value := getattr(prediction, name)) is not None})
        try:
            return end.raise_for_end()
        except EachlabsError:
            # Nobody will store it, so its record is closed here.
            if bought is not None:
                await self._note_end(bought.books.ledger, bought.item_id, end)
            elif end.destination is not None and end.item_id is not None:
                await self._note_end(self._account.books(Destination.parse(end.destination)).ledger, end.item_id, end)
            raise

    async def _note_end(self, ledger: Ledger, item_id: str, end: Prediction) -> None:
        try:
            held = await ledger.read(item_id)
            if held is not None and held.record.state is RecordState.CREATED and held.record.prediction_id == end.id:
                await self._account.image_store.finish(ledger, held, end, fresh=False)
        except (EachlabsError, Overtaken) as error:
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
        books = self._account.books(destination, access)
        item_id = item_id_of(prediction)
        while True:
            held = await books.ledger.read(item_id)
            if held is None:
                prediction.raise_for_end()
                try:
                    held = await books.ledger.write(record_of(prediction), replacing=None)
                except Overtaken:
                    continue
            if held.record.prediction_id != prediction.id:
                raise ItemConflict(
                    f"{destination} holds a record of item {item_id!r} that names another prediction "
                    f"({held.record.prediction_id}): choose another item id or destination.",
                    item_id=item_id,
                    prediction_id=prediction.id,
                )
            if held.record.state is RecordState.STORED:
                if await self._account.image_store.find(books.ledger, held.record) is not None:
                    return stored_image(held.record, reused=True)
                if not any(url.startswith("http") for url in prediction.output_urls):
                    raise PictureMissing(f"{held.record.uri} was stored and is gone from the bucket.", item_id=item_id)
            try:
                done = await self._account.image_store.finish(
                    books.ledger, held, prediction, fresh=False, formats=formats
                )
            except Overtaken:
                continue
            if done.record.state is RecordState.STORED:
                return stored_image(done.record, reused=False)
            prediction.raise_for_end()


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
