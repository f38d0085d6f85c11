"""What came as an output: which kind of file it is, and whether it is whole; pure.

A PNG is verified to its last pixel while it streams in (`png.py`). Of a JPEG, WebP, GIF or AVIF the parts are walked,
from the first to the one that ends it: that shows its size and that it is whole, and costs nothing. Decoding them would
say little more, for their decoders take what is damaged, and a file of 2 kB may stand for gigabytes. Everything else
(audio, video, 3D, text, SVG) is taken as it came, its length checked by whoever fetched it.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import re
import struct
from collections.abc import Iterable
from typing import NamedTuple
from urllib.parse import urlsplit

from prefect_eachlabs.errors import BadInput
from prefect_eachlabs.images.png import MAX_BYTES, MAX_PIXELS, MediaError, PngReader
from prefect_eachlabs.models import Media
from prefect_eachlabs.net.urls import has_odd_host
from prefect_eachlabs.reference_images import content_type_of

MAX_PIXELS_OF_ALL_FRAMES = 4_000_000_000
SNIFFED_BYTES = 64
"""A PNG's size in pixels is among them, and a WebM's name."""
COSTLY_BYTES = 16 * 1024 * 1024
"""Decompressed. Up to this (2300 x 2300 px of RGB) a PNG is verified in some 50 ms."""
TURN_BYTES = 16 * 1024
"""Of what is not costly: 1,400 chunks of nothing, or some 15 ms; eight downloads may have their turns in a row."""
COSTLY_TURN_BYTES = 4096
QUICK_BYTES = 1024 * 1024
"""Of a file that is not verified, so much is hashed in a millisecond."""


class Format(NamedTuple):
    """A kind of file by its name: its media type, the ending of its keys, and what people call it.

    `may_run` is what a browser that opens it could take for a program: it is stored as a download.
    """

    content_type: str
    suffix: str
    title: str
    may_run: bool = False

    @property
    def stored_type(self) -> str:
        """Its Content-Type in the bucket. An SVG keeps its own: shown within a page it runs nothing."""
        return "application/octet-stream" if self.may_run and self.suffix != "svg" else self.content_type

    @property
    def disposition(self) -> str | None:
        """Its Content-Disposition there: a browser shows and plays what can do no harm, and saves the rest."""
        plays = self.content_type.startswith(("image/", "audio/", "video/")) and not self.may_run
        return None if plays else "attachment"


FORMATS = {
    "png": Format("image/png", "png", "PNG"),
    "jpeg": Format("image/jpeg", "jpg", "JPEG"),
    "webp": Format("image/webp", "webp", "WebP"),
    "gif": Format("image/gif", "gif", "GIF"),
    "avif": Format("image/avif", "avif", "AVIF"),
    "svg": Format("image/svg+xml", "svg", "SVG", may_run=True),
    "tiff": Format("image/tiff", "tiff", "TIFF"),
    "bmp": Format("image/bmp", "bmp", "BMP"),
    "heic": Format("image/heic", "heic", "HEIC"),
    "mp4": Format("video/mp4", "mp4", "MP4"),
    "mov": Format("video/quicktime", "mov", "QuickTime film"),
    "webm": Format("video/webm", "webm", "WebM"),
    "mkv": Format("video/x-matroska", "mkv", "Matroska film"),
    "avi": Format("video/x-msvideo", "avi", "AVI"),
    "mp3": Format("audio/mpeg", "mp3", "MP3"),
    "wav": Format("audio/wav", "wav", "WAV"),
    "ogg": Format("audio/ogg", "ogg", "Ogg"),
    "flac": Format("audio/flac", "flac", "FLAC"),
    "m4a": Format("audio/mp4", "m4a", "M4A"),
    "aac": Format("audio/aac", "aac", "AAC"),
    "glb": Format("model/gltf-binary", "glb", "glTF binary"),
    "gltf": Format("model/gltf+json", "gltf", "glTF"),
    "obj": Format("model/obj", "obj", "OBJ"),
    "stl": Format("model/stl", "stl", "STL"),
    "usdz": Format("model/vnd.usdz+zip", "usdz", "USDZ"),
    "ply": Format("application/octet-stream", "ply", "PLY"),
    "fbx": Format("application/octet-stream", "fbx", "FBX"),
    "txt": Format("text/plain; charset=utf-8", "txt", "text"),
    "csv": Format("text/csv; charset=utf-8", "csv", "CSV"),
    "srt": Format("application/x-subrip", "srt", "SRT"),
    "vtt": Format("text/vtt", "vtt", "WebVTT"),
    "json": Format("application/json", "json", "JSON"),
    "html": Format("text/html", "html", "HTML page", may_run=True),
    "xml": Format("application/xml", "xml", "XML", may_run=True),
    "pdf": Format("application/pdf", "pdf", "PDF", may_run=True),
    "zip": Format("application/zip", "zip", "ZIP"),
    "safetensors": Format("application/octet-stream", "safetensors", "safetensors"),
    "bin": Format("application/octet-stream", "bin", "file"),
}
VERIFIED = ("png", "jpeg", "webp", "gif", "avif")
PNG_ALONE = ("png",)
ANY = "any"
"""Whatever comes, also what looks like another file than its name says."""
_OTHER_NAMES = {"jpg": "jpeg", "tif": "tiff", "htm": "html", "m4v": "mp4", "qt": "mov", "oga": "ogg", "opus": "ogg"}
_BY_TYPE = {one.content_type.partition(";")[0]: name for name, one in reversed(FORMATS.items())} | {
    "audio/mp3": "mp3",
    "audio/x-wav": "wav",
    "audio/wave": "wav",
    "text/xml": "xml",
    "image/heif": "heic",
    "application/octet-stream": None,
}
_MAGIC = (
    (b"OggS", "ogg"),
    (b"fLaC", "flac"),
    (b"ID3", "mp3"),
    (b"glTF", "glb"),
    (b"%PDF-", "pdf"),
    (b"PK\3\4", "zip"),
)
_RIFF = {b"WAVE": "wav", b"AVI ": "avi"}
_BRANDS = {b"M4A ": "m4a", b"M4B ": "m4a", b"qt  ": "mov"}
_WORDS = (
    (b"<!doctype html", "html"),
    (b"<html", "html"),
    (b"<head", "html"),
    (b"<svg", "svg"),
    (b"<", "xml"),
    (b"{", "json"),
    (b"[", "json"),
)
_TEXTS = frozenset({"html", "svg", "xml", "json"})
_SHOW_THEMSELVES = {*VERIFIED, "tiff", "bmp", "heic", "mp4", "m4a", "webm", "mkv", "avi", "wav", "ogg", "flac"}
"""Whatever is called so begins as such; where it does not, its host has sent something else in its place."""


class FormatRefused(MediaError):
    """They are of a format that is known and not allowed; `format` is its name."""

    def __init__(self, format: str, allowed: Iterable[str]) -> None:
        wanted = " or ".join(_title(name) for name in allowed)
        super().__init__(f"it is {_a(_title(format))} where {_a(wanted)} is promised")
        self.format = format


def _title(name: str) -> str:
    return FORMATS[name].title if name in FORMATS else name


def _a(title: str) -> str:
    return f"{'an' if re.match('[AEIMOSX]|HTML', title) else 'a'} {title}"


def wanted_words(formats: Iterable[str] | None) -> str:
    """`PNG or JPEG`; `file` where anything is taken."""
    names = [] if formats is None else list(formats)
    return " or ".join(map(_title, names)) if names and ANY not in names else "file"


def check_formats(formats: Iterable[str] | str | None) -> tuple[str, ...] | None:
    """The formats' names, each once, in the order given; None stays None.

    Raises:
        BadInput: None is given, or one that is not known.
    """
    if formats is None:
        return None
    given = formats.split(",") if isinstance(formats, str) else list(formats)
    named = [str(name).strip().lower() for name in given]
    names = tuple(dict.fromkeys(_OTHER_NAMES.get(name, name) for name in named if name))
    unknown = [name for name in names if name not in FORMATS and name != ANY]
    if unknown or not names:
        said = f"{', '.join(map(repr, unknown))} is not known" if unknown else "none is named"
        raise BadInput(f"formats: {said}. Name one or more of {', '.join((*FORMATS, ANY))}.")
    return names


def format_of(head: bytes) -> str | None:
    """The format that the first 64 bytes show; None: none that is known."""
    content_type = content_type_of(head)
    if content_type == "video/mp4":
        return _BRANDS.get(head[8:12], "mp4")
    if content_type is not None:
        return _BY_TYPE.get(content_type)
    if head[:4] == b"RIFF":
        return _RIFF.get(head[8:12])
    if head[:4] == b"\x1a\x45\xdf\xa3":
        return "webm" if b"webm" in head else "mkv"
    found = next((name for magic, name in _MAGIC if head.startswith(magic)), None)
    if found is not None:
        return found
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return next((name for word, name in _WORDS if text.startswith(word)), None)


def format_by_name(url: str) -> str | None:
    """The format that the end of a URL's path names; None: none that is known."""
    if has_odd_host(url):
        return None
    ending = urlsplit(url).path.rpartition("/")[2].rpartition(".")[2].lower()
    ending = _OTHER_NAMES.get(ending, ending)
    return ending if ending in FORMATS else None


class MediaReader:
    """Fed chunk by chunk; a PNG is verified while it comes, the other formats when they are whole.

    Args:
        formats: What is allowed; None: whatever the model gives, but for what its host has sent in its place.
        max_bytes: More than this is refused.
    """

    def __init__(self, formats: Iterable[str] | None = PNG_ALONE, *, max_bytes: int = MAX_BYTES) -> None:
        self._formats = None if formats is None else tuple(formats)
        self._max_bytes = max_bytes
        self._head = b""
        self._png: PngReader | None = None
        self._kept = io.BytesIO()
        self._by_name: str | None = None
        self._by_type: str | None = None
        self.size_bytes = 0
        self.format: str | None = None

    def expect(self, url: str, content_type: str) -> None:
        """What the bytes are called: by the end of their URL, and by their host."""
        self._by_name = format_by_name(url)
        self._by_type = _BY_TYPE.get(content_type.partition(";")[0].strip().lower())

    def feed(self, data: bytes) -> None:
        """The next bytes.

        Raises:
            MediaError: They are refused; no more need come.
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
        wants_pictures_alone = self._formats is not None and not set(self._formats) - set(VERIFIED)
        if wants_pictures_alone and self.format in _TEXTS:
            raise MediaError(f"it begins like {_a(_title(self.format))}, not like {_a(wanted_words(self._formats))}")
        if self.format:
            self._check_allowed(self.format)
        elif wants_pictures_alone:
            self.format = "png"  # what is no picture at all is refused there, in words that say what it is
        if self.format == "png":
            self._png = PngReader(max_bytes=self._max_bytes)
            self._png.feed(head)
        else:
            self._keep(head)

    def _check_allowed(self, name: str) -> None:
        if self._formats is not None and name not in self._formats and ANY not in self._formats:
            raise FormatRefused(name, self._formats)

    def _keep(self, data: bytes) -> None:
        if self.size_bytes > self._max_bytes:
            raise MediaError(f"it is larger than {self._max_bytes} bytes")
        self._kept.write(data)

    async def feed_in_turns(self, data: bytes) -> None:
        """`feed` on the event loop, which has its turn in between: 4 kB of a PNG may stand for 4 MB of picture."""
        at = 0
        while True:
            turn_bytes = COSTLY_TURN_BYTES if self.is_costly else TURN_BYTES
            begin, at = at, at + (SNIFFED_BYTES if self.format is None else turn_bytes)
            self.feed(data[begin:at])
            await asyncio.sleep(0)  # for nothing, too: of what is encoded many pieces may come to nothing
            if at >= len(data):
                return

    @property
    def is_costly(self) -> bool:
        """Whether it is a PNG that takes long to verify, whole or not."""
        return self._png is not None and (self._png.decompressed_bytes or 0) > COSTLY_BYTES

    @property
    def takes_long(self) -> bool:
        """Whether `finish` reads all of it, which is not for the loop."""
        return self._kept.tell() > (0 if self.format in VERIFIED else QUICK_BYTES)

    def finish(self) -> Media:
        """The whole file.

        Raises:
            MediaError: It is not whole, or not what it seems.
        """
        if self.format is None:
            self._decide()
        if self._png is not None:
            return self._png.finish()
        data = self._kept.getvalue()
        if self.format in VERIFIED:
            return verify(data)
        name = self._name_of(data)
        self._check_allowed(name)
        return as_it_came(data, name)

    def _name_of(self, data: bytes) -> str:
        """What an unverified file is: as it begins, else as it is called."""
        if not data:
            raise MediaError("it is empty")
        shown = self.format or None
        if shown == "xml" and b"<svg" in data[:4096]:
            shown = "svg"
        called = self._by_name or self._by_type
        if shown == "zip" and self._by_name == "usdz":
            return "usdz"
        if shown is not None and shown not in _TEXTS:
            return shown
        if self._formats is None or ANY not in self._formats:
            if called in _SHOW_THEMSELVES:
                raise MediaError(f"it is called {_a(_title(called))} and does not begin as one")
            if shown == "html" and self._by_name != "html":
                raise MediaError("it is an HTML page, as hosts send in place of a file that they do not have")
        if shown in (None, "xml", "json"):
            return called or shown or ("txt" if _is_text(data) else "bin")
        return shown


def _is_text(data: bytes) -> bool:
    try:
        return "\0" not in data.decode()
    except UnicodeDecodeError:
        return False


def as_it_came(data: bytes, name: str) -> Media:
    """Bytes of a format that is not verified."""
    return Media(data=data, sha256=hashlib.sha256(data).hexdigest(), format=name, verified=False)


async def verify_in_turns(data: bytes) -> Media:
    """`verify`, of a PNG too, for the event loop, which is not held up. Raises as that does."""
    if format_of(data[:SNIFFED_BYTES]) != "png":
        return await asyncio.to_thread(verify, data)
    reader = MediaReader()
    await reader.feed_in_turns(data)
    return reader.finish()


def verify(data: bytes) -> Media:
    """Bytes as one whole JPEG, WebP, GIF or AVIF. Blocks.

    Raises:
        MediaError: They are none, or not whole.
    """
    name = format_of(data[:SNIFFED_BYTES])
    if name not in _WALKS:
        raise MediaError("it is of no format that is verified here")
    title = FORMATS[name].title
    try:
        width_px, height_px, frames = _WALKS[name](data)
    except (IndexError, struct.error):
        raise MediaError(f"the {title} is cut off") from None
    except _Damaged as error:
        raise MediaError(f"the {title} is damaged or cut off: {error}") from None
    if width_px * height_px > MAX_PIXELS or width_px * height_px * frames > MAX_PIXELS_OF_ALL_FRAMES:
        raise MediaError(f"the {title} has {frames} frames of {width_px} x {height_px} px, which is too much")
    digest = hashlib.sha256(data).hexdigest()
    return Media(data=data, sha256=digest, width_px=width_px, height_px=height_px, format=name)


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


def _walk_avif(data: bytes) -> tuple[int, int, int]:
    """Its boxes, which fill it to its end; within `meta` the size, once more for its alpha and for each tile."""
    sizes, at, kinds = [(0, 0)], 0, set()
    while at < len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        body = at + 8
        if length == 1:
            (length,) = struct.unpack_from(">Q", data, body)
        elif length == 0:
            raise _Damaged("its last box does not say where it ends")
        if length < 8 or at + length > len(data):
            raise _Damaged("a box goes beyond its end")
        kinds.add(kind)
        if kind == b"meta":
            sizes += [
                struct.unpack_from(">II", data, found.end() + 4) for found in _SIZE.finditer(data, body, at + length)
            ]
        at += length
    width_px, height_px = max(sizes, key=lambda size: size[0] * size[1])
    if not width_px or not height_px or b"mdat" not in kinds:
        raise _Damaged("it holds no image data")
    return width_px, height_px, 1


_SIZE = re.compile(rb"\x00\x00\x00\x14ispe", re.DOTALL)

_WALKS = {"jpeg": _walk_jpeg, "webp": _walk_webp, "gif": _walk_gif, "avif": _walk_avif}
