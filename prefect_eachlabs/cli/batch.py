"""`prefect-eachlabs batch`: a table of prompts becomes pictures in the bucket and a report, without a flow run."""

# ruff: noqa: PLC0415 - what is heavy is imported when the command runs, so that help and refusals answer at once

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from uuid import uuid4

from prefect_eachlabs.cli.account import limiter_maker
from prefect_eachlabs.cli.main import ITEM_FAILED, SET_UP_WRONG
from prefect_eachlabs.cli.options import NONE_GIVEN, PositiveNumber, PurchaseFlags, destination_of, flag
from prefect_eachlabs.errors import BadInput
from prefect_eachlabs.net.redaction import shown

if TYPE_CHECKING:
    from prefect_eachlabs.batch.outcomes import BatchResult, Outcome
    from prefect_eachlabs.batch.plan import Plan
    from prefect_eachlabs.batch.progress import Show
    from prefect_eachlabs.batch.run import Batch
    from prefect_eachlabs.batch.worker import Worker
    from prefect_eachlabs.engine.runtime import Gateway

BAR_SECONDS = 0.5
LOG_SECONDS = 30.0
DAY_SECONDS = 86_400
MOST_DAYS = 7.0
SHOWN_MESSAGES = 10
CANCELS_SECONDS = 65.0
"""Where the minute's requests are used up, the cancels wait for the next ones; a second Ctrl-C does not."""


def batch(
    source: Annotated[str, flag("the table: a path or s3://bucket/key")],
    /,
    *,
    batch_id: Annotated[str | None, flag("names the report's folder (the source's base name)")] = None,
    budget_usd: Annotated[
        PositiveNumber | None, flag("spend at most so much in this run; the rest is left out")
    ] = None,
    dry_run: Annotated[bool, flag("check every row, estimate cost and time, buy nothing")] = False,
    presigned_days: Annotated[
        PositiveNumber | None,
        flag("the page links pictures by presigned URLs that anybody may open for so long (7 at most)"),
    ] = None,
    prompt_column: Annotated[str | None, flag("the column that holds the prompts (prompt, or Prompt)")] = None,
    id_column: Annotated[str | None, flag("the column that holds the ids (id)")] = None,
    delimiter: Annotated[
        str | None, flag("what separates the cells of a CSV, such as ; (found out by its header)")
    ] = None,
    flags: PurchaseFlags = NONE_GIVEN,
) -> int:
    """A table of prompts becomes pictures in your bucket and a report, bought once each.

    The source is CSV, TSV, JSON Lines, Parquet or Excel, told by its ending. It
    needs a column 'prompt' (or 'Prompt', or the one that --prompt-column names);
    'id', 'image_url', 'model' and 'version' are used where present, 'input.NAME'
    goes into the model's input, all others are labels, kept in records and report.

    Run the same again after a kill, a failure or with new rows: what is stored is
    not bought again. The report: PREFIX/batches/BATCH_ID/report.json, report.jsonl
    (a row an item), index.html, contact-sheet.png.

    exit status: 0 every row has its picture, 1 some have not, 2 set-up wrong

    examples:
      prefect-eachlabs batch prompts.csv --to s3://acme/spring --dry-run
      prefect-eachlabs batch prompts.csv --to s3://acme/spring --budget-usd 25
    """
    from prefect_eachlabs.batch.outcomes import BatchResult
    from prefect_eachlabs.batch.plan import open_batch
    from prefect_eachlabs.batch.run import BatchOptions
    from prefect_eachlabs.batch.source import Defaults
    from prefect_eachlabs.batch.tables import Columns
    from prefect_eachlabs.models import DEFAULT_MODEL, check_model_name

    if presigned_days is not None and presigned_days > MOST_DAYS:
        raise BadInput(f"--presigned-days: S3 signs URLs for {MOST_DAYS:g} days at most.")
    options = BatchOptions(
        run_id=uuid4().hex,
        budget_usd=budget_usd,
        presigned_seconds=None if presigned_days is None else max(1, round(presigned_days * DAY_SECONDS)),
        **flags.options(),
    )
    destination = destination_of(flags.to)
    if Path(source).is_dir():
        raise BadInput(f"{source} is a folder: name the table in it.")
    columns = Columns(prompt_column, id_column, delimiter)

    def opened(gateway: Gateway, worker: Worker) -> Coroutine[Any, Any, Batch]:
        return open_batch(
            gateway.engine,
            source,
            destination,
            options,
            batch_id=batch_id,
            defaults=Defaults(check_model_name(flags.model or DEFAULT_MODEL), flags.version),
            worker=worker,
            show=show,
            show_seconds=show_seconds,
            any_source=True,
            columns=columns,
        )

    with _shown(quiet=flags.in_json or dry_run) as (show, show_seconds):
        _log_to_stderr(quiet=flags.in_json)
        answer, not_there = _run(opened, dry_run=dry_run)
    if flags.in_json:
        said = json.dumps(answer.as_json())
    else:
        said = _result_text(answer, not_there) if isinstance(answer, BatchResult) else _plan_text(answer)
    print(said, flush=True)
    if answer.is_complete:
        return 0
    return SET_UP_WRONG if answer.set_up_wrong else ITEM_FAILED


def _run(
    opened: Callable[[Gateway, Worker], Coroutine[Any, Any, Batch]], *, dry_run: bool
) -> tuple[BatchResult | Plan, Sequence[Outcome]]:
    """What came of it, and the first rows without a picture."""
    from prefect_eachlabs.batch.plan import plan_batch
    from prefect_eachlabs.batch.run import window_for
    from prefect_eachlabs.batch.worker import ThreadWorker
    from prefect_eachlabs.cli.interrupts import Interrupted, call, interrupt_summary

    worker = ThreadWorker()
    batch: Batch | None = None

    async def work(gateway: Gateway) -> BatchResult | Plan:
        nonlocal batch
        batch = await opened(gateway, worker)
        if dry_run:
            return await plan_batch(batch, gateway.settings)
        window = window_for(gateway.settings.max_in_flight)
        return await batch.run(window=window, interrupt_seconds=CANCELS_SECONDS)

    def came_of(gateway: Gateway) -> Interrupted:
        unanswered = batch.unanswered if batch else 0
        text, numbers = interrupt_summary(gateway.engine.account.interruptions, unanswered=unanswered)
        result = batch.last_result if batch else None
        if result is None:
            return Interrupted(text, numbers)
        text += f" This run was billed {result.money}. Report: {result.index_uri}. Run the same again: it goes on."
        return Interrupted(text, {**result.as_json(), **numbers})

    try:
        answer = call(limiter_maker(), work, came_of)
        return answer, batch.first_not_there if batch else ()
    finally:
        worker.close()


@contextmanager
def _shown(*, quiet: bool) -> Iterator[tuple[Show | None, float]]:
    """How progress is shown: a bar for people, lines for logs, nothing beside `--json`; always on stderr."""
    from prefect_eachlabs.batch.progress import log_lines, terminal_bar

    if quiet:
        yield None, LOG_SECONDS
    elif sys.stderr.isatty():
        with terminal_bar() as bar:
            yield bar, BAR_SECONDS
    else:
        yield log_lines, LOG_SECONDS


def _log_to_stderr(*, quiet: bool) -> None:
    """After the bar has begun: it prints what comes on stderr above itself."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if not quiet:
        logging.getLogger("prefect_eachlabs.batch").setLevel(logging.INFO)


def _result_text(result: BatchResult, not_there: Sequence[Outcome]) -> str:
    from prefect_eachlabs.batch.outcomes import RowState
    from prefect_eachlabs.batch.progress import duration

    counts = f"{result.stored:,} stored, {result.reused:,} reused, {result.failed:,} failed, "
    counts += f"{result.ambiguous:,} ambiguous, {result.skipped:,} skipped"
    lines = [f"{result.items:,} rows: {counts}; {result.money}, {duration(result.seconds)}"]
    if result.why:
        lines.append(f"Not there: {result.why}.")
        # What was left out was left out for one reason, which stands above.
        lines += _reasons(
            [one for one in not_there if one.state is not RowState.SKIPPED], result.failed + result.ambiguous
        )
    if result.stopped_by:
        lines.append(f"Stopped: {result.stopped_by}")
    lines.append(f"Report: {result.index_uri or result.report_uri}")
    return "\n".join(lines)


def _reasons(rows: Sequence[Outcome], count: int) -> list[str]:
    """The first rows without a picture, each with why."""
    lines = [f"  {_named(row)}: {(row.error or {}).get('message') or row.kind}" for row in rows[:SHOWN_MESSAGES]]
    return [*lines, f"  and {count - len(lines):,} more, in the report"] if count > len(lines) else lines


def _named(row: Outcome) -> str:
    """Where it stands, and its id where the table gives one: a fingerprint tells nobody anything."""
    is_named = not re.fullmatch(r"[0-9a-f]{32}(-\d+)?", row.item_id or "")
    return f"{row.place}, {shown(row.item_id)[:140]}" if row.item_id and is_named else row.place


def _plan_text(plan: Plan) -> str:
    from prefect_eachlabs.batch.progress import duration

    time = "unknown (the account has no limits)" if plan.seconds is None else duration(plan.seconds)
    at = f" at {plan.limits}" if plan.seconds and plan.limits else ""
    counts = f"{plan.new:,} new, {plan.reused:,} there already, {plan.failed:,} that cannot be bought"
    lines = [
        f"{plan.items:,} rows: {counts}. Nothing was bought.",
        f"The new ones would {f'cost {plan.cost} and ' if plan.cost else ''}take {time}{at}.",
    ]
    if plan.unchecked:
        lines.append(f"Inputs and prices were not checked. {plan.unchecked}")
    elif not plan.cost:
        lines.append("What they would cost is not known: neither a report nor the account's executions tell a price.")
    if plan.why:
        lines += [f"Not there: {plan.why}.", *_reasons(plan.bad_rows, 0)]
        if plan.failed > SHOWN_MESSAGES:
            lines.append(f"  and {plan.failed - SHOWN_MESSAGES:,} more: a run names all of them in its report")
    return "\n".join(lines)
