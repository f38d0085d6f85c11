"""A small input costs a worker little, whoever made it.

No file, answer or row under 1 MB makes a worker grow by more than 300 MB, or stops its loop for more than half a
second. Each is measured in a process of its own.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.batch.workbooks import TEXTS, workbook
from tests.images.test_png import IEND, chunk, header
from tests.images.test_png import png as a_png

pytest.importorskip("openpyxl")
pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc; memory is limited on Linux alone"),
]

MOST_MB = 300
MOST_STOPPED_SECONDS = 0.5
SMALL_BYTES = 1_000_000


def nothing(size: int, checked: Callable[[int], bytes], head: bytes) -> bytes:
    """So many zeros, deflated: after a full flush the same bytes stand for a megabyte more, again and again.

    Args:
        size: Bytes that they stand for.
        checked: What follows them, of their count.
        head: What stands before them.
    """
    deflate, block = zlib.compressobj(9, wbits=-zlib.MAX_WBITS), bytes(1_000_000)
    again = deflate.compress(block) + deflate.flush(zlib.Z_FULL_FLUSH)
    end = deflate.compress(bytes(size % len(block))) + deflate.flush()
    return head + again * (size // len(block)) + end + checked(size)


def zlibbed(size: int) -> bytes:
    return nothing(size, lambda size: struct.pack(">HH", size % 65_521, 1), b"\x78\xda")


def gzipped(size: int) -> bytes:
    def checked(size: int) -> bytes:
        crc = 0
        for left in range(size, 0, -1_000_000):
            crc = zlib.crc32(bytes(min(left, 1_000_000)), crc)
        return struct.pack("<II", crc, size)

    return nothing(size, checked, gzip.compress(b"")[:10])


def png(width_px: int, height_px: int, *more: bytes, depth: int = 8, end: bool = True) -> bytes:
    """RGBA, all of it nothing; `more` are chunks before its image data."""
    data = zlibbed((1 + width_px * depth // 2) * height_px)
    return a_png(header(width_px, height_px, depth, 6), *more, chunk(b"IDAT", data), IEND if end else b"")


def bombs() -> list[bytes]:
    """Text chunks and a colour profile of 64 MB each."""
    bomb = zlibbed(64_000_000)
    return [
        chunk(b"iCCP", b"p\0\0" + bomb),
        chunk(b"zTXt", b"a\0\0" + bomb),
        chunk(b"iTXt", b"a\0\1\0\0\0" + bomb),
    ]


def saved(format: str, size_px: tuple[int, int], **how: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size_px).save(buffer, format, **how)
    return buffer.getvalue()


def webp(width_px: int, height_px: int) -> bytes:
    """All of it black, so that no pixel takes a bit, however many its head says that there are."""
    made = bytearray(saved("WEBP", (64, 64), lossless=True, method=0))
    flags = int.from_bytes(made[21:25], "little") >> 28
    made[21:25] = (flags << 28 | (height_px - 1) << 14 | (width_px - 1)).to_bytes(4, "little")
    return bytes(made)


def animated_webp(width_px: int, height_px: int, frames: int) -> bytes:
    """The same frame, told to be shown again and again."""
    still = webp(width_px, height_px)
    edges = struct.pack("<I", width_px - 1)[:3] + struct.pack("<I", height_px - 1)[:3]
    frame = bytes(6) + edges + bytes(4) + still[12:]
    head = b"VP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + edges
    body = head + b"ANIM" + struct.pack("<IIH", 6, 0, 0) + frames * (b"ANMF" + struct.pack("<I", len(frame)) + frame)
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def table(labels: Any, **how: Any) -> bytes:
    buffer = io.BytesIO()
    columns = pyarrow.table({"prompt": ["a fox"] * len(labels), "label": labels})
    parquet.write_table(columns, buffer, compression="zstd", compression_level=1, write_statistics=False, **how)
    return buffer.getvalue()


def said_once(text: str, cells: int) -> bytes:
    """A file whose cells all are this one, which its dictionary holds."""
    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * cells, pyarrow.int32()), pyarrow.array([text]))
    return table(column, store_schema=False)


def doubling() -> dict[str, Any]:
    steps: dict[str, Any] = {f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(40)}
    return {"$defs": {**steps, "d40": {}}, "properties": {"prompt": {"$ref": "#/$defs/d0"}}}


def exif() -> bytes:
    """A directory of 4,000 fields, each of which says that it is 4 GB, and that leads to itself."""
    field = struct.pack("<HHII", 0x011A, 5, 0x1FFFFFFF, 8)
    tiff = b"II*\0" + struct.pack("<IH", 8, 4_000) + field * 4_000 + struct.pack("<I", 8)
    return b"Exif\0\0" + tiff


def segments(marker: int, body: bytes, count: int) -> bytes:
    """A JPEG with so many equal segments at its head."""
    jpeg = saved("JPEG", (64, 64))
    return jpeg[:2] + count * (struct.pack(">BBH", 0xFF, marker, 2 + len(body)) + body) + jpeg[2:]


def scans(count: int) -> bytes:
    """A progressive JPEG of 80 million px whose last scan comes again and again."""
    jpeg = saved("JPEG", (9_000, 9_000), progressive=True)
    last = jpeg.rindex(b"\xff\xda")
    return jpeg[:last] + jpeg[last:-2][:4_000] * count + b"\xff\xd9"


def nested(depth: int) -> bytes:
    value: Any = pyarrow.array([1])
    for _ in range(depth):
        value = pyarrow.StructArray.from_arrays([value], ["a"])
    return table(value)


def columns(count: int) -> bytes:
    buffer = io.BytesIO()
    names = {f"c{number}": ["x"] for number in range(count)}
    parquet.write_table(pyarrow.table({"prompt": ["a fox"], **names}), buffer, write_statistics=False)
    return buffer.getvalue()


def entities() -> bytes:
    """1,000 letters, a hundred times over, eight times, as `&i;`."""
    doubled = b"".join(b'<!ENTITY %c "%s">' % (98 + n, b"&%c;" % (97 + n) * 100) for n in range(8))
    return b'<!DOCTYPE sst [<!ENTITY a "%s">%s]>' % (b"x" * 1_000, doubled)


def asked(schema: Any, prompt: str = "a fox") -> bytes:
    return json.dumps({"schema": schema, "prompt": prompt}).encode()


INPUTS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "thumbnails of a PNG of 8000 x 8000 px": ("thumbnails", lambda: png(8_000, 8_000)),
    "thumbnails of a PNG of 4096 x 4096 px": ("thumbnails", lambda: png(4_096, 4_096)),
    "thumbnails of a PNG with text of 64 MB": ("thumbnails", lambda: png(64, 64, *bombs())),
    "thumbnails of an animated WebP": ("thumbnails", lambda: animated_webp(4_096, 4_096, 40)),
    "thumbnails of a progressive JPEG of 100 million px": (
        "thumbnails",
        lambda: saved("JPEG", (10_000, 10_000), progressive=True),
    ),
    "thumbnails of a GIF of 65535 px": ("thumbnails", lambda: saved("GIF", (65_535, 200))),
    "downloads of a PNG of 8000 x 8000 px": ("downloads", lambda: png(8_000, 8_000)),
    "downloads of a PNG of 400 MB that is not whole": ("downloads", lambda: png(7_000, 7_000, depth=16, end=False)),
    "downloads of a PNG with text of 64 MB": ("downloads", lambda: png(64, 64, *bombs())),
    "downloads of an animated WebP": ("downloads", lambda: animated_webp(10_000, 10_000, 40)),
    "downloads of a GIF of blocks of nothing": (
        "downloads",
        lambda: saved("GIF", (9, 9))[:-1] + b"\x21\xfe\0" * 330_000 + b";",
    ),
    "downloads of a JPEG of markers": (
        "downloads",
        lambda: saved("JPEG", (9, 9))[:-2] + b"\xff\0" * 490_000 + b"\xff\xd9",
    ),
    "a Parquet file of 80 cells of 5 MB": ("parquet", lambda: said_once("x" * 5_000_000, 80)),
    "a Parquet file of 20 cells of 20 MB": ("parquet", lambda: said_once("x" * 20_000_000, 20)),
    "a Parquet file with a page of 320 MB": (
        "parquet",
        lambda: table(pyarrow.array(["x" * 320_000_000]), use_dictionary=False),
    ),
    "a Parquet file with a list of 50 million nothings": (
        "parquet",
        lambda: table(pyarrow.ListArray.from_arrays([0, 50_000_000], pyarrow.nulls(50_000_000, pyarrow.int8()))),
    ),
    "a workbook with a text of 220 MB": (
        "xlsx",
        lambda: workbook(texts=TEXTS.replace(b"a fox", b"x" * 220_000_000)),
    ),
    "a workbook with 20,000 cells of the same 5 MB": (
        "xlsx",
        lambda: workbook(
            b'<row><c><v>1</v></c><c t="s"><v>2</v></c></row>' * 20_000,
            texts=TEXTS.replace(b"a fox", b"x" * 5_000_000),
        ),
    ),
    "a workbook with 110,000 texts of 2,000 letters": (
        "xlsx",
        lambda: workbook(texts=TEXTS + b"<si><t>%s</t></si>" % (b"x" * 2_000) * 110_000),
    ),
    "a workbook with entities that grow": (
        "xlsx",
        lambda: workbook(texts=TEXTS.replace(b"a fox", b"&i;"), doctype=entities()),
    ),
    "a workbook with a row of 600,000 cells": (
        "xlsx",
        lambda: workbook(b"<row>" + b"<c><v>1</v></c>" * 600_000 + b"</row>"),
    ),
    "a workbook of 100,000 rows of nothing": ("xlsx", lambda: workbook(b"<row/>" * 100_000)),
    "a workbook with rows of 16,384 columns": (
        "xlsx",
        lambda: workbook(b'<row><c r="XFD9"><v>1</v></c></row>' * 300),
    ),
    "a workbook with a number of a million digits": (
        "xlsx",
        lambda: workbook(b"<row><c><v>" + b"9" * 1_000_000 + b"</v></c></row>"),
    ),
    "a workbook that is 200,000 deep": ("xlsx", lambda: workbook(b"<a>" * 200_000 + b"</a>" * 200_000)),
    "a CSV file of one line": ("csv", lambda: b"prompt\n" + b"x" * 900_000),
    "a CSV file of commas": ("csv", lambda: b"prompt\n" + b"," * 900_000),
    "a CSV file of quotes": ("csv", lambda: b"prompt\n" + b'"\n' * 40_000),
    "a CSV file of rows of many lines": ("csv", lambda: b"prompt\n" + (b'"' + b"\n" * 198 + b'"\n') * 900),
    "a JSON Lines file of deep rows": ("jsonl", lambda: b'{"prompt": ' + b"[" * 900_000),
    "a JSON Lines file of numbers": ("jsonl", lambda: b'{"prompt": "a", "n": [' + b"0," * 60_000 + b"0]}\n" * 7),
    "a schema with a pattern that backtracks": (
        "schema",
        lambda: asked({"properties": {"prompt": {"pattern": "^(a+)+$"}}}, "a" * 27 + "!"),
    ),
    "a schema of references that double": ("schema", lambda: asked(doubling())),
    "a schema with a pattern of repeats": (
        "schema",
        lambda: asked({"properties": {"prompt": {"pattern": "(((((x{99}){99}){99}){99}){99})"}}}),
    ),
    "a schema of 200 kB": ("schema", lambda: asked({"allOf": [{"maxLength": 1}] * 10_000}, "x" * 90_000)),
    "an answer that is deep": ("answer", lambda: b"[" * 900_000),
    "an answer of lists": ("answer", lambda: b'{"status": "success", "output": [' + b"[]," * 300_000 + b"[]]}"),
    "an answer of texts of JSON": (
        "answer",
        lambda: json.dumps({"status": "success", "output": [json.dumps(["x" * 100])] * 8_000}).encode(),
    ),
    "an answer of lists, gzipped": (
        "gzipped answer",
        lambda: gzip.compress(b'{"status": "success", "output": [' + b"[]," * 2_700_000 + b"[]]}"),
    ),
    "thumbnails of a PNG of 60,000 chunks": ("thumbnails", lambda: png(9, 9, *[chunk(b"teXt", b"")] * 60_000)),
    "thumbnails of a JPEG of comments": ("thumbnails", lambda: segments(0xFE, b"x" * 65_000, 14)),
    "thumbnails of a JPEG of comments of nothing": ("thumbnails", lambda: segments(0xFE, b"", 200_000)),
    "thumbnails of a JPEG with fields of 4 GB": ("thumbnails", lambda: segments(0xE1, exif(), 9)),
    "thumbnails of a JPEG of many scans": ("thumbnails", lambda: scans(150)),
    "thumbnails of a WebP of 16383 px": ("thumbnails", lambda: webp(16_383, 16_383)),
    "downloads of a PNG of 60,000 chunks": ("downloads", lambda: png(9, 9, *[chunk(b"teXt", b"")] * 60_000)),
    "downloads of a PNG of lines of one px": ("downloads", lambda: png(1, 50_000_000)),
    "downloads of a JPEG of comments of nothing": ("downloads", lambda: segments(0xFE, b"", 200_000)),
    "downloads of an AVIF": ("downloads", lambda: b"\0\0\0\x1cftypavif" + bytes(900_000)),
    "a Parquet file of a value that is 400 deep": ("parquet", lambda: nested(400)),
    "a Parquet file of 4,000 columns": ("parquet", lambda: columns(4_000)),
    "a CSV file of 22,000 columns": (
        "csv",
        lambda: b"prompt," + b",".join(b"%x" % n for n in range(22_000)) + b"\n,\n" * 40_000,
    ),
    "a CSV file of one cell": ("csv", lambda: b'prompt\n"' + b"x" * 900_000 + b'"\n'),
    "a JSON Lines file of a million names": (
        "jsonl",
        lambda: b"".join(
            b'{"prompt":"a",' + b",".join(b'"%x":1' % n for n in range(k, k + 12_000)) + b"}\n"
            for k in range(0, 84_000, 12_000)
        ),
    ),
    "a JSON Lines file of long numbers": (
        "jsonl",
        lambda: b'{"prompt":"a","n":[' + b",".join([b"9" * 4_299] * 28) + b"]}\n",
    ),
    "a schema that refers to itself": ("schema", lambda: asked({"$ref": "#"})),
    "a schema that is deep": ("schema", lambda: b'{"prompt":"a","schema":' + b'{"not":' * 300 + b"{}" + b"}" * 301),
    "an answer of lists 100,000 deep": (
        "answer",
        lambda: b'{"status": "success", "output": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ),
    "an answer with an echo 900 deep": (
        "answer",
        lambda: b'{"status": "success", "input": {"seed": ' + b"[" * 900 + b"]" * 900 + b"}}",
    ),
    "an answer of long numbers": (
        "answer",
        lambda: b'{"status": "failed", "error": "x", "output": [' + b",".join([b"9" * 4_299] * 200) + b"]}",
    ),
    "an answer with an echo of marks": (
        "answer",
        lambda: json.dumps(
            {"status": "success", "input": {"prompt": "a" + "\u0301\u0323" * 220_000}}, ensure_ascii=False
        ).encode(),
    ),
    "an answer with an echo of entities": (
        "answer",
        lambda: json.dumps({"status": "success", "input": {"prompt": "&amp;" * 180_000}}).encode(),
    ),
    "an answer of 19,000 executions": (
        "answer",
        lambda: json.dumps([{"id": str(n), "status": "success", "slug": "m"} for n in range(19_000)]).encode(),
    ),
    "an answer of 1,000 executions of texts": (
        "answer",
        lambda: json.dumps(
            [{"id": str(n), "output": ["{"] * 240} for n in range(1_000)], separators=(",", ":")
        ).encode(),
    ),
    "an answer of one text of lists": (
        "answer",
        lambda: json.dumps({"status": "success", "output": "[" + "[]," * 320_000 + "[]]"}).encode(),
    ),
    "an answer of a URL of 900 kB": (
        "answer",
        lambda: json.dumps({"status": "success", "output": "https://a.invalid/" + "?" * 900_000}).encode(),
    ),
    "a refusal of URLs": ("refusal", lambda: json.dumps({"error": "https://" * 110_000}).encode()),
    "a refusal of escapes": ("refusal", lambda: json.dumps({"error": "\x1b" * 160_000}).encode()),
    "a refusal that is a page of escapes": ("refusal", lambda: b"\x1b" * 900_000),
    "a redirect of 60 kB": ("redirect", lambda: b"https://" * 7_500),
    "a prompt of marks": ("prompt", ("a" + "\u0301\u0323" * 30_000).encode),
    "an answer of 500 MB, gzipped": ("gzipped answer", lambda: gzipped(500_000_000)),
}


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, Path], dict[str, float]]]:
    """What a process of its own measures of an input: importing what it needs takes longer than most inputs do."""
    log = tmp_path_factory.mktemp("workers") / "log"
    with (
        log.open("wb") as said,
        subprocess.Popen(
            [sys.executable, "-m", "tests.security.small_inputs"],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
        ) as process,
    ):

        def measured(scenario: str, path: Path) -> dict[str, float]:
            assert process.stdin is not None
            assert process.stdout is not None
            print(json.dumps([scenario, str(path)]), file=process.stdin, flush=True)
            found: dict[str, float] = json.loads(process.stdout.readline() or "{}")
            assert "grown_mb" in found, (found, log.read_text(errors="replace")[-2_000:])
            return found

        yield measured


@pytest.mark.parametrize("name", INPUTS)
def test_no_small_input_fills_a_worker_or_stops_its_loop(
    name: str, workers: Callable[[str, Path], dict[str, float]], tmp_path: Path
) -> None:
    scenario, make = INPUTS[name]
    data = make()
    assert len(data) < SMALL_BYTES
    path = tmp_path / "input"
    path.write_bytes(data)
    for _ in range(5):  # what else a machine does can only add to a stop
        found = workers(scenario, path)
        if found["stopped_seconds"] < MOST_STOPPED_SECONDS:
            break
    print(f"{name}: {len(data)} bytes, {found['grown_mb']:.0f} MB, {found['stopped_seconds']:.2f} s")
    assert found["grown_mb"] < MOST_MB
    assert found["stopped_seconds"] < MOST_STOPPED_SECONDS
