"""The flow over a table of prompts in a file: `generate_rows` for deployments and forms."""

from __future__ import annotations

import dataclasses
from typing import Annotated, cast

from prefect.runtime import flow_run

from prefect_eachlabs.batch.outcomes import BatchResult
from prefect_eachlabs.batch.report import BATCH_ID_PATTERN
from prefect_eachlabs.batch.tables import Columns, base_name
from prefect_eachlabs.engine.sync_async import Plan, beside_the_loop
from prefect_eachlabs.errors import BadInput, BatchIncomplete
from prefect_eachlabs.flows import form
from prefect_eachlabs.flows.decorators import async_flow, ended, sync_flow
from prefect_eachlabs.flows.shards import MOST_SHARDS, end_shares, one_of, start_shares
from prefect_eachlabs.models import DEFAULT_MODEL
from prefect_eachlabs.rows import CHUNK_SIZE, MOST_DAYS, MOST_IN_A_CHUNK, Work, options_of
from prefect_eachlabs.settings import destination_from_environment
from prefect_eachlabs.tasks import run_id, shortened

BATCH_ID = f"^({BATCH_ID_PATTERN.pattern})?$"


def _named_for_its_batch() -> str:
    """Names a run for its batch, so that a person finds it in the UI."""
    parameters = flow_run.parameters
    try:
        name = shortened(parameters.get("batch_id") or base_name(str(parameters.get("source")).strip()))
    except BadInput:
        return "batch"  # the flow says what is wrong
    share = parameters.get("shard")
    return f"batch {name}, share {share}" if share else f"batch {name}"


@sync_flow(
    "generate-batch",
    description="A table of prompts becomes PNGs in S3 and a report, each bought once.",
    flow_run_name=_named_for_its_batch,
)
def generate_batch(  # noqa: PLR0917 - the UI's form has no keywords
    source: form.Table,
    destination: form.Target = None,
    budget_usd: Annotated[float | None, form.field("Budget in USD", exclusiveMinimum=0)] = None,
    dry_run: Annotated[bool, form.field("Dry run")] = False,
    model: form.Model = DEFAULT_MODEL,
    formats: form.Formats = None,
    batch_id: Annotated[str | None, form.field("Name of the report", pattern=BATCH_ID)] = None,
    fail_above: Annotated[float, form.field("Rows that may fail", minimum=0)] = 0.0,
    retry_failed: Annotated[bool, form.field("Buy again what failed for good")] = False,
    credentials: form.Account = None,
    version: form.Version = None,
    shards: Annotated[int, form.advanced("workers at once", minimum=1, maximum=MOST_SHARDS)] = 1,
    presigned_days: Annotated[
        float | None, form.advanced("days that links last", exclusiveMinimum=0, maximum=MOST_DAYS)
    ] = None,
    replace: Annotated[bool, form.advanced("buy although a name stands for another input")] = False,
    rebuy_missing: Annotated[bool, form.advanced("buy again what is gone from the bucket")] = False,
    retry_ambiguous: Annotated[bool, form.advanced("buy once more what is ambiguous")] = False,
    on_ambiguous: form.OnAmbiguous = "settle",
    chunk_size: Annotated[int, form.advanced("rows to a task run", minimum=1, maximum=MOST_IN_A_CHUNK)] = CHUNK_SIZE,
    shard: Annotated[str, form.advanced("share of a batch", pattern="^([1-9][0-9]?/[1-9][0-9]?)?$")] = "",
    prompt_column: Annotated[str | None, form.advanced("column of prompts")] = None,
    id_column: Annotated[str | None, form.advanced("column of names")] = None,
    delimiter: Annotated[str | None, form.advanced("separator of a CSV")] = None,
) -> Plan[BatchResult]:
    """A table of prompts becomes PNGs in S3 and a report; run it again and it goes on. **Costs money** once a row.

    Args:
        source: CSV, TSV, JSON Lines, Parquet or Excel: s3://bucket/key, or a path. Its bucket or folder must be named
            in the worker's setting EACHLABS_REFERENCE_ROOTS. It needs a column prompt (or Prompt).
        destination: Where pictures and report go: a saved block, or s3://bucket/prefix, or
            eachlabs-s3-destination/NAME. Empty: the worker's setting EACHLABS_DESTINATION.
        budget_usd: Spend at most so much in this run; what it does not cover is left out. Empty: no budget.
        dry_run: Check every row, estimate cost and time, buy nothing.
        model: The model of rows that name none; `prefect-eachlabs models` lists them.
        formats: What may be stored; what else comes is refused. Empty: whatever the model gives.
        batch_id: Names the report's folder. Empty: the source's base name.
        fail_above: The run fails when more rows than this have no picture: below 1 a share of all rows (0.05), from 1
            on a number of rows. 0: every row must have its picture.
        retry_failed: Of an earlier run; what moderation refused, say, is refused again.
        credentials: An Eachlabs Credentials block. Empty: the worker's environment.
        version: Of the model of rows that name none. Empty: the default model has its own, and others need none.
        shards: On so many workers; the source must be readable on each. Not together with a budget.
        presigned_days: The report's page links pictures by presigned URLs that anybody may open for so long, 7 at
            most. Empty: by paths beside the page.
        replace: The picture that is there is bought anew, for the new input.
        rebuy_missing: Of pictures that were stored, and that somebody has deleted.
        retry_ambiguous: Somebody has looked in the vendor's dashboard: what stands as ambiguous was not bought.
        on_ambiguous: Settle: find out what was bought. Fail: report it.
        chunk_size: So many rows show as one task run, 1 to 100.
        shard: Such as 2/4. The run with shards=4 starts such runs; leave it empty.
        prompt_column: Where it is not called prompt (or Prompt).
        id_column: Where it is not called id.
        delimiter: One character, such as ; (or \\t for a tab). Empty: found out by the header.

    Returns:
        The totals (stored, reused, failed, ambiguous, skipped), costs, and where the report is. Called by another flow
        it raises BatchIncomplete, which holds them, when more rows than `fail_above` allows have no picture. Of a dry
        run: a dict.
    """
    options = options_of(
        run_id=run_id(),
        budget_usd=budget_usd,
        fail_above=fail_above,
        presigned_days=presigned_days,
        chunk_size=chunk_size,
        formats=formats,
        replace=replace,
        rebuy_missing=rebuy_missing,
        retry_failed=retry_failed,
        retry_ambiguous=retry_ambiguous,
        on_ambiguous=on_ambiguous,
        shard=one_of(shard),
    )
    if isinstance(destination, str):
        destination = destination.strip()
    destination = destination or destination_from_environment()
    columns = Columns(prompt_column or None, id_column or None, delimiter or None)
    work = Work(
        str(source).strip(), destination, batch_id or None, model, version or None, credentials or None, columns
    )
    if dry_run:
        plan = yield from work.planned(options)
        counts = f"{plan.new} new, {plan.reused} there, {plan.failed} that cannot be bought"
        return ended(f"Nothing was bought: {counts}.", cast(BatchResult, plan.as_json()))
    if shards == 1:
        return _ended((yield from work.bought(options, chunk_size=chunk_size)), fail_above)
    if budget_usd is not None:
        raise BadInput("shards: a budget is kept by one worker: give shards=1 with budget_usd, or no budget.")
    # Every share has the same, whatever its own worker's environment says.
    same = {"destination": form.name_of(destination), "credentials": form.name_of(credentials)}
    parameters = {**flow_run.parameters, **same}
    others = yield from beside_the_loop(lambda: start_shares(shards, parameters))
    is_done = False
    try:
        yield from work.bought(dataclasses.replace(options, shard=(0, shards)), chunk_size=chunk_size)
        # What failed in this very run is not tried again, and what it bought is its own.
        everything = dataclasses.replace(
            options, retry_failed=False, retry_ambiguous=False, bought_here=frozenset(map(str, others))
        )
        result = yield from work.bought(everything, chunk_size=chunk_size)
        is_done = True
    finally:
        yield from beside_the_loop(lambda: end_shares(others, also_running=not is_done))
    return _ended(result, fail_above)


agenerate_batch = async_flow(generate_batch)
"""`generate_batch` for async callers: awaited. **Costs money** once a row."""


def _ended(result: BatchResult, fail_above: float) -> BatchResult:
    """Completed, or Failed when more rows than allowed have no picture; the message has the reasons by kind."""
    message = result.in_words()
    return ended(message, result, BatchIncomplete(message, result=result) if result.exceeds(fail_above) else None)
