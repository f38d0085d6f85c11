"""Repeats what may be repeated, where no Prefect task does it: whether to repeat is a fact of the error's class."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

from prefect_eachlabs.errors import EachlabsError, SetupError

T = TypeVar("T")

MOST_ASKED_PAUSE_SECONDS = 120.0
"""A `Retry-After` beyond this is not waited for: whoever sent it may be wrong, and a person waits."""

FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 30.0
REFUSED_FOR_SECONDS = 600.0

logger = logging.getLogger(__name__)


async def retry_while_retryable(
    make: Callable[[], Awaitable[T]], *, attempts: int = 5, first_pause_seconds: float = 1.0
) -> T:
    """What `make()` returns; made again after an error whose class says `retryable`, with growing pauses.

    Args:
        make: Called once an attempt.
        attempts: How often at most, at least 1.
        first_pause_seconds: The mean of the first pause; each further one is twice as long, ± 50 %. What an error
            says in `retry_after_seconds` is waited for too, up to 120 s.

    Raises:
        EachlabsError: That of the last attempt, or the first that is not `retryable`.
    """
    attempt, told = 1, ""
    while True:
        try:
            return await make()
        except EachlabsError as error:
            if not error.retryable or attempt >= attempts:
                raise
            pause_seconds = first_pause_seconds * 2 ** (attempt - 1) * random.uniform(0.5, 1.5)
            pause_seconds = max(pause_seconds, min(error.retry_after_seconds or 0.0, MOST_ASKED_PAUSE_SECONDS))
            attempt += 1
            what = "The same again." if str(error) == told else (told := str(error))
            logger.warning("%s Trying again in %.1f s (attempt %d of %d).", what, pause_seconds, attempt, attempts)
        await asyncio.sleep(pause_seconds)


async def until_it_succeeds(
    make: Callable[[], Awaitable[T]], *, errors: tuple[type[EachlabsError], ...], what: str
) -> T:
    """What `make()` returns; made again after these errors for as long as the process lives: money depends on it.

    Pauses grow from 0.5 s to 30 s. A `SetupError` (credentials that have expired) is raised when it has lasted for
    10 minutes: this process may never get others, and the next run goes on from the record. Any other is raised.

    Args:
        make: Called once an attempt.
        errors: After which it is made again.
        what: Cannot be done yet, for the log: "item fox: its record cannot be read".
    """
    pause_seconds = FIRST_PAUSE_SECONDS
    refused_at: float | None = None
    while True:
        try:
            return await make()
        except errors as error:
            now = asyncio.get_running_loop().time()
            refused_at = (refused_at or now) if isinstance(error, SetupError) else None
            if refused_at is not None and now - refused_at >= REFUSED_FOR_SECONDS:
                raise
            logger.warning("%s yet (%s); trying on.", what, error)
        await asyncio.sleep(pause_seconds)
        pause_seconds = min(2 * pause_seconds, LONGEST_PAUSE_SECONDS)
