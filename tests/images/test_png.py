"""`png.py` takes every legal PNG and nothing else."""

from __future__ import annotations

import doctest
import hashlib
import io
import itertools
import random
import tracemalloc
import zlib
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import prefect_eachlabs.images.png
from prefect_eachlabs.images.png import SIGNATURE, MediaError, PngReader
from prefect_eachlabs.models import Media


def chunk(name: bytes, body: bytes = b"") -> bytes:
    return len(body).to_bytes(4, "big") + name + body + zlib.crc32(name + body).to_bytes(4, "big")


def header(width_px: int, height_px: int, depth: int = 8, color_type: int = 0, *rest: int) -> bytes:
    methods = bytes(rest or (0, 0, 0))
    return chunk(
        b"IHDR", width_px.to_bytes(4, "big") + height_px.to_bytes(4, "big") + bytes((depth, color_type)) + methods
    )


def png(*chunks: bytes) -> bytes:
    return SIGNATURE + b"".join(chunks)


def idat(raw: bytes) -> bytes:
    return chunk(b"IDAT", zlib.compress(raw))


IEND = chunk(b"IEND")
SMALL = png(header(2, 2), idat(b"\0ab\0cd"), IEND)
"""2 x 2 grey pixels."""


def drawn(mode: str = "RGB", size: tuple[int, int] = (37, 23), **options: object) -> bytes:
    """A picture as Pillow writes it."""
    width_px, height_px = size
    pixels = random.Random(7).randbytes(width_px * height_px * 4)
    picture = Image.frombytes("RGBA", size, pixels).convert(mode)
    file = io.BytesIO()
    picture.save(file, "PNG", **options)
    return file.getvalue()


def read(reader: PngReader, data: bytes, piece_bytes: int) -> Media:
    for start in range(0, len(data), piece_bytes):
        reader.feed(data[start : start + piece_bytes])
    return reader.finish()


def verify_png(data: bytes) -> Media:
    return read(PngReader(), data, len(data) or 1)


def refused(data: bytes, *, piece_bytes: int | None = None, **limits: int) -> str:
    """The reason; the same, however the bytes are cut."""
    reasons = set()
    for size in (piece_bytes,) if piece_bytes else (len(data) or 1, 1, 7):
        reader = PngReader(**limits)
        with pytest.raises(MediaError) as caught:
            read(reader, data, size)
        with pytest.raises(MediaError, match=r".") as again:
            reader.finish()
        assert str(again.value) == str(caught.value), "a refused picture stays refused"
        reasons.add(str(caught.value))
    (reason,) = reasons
    return reason


def test_the_examples_in_the_docstrings_run() -> None:
    results = doctest.testmod(prefect_eachlabs.images.png)
    assert results.attempted
    assert not results.failed


# ------------------------------------------------------------------- what is taken


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_what_pillow_writes_is_taken_unchanged(mode: str) -> None:
    if mode == "I;16":
        file = io.BytesIO()
        Image.new("I;16", (37, 23), 4711).save(file, "PNG")
        data = file.getvalue()
    else:
        data = drawn(mode)
    picture = verify_png(data)
    assert (picture.width_px, picture.height_px) == (37, 23)
    assert picture.data == data
    assert picture.sha256 == hashlib.sha256(data).hexdigest()


LEGAL = [(0, depth) for depth in (1, 2, 4, 8, 16)] + [(3, depth) for depth in (1, 2, 4, 8)]
LEGAL += [(color_type, depth) for color_type in (2, 4, 6) for depth in (8, 16)]
SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
PASSES = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]


def image_data(width_px: int, height_px: int, depth: int, color_type: int, *, interlaced: bool) -> bytes:
    """Scanlines pixel by pixel, written another way than the verifier counts them."""
    raw = b""
    for left, top, right, down in PASSES if interlaced else [(0, 0, 1, 1)]:
        for _ in range(top, height_px, down):
            columns = len(range(left, width_px, right))
            if columns:
                raw += b"\4" + bytes(-(-columns * depth * SAMPLES[color_type] // 8))
    return raw


@given(
    kind=st.sampled_from(LEGAL),
    width_px=st.integers(1, 40),
    height_px=st.integers(1, 40),
    interlaced=st.booleans(),
    cuts=st.lists(st.integers(0, 400), max_size=4),
)
def test_every_legal_kind_and_size_is_taken_interlaced_or_not_with_any_number_of_idat_chunks(
    kind: tuple[int, int], width_px: int, height_px: int, interlaced: bool, cuts: list[int]
) -> None:
    color_type, depth = kind
    raw = image_data(width_px, height_px, depth, color_type, interlaced=interlaced)
    stream = zlib.compress(raw)
    bounds = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    parts = [chunk(b"IDAT", stream[start:end]) for start, end in itertools.pairwise(bounds)]
    palette = [chunk(b"PLTE", bytes(3 * 2**depth))] if color_type == 3 else []
    data = png(header(width_px, height_px, depth, color_type, 0, 0, int(interlaced)), *palette, *parts, IEND)
    assert verify_png(data).width_px == width_px
    Image.open(io.BytesIO(data)).load()


def test_chunks_that_need_not_be_known_are_taken() -> None:
    data = png(
        header(2, 2), chunk(b"tEXt", b"Title\0x"), chunk(b"caBX", b"signed"), idat(b"\0ab\0cd"), chunk(b"eXIf"), IEND
    )
    assert verify_png(data).data == data


# ------------------------------------------------------------- what is no PNG at all


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "it is empty (0 bytes)"),
        (b"hello", "it does not begin like a PNG (its first bytes are 68 65 6c 6c 6f)"),
        (
            b"\x89PNG\n\n\x1a\n" + bytes(80),
            "it does not begin like a PNG (its first bytes are 89 50 4e 47 0a 0a 1a 0a)",
        ),
    ],
)
def test_what_is_no_png_is_told_by_its_first_bytes(data: bytes, reason: str) -> None:
    assert refused(data) == reason


# --------------------------------------------------------------------- what is broken


def test_every_truncation_is_refused() -> None:
    data = drawn(size=(9, 9))
    for size in range(len(data)):
        reason = refused(data[:size], piece_bytes=4096)
        assert "truncated" in reason or "empty" in reason or size < len(SIGNATURE)


@pytest.mark.parametrize("data", [SMALL, drawn("P", (5, 5)), drawn("RGB", (6, 6))], ids=["grey", "palette", "colour"])
def test_every_flipped_byte_is_refused(data: bytes) -> None:
    for index in range(len(data)):
        for mask in (0x01, 0x20, 0x80, 0xFF):
            broken = bytearray(data)
            broken[index] ^= mask
            refused(bytes(broken), piece_bytes=4096)


@given(st.binary(max_size=60), st.sampled_from(LEGAL), st.integers(1, 5), st.integers(1, 5), st.booleans())
def test_image_data_of_any_other_size_are_refused(
    raw: bytes, kind: tuple[int, int], width_px: int, height_px: int, interlaced: bool
) -> None:
    color_type, depth = kind
    right = image_data(width_px, height_px, depth, color_type, interlaced=interlaced)
    data = png(
        header(width_px, height_px, depth, color_type, 0, 0, int(interlaced)),
        *([chunk(b"PLTE", bytes(3))] if color_type == 3 else []),
        idat(raw),
        IEND,
    )
    if len(raw) != len(right):
        assert "image data" in refused(data, piece_bytes=16)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (SMALL + b"\n", "bytes follow its end (IEND)"),
        (SMALL + SMALL, "bytes follow its end (IEND)"),
        (png(idat(b"\0a"), header(1, 1), IEND), "it begins with a chunk IDAT of 10 bytes instead of IHDR with 13"),
        (png(chunk(b"IHDR", bytes(12))), "it begins with a chunk IHDR of 12 bytes instead of IHDR with 13"),
        (png(header(2, 2), header(2, 2), idat(b"\0ab\0cd"), IEND), "it holds a second IHDR"),
        (png(header(2, 2), IEND), "it holds no image data (IDAT)"),
        (png(header(2, 2), chunk(b"IDAT"), IEND), "its image data end early: 0 of 6 decompressed bytes are there"),
        (png(header(2, 2), idat(b"\0ab"), IEND), "its image data end early: 3 of 6 decompressed bytes are there"),
        (
            png(header(2, 2), chunk(b"IDAT", zlib.compress(b"\0ab\0cd")[:-1]), IEND),
            "its image data end early: 6 of 6 decompressed bytes are there",
        ),
        (png(header(2, 2), idat(b"\0ab\0cde"), IEND), "its image data decompress to more than the 6 bytes of its size"),
        (
            png(header(2, 2), chunk(b"IDAT", zlib.compress(b"\0ab\0cd") + b"\0"), IEND),
            "bytes follow its image data inside IDAT",
        ),
        (png(header(2, 2), idat(b"\0ab\0cd"), chunk(b"IDAT", b"\0"), IEND), "bytes follow its image data inside IDAT"),
        (
            png(header(2, 2), idat(b"\0ab\0cd"), chunk(b"tEXt"), chunk(b"IDAT"), IEND),
            "other chunks stand between its image data (IDAT)",
        ),
        (png(header(2, 2), idat(b"\5ab\0cd"), IEND), "its image data name a filter type that does not exist"),
        (png(header(2, 2), idat(b"\0ab\x09cd"), IEND), "its image data name a filter type that does not exist"),
        (png(header(2, 2, 8, 3), idat(b"\0ab\0cd"), IEND), "its palette (PLTE) is missing"),
        (png(header(2, 2, 1, 3), chunk(b"PLTE", bytes(9))), "its palette (PLTE) is out of place or of a wrong size"),
        (png(header(2, 2, 8, 3), chunk(b"PLTE", bytes(8))), "its palette (PLTE) is out of place or of a wrong size"),
        (png(header(2, 2, 8, 3), chunk(b"PLTE")), "its palette (PLTE) is out of place or of a wrong size"),
        (png(header(2, 2), chunk(b"PLTE", bytes(3))), "its palette (PLTE) is out of place or of a wrong size"),
        (
            png(header(2, 2, 8, 2), idat(bytes(14)), chunk(b"PLTE", bytes(3))),
            "its palette (PLTE) is out of place or of a wrong size",
        ),
        (png(header(2, 2), chunk(b"NEWC"), IEND), "it holds a critical chunk that is not known: NEWC"),
        (png(header(2, 2), chunk(b"t3xt"), IEND), "b't3xt' stands where a chunk's name belongs"),
        (png(header(2, 2), idat(b"\0ab\0cd"), chunk(b"IEND", b"x")), "its last chunk (IEND) is not empty"),
        (png(header(2, 2), b"\xff\xff\xff\xfftEXt"), "its chunk tEXt announces 4294967295 bytes, which is too much"),
        (png(header(0, 2)), "its size of 0 x 2 pixels is not allowed"),
        (png(header(2, 2**31)), "its size of 2 x 2147483648 pixels is not allowed"),
        (png(header(2, 2, 16, 3)), "its bit depth 16 does not go with its colour type 3"),
        (png(header(2, 2, 8, 5)), "its bit depth 8 does not go with its colour type 5"),
        (png(header(2, 2, 8, 0, 1, 0, 0)), "its compression, filter or interlace method does not exist"),
        (png(header(2, 2, 8, 0, 0, 1, 0)), "its compression, filter or interlace method does not exist"),
        (png(header(2, 2, 8, 0, 0, 0, 2)), "its compression, filter or interlace method does not exist"),
    ],
)
def test_what_breaks_the_specification_is_refused_with_its_reason(data: bytes, reason: str) -> None:
    assert refused(data) == reason


# ------------------------------------------------------------------------------ bounds


def test_a_picture_at_the_size_limit_is_taken_and_one_byte_above_refused() -> None:
    assert read(PngReader(max_bytes=len(SMALL)), SMALL, 7).data == SMALL
    assert refused(SMALL, max_bytes=len(SMALL) - 1) == f"it is larger than {len(SMALL) - 1} bytes"


def test_a_picture_at_the_pixel_limit_is_taken_and_one_above_refused() -> None:
    assert read(PngReader(max_pixels=4), SMALL, 7).width_px == 2
    assert refused(SMALL, max_pixels=3) == "its 2 x 2 pixels are more than 3"


def bomb(megabytes: int) -> Iterable[bytes]:
    compressor = zlib.compressobj(9)
    for _ in range(megabytes):
        yield compressor.compress(bytes(1024 * 1024))
    yield compressor.flush()


def test_a_zlib_bomb_ends_at_the_announced_size_and_takes_no_memory() -> None:
    stream = b"".join(bomb(30))
    data = png(header(1000, 1000), chunk(b"IDAT", stream), IEND)
    tracemalloc.start()
    try:
        assert "decompress to more than the 1001000 bytes" in refused(data, piece_bytes=len(data))
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < len(data) * 4 + 1_000_000


def test_a_large_flat_picture_takes_no_memory_while_it_is_counted() -> None:
    side_px = 2000
    stream = zlib.compress(bytes((side_px * 3 + 1) * side_px))
    data = png(header(side_px, side_px, 8, 2), chunk(b"IDAT", stream), IEND)
    tracemalloc.start()
    try:
        assert verify_png(data).width_px == side_px
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < len(data) * 4 + 1_000_000
