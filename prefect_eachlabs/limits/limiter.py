"""The slots of an account: not more than its limits allow in any 60 s, and not less than that by much.

A *slot* is the right to one request in the window, or to one prediction in flight. Slots are leased, one or a few under
one *lease*, from whoever counts them for all the account's processes (see `leases`): for 75 s when callers wait. They
are taken within 10 s, and the lease is given back when its last slot is free again: a request's 60 s after its answer,
one in flight at the end of its prediction. Then they are leased anew, by whoever asks first, so that processes share
the account within seconds.

**Never over.** While a slot is taken its lease is renewed so that it always has a window left: what a killed process
sent, or has in flight, counts for 62 to 75 s longer. A slot is handed out only while its lease has that much left, so
a process that stood still begins with new leases. Slots in use whose lease has ended or was forgotten are leased again
before any others. Without an answer from the server nothing new is leased, and after an absence in which leases may
have ended, everybody has some seconds to lease again what is in use.

What no rule here can hold is a prediction in flight, or a request without an answer, of a process that stands still or
is cut off from its server for a minute: its slots go to others. The API says 429 then, which costs nothing.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from prefect_eachlabs.limits.breaker import CircuitBreaker
from prefect_eachlabs.limits.leases import (
    CALL_SECONDS,
    LEASE_SECONDS,
    Denied,
    Kind,
    LeaseGone,
    Leases,
    ServerAway,
    clock,
    numbers_of,
)
from prefect_eachlabs.settings import AccountSettings

__all__ = ["Kind", "RateLimiter", "Slot"]

logger = logging.getLogger(__name__)
T = TypeVar("T")

WINDOW_SECONDS = 60.0
COOLING_SECONDS = WINDOW_SECONDS + 0.1
"""From the answer of a request until its slot may be used again; the tenth is for clocks that differ."""
USED_SECONDS = 10.0
"""A lease's slots are taken within so long of its lease; then it empties and goes back."""
RENEWED_SECONDS = COOLING_SECONDS + 2.0
"""More than a window is left of every lease that is used."""
END_MARGIN_SECONDS = CALL_SECONDS + 2.0
"""With less left, a lease is not given back: the call could arrive when others have its slots."""
LOOK_SECONDS = 3.0
"""So often it is looked whether the machine was asleep: timers stand still meanwhile, and leases do not."""
ASK_AGAIN_SECONDS = 0.5
"""After a denial; on average."""
COVER_AGAIN_SECONDS = 0.2
"""The same for slots that are in use: before others."""
AWAY_SECONDS = 1.5
"""A server that did not answer is asked again so much later."""
COVERED_WITHIN_SECONDS = CALL_SECONDS + 2 * AWAY_SECONDS
"""After a long absence of the server everybody with slots in use has noticed within so long that it is back."""
LOST_AFTER_SECONDS = LEASE_SECONDS + 20.0
"""No lease of a process that died lives so long: a Prefect server looks for ended ones every 15 s."""
CLOSE_WITHIN_SECONDS = 3.0
SHORTEST_SLEEP_SECONDS = 0.001
STANDS_STILL_AFTER_SECONDS = 5.0
"""Who waits for longer, for slots that others hold, says so."""
SAY_AGAIN_SECONDS = 120.0
QUESTIONS_IN_A_ROW = 3
"""So many questions may go before a create that waits; then the create has its turn."""


class _Lease:
    """A few slots under one lease."""

    def __init__(self, slots: int, lease_id: str, until: float) -> None:
        self.slots = self.free = slots
        self.taken = 0
        self.lease_id = lease_id
        self.until = until
        """The lease lasts at least so long, since it was granted after its call was sent; long ago: it is forgotten."""
        self.fresh_until = until - LEASE_SECONDS + USED_SECONDS
        self.cool_at = -math.inf
        """When the last answered request is a window ago."""
        self.changed = asyncio.Event()

    def __repr__(self) -> str:
        return f"<_Lease of {self.slots}: {self.free} free, {self.taken} taken, lease {self.lease_id}>"

    def is_fresh(self, now: float) -> bool:
        """Slots may be taken from it."""
        return now < min(self.fresh_until, self.until - RENEWED_SECONDS)

    @property
    def is_gone(self) -> bool:
        return self.until == -math.inf

    def is_covered(self, now: float) -> bool:
        """Its lease is known to last, long enough for a call about it to arrive."""
        return now < self.until - END_MARGIN_SECONDS

    def in_use(self, now: float) -> int:
        """Slots that count: taken, or cooling."""
        return self.slots - self.free if now < self.cool_at else self.taken


class Slot:
    """The right to one request, or to one prediction in flight. The first call of a method ends it."""

    def __init__(self, limit: _Limit | None = None, lease: _Lease | None = None) -> None:
        self._limit = limit
        self._lease = lease

    def done(self) -> None:
        """A request: its answer came, or was lost; its 60 s begin now. In flight: the end was seen."""
        self._end(used=True)

    def unused(self) -> None:
        """Nothing was sent: free again at once."""
        self._end(used=False)

    def _end(self, *, used: bool) -> None:
        if self._limit is not None and self._lease is not None:
            limit, self._limit = self._limit, None
            limit.slot_ended(self._lease, used=used)


_Queue = OrderedDict["asyncio.Future[Slot]", None]


class _Limit:
    """One of the account's limits, as far as this process holds it, and those who wait for its slots.

    Args:
        kind: Which.
        number: The account's own number; the server's counts where that is smaller.
        source: Who counts.
        account: For messages.
    """

    def __init__(self, kind: Kind, number: int, source: Leases, account: str) -> None:
        self.kind = kind
        self.limit = self.account_limit = number
        self.questions: _Queue = OrderedDict()
        self.others: _Queue = OrderedDict()
        self._questions_in_a_row = 0
        self._waits_since: float | None = None
        """Since when callers wait and none has been given any."""
        self._said_at = -math.inf
        self._leases: list[_Lease] = []
        self._source = source
        self._account = account
        self._tasks: set[asyncio.Task[None]] = set()
        self._noticing: asyncio.Task[None] | None = None
        self._asking = self._closed = False
        self._away: str | None = None
        """What came in place of the last answer, when it was not usable."""
        self._answered_at = -math.inf
        self._ask_at = self._denied_at = -math.inf
        self._denied_since: float | None = None
        """Since when not even one slot was granted."""
        self._denied_by = ""
        self._ask_at_most = number
        self._said: set[str] = set()

    def __repr__(self) -> str:
        in_use = sum(lease.in_use(clock()) for lease in self._leases)
        return f"<{self.kind.value}: {in_use} in use, {self._held} held of {self.limit}, {self._waiting} wait>"

    @property
    def _held(self) -> int:
        """Slots that are leased here, used or not."""
        return sum(lease.slots for lease in self._leases)

    @property
    def _waiting(self) -> int:
        return len(self.questions) + len(self.others)

    @property
    def pressure(self) -> float:
        """How much is in use of what there is: all of it, or while others hold the rest, what is held here."""
        now = clock()
        part = self._held if now - self._denied_at < USED_SECONDS else self.limit
        return min(1.0, sum(lease.in_use(now) for lease in self._leases) / max(1, part))

    # ------------------------------------------------------------------ the queue

    async def take(self, *, question: bool) -> Slot:
        queue = self.questions if question else self.others
        mine: asyncio.Future[Slot] = asyncio.get_running_loop().create_future()
        queue[mine] = None
        self._serve()
        try:
            return await mine
        except asyncio.CancelledError:
            if mine in queue:
                del queue[mine]
                self._serve()
            elif not mine.cancelled():  # granted and cancelled in the same turn of the loop
                mine.result().unused()
            raise

    def slot_ended(self, lease: _Lease, *, used: bool) -> None:
        lease.taken -= 1
        if used and self.kind is Kind.REQUESTS:
            lease.cool_at = clock() + COOLING_SECONDS
        else:
            lease.free += 1
        lease.changed.set()
        self._serve()

    def _serve(self) -> None:
        """Hands out what there is, and leases more for those who still wait."""
        now = clock()
        while self._waiting and (lease := self._fresh_lease(now)) is not None:
            turn_of_others = not self.questions or (self.others and self._questions_in_a_row >= QUESTIONS_IN_A_ROW)
            waiter, _ = (self.others if turn_of_others else self.questions).popitem(last=False)
            if waiter.done():  # cancelled, its task has not run since
                continue
            self._questions_in_a_row = self._questions_in_a_row + 1 if self.others and not turn_of_others else 0
            self._waits_since = None
            lease.free -= 1
            lease.taken += 1
            lease.changed.set()
            waiter.set_result(Slot(self, lease))
        if not self._waiting:
            self._waits_since = self._denied_since = None
        elif self._waits_since is None:
            self._waits_since = now
        if self._waiting and not self._asking and self._missing() > 0:
            self._asking = True
            self._start(self._ask())

    def _fresh_lease(self, now: float) -> _Lease | None:
        if self._closed:
            return None
        return next((lease for lease in self._leases if lease.free and lease.is_fresh(now)), None)

    # ------------------------------------------------------------------ standing still

    @property
    def standstill(self) -> str | None:
        """What callers here wait for, when others hold it and nothing has moved for 5 s."""
        if self._waits_since is None or clock() - self._waits_since < STANDS_STILL_AFTER_SECONDS:
            return None
        if self._away is not None:
            return (
                f"Waiting for the Prefect server at {self._source.where}, which gives no usable answer ({self._away}): "
                f"others may hold the slots of account {self._account!r}, so none is used without its word. Start it, "
                "or unset PREFECT_API_URL where this machine is the only one."
            )
        denied_seconds = 0.0 if self._denied_since is None else clock() - self._denied_since
        if self._denied_since is None or (self._held and denied_seconds < LEASE_SECONDS):
            return None  # what it holds itself comes back as well
        what = "requests a minute" if self.kind is Kind.REQUESTS else "slots in flight"
        held = f"Waiting for {self.limit - self._held} of {self.limit} {what} of account {self._account!r}"
        if denied_seconds < LOST_AFTER_SECONDS or not self._source.loses_slots:
            return f"{held} that {self._denied_by} hold; what a dead one held comes back within {LEASE_SECONDS:.0f} s."
        return (
            f"{held}, for longer than the leases of dead processes last. If no other process holds them, they were "
            "lost when the Prefect server restarted with its leases in memory: `prefect-eachlabs limits reset` frees "
            "them, once the account's processes have ended."
        )

    def _say_whether_it_stands_still(self) -> None:
        now = clock()
        if now - self._said_at >= SAY_AGAIN_SECONDS and (standstill := self.standstill) is not None:
            self._said_at = now
            logger.warning("%s", standstill)

    def _say_once(self, message: str, error: Exception | None = None) -> None:
        if message not in self._said:
            self._said.add(message)
            logger.warning("%s", message, exc_info=error)

    # ------------------------------------------------------------------ leasing

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _missing(self) -> int:
        """Slots to ask for now."""
        now = clock()
        if self._closed or any(lease.in_use(now) and not lease.is_covered(now) for lease in self._leases):
            return 0
        ready = sum(lease.free for lease in self._leases if lease.is_fresh(now))
        at_once = max(1, self.limit // self._source.parts)
        return min(self._waiting - ready, at_once, self._ask_at_most, self.limit - self._held)

    async def _ask(self) -> None:
        """Leases slots until nobody waits for more, or all are here."""
        try:
            while self._missing() > 0:
                if (pause_seconds := self._ask_at - clock()) > 0:
                    await asyncio.sleep(max(pause_seconds, SHORTEST_SLEEP_SECONDS))
                elif (lease := await self._lease(self._missing())) is not None:
                    self._leases.append(lease)
                    self._start(self._keep(lease))
                    if self._noticing is None or self._noticing.done():
                        self._noticing = asyncio.ensure_future(self._notice_sleep())
                    self._serve()
        finally:
            self._asking = False

    async def _lease(self, slots: int, *, covering: bool = False) -> _Lease | None:
        """A lease of so many, or None: then `_ask_at` says when to try again."""
        try:
            if self._away is not None and not covering:
                await self._source.taken(self.kind)  # before others have leased again what they use, it may be free
                self._answered()
                if self._ask_at > clock():
                    return None
            sent_at = clock()
            granted = await self._source.lease(self.kind, slots, self.account_limit)
            self._use_number(granted.limit)
            # A limit there may let more through than the account may: all count, the slots just granted included.
            if granted.limit > self.account_limit and await self._source.taken(self.kind) > self.account_limit:
                await self._source.release(granted.lease_id)
                raise Denied("other processes")
        except Denied as denied:
            self._answered()
            self._denied(slots, str(denied))
        except Exception as error:
            self._failed(error)
        else:
            self._answered()
            self._denied_since, self._ask_at_most = None, self.limit
            if self.kind is Kind.REQUESTS and 2 * self._held >= self.limit:
                self._ask_at = max(self._ask_at, sent_at + self._source.spread * WINDOW_SECONDS * slots / self.limit)
            return _Lease(slots, granted.lease_id, sent_at + LEASE_SECONDS)
        return None

    def _answered(self) -> None:
        """An answer came; after a long absence others have some seconds to lease again what they have in use."""
        now = clock()
        if self._away is not None and now - self._answered_at > RENEWED_SECONDS:
            self._ask_at = now + COVERED_WITHIN_SECONDS
        self._away, self._answered_at = None, now

    def _denied(self, slots: int, by: str) -> None:
        """Fewer are free: ask for half of it, or, if it was one, a little later."""
        self._denied_at = clock()
        self._denied_by = by
        if slots > 1:
            self._ask_at_most = slots // 2
            return
        self._ask_at = self._denied_at + ASK_AGAIN_SECONDS * random.uniform(0.6, 1.4)
        if self._denied_since is None:
            self._denied_since = self._denied_at
        self._say_whether_it_stands_still()

    def _use_number(self, server_limit: int) -> None:
        if server_limit != self.account_limit:
            self._say_once(
                f"The {self.kind.value} limit on the Prefect server is {server_limit}, this account's setting is "
                f"{self.account_limit}: the smaller one counts. `prefect-eachlabs limits apply` writes the setting to "
                "the server."
            )
        self.limit = min(self.account_limit, server_limit)

    def _failed(self, error: Exception) -> None:
        """No answer: what was asked for may have happened. A lease nobody renews ends by itself."""
        if not isinstance(error, ServerAway):  # whatever it is, callers must not wait for ever
            self._say_once(f"Sharing the limits failed, which should not happen: {error!r}", error)
        self._away = str(error)
        self._ask_at = clock() + AWAY_SECONDS * random.uniform(0.8, 1.2)
        self._say_whether_it_stands_still()

    # ------------------------------------------------------------------ a lease's life

    async def _keep(self, lease: _Lease) -> None:
        """Renews a lease while its slots are in use, and gives it back."""
        loop = asyncio.get_running_loop()
        while (at := self._next_step_at(lease)) is not None:
            lease.changed.clear()
            if at <= clock():
                # Renewed even if it may have ended: while it counts, leasing anew is denied, and others come first.
                await (self._cover(lease) if lease.is_gone else self._renew(lease))
                continue
            timer = loop.call_later(max(at - clock(), SHORTEST_SLEEP_SECONDS), lease.changed.set)
            await lease.changed.wait()
            timer.cancel()
        lease.fresh_until = -math.inf
        if lease.in_use(clock()):  # closed: it counts until its lease ends
            return
        if lease.is_covered(clock()):
            try:
                await self._source.release(lease.lease_id)
            except Exception as error:
                logger.debug("A lease is left to end by itself: %r", error)
        self._leases.remove(lease)
        if self._waiting and not self._closed:
            self._ask_at = max(self._ask_at, clock() + self._source.turn_seconds * random.uniform(0.0, 1.0))
        self._serve()

    def _next_step_at(self, lease: _Lease) -> float | None:
        """When to look at it again; now, to renew it or to lease it again; None: it goes back."""
        now = clock()
        if not lease.in_use(now):
            if lease.free and lease.is_fresh(now) and not self._closed:
                return min(lease.fresh_until, lease.until - RENEWED_SECONDS)
            return None
        if self._closed:
            return now if lease.is_covered(now) and not lease.taken and lease.until < lease.cool_at else None
        if not lease.is_covered(now):
            return now
        if lease.taken:
            return lease.until - RENEWED_SECONDS
        return lease.cool_at if lease.cool_at + END_MARGIN_SECONDS < lease.until else now

    async def _notice_sleep(self) -> None:
        loop = asyncio.get_running_loop()
        asleep_seconds = clock() - loop.time()
        while self._leases:
            await asyncio.sleep(LOOK_SECONDS)
            if clock() - loop.time() > asleep_seconds + 0.1:
                asleep_seconds = clock() - loop.time()
                for lease in self._leases:
                    lease.changed.set()

    async def _renew(self, lease: _Lease) -> None:
        sent_at = clock()
        try:
            await self._source.renew(lease.lease_id)
        except LeaseGone as gone:
            self._answered()
            lease.until = -math.inf
            self._say_once(f"{self.kind.value}: {gone}")
        except Exception as error:
            self._failed(error)
            await asyncio.sleep(AWAY_SECONDS)
        else:
            self._answered()
            lease.until = sent_at + LEASE_SECONDS

    async def _cover(self, lease: _Lease) -> None:
        """Leases again for slots that are in use without a lease."""
        covering = await self._lease(lease.in_use(clock()), covering=True)
        if covering is None:
            await asyncio.sleep(COVER_AGAIN_SECONDS if self._away is None else AWAY_SECONDS)
            return
        lease.slots, lease.free = covering.slots, 0
        lease.lease_id, lease.until = covering.lease_id, covering.until
        self._serve()

    async def close(self) -> None:
        self._closed = True
        if self._noticing is not None:
            self._noticing.cancel()
        for lease in self._leases:
            lease.changed.set()
        loop = asyncio.get_running_loop()
        until = loop.time() + CLOSE_WITHIN_SECONDS
        while self._tasks and (seconds := until - loop.time()) > 0:  # what is granted meanwhile, a new task gives back
            await asyncio.wait(self._tasks, timeout=seconds)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


class RateLimiter:
    """Those who wait for an account's slots: first come, first served; questions before creates.

    A question (a poll, a sweep) frees slots in flight, so it goes before the creates; but after three in a row a
    create that waits has its turn, so neither starves. Nothing is leased until a slot is wanted. Costs no requests.

    Args:
        settings: The account and its two limits; missing ones are created on the server, and of two different
            numbers the smaller one counts. A limit of None needs no leases.
        leases: Who counts the slots.
    """

    def __init__(self, settings: AccountSettings, leases: Leases) -> None:
        self.breaker = CircuitBreaker()
        self._leases = leases
        self._limits = {
            kind: _Limit(kind, number, leases, settings.account)
            for kind, number in numbers_of(settings).items()
            if number is not None
        }

    def __repr__(self) -> str:
        return f"<RateLimiter {list(self._limits.values())}>"

    @property
    def requests_waiting(self) -> int:
        """Creates that wait for a request slot."""
        limit = self._limits.get(Kind.REQUESTS)
        return 0 if limit is None else len(limit.others)

    @property
    def in_flight_waiting(self) -> int:
        """Callers that wait for a slot in flight."""
        limit = self._limits.get(Kind.IN_FLIGHT)
        return 0 if limit is None else len(limit.others)

    @property
    def standstill(self) -> str | None:
        """What everybody here waits for, when others hold it and nothing has moved for 5 s; it is in the log, too."""
        return next((said for limit in self._limits.values() if (said := limit.standstill) is not None), None)

    def pressure(self, kind: Kind) -> float:
        """From 0.0 (free, or no limit) to 1.0 (all that this process can have is in use)."""
        limit = self._limits.get(kind)
        return 0.0 if limit is None else limit.pressure

    def limit(self, kind: Kind) -> int | None:
        """The account's limit: its own number or the server's, whichever is smaller; None: there is none."""
        limit = self._limits.get(kind)
        return None if limit is None else limit.limit

    async def take_in_flight(self) -> Slot:
        """Waits for a slot in flight: `done` when the prediction's end was seen, `unused` when it was not made."""
        return await self._take(Kind.IN_FLIGHT)

    async def take_request(self, *, question: bool = False) -> Slot:
        """Waits for a request slot: `done` when the answer came or was lost, `unused` when nothing was sent.

        Args:
            question: It is about a prediction that exists; goes before creates.
        """
        return await self._take(Kind.REQUESTS, question=question)

    async def asked(self, question: Callable[[], Awaitable[T]]) -> T:
        """The answer to a question (a GET), in a request slot of its own."""
        request = await self.take_request(question=True)
        try:
            return await question()
        finally:
            request.done()

    async def _take(self, kind: Kind, *, question: bool = False) -> Slot:
        limit = self._limits.get(kind)
        return Slot() if limit is None else await limit.take(question=question)

    async def close(self) -> None:
        """Gives back what is not in use, within 3 s; the rest comes back when its leases end, 75 s later at most."""
        await asyncio.gather(*(limit.close() for limit in self._limits.values()))
        await self._leases.close()
