"""A run's money: what it has ordered, what that cost, and whether one more order is covered.

What counts is what was ordered, not what became of it. An order counts from the answer to its POST on, with its
expected price until the API tells its cost, and for as long as nobody tells: so neither a failing download, nor a lost
answer, nor a restart of the run makes it spend more than its budget.

The first picture of each model is bought alone, until its cost is told (for a minute at most, where a price was
learned before): prices may have changed. Where nobody knows a price at all, nothing is ordered after the first picture
until its cost is told, whatever the model, and the budget can be exceeded by that one.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from prefect_eachlabs.errors import EachlabsError, OutputMissing, PredictionCancelled, PredictionFailed, Skipped
from prefect_eachlabs.models import Item, StoredImage

if TYPE_CHECKING:  # the buyer's module imports this one
    from prefect_eachlabs.batch.buying import EngineBuyer

logger = logging.getLogger(__name__)

ROUNDING_USD = 1e-9
"""Sums of floating-point dollars are off by this much."""
PRICE_PAUSES_SECONDS = (2.0, 5.0, 10.0, 20.0, 30.0)


@dataclass(eq=False)
class Order:
    """One POST of this run, or the leave to make one.

    Attributes:
        model: What was ordered.
        is_sent: It may have bought; False: it was approved, and nothing was sent.
        prediction_id: What it bought; None: nobody knows, or nothing.
        cost_usd: What the API has billed for it; None: not told yet.
    """

    model: str
    is_sent: bool = False
    prediction_id: str | None = None
    cost_usd: float | None = None


@dataclass
class _Price:
    """What is known about a model's price.

    Attributes:
        count, sum_usd: Pictures whose cost was told, by earlier reports, the account's executions, or this run.
        highest_usd: The highest that this run was told; None: it was told none yet.
        learner: The item that is bought alone now.
        is_confirmed: Several may be bought at a time.
        is_kept_secret: Nobody tells it, so no budget can be kept.
        is_looked_up: The account's executions were asked.
    """

    count: int = 0
    sum_usd: float = 0.0
    highest_usd: float | None = None
    learner: str | None = None
    is_confirmed: bool = False
    is_kept_secret: bool = False
    is_looked_up: bool = False

    @property
    def mean_usd(self) -> float | None:
        return self.sum_usd / self.count if self.count else None

    @property
    def expected_usd(self) -> float | None:
        return self.mean_usd if self.highest_usd is None else self.highest_usd

    def learn(self, cost_usd: float, count: int = 1) -> None:
        self.count += count
        self.sum_usd += cost_usd * count


@dataclass
class ModelSpending:
    """What this run has bought of one model: the pictures whose cost was told, and that cost."""

    pictures: int = 0
    cost_usd: float = 0.0


class ModelPrice(NamedTuple):
    """What a picture of a model costs.

    Attributes:
        mean_usd: The mean of what was told.
        pictures: Of so many.
        told_by: The last `report`, or the account's `executions`.
    """

    mean_usd: float
    pictures: int
    told_by: Literal["report", "executions"]


class Budget:
    """What this run has spent, and what it may still buy.

    Args:
        budget_usd: At most so much in this run; None: no budget.
        prices: Tells costs.
        ours: The runs whose purchases are this one's.
    """

    def __init__(self, budget_usd: float | None, prices: EngineBuyer, *, ours: frozenset[str] = frozenset()) -> None:
        self.budget_usd = budget_usd
        self.ours = ours
        self.by_model: dict[str, ModelSpending] = defaultdict(ModelSpending)
        self.stopped: Skipped | None = None
        self._refused: dict[str, Skipped] = {}
        self._prices_told_by = prices
        self._prices: dict[str, _Price] = defaultdict(_Price)
        self._orders: dict[str, list[Order]] = {}
        """Of items in progress, and of those that ended with something unknown."""
        self._in_progress: set[str] = set()
        self._waiting: set[str] = set()
        self._set_aside: Counter[str] = Counter()
        """Model → orders whose cost is not told: approved, in flight, lost, or stored and not settled."""
        self._stored_untold: Counter[str] = Counter()
        """Those of them whose picture is stored: their rows are on disk, a hundred thousand would fill the memory."""
        self._change = asyncio.Event()
        self._looking = asyncio.Lock()

    # What is known.

    @property
    def spent_usd(self) -> float:
        """What the API has billed to this run, as far as it has told."""
        return sum(spending.cost_usd for spending in self.by_model.values())

    @property
    def committed_usd(self) -> float:
        """The same, with what is not told yet at its expected price."""
        return self.spent_usd + sum(
            count * (self._prices[model].expected_usd or 0.0) for model, count in self._set_aside.items()
        )

    @property
    def untold(self) -> int:
        """Orders of this run whose cost the API has not told: lost ones, those in flight, those not settled yet."""
        return self._stored_untold.total() + self._untold_orders().total()

    @property
    def untold_usd(self) -> float | None:
        """What those come to at their expected prices; None: nobody knows a price."""
        counts = Counter(self._stored_untold)
        counts.update(self._untold_orders())
        prices = {model: self._prices[model].expected_usd for model, count in counts.items() if count}
        if None in prices.values():
            return None
        return sum(counts[model] * (price or 0.0) for model, price in prices.items())

    def _all_orders(self) -> list[Order]:
        return [order for orders in self._orders.values() for order in orders]

    def _untold_orders(self) -> Counter[str]:
        """Model → orders in progress that were sent and whose cost is not told."""
        return Counter(order.model for order in self._all_orders() if order.is_sent and order.cost_usd is None)

    def price_of(self, model: str) -> ModelPrice | None:
        """What a picture of the model costs on average, from how many, and who told; None: nobody knows yet."""
        price = self._prices[model]
        if price.mean_usd is None:
            return None
        return ModelPrice(price.mean_usd, price.count, "executions" if price.is_looked_up else "report")

    def is_exhausted(self, model: str) -> bool:
        """Whether the budget buys no further picture of this model, whatever becomes of what is in flight."""
        if self.budget_usd is None or any(self._orders.get(item_id) for item_id in self._in_progress):
            return False
        free_usd = self.budget_usd - self.committed_usd
        expected_usd = self._prices[model].expected_usd
        return free_usd <= ROUNDING_USD if expected_usd is None else free_usd + ROUNDING_USD < expected_usd

    # What was known before.

    def learn(self, model: str, cost_usd: float, *, count: int = 1) -> None:
        """A price that an earlier report tells: the mean of `count` pictures."""
        self._prices[model].learn(cost_usd, count)

    def resume(self, model: str, *, told: int, cost_usd: float, highest_usd: float | None, untold: int) -> None:
        """What this very run has bought before, as its report says: pictures that are stored."""
        spending, price = self.by_model[model], self._prices[model]
        spending.pictures += told
        spending.cost_usd += cost_usd
        if highest_usd:
            price.highest_usd = max(price.highest_usd or 0.0, highest_usd)
            price.is_confirmed = True
        self._stored_untold[model] += untold
        self._set_aside[model] += untold

    def resume_order(self, item_id: str, order: Order) -> None:
        """An order of this very run that `resume` has not counted; one that is known already only learns from it."""
        cost_usd, order.cost_usd = order.cost_usd, None
        known = self._orders.setdefault(item_id, [])
        same = next((one for one in known if one.prediction_id in (order.prediction_id, None)), None)
        if same is None:
            known.append(order)
            self._set_aside[order.model] += 1
            same = order
        same.prediction_id = same.prediction_id or order.prediction_id
        if cost_usd is not None and same.cost_usd is None:
            self._tell(same, cost_usd)

    def ask_again(self, item_id: str, order: Order) -> None:
        """A picture that `resume` has counted is obtained again: its order is known, so that it counts once."""
        if order.cost_usd is None:
            self._stored_untold[order.model] -= 1
        self._orders.setdefault(item_id, []).append(order)

    async def look_up(self, model: str) -> None:
        """Asks the account's executions what a model costs, once, where nobody knows. Free: one request."""
        price = self._prices[model]
        async with self._looking:
            if price.is_looked_up or price.expected_usd is not None:
                return
            price.is_looked_up = True
            for cost_usd in await self._past_costs(model):
                price.learn(cost_usd)

    # While it runs.

    def stop(self, why: Skipped) -> None:
        """From now on nothing is bought; what is in flight goes on to its end."""
        self.stopped = self.stopped or why
        self._changed()

    def refuse(self, model: str, why: Skipped) -> None:
        """From now on nothing of this model is bought."""
        self._refused[model] = why
        self._changed()

    def check(self, item: Item | None = None) -> None:
        """The last look before a POST. Raises Skipped when nothing may be bought any more, or nothing of its model."""
        why = self.stopped or (None if item is None else self._refused.get(item.model))
        if why is not None:
            raise Skipped(why.message, kind=why.kind)

    def begin(self, item_id: str) -> None:
        """An item is in progress until `ended`."""
        self._in_progress.add(item_id)

    async def approve(self, item: Item) -> None:
        """Sets the item's expected price aside; waits while what is in flight may still turn out to cost nothing.

        Raises:
            Skipped: The budget does not cover it, or the run was stopped.
        """
        orders = self._orders.setdefault(item.item_id, [])
        self.check(item)
        if any(not order.is_sent for order in orders):
            return
        lost = next((order for order in orders if order.prediction_id is None), None)
        if lost is not None:
            # Who orders again has found out, or says, that it bought nothing.
            lost.is_sent = False
            return
        if self.budget_usd is not None:
            for order in orders:
                await self._ask_for(order)
            await self.look_up(item.model)
        try:
            while not (self.budget_usd is None or self._may_have(item, self.budget_usd)):
                if item.item_id not in self._waiting:
                    self._waiting.add(item.item_id)
                    self._changed()  # others may have waited for this one
                self._change.clear()
                await self._change.wait()
                self.check(item)
        finally:
            self._waiting.discard(item.item_id)
        orders.append(Order(item.model))
        self._set_aside[item.model] += 1

    def _may_have(self, item: Item, budget_usd: float) -> bool:
        """Whether the item may be ordered; False: wait and see."""
        price = self._prices[item.model]
        if price.is_kept_secret:
            raise Skipped(
                f"The vendor does not tell what {item.model} costs, so that a budget cannot be kept: run without one.",
                item_id=item.item_id,
                kind="price unknown",
            )
        if not price.is_confirmed and price.learner not in (None, item.item_id):
            return False
        in_flight = any(self._orders.get(item_id) for item_id in self._in_progress - self._waiting - {item.item_id})
        expected_usd = price.expected_usd
        # Of what was ordered and may have cost anything: nobody knows a price.
        ordered = (self._prices[model] for model, count in self._set_aside.items() if count)
        unpriced = [one for one in ordered if one.expected_usd is None]
        if in_flight and any(expected_usd is None or not one.is_kept_secret for one in unpriced):
            return False
        if unpriced and expected_usd is None:
            raise Skipped(
                f"Nobody tells what an earlier order of this run has cost, nor what {item.model} costs, so that a "
                "budget cannot be kept: run without one, or again later.",
                item_id=item.item_id,
                kind="price unknown",
            )
        free_usd = budget_usd - self.committed_usd
        if free_usd + ROUNDING_USD < (expected_usd or 0.0) or (expected_usd is None and free_usd <= ROUNDING_USD):
            if in_flight:
                return False
            raise Skipped(
                f"Left out: the budget of {budget_usd:g} USD does not cover it ({self.committed_usd:.4f} USD are "
                "spent or set aside).",
                item_id=item.item_id,
                kind="budget",
            )
        if not price.is_confirmed:
            price.learner = item.item_id
            if expected_usd is None:
                logger.warning(
                    "Nobody knows yet what a picture of %s costs: the first is bought alone, and the budget of %g USD "
                    "can be exceeded by its price.",
                    item.model,
                    budget_usd,
                )
        return True

    def ordered(self, item: Item, prediction_id: str | None) -> None:
        """A POST of this run bought this prediction; None: its answer was lost, and it may have bought."""
        orders = self._orders.setdefault(item.item_id, [])
        if prediction_id is not None and any(order.prediction_id == prediction_id for order in orders):
            return
        order = next((order for order in orders if order.prediction_id is None), None)
        if order is None:
            order = Order(item.model)
            orders.append(order)
            self._set_aside[item.model] += 1
        order.is_sent = True
        order.prediction_id = prediction_id

    def disown(self, item: Item, prediction_id: str) -> None:
        """Another item's order counts for this prediction: what this item's bought is not known any more."""
        for order in self._orders.get(item.item_id, ()):
            if order.prediction_id == prediction_id:
                order.prediction_id = None

    async def ended(
        self, item: Item, image: StoredImage | None, error: EachlabsError | None, *, may_ask: bool = True
    ) -> list[Order]:
        """The item has come to its end; returns what this run has ordered for it.

        Asks for costs (free, a request each) where neither picture nor error tells, and the report's end will not.
        """
        orders = self._orders.setdefault(item.item_id, [])
        for order in [order for order in orders if not order.is_sent]:
            orders.remove(order)
            self._set_aside[order.model] -= 1
        if image is not None and image.bought_by in self.ours:
            self.ordered(item, image.prediction_id)
        for order in orders:
            if order.cost_usd is None and not self._is_told_by(order, image, error) and may_ask:
                await self._ask_for(order)
        if may_ask:
            await self._end_of_learning(item, orders)
        ordered = list(orders)
        if image is not None:
            # Its picture is stored and its row on disk: what is told is counted, its own cost is asked for by row.
            for order in ordered:
                if order.cost_usd is not None or order.prediction_id == image.prediction_id:
                    orders.remove(order)
                    self._stored_untold[order.model] += order.cost_usd is None
        if not orders:
            self._orders.pop(item.item_id, None)
        self._in_progress.discard(item.item_id)
        self._changed()
        return ordered

    def _changed(self) -> None:
        self._change.set()

    def _is_told_by(self, order: Order, image: StoredImage | None, error: EachlabsError | None) -> bool:
        """Whether the item's end tells an order's cost, or the run's end will."""
        if image is not None and image.prediction_id == order.prediction_id:
            if image.cost_usd:
                self._tell(order, image.cost_usd)
            return True
        if error is None or error.prediction_id != order.prediction_id or isinstance(error, OutputMissing):
            return False
        is_free = isinstance(error, (PredictionFailed, PredictionCancelled))
        if is_free and order.prediction_id is not None:
            self._tell(order, 0.0)
        return is_free

    async def _end_of_learning(self, item: Item, orders: Iterable[Order]) -> None:
        price = self._prices[item.model]
        if price.learner != item.item_id:
            return
        unknown = next((order for order in orders if order.cost_usd is None), None)
        if unknown is not None:
            price.is_kept_secret = not await self._find_price(unknown, price)
        if unknown is not None and unknown.cost_usd is None and price.expected_usd is not None:
            logger.warning(
                "What a picture of %s costs now is not told: %g USD is taken, as was told before, and the budget can "
                "be exceeded by what it rose since.",
                item.model,
                price.expected_usd,
            )
            price.is_confirmed = True  # by what was learned before: this one's cost may not be told for hours
        price.learner = None

    async def _find_price(self, order: Order, price: _Price) -> bool:
        """Whether a price is known, the first picture's or one learned before; waits a minute for the first's."""
        was_known = price.expected_usd is not None
        can_be_told = not was_known or order.prediction_id is not None
        for pause_seconds in PRICE_PAUSES_SECONDS if can_be_told else ():
            await asyncio.sleep(pause_seconds)
            if order.prediction_id is not None:
                await self._ask_for(order)
            else:
                for cost_usd in await self._past_costs(order.model):
                    price.learn(cost_usd)
            if order.cost_usd is not None or (price.expected_usd is not None and not was_known):
                return True
        return was_known

    # Costs as they are told.

    def _tell(self, order: Order, cost_usd: float) -> None:
        order.cost_usd = cost_usd
        self._count(order.model, cost_usd)

    def _count(self, model: str, cost_usd: float) -> None:
        self._set_aside[model] -= 1
        if not cost_usd:
            return
        spending, price = self.by_model[model], self._prices[model]
        spending.pictures += 1
        spending.cost_usd += cost_usd
        price.learn(cost_usd)
        price.highest_usd = max(price.highest_usd or 0.0, cost_usd)
        price.is_confirmed = True

    def told(self, item_id: str, model: str, prediction_id: str, cost_usd: float) -> None:
        """The cost of a row's prediction, which had not been settled when the row ended."""
        for order in self._orders.get(item_id, ()):
            if order.prediction_id == prediction_id:
                if order.cost_usd is None:
                    self._tell(order, cost_usd)
                return
        self._stored_untold[model] -= 1
        self._count(model, cost_usd)

    async def ask_for_the_rest(self, most: int) -> None:
        """Asks for what was bought beside a row's own picture, a request each, `most` at most."""
        unknown = [order for order in self._all_orders() if order.cost_usd is None and order.prediction_id is not None]
        for order in unknown[:most]:
            await self._ask_for(order)

    async def _ask_for(self, order: Order) -> None:
        if order.prediction_id is None or order.cost_usd is not None:
            return
        try:
            cost_usd = await self._prices_told_by.cost_of(order.prediction_id)
        except EachlabsError as error:
            logger.info("What prediction %s cost is not known yet: %s", order.prediction_id, error)
            return
        if cost_usd is not None and order.cost_usd is None:
            self._tell(order, cost_usd)

    async def _past_costs(self, model: str) -> list[float]:
        try:
            return await self._prices_told_by.past_costs(model)
        except EachlabsError as error:
            logger.info("What %s costs could not be looked up: %s", model, error)
            return []
