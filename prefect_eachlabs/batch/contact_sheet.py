"""A contact sheet: many pictures at a glance, each with what it shows and a line of facts; drawn with Pillow.

Needs the extra `demo` (Pillow); knows nothing of where pictures come from.
"""

from __future__ import annotations

import functools
import io
import math
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from prefect_eachlabs.errors import SetupError

try:
    from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps
except ImportError as error:
    raise SetupError("Contact sheets are drawn with Pillow: pip install 'prefect-eachlabs[demo]'.") from error

Colour = tuple[int, int, int]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

PAPER: Colour = (244, 242, 238)
CARD: Colour = (255, 255, 255)
INK: Colour = (32, 35, 42)
PALE_INK: Colour = (122, 126, 136)
EMPTY: Colour = (226, 224, 219)

MOST_COLUMNS = 8
MOST_CAPTION_LINES = 3
MOST_CAPTION_CHARACTERS = 1_000
LINE_HEIGHT = 1.32

FONT_FILES = (
    "DejaVuSans.ttf",
    "NotoSans-Regular.ttf",
    "NotoSansCJK-Regular.ttc",
    "NotoSansArabic-Regular.ttf",
    "NotoSansHebrew-Regular.ttf",
    "NotoSansDevanagari-Regular.ttf",
    "NotoSansThai-Regular.ttf",
    "DroidSansFallbackFull.ttf",
    "wqy-zenhei.ttc",
    "Arial Unicode.ttf",
    "PingFang.ttc",
    "segoeui.ttf",
    "msyh.ttc",
    "malgun.ttf",
    "Symbola.ttf",
)
"""Looked for on this machine, in this order, for characters that Pillow's own font does not have."""


@dataclass(frozen=True)
class Frame:
    """One picture of a sheet.

    Attributes:
        data: The picture's bytes; without, or when they are no picture, its place stays empty and says so.
        caption: What it shows; three lines at most are kept.
        note: A line of facts: item id, size, cost.
    """

    data: bytes | None
    caption: str
    note: str = ""


def contact_sheet(
    frames: Sequence[Frame],
    *,
    title: str = "",
    note: str = "",
    columns: int | None = None,
    thumbnail_px: int = 320,
) -> bytes:
    """The sheet as a PNG.

    Args:
        frames: The pictures, in reading order.
        title: Stands above them.
        note: Stands below the title, in small print.
        columns: How many side by side, 8 at most; chosen by their number when None.
        thumbnail_px: The edge of a thumbnail; pictures are made smaller to fit, never larger.

    Raises:
        ValueError: There is no frame.
    """
    if not frames:
        raise ValueError("a contact sheet needs at least one frame")
    layout = _Layout(len(frames), columns, thumbnail_px)
    captions = [_wrap(frame.caption, layout.caption_px, layout.text_px, MOST_CAPTION_LINES) for frame in frames]
    heights = [
        layout.card_height_px(max(len(lines) for lines in captions[row : row + layout.columns]))
        for row in range(0, len(frames), layout.columns)
    ]
    head_px = layout.head_height_px(title, note)
    sheet_px = (layout.width_px, head_px + sum(heights) + layout.gap_px * (len(heights) + 1))
    sheet = Image.new("RGB", sheet_px, PAPER)
    layout.draw_head(sheet, title, note)
    top = head_px + layout.gap_px
    for row, height in enumerate(heights):
        for column in range(min(layout.columns, len(frames) - row * layout.columns)):
            number = row * layout.columns + column
            left = layout.gap_px + column * (layout.card_px + layout.gap_px)
            layout.draw_card(sheet, (left, top, left + layout.card_px, top + height), frames[number], captions[number])
        top += height + layout.gap_px
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


class _Layout:
    """The measures of a sheet, all in proportion to the thumbnails, and how its parts are drawn."""

    def __init__(self, count: int, columns: int | None, thumbnail_px: int) -> None:
        wanted = math.ceil(math.sqrt(count * 1.4)) if columns is None else columns
        self.columns = max(1, min(wanted, count, MOST_COLUMNS))
        self.card_px = max(48, thumbnail_px)
        self.gap_px = max(8, self.card_px * 7 // 80)
        self.pad_px = max(4, self.card_px // 20)
        self.caption_px = max(8, round(self.card_px * 0.047))
        self.note_px = max(7, round(self.card_px * 0.038))
        self.title_px = max(12, round(self.card_px * 0.1))
        self.text_px = self.card_px - 2 * self.pad_px
        self.width_px = self.gap_px + self.columns * (self.card_px + self.gap_px)

    def card_height_px(self, caption_lines: int) -> int:
        text_px = caption_lines * self.caption_px * LINE_HEIGHT + self.note_px * LINE_HEIGHT
        return math.ceil(self.card_px + 2 * self.pad_px + text_px + self.pad_px * 0.5)

    def head_height_px(self, title: str, note: str) -> int:
        height_px = self.title_px * LINE_HEIGHT if title else 0.0
        height_px += self.note_px * 1.15 * LINE_HEIGHT * len(self._note_lines(note))
        return math.ceil(height_px + self.gap_px * 0.7) if title or note else 0

    def _note_lines(self, note: str) -> list[str]:
        return _wrap(note, round(self.note_px * 1.15), self.width_px - 2 * self.gap_px, 4)

    def draw_head(self, sheet: Image.Image, title: str, note: str) -> None:
        pen, top = ImageDraw.Draw(sheet), self.gap_px * 0.8
        room_px = self.width_px - 2 * self.gap_px
        for line in _wrap(title, self.title_px, room_px, 1):
            _write(pen, (self.gap_px, top), line, self.title_px, INK)
            top += self.title_px * LINE_HEIGHT
        for line in self._note_lines(note):
            _write(pen, (self.gap_px, top), line, round(self.note_px * 1.15), PALE_INK)
            top += self.note_px * 1.15 * LINE_HEIGHT

    def draw_card(
        self, sheet: Image.Image, box: tuple[int, int, int, int], frame: Frame, caption: Sequence[str]
    ) -> None:
        left, top, right, bottom = box
        size_px = (right - left, bottom - top)
        radius_px = self.pad_px * 3 // 4
        self._draw_shadow(sheet, box, radius_px)
        card = Image.new("RGB", size_px, CARD)
        card.paste(_thumbnail(frame.data, self.card_px, self.note_px), (0, 0))
        pen, y = ImageDraw.Draw(card), float(self.card_px + self.pad_px)
        for line in caption:
            _write(pen, (self.pad_px, y), line, self.caption_px, INK)
            y += self.caption_px * LINE_HEIGHT
        y = size_px[1] - self.pad_px - self.note_px * LINE_HEIGHT
        for line in _wrap(frame.note, self.note_px, self.text_px, 1):
            _write(pen, (self.pad_px, y + self.pad_px * 0.3), line, self.note_px, PALE_INK)
        sheet.paste(card, (left, top), _rounded(size_px, radius_px))

    def _draw_shadow(self, sheet: Image.Image, box: tuple[int, int, int, int], radius_px: int) -> None:
        blur_px = max(2, self.gap_px // 5)
        left, top, right, bottom = box
        size_px = (right - left + 4 * blur_px, bottom - top + 4 * blur_px)
        mask = Image.new("L", size_px, 0)
        inner = (2 * blur_px, 2 * blur_px, size_px[0] - 2 * blur_px - 1, size_px[1] - 2 * blur_px - 1)
        ImageDraw.Draw(mask).rounded_rectangle(inner, radius_px, fill=42)
        shadow = Image.new("RGB", size_px, (60, 52, 40))
        place = (left - 2 * blur_px, top - 2 * blur_px + blur_px // 2)
        sheet.paste(shadow, place, mask.filter(ImageFilter.GaussianBlur(blur_px)))


def _thumbnail(data: bytes | None, edge_px: int, text_px: int) -> Image.Image:
    """The picture within a square, on a pale ground where it is not square; a few words where there is none."""
    square = Image.new("RGB", (edge_px, edge_px), EMPTY)
    try:
        if data is None:
            raise ValueError("there is none")
        with Image.open(io.BytesIO(data)) as opened:
            opened.thumbnail((edge_px, edge_px), Image.Resampling.LANCZOS)
            picture = opened.convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        words = "no picture"
        left = (edge_px - _width(words, text_px)) / 2
        _write(ImageDraw.Draw(square), (left, (edge_px - text_px) / 2), words, text_px, PALE_INK)
        return square
    white = Image.new("RGBA", picture.size, (*CARD, 255))
    picture = Image.alpha_composite(white, picture).convert("RGB")
    square.paste(picture, ((edge_px - picture.width) // 2, (edge_px - picture.height) // 2))
    return square


@functools.lru_cache(maxsize=32)
def _rounded(size_px: tuple[int, int], radius_px: int) -> Image.Image:
    """A mask with round corners, drawn four times as large: Pillow's own edges are jagged."""
    large = Image.new("L", (size_px[0] * 4, size_px[1] * 4), 0)
    ImageDraw.Draw(large).rounded_rectangle((0, 0, large.width - 1, large.height - 1), radius_px * 4, fill=255)
    return ImageOps.scale(large, 0.25, Image.Resampling.BOX)


# Text. Pillow draws a string in one font; a caption may need several.


@functools.lru_cache(maxsize=256)
def _font(name: str, size_px: int) -> Font | None:
    """Pillow's own font for the empty name; None where this machine has no such font."""
    if not name:
        return ImageFont.load_default(size_px)
    try:
        return ImageFont.truetype(name, size_px)
    except (OSError, ImportError):
        return None


@functools.lru_cache(maxsize=16_384)
def _has(name: str, character: str) -> bool:
    """Whether a font is here and has a glyph of its own for a character: not the one of a noncharacter."""
    font = _font(name, 24)
    if font is None:
        return False
    return bytes(font.getmask(character)) != bytes(font.getmask("\U0010fffe"))


def _font_of(character: str) -> str | None:
    return next((name for name in ("", *FONT_FILES) if character == " " or _has(name, character)), None)


def _showable(text: str) -> str:
    """One line of characters that some font here can show."""
    shown = []
    for character in unicodedata.normalize("NFC", " ".join(text[:MOST_CAPTION_CHARACTERS].split())):
        category = unicodedata.category(character)
        if category in ("Cs", "Cc", "Cf", "Mn", "Me") and not (category == "Mn" and _font_of(character)):
            continue
        shown.append(character if _font_of(character) is not None else _plain(character))
    return " ".join("".join(shown).split())


def _plain(character: str) -> str:
    """Another way to write what no font here can show: without its accent, an emoji by its name, else `?`."""
    if unicodedata.category(character) == "So":
        return f" {unicodedata.name(character, '?').lower()} "
    return "".join(c for c in unicodedata.normalize("NFKD", character) if c.isascii()) or "?"


@functools.lru_cache(maxsize=1_024)
def _runs(text: str) -> tuple[tuple[str, str], ...]:
    """Pieces of a text, each with the font that shows it: one font for all of it where one has every character."""
    for name in ("", *FONT_FILES):
        if all(character == " " or _has(name, character) for character in text):
            return ((text, name),)
    runs: list[tuple[str, str]] = []
    for character in text:
        name = runs[-1][1] if character == " " and runs else _font_of(character) or ""
        if runs and runs[-1][1] == name:
            runs[-1] = (runs[-1][0] + character, name)
        else:
            runs.append((character, name))
    return tuple(runs)


def _width(text: str, size_px: int) -> float:
    return sum(font.getlength(piece) for piece, name in _runs(text) if (font := _font(name, size_px)) is not None)


def _write(pen: ImageDraw.ImageDraw, place: tuple[float, float], text: str, size_px: int, colour: Colour) -> None:
    left, baseline = place[0], place[1] + size_px
    for piece, name in _runs(text):
        font = _font(name, size_px)
        if isinstance(font, ImageFont.FreeTypeFont):
            pen.text((left, baseline), piece, font=font, fill=colour, anchor="ls")
            left += font.getlength(piece)


def _words(text: str, width_px: float, size_px: int) -> Iterable[tuple[str, bool]]:
    """Words, and whether a space stands before each; one that is too wide for a line comes in pieces."""
    for word in _showable(text).split():
        begin = 0
        while begin < len(word):
            end = len(word)
            while end > begin + 1 and _width(word[begin:end], size_px) > width_px:
                end = begin + max(
                    1, min(end - begin - 1, int((end - begin) * width_px / _width(word[begin:end], size_px)))
                )
            yield word[begin:end], begin == 0
            begin = end


def _wrap(text: str, size_px: int, width_px: float, most_lines: int) -> list[str]:
    """Lines that fit; what does not fit in `most_lines` is cut, with an ellipsis."""
    lines: list[str] = []
    for word, apart in _words(text, width_px, size_px):
        longer = f"{lines[-1]}{' ' if apart else ''}{word}" if lines else word
        if lines and _width(longer, size_px) <= width_px:
            lines[-1] = longer
        elif len(lines) < most_lines:
            lines.append(word)
        else:
            last = lines[-1]
            while last and _width(f"{last} …", size_px) > width_px:
                last = last[:-1].rstrip()
            lines[-1] = f"{last}…"
            break
    return lines
