"""`prefect-eachlabs batch`: a table of prompts becomes pictures in the bucket and a report, without a flow run."""

# ruff: noqa: PLC0415 - what is heavy is imported when the command runs, so that help and refusals answer at once

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Coroutine
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from prefect_eachlabs.cli.generate import source_of_places
from prefect_eachlabs.cli.options import add_purchase_flags, positive_number

if TYPE_CHECKING:
    from prefect_eachlabs.batch.outcomes import BatchResult
    from prefect_eachlabs.batch.plan import Plan
    from prefect_eachlabs.batch.progress import Show
    from prefect_eachlabs.batch.report import Worker
    from prefect_eachlabs.batch.run import Batch, BatchOptions
    from prefect_eachlabs.engine.runtime import Gateway

BAR_SECONDS = 0.5
LOG_SECONDS = 30.0
DAY_SECONDS = 86_400
MOST_DAYS = 7.0
SHOWN_MESSAGES = 20
CANCELS_SECONDS = 65.0
"""Where the minute's requests are used up, the cancels wait for the next ones; a second Ctrl-C does not."""

EPILOG = """\
The source is CSV, TSV, JSON Lines or Parquet, told by its ending: a path, or s3://BUCKET/KEY. It needs a column
'prompt' (or 'Prompt'); 'id', 'image_url', 'model' and 'version' are used where present, 'input.NAME' goes into the
model's input, all others are labels, kept in records and report.

Run the same again after a kill, a failure or with new rows: what is stored is not bought again.
The report: PREFIX/batches/BATCH_ID/report.json, report.jsonl (a row an item), index.html, contact-sheet.png.

exit status: 0 every row has its picture, 1 some have not, 2 usage or set-up wrong

examples:
  prefect-eachlabs batch prompts.csv --to s3://acme/spring --dry-run
  prefect-eachlabs batch prompts.csv --to s3://acme/spring --budget-usd 25
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("source", metavar="SOURCE", help="the table: a path or s3://BUCKET/KEY")
    add_purchase_flags(parser)
    parser.add_argument("--batch-id", metavar="ID", help="names the report's folder (the source's base name)")
    parser.add_argument(
        "--budget-usd",
        type=positive_number,
        metavar="X",
        help="spend at most so much in this run; the rest is left out",
    )
    parser.add_argument("--dry-run", action="store_true", help="check every row, estimate cost and time, buy nothing")
    parser.add_argument(
        "--presigned-days",
        type=positive_number,
        metavar="D",
        help="the page links pictures by presigned URLs that anybody may open for so long (7 at most)",
    )


def run(arguments: argparse.Namespace) -> int:
    from prefect_eachlabs.batch.run import BatchOptions
    from prefect_eachlabs.errors import BadInput
    from prefect_eachlabs.images.formats import check_formats

    days = arguments.presigned_days
    if days is not None and days > MOST_DAYS:
        raise BadInput(f"--presigned-days: S3 signs URLs for {MOST_DAYS:g} days at most.")
    options = BatchOptions(
        run_id=uuid4().hex,
        budget_usd=arguments.budget_usd,
        replace=arguments.replace,
        rebuy_missing=arguments.rebuy_missing,
        retry_failed=arguments.retry_failed,
        on_ambiguous=arguments.on_ambiguous,
        retry_ambiguous=arguments.retry_ambiguous,
        deadline_seconds=arguments.deadline_seconds,
        formats=check_formats(arguments.formats),
        presigned_seconds=None if days is None else max(1, round(days * DAY_SECONDS)),
    )
    bar, show, show_seconds = _shown(arguments)
    with bar:
        _log_to_stderr(quiet=arguments.json)
        answer = _run(arguments, options, (show, show_seconds))
    print(json.dumps(answer.as_json()) if arguments.json else _as_text(answer), flush=True)
    if answer.is_complete:
        return 0
    return 2 if answer.set_up_wrong else 1


def _run(arguments: argparse.Namespace, options: BatchOptions, shown: tuple[Show | None, float]) -> BatchResult | Plan:
    from prefect_eachlabs.batch.plan import ThreadWorker
    from prefect_eachlabs.cli.interrupts import Interrupted, call, what_came_of

    worker = ThreadWorker()
    opened: list[Batch] = []

    def work(gateway: Gateway) -> Coroutine[Any, Any, BatchResult | Plan]:
        return _work(gateway, arguments, options, worker, shown, opened)

    def came_of(gateway: Gateway) -> Interrupted:
        ends = gateway.engine.account.interruptions
        text, numbers = what_came_of(ends, unanswered=sum(batch.unanswered for batch in opened))
        result = next((batch.last_result for batch in opened if batch.last_result is not None), None)
        if result is None:
            return Interrupted(text, numbers)
        text += f" This run was billed {result.money}. Report: {result.index_uri}. Run the same again: it goes on."
        return Interrupted(text, {**result.as_json(), **numbers})

    try:
        return call(source_of_places(), work, came_of)
    finally:
        worker.close()


async def _work(
    gateway: Gateway,
    arguments: argparse.Namespace,
    options: BatchOptions,
    worker: Worker,
    shown: tuple[Show | None, float],
    opened: list[Batch],
) -> BatchResult | Plan:
    from prefect_eachlabs.batch.plan import open_batch, plan_batch, run_batch
    from prefect_eachlabs.batch.run import window_for
    from prefect_eachlabs.batch.source import Defaults
    from prefect_eachlabs.models import DEFAULT_MODEL, Destination, check_model_name
    from prefect_eachlabs.settings import destination_from_environment

    show, show_seconds = shown
    batch = await open_batch(
        gateway.engine,
        arguments.source,
        Destination.parse(arguments.to or destination_from_environment()),
        options,
        batch_id=arguments.batch_id,
        defaults=Defaults(check_model_name(arguments.model or DEFAULT_MODEL), arguments.version),
        worker=worker,
        show=show,
        show_seconds=show_seconds,
        any_source=True,
    )
    opened.append(batch)
    if arguments.dry_run:
        return await plan_batch(batch, gateway.settings)
    window = window_for(gateway.settings.max_in_flight)
    return await run_batch(batch, window=window, interrupt_seconds=CANCELS_SECONDS)


def _shown(arguments: argparse.Namespace) -> tuple[AbstractContextManager[object], Show | None, float]:
    """How progress is shown: a bar for people, lines for logs, nothing beside `--json`; always on stderr."""
    from prefect_eachlabs.batch.progress import TerminalBar, log_lines

    if arguments.json or arguments.dry_run:
        return nullcontext(), None, LOG_SECONDS
    if sys.stderr.isatty():
        bar = TerminalBar()
        return bar, bar, BAR_SECONDS
    return nullcontext(), log_lines, LOG_SECONDS


def _log_to_stderr(*, quiet: bool) -> None:
    """After the bar has begun: it prints what comes on stderr above itself."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if not quiet:
        logging.getLogger("prefect_eachlabs.batch").setLevel(logging.INFO)


def _as_text(answer: BatchResult | Plan) -> str:
    from prefect_eachlabs.batch.outcomes import BatchResult

    return _result_text(answer) if isinstance(answer, BatchResult) else _plan_text(answer)


def _result_text(result: BatchResult) -> str:
    from prefect_eachlabs.batch.progress import duration

    counts = f"{result.stored:,} stored, {result.reused:,} reused, {result.failed:,} failed, "
    counts += f"{result.ambiguous:,} ambiguous, {result.skipped:,} skipped"
    lines = [f"{result.items:,} rows: {counts}; {result.money}, {duration(result.seconds)}"]
    if result.why:
        lines.append(f"Not there: {result.why}.")
    if result.stopped_by:
        lines.append(f"Stopped: {result.stopped_by}")
    lines.append(f"Report: {result.index_uri or result.report_uri}")
    return "\n".join(lines)


def _plan_text(plan: Plan) -> str:
    from prefect_eachlabs.batch.progress import duration

    cost = (
        "unknown (neither a report nor the account's executions tell a price)"
        if plan.cost_usd is None
        else f"${plan.cost_usd:,.2f}"
    )
    time = "unknown (the account has no limits)" if plan.seconds is None else duration(plan.seconds)
    counts = f"{plan.new:,} new, {plan.reused:,} there already, {plan.failed:,} that cannot be bought"
    lines = [
        f"{plan.items:,} rows: {counts}. Nothing was bought.",
        f"The new ones would cost {cost} and take {time}.",
    ]
    if plan.why:
        lines.append(f"Not there: {plan.why}.")
    for row in plan.bad_rows[:SHOWN_MESSAGES]:
        lines.append(f"  row {row.row}: {(row.error or {}).get('message') or ''}")
    return "\n".join(lines)
