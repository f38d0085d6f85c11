"""The limits stay limits, and work goes on, whatever happens to the Prefect server and to the processes."""

from __future__ import annotations

import asyncio
import logging
import random

import pytest

from prefect_eachlabs.limits.limiter import Kind, RateLimiter
from prefect_eachlabs.settings import AccountSettings
from tests.limits.lease_server import LeaseClient, LeaseServer
from tests.limits.lease_workers import Api, Worker, warnings
from tests.virtual_time import run

# -------------------------------------------------------- the server's own numbers


@pytest.mark.parametrize("server_limit", [30, 90])
async def test_of_two_different_numbers_the_smaller_one_counts(
    caplog: pytest.LogCaptureFixture, server_limit: int
) -> None:
    server, api = LeaseServer(limits={Kind.REQUESTS: server_limit}, active={Kind.REQUESTS: 0}), Api()
    for name in "ab":
        Worker(server, api, name).start()
        await asyncio.sleep(90)
    await asyncio.sleep(120)
    smaller = min(60, server_limit)
    assert api.worst_window() <= smaller
    assert api.sent(120, 300) >= 0.9 * 3 * smaller
    assert server.limits[Kind.REQUESTS] == server_limit
    assert len(warnings(caplog, f"the Prefect server is {server_limit}")) == 2  # once a process


async def test_a_limit_lowered_by_an_operator_counts_within_a_minute_and_a_half() -> None:
    server, api = LeaseServer(), Api()
    Worker(server, api).start()
    await asyncio.sleep(120)
    server.limits[Kind.REQUESTS] = 20
    await asyncio.sleep(90)
    api.requests.clear()
    await asyncio.sleep(180)
    assert api.worst_window() <= 20


async def test_a_limit_deleted_by_hand_is_made_again(server: LeaseServer, api: Api) -> None:
    Worker(server, api).start()
    await asyncio.sleep(100)
    del server.limits[Kind.REQUESTS], server.active[Kind.REQUESTS]
    await asyncio.sleep(100)
    assert server.limits[Kind.REQUESTS] == 60
    assert api.sent(140, 200) >= 30


# --------------------------------------------------------------- the server away


async def test_with_the_server_away_nothing_is_sent_and_who_waits_says_so(
    server: LeaseServer, api: Api, caplog: pytest.LogCaptureFixture
) -> None:
    for name in "ab":
        Worker(server, api, name).start()
    await asyncio.sleep(150)
    server.down = True
    await asyncio.sleep(300)
    server.down = False
    await asyncio.sleep(200)
    assert api.sent(165, 450) == 0
    assert api.sent(510, 630) >= 0.9 * 120
    assert 2 <= len(warnings(caplog, "which gives no usable answer (ConnectError")) <= 12  # once in two minutes


@pytest.mark.parametrize("asleep", [False, True], ids=["the server is away", "the process's machine is asleep"])
def test_what_is_in_flight_counts_over_an_absence_of_nearly_a_minute(
    asleep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the time since its leases were renewed; another process asks for slots as soon as it can."""

    async def story(began_after_seconds: float, away_seconds: float) -> None:
        server = LeaseServer()
        first, second = (RateLimiter(AccountSettings(api_key="kit"), server.client()) for _ in "ab")
        for _ in range(10):
            await first.take_in_flight()
        await asyncio.sleep(13 + began_after_seconds)
        waiting = asyncio.ensure_future(second.take_in_flight())
        await asyncio.sleep(5)
        if asleep:  # its timers stand still, the server's leases do not
            for lease in server.leases.values():
                lease.ends_at -= away_seconds
            monkeypatch.setattr("prefect_eachlabs.limits.leases.suspended_seconds", lambda: away_seconds)
        else:
            server.down = True
            await asyncio.sleep(away_seconds)
            server.down = False
        await asyncio.sleep(60)
        assert not waiting.done(), f"slots in use were given to another ({began_after_seconds} s, {away_seconds} s)"
        waiting.cancel()
        monkeypatch.setattr("prefect_eachlabs.limits.leases.suspended_seconds", lambda: 0.0)

    for away_seconds in (44, 50, 57):
        for began_after_seconds in range(0, 13, 3):
            run(story(began_after_seconds, away_seconds))


async def test_a_server_that_never_answered_is_waited_for_and_that_is_said(
    api: Api, caplog: pytest.LogCaptureFixture
) -> None:
    server = LeaseServer(down=True)
    worker = Worker(server, api).start()
    await asyncio.sleep(7)
    assert worker.limiter.standstill is not None
    assert "Start it, or unset PREFECT_API_URL" in worker.limiter.standstill
    await asyncio.sleep(600)
    server.down = False
    await asyncio.sleep(20)
    assert api.sent(607, 627) >= 10
    await worker.stop()
    assert api.sent(0, 607) == 0


async def test_a_process_that_begins_while_the_server_restarts_waits_for_it(server: LeaseServer, api: Api) -> None:
    """It cannot know who else is there: what it took alone would come on top of the others' shares."""
    for name in "ab":
        Worker(server, api, name).start()
    await asyncio.sleep(150)
    server.down = True
    await asyncio.sleep(10)
    Worker(server, api, "c").start()
    await asyncio.sleep(20)
    assert api.sent(150, 180, "c") == 0
    server.down = False
    await asyncio.sleep(180)
    assert api.sent(240, 360, "c") >= 0.7 * 40


async def test_one_lost_call_is_no_absence(server: LeaseServer, api: Api, caplog: pytest.LogCaptureFixture) -> None:
    worker = Worker(server, api).start()
    for _ in range(20):
        await asyncio.sleep(10)
        worker.client.cut = True
        await asyncio.sleep(0.1)
        worker.client.cut = False
    assert api.sent(60, 180) >= 0.85 * 120
    assert not warnings(caplog, "gives no usable answer")


async def test_slots_whose_leases_ended_while_the_server_was_away_are_leased_again_before_any_others(
    server: LeaseServer, api: Api
) -> None:
    """A server with leases on disk ends them as it starts: their slots are free there, and in use here."""
    for name in "ab":
        Worker(server, api, name, prediction_seconds=150.0).start()
    await asyncio.sleep(20)
    server.down = True
    for name in "cdef":
        Worker(server, api, name).start()
    await asyncio.sleep(100)
    assert api.in_flight == 10
    server.down = False
    await asyncio.sleep(5)
    assert server.leased(Kind.IN_FLIGHT) == 10
    await asyncio.sleep(600)
    assert all(api.sent(150, 700, name) >= 10 for name in "cdef")


async def test_a_process_that_is_cut_off_from_the_server_uses_nothing_that_others_lease_meanwhile(
    server: LeaseServer, api: Api
) -> None:
    cut = Worker(server, api, "cut").start()
    Worker(server, api, "other").start()
    await asyncio.sleep(100)
    cut.client.cut = True
    await asyncio.sleep(200)
    cut.client.cut = False
    await asyncio.sleep(120)
    assert api.sent(111, 300, "cut") == 0
    assert api.sent(200, 300, "other") >= 90
    assert api.sent(340, 420, "cut") >= 20


async def test_with_a_server_that_takes_seconds_for_an_answer_no_limit_is_passed_and_work_goes_on(api: Api) -> None:
    server = LeaseServer(latency_seconds=5.0)
    for name in "ab":
        Worker(server, api, name).start()
    await asyncio.sleep(400)
    assert api.sent(60, 400) >= 100


# ------------------------------------------------------- restarts, lost slots


async def test_after_a_restart_that_forgot_the_leases_no_limit_is_passed_and_the_loss_is_named(
    server: LeaseServer, api: Api, caplog: pytest.LogCaptureFixture
) -> None:
    Worker(server, api).start()
    await asyncio.sleep(100)
    server.restart()
    await asyncio.sleep(30)
    assert warnings(caplog, "prefect-eachlabs limits reset")
    assert api.sent(120, 130) == 0
    for kind in Kind:
        server.active[kind] = server.leased(kind)  # the reset
    await asyncio.sleep(170)
    assert api.sent(200, 300) >= 80
    assert len(warnings(caplog, "in-flight: forgotten")) == 1


async def test_who_waits_for_longer_than_leases_last_is_told_how_to_free_lost_slots(
    api: Api, caplog: pytest.LogCaptureFixture
) -> None:
    server = LeaseServer(limits={Kind.REQUESTS: 60, Kind.IN_FLIGHT: 10}, active={Kind.REQUESTS: 0, Kind.IN_FLIGHT: 10})
    worker = Worker(server, api).start()
    await asyncio.sleep(20)
    assert len(warnings(caplog, "10 of 10 slots in flight of account 'acme' that other processes hold")) == 1
    await asyncio.sleep(110)
    assert len(warnings(caplog, "`prefect-eachlabs limits reset` frees them")) == 1
    server.active[Kind.IN_FLIGHT] = 0
    await asyncio.sleep(10)
    assert api.in_flight == 10
    await worker.stop()


async def test_work_goes_on_with_the_slots_that_are_not_lost(api: Api) -> None:
    server = LeaseServer(limits={Kind.REQUESTS: 60}, active={Kind.REQUESTS: 24})
    Worker(server, api).start()
    await asyncio.sleep(300)
    assert api.sent(60, 300) >= 0.93 * 4 * 36


# -------------------------------------------------------------- whatever happens


async def test_a_fault_of_ours_does_not_leave_callers_waiting(
    api: Api, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(self: LeaseClient, *_: object) -> None:
        raise RuntimeError("never seen before")

    worker = Worker(LeaseServer(), api).start()
    await asyncio.sleep(100)
    with monkeypatch.context() as patch:
        patch.setattr(LeaseClient, "lease", broken)
        patch.setattr(LeaseClient, "renew", broken)
        await asyncio.sleep(100)
    await asyncio.sleep(160)
    await worker.stop()
    assert api.sent(300, 360) >= 45
    assert len(warnings(caplog, "which should not happen: RuntimeError('never seen before')")) == 2  # one a limit


@pytest.mark.parametrize("seed", range(8))
async def test_whatever_happens_no_minute_holds_more_than_the_limit(
    seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    random.seed(seed)
    limit, most = random.choice([(60, 10), (7, 3), (120, 20)])
    server, api = LeaseServer(latency_seconds=random.choice([0.005, 0.05, 0.5])), Api()

    workers: list[Worker] = []
    for step in range(24):
        what = random.choice(["join", "join", "kill", "stop", "restart", "wait", "cut", "down", "more"])
        if step == 0 or (what == "join" and len(workers) < 4):
            latency = random.choice([0.05, 0.3, 20.0])
            workers.append(
                Worker(
                    server,
                    api,
                    str(step),
                    requests_per_minute=limit,
                    max_in_flight=most,
                    latency_seconds=lambda latency=latency: random.uniform(0.01, latency),
                ).start(callers=random.choice([1, 5, 30]), pictures=random.choice([3, 1000]))
            )
        elif what == "kill" and workers:
            workers.pop(random.randrange(len(workers))).kill()
        elif what == "stop" and workers:
            await workers.pop(random.randrange(len(workers))).stop()
        elif what == "restart":
            server.restart()
        elif what == "cut" and workers:
            client = random.choice(workers).client
            client.cut = True
            asyncio.get_running_loop().call_later(random.choice([0.1, 1.0]), setattr, client, "cut", False)
        elif what == "down":
            server.down = True
            asyncio.get_running_loop().call_later(random.choice([1.0, 30.0, 100.0]), setattr, server, "down", False)
        elif what == "more" and workers:
            random.choice(workers).start(callers=3, pictures=10)
        await asyncio.sleep(random.choice([0.1, 5.0, 30.0, 90.0]))
    await asyncio.gather(*(worker.stop() for worker in workers))
    assert api.worst_window() <= limit
    assert api.most_in_flight <= most
    assert api.requests
