"""An asyncio loop whose clock jumps: an hour of sleeping takes no time, and the same test takes the same path.

    async def test_a_pause_ends():
        await asyncio.sleep(3600)
        assert asyncio.get_running_loop().time() == 3600

An async test runs in it, and `run` runs any coroutine.
Everything that takes its time from `loop.time()`, `asyncio.sleep`, `loop.call_later` or `asyncio.wait_for` lives
in virtual time. Threads do not: `run_in_executor` and calls from other threads are refused.
"""

from __future__ import annotations

import asyncio
import contextvars
import selectors
import threading
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, NoReturn, Protocol, TypeVar

T = TypeVar("T")


class Machine(Protocol):
    """Whose code is running."""

    dead: bool
    clock_error_seconds: float

    @property
    def is_frozen(self) -> bool: ...


here: contextvars.ContextVar[Machine | None] = contextvars.ContextVar("here", default=None)
"""Timers that the dead set do not ring: their machine asks and renews nothing for hours any more."""

_STANDSTILL_LIMIT = 1_000_000
"""So many turns of the loop without time passing are an endless loop, not work."""


class _JumpingSelector(selectors.DefaultSelector):
    """Where a loop would wait for the network, this one moves its clock to the next timer."""

    loop: VirtualTimeLoop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self.loop.nothing_is_ready(timeout)
        return []


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """A selector loop that begins at time 0 and jumps to the next scheduled handle instead of waiting."""

    def __init__(self) -> None:
        self._now = 0.0
        self._turns_at_this_time = 0
        self._never: list[asyncio.TimerHandle] = []
        self._thread = threading.get_ident()
        selector = _JumpingSelector()
        selector.loop = self
        super().__init__(selector)
        self.unhandled: list[Mapping[str, Any]] = []
        self.set_exception_handler(lambda _, context: self.unhandled.append(context))

    def time(self) -> float:
        return self._now

    def nothing_is_ready(self, timeout: float | None) -> None:
        """Called once a turn; `timeout` is what the loop would wait: 0 work is ready, None there is no timer."""
        if timeout is None:
            raise AssertionError(f"deadlock at t={self._now:.6f}: nothing is ready and no timer is set")
        scheduled: list[asyncio.TimerHandle] = self._scheduled  # type: ignore[attr-defined]
        if timeout > 0 and scheduled and scheduled[0].when() > self._now:
            self._now = scheduled[0].when()
            self._turns_at_this_time = 0
            return
        self._turns_at_this_time += 1
        if self._turns_at_this_time > _STANDSTILL_LIMIT:
            raise AssertionError(f"endless loop at t={self._now:.6f}: {_STANDSTILL_LIMIT} turns and no time passes")

    def call_at(
        self, when: float, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        machine = here.get()
        if machine is None or not machine.dead:
            return super().call_at(when, callback, *args, context=context)
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        self._never.append(timer)  # who waits for it is not forgotten
        return timer

    def call_soon_threadsafe(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: Any = None
    ) -> asyncio.Handle:
        if threading.get_ident() == self._thread:  # asyncio itself does so for forgotten async generators
            return self.call_soon(callback, *args, context=context)
        raise RuntimeError("virtual time has one thread: call_soon_threadsafe from another one is not supported")

    def run_in_executor(self, *_: object) -> NoReturn:
        raise RuntimeError("virtual time has one thread: run_in_executor and asyncio.to_thread are not supported")


def run(story: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine in virtual time, from 0, and returns its result; tasks it left behind are cancelled.

    Raises:
        AssertionError: A deadlock or an endless loop, with the time it happened at; or something went wrong where
            nobody looked (a callback that raised, a task whose exception was never read).
    """
    loop = VirtualTimeLoop()
    try:
        result = loop.run_until_complete(story)
        _cancel_what_is_left(loop)
    except BaseException:
        loop.unhandled.clear()  # the first fault is the one to read
        _cancel_what_is_left(loop)
        raise
    finally:
        loop.close()
    if loop.unhandled:
        first = loop.unhandled[0]
        fault = first.get("exception")
        raise AssertionError(f"{first.get('message')}: {fault!r}") from fault
    return result


def _cancel_what_is_left(loop: VirtualTimeLoop) -> None:
    left = asyncio.all_tasks(loop)
    for task in left:
        task.cancel()
    if left:
        loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
    loop.run_until_complete(loop.shutdown_asyncgens())
