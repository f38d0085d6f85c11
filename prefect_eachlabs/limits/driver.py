"""Carries out the plans of an account's limits against the Prefect server, and notices when it is away."""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from prefect_eachlabs.limits.leases import Denied, LeaseGone, Leases, LimitMissing, ServerAway
from prefect_eachlabs.limits.lookout import Lookout, leased_slots
from prefect_eachlabs.limits.lot import Step, Verb
from prefect_eachlabs.limits.plan import LotPlan
from prefect_eachlabs.limits.pool import LotPool

logger = logging.getLogger(__name__)

LOOK_SECONDS = 4.0
"""How often the leases of all are listed, while slots are in use here."""
CALLS_AT_ONCE = 3
CLOSE_WITHIN_SECONDS = 3.0
FAILED_VISITS = 2
"""One lost call is no absence: alone, a process takes more than the others can know of."""
NEVER_MET_SECONDS = 60.0
"""A server that this process has never met may be restarting while others go on with their shares: it is waited for."""
FIRST_VISIT_PAUSE_SECONDS = 1.0
VISIT_MAX_PAUSE_SECONDS = 3.0
"""A server that is away is tried again at least so often, while there is demand."""
PAUSE_AFTER_A_FAILURE_SECONDS = 1.0


class LotDriver:
    """Runs as one task in the loop that wakes it first, asleep while nothing is due.

    Args:
        plans: One for each limit.
        leases: The server.
        process: This process among the holdings.
        account: For the log.
        tell: Called when slots may have come free.
    """

    def __init__(
        self, plans: Sequence[LotPlan], leases: Leases, *, process: int, account: str, tell: Callable[[], None]
    ) -> None:
        self.away_since: float | None = None
        self._plans = plans
        self._leases = leases
        self._process = process
        self._tell = tell
        self._lookout = Lookout(plans, leases, process=process, account=account)
        self._wake: asyncio.Event | None = None
        self._task: asyncio.Task[None] | None = None
        self._calls: set[asyncio.Task[None]] = set()
        self._closed = False
        self._visited = False
        """The limits exist and the server answers; until then nothing else is asked."""
        self._visit_at = self._look_at = self._steps_at = -math.inf
        self._visit_pause_seconds = FIRST_VISIT_PAUSE_SECONDS
        self._failed_visits = 0
        self._alone_from = math.inf  # set by the first visit: until then a server not met yet is waited for
        self._looking = False

    def wake(self) -> None:
        """The plans may have changed: look at them again."""
        if self._closed:
            return
        if self._wake is None or self._task is None or self._task.done():
            self._wake = asyncio.Event()
            self._task = asyncio.get_running_loop().create_task(self._run(self._wake))
        self._wake.set()

    async def close(self) -> None:
        """Gives back what is not in use, within 3 s; the rest comes back when its leases end."""
        self._closed = True
        tasks = [task for task in (self._task, *self._calls) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        try:
            if self._visited and self.away_since is None:
                await asyncio.wait_for(self._give_back(), CLOSE_WITHIN_SECONDS)
        except (ServerAway, asyncio.TimeoutError) as error:
            logger.debug("Leases are left to end by themselves: %r", error)
        finally:
            await self._leases.close()

    async def _give_back(self) -> None:
        now = self._now()
        for plan in self._plans:
            unused = [lot.lease_id for lot in plan.pool.lots if lot.idle(now) and lot.step is None]
            for lease_id in (*unused, plan.announced):
                if lease_id is not None:
                    await self._leases.release(lease_id)

    # ------------------------------------------------------------------ the task

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    async def _run(self, wake: asyncio.Event) -> None:
        loop = asyncio.get_running_loop()
        while True:
            wake.clear()
            due_at = self._start_what_is_due(loop.time())
            timer = loop.call_at(max(due_at, loop.time() + 0.001), wake.set) if due_at < math.inf else None
            await wake.wait()
            if timer is not None:
                timer.cancel()

    def _start_what_is_due(self, now: float) -> float:
        """Begins a few calls at once; returns when to look again if nothing happens before."""
        if all(plan.idle for plan in self._plans):
            return math.inf
        if not self._visited:
            return self._start_visit(now)
        if now < self._steps_at:
            return self._steps_at
        due_at = self._start_look(now)
        # Alternating, and who waits comes first: neither limit keeps the other from its calls.
        plans = sorted(self._plans, key=lambda plan: plan.pool.waiting == 0)
        while plans and len(self._calls) < CALLS_AT_ONCE:
            plan = plans.pop(0)
            step = plan.next_step()
            if step is None:
                due_at = min(due_at, plan.due_at)
            else:
                self._start(self._perform(plan, step))
                plans.append(plan)
        return due_at

    def _start_visit(self, now: float) -> float:
        for plan in self._plans:
            plan.pool.forget_idle()
        if self._calls or self._visit_at == math.inf:
            return math.inf
        if now < self._visit_at:
            return self._visit_at
        self._visit_at = math.inf
        self._start(self._visit())
        return math.inf

    def _start_look(self, now: float) -> float:
        if self._looking or not any(plan.pool.awake for plan in self._plans):
            return math.inf
        if now >= self._look_at:
            self._looking = True
            self._start(self._look())
            return math.inf
        return self._look_at

    def _start(self, call: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(call)
        self._calls.add(task)
        task.add_done_callback(self._call_over)

    def _call_over(self, task: asyncio.Task[None]) -> None:
        self._calls.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            # Whatever it is, callers must not wait for ever: see whether the server answers, else count alone.
            self._lookout.say("Sharing the limits failed, which should not happen: %r", error, exc_info=error)
            self._doubt_the_server()
        self.wake()

    # ---------------------------------------------------------------- the steps

    async def _perform(self, plan: LotPlan, step: Step) -> None:
        sent_at = self._now()
        try:
            await self._ask(plan, step, sent_at)
        except Denied:
            plan.denied(step)
        except LeaseGone:
            plan.gone(step)
            self._lookout.say(
                "The Prefect server no longer knows leases that it granted: it was restarted with leases in memory, or "
                "this process stood still for over a minute. What was sent under them still counts here."
            )
        except LimitMissing:
            plan.failed(step)
            self._visited, self._visit_at = False, sent_at
        except ServerAway as error:
            plan.failed(step)
            logger.debug("%s: %s", step.verb.value, error)
            self._doubt_the_server()
        except BaseException:
            plan.failed(step)
            raise

    async def _ask(self, plan: LotPlan, step: Step, sent_at: float) -> None:
        pool, lease_id = plan.pool, step.lease_id
        if step.verb in (Verb.LEASE, Verb.COVER):
            granted = await self._leases.lease(pool.kind, step.slots, self._process)
            if granted.limit > pool.account_limit and await self._too_many(pool):
                await self._leases.release(granted.lease_id)
                raise Denied
            plan.granted(step, granted.lease_id, sent_at=sent_at, server_limit=granted.limit)
            self._tell()
        elif lease_id is None:
            plan.announcement(step, await self._leases.announce(pool.kind, self._process), sent_at=sent_at)
            self._look_at = sent_at
        elif step.verb in (Verb.RENEW, Verb.REUSE, Verb.RENEW_ANNOUNCEMENT):
            await self._leases.renew(lease_id)
            plan.renewed(step, sent_at=sent_at)
            self._tell()
        else:
            await self._leases.release(lease_id)
            if step.verb is Verb.RELEASE:
                plan.released(step)
            else:
                plan.announcement(step, None, sent_at=sent_at)

    async def _too_many(self, pool: LotPool) -> bool:
        """The server lets more through than the account may: count all leases, the one just granted included."""
        return leased_slots(await self._leases.holdings(), pool.kind) > pool.account_limit

    async def _look(self) -> None:
        try:
            await self._lookout.look()
            self._tell()
        except LimitMissing:
            self._visited, self._visit_at = False, self._now()
        except ServerAway as error:
            logger.debug("listing leases: %s", error)
            self._doubt_the_server()
        finally:
            self._looking = False
            self._look_at = self._now() + LOOK_SECONDS * random.uniform(0.9, 1.1)

    # --------------------------------------------------------- the server's absence

    def _doubt_the_server(self) -> None:
        """A call failed: ask for something small before anything else."""
        if self._visited:
            now = self._now()
            self._visited, self._visit_at = False, now
            self._steps_at = now + PAUSE_AFTER_A_FAILURE_SECONDS

    async def _visit(self) -> None:
        """Sees that the server reads and writes and that the limits exist; goes on alone when it does not answer."""
        pools = [plan.pool for plan in self._plans]
        if self._alone_from == math.inf:
            self._alone_from = self._now() + NEVER_MET_SECONDS
        try:
            for pool in pools:
                self._lookout.use_number(pool, await self._leases.ensure(pool.kind, pool.account_limit))
            await self._leases.release(await self._leases.announce(pools[0].kind, self._process))
            rows = await self._leases.holdings()
        except Exception as error:
            self._failed_visits += 1
            if self._failed_visits >= FAILED_VISITS:
                self._go_on_alone(error)
            self._visit_at = self._now() + self._visit_pause_seconds * random.uniform(0.8, 1.2)
            self._visit_pause_seconds = min(VISIT_MAX_PAUSE_SECONDS, self._visit_pause_seconds * 1.5)
            if not isinstance(error, ServerAway):
                raise
        else:
            self._share_again()
            self._lookout.learn(rows)

    def _go_on_alone(self, error: Exception) -> None:
        if self.away_since is not None:
            return
        if self._now() < self._alone_from:
            self._lookout.say(
                "The Prefect server at %s has not answered yet: it is waited for, for %.0f s, as others may hold "
                "slots of this account. Start it, or unset PREFECT_API_URL if this is the only process.",
                *(self._leases.where, NEVER_MET_SECONDS),
            )
            return
        self.away_since = self._now()
        for plan in self._plans:
            plan.pool.go_alone()
        numbers = " and ".join(f"{plan.pool.local_limit} {plan.pool.kind.value}" for plan in self._plans)
        logger.warning(
            "The Prefect server at %s gives no usable answer (%s): the account's limits are counted in this process "
            "alone until it does, with its last known share of them: %s slots.",
            self._leases.where,
            error,
            numbers,
        )
        self._tell()

    def _share_again(self) -> None:
        now = self._now()
        self._alone_from = -math.inf
        self._visited, self._failed_visits, self._visit_pause_seconds = True, 0, FIRST_VISIT_PAUSE_SECONDS
        self._look_at = now
        if self.away_since is None:
            return
        logger.warning(
            "The Prefect server at %s answers again after %.0f s: the limits are shared again.",
            self._leases.where,
            now - self.away_since,
        )
        self.away_since = None
        for plan in self._plans:
            plan.pool.come_back()
