"""The emulator as a real server on a real socket: in a thread for tests, in the foreground for the command line."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, TypeVar

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from prefect_eachlabs.testing.emulator.app import create_app
from prefect_eachlabs.testing.emulator.faults import Fault, parse_faults
from prefect_eachlabs.testing.emulator.options import EmulatorOptions
from prefect_eachlabs.testing.emulator.responses import CUT, Receive, Scope, Send
from prefect_eachlabs.testing.emulator.state import Emulator

T = TypeVar("T")

KEEP_ALIVE_SECONDS = 75
_NO_LINGER = struct.pack("ii", 1, 0)


class CuttingProtocol(H11Protocol):
    """HTTP/1.1 that can cut the connection under an answer: an app alone cannot."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.access_log = False
        served = self.app

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            scope.setdefault("extensions", {})[CUT] = self._cut
            await served(scope, receive, send)

        self.app = app

    def _cut(self, reset: bool) -> None:
        if reset:  # closing with zero linger time sends RST in place of FIN
            self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
            self.transport.abort()
        else:
            self.transport.close()


class _Server(uvicorn.Server):
    """uvicorn that says when it is ready and lets nobody hold up its end."""

    def __init__(self, emulator: Emulator, ready: Callable[[], object]) -> None:
        config = uvicorn.Config(
            create_app(emulator),
            http=CuttingProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            server_header=False,
            date_header=False,  # the app dates its answers itself
        )
        super().__init__(config)
        self._emulator = emulator
        self._ready = ready
        self._ended = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        self._ready()

    async def main_loop(self) -> None:
        ticks = 0
        while not await self.on_tick(ticks):
            ticks += 1
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._ended.wait(), 0.1)

    def end(self) -> None:
        """Makes `serve` come back; on the server's loop."""
        self.should_exit = True
        self._ended.set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Closes the port, cuts what is connected, and lets the answers under way run out."""
        for server in self.servers:
            server.close()
        self._emulator.clock.stop()  # answers that are held or drip end now
        self._emulator.webhooks.stop()
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        if self.server_state.tasks:
            await asyncio.wait(self.server_state.tasks, timeout=1)
        self._emulator.pictures.close()


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(1_024)
    except BaseException:
        listening.close()
        raise
    return listening


def _url(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class EmulatorServer:
    """An emulator on 127.0.0.1, in a background thread, for as long as the `with` block lasts.

    Args:
        options: How it behaves.
        port: Where it listens; 0: any free port.

    Examples:
        >>> with EmulatorServer(EmulatorOptions(service_seconds=0.05)) as server:
        ...     server.tallies()["billed"]
        0
    """

    def __init__(self, options: EmulatorOptions | None = None, *, port: int = 0) -> None:
        self.emulator = Emulator(options)
        self._port = port
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self.url = ""

    def __repr__(self) -> str:
        return f"<EmulatorServer {self.url or 'not running'}>"

    def __enter__(self) -> EmulatorServer:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> EmulatorServer:
        """Listens, and comes back when it answers. After a stop: again on the same port, nothing forgotten.

        Raises:
            OSError: The port is taken.
        """
        listening = _listening("127.0.0.1", self._port)
        self._port = listening.getsockname()[1]
        self.url = _url(listening)
        self.emulator.clock.start()
        ready: concurrent.futures.Future[None] = concurrent.futures.Future()

        async def serve() -> None:
            self._loop = asyncio.get_running_loop()
            self._server = _Server(self.emulator, lambda: ready.set_result(None))
            await self._server.serve(sockets=[listening])

        def body() -> None:
            try:
                asyncio.run(serve())
            except BaseException as error:
                if ready.done():
                    raise
                ready.set_exception(error)
            finally:
                listening.close()

        self._thread = threading.Thread(target=body, name="eachlabs-emulator", daemon=True)
        self._thread.start()
        ready.result()
        return self

    def stop(self) -> None:
        """Cuts what is still connected and comes back when the port is closed. Tallies can be read afterwards."""
        if self._thread is not None and self._loop is not None:
            self._loop.call_soon_threadsafe(self._server.end)
            self._thread.join()
            self._thread = self._loop = None

    def _there(self, ask: Callable[[], T]) -> T:
        """Runs something on the server's loop, where its state lives; here, when it has stopped."""
        loop = self._loop
        if loop is None or threading.current_thread() is self._thread:
            return ask()

        async def asked() -> T:
            return ask()

        return asyncio.run_coroutine_threadsafe(asked(), loop).result()

    def tallies(self) -> dict[str, Any]:
        """What it all came to: billed, worst_window, worst_in_flight, rejected_429 and so on."""
        return self._there(self.emulator.tallies)

    def journal(self) -> list[dict[str, Any]]:
        """All requests, oldest first."""
        requests: list[dict[str, Any]] = self._there(lambda: self.emulator.journal.view()["requests"])
        return requests

    def set_faults(self, *faults: Fault | str | Mapping[str, Any]) -> None:
        """These faults from now on, in place of those before; none: all is well."""
        parsed = parse_faults(faults)
        self._there(lambda: self.emulator.faults.set(parsed))

    def predictions(self) -> list[dict[str, Any]]:
        """Every prediction, oldest first: id, model, version, input, status, foreign, cost_usd, faults."""
        return self._there(self.emulator.predictions)

    def add_foreign(self, order: Mapping[str, Any], *, after_seconds: float = 0.0) -> str:
        """Another key of the organization buys `{model, version, input}`; the id of its prediction."""
        return self._there(
            lambda: self.emulator.announce_foreign(order, base_url=self.url, after_seconds=after_seconds).id
        )

    def reset(self) -> None:
        """Forgets predictions, journal and uploads."""
        self._there(self.emulator.reset)


def run_emulator(
    options: EmulatorOptions | None = None,
    host: str = "127.0.0.1",
    port: int = 8700,
    *,
    say: Callable[[str], object] | None = None,
) -> None:
    """Serves in the foreground until Ctrl-C; says one line with the URL when it is ready (by `print`, or `say`).

    Raises:
        OSError: The port is taken, or the host is not ours.
    """

    async def serve(listening: socket.socket) -> None:
        url = _url(listening)
        line = f"Eachlabs emulator ready at {url}"
        server = _Server(Emulator(options), lambda: say(line) if say is not None else print(line, flush=True))
        await server.serve(sockets=[listening])

    with contextlib.closing(_listening(host, port)) as listening, contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(listening))
