"""The slots of one limit as one process holds them, in lots; pure, its clock is handed in.

What to ask the server for is decided in `plan`; asking is done in `driver`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

from prefect_eachlabs.limits.limiter import Kind
from prefect_eachlabs.limits.lot import Lot, LotPlace, Verb, fair_share

COOLING_SECONDS = 60.1
"""From the answer of a request until its slot may be used again; the tenth is for clocks that differ."""
UNUSED_SECONDS = 10.0
"""A slot nobody used for so long goes back."""
PREFETCH_SECONDS = 2.0
"""As many slots as were taken in this time are held ready."""
PRESUMED_SECONDS = 15.0
"""After an absence of the server, those who shared before it are taken to be there still."""
END_MARGIN_SECONDS = 1.0
"""A lease this close to its end is left to the server, which may be reaping it: its slots would go back twice."""


class LotPool:
    """The lots of one limit.

    Args:
        kind: Which limit.
        limit: The account's own number; `limit` becomes the server's where that is smaller.
        process: This process among the holdings.
        clock: The loop's time.
        changed: Called with True when a slot may have come free, with False when only the plan may have changed.
    """

    def __init__(
        self, kind: Kind, limit: int, *, process: int, clock: Callable[[], float], changed: Callable[[bool], None]
    ) -> None:
        self.kind = kind
        self.process = process
        self.clock = clock
        self.limit = self.account_limit = limit
        self.leaked = 0
        """So many slots are counted as taken on the server, but no lease holds them."""
        self.claims: dict[int, int | None] | None = None
        """The other processes, as last seen; None: not seen yet."""
        self.blind = False
        """The server does not list leases: no shares, and every lot goes back after its round."""
        self.local_limit: int | None = None
        """The server is away: so many slots may be in use at once, whatever is leased."""
        self.waiting = 0
        self.lots: list[Lot] = []
        self._changed = changed
        self._presumed: set[int] = set()
        self._presumed_until = -math.inf
        self._takes: deque[float] = deque(maxlen=1000)

    def __repr__(self) -> str:
        share = self.local_limit or self.share()[0]
        return f"<LotPool {self.kind.value}: {self.busy()} in use, {self.held} held, share {share} of {self.limit}>"

    @property
    def cools(self) -> bool:
        """A used slot stays taken for a minute (requests), or is free at once (in flight)."""
        return self.kind is Kind.REQUESTS

    @property
    def lot_size(self) -> int:
        return max(1, self.limit // (20 if self.cools else 10))

    @property
    def held(self) -> int:
        """Slots that are ours, used or not."""
        return sum(lot.slots for lot in self.lots if lot.step is not Verb.RELEASE)

    @property
    def awake(self) -> bool:
        """Whether it matters what others do: somebody waits here, or slots are in use and will be used again."""
        return self.waiting > 0 or self.wanted_ready() > 0 or any(lot.taken for lot in self.lots)

    @property
    def pressure(self) -> float:
        """From 0.0 to 1.0 (all of our share is in use)."""
        part = self.local_limit or (self.limit if self.claims is None else self.share()[0])
        return min(1.0, self.busy() / max(1, part))

    def share(self) -> tuple[int, bool]:
        """The most slots to hold, and whether lots go back after each use."""
        limit = max(1, self.limit - self.leaked)
        if self.blind:
            return limit, True
        if self.claims is None:  # a first lot does no harm; for more, look who else is there
            return min(limit, self.lot_size), False
        return fair_share(limit, self.claims, self.process)

    def busy(self) -> int:
        """Slots that count now: taken, or cooling."""
        now = self.clock()
        return sum(lot.busy(now) for lot in self.lots)

    def ready(self) -> int:
        """Slots that could be taken now."""
        now = self.clock()
        return sum(lot.free for lot in self.lots if lot.free and now < self.usable_until(lot))

    def wanted_ready(self) -> int:
        """How many slots to hold ready beyond the callers that wait."""
        now = self.clock()
        while self._takes and self._takes[0] <= now - PREFETCH_SECONDS:
            self._takes.popleft()
        return min(self.lot_size, len(self._takes)) if self.cools else 0

    def try_take(self) -> LotPlace | None:
        """A slot, if one is free in a lot; server away: if the local limit is not reached."""
        lot = self._lot_to_take_from()
        if lot is None:
            return None
        lot.free -= 1
        lot.taken += 1
        self._takes.append(self.clock())
        self._changed(False)
        return LotPlace(self, lot)

    def _lot_to_take_from(self) -> Lot | None:
        now = self.clock()
        if self.local_limit is not None:
            if self.busy() >= self.local_limit:
                return None
            self.lots.append(Lot(1, now, lease_id=None))
            return self.lots[-1]
        share, _ = self.share()
        if self.busy() >= share:
            return None
        usable = [lot for lot in self.lots if lot.free and now < self.usable_until(lot)]
        # Full lots first, so that the others empty and can go back; of equals the oldest.
        return max(usable, key=lambda lot: (lot.taken, -lot.fresh_since), default=None)

    def usable_until(self, lot: Lot) -> float:
        """Until when slots may be taken from this lot."""
        if lot.lease_id is None or lot.step is Verb.RELEASE or lot.doubted:
            return -math.inf
        if not self.cools:
            return -math.inf if lot.spent and self.share()[1] else lot.covered_until - UNUSED_SECONDS
        if lot.spent and lot.idle(self.clock()):
            return -math.inf  # its round is over
        # Whatever becomes of this process, the lease must last until a request sent now has cooled.
        return min(lot.fresh_since + UNUSED_SECONDS, lot.covered_until - COOLING_SECONDS - END_MARGIN_SECONDS)

    def place_done(self, lot: Lot) -> None:
        now = self.clock()
        lot.taken -= 1
        lot.spent = True
        if self.cools:
            lot.hot_until = max(lot.hot_until, now + COOLING_SECONDS)
        else:
            lot.free += 1
            lot.fresh_since = now
        self._changed(not self.cools)

    def place_unused(self, lot: Lot) -> None:
        lot.taken -= 1
        lot.free += 1
        self._changed(True)

    def cooled_at(self) -> float | None:
        """When the next lot has cooled."""
        now = self.clock()
        return min((lot.hot_until for lot in self.lots if lot.hot_until > now), default=None)

    def learn(self, claims: dict[int, int | None]) -> None:
        """What the other processes hold (see `fair_share`)."""
        if self.clock() < self._presumed_until:
            claims = {**claims, **dict.fromkeys(self._presumed)}
        self.claims = claims

    def go_alone(self) -> None:
        """The server is away: the last known share, rounded down so that all of them together fit the limit."""
        others = 0 if self.claims is None else len(self.claims)
        self.local_limit = max(1, self.limit // (others + 1))
        self._presumed = set(self.claims or ())

    def come_back(self) -> None:
        """The server answers again: whether it still knows our leases is to be seen.

        The others need not have noticed yet, and use their shares without a lease: they are not forgotten at once.
        """
        self.local_limit = None
        self._presumed_until = self.clock() + PRESUMED_SECONDS
        for lot in self.lots:
            lot.doubted = lot.lease_id is not None

    def forget_idle(self) -> None:
        """Drops what was counted here alone, or whose lease has ended, and counts no more."""
        now = self.clock()
        for lot in self.lots:
            if lot.step is None and lot.lease_id is not None and now >= lot.covered_until - END_MARGIN_SECONDS:
                lot.lease_id, lot.doubted = None, False  # this process stood still, or the server was away
        self.lots = [lot for lot in self.lots if lot.lease_id is not None or lot.step is not None or not lot.idle(now)]
