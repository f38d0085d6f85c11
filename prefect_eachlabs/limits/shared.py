"""The slots of an account, leased in lots from whoever counts them for all its processes: a `SlotSource`.

Two count: a Prefect server, for processes anywhere (`prefect_leases`), and without one a file of this machine
(`file_leases`).

A *lot* is a few slots under one lease. It is leased for 75 s when callers wait, used for 10 s, and given back when its
last slot is free again: a request's 60 s after its answer, one in flight at the end of its prediction. Then it is
leased anew, by whoever asks first, so that processes share the account within seconds.

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
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from prefect_eachlabs.limits.window import WINDOW_SECONDS, Kind, LocalSlots, Slot, asleep_seconds
from prefect_eachlabs.settings import AccountSettings

logger = logging.getLogger(__name__)

LEASE_SECONDS = 75.0
"""The window of a request and a little; Prefect takes no lease below 60 s."""
USED_SECONDS = 10.0
"""A lot's slots are taken within so long of its lease; then it empties and goes back."""
COOLING_SECONDS = WINDOW_SECONDS + 0.1
"""From the answer of a request until its slot may be used again; the tenth is for clocks that differ."""
RENEWED_SECONDS = COOLING_SECONDS + 2.0
"""More than a window is left of every lease that is used."""
CALL_SECONDS = 8.0
"""No call to a server takes longer."""
END_MARGIN_SECONDS = CALL_SECONDS + 2.0
"""With less left, a lease is neither renewed nor given back: the call could arrive when others have its slots."""
ASK_AGAIN_SECONDS = 0.5
"""After a denial, and after giving a lot back, so that others have their turn: on average so long."""
AWAY_SECONDS = 1.5
"""A server that did not answer is asked again so much later."""
COVERED_WITHIN_SECONDS = CALL_SECONDS + 2 * AWAY_SECONDS
"""After a long absence of the server everybody with slots in use has noticed within so long that it is back."""
LOST_AFTER_SECONDS = LEASE_SECONDS + 20.0
"""No lease of a process that died lives so long: a Prefect server looks for ended ones every 15 s."""
CLOSE_WITHIN_SECONDS = 3.0
SHORTEST_SLEEP_SECONDS = 0.001


class Denied(Exception):
    """Not that many slots are free now: ask again. Its text says who may hold them."""


class LeaseGone(Exception):
    """No such lease is known: it ended, or was forgotten. Its text says how it may have been forgotten."""


class LimitMissing(Exception):
    """The limit is not there: create it, then ask again."""


class ServerAway(Exception):
    """No usable answer; whether the call had an effect is not known."""


@dataclass(frozen=True)
class Granted:
    """A lease, and the limit's number as whoever counts has it."""

    lease_id: str
    limit: int


@dataclass(frozen=True)
class Count:
    """A limit as whoever counts has it."""

    limit: int
    active_slots: int


class Leases(Protocol):
    """Who counts the slots of all processes; every method but `close` may raise `ServerAway`, within 8 s."""

    @property
    def where(self) -> str:
        """Where it is, for messages."""

    lots: int
    """Into how many lots a limit is divided: the more, the closer to it, and the more calls."""
    spread: float
    """Who holds half of a minute's requests leases more no faster than 1/`spread` of the even pace; 0: at once. A burst
    would otherwise come again every minute, and a process that joins right after one find nothing for that long."""
    loses_slots: bool
    """Whether slots may be counted as taken that no lease holds: only a person can free those."""

    async def ensure(self, kind: Kind, limit: int) -> int:
        """Creates the limit if it is absent; returns the number that counts."""

    async def lease(self, kind: Kind, slots: int) -> Granted:
        """Takes slots for 75 s. Raises `Denied`, or `LimitMissing` when the limit was deleted."""

    async def renew(self, lease_id: str) -> None:
        """Prolongs a lease to 75 s from now. Raises `LeaseGone`."""

    async def release(self, lease_id: str) -> None:
        """Gives a lease back; one that is gone is not an error."""

    async def count(self, kind: Kind) -> Count | None:
        """How many slots are taken; None: the limit is absent."""

    async def close(self) -> None:
        """Closes the connection; gives no lease back."""


def clock() -> float:
    """The loop's time, and what it does not know of because the machine was asleep: leases ended meanwhile."""
    return asyncio.get_running_loop().time() + asleep_seconds()


class _Lot:
    """A few slots under one lease."""

    def __init__(self, slots: int, lease_id: str, until: float) -> None:
        self.slots = self.free = slots
        self.taken = 0
        self.lease_id: str | None = lease_id
        """None: it has ended or was forgotten, and the slots that are in use must be leased again."""
        self.until = until
        """The lease lasts at least so long, since it was granted after its call was sent."""
        self.fresh_until = until - LEASE_SECONDS + USED_SECONDS
        self.cool_at = -math.inf
        """When the last answered request is a window ago."""
        self.changed = asyncio.Event()

    def __repr__(self) -> str:
        return f"<_Lot of {self.slots}: {self.free} free, {self.taken} taken, lease {self.lease_id}>"

    def is_fresh(self, now: float) -> bool:
        """Slots may be taken from it."""
        return self.lease_id is not None and now < min(self.fresh_until, self.until - RENEWED_SECONDS)

    def is_covered(self, now: float) -> bool:
        """Its lease is known to last, long enough for a call about it to arrive."""
        return self.lease_id is not None and now < self.until - END_MARGIN_SECONDS

    def in_use(self, now: float) -> int:
        """Slots that count: taken, or cooling."""
        return self.slots - self.free if now < self.cool_at else self.taken


class _LotSlot:
    """A slot out of a lot."""

    def __init__(self, limit: _SharedLimit, lot: _Lot) -> None:
        self._limit = limit
        self._lot: _Lot | None = lot

    def done(self) -> None:
        if (lot := self._lot) is not None:
            self._lot = None
            self._limit.slot_done(lot)

    def unused(self) -> None:
        if (lot := self._lot) is not None:
            self._lot = None
            self._limit.slot_unused(lot)


class _SharedLimit:
    """One of the account's limits, as far as this process holds it.

    Args:
        kind: Which.
        number: The account's own number; the server's counts where that is smaller.
        leases: The server.
        account: For messages.
        tell: Called when a slot may have come free.
    """

    def __init__(self, kind: Kind, number: int, leases: Leases, account: str, tell: Callable[[], None]) -> None:
        self.kind = kind
        self.limit = self.account_limit = number
        self.waiting = 0
        self.lots: list[_Lot] = []
        self.away: str | None = None
        """What came in place of the last answer, when it was not usable."""
        self._answered_at = -math.inf
        self._leases = leases
        self._account = account
        self._tell = tell
        self._tasks: set[asyncio.Task[None]] = set()
        self._asking = self._is_there = self._closed = False
        self._ask_at = self._denied_at = -math.inf
        self._denied_since: float | None = None
        """Since when not even one slot was granted."""
        self._denied_by = ""
        self._ask_at_most = number
        self._said: set[str] = set()

    def __repr__(self) -> str:
        in_use = sum(lot.in_use(clock()) for lot in self.lots)
        return f"<{self.kind.value}: {in_use} in use, {self.held} held of {self.limit}>"

    @property
    def held(self) -> int:
        """Slots that are leased here, used or not."""
        return sum(lot.slots for lot in self.lots)

    @property
    def pressure(self) -> float:
        """How much is in use of what there is: all of it, or while others hold the rest, what is held here."""
        now = clock()
        part = self.held if now - self._denied_at < USED_SECONDS else self.limit
        return min(1.0, sum(lot.in_use(now) for lot in self.lots) / max(1, part))

    def try_take(self) -> Slot | None:
        now = clock()
        lot = next((lot for lot in self.lots if lot.free and lot.is_fresh(now)), None)
        if lot is None or self._closed:
            return None
        lot.free -= 1
        lot.taken += 1
        lot.changed.set()
        return _LotSlot(self, lot)

    def slot_done(self, lot: _Lot) -> None:
        lot.taken -= 1
        if self.kind is Kind.REQUESTS:
            lot.cool_at = clock() + COOLING_SECONDS
        else:
            lot.free += 1
        lot.changed.set()

    def slot_unused(self, lot: _Lot) -> None:
        lot.taken -= 1
        lot.free += 1
        lot.changed.set()

    def wanted(self, count: int) -> None:
        self.waiting = count
        if count == 0:
            self._denied_since = None
        self._ask_if_needed()

    def held_by_others(self) -> str | None:
        """What callers wait for, when there is nothing for them."""
        if self.away is not None:
            return (
                f"the Prefect server at {self._leases.where}, which gives no usable answer ({self.away}): others may "
                f"hold the slots of account {self._account!r}, so none is used without its word. Start it, or unset "
                "PREFECT_API_URL where this machine is the only one"
            )
        denied_seconds = 0.0 if self._denied_since is None else clock() - self._denied_since
        if self._denied_since is None or (self.held and denied_seconds < LEASE_SECONDS):
            return None  # what it holds itself comes back as well
        what = "requests a minute" if self.kind is Kind.REQUESTS else "slots in flight"
        held = f"{self.limit - self.held} of {self.limit} {what} of account {self._account!r}"
        if denied_seconds < LOST_AFTER_SECONDS or not self._leases.loses_slots:
            return f"{held} that {self._denied_by} hold; what a dead one held comes back within {LEASE_SECONDS:.0f} s"
        return (
            f"{held}, for longer than the leases of dead processes last. If no other process holds them, they were "
            "lost when the Prefect server restarted with its leases in memory: `prefect-eachlabs limits reset` frees "
            "them, once the account's processes have ended"
        )

    async def close(self) -> None:
        """Gives back what is not in use; what is, comes back when its lease ends."""
        self._closed = True
        for lot in self.lots:
            lot.changed.set()
        loop = asyncio.get_running_loop()
        until = loop.time() + CLOSE_WITHIN_SECONDS
        while self._tasks and (seconds := until - loop.time()) > 0:
            await asyncio.wait(self._tasks, timeout=seconds)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # ------------------------------------------------------------------ leasing

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _missing(self) -> int:
        """Slots to ask for now."""
        now = clock()
        if self._closed or any(lot.in_use(now) and not lot.is_covered(now) for lot in self.lots):
            return 0
        ready = sum(lot.free for lot in self.lots if lot.is_fresh(now))
        lot_size = max(1, self.limit // self._leases.lots)
        return min(self.waiting - ready, lot_size, self._ask_at_most, self.limit - self.held)

    def _ask_if_needed(self) -> None:
        if not self._asking and self._missing() > 0:
            self._asking = True
            self._start(self._ask())

    async def _ask(self) -> None:
        """Leases lots until nobody waits for more, or all slots are here."""
        try:
            while self._missing() > 0:
                if (pause_seconds := self._ask_at - clock()) > 0:
                    await asyncio.sleep(max(pause_seconds, SHORTEST_SLEEP_SECONDS))
                elif (granted := await self._lease(self._missing())) is not None:
                    self.lots.append(granted)
                    self._start(self._keep(granted))
                    self._tell()
        finally:
            self._asking = False

    async def _lease(self, slots: int, *, covering: bool = False) -> _Lot | None:
        """A lot of so many, or None: then `_ask_at` says when to try again."""
        try:
            if not self._is_there:
                self._use_number(await self._leases.ensure(self.kind, self.account_limit))
                self._is_there = True
                self._answered()
                if self._ask_at > clock() and not covering:
                    return None
            sent_at = clock()
            granted = await self._leases.lease(self.kind, slots)
            self._use_number(granted.limit)
            if granted.limit > self.account_limit and await self._is_too_many():
                await self._leases.release(granted.lease_id)
                raise Denied("other processes")
        except Denied as denied:
            self._answered()
            self._denied(slots, str(denied))
        except LimitMissing:  # deleted by hand
            self._is_there = False
        except Exception as error:
            self._failed(error)
        else:
            self._answered()
            self._denied_since, self._ask_at_most = None, self.limit
            if self.kind is Kind.REQUESTS and 2 * self.held >= self.limit:
                self._ask_at = max(self._ask_at, sent_at + self._leases.spread * WINDOW_SECONDS * slots / self.limit)
            return _Lot(slots, granted.lease_id, sent_at + LEASE_SECONDS)
        return None

    def _answered(self) -> None:
        """An answer came; after a long absence others have some seconds to lease again what they have in use."""
        now = clock()
        if self.away is not None and now - self._answered_at > RENEWED_SECONDS:
            self._ask_at = now + COVERED_WITHIN_SECONDS
        self.away, self._answered_at = None, now

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
        self._tell()

    async def _is_too_many(self) -> bool:
        """The limit there lets more through than the account may: count all, the slots just granted included."""
        count = await self._leases.count(self.kind)
        return count is not None and count.active_slots > self.account_limit

    def _use_number(self, server_limit: int) -> None:
        if server_limit != self.account_limit:
            self._say(
                f"The {self.kind.value} limit on the Prefect server is {server_limit}, this account's setting is "
                f"{self.account_limit}: the smaller one counts. `prefect-eachlabs limits apply` writes the setting to "
                "the server."
            )
        self.limit = min(self.account_limit, server_limit)

    def _failed(self, error: Exception) -> None:
        """No answer: what was asked for may have happened. A lease nobody renews ends by itself."""
        if not isinstance(error, ServerAway):  # whatever it is, callers must not wait for ever
            self._say(f"Sharing the limits failed, which should not happen: {error!r}", error)
        self.away = str(error)
        self._is_there = False
        self._ask_at = clock() + AWAY_SECONDS * random.uniform(0.8, 1.2)
        self._tell()

    def _say(self, message: str, error: Exception | None = None) -> None:
        """Logs a warning once."""
        if message not in self._said:
            self._said.add(message)
            logger.warning("%s", message, exc_info=error)

    # ------------------------------------------------------------------ a lot's life

    async def _keep(self, lot: _Lot) -> None:
        """Renews a lot while its slots are in use, and gives it back."""
        while (at := self._next_step_at(lot)) is not None:
            lot.changed.clear()
            if at <= clock():
                await (self._renew(lot) if lot.is_covered(clock()) else self._cover(lot))
                continue
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(lot.changed.wait(), max(at - clock(), SHORTEST_SLEEP_SECONDS))
        lot.fresh_until = -math.inf
        if lot.lease_id is not None and lot.is_covered(clock()) and not lot.in_use(clock()):
            try:
                await self._leases.release(lot.lease_id)
            except Exception as error:
                logger.debug("A lease is left to end by itself: %r", error)
        self.lots.remove(lot)
        if self.waiting and not self._closed:
            self._ask_at = max(self._ask_at, clock() + ASK_AGAIN_SECONDS * random.uniform(0.0, 1.0))
        self._ask_if_needed()

    def _next_step_at(self, lot: _Lot) -> float | None:
        """When to look at it again; now, to renew it or to lease it again; None: it goes back."""
        now = clock()
        if not lot.in_use(now):
            if lot.free and lot.is_fresh(now) and not self._closed:
                return min(lot.fresh_until, lot.until - RENEWED_SECONDS)
            return None
        if self._closed:
            return now if lot.is_covered(now) and not lot.taken and lot.until < lot.cool_at else None
        if not lot.is_covered(now):
            return now
        if lot.taken:
            return lot.until - RENEWED_SECONDS
        return lot.cool_at if lot.cool_at + END_MARGIN_SECONDS < lot.until else now

    async def _renew(self, lot: _Lot) -> None:
        assert lot.lease_id is not None
        sent_at = clock()
        try:
            await self._leases.renew(lot.lease_id)
        except LeaseGone as gone:
            self._answered()
            lot.lease_id = None
            self._say(f"{self.kind.value}: {gone}")
        except Exception as error:
            self._failed(error)
            await asyncio.sleep(AWAY_SECONDS)
        else:
            self._answered()
            lot.until = sent_at + LEASE_SECONDS

    async def _cover(self, lot: _Lot) -> None:
        """Leases again for slots that are in use without a lease."""
        covering = await self._lease(lot.in_use(clock()), covering=True)
        if covering is None:
            await asyncio.sleep(AWAY_SECONDS)
            return
        lot.slots, lot.free = covering.slots, 0
        lot.lease_id, lot.until = covering.lease_id, covering.until
        self._ask_if_needed()


class SharedSlots:
    """The slots of an account, leased in lots; a `SlotSource`.

    Nothing is asked of a server until a slot is wanted. Costs no request at the API.

    Args:
        settings: The account and its two limits; missing ones are created on the server, and of two different
            numbers the smaller one counts. A limit of None needs no leases.
        leases: Who counts.
    """

    def __init__(self, settings: AccountSettings, leases: Leases) -> None:
        numbers = {Kind.REQUESTS: settings.requests_per_minute, Kind.IN_FLIGHT: settings.max_in_flight}
        self._leases = leases
        self._unlimited = LocalSlots(requests_per_minute=None, max_in_flight=None)
        self._listeners: list[Callable[[], None]] = []
        self._limits = {
            kind: _SharedLimit(kind, number, self._leases, settings.account, self._tell)
            for kind, number in numbers.items()
            if number is not None
        }

    def __repr__(self) -> str:
        return f"<SharedSlots {list(self._limits.values())}>"

    def _tell(self) -> None:
        for listener in self._listeners:
            listener()

    def try_take(self, kind: Kind) -> Slot | None:
        """A slot, if one is leased and free."""
        limit = self._limits.get(kind)
        return self._unlimited.try_take(kind) if limit is None else limit.try_take()

    def wanted(self, kind: Kind, count: int) -> None:
        """So many callers wait now: slots are leased for them."""
        if (limit := self._limits.get(kind)) is not None:
            limit.wanted(count)

    def next_change_at(self, kind: Kind) -> float | None:
        """Unknown: the listener is told."""
        return None

    def pressure(self, kind: Kind) -> float:
        """From 0.0 to 1.0 (all that this process can have is in use)."""
        limit = self._limits.get(kind)
        return 0.0 if limit is None else limit.pressure

    def limit(self, kind: Kind) -> int | None:
        """The account's limit: its own number or the server's, whichever is smaller."""
        limit = self._limits.get(kind)
        return None if limit is None else limit.limit

    def held_by_others(self, kind: Kind) -> str | None:
        """Which slots others hold, or that the server is away, or that slots are lost and how to free them."""
        limit = self._limits.get(kind)
        return None if limit is None else limit.held_by_others()

    def on_change(self, listener: Callable[[], None]) -> None:
        """The listener is called, on the loop, when `try_take` may succeed now."""
        self._listeners.append(listener)

    async def close(self) -> None:
        """Gives back what is not in use, within 3 s; the rest comes back when its leases end, 75 s later at most."""
        await asyncio.gather(*(limit.close() for limit in self._limits.values()))
        await self._leases.close()
