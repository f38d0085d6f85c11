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
from collections.abc import Callable, Iterable, Mapping
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
    *("batch_id", "items", "stored", "reused", "failed", "ambiguous", "skipped"),
    *("cost_usd", "pictures_cost_usd", "report_uri", "index_uri"),
)
PICTURE_FACTS = ("item_id", "prediction_id", "model", "uri", "cost_usd", "predict_time_seconds")


def picture_stored(image: StoredImage, references: Iterable[str] = ()) -> None:
    """A picture was bought and is stored, made from reference pictures of these names; what was there is no news."""
    if not image.reused:
        facts = {name: getattr(image, name) for name in PICTURE_FACTS}
        _send(STORED, "picture", image.item_id, facts)
        _materialized(image.uri, image.item_id, references, facts)


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
        _send(ROWS_FAILED, "batch", batch_id, facts, share)


def batch_finished(result: Mapping[str, Any], sources: Iterable[str] = ()) -> None:
    """A batch came to its end: its counts, what it cost, where the report is; before that, what kept it from more.

    Args:
        result: What `BatchResult.as_json` says.
        sources: Names of its table and of the reference pictures that its pictures were made from.
    """
    facts = {name: result[name] for name in BATCH_FACTS if name in result}
    batch_id = str(facts.get("batch_id") or "batch")
    kinds: Counter[str] = sum(map(Counter, result.get("failures_by_kind", {}).values()), Counter())
    kept_from = {BUDGET_REACHED: kinds["budget"], BALANCE_EMPTY: kinds[InsufficientBalance.default_kind]}
    for event in (*(event for event, count in kept_from.items() if count), BATCH_FINISHED):
        _send(event, "batch", batch_id, facts)
    if facts.get("stored") and "report_uri" in facts:
        folder = str(facts["report_uri"]).rpartition(f"/batches/{batch_id}/")[0]
        _materialized(f"{folder}/batches/{batch_id}", batch_id, sources, facts)


def _materialized(uri: str, name: str, upstream: Iterable[str], facts: Mapping[str, Any]) -> None:
    """Prefect's own events of an asset: what it was made from was used, and it was made.

    A server keeps them as events; where assets have pages (Prefect Cloud), they show as such.
    """
    sources = dict.fromkeys(key for one in upstream if (key := asset_key(one)) is not None)
    key = str(asset_key(uri))

    def emit() -> None:
        AssetContext(
            downstream_assets={Asset(key=key, properties=AssetProperties(name=name))},
            direct_asset_dependencies={Asset(key=source) for source in list(sources)[:MOST_SOURCES]},
            materialized_by="prefect-eachlabs",
            materialization_metadata={key: _without_none(facts)},
        ).emit_events(Completed())

    _tell(f"asset {name}", emit)


def asset_key(name: str) -> str | None:
    """The URI by which Prefect knows an object; None for what has none (a file of one machine, bytes).

    Of a web address without its query, which may hold a signature; signs that Prefect does not take are dashes.

    >>> asset_key("s3://acme/tables/spring 26.csv")
    's3://acme/tables/spring-26.csv'
    """
    try:
        parts = urlsplit("" if has_odd_host(name) else name)
    except ValueError:
        return None
    if parts.scheme not in ("s3", "https", "http") or not parts.netloc or "@" in parts.netloc:
        return None
    return f"{parts.scheme}://{parts.netloc}{_NOT_IN_KEYS.sub('-', parts.path)}"[:MOST_KEY_CHARACTERS]


def _send(event: str, kind: str, name: str, facts: Mapping[str, Any], labels: Mapping[str, str] | None = None) -> None:
    resource = {
        "prefect.resource.id": f"eachlabs.{kind}.{name}",
        "prefect.resource.name": name,
        "eachlabs.kind": kind,
        **(labels or {}),
    }
    _tell(f"event {event}", lambda: emit_event(event, resource=resource, payload=_without_none(facts)))


def _without_none(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if value is not None}


def _tell(what: str, emit: Callable[[], object]) -> None:
    if TaskRunContext.get() is None and FlowRunContext.get() is None:
        return  # called through `.fn`: nobody runs it, and nobody listens
    try:
        emit()
    except Exception as error:
        logger.warning("The %s could not be sent: %s: %s", what, type(error).__name__, str(error)[:200])
