"""The API's connections: several small pools, each request in the one with the least to do."""

from __future__ import annotations

import asyncio
import contextlib

import httpx
import pytest

from prefect_eachlabs.net.pools import CONNECTIONS_A_POOL, Pools, pools

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


async def asked(http: httpx.AsyncClient, count: int) -> tuple[int, list[int]]:
    """So many requests at once to a server that answers all when all are there: how many connections it saw."""
    writers: list[asyncio.StreamWriter] = []
    waiting, together = 0, asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal waiting
        writers.append(writer)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                await reader.readuntil(b"\r\n\r\n")
                waiting += 1
                if waiting == count:
                    together.set()
                await together.wait()
                writer.write(ANSWER)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
    answered = await asyncio.gather(*(http.get(url) for _ in range(count)))
    for _ in range(3):  # one after the other, they need one connection
        answered.append(await http.get(url))
    server.close()
    for writer in writers:
        writer.close()
        await writer.wait_closed()
    return len(writers), [one.status_code for one in answered]


def test_all_connections_are_used_at_once_and_kept_for_later() -> None:
    async def story() -> None:
        for count in (1, CONNECTIONS_A_POOL + 1, 35):
            transport = Pools(35, trust_env=False)
            async with httpx.AsyncClient(transport=transport) as http:
                assert await asked(http, count) == (count, [200] * (count + 3))
            assert set(transport._under_way) == {0}

    asyncio.run(story())


def test_a_request_that_fails_makes_room_for_others() -> None:
    async def story() -> None:
        transport = Pools(1, trust_env=False)
        async with httpx.AsyncClient(transport=transport) as http:
            with pytest.raises(httpx.ConnectError):
                await http.get("http://127.0.0.1:1/")
            assert transport._under_way == [0]
            assert await asked(http, 1) == (1, [200] * 4)

    asyncio.run(story())


def test_where_the_environment_names_a_proxy_httpx_finds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://proxy.invalid:8080")
    assert pools(10, trust_env=True) is None
    assert pools(10, trust_env=False) is not None
