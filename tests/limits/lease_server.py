"""A Prefect server as a `RateLimiter` sees it: counts in its "database", leases in its "memory", both apart."""

from __future__ import annotations

import asyncio
import math
import uuid
from dataclasses import dataclass, field

from prefect_eachlabs.limits.leases import LEASE_SECONDS, Denied, Granted, Kind, LeaseGone, ServerAway

REAPED_EVERY_SECONDS = 15.0


@dataclass
class _Lease:
    kind: Kind
    slots: int
    ends_at: float


@dataclass
class LeaseServer:
    """What the processes share. Every call takes `latency_seconds`, half of it before it takes effect."""

    latency_seconds: float = 0.015
    down: bool = False
    limits: dict[Kind, int] = field(default_factory=dict)
    active: dict[Kind, int] = field(default_factory=dict)
    leases: dict[str, _Lease] = field(default_factory=dict)
    calls: list[tuple[float, str]] = field(default_factory=list)
    under_way: int = 0
    most_under_way: int = 0
    _reaped_at: float = 0.0

    def restart(self) -> None:
        """With leases in memory: they are forgotten, their counts are not."""
        self.leases.clear()

    def leased(self, kind: Kind) -> int:
        return sum(lease.slots for lease in self.leases.values() if lease.kind is kind)

    def reap(self) -> None:
        now = asyncio.get_running_loop().time()
        due = math.floor(now / REAPED_EVERY_SECONDS) * REAPED_EVERY_SECONDS
        if due > self._reaped_at:
            self._reaped_at = due
            for lease_id, lease in list(self.leases.items()):
                if lease.ends_at <= due:
                    self.give_back(lease_id)

    def give_back(self, lease_id: str) -> None:
        lease = self.leases.pop(lease_id, None)
        if lease is not None and lease.slots:
            self.active[lease.kind] = max(0, self.active[lease.kind] - lease.slots)

    def client(self) -> LeaseClient:
        return LeaseClient(self)


class LeaseClient:
    """`Leases` of one process."""

    where = "http://127.0.0.1:4200/api"
    parts = 20
    turn_seconds = 0.5
    spread = 0.6
    loses_slots = True

    def __init__(self, server: LeaseServer) -> None:
        self.server = server
        self.closed = False
        self.cut = False
        """Only this process's way to the server is broken."""

    async def _call(self, name: str) -> None:
        server = self.server
        server.calls.append((asyncio.get_running_loop().time(), name))
        server.under_way += 1
        server.most_under_way = max(server.most_under_way, server.under_way)
        try:
            await asyncio.sleep(1.5 if server.down or self.cut else server.latency_seconds / 2)
        finally:
            server.under_way -= 1
        if server.down or self.cut:
            raise ServerAway("ConnectError: All connection attempts failed")
        server.reap()

    async def _answer(self) -> None:
        await asyncio.sleep(self.server.latency_seconds / 2)

    def _grant(self, kind: Kind, slots: int) -> str:
        lease_id = str(uuid.uuid4())
        ends_at = asyncio.get_running_loop().time() + LEASE_SECONDS
        self.server.leases[lease_id] = _Lease(kind, slots, ends_at)
        return lease_id

    async def lease(self, kind: Kind, slots: int, limit: int) -> Granted:
        await self._call("lease")
        server = self.server
        server.active.setdefault(kind, 0)
        server.limits.setdefault(kind, limit)
        if server.active[kind] + slots > server.limits[kind]:
            raise Denied("other processes")
        server.active[kind] += slots
        lease_id = self._grant(kind, slots)
        await self._answer()
        return Granted(lease_id, server.limits[kind])

    async def renew(self, lease_id: str) -> None:
        await self._call("renew")
        lease = self.server.leases.get(lease_id)
        if lease is None:
            raise LeaseGone("forgotten: `prefect-eachlabs limits reset` frees them")
        lease.ends_at = asyncio.get_running_loop().time() + LEASE_SECONDS
        await self._answer()

    async def release(self, lease_id: str) -> None:
        await self._call("release")
        self.server.give_back(lease_id)
        await self._answer()

    async def taken(self, kind: Kind) -> int:
        await self._call("taken")
        await self._answer()
        return self.server.active.get(kind, 0)

    async def close(self) -> None:
        self.closed = True
