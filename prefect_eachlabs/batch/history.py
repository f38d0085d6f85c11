"""What earlier runs left: their report and a listing settle most rows without a request of their own."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Collection
from dataclasses import replace
from datetime import datetime, timedelta

from prefect_eachlabs.batch.budget import Budget, Order
from prefect_eachlabs.batch.outcomes import THERE, Outcome, RowState, found, not_there
from prefect_eachlabs.batch.report import BatchFolder, EarlierRuns
from prefect_eachlabs.batch.source import Wanted
from prefect_eachlabs.batch.state import Earlier, Scratch
from prefect_eachlabs.errors import EachlabsError, PictureMissing, Skipped, StoreFailed
from prefect_eachlabs.ledger.records import Ledger, Record
from prefect_eachlabs.ledger.rules import PurchaseOptions, Step, next_step
from prefect_eachlabs.retry import retry_while_retryable

logger = logging.getLogger(__name__)

LISTED_AT_A_TIME = 1_000
FEWEST_PAGES = 10
READ_AT_A_TIME = 16
CLOCKS = timedelta(seconds=5)
"""Dates are whole seconds, and the store's machines may disagree."""


class History:
    """The last report and the pictures that are there; the budget learns prices, and what this run has spent before."""

    def __init__(self, folder: BatchFolder, scratch: Scratch, budget: Budget, *, retry_failed: bool) -> None:
        self._folder = folder
        self._ledger = Ledger(folder.store, folder.destination)
        self._scratch = scratch
        self._budget = budget
        self._retry_failed = retry_failed
        self._records_are_known = False
        self.earlier = EarlierRuns()

    async def load(self) -> None:
        """Reads the last report, and lists the pictures where it names some; and what this very run has bought before.

        Raises:
            SetupError: The bucket is missing or refuses us.
            StoreFailed: The bucket does not answer.
        """
        ours = self._budget.ours
        self.earlier = await retry_while_retryable(lambda: self._folder.load_earlier(self._scratch, ours))
        for model, (count, cost_usd) in self.earlier.costs.items():
            self._budget.learn(model, cost_usd / count, count=count)
        if pictures := await self._folder.worker(self._scratch.count_earlier):
            await retry_while_retryable(lambda: self._list_pictures(pictures))
        await self._resume(self.earlier.begun_at)

    async def _resume(self, begun_at: datetime | None) -> None:
        """What this run has bought before it was killed: by its report's parts, and by the records beyond them."""
        ours = self._budget.ours
        for model, told, cost_usd, highest_usd, untold in await self._folder.worker(self._scratch.stored_by, ours):
            self._budget.resume(model, told=told, cost_usd=cost_usd, highest_usd=highest_usd, untold=untold)
        for was in await self._folder.worker(self._scratch.not_stored_by, ours):
            order = Order(was.model or "", True, was.prediction_id, was.cost_usd)
            self._budget.resume_order(was.item_id or "", order)
        if begun_at is None:
            return
        async for several in self._listed("records/", since=begun_at - CLOCKS):
            left = await self._folder.worker(self._scratch.not_told, [item_id for item_id, _ in several], ours)
            for start in range(0, len(left), READ_AT_A_TIME):
                await asyncio.gather(*map(self._resume_record, left[start : start + READ_AT_A_TIME]))

    async def _resume_record(self, item_id: str) -> None:
        try:
            held = await retry_while_retryable(lambda: self._ledger.read(item_id))
        except StoreFailed as error:
            logger.warning("What was bought for item %s is not known: %s", item_id, error)
            return
        order = None if held is None else ordered_by(held.record, self._budget.ours)
        if order is not None:
            self._budget.resume_order(item_id, order)

    async def _list_pictures(self, pictures: int) -> None:
        """Which items have their picture; a prefix that holds many others is not listed for longer than it pays."""
        most = LISTED_AT_A_TIME * max(FEWEST_PAGES, pictures)
        async for several in self._listed("images/", most):
            await self._folder.worker(self._scratch.has_pictures, several)

    async def _listed(
        self, folder: str, most: int | None = None, *, since: datetime | None = None
    ) -> AsyncIterator[list[tuple[str, datetime]]]:
        """Item ids that a listing shows, by the thousand, and since when; only what was written `since` then."""
        prefix = self._folder.destination.key(folder)
        several: list[tuple[str, datetime]] = []
        rows = 0
        async for row in self._folder.store.list(prefix):
            # Further pictures of an item are ITEM_ID.2.png and so on.
            name, *endings = row.key.removeprefix(prefix).split(".")
            if len(endings) == 1 and (since is None or row.modified_at >= since):
                several.append((name, row.modified_at))
            rows += 1
            if len(several) == LISTED_AT_A_TIME:
                yield several
                several = []
            if rows == most:
                break
        yield several

    async def settled(self, wanted: Wanted, earlier: Earlier | None) -> tuple[Outcome | None, bool]:
        """What is known of a row without asking for it, and whether that is news to the last report."""
        item = wanted.item
        if earlier is not None and earlier.outcome.fingerprint == item.fingerprint:
            was = earlier.outcome
            state: RowState | None = None
            if was.state in THERE and earlier.has_picture:
                state = RowState.STORED if was_stored_by(was, self._budget.ours) else RowState.REUSED
            elif was.state is RowState.FAILED and was.final and not self._retry_failed and not earlier.has_picture:
                state = RowState.FAILED
            if state is not None:
                return replace(was, row=wanted.line, table_row=wanted.number, labels=item.labels, state=state), False
        if self._budget.stopped is not None:
            return not_there(wanted, self._budget.stopped), True
        if earlier is not None and was_stored_by(earlier.outcome, self._budget.ours):
            was = earlier.outcome
            self._budget.ask_again(item.item_id, Order(was.model or "", True, was.prediction_id, was.cost_usd))
        if self._budget.is_exhausted(item.model) and earlier is None and not await self._has_record(item.item_id):
            why = Skipped("Left out: the budget is spent.", item_id=item.item_id, kind="budget")
            return not_there(wanted, why), True
        return None, True

    async def by_record(self, wanted: Wanted, options: PurchaseOptions, claim_seconds: float) -> Outcome | None:
        """What a row's record says will come of it; None: it is bought, or nobody knows. Free: a read where one is."""
        item = wanted.item
        if not await self._has_record(item.item_id):
            return None
        try:
            held = await retry_while_retryable(lambda: self._ledger.read(item.item_id))
            step = next_step(held, item, options, claim_seconds=claim_seconds)
        except EachlabsError as error:
            return not_there(wanted, error)
        if held is None or step not in (Step.REUSE, Step.FINISH):
            return None
        key = self._folder.destination.stored_key(held.record.uri or f"{item.item_id}.png")
        if step is Step.REUSE and await retry_while_retryable(lambda: self._folder.store.head(key)) is None:
            if options.rebuy_missing:
                return None
            said = f"The picture {held.record.uri} is gone from the bucket; it is bought again with --rebuy-missing."
            return not_there(wanted, PictureMissing(said, item_id=item.item_id))
        return found(wanted, held.record.prediction_id, held.record.cost_usd)

    async def _has_record(self, item_id: str) -> bool:
        """Whether money may have been spent on an item; one listing answers for all of them."""
        if not self._records_are_known:
            async for several in self._listed("records/"):
                await self._folder.worker(self._scratch.have_records, [item_id for item_id, _ in several])
            self._records_are_known = True
        return await self._folder.worker(self._scratch.has_record, item_id)


def was_stored_by(outcome: Outcome, runs: Collection[str]) -> bool:
    """Whether one of these runs had bought the row's picture and stored it."""
    return outcome.state in THERE and outcome.bought_by in runs


def ordered_by(record: Record, runs: Collection[str]) -> Order | None:
    """What one of these runs has ordered for an item, as its record says; None: nothing."""
    if record.bought_by not in runs:
        if set(runs).isdisjoint(record.replaced_runs):
            return None
        # Another input stands there now; what ours had cost is asked for.
        return Order(record.model, is_sent=True, prediction_id=record.earlier[-1] if record.earlier else None)
    if record.prediction_id is None:
        return Order(record.model, is_sent=True) if record.may_have_bought_unseen else None
    cost_usd = record.cost_usd or (0.0 if record.ended_free else None)
    return Order(record.model, is_sent=True, prediction_id=record.prediction_id, cost_usd=cost_usd)
