"""Adoption markers: `adopted/PREDICTION_ID` names the item that has found a prediction, exclusively."""

from __future__ import annotations

import json
import uuid
from urllib.parse import quote

from prefect_eachlabs.errors import StoreFailed
from prefect_eachlabs.ledger.records import Ledger
from prefect_eachlabs.models import ITEM_ID_PATTERN
from prefect_eachlabs.storage.base import PreconditionFailed, StoredObject

ATTEMPTS = 3


async def take_adoption_marker(ledger: Ledger, prediction_id: str, item_id: str) -> str:
    """Claims a prediction for an item, exclusively; returns the item that has it (which may be another).

    An item resumes its own marker. The marker of another item that has come by another prediction since, so that it
    will never take this one, is taken over: what was paid for must not stay with nobody.

    Raises:
        StoreFailed: The bucket did not answer.
    """
    key = ledger.destination.key(f"adopted/{quote(prediction_id, safe='')}")
    body = json.dumps({"item_id": item_id, "prediction_id": prediction_id, "write_id": uuid.uuid4().hex}).encode()
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
