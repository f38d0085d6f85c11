"""Events that an automation on the Prefect server can act on: a picture is stored, rows of a batch failed, a batch came
to its end; and Prefect's own of an asset that was made, of a picture and of a batch.

They hold ids, counts, costs and places; never a prompt, an input, a message of the API (which may quote one),
a signed URL or a key. Prefect adds the flow run, its deployment and its tags as related resources. An event that cannot
be sent is logged and fails nothing.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import urlsplit

from prefect.assets import Asset, AssetProperties
from prefect.context import AssetContext, FlowRunContext, TaskRunContext
from prefect.events import emit_event
from prefect.states import Completed

from prefect_eachlabs.errors import InsufficientBalance
from prefect_eachlabs.models import StoredImage
from prefect_eachlabs.net.urls import has_odd_host

logger = logging.getLogger(__name__)

STORED = "eachlabs.picture.stored"
ROWS_FAILED = "eachlabs.batch.rows-failed"
BUDGET_REACHED = "eachlabs.batch.budget-reached"
BALANCE_EMPTY = "eachlabs.batch.balance-empty"
BATCH_FINISHED = "eachlabs.batch.finished"

MOST_SOURCES = 20
"""Of an asset; each is an event more, and a server takes 100 related resources."""
MOST_KEY_CHARACTERS = 512
"""Prefect's own bound."""
_NOT_IN_KEYS = re.compile(r"[^\w/.~:+=,;!$()*@-]")
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


def picture_stored(image: StoredImage, references: Iterable[str] = ()) -> None:
    """A picture was bought and is stored; one that was there already is no news.

    Args:
        image: The picture.
        references: Names of the reference pictures that it was made from.
    """
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
        _materialized(image.uri, image.item_id, references, {"uri": None, **facts})


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


def batch_finished(result: Mapping[str, Any], sources: Iterable[str] = ()) -> None:
    """A batch came to its end: its counts, what it cost, where the report is; before that, what kept it from more.

    Args:
        result: What `BatchResult.as_json` says.
        sources: Names of its table and of the reference pictures that its pictures were made from.
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
    if facts.get("stored") and "report_uri" in facts:
        folder = str(facts["report_uri"]).rpartition(f"/batches/{batch_id}/")[0]
        _materialized(f"{folder}/batches/{batch_id}", batch_id, sources, facts)


def _materialized(uri: str, name: str, upstream: Iterable[str], payload: Mapping[str, Any]) -> None:
    """Prefect's own events of an asset: what it was made from was used, and it was made.

    A server keeps them as events; where assets have pages (Prefect Cloud), they show as such.
    """
    if TaskRunContext.get() is None and FlowRunContext.get() is None:
        return
    sources = dict.fromkeys(key for one in upstream if (key := asset_key(one)) is not None)
    key = asset_key(uri)
    try:
        made = AssetContext(
            downstream_assets={Asset(key=str(key), properties=AssetProperties(name=name))},
            direct_asset_dependencies={Asset(key=source) for source in list(sources)[:MOST_SOURCES]},
            materialized_by="prefect-eachlabs",
            materialization_metadata={str(key): {n: value for n, value in payload.items() if value is not None}},
        )
        made.emit_events(Completed())
    except Exception as error:
        logger.warning("The asset %s could not be told: %s: %s", name, type(error).__name__, str(error)[:200])


def asset_key(name: str) -> str | None:
    """The URI by which Prefect knows an object; None for what has none (a file of one machine, bytes).

    Of a web address without its query, which may hold a signature; signs that Prefect does not take are dashes.

    >>> asset_key("s3://acme/tables/spring 26.csv")
    's3://acme/tables/spring-26.csv'
    """
    if has_odd_host(name):
        return None
    parts = urlsplit(name)
    if parts.scheme not in ("s3", "https", "http") or not parts.netloc or "@" in parts.netloc:
        return None
    return f"{parts.scheme}://{parts.netloc}{_NOT_IN_KEYS.sub('-', parts.path)}"[:MOST_KEY_CHARACTERS]


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
