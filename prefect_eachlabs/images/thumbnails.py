"""Small pictures of stored ones, for the Prefect UI and contact sheets; decoded by Pillow in a confined process.

A picture's size in pixels is read before it is decoded. A JPEG of any size is decoded at an eighth of it; the other
formats must be decoded whole, so that a large one gets no thumbnail.
"""

from __future__ import annotations

import io
from typing import Any

from prefect_eachlabs.confined import Answer, ConfinedError, ConfinedProcess, JobFailed, NotInstalled, Read

MAX_PIXELS = 4096 * 4096
"""As RGBA, and once more while it is made smaller: 128 MiB."""
MAX_JPEG_PIXELS = 100_000_000
SECONDS = 10.0
JPEG_QUALITY = 80
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "AVIF")


class NoThumbnail(Exception):
    """There is none of this picture; the message says why."""


def thumbnail(picture: bytes, *, edge_px: int, format: str = "JPEG", quality: int = JPEG_QUALITY) -> bytes:
    """The picture within a square of `edge_px`, on white, as a `JPEG`, `WEBP` or `PNG`. Blocks; one is made at a time.

    Raises:
        NoThumbnail: It is too large in pixels, or cannot be read.
        NotInstalled: Pillow is missing (the extra `demo`).
    """
    try:
        how = {"edge_px": edge_px, "format": format, "quality": quality}
        return _process.call(how, picture, seconds=SECONDS)[1]
    except NotInstalled:
        raise
    except (ConfinedError, OSError) as error:
        raise NoThumbnail(str(error)) from error


class Thumbnail:
    """The job; in the child alone."""

    def __init__(self) -> None:
        from PIL import Image, UnidentifiedImageError  # noqa: PLC0415 - an extra, and not for the parent

        Image.MAX_IMAGE_PIXELS = None  # what is too large is said below
        self._image: Any = Image
        self._unreadable = UnidentifiedImageError

    def __call__(self, arguments: dict[str, Any], data: bytes, read: Read) -> Answer:
        edge_px = int(arguments["edge_px"])
        try:
            opened = self._image.open(io.BytesIO(data), formats=FORMATS)
        except self._unreadable:
            raise JobFailed("it cannot be read") from None
        with opened:
            if opened.width * opened.height > (MAX_JPEG_PIXELS if opened.format == "JPEG" else MAX_PIXELS):
                raise JobFailed(f"{opened.width} × {opened.height} px are too many for a thumbnail")
            if opened.format == "JPEG":
                opened.draft("RGB", (2 * edge_px, 2 * edge_px))
            picture = opened if opened.mode in ("L", "RGB", "RGBA") else opened.convert("RGBA")
            picture.thumbnail((edge_px, edge_px))
            small = picture.convert("RGBA")
        ground = self._image.new("RGBA", small.size, "white")
        out = io.BytesIO()
        self._image.alpha_composite(ground, small).convert("RGB").save(
            out, arguments["format"], quality=int(arguments["quality"])
        )
        return {}, out.getvalue()


_process = ConfinedProcess("prefect_eachlabs.images.thumbnails:Thumbnail")
