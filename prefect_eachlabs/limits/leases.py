"""What a `RateLimiter` needs of whoever counts an account's slots for all its processes: the few calls of `Leases`.

Two count: a Prefect server, for processes anywhere (`prefect_leases`), and without one a file of this machine
(`file_leases`).
"""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from prefect_eachlabs.settings import AccountSettings

LEASE_SECONDS = 75.0
"""The window of a request and a little; Prefect takes no lease below 60 s."""
CALL_SECONDS = 8.0
"""No call to a server takes longer."""
READ_WITHIN_SECONDS = 0.002
READS = 10
# Linux has a clock of its own that goes on while it sleeps; on macOS CLOCK_MONOTONIC does, and Python's does not.
_CLOCK = getattr(time, "CLOCK_BOOTTIME", getattr(time, "CLOCK_MONOTONIC", None))


class Kind(str, Enum):
    """The two limits of an account."""

    REQUESTS = "requests"
    IN_FLIGHT = "in-flight"


def numbers_of(settings: AccountSettings) -> dict[Kind, int | None]:
    """The account's two limits; None: there is none."""
    return {Kind.REQUESTS: settings.requests_per_minute, Kind.IN_FLIGHT: settings.max_in_flight}


def suspended_seconds() -> float:
    """How long this machine has been suspended since its start: a laptop with its lid closed, say.

    The loop's clock stands still meanwhile and the bucket's does not: what must not be older than a claim, or a
    lease, is measured with this added. 0 where the loop's clock goes on.
    """
    if _CLOCK is None:
        return 0.0
    asleep_seconds = math.inf
    for _ in range(READS):
        before = time.monotonic()
        asleep_seconds = min(asleep_seconds, time.clock_gettime(_CLOCK) - before)
        # A thread that a busy machine stopped in between has read too much, and a slot would come back too early.
        if time.monotonic() - before < READ_WITHIN_SECONDS:
            break
    return round(asleep_seconds, 2)


def clock() -> float:
    """The loop's time, and what it does not know of because the machine was asleep: leases ended meanwhile."""
    return asyncio.get_running_loop().time() + suspended_seconds()


class Denied(Exception):
    """Not that many slots are free now: ask again. Its text says who may hold them."""


class LeaseGone(Exception):
    """No such lease is known: it ended, or was forgotten. Its text says how it may have been forgotten."""


class ServerAway(Exception):
    """No usable answer; whether the call had an effect is not known."""


@dataclass(frozen=True)
class Granted:
    """A lease, and the limit's number as whoever counts has it."""

    lease_id: str
    limit: int


class Leases(Protocol):
    """Who counts the slots of all processes; every method but `close` may raise `ServerAway`, within 8 s."""

    @property
    def where(self) -> str:
        """Where it is, for messages."""

    parts: int
    """Into how many leases a limit is divided: the more, the closer to it, and the more calls."""
    turn_seconds: float
    """So long at most others have their turn, after a lease is given back."""
    spread: float
    """Who holds half of a minute's requests leases more no faster than 1/`spread` of the even pace; 0: at once. A burst
    would otherwise come again every minute, and a process that joins right after one find nothing for that long."""
    loses_slots: bool
    """Whether slots may be counted as taken that no lease holds: only a person can free those."""

    async def lease(self, kind: Kind, slots: int, limit: int) -> Granted:
        """Takes slots for 75 s, of a limit that is made with this number where it is absent. Raises `Denied`."""

    async def renew(self, lease_id: str) -> None:
        """Prolongs a lease to 75 s from now. Raises `LeaseGone`."""

    async def release(self, lease_id: str) -> None:
        """Gives a lease back; one that is gone is not an error."""

    async def taken(self, kind: Kind) -> int:
        """How many slots all processes have."""

    async def close(self) -> None:
        """Closes the connection; gives no lease back."""
