"""Batches in Prefect: rows become pictures and a report, in the task `generate_rows` or in a flow over a file.

The rows are bought on the gateway's loop, as everything is. Prefect is shown what happens: a progress artifact, a task
run for each 20 rows with what became of them, the report's artifact. A task run costs Prefect's server 30 to 70 ms, so
a picture has none of its own; and nothing that Prefect loses on the way is lost.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ParamSpec, Protocol, TypeVar

from prefect import Task, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.context import FlowRunContext
from prefect.futures import PrefectFuture, PrefectFutureList, wait
from prefect.states import Cancelled
from prefect.task_runners import ThreadPoolTaskRunner
from prefect.utilities.annotations import BaseAnnotation, opaque

from prefect_eachlabs import events
from prefect_eachlabs.artifacts import show_markdown
from prefect_eachlabs.batch.inline_rows import InlineRows
from prefect_eachlabs.batch.outcomes import BatchResult, RowState
from prefect_eachlabs.batch.plan import ROWS, open_batch, plan_batch
from prefect_eachlabs.batch.plan import Plan as BatchPlan
from prefect_eachlabs.batch.progress import Progress
from prefect_eachlabs.batch.run import Batch, BatchOptions, Chunk, Chunks, window_for
from prefect_eachlabs.batch.source import Defaults
from prefect_eachlabs.batch.tables import AS_USUAL, Columns, Table
from prefect_eachlabs.batch.worker import ThreadWorker
from prefect_eachlabs.batch_artifacts import ProgressShown, chunk_markdown, show_report
from prefect_eachlabs.blocks import gateway_of, where
from prefect_eachlabs.engine.runtime import Gateway
from prefect_eachlabs.engine.sync_async import Plan, beside_the_loop, on_the_loop, run
from prefect_eachlabs.errors import BadInput, BatchIncomplete
from prefect_eachlabs.images.formats import check_formats
from prefect_eachlabs.models import DEFAULT_MODEL, check_model_name
from prefect_eachlabs.tasks import Credentials, OnAmbiguous, Target, async_task, log, run_id, shortened, sync_task

logger = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")

CHUNK_SIZE = 20
MOST_IN_A_CHUNK = 100
DAY_SECONDS = 86_400
MOST_DAYS = 7
NEWS_SECONDS = 5.0
"""So often the progress is shown."""
LAST_CHUNKS_SECONDS = 10.0
"""So long the end waits for Prefect to have noted the ends of the chunks' task runs."""
INTERRUPTED_CHUNKS_SECONDS = 3.0
"""And so long, when the run was cancelled and will be killed soon."""


class ArrowTable(Protocol):
    """Whatever has the Arrow interface."""

    def __arrow_c_stream__(self, requested_schema: object | None = None) -> object: ...


Rows = Iterable[Any] | ArrowTable


class RowsTask(Task[P, T]):
    """A task whose first argument may be a hundred thousand rows: Prefect does not look for futures in each cell."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = _whole(args, kwargs)
        return super().__call__(*args, **kwargs)

    def submit(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = _whole(args, kwargs)
        return super().submit(*args, **kwargs)


def _whole(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (_one(args[0]), *args[1:]), kwargs
    return args, {name: _one(value) if name == "rows" else value for name, value in kwargs.items()}


def _one(rows: Any) -> Any:
    """The rows as one thing; a list of what other tasks will return is left to Prefect, which waits for them."""
    are_awaited = isinstance(rows, (PrefectFutureList, BaseAnnotation))
    if isinstance(rows, (list, tuple)) and rows:
        are_awaited = are_awaited or isinstance(rows[0], PrefectFuture)
    return rows if are_awaited else opaque(rows)


def options_of(
    *,
    budget_usd: float | None,
    fail_above: float | None,
    presigned_days: float | None,
    chunk_size: int,
    formats: Sequence[str] | str | None,
    **more: Any,
) -> BatchOptions:
    """What a run may do.

    Raises:
        BadInput: A number is out of bounds.
    """
    if not 1 <= chunk_size <= MOST_IN_A_CHUNK:
        raise BadInput(f"chunk_size: {chunk_size} must be 1 to {MOST_IN_A_CHUNK}.")
    if presigned_days is not None and not 0 < presigned_days <= MOST_DAYS:
        raise BadInput(f"presigned_days: {presigned_days:g} must be more than 0 and {MOST_DAYS} at most.")
    if budget_usd is not None and not budget_usd > 0:
        raise BadInput(f"budget_usd: {budget_usd:g} must be greater than 0.")
    if fail_above is not None and not fail_above >= 0:
        raise BadInput(f"fail_above: {fail_above:g} must not be negative.")
    return BatchOptions(
        budget_usd=budget_usd,
        presigned_seconds=None if presigned_days is None else max(1, round(presigned_days * DAY_SECONDS)),
        formats=check_formats(formats or None),
        **more,
    )


@dataclass(frozen=True)
class Work:
    """A table, where its pictures go, and who buys them.

    Attributes:
        source: The name of a file, or a table.
        destination: As tasks take it.
        batch_id: The base name of a file when None.
        model, version: Of rows that name none.
        credentials: As tasks take them.
        columns: Which hold the prompts and ids.
    """

    source: str | Table
    destination: Target | None
    batch_id: str | None = None
    model: str = DEFAULT_MODEL
    version: str | None = None
    credentials: Credentials = None
    columns: Columns = AS_USUAL

    def bought(self, options: BatchOptions, *, chunk_size: int = CHUNK_SIZE) -> Plan[BatchResult]:
        """Goes through it once, to its end. **Costs money.**"""
        worker = ThreadWorker()
        try:
            gateway, batch = yield from self._opened(options, worker)
            return (yield from _bought(gateway, batch, chunk_size))
        finally:
            worker.close()

    def planned(self, options: BatchOptions) -> Plan[BatchPlan]:
        """What a run would do. Free."""
        worker = ThreadWorker()
        try:
            gateway, batch = yield from self._opened(options, worker)
            return (yield from on_the_loop(gateway, plan_batch(batch, gateway.settings)))
        finally:
            worker.close()

    def _opened(self, options: BatchOptions, worker: ThreadWorker) -> Plan[tuple[Gateway, Batch]]:
        defaults = Defaults(check_model_name(self.model), self.version)
        place, access = where(self.destination)
        gateway = gateway_of(self.credentials)
        opened = open_batch(
            gateway.engine,
            self.source,
            place,
            options,
            batch_id=self.batch_id,
            access=access,
            defaults=defaults,
            worker=worker,
            columns=self.columns,
        )
        return gateway, (yield from on_the_loop(gateway, opened))


def _bought(gateway: Gateway, batch: Batch, chunk_size: int) -> Plan[BatchResult]:
    chunks, shown = Chunks(chunk_size), ProgressShown()
    begun: list[asyncio.Task[BatchResult]] = []

    async def begin() -> asyncio.Task[BatchResult]:
        buying = batch.run(window=window_for(gateway.settings.max_in_flight), chunks=chunks)
        begun.append(asyncio.ensure_future(buying))
        begun[0].add_done_callback(lambda _: chunks.flush())
        return begun[0]

    # A runner of its own: the flow's may be on other machines, or have no thread left.
    runner: ThreadPoolTaskRunner[Any] = ThreadPoolTaskRunner()
    with runner:
        chunk_runs = ChunkRuns(runner, batch, gateway)
        try:
            running = yield from on_the_loop(gateway, begin())
            shown_at = 0.0
            while not running.done():
                for chunk in (yield from on_the_loop(gateway, chunks.next(NEWS_SECONDS))):
                    chunk_runs.show(chunk)
                if time.monotonic() - shown_at >= NEWS_SECONDS:
                    shown_at = time.monotonic()
                    yield from shown.show((yield from on_the_loop(gateway, _progress(batch))))
            result = running.result()
        except BaseException:
            yield from on_the_loop(gateway, _cancelled(begun))
            yield from chunk_runs.ended(INTERRUPTED_CHUNKS_SECONDS)
            if batch.last_result is not None:
                yield from show_report(batch, batch.last_result)
            raise
        yield from shown.show((yield from on_the_loop(gateway, _progress(batch))), at_the_end=True)
        if batch.options.shard is None:  # a share has no report
            yield from show_report(batch, result)
            events.batch_finished(result.as_json(), [batch.source_name, *batch.references])
        yield from chunk_runs.ended(LAST_CHUNKS_SECONDS)
    return result


async def _progress(batch: Batch) -> Progress:
    return batch.progress()


async def _cancelled(begun: Sequence[asyncio.Task[Any]]) -> None:
    """Over when it has cleaned up."""
    for running in begun:
        running.cancel()
        await asyncio.wait({running})


class ChunkRuns:
    """The task runs that show a batch's chunks."""

    def __init__(self, runner: ThreadPoolTaskRunner[Any], batch: Batch, gateway: Gateway) -> None:
        self._runner, self._batch, self._gateway = runner, batch, gateway
        self._futures: set[PrefectFuture[Any]] = set()
        """Those that have not ended: Prefect complains when nobody keeps one, and each holds its chunk's rows."""

    def show(self, chunk: Chunk) -> None:
        try:
            given = {"chunk": ShownChunk(chunk, self._batch, self._gateway)}
            future = self._runner.submit(generate_chunk, parameters=given)
            self._futures.add(future)
            future.add_done_callback(self._futures.discard)
        except Exception as error:  # it buys nothing, and loses nothing
            logger.warning("%s are not shown: %s: %s", chunk.name, type(error).__name__, str(error)[:200])

    def ended(self, seconds: float) -> Plan[None]:
        """Waits so long for Prefect to have noted their ends."""
        if futures := list(self._futures):
            yield from beside_the_loop(lambda: wait(futures, timeout=seconds))


class ShownChunk:
    """A chunk as its task run sees it: one thing, which Prefect does not look into."""

    def __init__(self, chunk: Chunk, batch: Batch, gateway: Gateway) -> None:
        self.name, self.chunk, self.batch, self.gateway = chunk.name, chunk, batch, gateway

    def __repr__(self) -> str:
        return f"<{self.name}>"


@task(
    name="generate-chunk",
    tags={"eachlabs-chunk"},
    task_run_name="{chunk.name}",
    cache_policy=NO_CACHE,
    persist_result=False,
)
def generate_chunk(chunk: ShownChunk) -> str | State[Any]:
    """Shows some rows of a batch: what fails is a row of the report, and the task run completes. Buys nothing itself.

    Returns:
        How many came to which end.
    """
    outcomes = chunk.gateway.call(chunk.chunk.ended())  # blocks until each row has come to its end
    counts = {state.value: sum(outcome.state is state for outcome in outcomes) for state in RowState}
    words = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
    run(show_markdown(chunk_markdown(outcomes), description=chunk.name))
    log(words)
    if chunk.batch.is_interrupted:
        return Cancelled(message=f"The batch was stopped: {words}.")
    kinds = Counter(one.kind for one in outcomes if one.state in (RowState.FAILED, RowState.AMBIGUOUS))
    events.rows_failed(chunk.batch.folder.batch_id, chunk.name, len(outcomes), kinds)
    return words


def _batch_id_of_the_flow() -> str:
    """The flow's name as a batch's id: the same each night, so that each run finds the last one's report."""
    context = FlowRunContext.get()
    name = context.flow.name if context is not None and context.flow is not None else ""
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")[:128] or ROWS


@sync_task(
    "generate-rows",
    "generate",
    RowsTask,
    task_run_name=lambda parameters: f"batch {shortened(parameters.get('batch_id') or 'of rows')}",
    retries=0,  # what may be repeated is repeated row by row, and the rows may be read only once
)
def generate_rows(
    rows: Rows,
    *,
    destination: Target | None = None,
    batch_id: str | None = None,
    budget_usd: float | None = None,
    fail_above: float | None = None,
    model: str = DEFAULT_MODEL,
    version: str | None = None,
    formats: Sequence[str] | None = None,
    credentials: Credentials = None,
    deadline_seconds: float | None = None,
    replace: bool = False,
    rebuy_missing: bool = False,
    retry_failed: bool = False,
    retry_ambiguous: bool = False,
    on_ambiguous: OnAmbiguous = "settle",
    presigned_days: float | None = None,
    chunk_size: int = CHUNK_SIZE,
    prompt_column: str | None = None,
    id_column: str | None = None,
) -> Plan[BatchResult]:
    """Rows become pictures in the bucket and a report; call it again and it goes on. **Costs money** once a row.

    A row that cannot be used costs itself alone. In a flow each 20 rows show as a task run.

    Args:
        rows: Mappings (dicts, named tuples, rows of a database), a DataFrame of pandas or polars, or anything with
            the Arrow interface. The columns: `prompt` (needed), `id`, `image_url`, `model`, `version`, `input.NAME`;
            all others are labels, kept in record and report. Read at once, before anything is bought.
        destination: `s3://bucket/prefix` or an `S3Destination` block: pictures, records and report go there; the
            environment's EACHLABS_DESTINATION when left out.
        batch_id: Names the report's folder; the flow's name when left out. Two batches of one flow want two names.
        budget_usd: Spend at most so much in this run; the rows that it does not cover are `skipped`.
        fail_above: Raise BatchIncomplete when more rows than this have no picture: below 1 a share of all rows, from 1
            on a number; also when the batch was stopped (a wrong key, an empty balance). Never, when left out.
        model, version: Of rows that name none.
        formats, credentials: As for `create_prediction`.
        deadline_seconds: For each prediction, from its POST; the account's (300) when left out.
        replace, rebuy_missing, retry_failed, retry_ambiguous, on_ambiguous: As for `create_prediction`.
        presigned_days: The report's page links pictures by URLs that anybody may open for so long, 7 at most; by paths
            beside the page when left out.
        chunk_size: Rows to a task run, 1 to 100.
        prompt_column, id_column: The columns of prompts and ids, where they are not called `prompt` and `id`.

    Returns:
        The totals, what was spent, where the report is, and for each row in its order `id`, `status`, `uri`,
        `cost_usd` and `error`: iterate over it, or make a DataFrame of its `records()`. A million rows take 250 MB.

    Raises:
        BadInput, SetupError, StoreFailed: Before anything was bought: no rows, no prompts, no key, no bucket.
        BatchIncomplete: Only with `fail_above`; its `result` is what would have been returned.

    Example:
        ```python
        result = generate_rows([{"id": "fox", "prompt": "a red fox"}], destination="s3://acme/zoo", budget_usd=5)
        for row in result:
            print(row.id, row.status, row.uri)
        ```
    """
    options = options_of(
        run_id=run_id(),
        budget_usd=budget_usd,
        fail_above=fail_above,
        presigned_days=presigned_days,
        chunk_size=chunk_size,
        formats=formats,
        deadline_seconds=deadline_seconds,
        replace=replace,
        rebuy_missing=rebuy_missing,
        retry_failed=retry_failed,
        retry_ambiguous=retry_ambiguous,
        on_ambiguous=on_ambiguous,
        with_rows=True,
    )
    # An iterator may belong to this thread, as a database's cursor does.
    reading = partial(InlineRows, rows)
    given = reading() if isinstance(rows, Iterator) else (yield from beside_the_loop(reading))
    try:
        columns = Columns(prompt_column, id_column)
        work = Work(given, destination, batch_id or _batch_id_of_the_flow(), model, version, credentials, columns)
        result = yield from work.bought(options, chunk_size=chunk_size)
    finally:
        given.close()
    if fail_above is not None and result.exceeds(fail_above):
        raise BatchIncomplete(result.in_words(), result=result)
    log(result.in_words())
    return result


agenerate_rows = async_task(generate_rows)
"""`generate_rows` for async flows: awaited. **Costs money** once a row."""
