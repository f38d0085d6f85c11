"""The contact sheet, read back with Pillow: every picture is there, and no text breaks it."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from prefect_eachlabs.batch import contact_sheet as room
from prefect_eachlabs.batch.contact_sheet import EMPTY, PAPER, Frame, contact_sheet
from prefect_eachlabs.images.png import verify_png

RED, GREEN, BLUE = (220, 30, 40), (20, 160, 70), (30, 60, 200)


def picture(colour: tuple[int, ...], size_px: tuple[int, int] = (64, 64), mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size_px, colour).save(buffer, "PNG")
    return buffer.getvalue()


def opened(sheet: bytes) -> Image.Image:
    verify_png(sheet)
    image = Image.open(io.BytesIO(sheet))
    image.load()
    return image


def count(image: Image.Image, colour: tuple[int, int, int]) -> int:
    """How many pixels are exactly of a colour."""
    return {seen: number for number, seen in image.getcolors(image.width * image.height) or []}.get(colour, 0)


def test_every_picture_is_on_the_sheet_in_reading_order() -> None:
    frames = [Frame(picture(colour, (200, 200)), "a colour", "item") for colour in (RED, GREEN, BLUE)]
    sheet = opened(contact_sheet(frames, columns=2, thumbnail_px=100))
    found: dict[object, tuple[int, int]] = {}
    for y in range(sheet.height):
        for x in range(sheet.width):
            found.setdefault(sheet.getpixel((x, y)), (x, y))
    assert found[RED][0] < found[GREEN][0]
    assert found[RED][1] == found[GREEN][1]
    assert found[BLUE][1] > found[RED][1]
    for colour in (RED, GREEN, BLUE):
        assert count(sheet, colour) > 9_000  # of 10,000: round corners


@pytest.mark.parametrize(("number", "columns"), [(1, 1), (2, 2), (3, 3), (6, 3), (12, 5), (40, 8)], ids=str)
def test_the_number_of_columns_follows_the_number_of_pictures(number: int, columns: int) -> None:
    frames = [Frame(None, "") for _ in range(number)]
    one = opened(contact_sheet(frames[:1], thumbnail_px=48))
    sheet = opened(contact_sheet(frames, thumbnail_px=48))
    gap_px = 8
    assert one.width == 48 + 2 * gap_px
    assert sheet.width == gap_px + columns * (48 + gap_px)


def test_a_picture_that_is_not_square_keeps_its_proportions_and_is_never_enlarged() -> None:
    sheet = opened(
        contact_sheet([Frame(picture(RED, (400, 100)), ""), Frame(picture(BLUE, (10, 10)), "")], thumbnail_px=100)
    )
    assert count(sheet, RED) == 100 * 25
    assert count(sheet, BLUE) == 10 * 10


def test_a_transparent_picture_lies_on_white() -> None:
    sheet = opened(contact_sheet([Frame(picture((220, 30, 40, 0), (100, 100), "RGBA"), "")], thumbnail_px=100))
    assert count(sheet, RED) == 0
    assert count(sheet, EMPTY) == 0


@pytest.mark.parametrize("data", [None, b"", b"<html>", picture(RED)[:60]], ids=["none", "empty", "html", "truncated"])
def test_what_is_no_picture_leaves_its_place_empty(data: bytes | None) -> None:
    sheet = opened(contact_sheet([Frame(data, "a caption"), Frame(picture(GREEN, (100, 100)), "")], thumbnail_px=100))
    assert count(sheet, EMPTY) > 7_000
    assert count(sheet, GREEN) > 9_000


@pytest.mark.parametrize(
    "caption",
    [
        "",
        " \n ",
        "A robot " * 500,
        "x" * 5_000,
        "雪の中の赤い狐",
        "Маяк на скале",
        "مدينة في الصحراء",
        "🦊👩‍👩‍👧 a fox, a family",
        "e\u0301 \u200b \x07 \udcff",
        "“Ünïcödé” – naïve café",
    ],
    ids=["empty", "blank", "long", "one long word", "Japanese", "Russian", "Arabic", "emoji", "odd", "accents"],
)
def test_no_caption_breaks_the_sheet_or_makes_it_wider(caption: str) -> None:
    plain = opened(contact_sheet([Frame(None, "short", "note")], title="T", note="n", thumbnail_px=120))
    sheet = opened(contact_sheet([Frame(None, caption, caption)], title=caption, note=caption, thumbnail_px=120))
    assert sheet.width == plain.width
    assert sheet.height < plain.height + 150
    for x in range(sheet.width):
        assert sheet.getpixel((x, sheet.height - 1)) == PAPER  # nothing runs over the edge


def test_a_caption_keeps_three_lines_and_says_that_it_goes_on() -> None:
    lines = room._wrap("word " * 100, 15, 200, 3)
    assert len(lines) == 3
    assert lines[-1].endswith("…")
    assert all(room._width(line, 15) <= 200 for line in lines)


def test_a_caption_that_fits_is_kept_whole() -> None:
    text = "A lighthouse on a basalt cliff at dawn, long exposure"
    assert " ".join(room._wrap(text, 15, 200, 3)) == text


def test_what_no_font_shows_is_written_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without any font but Pillow's own, which has ASCII and little else."""
    monkeypatch.setattr(room, "FONT_FILES", ())
    room._runs.cache_clear()
    try:
        assert room._showable("Köln 🦊 雪") == "Koln fox face ?"
        assert opened(contact_sheet([Frame(None, "Köln 🦊 雪")], thumbnail_px=60)).width > 0
    finally:
        room._runs.cache_clear()


def test_a_sheet_without_pictures_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one frame"):
        contact_sheet([])
