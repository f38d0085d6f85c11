"""The contact sheet, read back with Pillow: every picture is there, and no text breaks it."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from prefect_eachlabs.batch.sheet import THUMBNAIL_PX, contact_sheet, frame
from tests.images.test_png import verify_png

RED, GREEN, BLUE = (220, 30, 40), (20, 160, 70), (30, 60, 200)


def picture(
    colour: tuple[int, ...], size_px: tuple[int, int] = (THUMBNAIL_PX, THUMBNAIL_PX), mode: str = "RGB"
) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size_px, colour).save(buffer, "PNG")
    return buffer.getvalue()


def opened(*frames: tuple[bytes | None, str]) -> Image.Image:
    sheet = contact_sheet([frame(data, caption, "item-7", "row 7") for data, caption in frames], "spring")
    verify_png(sheet)
    image = Image.open(io.BytesIO(sheet))
    image.load()
    return image


def count(image: Image.Image, colour: tuple[int, int, int]) -> int:
    """How many pixels are exactly of a colour."""
    return {seen: number for number, seen in image.getcolors(image.width * image.height) or []}.get(colour, 0)


def test_every_picture_is_on_the_sheet_in_reading_order() -> None:
    sheet = opened(*((picture(colour), "a colour") for colour in (RED, GREEN, BLUE)))
    pixels = list(zip(*[iter(sheet.tobytes())] * 3, strict=True))
    (red_y, red_x), (green_y, green_x), (blue_y, _) = (
        divmod(pixels.index(colour), sheet.width) for colour in (RED, GREEN, BLUE)
    )
    assert (red_x < green_x, red_y == green_y, blue_y > red_y) == (True, True, True)
    assert {count(sheet, colour) for colour in (RED, GREEN, BLUE)} == {THUMBNAIL_PX**2}


def test_a_picture_that_is_not_square_keeps_its_proportions_and_is_never_enlarged() -> None:
    sheet = opened((picture(RED, (960, 240)), ""), (picture(BLUE, (10, 10)), ""))
    assert count(sheet, RED) == 240 * 60
    assert count(sheet, BLUE) == 10 * 10


def test_a_transparent_picture_lies_on_white() -> None:
    assert count(opened((picture((220, 30, 40, 0), mode="RGBA"), "")), RED) == 0


@pytest.mark.parametrize("data", [None, b"", b"<html>", picture(RED)[:60]], ids=["none", "empty", "html", "truncated"])
def test_what_is_not_a_picture_leaves_its_place_empty(data: bytes | None) -> None:
    sheet = opened((data, "a caption"), (picture(GREEN), ""))
    assert count(sheet, GREEN) == THUMBNAIL_PX**2
    assert count(sheet, RED) == 0


@pytest.mark.parametrize("caption", ["", " \n ", "A robot " * 500, "x" * 5_000, "“Fox” – naïve", "\x07 \udcff", "🦊"])
def test_no_caption_breaks_the_sheet_or_makes_it_wider(caption: str) -> None:
    assert opened((None, caption)).size == opened((None, "short")).size


def test_a_caption_that_the_font_cannot_show_gives_way_to_the_items_id() -> None:
    assert opened((None, "雪の中の赤い狐")).tobytes() == opened((None, "item-7")).tobytes()
    assert opened((None, "a red fox")).tobytes() != opened((None, "item-7")).tobytes()
