"""Looks at what an account's other processes hold, and at what the Prefect server counts."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Sequence
from uuid import UUID

from prefect_eachlabs.limits.leak_watch import LeakWatch
from prefect_eachlabs.limits.leases import Holding, Leases, LimitMissing, limit_name
from prefect_eachlabs.limits.limiter import Kind
from prefect_eachlabs.limits.lot import Lot
from prefect_eachlabs.limits.plan import LotPlan
from prefect_eachlabs.limits.pool import LotPool

logger = logging.getLogger(__name__)

COUNT_SECONDS = 30.0
"""How often the limits' numbers are read while slots are in use: an operator may change them."""
SAY_AGAIN_SECONDS = 300.0
BLIND_AFTER_LOOKS = 3


def leased_slots(rows: Sequence[Holding], kind: Kind) -> int:
    """How many slots of a limit live leases hold."""
    return sum(row.slots for row in rows if row.kind is kind)


class Lookout:
    """Tells the pools what the other processes hold, which leases are in doubt, and what is leaked.

    Args:
        plans: One for each limit.
        leases: The server.
        process: This process among the holdings.
        account: For the log.
    """

    def __init__(self, plans: Sequence[LotPlan], leases: Leases, *, process: int, account: str) -> None:
        self._plans = plans
        self._leases = leases
        self._process = process
        self._leaks = [LeakWatch(limit_name(plan.pool.kind, account)) for plan in plans]
        self._count_at = -math.inf
        self._unlisted_looks = 0
        self._said: dict[str, float] = {}

    async def look(self) -> None:
        """Lists all leases; while callers wait in vain, compares them with what the server counts.

        Raises:
            LimitMissing: A limit was deleted.
            ServerAway: No usable answer.
        """
        before = [(lot, lot.lease_id) for lot in self._lots() if lot.step is None]
        rows = await self._leases.holdings()
        self.learn(rows)
        self._check_ours_are_listed(before, rows)
        now = asyncio.get_running_loop().time()
        count_all = now >= self._count_at
        for plan, leaks in zip(self._plans, self._leaks, strict=True):
            leaks.see_leases(now, [row for row in rows if row.kind is plan.pool.kind])
            in_vain = plan.was_denied(now) or plan.pool.leaked > 0
            if count_all or in_vain:
                await self._count(plan.pool, leaks, rows, look_for_leaks=in_vain)
        if count_all:
            self._count_at = now + COUNT_SECONDS

    def learn(self, rows: Sequence[Holding]) -> None:
        """Tells the pools what the other processes hold, and which of them wait for more."""
        for plan in self._plans:
            claims: dict[int, int | None] = {}
            for row in rows:
                if row.kind is plan.pool.kind and row.process != self._process:
                    held = claims.get(row.process, 0)
                    claims[row.process] = None if held is None or row.slots == 0 else held + row.slots
            plan.pool.learn(claims)

    def use_number(self, pool: LotPool, server_limit: int) -> None:
        """The smaller of the two numbers counts."""
        if server_limit != pool.account_limit:
            self.say(
                "The %s limit on the Prefect server is %d, this account's setting is %d: the smaller one counts. "
                "`prefect-eachlabs limits apply` writes the setting to the server.",
                pool.kind.value,
                server_limit,
                pool.account_limit,
            )
        pool.limit = min(pool.account_limit, server_limit)

    def say(self, message: str, *args: object, exc_info: BaseException | None = None) -> None:
        """Logs a warning, the same one at most every five minutes."""
        now = asyncio.get_running_loop().time()
        key = message % args
        if now - self._said.get(key, -math.inf) >= SAY_AGAIN_SECONDS:
            self._said[key] = now
            logger.warning("%s", key, exc_info=exc_info)

    def _lots(self) -> list[Lot]:
        return [lot for plan in self._plans for lot in plan.pool.lots]

    def _check_ours_are_listed(self, before: Sequence[tuple[Lot, UUID | None]], rows: Sequence[Holding]) -> None:
        """A lease of ours that is not listed was forgotten, or this server lists none."""
        listed = sum(row.slots for row in rows if row.process == self._process)
        present = self._lots()
        still = [
            lot
            for lot, lease_id in before
            if lease_id is not None and lot.lease_id == lease_id and lot.step is None and lot in present
        ]
        if sum(lot.slots for lot in still) <= listed:
            self._unlisted_looks = 0
            return
        for lot in still:
            lot.doubted = True
        self._unlisted_looks += 1
        if self._unlisted_looks >= BLIND_AFTER_LOOKS:
            for plan in self._plans:
                plan.pool.blind = True
            self.say(
                "This Prefect server does not list leases: the account's limits hold, but they are not shared out "
                "evenly among its processes. prefect-eachlabs is made for Prefect 3.8."
            )

    async def _count(self, pool: LotPool, leaks: LeakWatch, rows: Sequence[Holding], *, look_for_leaks: bool) -> None:
        count = await self._leases.count(pool.kind)
        if count is None:
            raise LimitMissing
        self.use_number(pool, count.limit)
        if not look_for_leaks or pool.blind:
            return
        leased = leased_slots(rows, pool.kind)
        if count.active_slots > leased:  # a lease may have come or gone between the two answers
            leased = min(leased, leased_slots(await self._leases.holdings(), pool.kind))
        now = asyncio.get_running_loop().time()
        pool.leaked = leaks.leaked(now, counted=count.active_slots, leased=leased, limit=count.limit)
