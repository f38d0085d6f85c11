"""The flow over a table of prompts: a task run for each chunk of pictures, progress and report as artifacts.

A task run costs Prefect's server 30 to 70 ms, so a picture has none of its own: it shows in its chunk's artifact and
in the report.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal
from uuid import uuid4

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.context import FlowRunContext
from prefect.futures import PrefectFuture
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.states import Completed, Failed

from prefect_eachlabs.artifacts import plain
from prefect_eachlabs.batch.outcomes import BatchResult, Outcome, RowState
from prefect_eachlabs.batch.plan import ThreadWorker, open_batch, plan_batch
from prefect_eachlabs.batch.run import Batch, BatchOptions, window_for
from prefect_eachlabs.batch.source import Defaults, Wanted
from prefect_eachlabs.batch.tables import base_name
from prefect_eachlabs.blocks import S3Destination, gateway_of, load_block, where
from prefect_eachlabs.engine.runtime import Gateway
from prefect_eachlabs.errors import BadInput, EachlabsError
from prefect_eachlabs.events import batch_finished
from prefect_eachlabs.flows.batch_artifacts import (
    PROGRESS_SECONDS,
    ProgressShown,
    chunk_markdown,
    quietly,
    report_markdown,
)
from prefect_eachlabs.flows.results import kept_as_json
from prefect_eachlabs.flows.shards import MOST_SHARDS, other_shards
from prefect_eachlabs.images.formats import check_formats
from prefect_eachlabs.models import DEFAULT_MODEL, check_model_name
from prefect_eachlabs.settings import destination_from_environment
from prefect_eachlabs.tasks import shortened

logger = logging.getLogger(__name__)

CHUNK_SIZE = 20
MOST_IN_A_CHUNK = 100
DAY_SECONDS = 86_400


class Chunk:
    """Rows that one task run obtains. Opaque to Prefect, which looks into dataclasses for futures."""

    def __init__(self, number: int, rows: Sequence[Wanted], batch: Batch, gateway: Gateway) -> None:
        self.number = number
        self.rows = rows
        self._batch = batch
        self._gateway = gateway
        self.outcomes: list[Outcome] | None = None

    def __repr__(self) -> str:
        return f"Chunk({self.number}, {self.name})"

    @property
    def name(self) -> str:
        """Names its task run."""
        return f"rows {self.rows[0].line} to {self.rows[-1].line}"

    def obtain(self) -> list[Outcome]:
        """Every row's end; blocks. **Costs money.**"""
        if self.outcomes is None:
            self.outcomes = self._gateway.call(self._batch.obtain_all(self.rows))
        return self.outcomes


def _by_its_rows() -> Callable[..., str]:
    def name(parameters: dict[str, Any]) -> str:
        chunk: Chunk = parameters["chunk"]
        return chunk.name

    return name


@task(
    name="generate-chunk",
    tags={"eachlabs", "eachlabs-generate"},
    task_run_name=_by_its_rows(),
    cache_policy=NO_CACHE,
    persist_result=False,
)
def generate_chunk(chunk: Chunk) -> dict[str, int]:
    """Some rows of a batch, all at a time: what fails is a row of the report, and the task run completes.

    Returns:
        How many came to which end.
    """
    outcomes = chunk.obtain()
    counts = {state.value: sum(outcome.state is state for outcome in outcomes) for state in RowState}
    quietly(lambda: create_markdown_artifact(chunk_markdown(outcomes), description=chunk.name))
    get_run_logger().info(", ".join(f"{count} {word}" for word, count in counts.items() if count))
    return counts


def _named_for_its_batch() -> str:
    """Names a run for its batch, so that a person finds it in the UI."""
    parameters = flow_run.parameters
    try:
        return f"batch {shortened(parameters.get('batch_id') or base_name(str(parameters.get('source')).strip()))}"
    except BadInput:
        return "batch"  # the flow says what is wrong


@kept_as_json
@flow(
    name="generate-batch",
    description="A table of prompts becomes PNGs in S3 and a report, each bought once.",
    flow_run_name=_named_for_its_batch,
)
def generate_batch(  # noqa: PLR0917 - the UI's form has no keywords
    source: str,
    destination: str = "",
    batch_id: str | None = None,
    budget_usd: float | None = None,
    dry_run: bool = False,
    retry_failed: bool = False,
    fail_above: float = 0.0,
    model: str = DEFAULT_MODEL,
    version: str | None = None,
    replace: bool = False,
    rebuy_missing: bool = False,
    on_ambiguous: Literal["settle", "fail"] = "settle",
    chunk_size: int = CHUNK_SIZE,
    presigned_days: float | None = None,
    credentials_block: str | None = None,
    shards: int = 1,
    formats: str = "",
    retry_ambiguous: bool = False,
) -> State[dict[str, Any]]:
    """A table of prompts becomes PNGs in S3 and a report; run it again and it goes on. **Costs money** once a row.

    Args:
        source: CSV, TSV, JSON Lines or Parquet: s3://bucket/key, or a path. Its bucket or folder must be named in the
            worker's setting EACHLABS_REFERENCE_ROOTS. It needs a column prompt (or Prompt).
        destination: Where pictures and report go: s3://bucket/prefix, or eachlabs-s3-destination/NAME of a block.
            Empty: the worker's setting EACHLABS_DESTINATION.
        batch_id: Names the report's folder. Empty: the source's base name.
        budget_usd: Spend at most so much in this run; what it does not cover is left out. Empty: no budget.
        dry_run: Check every row, estimate cost and time, buy nothing.
        retry_failed: Buy again what failed for good.
        fail_above: The run fails when more rows than this have no picture: below 1 a share of all rows (0.05), from 1
            on a number of rows. 0: every row must have its picture.
        model: The model of rows that name none.
        version: Its version. Empty: the default model has its own.
        replace: Buy although an id stands for another input.
        rebuy_missing: Buy again what is gone from the bucket.
        on_ambiguous: After a lost answer: settle (find out what it bought) or fail (report it).
        chunk_size: Pictures to a task run, 1 to 100.
        presigned_days: The report's page links pictures by presigned URLs that anybody may open for so long, 7 at
            most. Empty: by paths beside the page.
        credentials_block: The name of an Eachlabs Credentials block. Empty: the worker's environment.
        shards: On so many workers at once, 1 to 64; the source must be readable on each. Not together with a budget.
        formats: What may be stored, separated by commas: png, jpeg, webp, gif. Empty: PNG alone.
        retry_ambiguous: Somebody has looked in the vendor's dashboard: what stands as ambiguous was not bought. Buy it
            once.

    Returns:
        The counts (stored, reused, failed, ambiguous, skipped), costs, and where the report is.
    """
    if not 1 <= chunk_size <= MOST_IN_A_CHUNK:
        raise BadInput(f"chunk_size: {chunk_size} must be 1 to {MOST_IN_A_CHUNK}.")
    if presigned_days is not None and not 0 < presigned_days <= 7:
        raise BadInput(f"presigned_days: {presigned_days:g} must be more than 0 and 7 at most.")
    if budget_usd is not None and not budget_usd > 0:
        raise BadInput(f"budget_usd: {budget_usd:g} must be greater than 0.")
    if not fail_above >= 0:
        raise BadInput(f"fail_above: {fail_above:g} must not be negative.")
    if not 1 <= shards <= MOST_SHARDS:
        raise BadInput(f"shards: {shards} must be 1 to {MOST_SHARDS}.")
    if shards > 1 and budget_usd is not None:
        raise BadInput("shards: a budget is kept by one worker: give shards=1 with budget_usd, or no budget.")
    options = BatchOptions(
        run_id=_run_id(),
        budget_usd=budget_usd,
        replace=replace,
        rebuy_missing=rebuy_missing,
        retry_failed=retry_failed,
        on_ambiguous=on_ambiguous,
        retry_ambiguous=retry_ambiguous,
        presigned_seconds=None if presigned_days is None else max(1, round(presigned_days * DAY_SECONDS)),
        formats=check_formats(formats or None),
    )
    # Every shard has the same, whatever its own worker's environment says.
    destination = destination.strip() or destination_from_environment()
    table = Table(source.strip(), destination, batch_id or None, model, version or None, credentials_block or None)
    if dry_run:
        return _planned(table, options)
    if shards == 1:
        return _state(table.drive(options, chunk_size), fail_above)
    parameters = {
        "source": source,
        "destination": destination,
        "batch_id": batch_id,
        "model": model,
        "version": version,
        "replace": replace,
        "rebuy_missing": rebuy_missing,
        "retry_failed": retry_failed,
        "on_ambiguous": on_ambiguous,
        "retry_ambiguous": retry_ambiguous,
        "chunk_size": chunk_size,
        "credentials_block": credentials_block,
        "formats": formats,
    }
    with other_shards(shards, parameters) as others:
        table.drive(dataclasses.replace(options, shard=(0, shards)), chunk_size)
        # What failed in this very run is not tried again, and what it bought is its own.
        bought_here = frozenset({options.run_id, *(run_id.hex for run_id in others)})
        everything = dataclasses.replace(options, retry_failed=False, retry_ambiguous=False, bought_here=bought_here)
        result = table.drive(everything, chunk_size)
    return _state(result, fail_above)


@dataclass(frozen=True)
class Table:
    """A table, where its pictures go, and who buys them; opened as often as it is gone through."""

    source: str
    destination: str
    batch_id: str | None
    model: str
    version: str | None
    credentials_block: str | None

    def open(self, options: BatchOptions, worker: ThreadWorker) -> tuple[Batch, Gateway]:
        """The batch, opened; nothing is bought yet."""
        place, access = where(_target(self.destination))
        gateway = gateway_of(self.credentials_block)
        defaults = Defaults(check_model_name(self.model), self.version)
        opened = open_batch(
            gateway.engine,
            self.source,
            place,
            options,
            batch_id=self.batch_id,
            access=access,
            defaults=defaults,
            worker=worker,
        )
        return gateway.call(opened), gateway

    def drive(self, options: BatchOptions, chunk_size: int) -> BatchResult:
        """Goes through it once. **Costs money.**"""
        worker = ThreadWorker()
        try:
            batch, gateway = self.open(options, worker)
            return _Drive(batch, gateway, chunk_size).run()
        finally:
            worker.close()


def _planned(table: Table, options: BatchOptions) -> State[dict[str, Any]]:
    worker = ThreadWorker()
    try:
        batch, gateway = table.open(options, worker)
        plan = gateway.call(plan_batch(batch, gateway.settings))
    finally:
        worker.close()
    counts = f"{plan.new} new, {plan.reused} there, {plan.failed} that cannot be bought"
    return Completed(message=f"Nothing was bought: {counts}.", data=plan.as_json())


@kept_as_json
@flow(name="generate-shard", description="A share of a batch; generate-batch with shards=N starts it.")
def generate_shard(  # noqa: PLR0917 - Prefect's parameters
    source: str,
    destination: str,
    shard: int,
    shards: int,
    batch_id: str | None = None,
    model: str = DEFAULT_MODEL,
    version: str | None = None,
    replace: bool = False,
    rebuy_missing: bool = False,
    retry_failed: bool = False,
    on_ambiguous: Literal["settle", "fail"] = "settle",
    chunk_size: int = CHUNK_SIZE,
    credentials_block: str | None = None,
    formats: str = "",
    retry_ambiguous: bool = False,
) -> dict[str, Any]:
    """One share of a batch. Started by `generate-batch` with shards=N, not by people. **Costs money** once a row.

    Args:
        source: As for generate-batch, readable on every worker.
        destination: As for generate-batch.
        shard: Which share: 0 to shards - 1.
        shards: How many there are.
        batch_id: As for generate-batch.
        model: As for generate-batch.
        version: As for generate-batch.
        replace: As for generate-batch.
        rebuy_missing: As for generate-batch.
        retry_failed: As for generate-batch.
        on_ambiguous: As for generate-batch.
        chunk_size: As for generate-batch.
        credentials_block: As for generate-batch.
        formats: As for generate-batch.
        retry_ambiguous: As for generate-batch.

    Returns:
        The counts of this share; the batch's own report has every row.
    """
    if not 0 <= shard < shards <= MOST_SHARDS:
        raise BadInput(f"shard: {shard} of {shards} must be 0 to shards - 1, and at most {MOST_SHARDS} shards.")
    options = BatchOptions(
        run_id=_run_id(),
        replace=replace,
        rebuy_missing=rebuy_missing,
        retry_failed=retry_failed,
        on_ambiguous=on_ambiguous,
        retry_ambiguous=retry_ambiguous,
        shard=(shard, shards),
        formats=check_formats(formats or None),
    )
    table = Table(source.strip(), destination, batch_id or None, model, version or None, credentials_block or None)
    return table.drive(options, chunk_size).as_json()


def _target(destination: str) -> S3Destination | str:
    text = destination.strip()
    if text.startswith(f"{S3Destination.get_block_type_slug()}/"):
        block: S3Destination = load_block(text, S3Destination)
        return block
    return text


def _run_id() -> str:
    """The flow run's: when Prefect runs it again, it is the same run, with one budget."""
    context = FlowRunContext.get()
    return context.flow_run.id.hex if context is not None and context.flow_run is not None else uuid4().hex


def _state(result: BatchResult, fail_above: float) -> State[dict[str, Any]]:
    """Completed, or Failed when more rows than allowed have no picture; the message has the reasons by kind."""
    allowed = fail_above if fail_above >= 1 else fail_above * result.items
    message = f"{result.stored} stored, {result.reused} reused"
    if result.why:
        message += f", {result.why}"
    message += f" of {result.items}; {result.money}; {result.report_uri}"
    if result.stopped_by is not None:
        return Failed(message=f"Stopped: {result.stopped_by} {message}", data=result.as_json())
    if result.not_there > allowed:
        return Failed(message=message, data=result.as_json())
    return Completed(message=message, data=result.as_json())


class _Drive:
    """Chunks through task runs, a bounded number of them at a time."""

    def __init__(self, batch: Batch, gateway: Gateway, chunk_size: int) -> None:
        self._batch = batch
        self._gateway = gateway
        self._chunk_size = chunk_size
        # A chunk's last pictures come late; one chunk more keeps the account busy meanwhile.
        self._most_chunks = -(-window_for(gateway.settings.max_in_flight) // chunk_size) + 1
        self._free = threading.Semaphore(self._most_chunks)
        self._in_the_air: dict[int, PrefectFuture[Any]] = {}
        """VersionedRecord until they have landed: Prefect complains of futures that nobody keeps."""
        self._landed: deque[Chunk] = deque()
        self._progress = ProgressShown(batch, gateway)

    def run(self) -> BatchResult:
        """To the end of the source."""
        try:
            self._gateway.call(self._batch.begin())
            number = 0
            while rows := self._gateway.call(self._batch.next_chunk(self._chunk_size)):
                number += 1
                self._wait_for_room()
                self._submit(Chunk(number, rows, self._batch, self._gateway))
            for _ in range(self._most_chunks):
                self._wait_for_room()
            self._progress.show(at_the_end=True)
            if self._batch.options.shard is not None:
                return self._gateway.call(self._batch.finish_shard())
            result = self._gateway.call(self._batch.finish())
            self._show_report(result)
            batch_finished(result.as_json())
            return result
        except BaseException:
            # A cancelled run's chunks wait in threads that nothing reaches but this.
            self._gateway.call(self._batch.interrupt())
            raise
        finally:
            self._gateway.call(self._batch.close())

    def _submit(self, chunk: Chunk) -> None:
        future = generate_chunk.submit(chunk)
        self._in_the_air[chunk.number] = future

        def landed(_: object) -> None:
            self._landed.append(chunk)
            self._free.release()

        future.add_done_callback(landed)

    def _wait_for_room(self) -> None:
        while not self._free.acquire(timeout=PROGRESS_SECONDS):
            self._progress.show()
        self._progress.show()
        while self._landed:
            self._let_go(self._landed.popleft())

    def _let_go(self, chunk: Chunk) -> None:
        """A chunk's task run has ended; what it did not do (Prefect lost it on the way) is done here."""
        del self._in_the_air[chunk.number]
        if chunk.outcomes is None:
            logger.warning("%r: its task run did not obtain its rows; they are obtained here.", chunk)
            chunk.obtain()

    def _show_report(self, result: BatchResult) -> None:
        sheet = None
        with suppress(EachlabsError):
            found = self._gateway.call(self._batch.folder.store.get(self._batch.folder.key("contact-sheet.png")))
            sheet = found.body if found is not None else None
        markdown = report_markdown(result, self._batch.first_not_there, sheet)
        key = f"eachlabs-batch-{''.join(c if c.isalnum() else '-' for c in result.batch_id.lower() if c.isascii())}"
        quietly(lambda: create_markdown_artifact(markdown, key=key, description=plain(f"Batch {result.batch_id}")))
