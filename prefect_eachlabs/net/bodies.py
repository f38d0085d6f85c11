"""The bodies of answers, within bounds: what was encoded, though nobody asked for it, is taken off piece by piece."""

from __future__ import annotations

import zlib
from collections.abc import AsyncIterator

import httpx

PIECE_BYTES = 65_536
ENCODINGS = ("identity", "gzip", "x-gzip", "deflate")
"""`identity` is asked for everywhere. Some proxies and hosts compress whatever they send, and what they send may be
paid for."""


def encoding_of(response: httpx.Response) -> str:
    """How the body came; one of `ENCODINGS`, or what is not read."""
    return str(response.headers.get("Content-Encoding", "")).strip().lower() or "identity"


def byte_count(text: str) -> int | None:
    """A number of bytes in a header; None when it is none."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None


async def decoded(response: httpx.Response) -> AsyncIterator[bytes]:
    """The body as it comes; what was encoded in pieces of 64 KiB at most. The caller counts them, and may stop.

    Raises:
        httpx.DecodingError: It is not what it is said to be, or cut off.
        httpx.HTTPError: It did not come.
    """
    # A response that was made with its content (by tests) has decoded it itself.
    if encoding_of(response) == "identity" or response.is_stream_consumed:
        async for piece in response.aiter_bytes():
            yield piece
        return
    inflater = zlib.decompressobj(zlib.MAX_WBITS | 32)
    async for raw in response.aiter_raw():
        rest, piece = raw, b""
        while rest or len(piece) == PIECE_BYTES:  # zlib may have taken all of it and hold output back
            try:
                piece = inflater.decompress(rest, PIECE_BYTES)
            except zlib.error as error:
                raise httpx.DecodingError(str(error)) from error
            rest = inflater.unconsumed_tail
            yield piece
        if inflater.eof:
            return  # what follows is nobody's, and may have no end
    if response.num_bytes_downloaded:
        raise httpx.DecodingError("it came cut off")
