"""What a process holds of a limit that several share: lots of slots, each under one lease, and the fair share.

A *lot* is a lease of a few slots. The slots of a request lot are used once a round; when the last one has cooled,
the lot goes back, or is renewed for another round, which costs one call and lets nobody slip in between.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Protocol
from uuid import UUID


class Verb(Enum):
    """What to ask of the server."""

    LEASE = "lease new slots"
    COVER = "lease for slots that are in use without a lease"
    RENEW = "renew a lot's lease"
    REUSE = "renew the lease of a lot that has cooled, and use it again"
    RELEASE = "give a lot back"
    ANNOUNCE = "tell the others that callers wait here"
    RENEW_ANNOUNCEMENT = "renew that"
    WITHDRAW = "take that back"


@dataclass(frozen=True)
class Step:
    """One call to make; a pool names a step once, until it is told how it ended."""

    verb: Verb
    slots: int = 0
    lot: Lot | None = None
    lease_id: UUID | None = None


def fair_share(limit: int, claims: Mapping[int, int | None], me: int) -> tuple[int, bool]:
    """The most slots this process may hold, so that all who want more get equally much and nothing lies idle.

    Args:
        limit: Slots there are.
        claims: Process → slots it holds and is content with, or None when it waits for more.
        me: This process; it always counts as wanting more.

    Returns:
        The share, at least 1; and whether there are more processes than slots, so that they must take turns.
    """
    hungry = {process for process, slots in claims.items() if slots is None} | {me}
    modest = sorted((slots, process) for process, slots in claims.items() if slots is not None and process != me)
    remaining, count = limit, len(hungry) + len(modest)
    while modest and modest[0][0] * count <= remaining:
        remaining -= modest.pop(0)[0]
        count -= 1
    floor, extra = divmod(max(0, remaining), count)
    rank = sorted(hungry | {process for _, process in modest}).index(me)
    return max(1, floor + (rank < extra)), floor == 0


class Lot:
    """A few slots under one lease; without a lease they are counted in this process alone."""

    def __init__(self, slots: int, now: float, *, lease_id: UUID | None, covered_until: float = -math.inf) -> None:
        self.slots = slots
        self.lease_id = lease_id
        self.covered_until = covered_until
        """The lease lasts at least so long: it was granted after its call was sent."""
        self.free = slots
        self.taken = 0
        self.hot_until = -math.inf
        """When the last answered slot has cooled."""
        self.fresh_since = now
        """When its round began; in flight: when a slot of it was last in use."""
        self.spent = False
        """A slot of it was used in this round."""
        self.step: Verb | None = None
        self.doubted = False
        """The server may have forgotten the lease: renew it now, to know."""

    def __repr__(self) -> str:
        return f"<Lot {self.slots}: {self.free} free, {self.taken} taken, lease {self.lease_id}>"

    def idle(self, now: float) -> bool:
        """Nothing was sent from it that still counts."""
        return self.taken == 0 and self.hot_until <= now

    def busy(self, now: float) -> int:
        """How many of its slots count: taken, or cooling."""
        return self.slots - self.free if self.hot_until > now else self.taken

    def begin_round(self, now: float) -> None:
        """All its slots may be used again."""
        self.free, self.spent, self.fresh_since = self.slots, False, now


class LotKeeper(Protocol):
    """Who is told how a slot ended."""

    def place_done(self, lot: Lot) -> None: ...

    def place_unused(self, lot: Lot) -> None: ...


class LotPlace:
    """A slot out of a lot."""

    def __init__(self, keeper: LotKeeper, lot: Lot) -> None:
        self._keeper: LotKeeper | None = keeper
        self._lot = lot

    def done(self) -> None:
        """The answer came (its 60 s begin), or the prediction's end was seen."""
        if (keeper := self._keeper) is not None:
            self._keeper = None
            keeper.place_done(self._lot)

    def unused(self) -> None:
        """Nothing was sent."""
        if (keeper := self._keeper) is not None:
            self._keeper = None
            keeper.place_unused(self._lot)
