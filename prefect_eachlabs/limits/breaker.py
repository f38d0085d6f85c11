"""The gate before every POST: one 429 or 402 pauses the account, one trial opens it again.

Backing off item by item is reported to keep the account shut: each item's retry meets the limit anew. So the
pause belongs to the account: nobody posts, then exactly one POST tries, and its outcome decides for all.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import random

from prefect_eachlabs.errors import EachlabsError, Throttled

logger = logging.getLogger(__name__)

LONGEST_ASKED_PAUSE_SECONDS = 120.0
"""A Retry-After beyond this is cut: one trial costs nothing, an hour of standing still does."""
LONGEST_GROWN_PAUSE_SECONDS = 30.0
SHORTEST_PAUSE_SECONDS = 0.25
"""`Retry-After: 0` must not become a POST for each round trip."""
TRIAL_GIVEN_UP_AFTER_SECONDS = 120.0
"""A trial waits for its request slot and its POST (30 s at most); one that never reports does not shut us out."""


class CircuitBreaker:
    """Pauses the account's new POSTs after a 429 or 402 and resumes by trying one.

    Everybody who was let in says how it went with one of `passed`, `throttled`, `left`. A word from a POST that was
    under way before the pause began is told apart by the state: it neither opens a paused gate nor makes the pause
    grow. Costs no requests.
    """

    def __init__(self) -> None:
        self.paused = False
        """Whether nobody but a trial may post now; who waited for something since `enter` may want to look again."""
        self._trying = False
        self._until = 0.0  # loop time: the end of the pause, or when the trial is given up
        self._line = asyncio.Lock()  # its waiters come first come, first served; who has it waits for the pause's end
        self._changed = asyncio.Event()
        self._refusal: EachlabsError | None = None
        self.consecutive_throttles = 0
        """Pauses in a row since the last POST that passed (many POSTs refused at once are one pause)."""

    def __repr__(self) -> str:
        state = "trying" if self._trying else "paused" if self.paused else "open"
        return f"<CircuitBreaker {state}, {self.consecutive_throttles} throttles in a row>"

    async def enter(self) -> None:
        """Waits while the account is paused; after a pause the first one in line is let through as the trial.

        Raises:
            EachlabsError: What `refuse` was given.
        """
        if not self.paused:
            return
        loop = asyncio.get_running_loop()
        refusal = self._refusal
        async with self._line:
            while self._refusal is refusal and loop.time() < self._until and self.paused:
                self._changed.clear()
                timer = loop.call_at(self._until, self._changed.set)
                try:
                    await self._changed.wait()
                finally:
                    timer.cancel()
            if self._refusal is not None and self._refusal is not refusal:
                raise copy.copy(self._refusal)
            if self.paused:
                self._trying, self._until = True, loop.time() + TRIAL_GIVEN_UP_AFTER_SECONDS

    def passed(self) -> None:
        """The POST was not throttled (accepted, or refused for another reason): open for all."""
        if self.paused and not self._trying:
            return  # sent before the pause: says nothing about now
        self.consecutive_throttles = 0
        self.paused = self._trying = False
        self._changed.set()

    def throttled(self, error: Throttled) -> None:
        """The POST was answered 429 or 402: nobody posts until the pause is over."""
        now = asyncio.get_running_loop().time()
        asked = error.retry_after_seconds
        if asked is not None:
            asked = min(max(asked, SHORTEST_PAUSE_SECONDS), LONGEST_ASKED_PAUSE_SECONDS)
        if self.paused and not self._trying:  # sent before the pause: it may only ask for a longer one
            self._until = max(self._until, now + (asked or 0.0))
            return
        self.consecutive_throttles += 1
        grown = min(2.0 ** min(self.consecutive_throttles - 1, 10), LONGEST_GROWN_PAUSE_SECONDS)
        seconds = grown * random.uniform(0.75, 1.0) if asked is None else asked
        logger.warning(
            "The API throttles this account (%s): new predictions pause for %.1f s, then one tries. It says: %s",
            error.status_code or type(error).__name__,
            seconds,
            error.details or error.message,
        )
        self.paused, self._trying, self._until = True, False, now + seconds
        self._changed.set()

    def refuse(self, error: EachlabsError) -> None:
        """Everybody who waits here is told the same, for each of them would only meet it: `enter` raises a copy."""
        self._refusal = copy.copy(error)
        self._refusal.item_id = None
        self._changed.set()

    def left(self) -> None:
        """Entered, and did not POST after all: the next one may try."""
        if self._trying:
            self._trying, self._until = False, asyncio.get_running_loop().time()
            self._changed.set()
