"""What has no end, or is far larger than it looks: time and memory stay within their bounds."""

from __future__ import annotations

import asyncio
import gzip
import itertools
import tracemalloc
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from prefect_eachlabs.api.client import CONNECT_TIMEOUT_SECONDS, MAX_ANSWER_BYTES, READ_TIMEOUT_SECONDS, EachlabsClient
from prefect_eachlabs.errors import DownloadFailed, EachlabsError, OutcomeUnknown, Unanswered
from prefect_eachlabs.images.download import Downloader
from prefect_eachlabs.models import parse_prediction
from tests.api.client_answers import ITEM
from tests.fuzz.kit import Wire, account
from tests.virtual_time import run

MIB = 1024 * 1024
OK = b"HTTP/1.1 200 OK\r\n"

ASKED: list[tuple[Callable[[EachlabsClient], Any], type[EachlabsError], float]] = [
    (lambda client: client.create(ITEM), OutcomeUnknown, 30.0),
    (lambda client: client.get("p-1"), Unanswered, READ_TIMEOUT_SECONDS + CONNECT_TIMEOUT_SECONDS),
    (lambda client: client.cancel("p-1"), Unanswered, READ_TIMEOUT_SECONDS + CONNECT_TIMEOUT_SECONDS),
]


def refused(wire: Wire, ask: Callable[[EachlabsClient], Any]) -> tuple[EachlabsError, float, int]:
    """The error, how long it took by the loop's clock, and how much memory at most."""

    async def story() -> tuple[EachlabsError, float]:
        client = EachlabsClient(account(), transport=wire.transport())
        try:
            with pytest.raises(EachlabsError) as caught:
                await ask(client)
            return caught.value, asyncio.get_running_loop().time()
        finally:
            await client.aclose()

    tracemalloc.start()
    try:
        error, seconds = run(story())
        return error, seconds, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("ask", "kind", "most_seconds"), ASKED, ids=["create", "get", "cancel"])
@pytest.mark.parametrize("head", [b"", OK, OK + b"Content-Length: 4294967296\r\n\r\n", OK + b"\r\n"])
def test_a_byte_a_second_ends_at_the_time_limit(
    ask: Callable[[EachlabsClient], Any], kind: type[EachlabsError], most_seconds: float, head: bytes
) -> None:
    drip = [head] if head else []
    wire = Wire(itertools.chain(drip, itertools.repeat(b"x")), pause_seconds=1.0)
    error, seconds, _ = refused(wire, ask)
    assert type(error) is kind
    assert most_seconds - 2 <= seconds <= most_seconds + 2


ENDLESS: dict[str, tuple[bytes, Iterable[bytes], int]] = {
    "a body of 4 GB": (OK + b"Content-Length: 4294967296\r\n\r\n", itertools.repeat(b" " * 65_536), MAX_ANSWER_BYTES),
    "a body without a length": (OK + b"\r\n", itertools.repeat(b" " * 65_536), MAX_ANSWER_BYTES),
    "chunks of a byte": (OK + b"Transfer-Encoding: chunked\r\n\r\n", itertools.repeat(b"1\r\nx\r\n" * 100), MIB),
    "a header": (OK, itertools.repeat(b"X: " + b"a" * 65_000), MIB),
    "headers": (OK, itertools.repeat(b"X: y\r\n" * 10_000), MIB),
    "trailers": (OK + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", itertools.repeat(b"X: y\r\n" * 10_000), MIB),
    "a status line": (b"HTTP/1.1 200 ", itertools.repeat(b"x" * 65_000), MIB),
    "a chunk's length": (OK + b"Transfer-Encoding: chunked\r\n\r\n", itertools.repeat(b"0" * 65_000), MIB),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_what_has_no_end_is_given_up_within_bounds(name: str) -> None:
    head, endless, most_bytes = ENDLESS[name]
    # Half a second for each piece: taking bytes one by one takes long, and then the time limit is what ends it.
    wire = Wire(itertools.chain([head], endless), pause_seconds=0.5 if "byte" in name else 0.001)
    error, _, peak_bytes = refused(wire, lambda client: client.create(ITEM))
    assert isinstance(error, OutcomeUnknown)
    assert wire.read_bytes <= most_bytes + MIB
    assert peak_bytes < 2 * MAX_ANSWER_BYTES + 4 * MIB


def test_interim_answers_without_end_are_given_up_in_time() -> None:
    wire = Wire(itertools.repeat(b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" * 100), pause_seconds=0.5)
    error, seconds, peak_bytes = refused(wire, lambda client: client.create(ITEM))
    assert isinstance(error, OutcomeUnknown)
    assert seconds <= 32
    assert peak_bytes < 8 * MIB


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_an_answer_that_inflates_a_thousandfold_takes_no_more_memory_than_a_plain_one(encoding: str) -> None:
    bomb = (gzip.compress if encoding == "gzip" else zlib.compress)(bytes(32 * MIB), 9)
    head = OK + f"Content-Encoding: {encoding}\r\nContent-Length: {len(bomb)}\r\n\r\n".encode()
    wire = Wire([head, *(bomb[at : at + 65_536] for at in range(0, len(bomb), 65_536))])
    error, _, peak_bytes = refused(wire, lambda client: client.get("p-1"))
    assert isinstance(error, Unanswered)
    assert peak_bytes < 2 * MAX_ANSWER_BYTES + 8 * MIB


def test_a_json_of_ten_thousand_levels_is_an_answer_that_cannot_be_read() -> None:
    for body in (b"[" * 10_000, b'{"a":' * 10_000, b"[" * 10_000 + b"]" * 10_000):
        wire = Wire([OK + f"Content-Length: {len(body)}\r\n\r\n".encode() + body])
        error, _, _ = refused(wire, lambda client: client.get("p-1"))
        assert isinstance(error, Unanswered)


async def test_redirects_without_end_are_given_up() -> None:
    wire = Wire(itertools.repeat(b"HTTP/1.1 302 Go\r\nLocation: https://files.invalid/on\r\nContent-Length: 0\r\n\r\n"))

    downloader = Downloader(wire.transport())
    try:
        with pytest.raises(DownloadFailed, match="more than 5 redirects"):
            await downloader.fetch("https://files.invalid/a.png", prediction_id="p-1")
    finally:
        await downloader.aclose()
    assert wire.sent.count(b"GET ") == 6


def test_an_output_of_megabytes_is_read_within_bounds() -> None:
    wide = {"status": "success", "output": [f"https://files.invalid/{n}" for n in range(100_000)]}
    assert len(parse_prediction(wide, prediction_id="p-1").output_urls) == 64
    inner = "https://files.invalid/a.png"
    for _ in range(5):
        inner = '["' + inner.replace("\\", "\\\\").replace('"', '\\"') + '"]'
    end = parse_prediction({"status": "success", "output": inner}, prediction_id="p-1")
    assert end.output_urls == ("https://files.invalid/a.png",)
