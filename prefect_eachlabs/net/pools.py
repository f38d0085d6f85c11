"""Many connections as several small pools: httpcore looks at all of a pool, twice, whenever a request begins or ends.

With 100 connections in one pool that was a third of what a picture costs this process.
"""

from __future__ import annotations

import urllib.request
from collections.abc import AsyncIterator

import httpx

CONNECTIONS_A_POOL = 10


def pools(connections: int, *, trust_env: bool) -> httpx.AsyncBaseTransport | None:
    """So many connections; None where the environment names a proxy, which is httpx's affair."""
    return None if trust_env and urllib.request.getproxies() else Pools(connections, trust_env=trust_env)


class Pools(httpx.AsyncBaseTransport):
    """Each request takes the pool that has the fewest under way, and of several the first, whose connections are open.

    Args:
        connections: How many there may be, all pools together.
        trust_env: Whether the environment's certificates count.
    """

    def __init__(self, connections: int, *, trust_env: bool) -> None:
        context = httpx.create_ssl_context(trust_env=trust_env)
        self._pools = [
            httpx.AsyncHTTPTransport(
                verify=context, limits=httpx.Limits(max_connections=count, max_keepalive_connections=count)
            )
            for count in _parts(connections)
        ]
        self._under_way = [0] * len(self._pools)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        number = self._under_way.index(min(self._under_way))
        self._under_way[number] += 1
        try:
            response = await self._pools[number].handle_async_request(request)
        except BaseException:
            self._under_way[number] -= 1
            raise
        assert isinstance(response.stream, httpx.AsyncByteStream), "the transport is asynchronous"
        response.stream = _Counted(response.stream, self._under_way, number)
        return response

    async def aclose(self) -> None:
        for pool in self._pools:
            await pool.aclose()


def _parts(connections: int) -> list[int]:
    count = -(-connections // CONNECTIONS_A_POOL)
    return [connections // count + (number < connections % count) for number in range(count)]


class _Counted(httpx.AsyncByteStream):
    """An answer's body; its request is over when it is closed."""

    def __init__(self, stream: httpx.AsyncByteStream, under_way: list[int], number: int) -> None:
        self._stream, self._under_way, self._number = stream, under_way, number
        self._is_open = True

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._stream.__aiter__()

    async def aclose(self) -> None:
        if self._is_open:
            self._is_open = False
            self._under_way[self._number] -= 1
        await self._stream.aclose()
