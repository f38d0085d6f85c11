"""The gate before every POST: one 429 or 402 pauses the account, one trial opens it again.

Backing off item by item is reported to keep the account shut: each item's retry meets the limit anew. So the
pause belongs to the account: nobody posts, then exactly one POST tries, and its outcome decides for all.
"""

from __future__ import annotations

import asyncio
import copy
import enum
import logging
import random
from collections import OrderedDict

from prefect_eachlabs.errors import EachlabsError, Throttled

logger = logging.getLogger(__name__)

WORTH_SAYING_SECONDS = 10.0
LONGEST_ASKED_PAUSE_SECONDS = 120.0
"""A Retry-After beyond this is cut: one trial costs nothing, an hour of standing still does."""
LONGEST_GROWN_PAUSE_SECONDS = 30.0
SHORTEST_PAUSE_SECONDS = 0.25
"""`Retry-After: 0` must not become a POST for each round trip."""
TRIAL_GIVEN_UP_AFTER_SECONDS = 120.0
"""A trial waits for its request slot and its POST (30 s at most); one that never reports does not shut us out."""


class _State(enum.Enum):
    OPEN = "open"
    PAUSED = "paused"
    TRYING = "trying"


class CircuitBreaker:
    """Pauses the account's new POSTs after a 429 or 402 and resumes by trying one.

    Everybody who was let in says how it went with one of `passed`, `throttled`, `left`. A word from a POST that was
    under way before the pause began is told apart by the state: it neither opens a paused gate nor makes the pause
    grow. Costs no requests.

    Args:
        rng: Where the jitter comes from.
    """

    def __init__(self, *, rng: random.Random | None = None) -> None:
        self._rng = rng or random.Random()
        self._state = _State.OPEN
        self._until = 0.0  # loop time: the end of the pause, or when the trial is given up
        self._waiters: OrderedDict[asyncio.Future[None], None] = OrderedDict()
        self._timer: asyncio.TimerHandle | None = None
        self.consecutive_throttles = 0
        """Pauses in a row since the last POST that passed (many POSTs refused at once are one pause)."""

    def __repr__(self) -> str:
        return (
            f"<CircuitBreaker {self._state.value}, {len(self._waiters)} waiting, "
            f"{self.consecutive_throttles} throttles in a row>"
        )

    @property
    def paused(self) -> bool:
        """Whether nobody but a trial may post now; who waited for something since `enter` may want to look again."""
        return self._state is not _State.OPEN

    async def enter(self) -> None:
        """Waits while the account is paused; after a pause the first one in line is let through as the trial.

        Raises:
            EachlabsError: What `refuse` was given.
        """
        if self._state is _State.OPEN:
            return
        loop = asyncio.get_running_loop()
        let_in: asyncio.Future[None] = loop.create_future()
        self._waiters[let_in] = None
        self._look()
        try:
            await let_in
        except asyncio.CancelledError:
            self._waiters.pop(let_in, None)
            if let_in.done() and not let_in.cancelled():  # let in and cancelled in the same turn of the loop
                self.left()
            raise

    def passed(self) -> None:
        """The POST was not throttled (accepted, or refused for another reason): open for all."""
        if self._state is _State.PAUSED:
            return  # sent before the pause: says nothing about now
        self.consecutive_throttles = 0
        if self._state is _State.TRYING:
            self._state = _State.OPEN
            self._set_timer(None)
            while self._waiters:
                self._let_one_in()

    def throttled(self, error: Throttled) -> None:
        """The POST was answered 429 or 402: nobody posts until the pause is over."""
        now = asyncio.get_running_loop().time()
        asked = error.retry_after_seconds
        if self._state is _State.PAUSED:  # sent before the pause: it may only ask for a longer one
            if asked is not None and (until := now + min(asked, LONGEST_ASKED_PAUSE_SECONDS)) > self._until:
                if until - self._until > WORTH_SAYING_SECONDS:
                    logger.warning("The API asks for a longer pause: one tries in %.1f s.", until - now)
                self._pause_until(until)
            return
        self.consecutive_throttles += 1
        if asked is not None:
            seconds = min(max(asked, SHORTEST_PAUSE_SECONDS), LONGEST_ASKED_PAUSE_SECONDS)
        else:
            grown = 2.0 ** min(self.consecutive_throttles - 1, 10)
            seconds = min(grown, LONGEST_GROWN_PAUSE_SECONDS) * self._rng.uniform(0.75, 1.0)
        logger.warning(
            "The API throttles this account (%s): new predictions pause for %.1f s, then one tries. It says: %s",
            error.status_code or type(error).__name__,
            seconds,
            error.details or error.message,
        )
        self._state = _State.PAUSED
        self._pause_until(now + seconds)

    def refuse(self, error: EachlabsError) -> None:
        """Everybody who waits here is told the same, for each of them would only meet it: `enter` raises a copy."""
        for waiter in self._waiters:
            if not waiter.done():
                told = copy.copy(error)
                told.item_id = None
                waiter.set_exception(told)
        self._waiters.clear()
        self._look()

    def left(self) -> None:
        """Entered, and did not POST after all: the next one may try."""
        if self._state is _State.TRYING:
            self._state = _State.PAUSED
            self._until = asyncio.get_running_loop().time()
            self._look()

    def _pause_until(self, until: float) -> None:
        self._until = until
        self._look()

    def _look(self) -> None:
        """Lets the trial in when its time has come and somebody waits; else sets the one timer."""
        loop = asyncio.get_running_loop()
        self._set_timer(None)
        while self._waiters and next(iter(self._waiters)).done():  # cancelled, its task has not run since
            self._waiters.popitem(last=False)
        if self._state is _State.OPEN or not self._waiters:
            return
        if loop.time() < self._until:
            self._set_timer(loop.call_at(self._until, self._look))
            return
        self._state = _State.TRYING
        self._until = loop.time() + TRIAL_GIVEN_UP_AFTER_SECONDS
        self._let_one_in()
        if self._waiters:
            self._set_timer(loop.call_at(self._until, self._look))

    def _let_one_in(self) -> None:
        waiter, _ = self._waiters.popitem(last=False)
        if not waiter.done():
            waiter.set_result(None)

    def _set_timer(self, timer: asyncio.TimerHandle | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = timer
