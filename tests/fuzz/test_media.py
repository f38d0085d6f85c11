"""Pictures of other formats, in any pieces: whole, or an error that says why."""

from __future__ import annotations

import io
import warnings
from typing import Any

from hypothesis import strategies as st
from PIL import Image

from prefect_eachlabs.images.formats import FORMATS, MediaReader
from prefect_eachlabs.images.png import MediaError
from prefect_eachlabs.models import Media
from prefect_eachlabs.reference_images import content_type_of
from tests.fuzz import hostile
from tests.fuzz.kit import fuzzed
from tests.images.test_png import SMALL


def saved(format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.linear_gradient("L").resize((24, 16)).convert("RGB").save(file, format, **options)
    return file.getvalue()


def animated(format: str) -> bytes:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    file = io.BytesIO()
    frames[0].save(file, format, save_all=True, append_images=frames[1:])
    return file.getvalue()


BOXES = b"\0\0\0\x18ftypisom\0\0\0\0isommp42" + b"\0\0\0\x10moov" + bytes(8) + b"\0\0\0\x0cmdatabcd"
WHOLE = (
    saved("JPEG"),
    saved("JPEG", progressive=True),
    saved("WEBP"),
    saved("GIF"),
    animated("GIF"),
    animated("WEBP"),
    SMALL,
    BOXES,
)


def verdict(pieces: list[bytes], formats: tuple[str, ...]) -> Media | str:
    reader = MediaReader(formats, max_bytes=100_000)
    try:
        for piece in pieces:
            reader.feed(piece)
        return reader.finish()
    except MediaError as error:
        return str(error)


@fuzzed(st.data(), hostile.noise_of(*WHOLE), st.sets(st.sampled_from(sorted(FORMATS)), min_size=1))
def test_every_cut_of_a_picture_of_any_format_gives_the_same_verdict(
    data: st.DataObject, picture: bytes, formats: set[str]
) -> None:
    allowed = tuple(sorted(formats))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of what it then refuses
        found = verdict([picture], allowed)
        again = verdict(data.draw(hostile.pieces_of(picture)), allowed)
    content_type_of(picture[:64])
    if isinstance(found, Media):
        assert again == found
        assert found.format in formats
        assert found.data == picture
    else:
        assert isinstance(again, str)
