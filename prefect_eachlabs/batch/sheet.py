"""The report's contact sheet: some pictures of a batch, fetched back one by one and made small at once."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from prefect_eachlabs.batch.outcomes import Outcome
from prefect_eachlabs.batch.report import Worker
from prefect_eachlabs.errors import EachlabsError, SetupError
from prefect_eachlabs.models import Destination
from prefect_eachlabs.storage.base import ObjectStore

if TYPE_CHECKING:
    from prefect_eachlabs.batch.contact_sheet import Frame

logger = logging.getLogger(__name__)

MOST_FRAMES = 60
THUMBNAIL_PX = 240


async def draw_sheet(
    store: ObjectStore, destination: Destination, outcomes: Iterable[Outcome], totals: Mapping[str, Any], worker: Worker
) -> bytes | None:
    """The sheet as a PNG; None without Pillow, which a line in the log says, or without a picture.

    Args:
        store: Where the pictures are.
        destination: The same place.
        outcomes: Rows with a picture, 60 at most; one request each.
        totals: What stands above the pictures.
        worker: Draws beside the loop.
    """
    try:
        from prefect_eachlabs.batch.contact_sheet import contact_sheet  # noqa: PLC0415 - Pillow is an extra
    except SetupError as error:
        logger.info("No contact sheet: %s", error)
        return None
    frames: list[Frame] = []
    for outcome in outcomes:
        try:
            found = await store.get(destination.key(f"images/{outcome.file_name}"))
        except EachlabsError as error:
            logger.info("Not on the contact sheet: %s", error)
            continue
        if found is not None:
            frames.append(await worker(_frame, found.body, outcome))
    if not frames:
        return None
    count = totals.get("stored", 0) + totals.get("reused", 0)
    note = f"{len(frames)} of {count:,} pictures · ${totals.get('pictures_cost_usd', 0):,.2f} · run {totals.get('run')}"
    return await worker(_drawn, contact_sheet, frames, str(totals.get("batch_id", "")), note)


def _frame(data: bytes, outcome: Outcome) -> Frame:
    from PIL import Image  # noqa: PLC0415 - an extra

    from prefect_eachlabs.batch.contact_sheet import Frame  # noqa: PLC0415 - needs Pillow

    small: bytes | None = None
    try:
        with Image.open(io.BytesIO(data)) as picture:
            picture.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
            buffer = io.BytesIO()
            picture.save(buffer, "PNG")
            small = buffer.getvalue()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        logger.info("Item %s: Pillow cannot read its picture.", outcome.item_id)
    facts = [f"row {outcome.row}"] + ([f"${outcome.cost_usd:.3f}"] if outcome.cost_usd else [])
    return Frame(small, outcome.prompt or outcome.item_id or "", " · ".join(facts))


def _drawn(draw: Any, frames: list[Frame], title: str, note: str) -> bytes:
    sheet: bytes = draw(frames, title=title, note=note, thumbnail_px=THUMBNAIL_PX)
    return sheet
