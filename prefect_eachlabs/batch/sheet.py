"""The contact sheet: pictures of a batch in a grid, each with a caption, drawn with Pillow (extra `demo`)."""

# ruff: noqa: PLC0415 - Pillow is an extra

from __future__ import annotations

import io
import logging
import math
import string
import textwrap
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from prefect_eachlabs.batch.outcomes import Outcome
from prefect_eachlabs.batch.worker import Worker
from prefect_eachlabs.confined import NotInstalled
from prefect_eachlabs.errors import EachlabsError
from prefect_eachlabs.images.thumbnails import NoThumbnail, thumbnail
from prefect_eachlabs.models import Destination
from prefect_eachlabs.storage.base import ObjectStore

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)

MOST_FRAMES = 60
MOST_COLUMNS = 8
THUMBNAIL_PX = 240
MOST_SECONDS = 60.0
"""For all thumbnails together: pictures that are made to be slow must not hold the batch's end."""
GAP_PX = 16
TEXT_PX, LINE_PX = 13, 17
CAPTION_LINES = 2
MOST_ID_CHARACTERS = 24
LINE_CHARACTERS = THUMBNAIL_PX // 7  # a character of the font is some 0.47 of its height wide
SHOWN = frozenset(string.printable + "“”’…·")
"""What Pillow's own font can show."""


class Frame(NamedTuple):
    """A picture of the sheet (None: none that Pillow can read), what it shows, its item and a line of facts."""

    picture: Image | None
    caption: str
    item_id: str
    note: str


def frame(data: bytes | None, caption: str, item_id: str, note: str) -> Frame:
    """A frame that keeps no more of its picture than a thumbnail."""
    from PIL import Image

    try:
        small = thumbnail(data, edge_px=THUMBNAIL_PX, format="PNG") if data is not None else None
    except (NoThumbnail, NotInstalled) as error:
        logger.info("Item %s is on the contact sheet without its picture: %s.", item_id, error)
        small = None
    if small is None:
        return Frame(None, caption, item_id, note)
    with Image.open(io.BytesIO(small)) as opened:
        return Frame(opened.convert("RGBA"), caption, item_id, note)


def contact_sheet(frames: Sequence[Frame], title: str) -> bytes:
    """The frames in reading order as a PNG. A caption that Pillow's font cannot show gives way to the item's id."""
    from PIL import Image, ImageDraw, ImageFont

    columns = min(MOST_COLUMNS, math.ceil(math.sqrt(len(frames))))
    step_x, step_y = THUMBNAIL_PX + GAP_PX, THUMBNAIL_PX + (CAPTION_LINES + 1) * LINE_PX + GAP_PX
    top = LINE_PX + 2 * GAP_PX
    sheet = Image.new("RGB", (columns * step_x + GAP_PX, top + math.ceil(len(frames) / columns) * step_y), "white")
    font = ImageFont.load_default(TEXT_PX)
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP_PX, GAP_PX), title if SHOWN.issuperset(title) else "contact sheet", "black", font)
    for number, one in enumerate(frames):
        # A cell of its own: nothing that is drawn in it runs into the next one.
        cell = Image.new("RGB", (THUMBNAIL_PX, step_y), "white")
        pen = ImageDraw.Draw(cell)
        if one.picture is None:
            pen.text((GAP_PX, THUMBNAIL_PX // 2), "no picture", "gray", font)
        else:
            cell.paste(one.picture, (0, 0), one.picture)
        caption = one.caption if SHOWN.issuperset(one.caption) else one.item_id
        lines = textwrap.wrap(caption, LINE_CHARACTERS, max_lines=CAPTION_LINES, placeholder="…")
        pen.text((0, THUMBNAIL_PX + 2), "\n".join(lines), "black", font)
        pen.text((0, THUMBNAIL_PX + CAPTION_LINES * LINE_PX + 2), one.note, "gray", font)
        sheet.paste(cell, (GAP_PX + number % columns * step_x, top + number // columns * step_y))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


async def draw_sheet(
    store: ObjectStore,
    destination: Destination,
    outcomes: Iterable[Outcome],
    totals: Mapping[str, Any],
    worker: Worker,
    small: Mapping[str, bytes],
) -> bytes | None:
    """The sheet as a PNG; None without Pillow, which a line in the log says, or without a picture.

    Args:
        store: Where the pictures are.
        destination: The same place.
        outcomes: Rows with a picture, 60 at most; one request each, but for those that are in `small`.
        totals: What stands above the pictures.
        worker: Draws beside the loop.
        small: SHA-256 of a picture → a thumbnail that is at hand.
    """
    try:
        import PIL  # noqa: F401 - is it there?
    except ImportError:
        logger.info("No contact sheet: it is drawn with Pillow: pip install 'prefect-eachlabs[demo]'.")
        return None
    frames: list[Frame] = []
    taken_seconds = 0.0
    for outcome in outcomes:
        body = small.get(outcome.sha256 or "")
        try:
            if body is None and (found := await store.get(destination.stored_key(outcome.file_name))) is not None:
                body = found.body
        except EachlabsError as error:
            logger.info("Not on the contact sheet: %s", error)
            continue
        if body is not None:
            item_id = outcome.item_id or ""
            facts = [item_id[:MOST_ID_CHARACTERS]] + ([f"${outcome.cost_usd:.3f}"] if outcome.cost_usd else [])
            body, began = body if taken_seconds < MOST_SECONDS else None, time.monotonic()
            frames.append(await worker(frame, body, outcome.prompt or item_id, item_id, " · ".join(facts)))
            taken_seconds += time.monotonic() - began
    if not frames:
        return None
    count, cost_usd = totals.get("stored", 0) + totals.get("reused", 0), totals.get("pictures_cost_usd", 0)
    title = f"{totals.get('batch_id', '')}: {len(frames)} of {count:,} pictures · ${cost_usd:,.2f}"
    return await worker(contact_sheet, frames, title)
