"""Verifies bytes as one whole PNG (W3C PNG specification, third edition) while they stream in; pure.

What is checked: the signature, every chunk's place, length and CRC, IHDR's values, the palette, that the image data
decompress to exactly the bytes that IHDR announces (interlaced or not) with legal filter types, IEND, and that nothing
follows. Decompressed bytes are counted and dropped block by block, so a zlib bomb costs no memory and ends at the
announced size.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Generator, Iterator
from typing import NamedTuple

from prefect_eachlabs.models import Media

MAX_BYTES = 256 * 1024 * 1024
MAX_PIXELS = 100_000_000

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_SNIFFED_BYTES = 64
_BLOCK_BYTES = 64 * 1024
_FILTER_TYPES = bytes(range(5))
_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_BIT_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""Each pass's first column and row, and its steps in both."""


class MediaError(ValueError):
    """The bytes are not what they seem, not whole, or cannot be verified here; the message says why."""


class _Header(NamedTuple):
    width_px: int
    height_px: int
    bit_depth: int
    color_type: int
    interlaced: bool

    def passes(self) -> Iterator[tuple[int, int]]:
        """Bytes and number of the scanlines of each pass; a scanline begins with its filter type."""
        bits = self.bit_depth * _SAMPLES[self.color_type]
        for left, top, right, down in _ADAM7 if self.interlaced else ((0, 0, 1, 1),):
            columns, rows = -(-(self.width_px - left) // right), -(-(self.height_px - top) // down)
            if columns > 0 and rows > 0:
                yield 1 + (columns * bits + 7) // 8, rows


class _ImageData:
    """The zlib stream that all IDAT chunks together are."""

    def __init__(self, header: _Header) -> None:
        self._passes = [(scanline_bytes, rows * scanline_bytes) for scanline_bytes, rows in header.passes()]
        self._expected_bytes = sum(pass_bytes for _, pass_bytes in self._passes)
        self._seen_bytes = self._offset = 0  # in all, and within the current pass
        self._stream = zlib.decompressobj()

    def feed(self, data: bytes) -> None:
        # In small slices: at each call zlib copies what it has not consumed yet.
        for start in range(0, len(data), _BLOCK_BYTES):
            rest = data[start : start + _BLOCK_BYTES]
            if self._stream.eof:
                raise MediaError("bytes follow its image data inside IDAT")
            while True:
                try:
                    block = self._stream.decompress(rest, _BLOCK_BYTES)
                except zlib.error as error:
                    raise MediaError(f"its image data are damaged ({error})") from error
                self._take(block)
                rest = self._stream.unconsumed_tail
                if not rest and len(block) < _BLOCK_BYTES:
                    break
            if self._stream.unused_data:
                raise MediaError("bytes follow its image data inside IDAT")

    def finish(self) -> None:
        if not self._stream.eof or self._seen_bytes != self._expected_bytes:
            there = f"{self._seen_bytes} of {self._expected_bytes}"
            raise MediaError(f"its image data end early: {there} decompressed bytes are there")

    def _take(self, block: bytes) -> None:
        self._seen_bytes += len(block)
        if self._seen_bytes > self._expected_bytes:
            raise MediaError(f"its image data decompress to more than the {self._expected_bytes} bytes of its size")
        position = 0
        while position < len(block):
            scanline_bytes, pass_bytes = self._passes[0]
            end = min(len(block), position + pass_bytes - self._offset)
            first = position + -self._offset % scanline_bytes
            if block[first:end:scanline_bytes].translate(None, _FILTER_TYPES):
                raise MediaError("its image data name a filter type that does not exist")
            self._offset += end - position
            position = end
            if self._offset == pass_bytes:
                self._passes.pop(0)
                self._offset = 0


class PngReader:
    """Takes a PNG in pieces of any size and refuses it at the first fault.

    Args:
        max_bytes: The largest file that is taken.
        max_pixels: The largest width times height.

    `size_bytes` counts what has been fed.

    >>> reader = PngReader()
    >>> reader.feed(b"<!DOCTYPE html><title>Not found</title>")
    >>> reader.finish()
    Traceback (most recent call last):
    prefect_eachlabs.images.png.MediaError: it does not begin like a PNG (its first bytes are 3c 21 44 4f 43 54 59 50)
    """

    def __init__(self, *, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS) -> None:
        self._max_bytes = max_bytes
        self._max_pixels = max_pixels
        self._pieces: list[bytes] = []
        self.size_bytes = 0
        self._hash = hashlib.sha256()
        self._pending, self._at = b"", 0  # what came and is too short to be understood yet, and how far it is read
        self._parsing = self._parse()
        self._has_begun = self._has_ended = False
        self._fault: MediaError | None = None
        self._header: _Header | None = None
        self._has_palette = False
        self._image: _ImageData | None = None
        self._image_ended = False

    @property
    def decompressed_bytes(self) -> int | None:
        """How large its image data are according to its head; None: that has not come yet."""
        if self._header is None:
            return None
        return sum(scanline_bytes * rows for scanline_bytes, rows in self._header.passes())

    def feed(self, data: bytes) -> None:
        """Takes the next piece.

        Raises:
            MediaError: It can be no PNG any more.
        """
        if self._fault:
            raise self._fault
        try:
            self.size_bytes += len(data)
            if self.size_bytes > self._max_bytes:
                raise MediaError(f"it is larger than {self._max_bytes} bytes")
            self._hash.update(data)
            self._pieces.append(bytes(data))
            self._pending += data
            next(self._parsing)
            self._pending, self._at = self._pending[self._at :], 0
        except MediaError as fault:
            self._fault = fault
            raise

    def finish(self) -> Media:
        """The verified picture, when all its bytes have been fed.

        Raises:
            MediaError: Something is missing.
        """
        if self._fault:
            raise self._fault
        if not self._has_begun and not (self._pending and SIGNATURE.startswith(self._pending)):
            raise self._not_a_png()
        if not self._has_ended or self._header is None:
            raise MediaError(f"it is truncated: it ends after {self.size_bytes} bytes, before its last chunk (IEND)")
        width_px, height_px, *_ = self._header
        data, sha256 = b"".join(self._pieces), self._hash.hexdigest()
        return Media(data=data, sha256=sha256, width_px=width_px, height_px=height_px)

    def _not_a_png(self) -> MediaError:
        shown = self._pending[:8].hex(" ")
        why = f"it does not begin like a PNG (its first bytes are {shown})" if shown else "it is empty (0 bytes)"
        return MediaError(why)

    def _parse(self) -> Generator[None, None, None]:
        """Reads what is pending, and yields whenever it needs more."""
        while not self._pending.startswith(SIGNATURE):
            if len(self._pending) >= _SNIFFED_BYTES:
                raise self._not_a_png()
            yield
        self._has_begun, self._at, chunk = True, len(SIGNATURE), b""
        while chunk != b"IEND":
            head = yield from self._taken(8)
            rest_bytes, chunk = int.from_bytes(head[:4], "big"), head[4:]
            if not (chunk.isalpha() and chunk.isascii()):
                raise MediaError(f"{chunk!r} stands where a chunk's name belongs")
            if rest_bytes > min(2**31 - 1, self._max_bytes):
                raise MediaError(f"its chunk {chunk.decode()} announces {rest_bytes} bytes, which is too much")
            self._check_place(chunk, rest_bytes)
            crc, header = zlib.crc32(chunk), b""
            while rest_bytes:
                data = yield from self._taken(1, most=rest_bytes)
                rest_bytes -= len(data)
                crc = zlib.crc32(data, crc)
                if chunk == b"IDAT" and self._image:
                    self._image.feed(data)
                elif chunk == b"IHDR":
                    header += data
            if int.from_bytes((yield from self._taken(4)), "big") != crc:
                raise MediaError(f"its chunk {chunk.decode()} is damaged (the CRC does not fit)")
            if chunk == b"IHDR":
                self._header = self._parsed_header(header)
        self._has_ended = True
        while self._at == len(self._pending):
            yield
        raise MediaError("bytes follow its end (IEND)")

    def _taken(self, least: int, *, most: int | None = None) -> Generator[None, None, bytes]:
        """So many bytes, once they have come; or as many as have come, up to `most`."""
        while len(self._pending) - self._at < least:
            yield
        data = self._pending[self._at : self._at + (most or least)]
        self._at += len(data)
        return data

    def _check_place(self, chunk: bytes, length_bytes: int) -> None:
        """Whether this chunk may stand here."""
        header = self._header
        if header is None:
            if chunk != b"IHDR" or length_bytes != 13:
                what = f"a chunk {chunk.decode()} of {length_bytes} bytes"
                raise MediaError(f"it begins with {what} instead of IHDR with 13")
            return
        if chunk == b"IDAT":
            if header.color_type == 3 and not self._has_palette:
                raise MediaError("its palette (PLTE) is missing")
            if self._image_ended:
                raise MediaError("other chunks stand between its image data (IDAT)")
            self._image = self._image or _ImageData(header)
            return
        self._image_ended = self._image is not None
        if chunk == b"IEND":
            if self._image is None:
                raise MediaError("it holds no image data (IDAT)")
            if length_bytes:
                raise MediaError("its last chunk (IEND) is not empty")
            self._image.finish()
        elif chunk == b"PLTE":
            entries, odd = divmod(length_bytes, 3)
            most = 2**header.bit_depth if header.color_type == 3 else 256
            if self._has_palette or self._image or header.color_type in (0, 4) or odd or not 1 <= entries <= most:
                raise MediaError("its palette (PLTE) is out of place or of a wrong size")
            self._has_palette = True
        elif chunk == b"IHDR":
            raise MediaError("it holds a second IHDR")
        elif chunk[:1].isupper():
            raise MediaError(f"it holds a critical chunk that is not known: {chunk.decode()}")

    def _parsed_header(self, data: bytes) -> _Header:
        width_px, height_px = int.from_bytes(data[:4], "big"), int.from_bytes(data[4:8], "big")
        bit_depth, color_type, compression, filtering, interlace = data[8:]
        if not (1 <= width_px < 2**31 and 1 <= height_px < 2**31):
            raise MediaError(f"its size of {width_px} x {height_px} pixels is not allowed")
        if width_px * height_px > self._max_pixels:
            raise MediaError(f"its {width_px} x {height_px} pixels are more than {self._max_pixels}")
        if bit_depth not in _BIT_DEPTHS.get(color_type, ()):
            raise MediaError(f"its bit depth {bit_depth} does not go with its colour type {color_type}")
        if compression or filtering or interlace > 1:
            raise MediaError("its compression, filter or interlace method does not exist")
        return _Header(width_px, height_px, bit_depth, color_type, interlace == 1)
