"""Verifies bytes as one whole picture of another format than PNG, or as a video, by libraries that know them; pure.

PNG needs no library (`png.py`). JPEG, WebP and GIF are decoded by Pillow (extra `demo`), every frame of them; MP4 is
decoded by PyAV (extra `video`). What cannot be verified here is refused, not stored unseen.
"""

from __future__ import annotations

import hashlib
import io
import struct
from collections.abc import Iterable
from typing import NamedTuple

from prefect_eachlabs.errors import BadInput
from prefect_eachlabs.images.png import MAX_BYTES, MAX_PIXELS, PngError, PngReader, verify_png
from prefect_eachlabs.models import Media
from prefect_eachlabs.reference_images import content_type_of

MAX_FRAMES = 5_000
MAX_PIXELS_OF_ALL_FRAMES = 4_000_000_000
SNIFFED_BYTES = 16


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
    "mp4": Format("video/mp4", "mp4", "MP4"),
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

    @property
    def takes_long(self) -> bool:
        """Whether `finish` decodes it, which is not for the loop."""
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


def verify(data: bytes) -> Media:
    """Bytes as one whole picture or video of whatever format they show. Blocks.

    Raises:
        MediaError: They are none, or not whole, or what verifies them is not installed.
    """
    name = format_of(data[:SNIFFED_BYTES])
    if name == "png":
        try:
            return verify_png(data)
        except PngError as error:
            raise MediaError(str(error)) from error
    if name is None:
        raise MediaError("it is of no format that is known here")
    width_px, height_px = _verify_mp4(data) if name == "mp4" else _verify_picture(data, name)
    digest = hashlib.sha256(data).hexdigest()
    return Media(data=data, sha256=digest, width_px=width_px, height_px=height_px, format=name)


def _verify_picture(data: bytes, name: str) -> tuple[int, int]:
    """Decodes every frame; Pillow alone would take some pictures that were cut at their end."""
    title = FORMATS[name].title
    try:
        from PIL import Image, ImageSequence  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise MediaError(f"a {title} cannot be verified here: pip install 'prefect-eachlabs[demo]' (Pillow)") from error
    if name == "webp" and struct.unpack("<I", data[4:8].ljust(4, b"\0"))[0] + 8 > len(data):
        raise MediaError(f"the {title} is cut off")
    if name == "jpeg" and data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda"):
        raise MediaError(f"the {title} is cut off: it has no end")
    if name == "gif" and not data.rstrip(b"\0").endswith(b";"):
        raise MediaError(f"the {title} is cut off: it has no end")
    try:
        with Image.open(io.BytesIO(data), formats=[title.upper()]) as picture:
            width_px, height_px = picture.size
            frames = getattr(picture, "n_frames", 1)
            if width_px * height_px > MAX_PIXELS or frames > MAX_FRAMES:
                raise MediaError(f"the {title} has {width_px} x {height_px} px and {frames} frames, which is too much")
            if width_px * height_px * frames > MAX_PIXELS_OF_ALL_FRAMES:
                raise MediaError(f"the {title} has {frames} frames of {width_px} x {height_px} px, which is too much")
            for frame in ImageSequence.Iterator(picture):
                frame.load()
    except MediaError:
        raise
    except Exception as error:  # each decoder has errors of its own
        raise MediaError(f"the {title} cannot be decoded ({type(error).__name__}: {str(error)[:120]})") from error
    return width_px, height_px


def _verify_mp4(data: bytes) -> tuple[int, int]:
    """Walks its boxes to the last byte, and decodes every frame of its first video stream."""
    try:
        import av  # type: ignore[import-not-found,unused-ignore]  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise MediaError("an MP4 cannot be verified here: pip install 'prefect-eachlabs[video]' (PyAV)") from error
    _walk_boxes(data)
    try:
        with av.open(io.BytesIO(data), format="mp4") as container:
            if not container.streams.video:
                raise MediaError("the MP4 has no video in it")
            stream = container.streams.video[0]
            width_px, height_px = int(stream.width), int(stream.height)
            pixels = 0
            for frame in container.decode(stream):
                pixels += int(frame.width) * int(frame.height)
                if pixels > 50 * MAX_PIXELS_OF_ALL_FRAMES:
                    raise MediaError("the MP4 has too many frames")
    except MediaError:
        raise
    except Exception as error:  # FFmpeg's errors have classes of their own
        raise MediaError(f"the MP4 cannot be decoded ({type(error).__name__}: {str(error)[:120]})") from error
    if not pixels:
        raise MediaError("the MP4 has no frame in it")
    return width_px, height_px


def _walk_boxes(data: bytes) -> None:
    """An MP4 is a row of boxes that ends with its last byte; what was cut off ends within one."""
    at = 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        if size == 1:
            size = int.from_bytes(data[at + 8 : at + 16], "big")
        elif size == 0:  # to the end of the file
            return
        if size < 8 or at + size > len(data):
            raise MediaError("the MP4 is cut off")
        at += size
