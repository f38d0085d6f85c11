"""The cleanup as a flow, for a schedule of every six hours: what runs left behind is found out and stored."""

from __future__ import annotations

import logging
from dataclasses import asdict
from typing import Any
from uuid import uuid4

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.objects import State
from prefect.context import FlowRunContext
from prefect.states import Completed, Failed

from prefect_eachlabs.artifacts import settle_markdown
from prefect_eachlabs.blocks import gateway_of, where
from prefect_eachlabs.engine.cleanup import SettleReport
from prefect_eachlabs.flows.image import target
from prefect_eachlabs.flows.results import kept_as_json

__all__ = ["settle_leftovers"]

logger = logging.getLogger(__name__)

SHOWN_REASONS = 5


@kept_as_json
@flow(name="settle", description="Finds out what runs left behind in a bucket and stores what was paid for.")
def settle_leftovers(destination: str = "", credentials_block: str = "") -> State[dict[str, Any]]:
    """Settles what killed or cut-off runs left behind: stores what was paid for. Buys nothing, and may run at any time.

    Args:
        destination: Where pictures and records are: s3://bucket/prefix, or eachlabs-s3-destination/NAME of a block.
            Empty: the worker's setting EACHLABS_DESTINATION.
        credentials_block: The name of an Eachlabs Credentials block. Empty: the worker's environment.

    Returns:
        The counts. The run fails when nobody can tell whether something was bought: its artifact says what to do.
    """
    place, access = where(target(destination))
    gateway = gateway_of(credentials_block or None)
    context = FlowRunContext.get()
    run_id = str(context.flow_run.id) if context is not None and context.flow_run is not None else uuid4().hex
    report = gateway.call(gateway.engine.settle(place, run_id=run_id, access=access))
    try:
        create_markdown_artifact(
            settle_markdown(str(place), report), key="eachlabs-settle", description="What runs left behind"
        )
    except Exception as error:
        logger.warning("The report's artifact could not be made: %s: %s", type(error).__name__, str(error)[:200])
    return _state(report)


def _state(report: SettleReport) -> State[dict[str, Any]]:
    said = report.in_words()
    reasons = [f"{item}: {problem}" for item, problem in sorted(report.problems.items())]
    if reasons:
        more = f" (and {len(reasons) - SHOWN_REASONS} more in the artifact)" if len(reasons) > SHOWN_REASONS else ""
        said += " " + " · ".join(reasons[:SHOWN_REASONS]) + more
    return (Failed if report.ambiguous else Completed)(message=said, data=asdict(report))
