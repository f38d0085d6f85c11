"""A batch's budget: what a picture costs is learned, and no POST is begun that the budget does not cover.

A model whose price nobody knows yet is bought one at a time until the first is settled. What is in flight counts
with its expected price, so the budget is exceeded at most by what prices rose to while it was in flight.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from prefect_eachlabs.errors import Skipped
from prefect_eachlabs.models import Item

DUST_USD = 1e-9
"""Sums of floating-point dollars are off by this much."""
PRICE_PAUSES_SECONDS = (2.0, 5.0, 10.0, 20.0, 30.0)

AskPrice = Callable[[str], Awaitable[float | None]]
"""What a prediction has cost; 0 or None while the vendor has not settled it."""


@dataclass
class _Price:
    """What is known about a model's price."""

    count: int = 0
    sum_usd: float = 0.0
    learner: str | None = None
    """The item whose purchase is to tell the price; nobody else buys meanwhile."""
    is_told: bool = True

    @property
    def mean_usd(self) -> float | None:
        return self.sum_usd / self.count if self.count else None


@dataclass(eq=False)
class Budget:
    """What this run may buy, by budget and by whatever stops it.

    Attributes:
        budget_usd: At most so much in this run; None: no budget.
        spent_usd: What was bought, unsettled pictures at the mean of their model.
    """

    budget_usd: float | None = None
    spent_usd: float = 0.0
    ask_price: AskPrice | None = None
    _prices: dict[str, _Price] = field(default_factory=lambda: defaultdict(_Price))
    _set_aside: dict[str, float] = field(default_factory=dict)
    _set_aside_usd: float = 0.0
    _change: asyncio.Event = field(default_factory=asyncio.Event)
    _stopped: Skipped | None = None

    def learn(self, model: str, cost_usd: float | None, *, count: int = 1) -> None:
        """A price that was told, now or by an earlier report (the mean of `count` pictures)."""
        if cost_usd:
            price = self._prices[model]
            price.count += count
            price.sum_usd += cost_usd * count

    def mean_usd(self, model: str) -> float | None:
        """The model's learned price; None: nobody knows yet."""
        return self._prices[model].mean_usd

    def is_exhausted(self, model: str) -> bool:
        """Whether the budget buys no further picture of this model, whatever becomes of what is in flight."""
        expected_usd = self.mean_usd(model)
        if self.budget_usd is None or self._set_aside or expected_usd is None:
            return False
        return self.spent_usd + expected_usd > self.budget_usd + DUST_USD

    def stop(self, why: Skipped) -> None:
        """From now on nothing is bought; what is in flight goes on to its end."""
        self._stopped = self._stopped or why
        self._changed()

    @property
    def stopped(self) -> Skipped | None:
        return self._stopped

    def check(self) -> None:
        """The last look before a POST. Raises Skipped when nothing may be bought any more."""
        if self._stopped is not None:
            raise Skipped(self._stopped.message, kind=self._stopped.kind)

    def ordered(self, item: Item, prediction_id: str | None) -> None:
        """A POST of this run bought this prediction, or its answer was lost."""

    async def approve(self, item: Item) -> None:
        """Sets the item's expected price aside; waits while what is in flight may still turn out to cost nothing.

        Raises:
            Skipped: The budget does not cover it, or the run was stopped.
        """
        while True:
            self.check()
            if self.budget_usd is None or item.item_id in self._set_aside or self._may_have(item, self.budget_usd):
                return
            self._change.clear()
            await self._change.wait()

    def _may_have(self, item: Item, budget_usd: float) -> bool:
        """Whether the item's price was set aside; False: wait and see."""
        price = self._prices[item.model]
        if not price.is_told:
            raise Skipped(
                f"The vendor does not tell what {item.model} costs, so that a budget cannot be kept: run without one.",
                item_id=item.item_id,
                kind="price unknown",
            )
        expected_usd = price.mean_usd
        free_usd = budget_usd - self.spent_usd - self._set_aside_usd
        if expected_usd is None and price.learner is not None:
            return False
        if free_usd + DUST_USD < (expected_usd or 0.0) or (expected_usd is None and free_usd <= DUST_USD):
            if self._set_aside:
                return False
            raise Skipped(
                f"Left out: the budget of {budget_usd:g} USD does not cover it ({self.spent_usd:.4f} USD are spent).",
                item_id=item.item_id,
                kind="budget",
            )
        if expected_usd is None:
            price.learner = item.item_id
        self._set_aside[item.item_id] = expected_usd or 0.0
        self._set_aside_usd += expected_usd or 0.0
        return True

    async def ended(
        self, item: Item, *, prediction_id: str | None, cost_usd: float | None, bought: bool
    ) -> float | None:
        """The item's purchase has ended; tells its cost, asked for again when it is the first of its model."""
        if item.item_id not in self._set_aside:
            self.learn(item.model, cost_usd if bought else None)
            self.spent_usd += (cost_usd or 0.0) if bought else 0.0
            return cost_usd
        price = self._prices[item.model]
        if bought and not cost_usd and price.learner == item.item_id and prediction_id is not None:
            cost_usd = await self._ask(prediction_id)
            price.is_told = bool(cost_usd)
        expected_usd = self._set_aside.pop(item.item_id)
        # Sums of differences gather dust: an empty budget begins anew.
        self._set_aside_usd = self._set_aside_usd - expected_usd if self._set_aside else 0.0
        if bought:
            self.learn(item.model, cost_usd)
            self.spent_usd += cost_usd or price.mean_usd or expected_usd
        if price.learner == item.item_id:
            price.learner = None
        self._changed()
        return cost_usd

    async def _ask(self, prediction_id: str) -> float | None:
        for pause_seconds in PRICE_PAUSES_SECONDS if self.ask_price else ():
            await asyncio.sleep(pause_seconds)
            if self.ask_price is not None and (cost_usd := await self.ask_price(prediction_id)):
                return cost_usd
        return None

    def _changed(self) -> None:
        self._change.set()
