"""The limits of an account on a real Prefect server, on SQLite, with its leases in memory as they are by default."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings

from prefect_eachlabs.errors import SetupError
from prefect_eachlabs.limits import admin as limits_admin
from prefect_eachlabs.limits.leases import Denied, Granted, Kind, LeaseGone
from prefect_eachlabs.limits.limiter import RateLimiter
from prefect_eachlabs.limits.prefect_leases import PrefectLeases
from prefect_eachlabs.settings import AccountSettings
from tests.net.real_time import in_real_time
from tests.ui.stage import Stage

pytestmark = pytest.mark.slow


@pytest.fixture
def settings(at_server_process: Stage) -> AccountSettings:
    """An account of its own for each test."""
    return AccountSettings(api_key="key", account=secrets.token_hex(4))


@asynccontextmanager
async def opened(settings: AccountSettings) -> AsyncIterator[PrefectLeases]:
    leases = PrefectLeases(settings.account)
    try:
        yield leases
    finally:
        await leases.close()


def shared(settings: AccountSettings) -> RateLimiter:
    return RateLimiter(settings, PrefectLeases(settings.account))


async def until(happens: Callable[[], bool], within_seconds: float) -> None:
    deadline = time.monotonic() + within_seconds
    while not happens():
        assert time.monotonic() < deadline, f"not within {within_seconds} s"
        await asyncio.sleep(0.1)


@in_real_time
async def test_apply_makes_both_limits_and_tag_limits_as_often_as_one_likes(settings: AccountSettings) -> None:
    for status in await limits_admin.show(settings):
        assert status.limit is None
    await limits_admin.apply(settings)
    more = settings.model_copy(update={"requests_per_minute": 90})
    requests, in_flight = await limits_admin.apply(more, {"eachlabs-create": 5})
    assert (requests.name, requests.limit) == (f"eachlabs-requests-{settings.account}", 90)
    assert (in_flight.name, in_flight.limit) == (f"eachlabs-in-flight-{settings.account}", 10)
    assert requests.in_use == 0
    async with get_client() as client:
        assert (await client.read_concurrency_limit_by_tag("eachlabs-create")).concurrency_limit == 5


@in_real_time
async def test_a_lease_is_counted_renewed_and_given_back(settings: AccountSettings) -> None:
    async with opened(settings) as leases:
        assert await leases.taken(Kind.REQUESTS) == 0
        granted = await leases.lease(Kind.REQUESTS, 3, 60)
        await leases.renew(granted.lease_id)
        assert (granted.limit, await leases.taken(Kind.REQUESTS)) == (60, 3)
        (requests, _) = await limits_admin.show(settings)
        assert requests.in_use == 3
        with pytest.raises(Denied):
            await leases.lease(Kind.REQUESTS, 58, 60)
        with pytest.raises(Denied):
            await leases.lease(Kind.REQUESTS, 61, 61)
        for lease_id in (granted.lease_id, granted.lease_id):
            await leases.release(lease_id)
        (requests, _) = await limits_admin.show(settings)
        assert requests.in_use == 0
        with pytest.raises(LeaseGone):
            await leases.renew(granted.lease_id)


@in_real_time
async def test_a_limit_nobody_made_is_made_once_and_counts_from_the_first_lease(settings: AccountSettings) -> None:
    async with opened(settings) as leases:
        assert (await leases.lease(Kind.REQUESTS, 3, 60)).limit == 60
        assert (await leases.lease(Kind.REQUESTS, 3, 30)).limit == 60
        assert await leases.taken(Kind.REQUESTS) == 6


@in_real_time
async def test_processes_that_start_at_the_same_moment_make_one_limit(settings: AccountSettings) -> None:
    async def one() -> Granted:
        async with opened(settings) as leases:
            return await leases.lease(Kind.IN_FLIGHT, 2, 10)

    await asyncio.gather(*(one() for _ in range(5)))
    async with opened(settings) as leases:
        with pytest.raises(Denied):
            await leases.lease(Kind.IN_FLIGHT, 1, 10)


@in_real_time
async def test_two_processes_together_have_the_slots_in_flight_and_no_more(settings: AccountSettings) -> None:
    first, second = shared(settings), shared(settings)
    taken = await asyncio.wait_for(asyncio.gather(*(first.take_in_flight() for _ in range(10))), 20)
    waiting = [asyncio.ensure_future(second.take_in_flight()) for _ in range(10)]
    more = [asyncio.ensure_future(first.take_in_flight()) for _ in range(10)]
    await asyncio.sleep(11)
    assert not any(slot.done() for slot in (*waiting, *more))
    for slot in taken:
        slot.done()
    await until(lambda: sum(slot.done() for slot in (*waiting, *more)) == 10, 15)
    await asyncio.sleep(2)
    assert sum(slot.done() for slot in (*waiting, *more)) == 10
    for slot in (*waiting, *more):
        slot.cancel()
    await asyncio.gather(*waiting, *more, return_exceptions=True)
    for limiter in (first, second):
        await limiter.close()


@in_real_time
async def test_what_is_not_in_use_goes_back_when_a_process_ends(settings: AccountSettings) -> None:
    limiter = shared(settings)
    taken = await asyncio.wait_for(asyncio.gather(*(limiter.take_in_flight() for _ in range(10))), 20)
    for slot in taken[3:]:  # their ends were seen, of cancels say
        slot.done()
    await asyncio.wait_for(limiter.close(), 5)
    (_, status) = await limits_admin.show(settings)
    assert status.in_use == 3


@in_real_time
async def test_over_a_restart_of_the_server_who_ends_ends_who_waits_goes_on_and_lost_slots_are_named_and_reset(
    at_server_process: Stage, settings: AccountSettings, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)

    def of_another_account() -> RateLimiter:
        return shared(settings.model_copy(update={"account": secrets.token_hex(4)}))

    first, second, limiter, ending = shared(settings), shared(settings), of_another_account(), of_another_account()
    await asyncio.wait_for(asyncio.gather(*(first.take_in_flight() for _ in range(7))), 20)
    await asyncio.wait_for(limiter.take_in_flight(), 20)
    (await asyncio.wait_for(ending.take_in_flight(), 20)).done()
    at_server_process.stop_server()
    await asyncio.wait_for(ending.close(), 8)  # a process ends all the same
    waiting = [asyncio.ensure_future(limiter.take_in_flight()) for _ in range(5)]
    await until(lambda: "gives no usable answer" in caplog.text, 60)
    assert not any(slot.done() for slot in waiting)
    at_server_process.start_server()
    await until(lambda: all(slot.done() for slot in waiting), 60)
    await asyncio.wait_for(limiter.close(), 5)
    await until(lambda: "prefect-eachlabs limits reset" in caplog.text, 90)
    await first.close()  # the account's processes have ended
    (_, status) = await limits_admin.reset(settings)
    assert status.in_use >= 7
    await asyncio.wait_for(asyncio.gather(*(second.take_in_flight() for _ in range(10))), 20)
    await second.close()


def test_without_a_server_the_commands_say_what_to_do(settings: AccountSettings) -> None:
    for url in ("http://127.0.0.1:9/api", None):
        with temporary_settings({PREFECT_API_URL: url}), pytest.raises(SetupError, match="PREFECT_API_URL"):
            asyncio.run(limits_admin.show(settings))
