"""Leases on the global concurrency limits of a Prefect server: the few HTTP calls that sharing an account needs.

Three limits an account. `eachlabs-requests-ACCOUNT` and `eachlabs-in-flight-ACCOUNT` hold the numbers, and the
server's database counts what is taken. `tag:eachlabs-workers-ACCOUNT` limits nothing: every lease is taken on it as
well, since the one public route that lists live leases does so for tag limits alone, by the id of their holder.
That id is a `Holding` in disguise: which process, which limit, how many slots.

What Prefect 3.8.8 does, measured: a lease of a limit nobody created is granted, and limits nothing; a denial is 423;
a lease the server forgot is 410 to renew and 204 to release; on SQLite a lease or a release takes 13 ms, a renewal
5 ms, a listing 8 ms. Its client repeats a failed call for a minute by itself, so that is switched off here.
"""

from __future__ import annotations

import asyncio
import contextvars
import random
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar
from uuid import UUID

import httpx
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.client.schemas.objects import ConcurrencyLeaseHolder
from prefect.context import SettingsContext, get_settings_context
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES

from prefect_eachlabs.errors import without_query
from prefect_eachlabs.limits.limiter import Kind

T = TypeVar("T")

LEASE_SECONDS = 75.0
"""The window of a request and a little; Prefect takes no lease below 60 s."""
WITNESS_LIMIT = 1_000_000_000
"""Never reached: the limit on workers lists leases, it bounds nothing. Fits PostgreSQL's integer."""
BUSY_TRIES = 4
"""A SQLite server that is locked says 503; nothing was written then, so the call is repeated after half a second."""
TIMEOUT = httpx.Timeout(8.0, connect=5.0)

_MAGIC = 0xEA
_KINDS = (Kind.REQUESTS, Kind.IN_FLIGHT)
_BUSY = (429, 503)


class Denied(Exception):
    """Not that many slots are free now: ask again."""


class LeaseGone(Exception):
    """The server knows no such lease: it ended, or the server forgot it in a restart."""


class LimitMissing(Exception):
    """The limit is not on the server: create it, then ask again."""


class ServerAway(Exception):
    """No usable answer; whether the call had an effect is not known."""


def limit_name(kind: Kind, account: str) -> str:
    """The name of an account's global limit."""
    return f"eachlabs-{kind.value}-{account}"


def workers_tag(account: str) -> str:
    """The tag whose limit lists the account's leases."""
    return f"eachlabs-workers-{account}"


@dataclass(frozen=True)
class Holding:
    """What one live lease stands for, written into the 128 bits of its holder's id.

    Attributes:
        process: 48 random bits, drawn by each process.
        kind: Which limit.
        slots: Slots held; 0: none, this process waits for some.
        serial: Keeps equal holdings apart.
    """

    process: int
    kind: Kind
    slots: int
    serial: int = field(default_factory=lambda: random.getrandbits(32))

    def to_uuid(self) -> UUID:
        """48 bits process, 8 magic, 8 kind, 32 slots, 32 serial."""
        head = ((self.process << 8 | _MAGIC) << 8) | _KINDS.index(self.kind)
        return UUID(int=(head << 32 | self.slots) << 32 | self.serial)

    @staticmethod
    def from_uuid(holder: UUID) -> Holding | None:
        """None when the lease is not ours: a task that carries the tag, say."""
        head = holder.int >> 64
        kind, magic, process = head & 0xFF, head >> 8 & 0xFF, head >> 16
        if magic != _MAGIC or kind >= len(_KINDS):
            return None
        return Holding(process, _KINDS[kind], holder.int >> 32 & 0xFFFFFFFF, holder.int & 0xFFFFFFFF)


@dataclass(frozen=True)
class Granted:
    """A lease, and the limit's number as the server has it."""

    lease_id: UUID
    limit: int


@dataclass(frozen=True)
class Count:
    """A limit as the server's database has it."""

    limit: int
    active_slots: int


class Leases(Protocol):
    """The server, as `SharedLots` needs it; every method may raise `ServerAway`."""

    where: str

    async def ensure(self, kind: Kind, limit: int) -> int:
        """Creates the limit if it is absent; returns the server's number."""

    async def lease(self, kind: Kind, slots: int, process: int) -> Granted:
        """Takes slots for 75 s. Raises `Denied`, or `LimitMissing` when the limit was deleted."""

    async def announce(self, kind: Kind, process: int) -> UUID:
        """Says for 75 s that this process waits for slots; returns the lease."""

    async def renew(self, lease_id: UUID) -> None:
        """Prolongs a lease to 75 s from now. Raises `LeaseGone`."""

    async def release(self, lease_id: UUID) -> None:
        """Gives a lease back; one that is gone is no error."""

    async def holdings(self) -> list[Holding]:
        """All live leases of the account."""

    async def count(self, kind: Kind) -> Count | None:
        """What the server's database says of the limit; None: it is absent."""

    async def close(self) -> None:
        """Closes the connection; gives no lease back."""


class PrefectLeases:
    """`Leases` over one open Prefect client, in the loop that uses it first.

    Args:
        account: Names the limits.
    """

    def __init__(self, account: str) -> None:
        self.account = account
        self._context = _context_without_retries()
        self._client: PrefectClient | None = None
        self._opening: asyncio.Lock | None = None
        self.where = without_query(self._context.run(PREFECT_API_URL.value) or "(no PREFECT_API_URL)")

    def _names(self, kind: Kind) -> list[str]:
        return [limit_name(kind, self.account), f"tag:{workers_tag(self.account)}"]

    async def ensure(self, kind: Kind, limit: int) -> int:
        async def call(client: PrefectClient) -> int:
            try:
                await client.read_concurrency_limit_by_tag(workers_tag(self.account))
            except ObjectNotFound:
                await client.create_concurrency_limit(workers_tag(self.account), WITNESS_LIMIT)
            name = limit_name(kind, self.account)
            try:
                return (await client.read_global_concurrency_limit_by_name(name)).limit
            except ObjectNotFound:
                try:
                    await client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=limit))
                except ObjectAlreadyExists:  # another process was faster
                    return (await client.read_global_concurrency_limit_by_name(name)).limit
                return limit

        return await self._call(call)

    async def lease(self, kind: Kind, slots: int, process: int) -> Granted:
        return await self._lease(self._names(kind), slots, Holding(process, kind, slots))

    async def announce(self, kind: Kind, process: int) -> UUID:
        return (await self._lease(self._names(kind)[1:], 1, Holding(process, kind, 0))).lease_id

    async def _lease(self, names: list[str], slots: int, holding: Holding) -> Granted:
        holder = ConcurrencyLeaseHolder(type="task_run", id=holding.to_uuid())

        async def call(client: PrefectClient) -> Granted:
            response = await client.increment_concurrency_slots_with_lease(
                names=names, slots=slots, mode="concurrency", lease_duration=LEASE_SECONDS, holder=holder
            )
            answer = response.json()
            lease_id, limits = UUID(answer["lease_id"]), {row["name"]: int(row["limit"]) for row in answer["limits"]}
            if set(limits) != set(names):
                # Prefect grants leases of limits that do not exist: such a lease bounds nothing.
                await client.release_concurrency_slots_with_lease(lease_id)
                raise LimitMissing(", ".join(sorted(set(names) - set(limits))))
            return Granted(lease_id, limits[names[0]])

        return await self._call(call)

    async def renew(self, lease_id: UUID) -> None:
        await self._call(lambda client: client.renew_concurrency_lease(lease_id, LEASE_SECONDS))

    async def release(self, lease_id: UUID) -> None:
        await self._call(lambda client: client.release_concurrency_slots_with_lease(lease_id))

    async def holdings(self) -> list[Holding]:
        async def call(client: PrefectClient) -> list[Holding]:
            try:
                limit = await client.read_concurrency_limit_by_tag(workers_tag(self.account))
            except ObjectNotFound:
                return []
            return [holding for holder in limit.active_slots if (holding := Holding.from_uuid(UUID(str(holder))))]

        return await self._call(call)

    async def count(self, kind: Kind) -> Count | None:
        async def call(client: PrefectClient) -> Count | None:
            try:
                limit = await client.read_global_concurrency_limit_by_name(limit_name(kind, self.account))
            except ObjectNotFound:
                return None
            return Count(limit.limit, limit.active_slots)

        return await self._call(call)

    async def close(self) -> None:
        if self._client is not None:
            client, self._client = self._client, None
            await self._in_context(client.__aexit__(None, None, None))

    async def _in_context(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Runs it with our settings, not those of the flow run that happened to call."""
        return await self._context.run(asyncio.ensure_future, coroutine)

    async def _call(self, call: Callable[[PrefectClient], Awaitable[T]]) -> T:
        async def work() -> T:
            for attempt in range(BUSY_TRIES):
                try:
                    return await call(await self._open())
                except httpx.HTTPStatusError as error:
                    if error.response.status_code not in _BUSY or attempt == BUSY_TRIES - 1:
                        raise _translated(error) from error
                except (httpx.TransportError, OSError) as error:
                    raise ServerAway(f"{type(error).__name__}: {error}") from error
                except (ValueError, KeyError, TypeError, httpx.RequestError) as error:  # an answer, but not Prefect's
                    raise ServerAway(f"an answer that is not a Prefect server's ({type(error).__name__})") from error
                await asyncio.sleep(random.uniform(0.3, 0.7))
            raise AssertionError("the last attempt raises")

        return await self._in_context(work())

    async def _open(self) -> PrefectClient:
        self._opening = self._opening or asyncio.Lock()
        async with self._opening:
            if self._client is None:
                # With settings of its own, get_client never hands out the client of a surrounding flow run.
                client = get_client(httpx_settings={"timeout": TIMEOUT})
                self._client = await client.__aenter__()
            return self._client


def _context_without_retries() -> contextvars.Context:
    """A context with Prefect's settings of this moment, and one attempt a call.

    Its default is five attempts with growing pauses: for a minute nobody would know that the server is away.
    """
    present = get_settings_context()
    context = contextvars.Context()
    settings = present.settings.copy_with_update(updates={PREFECT_CLIENT_MAX_RETRIES: 0})
    context.run(SettingsContext(profile=present.profile, settings=settings).__enter__)
    return context


def _translated(error: httpx.HTTPStatusError) -> Exception:
    """What an HTTP status means here."""
    status = error.response.status_code
    if status == 423 or (status == 422 and "greater than the limit" in error.response.text):
        return Denied()
    if status == 410:
        return LeaseGone()
    hint = ": check PREFECT_API_KEY or PREFECT_API_AUTH_STRING" if status in (401, 403) else ""
    return ServerAway(f"HTTP {status}{hint}")
