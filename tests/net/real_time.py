"""Async tests that need sockets or threads: the loop of all others is one of virtual time, which has neither."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine
from typing import Any


def in_real_time(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    @functools.wraps(test)
    def played(**given: Any) -> None:
        asyncio.run(test(**given))

    return played
