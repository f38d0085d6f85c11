"""Events that an automation on the Prefect server can act on: a picture is stored, rows of a batch failed, a batch came
to its end.

They hold ids, counts, costs and places; never a prompt, an input, a message of the API (which may quote one),
a signed URL or a key. Prefect adds the flow run, its deployment and its tags as related resources. An event that cannot
be sent is logged and fails nothing.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

from prefect.context import FlowRunContext, TaskRunContext
from prefect.events import emit_event

from prefect_eachlabs.errors import InsufficientBalance
from prefect_eachlabs.models import StoredImage

logger = logging.getLogger(__name__)

STORED = "eachlabs.picture.stored"
ROWS_FAILED = "eachlabs.batch.rows-failed"
BUDGET_REACHED = "eachlabs.batch.budget-reached"
BALANCE_EMPTY = "eachlabs.batch.balance-empty"
BATCH_FINISHED = "eachlabs.batch.finished"

BATCH_FACTS = (
    "batch_id",
    "items",
    "stored",
    "reused",
    "failed",
    "ambiguous",
    "skipped",
    "cost_usd",
    "pictures_cost_usd",
    "report_uri",
    "index_uri",
)


def picture_stored(image: StoredImage) -> None:
    """A picture was bought and is stored; one that was there already is no news."""
    if not image.reused:
        facts = {
            "item_id": image.item_id,
            "prediction_id": image.prediction_id,
            "model": image.model,
            "uri": image.uri,
            "cost_usd": image.cost_usd,
            "predict_time_seconds": image.predict_time_seconds,
        }
        _send(STORED, f"eachlabs.picture.{image.item_id}", image.item_id, "picture", facts)


def rows_failed(batch_id: str, rows: str, count: int, kinds: Counter[str]) -> None:
    """Rows of a chunk that were to be bought have no picture.

    The resource's label `eachlabs.failures` says `most` where that is half of the chunk or more, else `some`.

    Args:
        batch_id: Of the batch.
        rows: The chunk's name, by its rows.
        count: How many rows it has.
        kinds: How many failed, by kind; those that a budget leaves out are none of them.
    """
    failed = kinds.total()
    if failed:
        share = {"eachlabs.failures": "most" if 2 * failed >= count else "some"}
        facts = {"batch_id": batch_id, "rows": rows, "count": count, "failed": failed, "kinds": dict(kinds)}
        _send(ROWS_FAILED, f"eachlabs.batch.{batch_id}", batch_id, "batch", facts, share)


def batch_finished(result: Mapping[str, Any]) -> None:
    """A batch came to its end: its counts, what it cost, where the report is; before that, what kept it from more.

    Args:
        result: What `BatchResult.as_json` says.
    """
    facts = {name: result[name] for name in BATCH_FACTS if name in result}
    batch_id = str(facts.get("batch_id") or "batch")
    kinds: Counter[str] = sum(map(Counter, result.get("failures_by_kind", {}).values()), Counter())
    told = [
        (BUDGET_REACHED, kinds["budget"]),
        (BALANCE_EMPTY, kinds[InsufficientBalance.default_kind]),
        (BATCH_FINISHED, True),
    ]
    for event, has_happened in told:
        if has_happened:
            _send(event, f"eachlabs.batch.{batch_id}", batch_id, "batch", facts)


def _send(
    event: str,
    resource_id: str,
    name: str,
    role: str,
    payload: Mapping[str, Any],
    labels: Mapping[str, str] | None = None,
) -> None:
    if TaskRunContext.get() is None and FlowRunContext.get() is None:
        return  # called through `.fn`: nobody runs it, and nobody listens
    resource = {
        "prefect.resource.id": resource_id,
        "prefect.resource.name": name,
        "eachlabs.kind": role,
        **(labels or {}),
    }
    told = {key: value for key, value in payload.items() if value is not None}
    try:
        emit_event(event, resource={**resource, **(labels or {})}, payload=told)
    except Exception as error:
        logger.warning("The event %s could not be sent: %s: %s", event, type(error).__name__, str(error)[:200])
