"""Adoption markers: `adopted/PREDICTION_ID` names the item that has found a prediction, exclusively."""

from __future__ import annotations

import hashlib
import json
import logging
import uuid
from datetime import datetime, timedelta
from urllib.parse import quote

from prefect_eachlabs.errors import OutcomeUnknown, StoreFailed
from prefect_eachlabs.ledger.records import Ledger, RecordChanged, RecordError, RecordState, VersionedRecord, amended
from prefect_eachlabs.models import ITEM_ID_PATTERN
from prefect_eachlabs.storage.base import PreconditionFailed, StoredObject

logger = logging.getLogger(__name__)

ATTEMPTS = 3
LONGEST_NAME = 200
"""Characters; a destination's prefix may have 700 bytes of the 1,024 of a key."""


def marker_key(ledger: Ledger, prediction_id: str) -> str:
    """`PREFIX/adopted/PREDICTION_ID`, within S3's 1,024 bytes whatever the API calls its predictions."""
    name = quote(prediction_id, safe="")
    if len(name) > LONGEST_NAME:
        name = hashlib.sha256(prediction_id.encode()).hexdigest()
    return ledger.destination.key(f"adopted/{name}")


async def lock_prediction(ledger: Ledger, prediction_id: str, item_id: str, *, since: datetime | None = None) -> str:
    """Claims a prediction for an item, exclusively; returns the item that has it (which may be another).

    An item resumes its own marker. The marker of another item that has come by another prediction since, so that it
    will never take this one, is taken over: what was paid for must not stay with nobody.

    Args:
        since: The bucket's time of the claim whose lost order the prediction is taken for: that order may have bought
            another one, which the prediction's own buyer looks for then.

    Raises:
        StoreFailed: The bucket did not answer.
    """
    key = marker_key(ledger, prediction_id)
    said = {"item_id": item_id, "prediction_id": prediction_id, "write_id": uuid.uuid4().hex}
    body = json.dumps(said if since is None else {**said, "since": since.isoformat()}).encode()
    replacing: StoredObject | None = None
    for _ in range(ATTEMPTS):
        try:
            await ledger.store.put(
                key,
                body,
                content_type="application/json",
                if_match=replacing.etag if replacing else None,
                if_absent=replacing is None,
            )
            return item_id
        except (PreconditionFailed, StoreFailed):
            replacing = await ledger.store.get(key)
        if replacing is not None:
            holder = _holder(replacing)
            if holder == item_id or await _wants(ledger, holder, prediction_id):
                return holder
    raise StoreFailed(f"The marker {ledger.store.uri(key)} could not be written: run again.", item_id=item_id)


async def yield_to_its_owner(ledger: Ledger, held: VersionedRecord) -> None:
    """Before a record is finished by somebody who did not just buy its prediction: is that another item's by now?

    It is when the buyer stood still before it wrote the prediction down, and was killed right after that: an equal
    order of another item, whose answer was lost, was given it meanwhile. What that order itself has bought is looked
    for then, as this item's.

    Raises:
        RecordChanged: It is; the record is to be settled again.
        StoreFailed: The bucket did not answer.
    """
    record = held.record
    marker = record.prediction_id and await ledger.store.get(marker_key(ledger, record.prediction_id))
    if not marker or record.prediction_id is None or _holder(marker) == record.item_id:
        return
    holder = await lock_prediction(ledger, record.prediction_id, record.item_id)
    if holder == record.item_id or not ITEM_ID_PATTERN.fullmatch(holder):
        return
    logger.warning(
        "Item %s: its prediction %s was adopted by item %s, which has the same input; what that one's own order has "
        "bought is looked for.",
        record.item_id,
        record.prediction_id,
        holder,
    )
    said = f"Prediction {record.prediction_id} was adopted by item {holder}, which has the same input."
    back = amended(
        record,
        state=RecordState.AMBIGUOUS,
        prediction_id=None,
        created_at=None,
        unsettled_since=order_of(marker),
        error=RecordError(kind=OutcomeUnknown.default_kind, message=said),
    )
    raise RecordChanged(await ledger.write(back, replacing=held))


def order_of(marker: StoredObject) -> datetime:
    """The bucket's time of the claim whose lost order the marker's prediction was taken for."""
    try:
        since = datetime.fromisoformat(json.loads(marker.body)["since"])
    except (ValueError, KeyError, TypeError, RecursionError):
        since = None
    if since is not None and since.tzinfo is not None:
        return since
    # Markers of earlier versions do not say: an order is settled within the hour, mostly.
    return marker.date - timedelta(seconds=marker.age_seconds) - timedelta(hours=1)


def _holder(marker: StoredObject) -> str:
    try:
        holder = json.loads(marker.body)["item_id"]
    except (ValueError, KeyError, TypeError, RecursionError):
        holder = None
    return holder if isinstance(holder, str) else "(an unreadable marker)"


async def _wants(ledger: Ledger, item_id: str, prediction_id: str) -> bool:
    """Whether the holder of a marker may still take its prediction, or has taken it."""
    if not ITEM_ID_PATTERN.fullmatch(item_id):
        return True
    held = await ledger.read(item_id)
    if held is None:
        return False
    return held.record.may_have_bought_unseen or prediction_id in held.record.named_predictions
