"""Pictures that show their prompt, drawn when they are downloaded; plain ones, for benchmarks; and spoilt ones."""

from __future__ import annotations

import asyncio
import colorsys
import functools
import hashlib
import io
import struct
import unicodedata
import zlib
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from PIL import Image, ImageDraw, ImageFont
from starlette.responses import RedirectResponse, Response

from prefect_eachlabs.testing.emulator.clock import Clock
from prefect_eachlabs.testing.emulator.faults import Fault
from prefect_eachlabs.testing.emulator.options import EmulatorOptions
from prefect_eachlabs.testing.emulator.outputs import PICTURE_TYPES, other_output
from prefect_eachlabs.testing.emulator.predictions import Job
from prefect_eachlabs.testing.emulator.responses import CutResponse, DripResponse, error, html

CAPTION = "Drawn by the emulator: no model was asked."
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_LEGIBLE = 400
"""So many characters of a prompt are drawn."""
_HAS = "\u2018\u2019\u201c\u201d\u2026"
"""Typographic quotes and dots: beyond ASCII Pillow's own font has little else."""
_MIB = 1024 * 1024


def _png(width_px: int, height_px: int, data: bytes, *, comment: str = "") -> bytes:
    """A PNG of 8 bits a channel from its compressed image data."""
    header = struct.pack(">IIBBBBB", width_px, height_px, 8, 2, 0, 0, 0)
    text = b"Comment\0" + comment[:200].encode("latin-1", "replace")
    chunks = [(b"IHDR", header), *([(b"tEXt", text)] if comment else []), (b"IDAT", data), (b"IEND", b"")]
    return _SIGNATURE + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


def plain_png(size_px: int, seed: str) -> bytes:
    """A whole PNG of one colour, in well under a millisecond; its seed is its colour and stands in its text."""
    row = b"\0" + hashlib.sha256(seed.encode("utf-8", "replace")).digest()[:3] * size_px
    return _png(size_px, size_px, zlib.compress(row * size_px, 1), comment=f"{CAPTION} {seed}")


def draw(prompt: str, *, size_px: int, seed: str, format: str = "png") -> bytes:
    """The prompt in white on one colour, and who drew it; the same seed and prompt give the same bytes."""
    drawn = hashlib.sha256(seed.encode("utf-8", "replace")).digest()
    hue = int.from_bytes(drawn[:2], "big") / 65_536
    # Two seeds are two colours: several pictures of one prediction differ in nothing else.
    picture = Image.new("RGB", (size_px, size_px), _colour(hue, 0.42 + 0.06 * drawn[2] / 255))
    pen = ImageDraw.Draw(picture)
    margin = max(2, size_px // 16)
    # Read it must be, also in a thumbnail.
    caption_px = max(6, min(12, size_px // 10), size_px // 27)
    caption = ImageFont.load_default(caption_px)
    said = _wrapped(CAPTION.split(), caption, size_px - 2 * margin)
    top = size_px - round(len(said) * caption_px * 1.3) - margin
    pen.rectangle((0, top, size_px, size_px), fill=_colour(hue, 0.25))
    pen.multiline_text(
        (margin, top + margin // 2), "\n".join(said), font=caption, fill="white", spacing=caption_px * 0.3
    )
    words = _showable(prompt).split()
    for part in (8, 10, 12, 15, 19, 24, 32):
        size = max(6, size_px // part)
        font = ImageFont.load_default(size)
        lines = _wrapped(words, font, size_px - 2 * margin)
        if len(lines) * size * 1.3 <= top - 2 * margin or part == 32:
            text = "\n".join(lines[: max(1, int((top - 2 * margin) / (size * 1.3)))])
            pen.multiline_text((margin, margin), text, font=font, fill="white", spacing=size * 0.3)
            break
    buffer = io.BytesIO()
    picture.save(buffer, format.upper())
    return buffer.getvalue()


def _colour(hue: float, value: float) -> tuple[int, int, int]:
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.6, value))
    return red, green, blue


def _showable(text: str) -> str:
    """In characters that Pillow's own font has: without accents, and "?" for what is not Latin."""
    plain = unicodedata.normalize("NFKD", text[:_LEGIBLE])
    kept = (c for c in plain if unicodedata.category(c) not in ("Mn", "Cs", "Cf"))
    shown = "".join(c if c.isascii() or c in _HAS else "-" if unicodedata.category(c) == "Pd" else "?" for c in kept)
    if not shown.strip():
        return "(no prompt)"
    return "(a prompt that is not in Latin letters)" if shown.count("?") > len(shown) // 2 else shown


def _wrapped(words: list[str], font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width_px: int) -> list[str]:
    """Lines of words; a word that is wider than a line is broken."""
    lines: list[str] = []
    for word in words:
        if lines and font.getlength(f"{lines[-1]} {word}") <= width_px:
            lines[-1] += f" {word}"
            continue
        while len(word) > 1 and font.getlength(word) > width_px:
            fits = max(1, int(len(word) * width_px / font.getlength(word)))
            lines.append(word[:fits])
            word = word[fits:]  # noqa: PLW2901 - what is left of it
        lines.append(word)
    return lines


class Pictures:
    """Draws what is downloaded, in two threads of its own, and keeps the last few."""

    _KEPT = 64

    def __init__(self, options: EmulatorOptions, *, threads: bool) -> None:
        self._options = options
        self._threads = threads
        self._pool: ThreadPoolExecutor | None = None
        self._kept: OrderedDict[tuple[str, int, str], bytes] = OrderedDict()

    async def picture(self, job: Job, number: int, format: str) -> bytes:
        """The bytes of a job's n-th output."""
        if format not in PICTURE_TYPES:
            return other_output(job.prompt, format)
        name, seed, size_px = (job.id, number, format), f"{job.id}/{number}", self._options.image_size_px
        if self._options.pictures == "plain" and format == "png":
            return plain_png(size_px, seed)
        if name not in self._kept:
            make = functools.partial(draw, job.prompt, size_px=size_px, seed=seed, format=format)
            if self._threads:
                self._pool = self._pool or ThreadPoolExecutor(2, thread_name_prefix="emulator-draws")
                self._kept[name] = await asyncio.get_running_loop().run_in_executor(self._pool, make)
            else:
                self._kept[name] = make()
        self._kept.move_to_end(name)
        while len(self._kept) > self._KEPT:
            self._kept.popitem(last=False)
        return self._kept[name]

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True)
            self._pool = None


# ------------------------------------------- what a downloader must not let into a bucket


@functools.lru_cache(maxsize=4)
def bomb(width_px: int, height_px: int, mebibytes: int) -> bytes:
    """A PNG of some size whose image data inflates to so many MiB of zeros.

    After a full flush a deflate block stands for itself, so one block can be repeated: it is made in milliseconds.
    """
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = deflate.compress(bytes(_MIB)) + deflate.flush(zlib.Z_FULL_FLUSH)
    adler = ((mebibytes * _MIB) % 65_521) << 16 | 1
    data = b"\x78\xda" + block * mebibytes + deflate.flush(zlib.Z_FINISH) + struct.pack(">I", adler)
    return _png(width_px, height_px, data)


def _with_a_wrong_bit(png: bytes) -> bytes:
    """One bit of the first IDAT chunk's data turned round, so that its CRC is wrong."""
    at = png.index(b"IDAT") + 14
    return png[:at] + bytes([png[at] ^ 1]) + png[at + 1 :]


def _as_jpeg(png: bytes) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()


def redirected_again(path: str, hop: str) -> Response | None:
    """The answer to who followed a redirect into a loop; None for any other request."""
    return RedirectResponse(f"{path}?hop={int(hop) + 1}", status_code=302) if hop.isdigit() else None


def spoil(picture: bytes, media_type: str, fault: Fault, clock: Clock, *, path: str) -> Response:
    """The answer to a download that a fault hits."""
    whole = Response(picture, media_type=media_type)
    bodies: dict[str, Callable[[], bytes]] = {
        "truncated": lambda: picture[: len(picture) * 2 // 3],
        "trailing": lambda: picture + b"<!-- served by cache-7 -->",
        "bad_crc": lambda: _with_a_wrong_bit(picture),
        "jpeg": lambda: _as_jpeg(picture),
        "empty": lambda: b"",
        "bomb": lambda: bomb(512, 512, 1_024),
        "bomb_wide": lambda: bomb(100_000, 100_000, 16),
    }
    answers: dict[str, Callable[[], Response]] = {
        "html": lambda: html(fault.status or 200),
        "cut": lambda: CutResponse(whole, part=0.5),
        "reset": lambda: CutResponse(reset=True),
        "wrong_length": lambda: CutResponse(whole, part=1.0, more_bytes=64),
        "slow": lambda: DripResponse(whole, clock, seconds=fault.wait_seconds),
        "no_length": lambda: DripResponse(whole, clock, seconds=0.0, with_length=False),
        "not_found": lambda: error(404, "Not Found"),
        "throttled": lambda: error(429, "Too many requests"),
        "redirect": lambda: RedirectResponse(f"{path}?hop=last", status_code=fault.status or 302),
        "redirect_loop": lambda: RedirectResponse(f"{path}?hop=1", status_code=fault.status or 302),
        "error": lambda: error(fault.status or 503, "service temporarily unavailable"),
    }
    if fault.kind in bodies:
        return Response(bodies[fault.kind](), media_type=media_type)
    return answers[fault.kind]()
