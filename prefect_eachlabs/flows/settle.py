"""The cleanup as a flow, for a schedule of every six hours: what runs left behind is found out and stored."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from prefect_eachlabs.artifacts import settle_markdown, show_markdown
from prefect_eachlabs.blocks import gateway_of, where
from prefect_eachlabs.engine.sync_async import Plan, on_the_loop
from prefect_eachlabs.errors import OutcomeUnknown
from prefect_eachlabs.flows.decorators import async_flow, ended, sync_flow
from prefect_eachlabs.flows.form import Account, Target
from prefect_eachlabs.tasks import run_id

__all__ = ["asettle_leftovers", "settle_leftovers"]

SHOWN_REASONS = 5


@sync_flow("settle", description="Finds out what runs left behind in a bucket and stores what was paid for.")
def settle_leftovers(destination: Target = None, credentials: Account = None) -> Plan[dict[str, Any]]:
    """Settles what killed or cut-off runs left behind: stores what was paid for. Buys nothing, and may run at any time.

    Args:
        destination: Where pictures and records are: a saved block, or s3://bucket/prefix, or
            eachlabs-s3-destination/NAME. Empty: the worker's setting EACHLABS_DESTINATION.
        credentials: An Eachlabs Credentials block. Empty: the worker's environment.

    Returns:
        The counts. The run fails when nobody can tell whether something was bought: its artifact says what to do, and
        a flow that calls it is raised OutcomeUnknown.
    """
    place, access = where(destination)
    gateway = gateway_of(credentials or None)
    report = yield from on_the_loop(gateway, gateway.engine.settle(place, run_id=run_id(), access=access))
    markdown = settle_markdown(str(place), report)
    yield from show_markdown(markdown, key="eachlabs-settle", description="What runs left behind")
    said = report.in_words()
    reasons = [f"{item}: {problem}" for item, problem in sorted(report.problems.items())]
    if reasons:
        more = f" (and {len(reasons) - SHOWN_REASONS} more in the artifact)" if len(reasons) > SHOWN_REASONS else ""
        said += " " + " · ".join(reasons[:SHOWN_REASONS]) + more
    return ended(said, asdict(report), OutcomeUnknown(said) if report.ambiguous else None)


asettle_leftovers = async_flow(settle_leftovers)
"""`settle_leftovers` for async callers: awaited."""
