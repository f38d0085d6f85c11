"""The PNG reader: one verdict however the bytes are cut, and what it takes Pillow can draw."""

from __future__ import annotations

import io
import zlib
from typing import Any

from hypothesis import strategies as st
from PIL import Image

from prefect_eachlabs.images.png import MediaError, PngReader
from prefect_eachlabs.models import Media
from tests.fuzz import hostile
from tests.fuzz.kit import fuzzed
from tests.images.test_png import IEND, SIGNATURE, SMALL, chunk, drawn, header

WHOLE = (SMALL, drawn("RGB", (9, 7)), drawn("P", (5, 3)), drawn("LA", (3, 5), optimize=True), drawn("1", (17, 2)))
MOST_PIXELS = 1_000_000
SIZES = (0, 1, 2, 3, 9, 255, 1_000, 2**16, 2**31 - 1, 2**31, 2**32 - 1)


@st.composite
def raw_images(draw: Any) -> bytes:
    """What stands in IDAT: scanlines, a bomb, or something that zlib does not know."""
    kind = draw(st.integers(0, 3))
    if kind == 0:
        return zlib.compress(draw(st.binary(max_size=60)))
    if kind == 1:
        return zlib.compress(bytes(draw(st.sampled_from((6, 10**5, 10**7)))), 9)
    if kind == 2:
        stream = zlib.compressobj(wbits=draw(st.sampled_from((-15, 15, 31))))
        return stream.compress(b"\0ab\0cd") + stream.flush() + draw(st.binary(max_size=3))
    return draw(st.binary(max_size=30))


@st.composite
def pictures(draw: Any) -> bytes:
    """A PNG whose chunks were dropped, doubled, moved, renamed or refilled, with right CRCs; then perhaps damaged."""
    kind = draw(st.integers(0, 5))
    if kind == 0:
        return draw(hostile.noise_of(*WHOLE))
    chunks = [
        header(
            draw(st.sampled_from(SIZES)),
            draw(st.sampled_from(SIZES)),
            draw(st.sampled_from((1, 2, 3, 8, 16))),
            draw(st.integers(0, 7)),
            0,
            0,
            draw(st.integers(0, 2)),
        )
        if kind == 1
        else header(2, 2),
        *draw(
            st.lists(
                st.builds(
                    chunk,
                    st.sampled_from(
                        (b"PLTE", b"tRNS", b"tEXt", b"acTL", b"fdAT", b"IHDR", b"IEND", b"iCCP", b"ABCD", b"a1\0\xff")
                    ),
                    st.binary(max_size=20) | st.just(bytes(768)),
                ),
                max_size=3,
            )
        ),
        *(chunk(b"IDAT", piece) for piece in draw(hostile.pieces_of(draw(raw_images())))),
        IEND,
    ]
    if draw(st.integers(0, 3)) == 0:
        chunks = draw(st.permutations(chunks))
    data = SIGNATURE + b"".join(chunks)
    return hostile.damaged(data, draw) if draw(st.integers(0, 3)) == 0 else data


def critical(picture: bytes) -> bytes:
    """The picture without chunks that need not be understood: Pillow understands some, and refuses what it does."""
    kept, at = SIGNATURE, len(SIGNATURE)
    while at < len(picture):
        end = at + 12 + int.from_bytes(picture[at : at + 4], "big")
        kept += picture[at:end] if picture[at + 4 : at + 5].isupper() else b""
        at = end
    return kept


def verdict(pieces: list[bytes]) -> Media | str:
    reader = PngReader(max_pixels=MOST_PIXELS)
    try:
        for piece in pieces:
            reader.feed(piece)
        return reader.finish()
    except MediaError as error:
        return str(error)


@fuzzed(st.data(), pictures())
def test_every_cut_gives_the_same_verdict_and_what_is_taken_can_be_drawn(data: st.DataObject, picture: bytes) -> None:
    found = verdict([picture])
    again = verdict(data.draw(hostile.pieces_of(picture)))
    # Of two faults in one piece, the one that is named may be another.
    assert again == found or (isinstance(again, str) and isinstance(found, str))
    if isinstance(found, Media):
        assert found.data == picture
        with Image.open(io.BytesIO(critical(picture))) as drawn_by_pillow:
            drawn_by_pillow.load()
            assert drawn_by_pillow.size == (found.width_px, found.height_px)
