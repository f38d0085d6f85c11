"""What to ask the server for next, for one limit; pure: the driver asks, and tells the plan what came of it."""

from __future__ import annotations

import math
import random
from uuid import UUID

from prefect_eachlabs.limits.leases import LEASE_SECONDS
from prefect_eachlabs.limits.limiter import Kind
from prefect_eachlabs.limits.lot import Lot, Step, Verb
from prefect_eachlabs.limits.pool import UNUSED_SECONDS, LotPool

ASK_AGAIN_SECONDS = 0.5
"""After a denial; grows to `ASK_AGAIN_MAX_SECONDS` while nothing comes free."""
ASK_AGAIN_MAX_SECONDS = 1.5
HUNGRY_AFTER_SECONDS = 0.3
"""When callers wait longer, the other processes are told, and their share shrinks."""
HUNGRY_FOR_SECONDS = 10.0
"""They are told that it is over when nobody has waited for so long."""
ROUND_SPREAD = 0.8
"""From the second round on, lots begin no faster than 1/0.8 of the even pace: a burst in the first minute would
otherwise come again every minute, and a process that joins right after one would find nothing for half a minute."""
RENEWED_WITH_SECONDS_LEFT = {Kind.REQUESTS: 25.0, Kind.IN_FLIGHT: 50.0}
SAFE_SECONDS = 5.0
"""With less left, a lease is not given back: the server may reap it meanwhile, and its slots would go back twice."""


class LotPlan:
    """Decides the calls for the lots of a pool.

    Args:
        pool: The lots; the plan adds and drops them.
    """

    def __init__(self, pool: LotPool) -> None:
        self.pool = pool
        self.due_at = math.inf
        """When `next_step`, having returned None, is to be asked again."""
        self.hungry_since: float | None = None
        """Since when callers wait and nothing is free here."""
        self.announced: UUID | None = None
        self._announced_until = self._last_hungry = self._denied_at = -math.inf
        self._ask_at = self._cover_at = self._next_round_at = -math.inf
        self._pause_seconds = ASK_AGAIN_SECONDS
        self._ask_at_most = pool.account_limit
        self._leasing = self._announcing = False

    @property
    def idle(self) -> bool:
        """Nothing is held and nobody waits."""
        return not (self.pool.waiting or self.pool.lots or self.announced or self._leasing or self._announcing)

    def was_denied(self, now: float) -> bool:
        """The server had not even one place of our share, a moment ago."""
        return now - self._denied_at < 5.0

    # -------------------------------------------------------------- what to ask

    def next_step(self) -> Step | None:
        """The most urgent call to make, marked as under way; None: nothing until `due_at`."""
        pool = self.pool
        now = pool.clock()
        self.due_at = math.inf
        pool.forget_idle()
        ready = pool.ready()
        self._note_hunger(now, ready)
        wanted = pool.waiting + pool.wanted_ready()
        short = wanted if 2 * ready < wanted else 0  # filled up when half empty, not by ones
        return (
            self._step_for_a_lot(now, short)
            or self._step_to_cover(now)
            or self._step_to_lease(now, short)
            or self._step_to_tell(now)
        )

    def _due(self, at: float) -> None:
        self.due_at = min(self.due_at, at)

    def _note_hunger(self, now: float, ready: int) -> None:
        if self.pool.waiting == 0 or ready > 0:
            self.hungry_since = None
            return
        self._last_hungry = now
        if self.hungry_since is None:
            self.hungry_since = now

    def _step_for_a_lot(self, now: float, short: int) -> Step | None:
        share, turns = self.pool.share()
        surplus, again = self.pool.held - share, short > 0 and not turns
        for lot in self.pool.lots:
            if lot.step is not None:
                continue
            if lot.lease_id is None:
                self._due(lot.hot_until if lot.taken == 0 else math.inf)
                continue
            lot.step = self._verb_for(lot, now, share, surplus=surplus, again=again)
            if lot.step is not None:
                if lot.step is Verb.RELEASE and turns:
                    self._ask_at = now + random.uniform(1.0, 2.0)  # the others have had a chance by then
                return Step(lot.step, lot=lot, lease_id=lot.lease_id)
        return None

    def _verb_for(self, lot: Lot, now: float, share: int, *, surplus: int, again: bool) -> Verb | None:
        if lot.doubted:
            return Verb.RENEW
        if not lot.idle(now):
            at = self._renew_at(lot)
            self._due(at)
            self._due(lot.hot_until if lot.taken == 0 else math.inf)
            return Verb.RENEW if now >= at else None
        verb = None if surplus > 0 else self._verb_for_an_idle_lot(lot, now, share, again=again)
        if surplus > 0 or verb is Verb.RELEASE:
            self._due(lot.covered_until)
            return Verb.RELEASE if now < lot.covered_until - SAFE_SECONDS else None
        return verb

    def _verb_for_an_idle_lot(self, lot: Lot, now: float, share: int, *, again: bool) -> Verb | None:
        keep_until = min(self.pool.usable_until(lot), lot.fresh_since + UNUSED_SECONDS)
        if now < keep_until:
            self._due(keep_until)
            return None
        if not again or not lot.spent or not self.pool.cools:
            return Verb.RELEASE
        if now >= self._next_round_at:
            self._next_round_at = now + ROUND_SPREAD * 60.0 * lot.slots / share
            return Verb.REUSE
        renew_at = lot.covered_until - SAFE_SECONDS
        self._due(min(renew_at, self._next_round_at))
        return Verb.RENEW if now >= renew_at else None

    def _renew_at(self, lot: Lot) -> float:
        if lot.hot_until + SAFE_SECONDS > lot.covered_until:
            return -math.inf  # an answer came late: its window must be covered to the end
        return lot.covered_until - RENEWED_WITH_SECONDS_LEFT[self.pool.kind] if lot.taken else math.inf

    def _step_to_cover(self, now: float) -> Step | None:
        """Slots in use that no lease covers (the server was away, or forgot): lease for them, before any others."""
        for lot in self.pool.lots:
            if lot.lease_id is None and lot.step is None and not lot.idle(now + 3.0):
                if self._leasing:
                    return None
                if now < self._cover_at:
                    self._due(self._cover_at)
                    return None
                self._leasing, lot.step = True, Verb.COVER
                return Step(Verb.COVER, slots=lot.slots, lot=lot)
        return None

    def _step_to_lease(self, now: float, short: int) -> Step | None:
        pool = self.pool
        slots = min(short, pool.lot_size, pool.share()[0] - pool.held, self._ask_at_most)
        if slots <= 0 or self._leasing:
            return None
        if now < self._ask_at:
            self._due(self._ask_at)
            return None
        self._leasing = True
        return Step(Verb.LEASE, slots=slots)

    def _step_to_tell(self, now: float) -> Step | None:
        if self._announcing:
            return None
        if self.announced is None:
            if self.hungry_since is None:
                return None
            verb, at = Verb.ANNOUNCE, self.hungry_since + HUNGRY_AFTER_SECONDS
        else:
            verb, at = Verb.RENEW_ANNOUNCEMENT, self._announced_until - 25.0
            if self._last_hungry + HUNGRY_FOR_SECONDS <= at:
                verb, at = Verb.WITHDRAW, self._last_hungry + HUNGRY_FOR_SECONDS
        if now < at:
            self._due(at)
            return None
        self._announcing = True
        return Step(verb, lease_id=self.announced)

    # ---------------------------------------------------------- what came of it

    def granted(self, step: Step, lease_id: UUID, *, sent_at: float, server_limit: int) -> None:
        """Slots were leased, for new ones or for ones in use."""
        self._over(step)
        self.pool.limit = min(self.pool.account_limit, server_limit)
        self._pause_seconds, self._ask_at_most = ASK_AGAIN_SECONDS, self.pool.limit
        until = sent_at + LEASE_SECONDS
        if step.lot is None:
            self.pool.lots.append(Lot(step.slots, self.pool.clock(), lease_id=lease_id, covered_until=until))
        else:
            step.lot.lease_id, step.lot.covered_until = lease_id, until

    def denied(self, step: Step) -> None:
        """Fewer are free than were asked for: ask for half of it, or, if it was one, a little later."""
        self._over(step)
        now = self.pool.clock()
        if step.verb is Verb.COVER:
            self._cover_at = now + 2.0
        elif step.slots > 1:
            self._ask_at_most = step.slots // 2
        else:
            self._denied_at = now
            self._ask_at = now + self._pause_seconds * random.uniform(0.75, 1.25)
            self._pause_seconds = min(ASK_AGAIN_MAX_SECONDS, self._pause_seconds * 1.2)

    def renewed(self, step: Step, *, sent_at: float) -> None:
        """The lease lasts on; a lot to be used again begins its next round."""
        self._over(step)
        if step.lot is None:
            self._announced_until = sent_at + LEASE_SECONDS
            return
        step.lot.covered_until = sent_at + LEASE_SECONDS
        step.lot.doubted = False
        if step.verb is Verb.REUSE:
            step.lot.begin_round(self.pool.clock())

    def released(self, step: Step) -> None:
        """A lot went back."""
        self._over(step)
        self._ask_at_most = self.pool.limit
        if step.lot in self.pool.lots:
            self.pool.lots.remove(step.lot)

    def announcement(self, step: Step, lease_id: UUID | None, *, sent_at: float) -> None:
        """The others know that callers wait here, or (None) no longer."""
        self._over(step)
        self.announced, self._announced_until = lease_id, sent_at + LEASE_SECONDS

    def gone(self, step: Step) -> None:
        """The server knows no such lease: what was sent from the lot is counted here alone."""
        self._over(step)
        if step.lot is None:
            self.announced = None
        else:
            step.lot.lease_id, step.lot.doubted = None, False

    def failed(self, step: Step) -> None:
        """No answer: what was asked for may have happened. A lease nobody renews ends by itself."""
        self._over(step)
        if step.verb is Verb.RELEASE and step.lot in self.pool.lots:
            self.pool.lots.remove(step.lot)
        elif step.verb is Verb.WITHDRAW:
            self.announced = None

    def _over(self, step: Step) -> None:
        if step.lot is not None:
            step.lot.step = None
        if step.verb in (Verb.LEASE, Verb.COVER):
            self._leasing = False
        elif step.verb in (Verb.ANNOUNCE, Verb.RENEW_ANNOUNCEMENT, Verb.WITHDRAW):
            self._announcing = False
