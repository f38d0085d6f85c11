"""Several processes share an account's limits over one Prefect server: in virtual time, against a fake that counts."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from prefect_eachlabs.limits.file_leases import FileLeases
from prefect_eachlabs.limits.limiter import Kind
from prefect_eachlabs.limits.prefect_leases import PrefectLeases, limiter_for
from prefect_eachlabs.settings import AccountSettings
from tests.limits.lease_server import LeaseServer
from tests.limits.lease_workers import WINDOW_SECONDS, Api, Worker, now, takes
from tests.virtual_time import run

# -------------------------------------------------------------- where from


def test_a_prefect_server_in_the_settings_shares_the_limits_and_nothing_else_does() -> None:
    settings = AccountSettings(api_key="key")
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        assert isinstance(limiter_for(settings)._leases, FileLeases)
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:4200/api"}):
        assert isinstance(limiter_for(settings)._leases, PrefectLeases)


# ------------------------------------------------------------------------ pace


async def test_one_process_keeps_the_full_pace_and_is_never_over(api: Api) -> None:
    Worker(LeaseServer(), api).start()
    await asyncio.sleep(300)
    assert api.sent(60, 300) >= 0.97 * 4 * 60


@pytest.mark.parametrize("count", [2, 4])
async def test_processes_share_evenly_and_waste_nothing(server: LeaseServer, api: Api, count: int) -> None:
    for name in range(count):
        Worker(server, api, str(name)).start()
    await asyncio.sleep(240)
    sent = [api.sent(60, 240, str(name)) for name in range(count)]
    assert sum(sent) >= 0.97 * 3 * 60
    assert max(sent) <= 1.7 * min(sent)


async def test_a_process_with_little_to_do_leaves_the_rest_to_the_others(server: LeaseServer, api: Api) -> None:
    Worker(server, api, "busy").start()
    Worker(server, api, "modest").start(callers=1)
    await asyncio.sleep(240)
    assert api.sent(60, 240) >= 0.94 * 3 * 60
    assert api.sent(60, 240, "modest") >= 3 * 60 / 7  # two requests for each of its pictures, as fast as it can


async def test_few_calls_are_made_and_few_at_once(server: LeaseServer, api: Api) -> None:
    Worker(server, api).start()
    await asyncio.sleep(180)
    assert server.most_under_way <= 6
    assert len(server.calls) <= 180 * 3


async def test_a_big_account_leases_many_slots_at_once() -> None:
    server, api = LeaseServer(), Api()
    Worker(server, api, requests_per_minute=1200, max_in_flight=100).start(callers=120)
    await asyncio.sleep(120)
    assert api.worst_window() <= 1200
    assert api.most_in_flight <= 100
    assert api.sent(60, 120) >= 0.9 * 1200
    assert len(server.calls) <= 120 * 12


# ------------------------------------------------------- who joins, who is killed


def test_a_process_that_joins_gets_its_part_within_half_a_minute() -> None:
    """On average: a minute in which the others had more is followed by one in which they have less."""
    sent: dict[tuple[str, int], int] = Counter()
    for seed in range(3):
        random.seed(seed)
        server, api = LeaseServer(), Api()

        async def story(server: LeaseServer = server, api: Api = api) -> None:
            Worker(server, api, "first").start()
            for name, at in (("second", 90.0), ("third", 240.0)):
                await asyncio.sleep(at - now())
                Worker(server, api, name).start()
            await asyncio.sleep(150)

        run(story())
        assert api.worst_window() <= 60
        assert api.most_in_flight <= 10
        for name, at in (("second", 90), ("third", 240)):
            for begin in (30, 90):
                sent[name, begin] += api.sent(at + begin, at + begin + 60, name)
    assert all(count >= 0.8 * 3 * (30 if name == "second" else 20) for (name, _), count in sent.items()), sent


async def test_a_killed_process_gives_its_part_back_when_its_leases_end(server: LeaseServer, api: Api) -> None:
    Worker(server, api, "survivor").start()
    killed = Worker(server, api, "killed").start()
    await asyncio.sleep(180)
    killed.kill()
    await asyncio.sleep(300)
    assert api.sent(180.5, 480, "killed") == 0
    assert api.sent(180 + 75 + 15, 180 + 75 + 15 + 60, "survivor") >= 40
    assert api.sent(360, 480, "survivor") >= 0.95 * 120


async def test_a_process_that_is_done_gives_everything_back_and_asks_nothing_more(
    server: LeaseServer, api: Api
) -> None:
    worker = Worker(server, api).start(callers=10, pictures=2)
    await asyncio.gather(*worker.callers)
    await asyncio.sleep(80)
    calls = len(server.calls)
    assert not server.leases
    assert server.active == {Kind.REQUESTS: 0, Kind.IN_FLIGHT: 0}
    await asyncio.sleep(3600)
    assert len(server.calls) == calls


async def test_closing_gives_back_what_is_not_in_use(server: LeaseServer, api: Api) -> None:
    worker = Worker(server, api)
    place = await takes(worker, Kind.IN_FLIGHT, 5)
    assert place is not None
    place.unused()
    await worker.stop()
    assert not server.leases
    assert worker.client.closed


async def test_what_is_granted_while_it_closes_goes_back_as_well() -> None:
    server = LeaseServer(latency_seconds=1.0)
    worker = Worker(server, Api())
    assert await takes(worker, Kind.IN_FLIGHT, 0.1) is None
    await worker.stop()
    assert [name for _, name in server.calls] == ["lease", "release"]
    assert not server.leases


# ----------------------------------------------------------------- single places


async def test_a_slot_in_flight_goes_back_at_its_predictions_end_or_when_unused_for_ten_seconds(
    server: LeaseServer, api: Api
) -> None:
    worker = Worker(server, api)
    place = await takes(worker, Kind.IN_FLIGHT, 5)
    assert place is not None
    await asyncio.sleep(200)
    assert server.leased(Kind.IN_FLIGHT) == 1
    place.done()
    await asyncio.sleep(1)
    assert server.leased(Kind.IN_FLIGHT) == 0
    place = await takes(worker, Kind.IN_FLIGHT, 5)
    assert place is not None
    place.unused()
    await asyncio.sleep(9.5)
    assert server.leased(Kind.IN_FLIGHT) == 1
    await asyncio.sleep(1)
    assert server.leased(Kind.IN_FLIGHT) == 0


async def test_a_request_place_that_was_not_used_is_free_at_once(api: Api) -> None:
    worker = Worker(LeaseServer(), api, requests_per_minute=1)
    first = await takes(worker, Kind.REQUESTS, 5)
    assert first is not None
    first.unused()
    first.unused()
    second = await takes(worker, Kind.REQUESTS, 1)
    assert second is not None
    second.done()
    second.unused()
    assert await takes(worker, Kind.REQUESTS, 59) is None
    assert await takes(worker, Kind.REQUESTS, 4) is not None


async def test_the_lease_of_a_late_answer_lasts_until_it_has_cooled(server: LeaseServer, api: Api) -> None:
    worker = Worker(server, api, latency_seconds=lambda: 130.0)
    await worker.request()
    answered_at = now()
    await asyncio.sleep(0.1)
    worker.kill()
    while server.leased(Kind.REQUESTS):
        await asyncio.sleep(1)
        server.reap()
    assert now() >= answered_at + WINDOW_SECONDS


async def test_without_limits_nothing_is_asked_of_the_server() -> None:
    server, api = LeaseServer(), Api()
    worker = Worker(server, api, requests_per_minute=None, max_in_flight=None).start(callers=100)
    await asyncio.sleep(20)
    assert api.most_in_flight == 100
    assert worker.limiter.limit(Kind.REQUESTS) is None
    assert worker.limiter.pressure(Kind.REQUESTS) == 0.0
    await worker.stop()
    assert not server.calls


async def test_one_limit_may_be_absent() -> None:
    server, api = LeaseServer(), Api()
    Worker(server, api, requests_per_minute=None).start()
    await asyncio.sleep(120)
    assert api.most_in_flight == 10
    assert api.sent(60, 120) >= 200
    assert set(server.limits) == {Kind.IN_FLIGHT}


async def test_processes_take_turns_when_there_are_fewer_places_than_processes() -> None:
    server, api = LeaseServer(), Api()
    for name in "abc":
        Worker(server, api, name, requests_per_minute=None, max_in_flight=1).start(callers=3)
    await asyncio.sleep(300)
    assert api.most_in_flight == 1
    assert all(api.sent(0, 300, name) >= 10 for name in "abc")
