"""Creates, shows and resets an account's limits on the Prefect server: `prefect-eachlabs limits`, and the doctor.

Nothing here sends a request to the API or costs money. Everything raises `SetupError` when there is no Prefect
server, or when it gives no usable answer.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.actions import GlobalConcurrencyLimitUpdate
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL

from prefect_eachlabs.errors import SetupError
from prefect_eachlabs.limits.prefect_leases import PrefectLeases, limit_name
from prefect_eachlabs.limits.shared import ServerAway
from prefect_eachlabs.limits.window import Kind
from prefect_eachlabs.settings import AccountSettings

PREFIX = "eachlabs"
"""Of this package's tags."""
A_PAGE = 200
"""Prefect's server gives no more limits at once."""


@dataclass(frozen=True)
class LimitStatus:
    """A limit of the account, on the server.

    Attributes:
        name: Of the global limit.
        kind: Requests or in flight.
        limit: The server's number; None: the limit is absent (the first run creates it, or `limits apply`).
        setting: The account's number; None: no limit is wanted, and the server's is not used.
        in_use: Slots the server's database counts as taken.
    """

    name: str
    kind: Kind
    limit: int | None
    setting: int | None
    in_use: int = 0


@dataclass(frozen=True)
class TagLimit:
    """A limit on task runs with a tag, on the server.

    Attributes:
        tag: The tag.
        limit: At most so many task runs with it at once.
        in_use: How many there are now.
    """

    tag: str
    limit: int
    in_use: int


class AdminLeases(PrefectLeases):
    """The calls that only a person orders."""

    async def set_limit(self, kind: Kind, limit: int) -> None:
        """Creates the limit or changes its number; what is taken stays taken."""
        await self.ensure(kind, limit)
        name = limit_name(kind, self.account)
        await self._call(lambda client: client.upsert_global_concurrency_limit_by_name(name, limit))

    async def set_tag_limit(self, tag: str, limit: int | None) -> None:
        """Creates or changes the limit on task runs with this tag, as `prefect concurrency-limit create` does.

        None takes it away.
        """

        async def call(client: PrefectClient) -> None:
            if limit is not None:
                await client.create_concurrency_limit(tag, limit)
            else:
                with suppress(ObjectNotFound):
                    await client.delete_concurrency_limit_by_tag(tag)

        await self._call(call)

    async def tag_limits(self) -> list[TagLimit]:
        """Those on tags whose names begin as this package's do."""

        async def page(client: PrefectClient, offset: int) -> list[TagLimit]:
            found = await client.read_concurrency_limits(limit=A_PAGE, offset=offset)
            return [TagLimit(one.tag, one.concurrency_limit, len(one.active_slots)) for one in found]

        limits: list[TagLimit] = []
        while len(limits) % A_PAGE == 0:
            offset = len(limits)
            limits += (found := await self._call(lambda client: page(client, offset)))  # noqa: B023 - awaited here
            if not found:
                break
        return sorted((one for one in limits if one.tag.startswith(PREFIX)), key=lambda one: one.tag)

    async def forget_taken(self, kind: Kind) -> None:
        """Counts no slot as taken."""

        async def call(client: PrefectClient) -> None:
            none_taken = GlobalConcurrencyLimitUpdate(active_slots=0)
            await client.update_global_concurrency_limit(limit_name(kind, self.account), none_taken)

        await self._call(call)


async def apply(settings: AccountSettings, tag_limits: Mapping[str, int | None] | None = None) -> list[LimitStatus]:
    """Writes the account's numbers to the server, creating what is missing; idempotent.

    Args:
        settings: The account. A limit of None is left alone.
        tag_limits: Tag → most task runs at once: an operator's brake, e.g. `{"eachlabs-create": 5}`; None takes the
            tag's limit away.

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


async def show(settings: AccountSettings) -> list[LimitStatus]:
    """Both limits of the account."""
    async with _server(settings) as leases:
        return await _statuses(settings, leases)


async def tags(settings: AccountSettings) -> list[TagLimit]:
    """The limits on tags that are named as this package's."""
    async with _server(settings) as leases:
        return await leases.tag_limits()


async def reset(settings: AccountSettings) -> list[LimitStatus]:
    """Frees all slots that are counted as taken, those of processes that run as well: end these first.

    For slots that no lease holds any more: a server that keeps its leases in memory forgets them when it restarts,
    and goes on counting their slots.

    Returns:
        The limits as they were found; `in_use` is what was freed.
    """
    async with _server(settings) as leases:
        found = await _statuses(settings, leases)
        for status in found:
            if status.in_use:
                await leases.forget_taken(status.kind)
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


async def _statuses(settings: AccountSettings, leases: AdminLeases) -> list[LimitStatus]:
    found = []
    for kind, number in _numbers(settings).items():
        count = await leases.count(kind)
        limit, in_use = (None, 0) if count is None else (count.limit, count.active_slots)
        found.append(LimitStatus(limit_name(kind, settings.account), kind, limit, number, in_use))
    return found
