"""How the properties of this folder are run: few, always the same examples in `make test`; fresh ones in `make fuzz`.

    @fuzzed(hostile.bytes_of(VALID))
    def test_a_record_is_understood_or_named(body: bytes) -> None: ...

`tools/fuzz.py` sets FUZZ_EXAMPLES and calls every function so decorated, again and again, until its time is over.
"""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, TypeVar

import httpcore
import httpx
from hypothesis import HealthCheck, given, settings

from prefect_eachlabs.api.client import EachlabsClient
from tests.api.client_answers import settings as account
from tests.virtual_time import run

T = TypeVar("T")

FUZZING = "FUZZ_EXAMPLES" in os.environ
"""Whether this is a hunt, of whose examples nobody knows which they will be."""
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "30"))

TARGETS: list[Callable[..., None]] = []
"""Every property, in the order of its definition."""


def fuzzed(*strategies: Any, share: float = 1.0) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A property of generated examples.

    Args:
        strategies: As `hypothesis.given` takes them.
        share: Of the usual number of examples, where one takes long.
    """

    def decorated(test: Callable[..., None]) -> Callable[..., None]:
        made = settings(
            max_examples=max(5, int(EXAMPLES * share)),
            derandomize=not FUZZING,
            database=None,
            deadline=None,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        )(given(*strategies)(test))
        TARGETS.append(made)
        return made

    return decorated


def asked(
    transport: httpx.AsyncBaseTransport, ask: Callable[[EachlabsClient], Coroutine[Any, Any, T]], **given: Any
) -> T:
    """What the client makes of a transport's answer, in virtual time."""

    async def story() -> T:
        client = EachlabsClient(account(**given), transport=transport)
        try:
            return await asyncio.wait_for(ask(client), 600)
        finally:
            await client.aclose()

    return run(story())


_TLS = ssl.create_default_context()
"""Making one takes longer than an example."""


class Wire(httpcore.AsyncMockBackend):
    """A network on which these bytes come, whatever is asked; httpcore and h11 above it are the real ones.

    Args:
        pieces: What each read brings; may be endless.
        pause_seconds: Before each of them.
    """

    def __init__(self, pieces: Iterable[bytes], *, pause_seconds: float = 0.0) -> None:
        super().__init__([])
        self.pieces = pieces
        self.pause_seconds = pause_seconds
        self.sent = b""
        self.read_bytes = 0

    async def connect_tcp(self, *_: Any, **__: Any) -> httpcore.AsyncNetworkStream:
        return _Stream(self)

    def transport(self) -> httpx.AsyncHTTPTransport:
        transport = httpx.AsyncHTTPTransport(verify=_TLS)
        transport._pool = httpcore.AsyncConnectionPool(network_backend=self, ssl_context=_TLS)
        return transport


class _Stream(httpcore.AsyncMockStream):
    def __init__(self, wire: Wire) -> None:
        super().__init__([])
        self._wire = wire
        self._pieces = iter(wire.pieces)

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        if timeout is not None and self._wire.pause_seconds > timeout:
            await asyncio.sleep(timeout)
            raise httpcore.ReadTimeout
        await asyncio.sleep(self._wire.pause_seconds)
        piece = next(self._pieces, b"")
        self._wire.read_bytes += len(piece)
        return piece

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._wire.sent += buffer


# Warnings about each bad line of each example would be megabytes.
logging.getLogger("prefect_eachlabs").addHandler(logging.NullHandler())
if FUZZING:
    logging.getLogger("prefect_eachlabs").propagate = False


def says(error: Exception, *words: str, never: str = "") -> None:
    """The message can be logged and written down, and holds these words."""
    told = str(error)
    told.encode()
    assert told
    assert all(word in told for word in words), told
    assert not never or never not in told
