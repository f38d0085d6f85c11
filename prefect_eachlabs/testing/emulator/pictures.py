"""Pictures that show their prompt, drawn with Pillow when they are downloaded; and plain ones, for benchmarks."""

from __future__ import annotations

import asyncio
import colorsys
import functools
import hashlib
import io
import random
import struct
import unicodedata
import zlib
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

from PIL import Image, ImageDraw, ImageFilter, ImageFont

from prefect_eachlabs.testing.emulator.ledger import Job
from prefect_eachlabs.testing.emulator.options import EmulatorOptions

CAPTION = "drawn by the emulator"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def png_chunk(kind: bytes, data: bytes) -> bytes:
    """Length, kind, data and CRC, as a PNG holds them."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def plain_png(size_px: int, seed: str) -> bytes:
    """A whole PNG of one colour, in well under a millisecond; its seed is its colour and stands in its text."""
    red, green, blue = hashlib.sha256(seed.encode("utf-8", "replace")).digest()[:3]
    row = b"\0" + bytes((red, green, blue)) * size_px
    header = struct.pack(">IIBBBBB", size_px, size_px, 8, 2, 0, 0, 0)
    text = b"Comment\0" + f"{CAPTION} {seed}"[:200].encode("latin-1", "replace")
    chunks = ((b"IHDR", header), (b"tEXt", text), (b"IDAT", zlib.compress(row * size_px, 1)), (b"IEND", b""))
    return PNG_SIGNATURE + b"".join(png_chunk(kind, data) for kind, data in chunks)


def draw(prompt: str, *, size_px: int, seed: str, format: str = "png") -> bytes:
    """A picture of soft shapes with the prompt on it; the same seed and prompt give the same bytes."""
    rng = random.Random(f"{seed}/{prompt!r}")
    picture = _background(size_px, rng)
    _write(picture, prompt)
    buffer = io.BytesIO()
    if format == "png":
        picture.save(buffer, "PNG", compress_level=1)
    else:
        picture.save(buffer, format.upper())
    return buffer.getvalue()


def _colour(hue: float, saturation: float, value: float) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(hue % 1, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def _background(size_px: int, rng: random.Random) -> Image.Image:
    """A gradient and five soft shapes of neighbouring colours, made small and enlarged: that is quick and soft."""
    hue = rng.random()
    small = Image.new("RGB", (64, 64))
    top, bottom = _colour(hue, 0.75, 0.45), _colour(hue + 0.12, 0.7, 0.85)
    pen = ImageDraw.Draw(small)
    for y in range(64):
        part = y / 63
        mixed = tuple(round(a + (b - a) * part) for a, b in zip(top, bottom, strict=True))
        pen.line((0, y, 63, y), fill=mixed)
    for _ in range(5):
        radius = rng.randint(8, 22)
        x, y = rng.randint(0, 63), rng.randint(0, 63)
        colour = _colour(hue + rng.uniform(-0.18, 0.3), rng.uniform(0.4, 0.8), rng.uniform(0.55, 1.0))
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    return small.filter(ImageFilter.GaussianBlur(3)).resize((size_px, size_px), Image.Resampling.BICUBIC)


@functools.lru_cache(maxsize=64)
def _font(size: int) -> _Font:
    return ImageFont.load_default(size)


@functools.lru_cache(maxsize=4_096)
def _shows(character: str) -> bool:
    """Whether the font has a glyph of its own for a character."""
    font = _font(24)
    return character == " " or bytes(font.getmask(character)) != bytes(font.getmask("\U0010fffe"))


_PLAIN = {"ß": "ss", "æ": "ae", "Æ": "AE", "ø": "o", "Ø": "O", "œ": "oe", "ł": "l", "–": "-", "—": "-", "…": "..."}


def _showable(prompt: str) -> list[str]:
    """The prompt's words in characters that the font can show: else their plain form, else (emoji) their name."""
    shown = []
    for character in unicodedata.normalize("NFC", " ".join(prompt[:2_000].split()))[:700]:
        if unicodedata.category(character) in ("Cs", "Cc", "Cf", "Mn", "Me"):
            continue
        if _shows(character):
            shown.append(character)
            continue
        plain = _PLAIN.get(character) or "".join(c for c in unicodedata.normalize("NFKD", character) if c.isascii())
        name = unicodedata.name(character, "?").lower() if unicodedata.category(character) == "So" else "?"
        shown.append(plain or (f" {name} " if len(name) > 1 else name))
    return "".join(shown).split()


@functools.lru_cache(maxsize=8_192)
def _width(word: str) -> float:
    """A word's width at a font size of 1: measured once, at a size where hinting does not matter."""
    return _font(100).getlength(word) / 100


def _wrap(words: list[str], width: float) -> list[str]:
    """Lines at most so wide, in units of the font size; a word that is wider is cut."""
    lines: list[str] = []
    filled = 0.0
    space = _width(" ")
    for whole in words:
        per_line = max(1, int(len(whole) * width / _width(whole)))
        for begin in range(0, len(whole), per_line):
            word = whole[begin : begin + per_line]
            if lines and begin == 0 and filled + space + _width(word) <= width:
                lines[-1] += f" {word}"
                filled += space + _width(word)
            else:
                lines.append(word)
                filled = _width(word)
    return lines


def _write(picture: Image.Image, prompt: str) -> None:
    size_px = picture.width
    margin, words = size_px * 0.09, _showable(prompt) or ["(no prompt)"]
    width, height = size_px - 2 * margin, size_px * 0.68
    sizes = [max(6, int(size_px * scale)) for scale in (0.1, 0.08, 0.065, 0.052, 0.042, 0.034, 0.027)]
    wrapped = ((size, _wrap(words, width * 0.97 / size)) for size in sizes)
    fitting = ((size, lines) for size, lines in wrapped if len(lines) * size * 1.25 <= height or size == sizes[-1])
    font_size, lines = next(fitting)
    font, step = _font(font_size), font_size * 1.25
    lines = lines[: max(1, int(height // step))]
    begin = (size_px - len(lines) * step) / 2
    _shade(picture, begin - margin / 2, begin + len(lines) * step + margin / 2)
    pen = ImageDraw.Draw(picture)
    for number, line in enumerate(lines):
        left = (size_px - font.getlength(line)) / 2
        pen.text((left, begin + number * step), line, font=font, fill="white")
    small = _font(max(6, int(size_px * 0.026)))
    pen.text((size_px - small.getlength(CAPTION) - margin / 3, size_px * 0.955), CAPTION, font=small, fill="white")


def _shade(picture: Image.Image, top: float, bottom: float) -> None:
    """Darkens the band behind the text, so that white is legible on every background."""
    box = (0, max(0, int(top)), picture.width, min(picture.height, int(bottom)))
    band = picture.crop(box)
    picture.paste(Image.blend(band, Image.new("RGB", band.size, "black"), 0.38), box)
    foot = (0, int(picture.height * 0.94), picture.width, picture.height)
    band = picture.crop(foot)
    picture.paste(Image.blend(band, Image.new("RGB", band.size, "black"), 0.3), foot)


class PictureShop:
    """Draws what is downloaded, in two threads of its own, and keeps the last few."""

    _KEPT = 64

    def __init__(self, options: EmulatorOptions, *, threads: bool) -> None:
        self._options = options
        self._threads = threads
        self._pool: ThreadPoolExecutor | None = None
        self._kept: OrderedDict[tuple[str, int, str], bytes] = OrderedDict()

    async def picture(self, job: Job, number: int, format: str) -> bytes:
        """The bytes of a job's n-th picture: png, jpeg, webp or gif."""
        name = (job.id, number, format)
        if name in self._kept:
            self._kept.move_to_end(name)
            return self._kept[name]
        seed, size_px = f"{job.id}/{number}", self._options.image_size_px
        if self._options.pictures == "plain" and format == "png":
            return plain_png(size_px, seed)
        make = functools.partial(draw, job.prompt, size_px=size_px, seed=seed, format=format)
        if self._threads:
            self._pool = self._pool or ThreadPoolExecutor(2, thread_name_prefix="emulator-draws")
            made = await asyncio.get_running_loop().run_in_executor(self._pool, make)
        else:
            made = make()
        self._kept[name] = made
        while len(self._kept) > self._KEPT:
            self._kept.popitem(last=False)
        return made

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True)
            self._pool = None
