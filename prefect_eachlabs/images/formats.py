"""Verifies bytes as one whole picture of whatever format; pure.

A PNG is verified to its last pixel while it streams in (`png.py`). Of a JPEG, WebP or GIF the parts are walked, from
the first to the one that ends it: that shows its size and that it is whole, and costs nothing. Decoding them would say
little more, for their decoders take what is damaged, and a file of 2 kB may stand for gigabytes.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import struct
from collections.abc import Iterable
from typing import NamedTuple

from prefect_eachlabs.errors import BadInput
from prefect_eachlabs.images.png import MAX_BYTES, MAX_PIXELS, PngError, PngReader, verify_png
from prefect_eachlabs.models import Media
from prefect_eachlabs.reference_images import content_type_of

MAX_PIXELS_OF_ALL_FRAMES = 4_000_000_000
SNIFFED_BYTES = 16
HEAD_BYTES = 64
"""A PNG's size in pixels is among them."""
COSTLY_BYTES = 16 * 1024 * 1024
"""Decompressed. Up to this (2300 x 2300 px of RGB) a PNG is verified in some 50 ms."""
TURN_BYTES = 16 * 1024
"""Of what is not costly: 1,400 chunks of nothing, or some 15 ms; eight downloads may have their turns in a row."""
COSTLY_TURN_BYTES = 4096


class Format(NamedTuple):
    """A format by its name: its media type, the ending of its keys, and what people call it."""

    content_type: str
    suffix: str
    title: str


FORMATS = {
    "png": Format("image/png", "png", "PNG"),
    "jpeg": Format("image/jpeg", "jpg", "JPEG"),
    "webp": Format("image/webp", "webp", "WebP"),
    "gif": Format("image/gif", "gif", "GIF"),
}
PNG_ALONE = ("png",)
_BY_TYPE = {one.content_type: name for name, one in FORMATS.items()}


class MediaError(ValueError):
    """The bytes are not what they seem, not whole, or cannot be verified here; the message says why."""


class FormatRefused(MediaError):
    """They seem to be of a format that is known and not allowed; `format` is its name."""

    def __init__(self, format: str, allowed: Iterable[str]) -> None:
        wanted = " or ".join(FORMATS[name].title for name in allowed)
        super().__init__(f"it is a {FORMATS[format].title} where a {wanted} is promised")
        self.format = format


def check_formats(formats: Iterable[str] | str | None) -> tuple[str, ...] | None:
    """The formats' names, each once, in the order given; None stays None.

    Raises:
        BadInput: None is given, or one that is not known.
    """
    if formats is None:
        return None
    given = formats.split(",") if isinstance(formats, str) else list(formats)
    named = [str(name).strip().lower() for name in given]
    names = tuple(dict.fromkeys("jpeg" if name == "jpg" else name for name in named if name))
    unknown = [name for name in names if name not in FORMATS]
    if unknown or not names:
        said = f"{', '.join(map(repr, unknown))} is not known" if unknown else "none is named"
        raise BadInput(f"formats: {said}. Name one or more of {', '.join(FORMATS)}.")
    return names


def format_of(head: bytes) -> str | None:
    """The format that the first 16 bytes show; None: none of ours."""
    return _BY_TYPE.get(content_type_of(head) or "")


class MediaReader:
    """Fed chunk by chunk; a PNG is verified while it comes, the other formats when they are whole.

    Args:
        formats: What is allowed.
        max_bytes: More than this is refused.
    """

    def __init__(self, formats: Iterable[str] = PNG_ALONE, *, max_bytes: int = MAX_BYTES) -> None:
        self._formats = tuple(formats)
        self._max_bytes = max_bytes
        self._head = b""
        self._png: PngReader | None = PngReader(max_bytes=max_bytes) if self._formats == PNG_ALONE else None
        self._parts: list[bytes] = []
        self.size_bytes = 0
        self.format: str | None = None

    def feed(self, data: bytes) -> None:
        """The next bytes.

        Raises:
            PngError, MediaError: They are refused; no more need come.
        """
        self.size_bytes += len(data)
        if self.format is None:
            self._head += data
            if len(self._head) < SNIFFED_BYTES:
                return
            self._decide()
        elif self._png is not None:
            self._png.feed(data)
        else:
            self._keep(data)

    def _decide(self) -> None:
        head, self._head = self._head, b""
        self.format = format_of(head) or ""
        if self.format and self.format not in self._formats:
            raise FormatRefused(self.format, self._formats)
        if self.format in ("", "png"):
            # What is of no known format is refused there, in words that say what it is.
            self._png = self._png or PngReader(max_bytes=self._max_bytes)
            self._png.feed(head)
        else:
            self._png = None
            self._keep(head)

    def _keep(self, data: bytes) -> None:
        if self.size_bytes > self._max_bytes:
            raise MediaError(f"it is larger than {self._max_bytes} bytes")
        self._parts.append(data)

    async def feed_in_turns(self, data: bytes) -> None:
        """`feed` on the event loop, which has its turn in between: 4 kB of a PNG may stand for 4 MB of picture."""
        at = 0
        while at < len(data):
            begin, at = at, at + self._turn_bytes
            self.feed(data[begin:at])
            await asyncio.sleep(0)

    @property
    def _turn_bytes(self) -> int:
        """How much may be fed at a time."""
        if self.format is None:
            return HEAD_BYTES
        return COSTLY_TURN_BYTES if self.is_costly else TURN_BYTES

    @property
    def is_costly(self) -> bool:
        """Whether it is a PNG that takes long to verify, whole or not."""
        return self._png is not None and (self._png.decompressed_bytes or 0) > COSTLY_BYTES

    @property
    def takes_long(self) -> bool:
        """Whether `finish` reads all of it, which is not for the loop."""
        return bool(self._parts)

    def finish(self) -> Media:
        """The verified picture.

        Raises:
            PngError, MediaError: It is not whole, or not what it seems.
        """
        if self.format is None:
            self._decide()
        if self._png is not None:
            return self._png.finish()
        return verify(b"".join(self._parts))


async def verify_in_turns(data: bytes) -> Media:
    """`verify` for the event loop, which is not held up. Raises as that does."""
    if format_of(data[:SNIFFED_BYTES]) != "png":
        return await asyncio.to_thread(verify, data)
    reader = MediaReader()
    try:
        await reader.feed_in_turns(data)
        return reader.finish()
    except PngError as error:
        raise MediaError(str(error)) from error


def verify(data: bytes) -> Media:
    """Bytes as one whole picture of whatever format they show. Blocks.

    Raises:
        MediaError: They are none, or not whole.
    """
    name = format_of(data[:SNIFFED_BYTES])
    if name == "png":
        try:
            return verify_png(data)
        except PngError as error:
            raise MediaError(str(error)) from error
    if name is None:
        raise MediaError("it is of no format that is known here")
    width_px, height_px = _verify_picture(data, name)
    digest = hashlib.sha256(data).hexdigest()
    return Media(data=data, sha256=digest, width_px=width_px, height_px=height_px, format=name)


def _verify_picture(data: bytes, name: str) -> tuple[int, int]:
    """Walks its parts to the last one. Nothing is decoded: a file of 2 kB may stand for gigabytes of frames."""
    title = FORMATS[name].title
    try:
        width_px, height_px, frames = _WALKS[name](data)
    except (IndexError, struct.error):
        raise MediaError(f"the {title} is cut off") from None
    except _Damaged as error:
        raise MediaError(f"the {title} is damaged or cut off: {error}") from None
    if width_px * height_px > MAX_PIXELS or width_px * height_px * frames > MAX_PIXELS_OF_ALL_FRAMES:
        raise MediaError(f"the {title} has {frames} frames of {width_px} x {height_px} px, which is too much")
    return width_px, height_px


class _Damaged(Exception):
    pass


_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]", re.DOTALL)
"""What ends the image data of a JPEG: within them 0xff is followed by 0 or by a restart's number."""


def _walk_jpeg(data: bytes) -> tuple[int, int, int]:
    """Its segments, from one marker to the next, until the one that ends it."""
    width_px = height_px = scans = 0
    at = 2
    while True:
        while data[at : at + 2] == b"\xff\xff":
            at += 1  # markers may be filled up
        if _MARKER.match(data, at) is None:
            raise _Damaged("a marker is missing")
        marker, at = data[at + 1], at + 2
        if marker == 0xD9:
            break
        (length,) = struct.unpack_from(">H", data, at)
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height_px, width_px = struct.unpack_from(">HH", data, at + 3)
        at += length
        if marker == 0xDA:
            scans += 1
            end = _MARKER.search(data, at)
            if end is None:
                raise _Damaged("it has no end")
            at = end.start()
    if not width_px or not height_px or not scans:
        raise _Damaged("it holds no image data")
    return width_px, height_px, 1


def _walk_webp(data: bytes) -> tuple[int, int, int]:
    """Its chunks, which fill what its head says it has."""
    end = 8 + struct.unpack_from("<I", data, 4)[0]
    if end > len(data):
        raise _Damaged(f"{len(data)} of its {end} bytes are there")
    size, frames, at = None, 0, 12
    while at + 8 <= end:
        kind, length = struct.unpack_from("<4sI", data, at)
        body = at + 8
        at = body + length + length % 2
        if body + length > end:
            raise _Damaged("a chunk goes beyond its end")
        frames += kind in (b"VP8 ", b"VP8L", b"ANMF")
        if size is None and kind == b"VP8X":
            size = [1 + int.from_bytes(data[body + place : body + place + 3], "little") for place in (4, 7)]
        elif size is None and kind == b"VP8 " and data[body + 3 : body + 6] == b"\x9d\x01\x2a":
            size = [number & 0x3FFF for number in struct.unpack_from("<HH", data, body + 6)]
        elif size is None and kind == b"VP8L" and data[body] == 0x2F:
            (bits,) = struct.unpack_from("<I", data, body + 1)
            size = [1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)]
    if size is None or not all(size) or not frames:
        raise _Damaged("it holds no image data")
    return size[0], size[1], frames


def _walk_gif(data: bytes) -> tuple[int, int, int]:
    """Its blocks, until the one that ends it."""
    width_px, height_px, flags = struct.unpack_from("<HHB", data, 6)
    frames, at = 0, 13 + _colours_bytes(flags)
    while (kind := data[at]) != 0x3B:
        if kind == 0x2C:
            frames += 1
            at += 11 + _colours_bytes(data[at + 9])
        elif kind == 0x21:
            at += 2
        else:
            raise _Damaged("a block of it is not known")
        while data[at]:
            at += 1 + data[at]
        at += 1
    if not width_px or not height_px or not frames:
        raise _Damaged("it holds no image data")
    return width_px, height_px, frames


def _colours_bytes(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


_WALKS = {"jpeg": _walk_jpeg, "webp": _walk_webp, "gif": _walk_gif}
