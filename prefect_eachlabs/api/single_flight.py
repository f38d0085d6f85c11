"""Asks once for all who want to know; remembers the answers."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

from prefect_eachlabs.errors import EachlabsError

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

FAILURES_REMEMBERED_SECONDS = 60.0
REMEMBERED = 10_000


class SingleFlight(Generic[K, V]):
    """Answers by key, each asked for once, however many want it at the same time.

    The last 10,000 answers are remembered. An error that may be repeated is forgotten at once, any other after a
    minute: whoever fixes it runs again.
    """

    def __init__(self) -> None:
        self._asked: dict[K, asyncio.Future[V]] = {}

    async def get(self, key: K, ask: Callable[[], Awaitable[V]]) -> V:
        """The answer. A caller that is cancelled leaves the question to the others."""
        asked = self._asked.get(key)
        if asked is None:
            asked = self._asked[key] = asyncio.ensure_future(ask())
            asked.add_done_callback(lambda done: self._ended(key, done))
            while len(self._asked) > REMEMBERED:
                del self._asked[next(iter(self._asked))]
        try:
            return await asyncio.shield(asked)
        except EachlabsError as error:
            # Each caller writes its own item into what it raises.
            raise copy.copy(error) from error.__cause__

    def known(self, key: K) -> V | None:
        """The answer, where it is there."""
        asked = self._asked.get(key)
        is_there = asked is not None and asked.done() and not asked.cancelled() and asked.exception() is None
        return asked.result() if asked is not None and is_there else None

    def forget(self, key: K, answer: asyncio.Future[V] | None = None) -> None:
        """Whoever asks next asks anew; with an `answer`, only while it is that one."""
        if answer is None or self._asked.get(key) is answer:
            self._asked.pop(key, None)

    def _ended(self, key: K, answer: asyncio.Future[V]) -> None:
        if answer.cancelled():
            self.forget(key, answer)
        elif (error := answer.exception()) is not None:
            lasts = isinstance(error, EachlabsError) and not error.retryable
            seconds = FAILURES_REMEMBERED_SECONDS if lasts else 0
            asyncio.get_running_loop().call_later(seconds, self.forget, key, answer)

    async def aclose(self) -> None:
        """Ends what is still being asked."""
        asked = [answer for answer in self._asked.values() if answer.cancel()]
        await asyncio.gather(*asked, return_exceptions=True)
