"""Leases on the global concurrency limits of a Prefect server: the few HTTP calls that sharing an account needs.

Two limits an account: `eachlabs-requests-ACCOUNT` and `eachlabs-in-flight-ACCOUNT` hold the numbers, and the server's
database counts what is taken.

What Prefect 3.8.8 and 3.9.1 do, measured: a lease of a limit nobody created is granted, and limits nothing; a denial is
423; a lease the server forgot is 410 to renew and 204 to release; on SQLite a lease or a release takes 13 ms, a renewal
5 ms. Its client repeats a failed call for a minute by itself, so that is switched off here.
"""

from __future__ import annotations

import asyncio
import contextvars
import random
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar
from uuid import UUID

import httpx
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.context import SettingsContext, get_settings_context
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES

from prefect_eachlabs.errors import without_query
from prefect_eachlabs.limits.file_leases import machine_limiter
from prefect_eachlabs.limits.leases import (
    CALL_SECONDS,
    LEASE_SECONDS,
    Denied,
    Granted,
    Kind,
    LeaseGone,
    ServerAway,
)
from prefect_eachlabs.limits.limiter import RateLimiter
from prefect_eachlabs.settings import AccountSettings

T = TypeVar("T")

BUSY_TRIES = 4
"""A SQLite server that is locked says 503; nothing was written then, so the call is repeated after half a second."""

_BUSY = (429, 503)
FORGOTTEN = (
    "The Prefect server no longer knows a lease that it granted. Unless this process stood still for a minute, the "
    "server was restarted with its leases in memory, and counts their slots as taken for good: `prefect-eachlabs "
    "limits reset` frees them, once the account's processes have ended. It does not happen again when the server runs "
    "with PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE=prefect.server.concurrency.lease_storage.filesystem."
)


def limit_name(kind: Kind, account: str) -> str:
    """The name of an account's global limit."""
    return f"eachlabs-{kind.value}-{account}"


def limiter_for(settings: AccountSettings) -> RateLimiter:
    """The account's limits, shared over the Prefect server of `PREFECT_API_URL`, or over this machine's file.

    The embedded server counts as none: its leases outlive their process, and no other process shares it. A flow run
    on it has no `PREFECT_API_URL`, neither in its settings nor in its environment, so the setting alone decides.
    """
    if PREFECT_API_URL.value():
        return RateLimiter(settings, PrefectLeases(settings.account))
    return machine_limiter(settings)


class PrefectLeases:
    """`Leases` over one open Prefect client, in the loop that uses it first.

    Args:
        account: Names the limits.
    """

    parts = 20
    """3 of 60 requests, 1 of 10 in flight."""
    turn_seconds = 0.5
    spread = 0.6
    loses_slots = True

    def __init__(self, account: str) -> None:
        self.account = account
        self._context = context_without_retries()
        self._client: PrefectClient | None = None
        self._opening = asyncio.Lock()
        self.where = without_query(self._context.run(PREFECT_API_URL.value) or "(no PREFECT_API_URL)")

    async def lease(self, kind: Kind, slots: int, limit: int) -> Granted:
        name = limit_name(kind, self.account)

        async def call(client: PrefectClient) -> Granted:
            while True:
                response = await client.increment_concurrency_slots_with_lease(
                    names=[name], slots=slots, mode="concurrency", lease_duration=LEASE_SECONDS
                )
                answer = response.json()
                lease_id = UUID(answer["lease_id"])
                limits = {row["name"]: int(row["limit"]) for row in answer["limits"]}
                if name in limits:
                    return Granted(str(lease_id), limits[name])
                # Prefect grants leases of limits that do not exist: such a lease bounds nothing.
                await client.release_concurrency_slots_with_lease(lease_id)
                with suppress(ObjectAlreadyExists):  # another process was faster
                    await client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=limit))

        return await self.call(call)

    async def renew(self, lease_id: str) -> None:
        await self.call(lambda client: client.renew_concurrency_lease(UUID(lease_id), LEASE_SECONDS))

    async def release(self, lease_id: str) -> None:
        await self.call(lambda client: client.release_concurrency_slots_with_lease(UUID(lease_id)))

    async def taken(self, kind: Kind) -> int:
        async def call(client: PrefectClient) -> int:
            try:
                return (await client.read_global_concurrency_limit_by_name(limit_name(kind, self.account))).active_slots
            except ObjectNotFound:
                return 0

        return await self.call(call)

    async def close(self) -> None:
        if self._client is not None:
            client, self._client = self._client, None
            await self._in_context(client.__aexit__(None, None, None))

    async def _in_context(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Runs it with our settings, not those of the flow run that happened to call."""
        return await self._context.run(asyncio.ensure_future, coroutine)

    async def call(self, call: Callable[[PrefectClient], Awaitable[T]]) -> T:
        """What the call returns, within 8 s. Raises `ServerAway`, or what its answer means here."""

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

        try:
            return await asyncio.wait_for(self._in_context(work()), CALL_SECONDS)
        except asyncio.TimeoutError:
            raise ServerAway(f"no answer within {CALL_SECONDS:.0f} s") from None

    async def _open(self) -> PrefectClient:
        async with self._opening:
            if self._client is None:
                # With settings of its own, get_client never hands out the client of a surrounding flow run.
                client = get_client(httpx_settings={"timeout": CALL_SECONDS})
                self._client = await client.__aenter__()
            return self._client


def context_without_retries() -> contextvars.Context:
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
        return Denied("other processes")
    if status == 410:
        return LeaseGone(FORGOTTEN)
    hint = ": check PREFECT_API_KEY or PREFECT_API_AUTH_STRING" if status in (401, 403) else ""
    return ServerAway(f"HTTP {status}{hint}")
