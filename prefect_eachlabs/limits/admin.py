"""Creates, shows and resets an account's limits on the Prefect server: `prefect-eachlabs limits`, and the doctor.

Nothing here sends a request to the API or costs money. Everything raises `SetupError` when there is no Prefect
server, or when it gives no usable answer.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate, GlobalConcurrencyLimitUpdate
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.settings import PREFECT_API_URL

from prefect_eachlabs.errors import SetupError
from prefect_eachlabs.limits.leases import Kind, ServerAway, numbers_of
from prefect_eachlabs.limits.prefect_leases import PrefectLeases, limit_name
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


async def apply(settings: AccountSettings, tag_limits: Mapping[str, int | None] | None = None) -> list[LimitStatus]:
    """Writes the account's numbers to the server, creating what is missing; idempotent. What is taken stays taken.

    Args:
        settings: The account. A limit of None is left alone.
        tag_limits: Tag → most task runs at once: an operator's brake, e.g. `{"eachlabs-create": 5}`; None takes the
            tag's limit away.

    Returns:
        The limits, as `show` shows them.
    """

    async def write(client: PrefectClient) -> None:
        for kind, number in numbers_of(settings).items():
            if number is not None:
                name = limit_name(kind, settings.account)
                with suppress(ObjectAlreadyExists):
                    await client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=number))
                await client.update_global_concurrency_limit(name, GlobalConcurrencyLimitUpdate(limit=number))
        for tag, number in (tag_limits or {}).items():
            if number is not None:
                await client.create_concurrency_limit(tag, number)
            else:
                with suppress(ObjectNotFound):
                    await client.delete_concurrency_limit_by_tag(tag)

    async with _server(settings) as leases:
        await leases.call(write)
        return await _statuses(settings, leases)


async def show(settings: AccountSettings) -> list[LimitStatus]:
    """Both limits of the account."""
    async with _server(settings) as leases:
        return await _statuses(settings, leases)


async def tags(settings: AccountSettings) -> list[TagLimit]:
    """The limits on tags that are named as this package's."""

    async def read(client: PrefectClient) -> list[TagLimit]:
        limits: list[TagLimit] = []
        offset = 0
        while found := await client.read_concurrency_limits(limit=A_PAGE, offset=offset):
            limits += [TagLimit(one.tag, one.concurrency_limit, len(one.active_slots)) for one in found]
            offset += len(found)
        return sorted((one for one in limits if one.tag.startswith(PREFIX)), key=lambda one: one.tag)

    async with _server(settings) as leases:
        return await leases.call(read)


async def reset(settings: AccountSettings) -> list[LimitStatus]:
    """Frees all slots that are counted as taken, those of processes that run as well: end these first.

    For slots that no lease holds any more: a server that keeps its leases in memory forgets them when it restarts,
    and goes on counting their slots.

    Returns:
        The limits as they were found; `in_use` is what was freed.
    """
    async with _server(settings) as leases:
        found = await _statuses(settings, leases)

        async def free(client: PrefectClient) -> None:
            for status in found:
                if status.in_use:
                    none_taken = GlobalConcurrencyLimitUpdate(active_slots=0)
                    await client.update_global_concurrency_limit(status.name, none_taken)

        await leases.call(free)
        return found


@asynccontextmanager
async def _server(settings: AccountSettings) -> AsyncIterator[PrefectLeases]:
    if not PREFECT_API_URL.value():
        raise SetupError(
            "No Prefect server is configured: without one the processes of a machine share the account's limits, and "
            "there is nothing to create or show. Set PREFECT_API_URL, e.g. to http://127.0.0.1:4200/api."
        )
    leases = PrefectLeases(settings.account)
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


async def _statuses(settings: AccountSettings, leases: PrefectLeases) -> list[LimitStatus]:
    async def read(client: PrefectClient) -> list[LimitStatus]:
        found = []
        for kind, number in numbers_of(settings).items():
            name = limit_name(kind, settings.account)
            try:
                limit = await client.read_global_concurrency_limit_by_name(name)
            except ObjectNotFound:
                found.append(LimitStatus(name, kind, None, number))
            else:
                found.append(LimitStatus(name, kind, limit.limit, number, limit.active_slots))
        return found

    return await leases.call(read)
