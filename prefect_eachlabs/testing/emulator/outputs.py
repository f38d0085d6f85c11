"""What a prediction may put out; and what is not a picture, as small files that begin, and mostly are, what they are
called. Pictures are drawn in `pictures.py`.
"""

from __future__ import annotations

import html
import io
import json
import math
import struct
import wave
from collections.abc import Callable

PICTURE_TYPES = {name: f"image/{name}" for name in ("png", "jpeg", "webp", "gif", "avif")}
MEDIA_TYPES = {
    **PICTURE_TYPES,
    "svg": "image/svg+xml",
    "mp4": "video/mp4",
    "webm": "video/webm",
    "mp3": "audio/mpeg",
    "wav": "audio/wav",
    "glb": "model/gltf-binary",
    "txt": "text/plain; charset=utf-8",
    "json": "application/json",
    "html": "text/html; charset=utf-8",
}
"""Every kind of output, by the ending of its URL."""
_TONE_SECONDS, _TONE_HERTZ, _SAMPLES_A_SECOND = 0.5, 440, 8_000


def other_output(prompt: str, format: str) -> bytes:
    """The file of a format that is not a picture; the same prompt gives the same bytes."""
    return _MADE[format](prompt)


def _svg(prompt: str) -> bytes:
    said = html.escape(prompt[:200])
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 512 512"><rect width="512" height="512" fill="#345"/>'
        f'<text x="40" y="80" fill="#fff" font-size="28">{said}</text></svg>\n'
    ).encode()


def _box(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(body), kind) + body


def _mp4(prompt: str) -> bytes:
    """The boxes of an MP4 without a film in them."""
    return _box(b"ftyp", b"isom\0\0\2\0isommp41") + _box(b"free", prompt.encode()) + _box(b"mdat", bytes(4096))


def _webm(prompt: str) -> bytes:
    """The head of a WebM without a film behind it."""
    return b"\x1a\x45\xdf\xa3\x8b\x42\x82\x88webm\0\0\0\0" + prompt.encode() + bytes(4096)


def _mp3(prompt: str) -> bytes:
    """A title and silence: frames of MPEG 1, layer 3, 128 kbit/s at 44.1 kHz."""
    title = b"TIT2" + struct.pack(">I2xB", 1 + len(prompt.encode()), 3) + prompt.encode()
    size = bytes(len(title) >> shift & 127 for shift in (21, 14, 7, 0))
    return b"ID3\3\0\0" + size + title + (b"\xff\xfb\x90\x00" + bytes(413)) * 38


def _wav(prompt: str) -> bytes:
    """Half a second of one tone."""
    count = int(_TONE_SECONDS * _SAMPLES_A_SECOND)
    tone = (math.sin(2 * math.pi * _TONE_HERTZ * at / _SAMPLES_A_SECOND) for at in range(count))
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(_SAMPLES_A_SECOND)
        file.writeframes(b"".join(struct.pack("<h", int(8_000 * sample)) for sample in tone))
    return buffer.getvalue()


def _glb(prompt: str) -> bytes:
    """One triangle, named by the prompt."""
    corners = struct.pack("<9f", 0, 0, 0, 1, 0, 0, 0, 1, 0)
    view = {"buffer": 0, "byteLength": len(corners)}
    accessor = {"bufferView": 0, "componentType": 5126, "count": 3, "type": "VEC3", "min": [0] * 3, "max": [1, 1, 0]}
    scene = {
        "asset": {"version": "2.0"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0, "name": prompt[:200]}],
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0}}]}],
        "accessors": [accessor],
        "bufferViews": [view],
        "buffers": [{"byteLength": len(corners)}],
    }
    text = json.dumps(scene).encode()
    text += b" " * (-len(text) % 4)
    chunks = struct.pack("<I4s", len(text), b"JSON") + text + struct.pack("<I4s", len(corners), b"BIN\0") + corners
    return struct.pack("<4sII", b"glTF", 2, 12 + len(chunks)) + chunks


_MADE: dict[str, Callable[[str], bytes]] = {
    "svg": _svg,
    "mp4": _mp4,
    "webm": _webm,
    "mp3": _mp3,
    "wav": _wav,
    "glb": _glb,
    "txt": lambda prompt: f"{prompt}\n".encode(),
    "json": lambda prompt: json.dumps({"prompt": prompt}).encode(),
    "html": lambda prompt: f"<!doctype html><title>{html.escape(prompt)}</title>\n".encode(),
}
