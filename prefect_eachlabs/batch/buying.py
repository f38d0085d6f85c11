"""From a row to its outcome: through the engine, within the budget, and repeated where it may be."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

from prefect_eachlabs.batch.budget import Budget
from prefect_eachlabs.batch.outcomes import Outcome, not_there, stored
from prefect_eachlabs.batch.source import Wanted
from prefect_eachlabs.engine.engine import Engine
from prefect_eachlabs.errors import (
    EachlabsError,
    InsufficientBalance,
    PredictionCancelled,
    PredictionFailed,
    Rejected,
    SetupError,
    Skipped,
)
from prefect_eachlabs.ledger.rules import PurchaseOptions
from prefect_eachlabs.models import Destination, Execution, Item, Prediction, StoredImage
from prefect_eachlabs.retry import retry_while_retryable
from prefect_eachlabs.storage.s3_client import S3Access

logger = logging.getLogger(__name__)

FIRST_ALONE_SECONDS = 2.0
"""The first item goes ahead so long: a wrong key is met once, not by everything that is in the air."""
ATTEMPTS = 5
EXECUTIONS_A_PAGE = 100


class Buyer(Protocol):
    """Where pictures are bought: the engine, seen from here."""

    async def generate_and_store(
        self, item: Item, destination: Destination, *, options: PurchaseOptions, access: S3Access | None = None
    ) -> StoredImage: ...

    async def ask(self, prediction_id: str) -> Prediction: ...

    async def executions(self, offset: int) -> tuple[Execution, ...]: ...


class EngineBuyer:
    """The real one; its questions take request places as all others do."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.generate_and_store = engine.generate_and_store

    async def ask(self, prediction_id: str) -> Prediction:
        request = await self._engine.account.limiter.take_request(question=True)
        try:
            return await self._engine.account.client.get(prediction_id)
        finally:
            request.done()

    async def executions(self, offset: int) -> tuple[Execution, ...]:
        request = await self._engine.account.limiter.take_request(question=True)
        try:
            return await self._engine.account.client.executions(limit=EXECUTIONS_A_PAGE, offset=offset)
        finally:
            request.done()


class Buying:
    """Obtains rows, several at a time.

    Args:
        shop: Buys and stores a picture.
        destination: Where pictures go.
        access: How to get in there.
        options: What may be done for an item; the budget among them.
        budget: The same budget.
    """

    def __init__(
        self, buyer: Buyer, destination: Destination, access: S3Access | None, options: PurchaseOptions, budget: Budget
    ) -> None:
        self._buyer = buyer
        self._destination = destination
        self._access = access
        self.options = options
        self._budget = budget
        self._first_alone: asyncio.Event | None = None
        self.in_the_air = 0
        self.stopped_by: EachlabsError | None = None
        budget.ask_price = self._ask_price

    async def obtain(self, wanted: Wanted) -> Outcome:
        """The row's picture, safe in the bucket, or why not; raises nothing but a cancel. **Costs money.**"""
        self.in_the_air += 1
        try:
            goes_ahead = await self._let_the_first_go_ahead()
            try:
                return await self._obtained(wanted)
            finally:
                goes_ahead()
        finally:
            self.in_the_air -= 1

    async def _let_the_first_go_ahead(self) -> Callable[[], None]:
        """Waits until the first item has ended, or a moment. Returns what to call at one's own end."""
        if self._first_alone is not None:
            await self._first_alone.wait()
            return lambda: None
        first_alone = self._first_alone = asyncio.Event()
        asyncio.get_running_loop().call_later(FIRST_ALONE_SECONDS, first_alone.set)
        return first_alone.set

    async def _obtained(self, wanted: Wanted) -> Outcome:
        began = asyncio.get_running_loop().time()
        image: StoredImage | None = None
        error: EachlabsError | None = None
        try:
            self._budget.check()
            image = await retry_while_retryable(lambda: self._buy(wanted.item), attempts=ATTEMPTS)
        except InsufficientBalance as caught:
            # The others that stood in line with it were not asked for either.
            error = caught if self.stopped_by is None else _not_tried(self.stopped_by)
            self._stop_where_going_on_is_vain(caught)
        except EachlabsError as caught:
            error = caught
            self._stop_where_going_on_is_vain(caught)
        except Exception as caught:
            logger.exception("Row %d, item %s: unexpected.", wanted.line, wanted.item.item_id)
            error = EachlabsError(f"Unexpected {type(caught).__name__}: {str(caught)[:300]}", kind="unexpected")
        seconds = asyncio.get_running_loop().time() - began
        cost_usd = await self._account_for(wanted.item, image, error)
        if image is not None:
            image = image.model_copy(update={"cost_usd": cost_usd})
            return stored(wanted, image, seconds=seconds, run_id=self.options.run_id)
        assert error is not None, "no picture without an error"
        return not_there(wanted, error, seconds=seconds)

    async def _buy(self, item: Item) -> StoredImage:
        return await self._buyer.generate_and_store(item, self._destination, options=self.options, access=self._access)

    def _stop_where_going_on_is_vain(self, error: EachlabsError) -> None:
        """A wrong key, a missing bucket, an empty balance: the next item would meet the same."""
        if isinstance(error, (SetupError, InsufficientBalance)) and self.stopped_by is None:
            self.stopped_by = error
            logger.error("The batch stops: %s", error)
            self._budget.stop(_not_tried(error))

    async def _account_for(self, item: Item, image: StoredImage | None, error: EachlabsError | None) -> float | None:
        """Tells the budget what the item has cost; returns it."""
        if image is not None:
            return await self._budget.ended(
                item, prediction_id=image.prediction_id, cost_usd=image.cost_usd, bought=not image.reused
            )
        costs_nothing = isinstance(error, (PredictionFailed, PredictionCancelled, Rejected, Skipped))
        may_cost = error is not None and error.prediction_id is not None and not costs_nothing
        return await self._budget.ended(item, prediction_id=None, cost_usd=None, bought=may_cost)

    async def _ask_price(self, prediction_id: str) -> float | None:
        try:
            return (await self._buyer.ask(prediction_id)).cost_usd
        except EachlabsError as error:
            logger.info("The price of prediction %s is not known yet: %s", prediction_id, error)
            return None


def _not_tried(why: EachlabsError) -> Skipped:
    return Skipped(f"Not tried: {why.message}", kind=f"not tried: {why.kind}")
