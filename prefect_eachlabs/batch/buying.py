"""From a row to its outcome: through the engine, within the budget, and repeated where it may be."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

from prefect_eachlabs.batch.budget import Budget, Order
from prefect_eachlabs.batch.outcomes import Outcome, not_there, stored
from prefect_eachlabs.batch.report import BatchFolder
from prefect_eachlabs.batch.source import Wanted
from prefect_eachlabs.engine.engine import Engine
from prefect_eachlabs.errors import (
    BadInput,
    EachlabsError,
    FormatNotAllowed,
    InsufficientBalance,
    OutcomeUnknown,
    PredictionCancelled,
    SetupError,
    Skipped,
)
from prefect_eachlabs.images.store import stored_image
from prefect_eachlabs.ledger.records import Ledger, Record, RecordState
from prefect_eachlabs.ledger.rules import PurchaseOptions
from prefect_eachlabs.models import DEFAULT_MODEL, Execution, Item, PredictionStatus, StoredImage
from prefect_eachlabs.retry import retry_while_retryable
from prefect_eachlabs.storage.s3_client import S3Access

logger = logging.getLogger(__name__)

FIRST_ALONE_SECONDS = 2.0
"""The first item goes ahead so long: a wrong key is met once, not by everything that is in progress."""
ATTEMPTS = 5
NOT_ALLOWED_IN_A_ROW = 3
"""So many pictures of a model are paid for and not stored, and those in flight with them, before it is left alone."""
INTERRUPTED = "interrupted"
"""The kind of rows that a Ctrl-C or a cancel has kept from their picture."""
EXECUTIONS_A_PAGE = 100


class EngineBuyer:
    """Where pictures are bought: the engine, seen from here; its questions take request slots as all others do."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._account = engine.account
        self.generate_and_store = engine.generate_and_store
        self.cancel_late = engine.cancel_late
        self.note_cost = engine.note_cost

    async def check(self, items: Sequence[Item]) -> list[BadInput | None]:
        """What the schema of their one model has against items."""
        catalogue, model = self._account.catalogue, items[0].model
        if model != DEFAULT_MODEL and await catalogue.model(model) is None:
            why = await catalogue.why_refused(items[0])
            return [BadInput(f"{why}. Nothing was bought.", item_id=item.item_id) for item in items]
        return await catalogue.faults_of(items)

    @property
    def slots_past_deadline(self) -> int:
        return self._engine.slots_past_deadline

    async def cost_of(self, prediction_id: str) -> float | None:
        """What a prediction has cost, 0.0 when it failed or was cancelled; None while the vendor does not tell."""
        prediction = await self._account.ask_once(prediction_id)
        if prediction.status in (PredictionStatus.FAILED, PredictionStatus.CANCELLED):
            return 0.0
        return prediction.cost_usd or None

    async def past_costs(self, model: str) -> list[float]:
        """What the account's latest predictions of a model have cost, as far as the vendor tells."""
        rows = await self.executions(0, model=model)
        return [row.cost_usd for row in rows if row.cost_usd and row.model == model]

    async def executions(self, offset: int, *, model: str | None = None) -> tuple[Execution, ...]:
        page = partial(self._account.client.executions, limit=EXECUTIONS_A_PAGE, offset=offset, model=model)
        return await self._account.limiter.asked(page)


class Buying:
    """Obtains rows, several at a time, into the bucket of the batch's folder."""

    def __init__(
        self, buyer: EngineBuyer, folder: BatchFolder, access: S3Access | None, options: PurchaseOptions, budget: Budget
    ) -> None:
        self._buyer = buyer
        self._destination = folder.destination
        self._ledger = Ledger(folder.store, folder.destination)
        self._access = access
        self._options = options
        self._budget = budget
        self._first_alone: asyncio.Event | None = None
        self.stopped_by: EachlabsError | None = None
        self._not_allowed: Counter[str] = Counter()
        """Model → pictures in a row whose format is not allowed."""

    async def obtain(self, wanted: Wanted) -> Outcome:
        """The row's picture, safe in the bucket, or why not; raises nothing but a cancel. **Costs money.**"""
        self._budget.begin(wanted.item.item_id)
        if self._first_alone is not None:
            await self._first_alone.wait()
            return await self._obtained(wanted)
        first_alone = self._first_alone = asyncio.Event()
        asyncio.get_running_loop().call_later(FIRST_ALONE_SECONDS, first_alone.set)
        try:
            return await self._obtained(wanted)
        finally:
            first_alone.set()

    async def _obtained(self, wanted: Wanted) -> Outcome:
        began, item = asyncio.get_running_loop().time(), wanted.item
        image: StoredImage | None = None
        error: EachlabsError | None = None
        try:
            self._budget.check()
            buy = partial(self._buyer.generate_and_store, options=self._options, access=self._access)
            image = await retry_while_retryable(lambda: buy(item, self._destination), attempts=ATTEMPTS)
        except InsufficientBalance as caught:
            # The others that stood in line with it were not asked for either.
            error = caught if self.stopped_by is None else _not_tried(self.stopped_by)
            self._stop_where_going_on_is_vain(caught)
        except EachlabsError as caught:
            error = caught
            self._stop_where_going_on_is_vain(caught)
        except Exception as caught:
            logger.exception("Row %d, item %s: unexpected.", wanted.line, item.item_id)
            error = EachlabsError(f"Unexpected {type(caught).__name__}: {str(caught)[:300]}", kind="unexpected")
        seconds = asyncio.get_running_loop().time() - began
        if image is not None:
            self._not_allowed[item.model] = 0
        elif isinstance(error, FormatNotAllowed):
            # A model all of whose pictures are of a format that is not allowed is not ordered any further.
            self._not_allowed[item.model] += 1
            if self._not_allowed[item.model] == NOT_ALLOWED_IN_A_ROW:
                logger.error("No more pictures of %s are ordered: %s", item.model, error)
                self._budget.refuse(item.model, _not_tried(error))
        orders = await self._budget.ended(item, image, error)
        return self._outcome(wanted, image, error, orders, seconds)

    async def looked_at_again(self, wanted: Wanted, outcome: Outcome) -> Outcome:
        """A row that timed out, at the end of its run: whoever saw its prediction's end may have stored it since."""
        try:
            held = await self._ledger.read(wanted.item.item_id)
        except EachlabsError as error:
            logger.info("Row %d: its record cannot be read: %s", wanted.line, error)
            return outcome
        record = None if held is None else held.record
        if record is None or record.state is not RecordState.STORED or record.fingerprint != wanted.item.fingerprint:
            return outcome
        image = stored_image(record, reused=True)
        orders = await self._budget.ended(wanted.item, image, None, may_ask=False)
        return self._outcome(wanted, image, None, orders, outcome.seconds)

    async def interrupted(self, wanted: Wanted) -> Outcome:
        """What has become of a row whose run was interrupted, as its record says."""
        image: StoredImage | None = None
        error: EachlabsError | None = None
        try:
            held = await self._ledger.read(wanted.item.item_id)
        except EachlabsError as caught:
            error = OutcomeUnknown(f"Interrupted, and its record cannot be read: {caught.message}", kind=INTERRUPTED)
        else:
            image, error = _left_by(None if held is None else held.record, wanted.item, self._budget.ours)
        orders = await self._budget.ended(wanted.item, image, error, may_ask=False)
        return self._outcome(wanted, image, error, orders, None)

    def _outcome(
        self,
        wanted: Wanted,
        image: StoredImage | None,
        error: EachlabsError | None,
        orders: Sequence[Order],
        seconds: float | None,
    ) -> Outcome:
        costs = [order.cost_usd for order in orders]
        cost_usd = None if None in costs else sum(cost for cost in costs if cost is not None)
        if image is not None:
            is_ours = image.bought_by in self._budget.ours
            cost_usd = (cost_usd or None) if is_ours else image.cost_usd
            return stored(wanted, image, is_ours=is_ours, cost_usd=cost_usd, seconds=seconds)
        assert error is not None, "no picture without an error"
        bought: dict[str, Any] = {"bought_by": self._options.run_id, "cost_usd": cost_usd} if orders else {}
        prediction_id = orders[-1].prediction_id if orders else None
        return not_there(wanted, error, seconds=seconds, prediction_id=prediction_id, **bought)

    def _stop_where_going_on_is_vain(self, error: EachlabsError) -> None:
        """A wrong key, a missing bucket, an empty balance: the next item would meet the same."""
        if isinstance(error, (SetupError, InsufficientBalance)) and self.stopped_by is None:
            self.stopped_by = error
            logger.error("The batch stops: %s", error)
            self._budget.stop(_not_tried(error))


def _left_by(
    record: Record | None, item: Item, ours: Collection[str]
) -> tuple[StoredImage | None, EachlabsError | None]:
    """The picture of an interrupted row, or why it has none."""
    nothing = Skipped("Interrupted: this run has bought nothing for it.", kind=INTERRUPTED)
    if record is None or record.fingerprint != item.fingerprint or record.bought_by not in ours:
        return None, nothing
    if record.state is RecordState.STORED:
        return stored_image(record, reused=False), None
    if record.state is RecordState.CANCELLED:
        said = "Cancelled with its run; nothing was billed, and the next run buys it."
        return None, PredictionCancelled(said, prediction_id=record.prediction_id)
    if record.state is RecordState.CREATED:
        said = "Interrupted in flight, and the API has not confirmed its cancel: it is paid for if it ends. "
        said += "Run the same again, and it is stored."
        return None, EachlabsError(said, kind=INTERRUPTED, prediction_id=record.prediction_id)
    if record.may_have_bought_unseen:
        said = "Interrupted before its order was answered: it may be paid for. Run the same again to find out."
        return None, OutcomeUnknown(said, kind=INTERRUPTED)
    return None, nothing


def _not_tried(why: EachlabsError) -> Skipped:
    return Skipped(f"Not tried: {why.message}", kind=f"not tried: {why.kind}")
