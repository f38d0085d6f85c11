"""The body of an answer, read and inflated within bounds: 64 kB of it may stand for gigabytes."""

from __future__ import annotations

import zlib

import httpx

ACCEPTED_ENCODINGS = "gzip, deflate"
"""httpx would ask for br and zstd, too, where their packages are; they inflate further, and without a bound."""

_PIECE_BYTES = 65_536


async def read_within(response: httpx.Response, most_bytes: int) -> tuple[bytes, bool]:
    """What an answer holds, and whether that is all of it and could be decoded.

    Args:
        response: Opened, and not read yet.
        most_bytes: Hardly more than this is read, and held in memory.

    Raises:
        httpx.HTTPError: The connection was cut, or what came is not encoded as it says.
    """
    encoding = response.headers.get("Content-Encoding", "").strip().lower()
    body = bytearray()
    # A response that was made with its content (by tests) has decoded it itself.
    if encoding in ("", "identity") or response.is_stream_consumed:
        async for piece in response.aiter_bytes(_PIECE_BYTES):
            body += piece
            if len(body) > most_bytes:
                return bytes(body), False
        return bytes(body), True
    inflater = _Inflater() if encoding in ("gzip", "x-gzip", "deflate") else None
    async for piece in response.aiter_raw(_PIECE_BYTES):
        body += piece if inflater is None else inflater.inflated(piece, most_bytes + 1 - len(body))
        if len(body) > most_bytes:
            return bytes(body), False
    return bytes(body), inflater is not None and (inflater.ended or not body)


class _Inflater:
    """Of gzip and deflate, and of what some servers call deflate and write without its two first bytes."""

    def __init__(self) -> None:
        self._stream = zlib.decompressobj(zlib.MAX_WBITS | 32)
        self._begun = False

    @property
    def ended(self) -> bool:
        return self._stream.eof

    def inflated(self, data: bytes, most_bytes: int) -> bytes:
        """At most so many bytes of what these stand for."""
        try:
            found = self._stream.decompress(data, most_bytes)
        except zlib.error as error:
            if self._begun:
                raise httpx.DecodingError(str(error)) from error
            self._stream, self._begun = zlib.decompressobj(-zlib.MAX_WBITS), True
            return self.inflated(data, most_bytes)
        self._begun = True
        return found
