"""Events that an automation on the Prefect server can act on: a picture is stored, a batch came to its end.

They hold ids, counts, costs and places; never a prompt, an input, a message of the API (which may quote one),
a signed URL or a key. Prefect adds the flow run, its deployment and its tags as related resources. An event that cannot
be sent is logged and fails nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from prefect.context import FlowRunContext, TaskRunContext
from prefect.events import emit_event

from prefect_eachlabs.models import StoredImage

logger = logging.getLogger(__name__)

STORED = "eachlabs.picture.stored"
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


def batch_finished(result: Mapping[str, Any]) -> None:
    """A batch came to its end: its counts, what it cost, where the report is.

    Args:
        result: What `BatchResult.as_json` says.
    """
    facts = {name: result[name] for name in BATCH_FACTS if name in result}
    batch_id = str(facts.get("batch_id") or "batch")
    _send(BATCH_FINISHED, f"eachlabs.batch.{batch_id}", batch_id, "batch", facts)


def _send(event: str, resource_id: str, name: str, role: str, payload: dict[str, Any]) -> None:
    if TaskRunContext.get() is None and FlowRunContext.get() is None:
        return  # called through `.fn`: nobody runs it, and nobody listens
    resource = {"prefect.resource.id": resource_id, "prefect.resource.name": name, "eachlabs.kind": role}
    told = {key: value for key, value in payload.items() if value is not None}
    try:
        emit_event(event, resource=resource, payload=told)
    except Exception as error:
        logger.warning("The event %s could not be sent: %s: %s", event, type(error).__name__, str(error)[:200])
