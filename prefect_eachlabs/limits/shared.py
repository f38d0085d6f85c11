"""`SharedLots`, the slots of an account leased from a Prefect server, and the choice of where slots come from."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable

from prefect.settings import PREFECT_API_URL

from prefect_eachlabs.limits.driver import LotDriver
from prefect_eachlabs.limits.leases import LEASE_SECONDS, Leases, PrefectLeases
from prefect_eachlabs.limits.limiter import Kind, LocalSlots, Slot, SlotSource
from prefect_eachlabs.limits.machine import machine_source
from prefect_eachlabs.limits.plan import LotPlan
from prefect_eachlabs.limits.pool import LotPool
from prefect_eachlabs.settings import AccountSettings


def lot_source_for(settings: AccountSettings) -> SlotSource:
    """Where the account's slots come from here: the Prefect server of `PREFECT_API_URL`, or this machine's file.

    The embedded server counts as none: its leases outlive their process, and no other process shares it. A flow run
    on it has no `PREFECT_API_URL`, neither in its settings nor in its environment, so the setting alone decides.
    """
    limited = settings.requests_per_minute is not None or settings.max_in_flight is not None
    if limited and PREFECT_API_URL.value():
        return SharedLots(settings)
    return machine_source(settings)


def _loop_time() -> float:
    return asyncio.get_running_loop().time()


class SharedLots:
    """The slots of an account, leased in lots from the global limits of a Prefect server; a `SlotSource`.

    Nothing is asked of the server until a slot is wanted. Costs no request at the API.

    Args:
        settings: The account and its two limits; missing ones are created on the server, and of two different
            numbers the smaller one counts. A limit of None needs no server.
        leases: The server; one open Prefect client when not given.
    """

    def __init__(self, settings: AccountSettings, leases: Leases | None = None) -> None:
        process = secrets.randbits(48)
        numbers = {Kind.REQUESTS: settings.requests_per_minute, Kind.IN_FLIGHT: settings.max_in_flight}
        self._account = settings.account
        self._unlimited = LocalSlots(requests_per_minute=None, max_in_flight=None)
        self._listeners: list[Callable[[], None]] = []
        self._plans = {
            kind: LotPlan(LotPool(kind, number, process=process, clock=_loop_time, changed=self._changed))
            for kind, number in numbers.items()
            if number is not None
        }
        self._driver = LotDriver(
            tuple(self._plans.values()),
            PrefectLeases(settings.account) if leases is None else leases,
            process=process,
            account=settings.account,
            tell=self._tell,
        )

    def __repr__(self) -> str:
        state = "shared" if self._driver.away_since is None else "server away"
        return f"<SharedLots {self._account}, {state}: {[plan.pool for plan in self._plans.values()]}>"

    def _tell(self) -> None:
        for listener in self._listeners:
            listener()

    def _changed(self, limiter: bool) -> None:
        if limiter:
            self._tell()
        self._driver.wake()

    def try_take(self, kind: Kind) -> Slot | None:
        """A slot, if one is leased and free."""
        plan = self._plans.get(kind)
        return self._unlimited.try_take(kind) if plan is None else plan.pool.try_take()

    def wanted(self, kind: Kind, count: int) -> None:
        """So many callers wait now: slots are leased for them."""
        if (plan := self._plans.get(kind)) is not None:
            plan.pool.waiting = count
            self._driver.wake()

    def next_change_at(self, kind: Kind) -> float | None:
        """With the server away, when the next slot has cooled; otherwise the listener is told."""
        plan = self._plans.get(kind)
        return None if plan is None or plan.pool.local_limit is None else plan.pool.cooled_at()

    def pressure(self, kind: Kind) -> float:
        """How much of this process's share is in use: 0.0 to 1.0."""
        plan = self._plans.get(kind)
        return 0.0 if plan is None else plan.pool.pressure

    def limit(self, kind: Kind) -> int | None:
        """The account's limit: its own number or the server's, whichever is smaller."""
        plan = self._plans.get(kind)
        return None if plan is None else plan.pool.limit

    def held_by_others(self, kind: Kind) -> str | None:
        """Which slots others hold, as long as the server has not even one for this process."""
        plan = self._plans.get(kind)
        if plan is None or not plan.was_denied(_loop_time()) or 2 * plan.pool.held >= plan.pool.limit:
            return None
        what = "requests a minute" if kind is Kind.REQUESTS else "slots in flight"
        return (
            f"{plan.pool.limit - plan.pool.held} of {plan.pool.limit} {what} of account {self._account!r} that other "
            f"processes hold on the Prefect server; what a dead one held comes back within {LEASE_SECONDS:.0f} s"
        )

    def on_change(self, listener: Callable[[], None]) -> None:
        """The listener is called, on the loop, when `try_take` may succeed now."""
        self._listeners.append(listener)

    async def close(self) -> None:
        """Gives back what is not in use; the rest comes back when its leases end, 75 s later at most."""
        await self._driver.close()
