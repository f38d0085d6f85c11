"""The client on real sockets: what is cut, closed, redirected or endless; and where the key never goes."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import logging
import re
import socket
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from prefect_eachlabs.api.client import MAX_ANSWER_BYTES, EachlabsClient
from prefect_eachlabs.errors import EachlabsError, NotSent, OutcomeUnknown, Rejected, SetupError, Unanswered
from prefect_eachlabs.limits.limiter import Kind
from prefect_eachlabs.models import Prediction
from tests.api.client_answers import ITEM, KEY, cancel, create, executions, get, settings
from tests.limits.local import local_limiter

# -------------------------------------------------------------------------- real sockets

Served = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def serving(handler: Served) -> AsyncIterator[int]:
    """A server on a free port that speaks what the handler writes."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await handler(reader, writer)
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        await server.wait_closed()


async def read_request(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    for line in head.split(b"\r\n"):
        if line.lower().startswith(b"content-length:"):
            return head + await reader.readexactly(int(line.split(b":")[1]))
    return head


def over_the_wire(answer: bytes | None, ask: Callable[[EachlabsClient], Awaitable[Any]]) -> tuple[Any, list[bytes]]:
    """The outcome (or the error) of an answer that was sent byte by byte, and the requests that came; None: cut."""
    requests: list[bytes] = []

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        requests.append(await read_request(reader))
        if answer is not None:
            writer.write(answer)
            await writer.drain()

    async def story() -> Any:
        async with serving(handler) as port:
            client = EachlabsClient(settings(base_url=f"http://127.0.0.1:{port}"))
            try:
                return await ask(client)
            except EachlabsError as error:
                return error
            finally:
                await client.aclose()

    return asyncio.run(story()), requests


@pytest.mark.parametrize(
    "answer",
    [
        None,
        b"HTTP/1.1 200 OK\r\nContent-Len",
        b'HTTP/1.1 200 OK\r\nContent-Length: 23\r\n\r\n{"predictionID"',
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 5\r\n\r\nhello",
    ],
    ids=["cut", "cut head", "cut body", "bad chunks", "not HTTP", "not gzip"],
)
def test_an_order_whose_answer_is_broken_is_never_sent_again(answer: bytes | None) -> None:
    outcome, requests = over_the_wire(answer, create)
    assert isinstance(outcome, OutcomeUnknown)
    assert len(requests) == 1


def test_an_order_on_a_kept_connection_that_the_server_has_closed_is_not_sent_twice() -> None:
    """The first answer keeps the connection open, then the server cuts it: httpx must not repeat the POST by itself."""
    requests: list[bytes] = []

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        requests.append(await read_request(reader))
        writer.write(b'HTTP/1.1 200 OK\r\nContent-Length: 23\r\n\r\n{"predictionID": "p-1"}')
        await writer.drain()
        requests.append(await read_request(reader))

    async def story() -> None:
        async with serving(handler) as port:
            client = EachlabsClient(settings(base_url=f"http://127.0.0.1:{port}"))
            await client.create(ITEM)
            with pytest.raises(OutcomeUnknown):
                await client.create(ITEM)
            await client.aclose()

    asyncio.run(story())
    assert len(requests) == 2


NO_API = [
    b"HTTP/1.1 200 OK\r\nContent-Length: 21\r\n\r\n<!doctype html><html>",
    b"HTTP/1.1 404 Not Found\r\nContent-Length: 21\r\n\r\n<?xml version='1.0'?>",
    b'HTTP/1.1 200 OK\r\nContent-Length: 15\r\n\r\n{"status":"up"}',
]
INCONCLUSIVE = [
    None,
    b"SSH-2.0-OpenSSH_9.2\r\n",
    b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 6\r\n\r\n<html>",
    b'HTTP/1.1 404 Not Found\r\nContent-Length: 13\r\n\r\n{"error":"x"}',
    b'HTTP/1.1 401 Unauthorized\r\nContent-Length: 13\r\n\r\n{"error":"x"}',
]


@pytest.mark.parametrize("answer", NO_API, ids=["page", "S3", "other JSON"])
def test_a_server_that_is_not_the_api_is_told_before_anything_is_ordered(answer: bytes) -> None:
    outcome, requests = over_the_wire(answer, EachlabsClient.check_api)
    assert isinstance(outcome, SetupError)
    assert re.match(r"This is not the Eachlabs API: 127\.0\.0\.1:\d+ \(EACHLABS_BASE_URL\) answered HTTP", str(outcome))
    assert len(requests) == 1
    assert requests[0].startswith(b"GET /v1/models?limit=1 ")
    assert KEY.encode() not in requests[0], "whoever is there gets no key"


@pytest.mark.parametrize("answer", INCONCLUSIVE, ids=["cut", "not HTTP", "proxy", "no catalogue", "asks for a key"])
def test_what_is_not_sure_to_be_another_server_may_be_the_api(answer: bytes | None) -> None:
    outcome, requests = over_the_wire(answer, EachlabsClient.check_api)
    assert outcome is None
    assert len(requests) == 1


def test_the_api_is_looked_at_once() -> None:
    async def together(client: EachlabsClient) -> None:
        await asyncio.gather(*(client.check_api() for _ in range(5)))
        await client.check_api()

    _, requests = over_the_wire(b'HTTP/1.1 200 OK\r\nContent-Length: 13\r\n\r\n{"models":[]}', together)
    assert len(requests) == 1


def test_the_look_at_the_api_is_a_request_that_the_account_counts() -> None:
    async def look(client: EachlabsClient) -> float:
        limiter = local_limiter(requests_per_minute=5, max_in_flight=1)
        await client.check_api(limiter)
        return limiter.pressure(Kind.REQUESTS)

    outcome, requests = over_the_wire(b'HTTP/1.1 200 OK\r\nContent-Length: 13\r\n\r\n{"models":[]}', look)
    assert len(requests) == 1
    assert outcome == 1 / 5


def test_nobody_listening_means_that_nothing_was_sent() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]

        async def story() -> None:
            client = EachlabsClient(settings(base_url=f"http://127.0.0.1:{port}"))
            with pytest.raises(NotSent):
                await client.create(ITEM)
            with pytest.raises(NotSent):
                await client.get("p-1")
            await client.aclose()

        asyncio.run(story())


@pytest.mark.parametrize("status", [300, 301, 302, 303, 304, 307, 308])
def test_the_key_never_follows_a_redirect_to_another_host(status: int) -> None:
    elsewhere: list[bytes] = []

    async def other(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        elsewhere.append(await reader.read(100))

    async def story() -> None:
        async with serving(other) as other_port:

            async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                await read_request(reader)
                location = f"http://127.0.0.1:{other_port}/v1/prediction/"
                writer.write(f"HTTP/1.1 {status} X\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode())
                await writer.drain()

            async with serving(handler) as port:
                client = EachlabsClient(settings(base_url=f"http://127.0.0.1:{port}"))
                for ask in (create, get, cancel, executions):
                    with pytest.raises(Rejected, match="EACHLABS_BASE_URL"):
                        await ask(client)
                await client.aclose()

    asyncio.run(story())
    assert elsewhere == []


def test_a_huge_answer_is_not_read_to_its_end() -> None:
    size = 20 * MAX_ANSWER_BYTES
    sent = 0

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await read_request(reader)
        writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {size}\r\n\r\n".encode())
        with contextlib.suppress(OSError):
            while sent < size:
                writer.write(b" " * 65_536)
                sent += 65_536
                await writer.drain()

    async def story() -> None:
        async with serving(handler) as port:
            client = EachlabsClient(settings(base_url=f"http://127.0.0.1:{port}"))
            with pytest.raises(Unanswered):
                await client.get("p-1")
            await client.aclose()

    asyncio.run(story())
    assert sent < size / 2


def test_an_answer_that_inflates_is_not_kept() -> None:
    bomb = gzip.compress(b" " * (4 * MAX_ANSWER_BYTES))
    head = f"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: {len(bomb)}\r\n\r\n"
    outcome, _ = over_the_wire(head.encode() + bomb, get)
    assert isinstance(outcome, Unanswered)


@pytest.mark.parametrize("ask", [create, get])
def test_no_encoding_is_asked_for_and_one_that_comes_all_the_same_is_read_or_named(
    ask: Callable[[EachlabsClient], Awaitable[Any]],
) -> None:
    body = b'{"predictionID": "p-1", "status": "created"}'
    packed = gzip.compress(body)
    head = f"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: {len(packed)}\r\n\r\n"
    outcome, requests = over_the_wire(head.encode() + packed, ask)
    assert isinstance(outcome, Prediction)
    assert b"accept-encoding: identity" in requests[0].lower()
    head = "HTTP/1.1 200 OK\r\nContent-Encoding: br\r\nContent-Length: 3\r\n\r\n"
    outcome, _ = over_the_wire(head.encode() + b"\x0b\x01\x80", ask)
    assert isinstance(outcome, OutcomeUnknown if ask is create else Unanswered)
    assert outcome.details == "the answer is encoded (br), which was not asked for"


def test_an_answer_that_is_encoded_twice_is_not_decoded() -> None:
    """Each time a thousandfold: this one would be 16 MiB after one step, and 16 GiB after a third."""
    bomb = gzip.compress(gzip.compress(bytes(16 * 1024 * 1024)))
    assert len(bomb) < 4_096
    head = f"HTTP/1.1 200 OK\r\nContent-Encoding: gzip, gzip\r\nContent-Length: {len(bomb)}\r\n\r\n"
    tracemalloc.start()
    try:
        outcome, _ = over_the_wire(head.encode() + bomb, get)
        _, most_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert isinstance(outcome, Unanswered)
    assert most_bytes < 8 * 1024 * 1024


def test_neither_logs_nor_reprs_show_the_key(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    over_the_wire(b'HTTP/1.1 200 OK\r\nContent-Length: 23\r\n\r\n{"predictionID": "p-1"}', create)
    over_the_wire(b"HTTP/1.1 500 X\r\nContent-Length: 0\r\n\r\n", get)
    assert caplog.text
    assert KEY not in caplog.text

    async def shown() -> str:
        client = EachlabsClient(settings())
        try:
            return f"{client!r} {settings()!r} {settings()}"
        finally:
            await client.aclose()

    assert KEY not in asyncio.run(shown())


def test_a_proxy_of_the_environment_does_not_see_what_goes_to_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    outcome, requests = over_the_wire(b'HTTP/1.1 200 OK\r\nContent-Length: 23\r\n\r\n{"predictionID": "p-1"}', create)
    assert isinstance(outcome, Prediction)
    assert len(requests) == 1
