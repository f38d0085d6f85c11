"""Finds slots that a limit on the Prefect server counts as taken although no lease holds them."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable

from prefect_eachlabs.limits.leases import Holding

logger = logging.getLogger(__name__)

REAPED_WITHIN_SECONDS = 18.0
"""The server looks for ended leases every 15 s; until then their slots are counted and no longer listed."""
SURE_AFTER_SECONDS = 5.0
REPEAT_SECONDS = 300.0


class LeakWatch:
    """What was seen of one limit, while its slots were in use here.

    Args:
        name: The limit, for the log.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._watched_since = self._looked_at = 0.0
        self._listed: dict[int, int] = {}
        self._vanished: deque[tuple[float, int]] = deque()
        self._seen: deque[tuple[float, int]] = deque()
        self._said_at: float | None = None

    def see_leases(self, now: float, rows: Iterable[Holding]) -> None:
        """Notes the live leases of this limit, as listed now."""
        if not self._looked_at or now - self._looked_at > REAPED_WITHIN_SECONDS:
            self._watched_since = now
            self._listed.clear()
            self._seen.clear()
        self._looked_at = now
        listed = {row.serial: row.slots for row in rows}
        self._vanished.extend((now, slots) for serial, slots in self._listed.items() if serial not in listed)
        while self._vanished and self._vanished[0][0] <= now - REAPED_WITHIN_SECONDS:
            self._vanished.popleft()
        self._listed = listed

    def leaked(self, now: float, *, counted: int, leased: int, limit: int) -> int:
        """How many slots are leaked for sure; says so in the log, at most every five minutes.

        Args:
            now: The loop's time.
            counted: What the server's database counts as taken.
            leased: What its live leases hold, read at nearly the same time.
            limit: The limit's number, for the log.
        """
        self._seen.append((now, counted - leased - sum(slots for _, slots in self._vanished)))
        while len(self._seen) > 1 and self._seen[1][0] <= now - SURE_AFTER_SECONDS:
            self._seen.popleft()
        if now - self._watched_since < REAPED_WITHIN_SECONDS or now - self._seen[0][0] < SURE_AFTER_SECONDS:
            return 0
        leaked = max(0, min(slots for _, slots in self._seen))
        if leaked and (self._said_at is None or now - self._said_at >= REPEAT_SECONDS):
            self._said_at = now
            logger.warning(
                "%d of the %d slots of %s are leaked: the Prefect server counts them as taken, but none of our leases "
                "holds them, as after a restart of a server that keeps leases in memory. Work goes on with the rest. "
                "Mend it with: prefect-eachlabs limits reset. It does not come back when the server runs with "
                "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE=prefect.server.concurrency.lease_storage.filesystem.",
                leaked,
                limit,
                self._name,
            )
        return leaked
