"""From an item to what its POST sends: the input as the model takes it, its reference pictures under URLs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from prefect_eachlabs.api.catalogue import Catalogue
from prefect_eachlabs.api.references import References, Url
from prefect_eachlabs.errors import EachlabsError
from prefect_eachlabs.models import Destination, Item, without_signature
from prefect_eachlabs.reference_images import REFERENCE_FIELDS
from prefect_eachlabs.storage.s3_client import S3Access

Prepared = Callable[[], Awaitable[Item]]
"""Gives the item as it is sent; asked right before the POST, so that signed URLs are fresh."""


async def prepare_input(
    catalogue: Catalogue,
    references: References,
    item: Item,
    destination: Destination,
    access: S3Access | None,
    *,
    anywhere: bool = False,
) -> Prepared:
    """Checks an item's input and makes its reference pictures ready; nothing is bought when that fails.

    For the first model without a reference picture this asks nobody.

    Args:
        catalogue: Knows what the model takes.
        references: Makes pictures reachable.
        item: What is wanted.
        destination: Its bucket's objects may be reference pictures, and with `anywhere` every bucket's.
        access: How buckets are reached.
        anywhere: A person at the command line named the pictures.

    Raises:
        BadInput: Model or vendor would refuse it; says which field and why.
        EachlabsError: What must be known first could not be learned, or not be uploaded.
    """
    try:
        input = await catalogue.checked(item)
        urls: dict[str, Url] = {}
        for field in REFERENCE_FIELDS:
            for name in _names(input.get(field)):
                url = await references.ready(name, item.sources.get(name), destination, access, anywhere=anywhere)
                if url is not None:
                    urls[name] = url
    except EachlabsError as error:
        error.item_id = error.item_id or item.item_id
        raise

    async def prepared() -> Item:
        if not urls and input == item.input:
            return item
        fresh = {name: await give() for name, give in urls.items()}
        sent = {f: _replaced(value, fresh) if f in REFERENCE_FIELDS else value for f, value in input.items()}
        return item.model_copy(update={"sent_input": sent})

    return prepared


def recorded(item: Item) -> dict[str, Any] | None:
    """What a record keeps of what was sent: without signatures, and only where it is not the input itself."""
    if item.sent_input is None:
        return None
    kept = {field: _unsigned(value) if field in REFERENCE_FIELDS else value for field, value in item.sent_input.items()}
    return None if kept == item.input else kept


def _names(value: object) -> list[str]:
    return [name for name in (value if isinstance(value, list) else [value]) if isinstance(name, str)]


def _replaced(value: Any, urls: Mapping[str, str]) -> Any:
    if isinstance(value, list):
        return [_replaced(inner, urls) for inner in value]
    return urls.get(value, value) if isinstance(value, str) else value


def _unsigned(value: Any) -> Any:
    if isinstance(value, list):
        return [_unsigned(inner) for inner in value]
    return without_signature(value) if isinstance(value, str) else value
