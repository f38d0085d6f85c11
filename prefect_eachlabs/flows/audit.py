"""The audit as a flow, for a schedule: the account's bill, joined with the records."""

from __future__ import annotations

from typing import Annotated, Any

from prefect_eachlabs.artifacts import escaped, show_markdown, table
from prefect_eachlabs.audit.auditor import Auditor, moment_of
from prefect_eachlabs.audit.pages import text_bar
from prefect_eachlabs.audit.report import ON_THE_BILL, OPEN, AuditReport
from prefect_eachlabs.blocks import gateway_of, where
from prefect_eachlabs.engine.sync_async import Plan, on_the_loop
from prefect_eachlabs.errors import OutcomeUnknown
from prefect_eachlabs.flows.decorators import async_flow, ended, sync_flow
from prefect_eachlabs.flows.form import Account, field

__all__ = ["aaudit_bill", "audit_bill"]

MOST_SHOWN = 100
"""Of each finding: an artifact travels with every look at its page."""


@sync_flow("audit", description="The account's bill, joined with the records: is all that was paid for there?")
def audit_bill(
    destinations: Annotated[str, field("Destinations")] = "",
    since: Annotated[str, field("From")] = "2d",
    until: Annotated[str, field("Until")] = "",
    credentials: Account = None,
) -> Plan[dict[str, Any]]:
    """Joins what the account was billed with what the records account for. Buys nothing, and may run at any time.

    A record that lacks the cost which the bill tells is given it; nothing else is changed.

    Args:
        destinations: Where pictures and records are, several after commas: s3://bucket/prefix, or
            eachlabs-s3-destination/NAME of a block. Empty: the worker's setting EACHLABS_DESTINATION.
        since: A day such as 2026-11-01, or an age such as 2d or 12h. Empty: as far back as the vendor lists, 90 days.
        until: The same. Empty: now.
        credentials: An Eachlabs Credentials block. Empty: the worker's environment.

    Returns:
        What `prefect-eachlabs audit --json` prints. The run fails when something was paid and is not stored, or cannot
        be told: its artifact names it and says what to do, and a flow that calls it is raised OutcomeUnknown.
    """
    places = list(dict.fromkeys(where(name) for name in destinations.split(",") if name.strip())) or [where("")]
    gateway = gateway_of(credentials or None)
    begins_at, ends_at = moment_of(since.strip() or None, "since"), moment_of(until.strip() or None, "until")
    auditor = Auditor(gateway.engine.account, since=begins_at, until=ends_at)
    report = yield from on_the_loop(gateway, auditor.audit(places))
    yield from show_markdown(audit_markdown(report), key="eachlabs-audit", description="The bill accounted for")
    said = f"{report.window}: {report.in_words()}"
    error = None if report.is_accounted_for else OutcomeUnknown(said)
    return ended(said, report.as_json(most=MOST_SHOWN), error)


aaudit_bill = async_flow(audit_bill)
"""`audit_bill` for async callers: awaited."""


def audit_markdown(report: AuditReport) -> str:
    """The bill, what is open and what to do about it, and what was spent on what."""
    bill = report.of(ON_THE_BILL)
    rows = [(escaped(kind.words), f"{found.count:,}", f"{found.usd:,.4f}") for kind, found in bill]
    rows.append(("<b>billed to the account</b>", f"{report.executions:,}", f"<b>{report.billed_usd:,.4f}</b>"))
    blocks = [
        f"<p>{escaped(', '.join(report.destinations))}<br>{escaped(report.window)}</p>",
        f"<p><b>{escaped(report.in_words())}</b></p>",
        table(rows, head=("what", "executions", "USD")),
    ]
    if report.unsettled:
        blocks.append(f"<p>The vendor has not told yet what {report.unsettled:,} of them cost.</p>")
    for kind, found in report.of(OPEN):
        shown = f", the first {MOST_SHOWN}" if found.count > MOST_SHOWN else ""
        blocks.append(f"<h2>{found.count:,} {escaped(kind.words)}{shown}</h2>")
        entries = [
            (escaped(one.item_id), escaped(one.prediction_id), _usd(one.cost_usd), escaped(one.said, 600))
            for one in found.named[:MOST_SHOWN]
        ]
        blocks.append(table(entries, head=("item", "prediction", "USD", "what is the matter, and what to do")))
    for what in ("day", "model", "destination"):
        if spent := getattr(report, f"by_{what}"):
            bars = [
                (escaped(one.name, 120), text_bar(one, spent), _usd(one.usd), f"{one.pictures:,}", _usd(one.usd_each))
                for one in spent
            ]
            blocks.append(table(bars, head=(f"USD by {what}", "", "USD", "pictures", "USD a picture")))
    if report.dearest:
        dearest = [(_usd(one.usd), one.day, escaped(one.model, 120), escaped(one.uri)) for one in report.dearest]
        blocks.append(table(dearest, head=("USD", "day", "model", "the dearest pictures")))
    return "\n".join(blocks)


def _usd(usd: float | None) -> str:
    return f"{usd:,.4f}" if usd else ""
