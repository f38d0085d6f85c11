"""`prefect-eachlabs audit`: the account's bill, joined with the records: did I pay for anything that I do not have?"""

# ruff: noqa: PLC0415 - what is heavy is imported when the command runs, so that help and refusals answer at once

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from prefect_eachlabs.cli.account import account_gateway
from prefect_eachlabs.cli.options import InJson, destination_of, flag
from prefect_eachlabs.errors import BadInput, EachlabsError, SetupError

if TYPE_CHECKING:
    from prefect_eachlabs.audit.report import AuditReport

SHOWN = 10
WIDTH = 60


def audit(
    destinations: Annotated[
        Sequence[str], flag("s3://bucket/prefix, all that share the account (EACHLABS_DESTINATION)")
    ] = (),
    /,
    *,
    since: Annotated[
        str | None, flag("a day (2026-11-01) or an age (1d, 12h); as far back as the vendor lists")
    ] = None,
    until: Annotated[str | None, flag("the same; now")] = None,
    page: Annotated[Path | None, flag("write a page for people into this file, too")] = None,
    in_json: InJson = False,
) -> int:
    """The account's bill, joined with the records: did I pay for anything I do not have?

    Walks the account's executions once (a request for each hundred) and reads the
    records that have changed since. Says what was billed, what the records account
    for, and every difference by name, with what to do. Buys nothing; a record that
    lacks the cost which the bill tells is given it, and nothing else is changed.

    exit status: 0 every cent of these destinations is accounted for, 1 something was
    paid and is not stored or cannot be told, 2 it could not look

    examples:
      prefect-eachlabs audit s3://acme/daily
      prefect-eachlabs audit s3://acme/daily s3://acme/spring --since 7d --page bill.html
    """
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")
    from prefect_eachlabs.audit.auditor import Auditor, moment_of

    places = [destination_of(one) for one in destinations or (None,)]
    window = (moment_of(since, "--since"), moment_of(until, "--until"))
    quiet = in_json or not sys.stderr.isatty()

    def show(text: str) -> None:
        if not quiet:
            print(f"\r{text:<{WIDTH}}", end="", file=sys.stderr, flush=True)

    try:
        with account_gateway() as gateway:
            auditor = Auditor(gateway.engine.account, since=window[0], until=window[1], show=show)
            report = gateway.call(auditor.audit([(place, None) for place in dict.fromkeys(places)]))
    except EachlabsError as error:
        if isinstance(error, (BadInput, SetupError)):
            raise
        raise SetupError(f"The audit could not look: {error.message}") from error
    finally:
        show("\r")
    if page is not None:
        _write(page, report)
    print(json.dumps(report.as_json()) if in_json else _as_text(report), flush=True)
    return 0 if report.is_accounted_for else 1


def _write(path: Path, report: AuditReport) -> None:
    from prefect_eachlabs.audit.pages import audit_page

    try:
        path.expanduser().write_text(audit_page(report), encoding="utf-8")
    except OSError as error:
        raise SetupError(f"--page: {path} cannot be written: {error.strerror or error}.") from error


def _as_text(report: AuditReport) -> str:
    from prefect_eachlabs.audit.pages import text_bar
    from prefect_eachlabs.audit.report import ON_THE_BILL, OPEN, Kind

    lines = [f"{', '.join(report.destinations)}: {report.window}", ""]
    for kind, found in report.of(ON_THE_BILL):
        lines.append(f"  {kind.words:<38}{found.count:>9,}  ${found.usd:>12,.4f}")
    lines.append(f"  {'billed to the account':<38}{report.executions:>9,}  ${report.billed_usd:>12,.4f}")
    if report.unsettled:
        lines.append(f"The vendor has not told yet what {report.unsettled:,} of them cost.")
    if len(report.by_day) > 1:
        lines += ["", *(f"  {day.name}  ${day.usd:>10,.4f}  {text_bar(day, report.by_day)}" for day in report.by_day)]
    for kind, found in report.of(OPEN):
        lines += ["", f"{found.count:,} {kind.words}:"]
        for one in found.named[:SHOWN]:
            facts = [one.item_id, one.prediction_id, None if not one.cost_usd else f"${one.cost_usd:.4f}"]
            lines.append(f"  {', '.join(fact for fact in facts if fact)}: {one.said}")
        if found.count > SHOWN:
            lines.append(f"  and {found.count - SHOWN:,} more: --json names them, --page shows them")
    noted = report.of((Kind.STRAYS, Kind.CORRECTED, Kind.NOT_CORRECTED))
    lines += [f"\n{found.count:,} {kind.words}." for kind, found in noted]
    all_is_said = report.is_accounted_for
    word = "Every cent of these destinations is accounted for." if all_is_said else "Not all is accounted for."
    return "\n".join([*lines, "", word])
