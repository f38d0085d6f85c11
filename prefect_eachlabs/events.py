"""Events that an automation on the Prefect server can act on: what was bought, how it ended, what a batch came to.

They hold ids, counts, costs and places; never a prompt, an input, a message of the API (which may quote one),
a signed URL or a key. Prefect adds the flow run, its deployment and its tags as related resources. An event that cannot
be sent is logged and fails nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from prefect.context import FlowRunContext, TaskRunContext
from prefect.events import emit_event

from prefect_eachlabs.errors import PredictionFailed
from prefect_eachlabs.models import Prediction, StoredImage

logger = logging.getLogger(__name__)

CREATED = "eachlabs.prediction.created"
SUCCEEDED = "eachlabs.prediction.succeeded"
FAILED = "eachlabs.prediction.failed"
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


def prediction_created(prediction: Prediction, *, since: datetime) -> None:
    """A prediction was bought by this call; one that an earlier run had bought (before `since`) is no news."""
    if prediction.created_at is not None and prediction.created_at >= since:
        _emit(CREATED, prediction.id, prediction.item_id, model=prediction.model, destination=prediction.destination)


def prediction_succeeded(prediction: Prediction) -> None:
    """A prediction ended with a picture, which is not stored yet."""
    _emit(
        SUCCEEDED,
        prediction.id,
        prediction.item_id,
        model=prediction.model,
        destination=prediction.destination,
        cost_usd=prediction.cost_usd,
        predict_time_seconds=prediction.predict_time_seconds,
    )


def image_stored(image: StoredImage) -> None:
    """A prediction ended with a picture, which is stored; a picture that was there already is no news."""
    if not image.reused:
        _emit(
            SUCCEEDED,
            image.prediction_id,
            image.item_id,
            model=image.model,
            uri=image.uri,
            cost_usd=image.cost_usd,
            predict_time_seconds=image.predict_time_seconds,
        )


def prediction_failed(error: PredictionFailed) -> None:
    """The model failed, or moderation refused; nothing was billed."""
    if error.prediction_id is not None:
        _emit(FAILED, error.prediction_id, error.item_id, kind=error.kind, code=error.code)


def batch_finished(result: Mapping[str, Any]) -> None:
    """A batch came to its end: its counts, what it cost, where the report is.

    Args:
        result: What `BatchResult.as_json` says.
    """
    facts = {name: result[name] for name in BATCH_FACTS if name in result}
    batch_id = str(facts.get("batch_id") or "batch")
    _send(BATCH_FINISHED, f"eachlabs.batch.{batch_id}", batch_id, "batch", facts)


def _emit(event: str, prediction_id: str, item_id: str | None, **facts: Any) -> None:
    payload = {"prediction_id": prediction_id, "item_id": item_id, **facts}
    _send(event, f"eachlabs.prediction.{prediction_id}", item_id or prediction_id, "prediction", payload)


def _send(event: str, resource_id: str, name: str, role: str, payload: dict[str, Any]) -> None:
    if TaskRunContext.get() is None and FlowRunContext.get() is None:
        return  # called through `.fn`: nobody runs it, and nobody listens
    resource = {"prefect.resource.id": resource_id, "prefect.resource.name": name, "eachlabs.kind": role}
    told = {key: value for key, value in payload.items() if value is not None}
    try:
        emit_event(event, resource=resource, payload=told)
    except Exception as error:
        logger.warning("The event %s could not be sent: %s: %s", event, type(error).__name__, str(error)[:200])
