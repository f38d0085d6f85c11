"""Finds places that a limit on the Prefect server counts as taken although no lease holds them."""

from __future__ import annotations

import logging
from collections import deque

logger = logging.getLogger(__name__)

SURE_AFTER_SECONDS = 22.0
"""A lease that has ended is reaped within 15 s and a little; what is still counted then, stays counted for ever."""
REPEAT_SECONDS = 300.0
FORGET_SECONDS = 15.0


class LeakWatch:
    """What was seen of one limit while callers waited for its places.

    Args:
        name: The limit, for the log.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._seen: deque[tuple[float, int]] = deque()
        self._said_at: float | None = None

    def see(self, now: float, *, active_slots: int, leased_slots: int, limit: int) -> int:
        """Notes one observation; returns how many places are leaked for sure, and says so in the log.

        Args:
            now: The loop's time.
            active_slots: What the server's database counts as taken.
            leased_slots: What its live leases hold, read at nearly the same time.
            limit: The limit's number, for the log.
        """
        if self._seen and now - self._seen[-1][0] > FORGET_SECONDS:
            self._seen.clear()
        self._seen.append((now, max(0, active_slots - leased_slots)))
        while len(self._seen) > 1 and self._seen[1][0] <= now - SURE_AFTER_SECONDS:
            self._seen.popleft()
        if now - self._seen[0][0] < SURE_AFTER_SECONDS:
            return 0
        leaked = min(slots for _, slots in self._seen)
        if leaked and (self._said_at is None or now - self._said_at >= REPEAT_SECONDS):
            self._said_at = now
            logger.warning(
                "%d of the %d places of %s are leaked: the Prefect server counts them as taken, but none of our leases "
                "holds them, as after a restart of a server that keeps leases in memory. Work goes on with the rest. "
                "Mend it with: prefect-eachlabs limits reset. It does not come back when the server runs with "
                "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE=prefect.server.concurrency.lease_storage.filesystem.",
                leaked,
                limit,
                self._name,
            )
        return leaked
