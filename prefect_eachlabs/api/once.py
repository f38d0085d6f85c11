"""Asks once for all who want to know; remembers the answers."""

from __future__ import annotations

import asyncio
import copy
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

from prefect_eachlabs.errors import EachlabsError

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

FAILURES_REMEMBERED_SECONDS = 60.0


class Once(Generic[K, V]):
    """Answers by key, each asked for once, however many want it at the same time.

    An error that may be repeated is forgotten at once, any other after a minute: whoever mends it runs again.

    Args:
        most: How many answers are remembered; the oldest are forgotten.
    """

    def __init__(self, most: int = 10_000) -> None:
        self._most = most
        self._asked: OrderedDict[K, asyncio.Task[V]] = OrderedDict()

    async def get(self, key: K, ask: Callable[[], Awaitable[V]]) -> V:
        """The answer. A caller that is cancelled leaves the question to the others."""
        task = self._asked.get(key)
        if task is None:
            task = self._asked[key] = asyncio.ensure_future(_asked(ask))
            task.add_done_callback(lambda done: self._ended(key, done))
            while len(self._asked) > self._most:
                self._asked.popitem(last=False)
        try:
            return await asyncio.shield(task)
        except EachlabsError as error:
            # Each caller writes its own item into what it raises.
            raise copy.copy(error) from error.__cause__

    def _ended(self, key: K, task: asyncio.Task[V]) -> None:
        if task.cancelled():
            self._forget(key, task)
        elif (error := task.exception()) is not None:
            if isinstance(error, EachlabsError) and not error.retryable:
                asyncio.get_running_loop().call_later(FAILURES_REMEMBERED_SECONDS, self._forget, key, task)
            else:
                self._forget(key, task)

    def _forget(self, key: K, task: asyncio.Task[V]) -> None:
        if self._asked.get(key) is task:
            del self._asked[key]

    def known(self, key: K) -> V | None:
        """The answer, where it is there."""
        task = self._asked.get(key)
        good = task is not None and task.done() and not task.cancelled() and task.exception() is None
        return task.result() if task is not None and good else None

    def forget(self, key: K) -> None:
        """Whoever asks next asks anew."""
        self._asked.pop(key, None)

    async def aclose(self) -> None:
        """Ends what is still being asked."""
        tasks = [task for task in self._asked.values() if not task.done()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _asked(ask: Callable[[], Awaitable[V]]) -> V:
    return await ask()
