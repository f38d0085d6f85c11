"""The emulator without a socket: an httpx transport, for tests on a loop whose time is virtual."""

from __future__ import annotations

import asyncio

import httpx

from prefect_eachlabs.testing.emulator.app import create_app
from prefect_eachlabs.testing.emulator.options import EmulatorOptions
from prefect_eachlabs.testing.emulator.responses import ConnectionCut
from prefect_eachlabs.testing.emulator.state import Emulator


class InProcessTransport(httpx.AsyncBaseTransport):
    """Answers requests by an emulator in the same loop; cut connections and read time-outs as httpx raises them.

    Args:
        emulator: The emulator, or its options; it then takes its time from the running loop and draws without
            threads, so that a loop with virtual time never waits for real.

    There is no wire: an answer arrives as a whole, so the read time-out bounds all of it, and a connection that is
    cut in the middle of a body looks cut from the start.

    Examples:
        >>> transport = InProcessTransport(EmulatorOptions(requests_per_minute=None))
        >>> transport.emulator.tallies()["billed"]  # doctest: +SKIP
        0
    """

    def __init__(self, emulator: Emulator | EmulatorOptions | None = None) -> None:
        if not isinstance(emulator, Emulator):
            emulator = Emulator(emulator, threads=False)
        self.emulator = emulator
        self._asgi = httpx.ASGITransport(create_app(emulator))
        self._abandoned: set[asyncio.Task[httpx.Response]] = set()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        answering = asyncio.ensure_future(self._asgi.handle_async_request(request))
        self._abandoned.add(answering)
        answering.add_done_callback(self._forget)
        read_seconds = request.extensions.get("timeout", {}).get("read")
        try:
            # Shielded: a server goes on with a request whose client has stopped listening.
            return await asyncio.wait_for(asyncio.shield(answering), read_seconds)
        except asyncio.TimeoutError:
            raise httpx.ReadTimeout("the emulator's answer took too long", request=request) from None
        except ConnectionCut:
            raise httpx.RemoteProtocolError(
                "Server disconnected without sending a response.", request=request
            ) from None

    def _forget(self, answering: asyncio.Task[httpx.Response]) -> None:
        self._abandoned.discard(answering)
        if not answering.cancelled():
            answering.exception()  # seen, even when nobody waits for it any more

    async def aclose(self) -> None:
        for answering in list(self._abandoned):
            answering.cancel()
        await asyncio.gather(*self._abandoned, return_exceptions=True)
