"""`download.py` brings a whole picture or an error that keeps what was paid for."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import logging
import socket
import zlib
from collections.abc import AsyncIterator, Callable

import httpx
import pytest

from prefect_eachlabs.errors import DownloadFailed, EachlabsError, NotAPng, NotYetSafe
from prefect_eachlabs.images import download
from prefect_eachlabs.images.download import Downloader
from prefect_eachlabs.models import Media
from prefect_eachlabs.net.public_get import MAX_REDIRECTS
from prefect_eachlabs.net.public_only import HostGuard
from tests.images.test_png import IEND, SMALL, chunk, header, idat, png
from tests.virtual_time import run

URL = "https://pictures.invalid/out/1.png?X-Amz-Signature=secret"
HERE = HostGuard(api_host="127.0.0.1")
Answer = Callable[[httpx.Request], httpx.Response]


class Host:
    """A picture's host that keeps what it was asked."""

    def __init__(self, answer: Answer | bytes) -> None:
        self.requests: list[httpx.Request] = []
        self._answer: Answer = answer if callable(answer) else lambda _: httpx.Response(200, content=answer)

    def transport(self) -> httpx.MockTransport:
        def handle(request: httpx.Request) -> httpx.Response:
            self.requests.append(request)
            return self._answer(request)

        return httpx.MockTransport(handle)


class Body(httpx.AsyncByteStream):
    """A body that comes piece by piece, with a pause before each."""

    def __init__(self, *pieces: bytes, pause_seconds: float = 0.0) -> None:
        self.pieces = pieces
        self.pause_seconds = pause_seconds
        self.sent = 0
        self.closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self.pieces:
            await asyncio.sleep(self.pause_seconds)
            self.sent += 1
            yield piece

    async def aclose(self) -> None:
        self.closed = True


async def fetch(downloader: Downloader, url: str = URL) -> Media:
    try:
        return await downloader.fetch(url, prediction_id="pred-1", item_id="item-1")
    finally:
        await downloader.aclose()


def failure(answer: Answer | bytes, url: str = URL) -> EachlabsError:
    with pytest.raises(NotYetSafe) as caught:
        run(fetch(Downloader(Host(answer).transport()), url))
    error = caught.value
    assert (error.prediction_id, error.item_id) == ("pred-1", "item-1")
    assert error.retryable
    assert "secret" not in str(error)
    assert "pred-1" in str(error)
    assert "run again" in str(error)
    return error


def answering(status_code: int, content: bytes = b"", **headers: str) -> Answer:
    return lambda _: httpx.Response(
        status_code, content=content, headers={k.replace("_", "-"): v for k, v in headers.items()}
    )


# ------------------------------------------------------------------------ a whole picture


def test_a_picture_comes_unchanged_with_its_digest_and_size() -> None:
    picture = run(fetch(Downloader(Host(SMALL).transport())))
    assert picture.data == SMALL
    assert picture.sha256 == hashlib.sha256(SMALL).hexdigest()
    assert (picture.width_px, picture.height_px) == (2, 2)


def test_the_bytes_decide_and_not_the_content_type() -> None:
    assert run(fetch(Downloader(Host(answering(200, SMALL, Content_Type="image/jpeg")).transport()))).data == SMALL


def test_no_key_no_cookie_and_no_encoding_goes_with_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EACHLABS_API_KEY", "k-secret")
    host = Host(answering(200, SMALL, Set_Cookie="session=1; Path=/"))

    async def twice() -> None:
        downloader = Downloader(host.transport())
        await downloader.fetch(URL, prediction_id="pred-1")
        await fetch(downloader)

    run(twice())
    assert len(host.requests) == 2
    for request in host.requests:
        assert request.method == "GET"
        assert request.headers["Accept-Encoding"] == "identity"
        assert not {"cookie", "authorization", "x-api-key"} & set(request.headers)
        assert "k-secret" not in repr(request.headers.raw)


async def test_a_downloader_that_was_closed_opens_again() -> None:
    downloader = Downloader(Host(SMALL).transport())
    await fetch(downloader)
    assert (await fetch(downloader)).data == SMALL


# ------------------------------------------------------------------------------ redirects


def redirecting(times: int, *, location: str | None = None) -> Host:
    def answer(request: httpx.Request) -> httpx.Response:
        hop = int(request.url.params.get("hop", 0))
        if hop < times:
            return httpx.Response(302, headers={"Location": location or f"/out/1.png?hop={hop + 1}&token=secret"})
        return httpx.Response(200, content=SMALL)

    return Host(answer)


def test_as_many_redirects_as_allowed_are_followed() -> None:
    host = redirecting(MAX_REDIRECTS)
    assert run(fetch(Downloader(host.transport()))).data == SMALL
    assert len(host.requests) == MAX_REDIRECTS + 1


def test_one_redirect_more_is_refused() -> None:
    host = redirecting(MAX_REDIRECTS + 1)
    with pytest.raises(DownloadFailed, match="more than 5 redirects") as caught:
        run(fetch(Downloader(host.transport())))
    assert len(host.requests) == MAX_REDIRECTS + 1
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "location", ["file:///etc/passwd", "ftp://pictures.invalid/1.png", "data:image/png;base64,AAAA"]
)
def test_a_redirect_to_what_is_not_http_is_refused(location: str) -> None:
    host = redirecting(1, location=location)
    with pytest.raises(DownloadFailed, match=r"not http\(s\)|InvalidURL"):
        run(fetch(Downloader(host.transport())))
    assert len(host.requests) == 1


@pytest.mark.parametrize(
    "url", ["", "pictures.invalid/1.png", "ftp://pictures.invalid/1.png", "https://", "http://[::1", "http://a:b/"]
)
def test_a_url_that_cannot_be_asked_is_a_failed_download(url: str) -> None:
    with pytest.raises(DownloadFailed, match="pred-1"):
        run(fetch(Downloader(Host(SMALL).transport()), url))


# ------------------------------------------------------------------------ what is not a picture


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"\xef\xbb\xbf \n<!doctype html><body>Sign in", "it begins like an HTML page, not like a PNG"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "it begins like an XML, not like a PNG"),
        (b'{"error": "expired"}', "it begins like a JSON, not like a PNG"),
        (SMALL[:-5], "it is truncated"),
        (SMALL + b"\0", "bytes follow its end"),
        (b"", "it is empty (0 bytes)"),
        (png(header(2, 2), idat(bytes(50)), IEND), "decompress to more"),
    ],
)
def test_what_is_no_whole_png_is_refused_with_its_reason_and_its_url(body: bytes, reason: str) -> None:
    error = failure(body)
    assert isinstance(error, NotAPng)
    assert reason in error.message
    assert "paid for" in error.message
    assert error.url == "https://pictures.invalid/out/1.png"


# -------------------------------------------------------------------------- what does not come


def large(end: bytes) -> bytes:
    """40 MB of image data in 40 kB."""
    return png(header(4_000, 10_000), idat(bytes(10_000 * 4_001)), end)


async def test_the_loop_has_its_turn_while_a_large_picture_is_verified() -> None:
    data = large(IEND)

    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    beside = asyncio.ensure_future(others())
    assert (await fetch(Downloader(Host(data).transport()))).data == data
    beside.cancel()
    assert turns > len(data) / 4096


def test_a_large_picture_that_is_refused_is_taken_apart_twice_and_not_for_each_retry() -> None:
    host = Host(large(b""))

    async def story() -> list[str]:
        downloader = Downloader(host.transport())
        said = []
        for number in range(5):
            with pytest.raises(NotAPng) as caught:
                await downloader.fetch(f"{URL}-{number}", prediction_id="pred-1")
            said.append(caught.value.message)
        await downloader.aclose()
        return said

    said = run(story())
    assert len(host.requests) == 2
    assert all("is truncated" in line for line in said)
    assert "seen 2 times; this process does not take it apart again" in said[-1]


@pytest.mark.parametrize("status_code", [403, 404, 410])
def test_a_picture_that_is_gone_says_how_long_the_vendor_keeps_it(status_code: int) -> None:
    error = failure(answering(status_code, b"<Error><SecretKey>secret</SecretKey></Error>"))
    assert isinstance(error, DownloadFailed)
    assert error.status_code == status_code
    assert "24 h" in error.message
    assert f"HTTP {status_code}" in error.message


@pytest.mark.parametrize("status_code", [201, 204, 206, 301, 304, 400, 429, 500, 503])
def test_only_status_200_brings_a_picture(status_code: int) -> None:
    error = failure(answering(status_code, b"" if status_code in (204, 304) else SMALL))
    assert error.status_code == status_code


@pytest.mark.parametrize("announced_bytes", [len(SMALL) - 1, len(SMALL) + 1])
def test_a_length_that_does_not_match_is_refused_even_when_the_picture_is_whole(announced_bytes: int) -> None:
    headers = {"Content-Length": str(announced_bytes)}
    error = failure(lambda _: httpx.Response(200, stream=Body(SMALL), headers=headers))
    assert f"{len(SMALL)} bytes instead of {announced_bytes}" in error.message


@pytest.mark.parametrize("encoding", ["gzip", "x-gzip", "deflate", "GZIP"])
def test_a_host_that_compresses_whatever_it_sends_brings_the_picture(encoding: str) -> None:
    """Some do, whatever is asked for: what was paid for must not be lost to that."""
    sent = (zlib.compress if encoding == "deflate" else gzip.compress)(SMALL)
    headers = {"Content-Encoding": encoding, "Content-Length": str(len(sent))}
    host = Host(
        lambda _: httpx.Response(200, stream=Body(*[sent[i : i + 7] for i in range(0, len(sent), 7)]), headers=headers)
    )
    assert run(fetch(Downloader(host.transport()))).data == SMALL


def test_a_compressed_picture_that_is_cut_off_is_refused() -> None:
    sent = gzip.compress(SMALL)[:-9]
    error = failure(lambda _: httpx.Response(200, stream=Body(sent), headers={"Content-Encoding": "gzip"}))
    assert isinstance(error, DownloadFailed)


def test_a_compressed_picture_that_inflates_to_more_than_a_picture_does_is_a_bomb() -> None:
    """20 kB may stand for 20 MiB: it is given up after 2 MiB."""
    bomb = gzip.compress(SMALL[:-12] + chunk(b"tEXt", bytes(20 * 1024 * 1024)))
    body = Body(*[bomb[i : i + 4096] for i in range(0, len(bomb), 4096)])
    error = failure(lambda _: httpx.Response(200, stream=body, headers={"Content-Encoding": "gzip"}))
    assert isinstance(error, NotAPng)
    assert "inflates" in error.message
    assert body.sent < 3


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, gzip"])
def test_an_encoding_that_cannot_be_taken_off_within_bounds_is_refused(encoding: str) -> None:
    error = failure(lambda _: httpx.Response(200, stream=Body(b"x"), headers={"Content-Encoding": encoding}))
    assert f"encoded ({encoding})" in error.message


@pytest.mark.parametrize(
    "fault", [httpx.ReadTimeout, httpx.ConnectTimeout, httpx.ConnectError, httpx.RemoteProtocolError]
)
def test_what_the_network_does_is_a_failed_download(fault: type[httpx.TransportError]) -> None:
    def answer(_: httpx.Request) -> httpx.Response:
        raise fault("the cable")

    assert isinstance(failure(answer), DownloadFailed)


# -------------------------------------------------------------------------- what comes slowly


def long_png(size_bytes: int) -> bytes:
    """A whole PNG of about so many bytes, most of them a comment."""
    return SMALL[:-12] + chunk(b"tEXt", b"x\0" + bytes(size_bytes)) + IEND


async def test_a_picture_that_takes_ten_minutes_arrives() -> None:
    """A slow line is no reason to lose what was paid for: what counts is that it goes on."""
    data = long_png(12 * 1024 * 1024)
    body = Body(*[data[i : i + 65_536] for i in range(0, len(data), 65_536)], pause_seconds=3.0)

    picture = await fetch(Downloader(Host(lambda _: httpx.Response(200, stream=body)).transport()))
    assert picture.data == data
    assert asyncio.get_running_loop().time() > 570


def test_a_body_that_only_drips_is_given_up_after_a_minute() -> None:
    body = Body(*[SMALL[i : i + 1] for i in range(len(SMALL))], pause_seconds=1.0)
    host = Host(lambda _: httpx.Response(200, stream=body))

    async def story() -> float:
        with pytest.raises(DownloadFailed, match=r"did not come in time \(5\d bytes came\)"):
            await fetch(Downloader(host.transport()))
        return asyncio.get_running_loop().time()

    assert len(SMALL) > 61
    assert 59 <= run(story()) <= 61
    assert body.closed


async def test_no_host_holds_a_download_for_more_than_half_an_hour() -> None:
    data = long_png(20 * 1024 * 1024)
    body = Body(*[data[i : i + 16_384] for i in range(0, len(data), 16_384)], pause_seconds=1.5)

    with pytest.raises(DownloadFailed, match="did not come in time"):
        await fetch(Downloader(Host(lambda _: httpx.Response(200, stream=body)).transport()))
    assert asyncio.get_running_loop().time() == 1800.0
    assert body.closed


async def test_a_picture_of_a_hundred_megabytes_arrives_and_large_ones_come_one_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(download, "LARGE_BYTES", 16 * 1024 * 1024)
    whole = {"0": long_png(100 * 1024 * 1024), "1": long_png(32 * 1024 * 1024)}
    piece_bytes = 4 * 1024 * 1024

    def answer(request: httpx.Request) -> httpx.Response:
        data = whole[request.url.path[-1]]
        pieces = [data[i : i + piece_bytes] for i in range(0, len(data), piece_bytes)]
        return httpx.Response(200, stream=Body(*pieces, pause_seconds=1.0))

    downloader = Downloader(Host(answer).transport())
    began = asyncio.get_running_loop().time()
    media = await asyncio.gather(*(downloader.fetch(f"https://pictures.invalid/{name}") for name in whole))
    assert all(found.data == data for found, data in zip(media, whole.values(), strict=True))
    assert asyncio.get_running_loop().time() - began > 28, "the second waited where the first was large"
    await downloader.aclose()


async def test_a_cancelled_download_closes_its_connection() -> None:
    body = Body(SMALL, pause_seconds=30.0)
    host = Host(lambda _: httpx.Response(200, stream=body))

    task = asyncio.ensure_future(fetch(Downloader(host.transport())))
    await asyncio.sleep(5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert body.closed


def test_the_log_of_httpx_shows_no_query_of_a_picture(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    run(fetch(Downloader(Host(SMALL).transport())))
    assert "https://pictures.invalid/out/1.png" in caplog.text
    assert "secret" not in caplog.text


# ------------------------------------------------------------------------ with a real socket


async def against_a_real_host(answer: bytes) -> Media:
    """A host that sends these bytes and closes the connection."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        return await fetch(Downloader(hosts=HERE), f"http://127.0.0.1:{port}/1.png?token=secret")
    finally:
        server.close()
        await server.wait_closed()


def test_a_picture_comes_over_a_real_connection() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(SMALL)
    assert asyncio.run(against_a_real_host(head + SMALL)).data == SMALL


def test_a_connection_cut_in_the_middle_is_a_failed_download_that_tells_how_far_it_came() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(SMALL)
    with pytest.raises(DownloadFailed, match="after 40 bytes") as caught:
        asyncio.run(against_a_real_host(head + SMALL[:40]))
    assert "secret" not in str(caught.value)


def test_a_connection_cut_in_the_middle_of_a_body_without_length_is_no_whole_png() -> None:
    with pytest.raises(NotAPng, match="truncated"):
        asyncio.run(against_a_real_host(b"HTTP/1.1 200 OK\r\n\r\n" + SMALL[:40]))


def test_an_answer_that_is_no_http_is_a_failed_download() -> None:
    with pytest.raises(DownloadFailed, match="RemoteProtocolError"):
        asyncio.run(against_a_real_host(SMALL))


def test_a_host_where_nobody_listens_is_a_failed_download() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(DownloadFailed, match="ConnectError"):
        asyncio.run(fetch(Downloader(hosts=HERE), f"http://127.0.0.1:{port}/1.png"))
