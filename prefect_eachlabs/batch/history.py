"""What earlier runs left: their report and a listing settle most rows without a request of their own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace

from prefect_eachlabs.batch.budget import Budget
from prefect_eachlabs.batch.outcomes import Outcome, RowState, not_there
from prefect_eachlabs.batch.report import BatchFolder
from prefect_eachlabs.batch.source import Wanted
from prefect_eachlabs.batch.state import Earlier, Scratch
from prefect_eachlabs.errors import Skipped
from prefect_eachlabs.retry import retry_while_retryable

LISTED_AT_A_TIME = 1_000
FEWEST_PAGES = 10


class History:
    """The last report and the pictures that are there.

    Args:
        folder: Where reports are.
        scratch: Keeps what was learned.
        budget: Learns prices, and what this very run has spent before.
        retry_failed: Whether what failed for good is tried again.
        bought_here: Runs whose purchases count as this one's.
    """

    def __init__(
        self,
        folder: BatchFolder,
        scratch: Scratch,
        budget: Budget,
        *,
        retry_failed: bool,
        bought_here: frozenset[str] = frozenset(),
    ) -> None:
        self._folder = folder
        self._scratch = scratch
        self._budget = budget
        self._retry_failed = retry_failed
        self._bought_here = bought_here
        self._records_are_known = False
        self.is_empty = True
        self.mean_seconds: float | None = None

    async def load(self, run_id: str) -> None:
        """Reads the last report, and lists the pictures where it names some.

        Raises:
            SetupError: The bucket is missing or refuses us.
            StoreFailed: The bucket does not answer.
        """
        earlier = await retry_while_retryable(lambda: self._folder.load_earlier(self._scratch, run_id))
        self._budget.spent_usd = earlier.spent_usd
        self.mean_seconds = earlier.mean_seconds
        for model, (count, cost_usd) in earlier.costs.items():
            self._budget.learn(model, cost_usd / count, count=count)
        pictures = await self._folder.worker(self._scratch.count_earlier)
        self.is_empty = not earlier.rows
        if pictures:
            await retry_while_retryable(lambda: self._list_pictures(pictures))

    async def _list_pictures(self, pictures: int) -> None:
        """Which items have their picture; a prefix that holds many others is not listed for longer than it pays."""
        most = LISTED_AT_A_TIME * max(FEWEST_PAGES, pictures)
        async for several in self._listed("images/", most):
            await self._folder.worker(self._scratch.has_pictures, several)

    async def _listed(self, folder: str, most: int | None = None) -> AsyncIterator[list[str]]:
        """Item ids that a listing shows, by the thousand."""
        prefix = self._folder.destination.key(folder)
        several: list[str] = []
        rows = 0
        async for row in self._folder.store.list(prefix):
            # Further pictures of an item are ITEM_ID.2.png and so on.
            name, *endings = row.key.removeprefix(prefix).split(".")
            if len(endings) == 1:
                several.append(name)
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
            was = replace(earlier.outcome, row=wanted.line, labels=item.labels)
            if was.state in (RowState.STORED, RowState.REUSED) and earlier.has_picture:
                ours = was.state is RowState.STORED and was.bought_by in self._bought_here
                return replace(was, state=RowState.STORED if ours else RowState.REUSED), False
            failed_for_good = was.state is RowState.FAILED and was.final and not self._retry_failed
            if failed_for_good and not earlier.has_picture:
                return was, False
        if self._budget.stopped is not None:
            return not_there(wanted, self._budget.stopped), True
        if self._budget.is_exhausted(item.model) and earlier is None and not await self._has_record(item.item_id):
            why = Skipped("Left out: the budget is spent.", item_id=item.item_id, kind="budget")
            return not_there(wanted, why), True
        return None, True

    async def _has_record(self, item_id: str) -> bool:
        """Whether money may have been spent on an item; one listing answers for all of them."""
        if not self._records_are_known:
            async for several in self._listed("records/"):
                await self._folder.worker(self._scratch.have_records, several)
            self._records_are_known = True
        return await self._folder.worker(self._scratch.has_record, item_id)
