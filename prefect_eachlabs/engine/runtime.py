"""One event loop thread for this process, and the two ways into it: `call` for threads, `acall` for other loops.

Tasks in Prefect's thread pool run in threads and loops of their own, and neither a connection pool nor an asyncio
primitive can be shared between loops. So one daemon thread owns one loop with everything that must be common to a
process: connections, slots, the watcher, the purchases. A forked process starts anew.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, wait
from typing import Any, Generic, TypeVar

from prefect_eachlabs.engine.broken_pipes import ignore_broken_pipes
from prefect_eachlabs.engine.engine import CLEAN_UP_SECONDS, Engine
from prefect_eachlabs.images.download import Downloader
from prefect_eachlabs.limits.file_leases import machine_limiter
from prefect_eachlabs.limits.limiter import RateLimiter
from prefect_eachlabs.models import Destination
from prefect_eachlabs.net import redaction
from prefect_eachlabs.settings import AccountSettings, settings_from_environment
from prefect_eachlabs.storage.base import ObjectStore
from prefect_eachlabs.storage.s3 import S3Store
from prefect_eachlabs.storage.s3_client import S3Access
from prefect_eachlabs.webhooks.webhooks import Way

logger = logging.getLogger(__name__)
T = TypeVar("T")

CLOSE_SECONDS = 10.0
INTERRUPTED_SECONDS = CLEAN_UP_SECONDS + 2
"""How long interrupted work may clean up, when its caller does not say."""
SIGNAL_SECONDS = 0.25
"""How late a Ctrl-C is heard at most that another thread has caught: Python runs its handler in the main thread, and
only there where that comes back to Python (measured: it waited on for all of a clean-up)."""

MakeLimiter = Callable[[AccountSettings], RateLimiter]


class CutShort(KeyboardInterrupt):
    """The work was interrupted, and interrupted again while it cleaned up, or that took too long: it has not ended."""


class LoopThread:
    """A daemon thread that runs one event loop for as long as the process lives."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._stopped = False
        started = threading.Event()

        def run() -> None:
            asyncio.set_event_loop(self.loop)
            self.loop.call_soon(started.set)
            while not self._stopped:
                try:
                    self.loop.run_forever()
                except (SystemExit, KeyboardInterrupt):
                    # Whoever's work raised it is told; everybody else's goes on.
                    logger.exception("Something on the gateway's thread asked the process to end; it goes on.")
            self.loop.close()

        self._thread = threading.Thread(target=run, name="eachlabs-gateway", daemon=True)
        self._thread.start()
        started.wait()

    def call(self, work: Coroutine[Any, Any, T], *, clean_up_seconds: float = INTERRUPTED_SECONDS) -> T:
        """Runs it on the loop and blocks. If this thread is interrupted, the work is cancelled and may clean up.

        Raises:
            CutShort: A second Ctrl-C, or the clean-up took longer than `clean_up_seconds`.
        """
        return _Handed(self.loop, work).wait(clean_up_seconds)

    async def acall(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs it on the loop and awaits it. If the caller is cancelled, the work is cancelled and may clean up."""
        return await _Handed(self.loop, work).wait_async()

    def stop(self) -> None:
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._stopped = True
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join(timeout=CLOSE_SECONDS)


class _Handed(Generic[T]):
    """Work that was handed to the loop thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, T]) -> None:
        self._loop = loop
        self._ended: Future[None] = Future()
        self._ended.set_running_or_notify_cancel()  # whoever waits cannot cancel it
        self._task: asyncio.Task[T] | None = None
        loop.call_soon_threadsafe(self._start, work)

    def _start(self, work: Coroutine[Any, Any, T]) -> None:
        self._task = self._loop.create_task(work)
        self._task.add_done_callback(lambda _: self._ended.set_result(None))

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def _result(self) -> T:
        assert self._task is not None
        return self._task.result()

    def _wait(self, seconds: float = math.inf) -> None:
        is_main = threading.current_thread() is threading.main_thread()
        turn_seconds = SIGNAL_SECONDS if is_main else threading.TIMEOUT_MAX
        give_up_at = time.monotonic() + seconds
        while not self._ended.done() and (left_seconds := give_up_at - time.monotonic()) > 0:
            wait({self._ended}, min(turn_seconds, left_seconds))

    def wait(self, clean_up_seconds: float) -> T:
        try:
            self._wait()
        except BaseException as interrupt:
            try:
                self._loop.call_soon_threadsafe(self._cancel)
                if clean_up_seconds and isinstance(interrupt, KeyboardInterrupt):
                    logger.warning(
                        "Interrupted: what is in flight is being cancelled. Each cancel waits for its turn among the "
                        "account's requests: %.0f s at most. Ctrl-C again ends it at once.",
                        clean_up_seconds,
                    )
                self._wait(clean_up_seconds)
            except KeyboardInterrupt as again:
                raise CutShort from again
            if not self._ended.done() and isinstance(interrupt, KeyboardInterrupt):
                raise CutShort from interrupt
            raise
        return self._result()

    async def wait_async(self) -> T:
        ended = asyncio.wrap_future(self._ended)
        try:
            await asyncio.shield(ended)
        except asyncio.CancelledError:
            self._loop.call_soon_threadsafe(self._cancel)
            try:
                await asyncio.wait({ended}, timeout=INTERRUPTED_SECONDS)
            finally:
                ended.cancel()  # nobody waits any more, and the caller's loop may be closed when it ends
            raise
        return self._result()


class Gateway:
    """An account's engine on the process's loop; made by `gateway_for`, shared by all tasks of the process."""

    def __init__(
        self,
        settings: AccountSettings,
        thread: LoopThread,
        *,
        make_limiter: MakeLimiter,
        store_for: Callable[[Destination, S3Access | None], ObjectStore] | None = None,
        downloader: Downloader | None = None,
    ) -> None:
        redaction.install()
        ignore_broken_pipes()
        self.settings = settings
        self._thread = thread

        async def make() -> Engine:
            limiter = make_limiter(settings)
            store = store_for or (lambda destination, access: S3Store(destination.bucket, access))
            return Engine(settings, limiter, store, downloader=downloader, way=way_in(settings))

        self.engine = thread.call(make())

    def __repr__(self) -> str:
        return f"Gateway({self.settings.base_url!r}, account={self.settings.account!r})"

    def call(self, work: Coroutine[Any, Any, T], *, clean_up_seconds: float = INTERRUPTED_SECONDS) -> T:
        """Runs a coroutine of `engine` and blocks until its end; from any thread. As `LoopThread.call`."""
        return self._thread.call(work, clean_up_seconds=clean_up_seconds)

    async def acall(self, work: Coroutine[Any, Any, T]) -> T:
        """Awaits a coroutine of `engine`; from any loop."""
        return await self._thread.acall(work)

    def close(self) -> None:
        """Ends the engine: what waits is cancelled, connections and leased slots go back; within some 15 s."""

        async def end() -> None:
            try:
                await asyncio.wait_for(self.engine.aclose(), CLOSE_SECONDS)
            finally:  # whatever the engine waits for: the next run would wait for its slots
                await self.engine.account.limiter.close()

        # Whoever interrupts the closing does not want to wait.
        self._thread.call(end(), clean_up_seconds=0.0)


def way_in(settings: AccountSettings) -> Way | None:
    """How the vendor's calls come in here: a port of this process, the Prefect server's events, or not at all."""
    # ruff: noqa: PLC0415 - neither uvicorn nor Prefect is needed without webhooks
    if not settings.webhook_url:
        return None
    if settings.webhook_listen:
        from prefect_eachlabs.webhooks.receiver import listen_at

        return listen_at(settings.webhook_listen)
    from prefect_eachlabs.webhooks.prefect_events import has_server, listen_to_events

    if has_server():
        return listen_to_events
    logger.warning(
        "EACHLABS_WEBHOOK_URL is set, and the vendor's calls cannot come in here: set EACHLABS_WEBHOOK_LISTEN, or "
        "PREFECT_API_URL to hear of them from `prefect-eachlabs webhooks serve`. Ends are asked for."
    )
    return None


class _Process:
    """What this process has: one loop thread, one gateway an account."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.thread: LoopThread | None = None
        self.gateways: dict[AccountSettings, Gateway] = {}


_process = _Process()


def gateway_for(settings: AccountSettings | None = None, *, make_limiter: MakeLimiter | None = None) -> Gateway:
    """The process's gateway of an account, made at the first call.

    Args:
        settings: The account; the environment's when None.
        make_limiter: Who counts an account's slots, heeded by the call that makes the gateway; the limits are shared
            with the processes of this machine alone when None.

    Raises:
        SetupError: No key, or a setting out of bounds.
    """
    settings = settings or settings_from_environment()
    process = _process
    with process.lock:
        if process.thread is None:
            process.thread = LoopThread()
        if settings not in process.gateways:
            process.gateways[settings] = Gateway(settings, process.thread, make_limiter=make_limiter or machine_limiter)
        return process.gateways[settings]


def close_gateways() -> None:
    """Ends all gateways of this process and its loop; the next `gateway_for` begins anew."""
    process = _process
    with process.lock:
        gateways, process.gateways = list(process.gateways.values()), {}
        thread, process.thread = process.thread, None
    for gateway in gateways:
        try:
            gateway.close()
        except Exception as error:
            logger.debug("A gateway did not close cleanly: %s", error)
    if thread is not None:
        thread.stop()


def _begin_anew() -> None:
    """A forked child has neither the thread nor the right to the parent's connections."""
    global _process  # noqa: PLW0603 - one process, one state
    _process = _Process()


os.register_at_fork(after_in_child=_begin_anew)
atexit.register(close_gateways)
