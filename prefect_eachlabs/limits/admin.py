"""Creates, shows and mends an account's limits on the Prefect server: `prefect-eachlabs limits`, and the doctor.

Nothing here sends a request to the API or costs money. Everything raises `SetupError` when there is no Prefect
server, or when it gives no usable answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

from prefect.client.orchestration import PrefectClient
from prefect.settings import PREFECT_API_URL

from prefect_eachlabs.errors import SetupError
from prefect_eachlabs.limits.leases import Holding, PrefectLeases, ServerAway, limit_name
from prefect_eachlabs.limits.limiter import Kind
from prefect_eachlabs.settings import AccountSettings

REAPED_WITHIN_SECONDS = 18.0
"""The server looks for ended leases every 15 s; what is counted without a lease for longer is leaked."""
LOOK_AGAIN_SECONDS = 2.0


@dataclass(frozen=True)
class LimitStatus:
    """A limit of the account, on the server.

    Attributes:
        name: Of the global limit.
        kind: Requests or in flight.
        limit: The server's number; None: the limit is absent (the first run creates it, or `limits apply`).
        setting: The account's number; None: no limit is wanted, and the server's is not used.
        in_use: Slots the server's database counts as taken.
        leases: Live leases.
        leased: Slots they hold.
        processes: Processes that hold slots.
        waiting: Processes that wait for more.
        leaked: Slots counted as taken that no lease holds.
    """

    name: str
    kind: Kind
    limit: int | None
    setting: int | None
    in_use: int = 0
    leases: int = 0
    leased: int = 0
    processes: int = 0
    waiting: int = 0
    leaked: int = 0


class AdminLeases(PrefectLeases):
    """The calls that only a person orders."""

    async def set_limit(self, kind: Kind, limit: int) -> None:
        """Creates the limit or changes its number; what is taken stays taken."""
        await self.ensure(kind, limit)
        name = limit_name(kind, self.account)
        await self._call(lambda client: client.upsert_global_concurrency_limit_by_name(name, limit))

    async def set_tag_limit(self, tag: str, limit: int) -> None:
        """Creates or changes the limit on task runs with this tag, as `prefect concurrency-limit create` does."""
        await self._call(lambda client: client.create_concurrency_limit(tag, limit))

    async def give_back_leaked(self, kind: Kind, slots: int) -> None:
        """Takes slots off the count: relative, so that a lease granted at the same moment is not lost."""

        async def call(client: PrefectClient) -> None:
            await client.release_concurrency_slots([limit_name(kind, self.account)], slots, occupancy_seconds=1.0)

        await self._call(call)


async def apply(settings: AccountSettings, tag_limits: Mapping[str, int] | None = None) -> list[LimitStatus]:
    """Writes the account's numbers to the server, creating what is missing; as often as one likes.

    Args:
        settings: The account. A limit of None is left alone.
        tag_limits: Tag → most task runs at once: an operator's brake, e.g. `{"eachlabs-create": 5}`.

    Returns:
        The limits, as `show` shows them.
    """
    async with _server(settings) as leases:
        for kind, number in _numbers(settings).items():
            if number is not None:
                await leases.set_limit(kind, number)
        for tag, number in (tag_limits or {}).items():
            await leases.set_tag_limit(tag, number)
        return await _statuses(settings, leases)


async def show(settings: AccountSettings, *, within_seconds: float = REAPED_WITHIN_SECONDS) -> list[LimitStatus]:
    """Both limits of the account, and whether slots are leaked.

    Args:
        settings: The account.
        within_seconds: Where something looks leaked, how long to look on: the slots of a killed process are counted
            without a lease for up to 18 s. With less, such slots may be shown as leaked.
    """
    async with _server(settings) as leases:
        return await _statuses(settings, leases, within_seconds=within_seconds)


async def reset(settings: AccountSettings) -> list[LimitStatus]:
    """Frees leaked slots: afterwards the server counts what live leases hold. Takes 18 s if there are any.

    Leases in use are not touched, so it may run while pictures are made. Whoever takes slots of these limits by
    other means than prefect-eachlabs loses them: give them a limit of their own.

    Returns:
        The limits as they were found; `leaked` is what was freed.
    """
    async with _server(settings) as leases:
        found = await _statuses(settings, leases, within_seconds=REAPED_WITHIN_SECONDS)
        for status in found:
            if status.leaked:
                await leases.give_back_leaked(status.kind, status.leaked)
        return found


def _numbers(settings: AccountSettings) -> dict[Kind, int | None]:
    return {Kind.REQUESTS: settings.requests_per_minute, Kind.IN_FLIGHT: settings.max_in_flight}


@asynccontextmanager
async def _server(settings: AccountSettings) -> AsyncIterator[AdminLeases]:
    if not PREFECT_API_URL.value():
        raise SetupError(
            "No Prefect server is configured: without one the processes of a machine share the account's limits, and "
            "there is nothing to create or show. Set PREFECT_API_URL, e.g. to http://127.0.0.1:4200/api."
        )
    leases = AdminLeases(settings.account)
    try:
        yield leases
    except ServerAway as error:
        raise SetupError(
            f"The Prefect server at {leases.where} gives no usable answer ({error}). Start it with "
            "`prefect server start`, or correct PREFECT_API_URL.",
            url=leases.where,
        ) from error
    finally:
        await leases.close()


async def _statuses(
    settings: AccountSettings, leases: AdminLeases, *, within_seconds: float = 0.0
) -> list[LimitStatus]:
    """Looks until what seems leaked is gone, or has stayed for so long."""
    loop = asyncio.get_running_loop()
    until = loop.time() + within_seconds
    leaked = dict.fromkeys(Kind, 1_000_000_000)
    while True:
        rows = await leases.holdings()
        found = []
        for kind, number in _numbers(settings).items():
            status = await _status(kind, number, rows, leases)
            leaked[kind] = min(leaked[kind], status.leaked)
            found.append(status)
        pause_seconds = min(LOOK_AGAIN_SECONDS, until - loop.time())
        if pause_seconds <= 0 or not any(leaked.values()):
            return [_with_leaked(status, leaked[status.kind]) for status in found]
        await asyncio.sleep(pause_seconds)


async def _status(kind: Kind, setting: int | None, rows: list[Holding], leases: AdminLeases) -> LimitStatus:
    count = await leases.count(kind)
    ours = [row for row in rows if row.kind is kind]
    holding = [row for row in ours if row.slots]
    leased = sum(row.slots for row in holding)
    in_use = count.active_slots if count else 0
    return LimitStatus(
        name=limit_name(kind, leases.account),
        kind=kind,
        limit=count.limit if count else None,
        setting=setting,
        in_use=in_use,
        leases=len(holding),
        leased=leased,
        processes=len({row.process for row in holding}),
        waiting=len({row.process for row in ours if not row.slots}),
        leaked=max(0, in_use - leased),
    )


def _with_leaked(status: LimitStatus, leaked: int) -> LimitStatus:
    return LimitStatus(**{**vars(status), "leaked": leaked})
