"""Where in the list of executions ours stand, and which of them a page ought to have shown.

The list is newest first, of all keys of the organization: what was created n creations ago stands in row n or below.
Numbers are given when a creation is answered, so they do not keep the API's order exactly: creations within a second
of each other may stand either way round.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from prefect_eachlabs.polling.watched import Watched

PAGE_ROWS = 100
ROWS_COUNTED_ON = 75
"""A page shows so many of ours from the one it is asked for upwards; the rest is for what came in between."""
_SPARE_ROWS = 10
LISTED_WITHIN_SECONDS = 1.0
"""A page that was asked for sooner after the creation need not show it."""


class Listing:
    """Counts what is watched, and learns how many rows of others stand between ours."""

    def __init__(self) -> None:
        self.newest = 0
        self._others: deque[int] = deque([0], maxlen=4)

    def next_number(self) -> int:
        self.newest += 1
        return self.newest

    def offset_for(self, number: int) -> int:
        """From which row on a page should show the one with this number, and many of its neighbours."""
        row = self.newest - number + min(self._others)
        return 0 if row < PAGE_ROWS - _SPARE_ROWS else row - ROWS_COUNTED_ON

    def learn(self, shown: Iterable[tuple[int, Watched]], newest: int) -> None:
        """Learns from the rows in which a page showed ours; `newest` was the newest when it was asked for."""
        beyond = [row - (newest - watched.number) for row, watched in shown if watched.created_here]
        if beyond:
            self._others.append(max(0, min(beyond)))

    @staticmethod
    def left_out(
        watched: Iterable[Watched], shown: list[Watched], target: Watched, sent_at: float, *, offset: int, rows: int
    ) -> list[Watched]:
        """Those that the page should have shown and did not.

        That is the one it was asked for, and all that lie between those it shows; all of them when it shows none.
        """
        old_enough = [one for one in watched if one.watched_at < sent_at - LISTED_WITHIN_SECONDS]
        known = {id(one) for one in shown}
        since = min((one.began_at for one in shown), default=0.0) + LISTED_WITHIN_SECONDS
        until = max((one.began_at for one in shown), default=0.0) - LISTED_WITHIN_SECONDS
        return [
            one
            for one in old_enough
            if id(one) not in known
            and (
                one is target
                or not shown
                or ((rows < PAGE_ROWS or one.began_at > since) and (offset == 0 or one.began_at < until))
            )
        ]
