"""A run of a batch, from its first row to its report."""

from __future__ import annotations

import asyncio
import logging
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from datetime import datetime, timezone
from typing import Any

from prefect_eachlabs.batch.budget import Budget
from prefect_eachlabs.batch.buying import EXECUTIONS_A_PAGE, INTERRUPTED, Buying, EngineBuyer
from prefect_eachlabs.batch.history import READ_AT_A_TIME, History
from prefect_eachlabs.batch.outcomes import (
    THERE,
    BatchResult,
    Outcome,
    RowResult,
    RowResults,
    RowState,
    Totals,
    money,
    not_there,
    refused,
)
from prefect_eachlabs.batch.pages import MOST_PICTURES
from prefect_eachlabs.batch.progress import Pace, Progress, Show
from prefect_eachlabs.batch.report import PART_SECONDS, BatchFolder, ReportWriter, run_name
from prefect_eachlabs.batch.source import Rows, Source, Wanted
from prefect_eachlabs.batch.state import Scratch
from prefect_eachlabs.batch.tables import BadRow
from prefect_eachlabs.batch.worker import Worker
from prefect_eachlabs.cancellation import uncancelled
from prefect_eachlabs.errors import EachlabsError, PredictionTimedOut, SetupError, Skipped
from prefect_eachlabs.ledger.rules import PurchaseOptions
from prefect_eachlabs.models import Media
from prefect_eachlabs.retry import retry_while_retryable
from prefect_eachlabs.storage.s3_client import S3Access

logger = logging.getLogger(__name__)

WINDOW_WITHOUT_LIMIT = 200
WINDOW_BEYOND_THE_LIMIT = 30
"""So many items more than may be in flight are in progress: downloading, uploading, or about to buy."""
MOST_BYTES_IN_PROGRESS = 2_000_000
"""Of their inputs as JSON, a byte of which may take 20 in memory (`[[],[],...]`): fewer items where they are large."""
TICK_SECONDS = 1.0
INTERRUPT_SECONDS = 20.0
"""So long a cancelled row may take to cancel its prediction and to see its end (Prefect kills a run after 30 s)."""
RECORD_SECONDS = 3.0
"""And so long, to read what its record says, when that was not enough."""
MOST_ASKED_FOR = 100
"""So many costs of what was bought beside the rows' own pictures are asked for at the end, a request each."""
LOOKS_FOR_COSTS = 2
COST_PAUSE_SECONDS = 15.0
PAGES_OF_OTHERS = 5
"""Executions of other keys and runs stand among ours: so many pages more than ours would fill are looked through."""
MOST_IN_GALLERY = 24
KEPT_REFERENCES = 20
KEPT_FAILURES = 50
"""Rows without a picture that are at hand for whoever shows them; the report has all."""


@dataclass(frozen=True)
class BatchOptions(PurchaseOptions):
    """What a run of a batch may do; the defaults never buy anything twice. The rest is as for a single picture.

    The same `run_id` again is the same run (a flow that Prefect runs again), whose budget is one.

    Attributes:
        budget_usd: At most so much is spent by this run; None: no budget.
        shard: Only the rows of this share are seen to: its number from 0 on, and how many there are. Such a run
            leaves parts of a report, and no report.
        bought_here: Runs whose purchases count as this one's: those of its shares.
        presigned_seconds: The page shows pictures by presigned URLs that last so long; None: by relative paths.
        with_rows: The result has an entry for each row.
    """

    budget_usd: float | None = None
    presigned_seconds: int | None = None
    shard: tuple[int, int] | None = None
    bought_here: frozenset[str] = frozenset()
    with_rows: bool = False


def shard_of(item_id: str, shards: int) -> int:
    """Whose an item is: the same on every machine, whatever the order of the rows."""
    return zlib.crc32(item_id.encode()) % shards


def window_for(max_in_flight: int | None) -> int:
    """How many items are in progress at most: enough that downloads and uploads never hold up buying."""
    return WINDOW_WITHOUT_LIMIT if max_in_flight is None else max_in_flight + WINDOW_BEYOND_THE_LIMIT


class Chunk:
    """Some rows that follow one another, all of them in progress or done. Opaque to Prefect, which looks into lists."""

    def __init__(self) -> None:
        self.rows: list[Wanted] = []
        self._tasks: list[asyncio.Task[Outcome]] = []

    @property
    def name(self) -> str:
        """`rows 2 to 21`, by their lines."""
        return f"rows {self.rows[0].line} to {self.rows[-1].line}"

    def add(self, wanted: Wanted, task: asyncio.Task[Outcome]) -> None:
        self.rows.append(wanted)
        self._tasks.append(task)

    async def ended(self) -> list[Outcome]:
        """What became of them, once each has come to its end."""
        await asyncio.wait(self._tasks)
        return [task.result() for task in self._tasks if not task.cancelled()]


class Chunks:
    """Hands out a run's rows by the chunk, for whoever shows them; the buying does not wait for that.

    Args:
        size: Rows to a chunk; the last may have fewer.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._filling = Chunk()
        self._full: list[Chunk] = []
        self._news = asyncio.Event()

    def add(self, wanted: Wanted, task: asyncio.Task[Outcome]) -> None:
        """A row has begun."""
        self._filling.add(wanted, task)
        if len(self._filling.rows) == self._size:
            self.flush()

    def flush(self) -> None:
        """No further row begins, or the run has ended: whoever waits looks again."""
        if self._filling.rows:
            self._full.append(self._filling)
            self._filling = Chunk()
        self._news.set()

    async def next(self, seconds: float) -> list[Chunk]:
        """Those that are new; waits so long for one, or for the end."""
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._news.wait(), seconds)
        self._news.clear()
        new, self._full = self._full, []
        return new


class Batch:
    """One run over a source, on one loop; made by `open_batch`, and run once."""

    def __init__(
        self,
        buyer: EngineBuyer,
        source: Source,
        folder: BatchFolder,
        options: BatchOptions,
        *,
        worker: Worker,
        access: S3Access | None = None,
        show: Show | None = None,
        show_seconds: float = 30.0,
    ) -> None:
        self.folder = folder
        self.options = options
        self.totals = Totals()
        self.run_name = run_name(options.run_id, datetime.now(timezone.utc))
        self.budget = Budget(options.budget_usd, buyer, ours=options.bought_here | {options.run_id})
        self.scratch = Scratch()
        self.rows = Rows(source, self.scratch, worker)
        self.history = History(folder, self.scratch, self.budget, retry_failed=options.retry_failed)
        self._buyer = buyer
        self._source = source
        self._access = access
        self._show = show
        self._show_seconds = show_seconds
        self._writer = ReportWriter(folder, self.run_name, self.scratch, self.report)
        self._buying: Buying | None = None
        self.first_not_there: list[Outcome] = []
        self.source_name = source.name
        self.references: dict[str, None] = {}
        """Reference pictures that its pictures were made from, the first of them."""
        self.gallery: list[tuple[Outcome, str]] = []
        """Pictures from all over the batch, each with its thumbnail's data URL; once the report is written."""
        self._obtaining: dict[asyncio.Task[Any], int] = {}
        """Rows in progress, and how large the input of each is."""
        self._timed_out: list[tuple[Wanted, Outcome]] = []
        """Rows whose deadline has passed, told at the end: whoever sees their predictions' ends stores them."""
        self._said_past_deadline = 0
        self.unchecked: dict[str, EachlabsError] = {}
        """Models whose schema the API does not tell now, and why."""
        self._has_begun_to_buy = False
        self.is_interrupted = False
        self.last_result: BatchResult | None = None
        """What an interrupted run came to, where it had begun to buy and its report is written."""
        self._pace = Pace()
        self._news = 0
        self._stored_now = 0
        """Rows that this attempt has stored: an earlier one of the same run was no part of its minutes."""
        self._state = "running"
        self._stopped_by: EachlabsError | None = None
        self._began = 0.0
        self._started_at = datetime.now(timezone.utc)
        self._ended_at: datetime | None = None
        self._ticker: asyncio.Task[None] | None = None

    async def run(
        self, *, window: int, interrupt_seconds: float = INTERRUPT_SECONDS, chunks: Chunks | None = None
    ) -> BatchResult:
        """To the end: every row comes to one of five ends. **Costs money.**

        Cancelled, it cancels what is in flight and reports what came of it; run again, it goes on from there.

        Args:
            window: How many items are in progress at most.
            interrupt_seconds: How long the cancels may take, when the run itself is cancelled.
            chunks: Told of each row that begins.

        Raises:
            SetupError, StoreFailed: The bucket is missing or does not answer, at the beginning or at the very end.
        """
        self.options = self.options.begun()
        try:
            await self._begin()
            await self._obtain_all(window, chunks)
            return await self._finish()
        except asyncio.CancelledError:
            await uncancelled(self._interrupt(interrupt_seconds))
            raise
        finally:
            await uncancelled(self.close())

    async def _begin(self) -> None:
        """Learns what earlier runs left. Free."""
        self._began = asyncio.get_running_loop().time()
        await self.history.load()
        # With a budget an item that was bought already must not be asked whether it may be.
        presume_new = not self.history.earlier.rows and self.options.budget_usd is None
        see = self._see if self.options.shard is None else None
        purchase = replace(self.options, presume_new=presume_new, budget=self.budget, see=see)
        self._buying = Buying(self._buyer, self.folder, self._access, purchase, self.budget)
        self._ticker = asyncio.ensure_future(self._tick())

    async def _obtain_all(self, window: int, chunks: Chunks | None) -> None:
        free = asyncio.Semaphore(window)
        try:
            while True:
                await free.acquire()
                wanted = await self._next_wanted()
                if wanted is None:
                    break
                while self._obtaining and sum(self._obtaining.values()) + wanted.size_bytes > MOST_BYTES_IN_PROGRESS:
                    await asyncio.wait(self._obtaining, return_when=asyncio.FIRST_COMPLETED)
                task = asyncio.ensure_future(self._obtain(wanted))
                self._obtaining[task] = wanted.size_bytes
                task.add_done_callback(self._obtaining.pop)
                task.add_done_callback(lambda _: free.release())
                if chunks is not None:
                    chunks.add(wanted, task)
        finally:
            if chunks is not None:
                chunks.flush()
        if self._obtaining:
            # Not a gather, which would pass a cancel on: an interrupt cancels each row, once.
            await asyncio.wait(self._obtaining)

    async def _next_wanted(self) -> Wanted | None:
        """The next row that is to be obtained; those that are settled already are reported on the way.

        None at the end, and where the source cannot be read on: then what is in progress ends, and the result says why
        the rest is missing.
        """
        number, shards = self.options.shard or (0, 1)
        while self._stopped_by is None:
            try:
                found = await self.rows.next()
            except EachlabsError as error:
                logger.error("The source cannot be read on: %s", error)
                self._stopped_by = error
                break
            if found is None:
                break
            row, earlier = found
            if isinstance(row, BadRow):
                if self.options.shard is None:  # rows that are no items are told by whoever goes through all of them
                    self._add(refused(row))
                continue
            if shard_of(row.item.item_id, shards) != number:
                continue
            outcome, is_news = await self.history.settled(row, earlier)
            if outcome is not None:
                self._add(outcome, is_news=is_news)
                continue
            if not self._has_begun_to_buy:
                await retry_while_retryable(lambda: self._writer.begin(self.options.run_id))
                self._has_begun_to_buy = True
            return row
        return None

    async def refused_by_their_models(self, rows: Sequence[Wanted]) -> list[Outcome | None]:
        """Rows whose input their model's schema refuses; None: it takes that, or nobody has a schema. Free."""
        refused: dict[int, Outcome] = {}
        for model in {wanted.item.model for wanted in rows} - self.unchecked.keys():
            theirs = [wanted for wanted in rows if wanted.item.model == model]
            try:
                errors = await self._buyer.check([wanted.item for wanted in theirs])
            except EachlabsError as error:
                if isinstance(error, SetupError):
                    raise
                self.unchecked[model] = error
                continue
            refused |= {one.line: not_there(one, error) for one, error in zip(theirs, errors, strict=True) if error}
        return [refused.get(wanted.line) for wanted in rows]

    async def _obtain(self, wanted: Wanted) -> Outcome:
        """The row's picture, safe in the bucket, or why not; of an interrupted run: what its record says."""
        assert self._buying is not None, "the run has begun"
        try:
            outcome = await self._buying.obtain(wanted)
        except asyncio.CancelledError:
            if not self.is_interrupted:
                raise
            outcome = await self._buying.interrupted(wanted)
        if outcome.kind == PredictionTimedOut.default_kind and not self.is_interrupted:
            self._timed_out.append((wanted, outcome))
        else:
            self._add(outcome)
        return outcome

    async def _see(self, media: Media) -> None:
        """A picture is being stored: as long as the page shows about what comes now, its thumbnail is made."""
        if self.totals.items < MOST_PICTURES and (total := self.rows.total) is not None:
            await self._writer.see(media, total - self.totals.not_there)

    async def _end_timed_out(self) -> None:
        """Adds the rows whose deadline had passed, as their records say now."""
        rows, self._timed_out = self._timed_out, []

        async def again(wanted: Wanted, outcome: Outcome) -> Outcome:
            assert self._buying is not None, "rows timed out"
            if self.is_interrupted:
                return await self._buying.interrupted(wanted)
            return await self._buying.looked_at_again(wanted, outcome)

        for start in range(0, len(rows), READ_AT_A_TIME):
            for outcome in await asyncio.gather(*(again(*row) for row in rows[start : start + READ_AT_A_TIME])):
                self._add(outcome)

    async def _interrupt(self, seconds: float) -> None:
        """Ends the run now: what is in flight is cancelled, and the report says what came of every row until here.

        Nothing is bought any more. What the API has not answered for after so many seconds stays as its record says.
        """
        self.is_interrupted = True
        self.budget.stop(Skipped("Interrupted before it was bought.", kind=INTERRUPTED))
        if not self._has_every_row:
            self._stopped_by = self._stopped_by or EachlabsError("interrupted", kind=INTERRUPTED)
        tasks = list(self._obtaining)
        for task in tasks:
            task.cancel()
        # Past its deadline a prediction is nobody's task any more, whatever its row waits for.
        tasks.append(asyncio.ensure_future(self._buyer.cancel_late(self.options.run_id)))
        _, late = await asyncio.wait(tasks, timeout=seconds)
        for task in late:
            task.cancel()
        await asyncio.wait(tasks, timeout=RECORD_SECONDS)
        await self._end_ticker()
        try:
            await self._end_timed_out()
            await self._writer.write_rest()
            if self.options.shard is None and self._has_begun_to_buy:
                await self._write_report()
                self.last_result = self.result()
        except EachlabsError as error:
            logger.error("The report of the interrupted run could not be written: %s", error)

    @property
    def unanswered(self) -> int:
        """Rows whose order had not been answered when the run was interrupted: they may be paid for."""
        return self.totals.kinds[RowState.AMBIGUOUS][INTERRUPTED]

    async def _finish(self) -> BatchResult:
        """Merges the report and writes page and sheet; returns what it all came to.

        A share leaves its parts, which whoever goes through all rows reads.

        Raises:
            StoreFailed, SetupError: The report could not be written; its parts stand as far as they were taken.
        """
        await self._end_ticker()
        await self._end_timed_out()
        if self._show is not None:
            self._show(self.progress())
        if self._stopped_by is None and self._buying is not None:
            self._stopped_by = self._buying.stopped_by
        await self._writer.write_rest()
        if self.options.shard is not None:
            self._state = "completed" if self._stopped_by is None else "stopped"
            return self.result()
        await self.folder.worker(self.scratch.flush)
        if self._stopped_by is None:
            await self._tell_late_costs()
            await self.budget.ask_for_the_rest(MOST_ASKED_FOR)
        await self._write_report()
        if self.rows.all_read and self.totals.items != self.rows.total:
            raise RuntimeError(
                f"{self.rows.total} rows were read and {self.totals.items} came to an end: a fault of ours."
            )
        return self.result(await self.folder.worker(self._entries) if self.options.with_rows else RowResults())

    async def _tell_late_costs(self) -> None:
        """Looks up what was billed for rows that ended before the vendor had settled it: a request for each 100."""
        for look in range(LOOKS_FOR_COSTS):
            left = await self.folder.worker(self.scratch.count_unsettled)
            if not left:
                return
            if look:
                await asyncio.sleep(COST_PAUSE_SECONDS)
            try:
                await self._look_through_executions(left)
            except EachlabsError as error:
                logger.info("What some pictures cost is not known yet: %s", error)
                return

    async def _look_through_executions(self, left: int) -> None:
        for page in range(-(-left // EXECUTIONS_A_PAGE) + PAGES_OF_OTHERS):
            rows = await self._buyer.executions(page * EXECUTIONS_A_PAGE)
            costs = {row.id: row.cost_usd for row in rows if row.cost_usd}
            told = await self.folder.worker(self.scratch.settle, costs)
            facts = [(one.item_id or "", one.prediction_id or "", one.cost_usd or 0.0) for one in told]
            place, access = self.folder.destination, self._access
            await asyncio.gather(*(self._buyer.note_cost(*fact, place, access=access) for fact in facts))
            for settled, (item_id, prediction_id, cost_usd) in zip(told, facts, strict=True):
                self.totals.cost_was_told(settled)
                self.budget.told(item_id, settled.model or "", prediction_id, cost_usd)
            left -= len(told)
            if not left or len(rows) < EXECUTIONS_A_PAGE:
                return

    def _entries(self) -> RowResults:
        lines = map(Outcome.from_line, self.scratch.lines())
        return RowResults(RowResult.of(outcome) for outcome in lines if outcome is not None)

    @property
    def _has_every_row(self) -> bool:
        return self.rows.all_read and self.totals.items == self.rows.total

    @property
    def _home(self) -> str:
        """Where the report goes: one that lacks rows does not take the place of a whole one."""
        return "" if self._has_every_row or not self.history.earlier.has_whole_report else f"runs/{self.run_name}/"

    async def _write_report(self) -> None:
        self._state = "completed" if self._stopped_by is None else INTERRUPTED if self.is_interrupted else "stopped"
        self._ended_at = datetime.now(timezone.utc)
        await self.folder.worker(self.scratch.flush)
        is_news = self._news > 0 or not self.folder.has_sheet
        await self._writer.see_pictures(may_read=is_news and not self.is_interrupted)
        self.gallery = self._writer.gallery(MOST_IN_GALLERY)
        if not self.is_interrupted and self._has_every_row and is_news:
            self.folder.has_sheet = await self._writer.write_sheet() or self.folder.has_sheet
        home = self._home
        await retry_while_retryable(lambda: self._writer.write_page(self.options.presigned_seconds, home=home))
        if home:
            # Its rows are in its parts, which the next run reads beside the last whole report.
            await retry_while_retryable(lambda: self._writer.write_totals(f"{home}report.json"))
        else:
            await retry_while_retryable(lambda: self._writer.merge(is_whole=self._has_every_row))

    async def close(self) -> None:
        """Ends what is left; a run that was cancelled leaves its parts, which are true."""
        if self._ticker is not None:
            await self._end_ticker()
            await self._writer.write_rest()
        # In the worker, which may still be reading for whoever was cancelled.
        await self.folder.worker(self._source.close)
        await self.folder.worker(self.scratch.close)

    async def _end_ticker(self) -> None:
        if self._ticker is not None:
            self._ticker.cancel()
            with suppress(asyncio.CancelledError):
                await self._ticker
            self._ticker = None

    def _add(self, outcome: Outcome, *, is_news: bool = True) -> None:
        self.totals.add(outcome)
        self._news += is_news
        self._stored_now += is_news and outcome.state is RowState.STORED
        is_there = outcome.state in THERE
        if is_there and outcome.image_url and len(self.references) < KEPT_REFERENCES:
            self.references[outcome.image_url] = None
        if not is_there and len(self.first_not_there) < KEPT_FAILURES:
            self.first_not_there.append(outcome)
        lacks_cost = outcome.bought_by in self.budget.ours and outcome.cost_usd is None
        self._writer.add(outcome, is_news=is_news, lacks_cost=lacks_cost)

    # While it runs.

    async def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        shown_at = part_at = loop.time()
        while True:
            await asyncio.sleep(min(TICK_SECONDS, self._show_seconds))
            now = loop.time()
            self._pace.see(now, self._stored_now)
            past_deadline, said = self._buyer.slots_past_deadline, self._said_past_deadline
            self._said_past_deadline = past_deadline
            if past_deadline > said:
                logger.warning(
                    "Slots in flight held by predictions past their deadlines: %d. The vendor counts them too; each "
                    "comes back when its end is seen, or after an hour. Ctrl-C, or the run's cancel, cancels them.",
                    past_deadline,
                )
            if self._show is not None and now - shown_at >= self._show_seconds:
                shown_at = now
                self._show(self.progress())
            if now - part_at >= PART_SECONDS:
                part_at = now
                self._writer.begin_part()

    def progress(self) -> Progress:
        """How far it is."""
        now = asyncio.get_running_loop().time()
        totals, total = self.totals, self.rows.total
        if total is not None and self.options.shard is not None:
            total = max(totals.items, total // self.options.shard[1])
        stored = totals.count(RowState.STORED)
        per_minute = self._pace.per_minute(now, self._stored_now)
        left = None if total is None or not per_minute else max(0, total - totals.items) * 60 / per_minute
        return Progress(
            done=totals.items,
            total=total,
            total_is_known=self.rows.all_read,
            stored=stored,
            reused=totals.count(RowState.REUSED),
            not_there=totals.not_there,
            past_deadline=self._buyer.slots_past_deadline,
            cost_usd=self.budget.spent_usd,
            per_minute=per_minute,
            left_seconds=left,
        )

    def report(self) -> dict[str, Any]:
        """What `report.json` holds now."""
        seconds = asyncio.get_running_loop().time() - self._began
        return {
            "batch_id": self.folder.batch_id,
            "run": self.run_name,
            "run_id": self.options.run_id,
            "state": self._state,
            "stopped_by": str(self._stopped_by) if self._stopped_by else None,
            "source": self._source.name,
            "destination": str(self.folder.destination),
            "started_at": self._started_at.isoformat(timespec="seconds"),
            "ended_at": self._ended_at.isoformat(timespec="seconds") if self._ended_at else None,
            "seconds": round(seconds, 3),
            "pictures_per_minute": round(self._stored_now * 60 / seconds, 1) if seconds else 0.0,
            "budget_usd": self.options.budget_usd,
            "cost_usd": money(self.budget.spent_usd),
            "cost_unknown": self.budget.untold,
            "cost_unknown_expected_usd": None if (expected := self.budget.untold_usd) is None else money(expected),
            "cost_by_model": {
                model: {
                    "pictures": spent.pictures,
                    "cost_usd": money(spent.cost_usd),
                    "mean_usd": money(spent.cost_usd / spent.pictures),
                }
                for model, spent in sorted(self.budget.by_model.items())
                if spent.pictures
            },
            **self.totals.as_json(),
            "report": self.folder.uri("report.jsonl"),
            "index": self.folder.uri("index.html"),
            "contact_sheet": self.folder.uri("contact-sheet.png") if self.folder.has_sheet else None,
        }

    def result(self, rows: RowResults | None = None) -> BatchResult:
        """What it came to."""
        told, home = self.report(), self._home
        told |= {
            "report_uri": self.folder.uri(f"{home}report.json"),
            "index_uri": self.folder.uri(f"{home}index.html"),
            "why": self.totals.why(),
            "set_up_wrong": isinstance(self._stopped_by, SetupError),
            "rows": rows or RowResults(),
        }
        return BatchResult(**{one.name: told[one.name] for one in fields(BatchResult)})
