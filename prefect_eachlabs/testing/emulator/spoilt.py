"""Pictures that went wrong: what a downloader must not let into a bucket."""

from __future__ import annotations

import functools
import io
import struct
import zlib
from collections.abc import Callable

from PIL import Image
from starlette.responses import RedirectResponse, Response

from prefect_eachlabs.testing.emulator.clock import Clock
from prefect_eachlabs.testing.emulator.faults import Fault
from prefect_eachlabs.testing.emulator.pictures import PNG_SIGNATURE, png_chunk
from prefect_eachlabs.testing.emulator.responses import CutResponse, DripResponse, error, html

_MIB = 1024 * 1024
_ADLER_MODULUS = 65_521


def zeros_deflated(mebibytes: int) -> bytes:
    """A zlib stream of so many MiB of zeros, made in milliseconds.

    After a full flush a deflate block stands for itself, so one block can be repeated; the Adler-32 of n zeros is
    `(n mod 65521) << 16 | 1`.
    """
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = deflate.compress(bytes(_MIB)) + deflate.flush(zlib.Z_FULL_FLUSH)
    end = deflate.flush(zlib.Z_FINISH)
    adler = ((mebibytes * _MIB) % _ADLER_MODULUS) << 16 | 1
    return b"\x78\xda" + block * mebibytes + end + struct.pack(">I", adler)


@functools.lru_cache(maxsize=4)
def bomb(width_px: int, height_px: int, mebibytes: int) -> bytes:
    """A PNG of some size whose image data inflates to another."""
    header = struct.pack(">IIBBBBB", width_px, height_px, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zeros_deflated(mebibytes)), (b"IEND", b""))
    return PNG_SIGNATURE + b"".join(png_chunk(kind, data) for kind, data in chunks)


def with_a_wrong_bit(png: bytes) -> bytes:
    """One bit of the first IDAT chunk's data turned round, so that its CRC is wrong."""
    at = png.index(b"IDAT") + 4 + 10
    return png[:at] + bytes([png[at] ^ 1]) + png[at + 1 :]


def as_jpeg(png: bytes) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()


def redirected_again(path: str, hop: str) -> Response | None:
    """The answer to who followed a redirect into a loop; None for any other request."""
    return RedirectResponse(f"{path}?hop={int(hop) + 1}", status_code=302) if hop.isdigit() else None


def spoil(picture: bytes, media_type: str, fault: Fault, clock: Clock, *, path: str) -> Response:
    """The answer to a download that a fault hits."""
    kind = fault.kind
    seconds = 60.0 if fault.seconds is None else fault.seconds
    whole = Response(picture, media_type=media_type)
    bodies: dict[str, Callable[[], bytes]] = {
        "truncated": lambda: picture[: len(picture) * 2 // 3],
        "trailing": lambda: picture + b"<!-- served by cache-7 -->",
        "bad_crc": lambda: with_a_wrong_bit(picture),
        "jpeg": lambda: as_jpeg(picture),
        "empty": lambda: b"",
        "bomb": lambda: bomb(512, 512, 1_024),
        "bomb_wide": lambda: bomb(100_000, 100_000, 16),
    }
    if kind in bodies:
        return Response(bodies[kind](), media_type=media_type)
    if kind == "html":
        return html(fault.status or 200)
    if kind == "cut":
        return CutResponse(whole, part=0.5)
    if kind == "reset":
        return CutResponse(reset=True)
    if kind == "wrong_length":
        return CutResponse(whole, part=1.0, more_bytes=64)
    if kind in ("slow", "no_length"):
        return DripResponse(whole, clock, seconds=seconds if kind == "slow" else 0.0, with_length=kind == "slow")
    if kind == "not_found":
        return error(404, "Not Found")
    if kind == "throttled":
        return error(429, "Too many requests")
    if kind == "redirect":
        return RedirectResponse(f"{path}?hop=last", status_code=fault.status or 302)
    if kind == "redirect_loop":
        return RedirectResponse(f"{path}?hop=1", status_code=fault.status or 302)
    return error(fault.status or 503, "service temporarily unavailable")
