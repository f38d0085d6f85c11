"""Several processes share an account's limits over one Prefect server: in virtual time, against a fake that counts."""

from __future__ import annotations

import asyncio
import bisect
import itertools
import logging
import random
from collections.abc import Callable, Iterator

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from prefect_eachlabs.limits import SharedLots, lot_source_for
from prefect_eachlabs.limits.leases import Holding
from prefect_eachlabs.limits.lot import fair_share
from prefect_eachlabs.pacing import Kind, LocalLots, Place, Places
from prefect_eachlabs.settings import AccountSettings
from tests.lease_server import LeaseClient, LeaseServer
from tests.virtual_time import run

WINDOW_SECONDS = 60.0
PREDICTION_SECONDS = 5.0


@pytest.fixture(autouse=True)
def the_same_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    random.seed(20261122)
    serial = itertools.count(1)
    monkeypatch.setattr("secrets.randbits", lambda bits: next(serial) * 7919 % 1000)


def now() -> float:
    return asyncio.get_running_loop().time()


class Api:
    """What the API sees of all processes: requests between sending and answer, predictions in flight."""

    def __init__(self) -> None:
        self.requests: list[tuple[float, float, str]] = []
        self.in_flight = 0
        self.most_in_flight = 0

    def worst_window(self) -> int:
        """The most requests that can have arrived within 60 s, wherever each arrived between sending and answer."""
        sent = sorted(request[0] for request in self.requests)
        answered = sorted(request[1] for request in self.requests)
        return max(
            (bisect.bisect_right(sent, at) - bisect.bisect_right(answered, at - WINDOW_SECONDS) for at in sent),
            default=0,
        )

    def sent(self, begin: float, end: float, name: str | None = None) -> int:
        return sum(begin <= at < end for at, _, who in self.requests if name in (None, who))


class Worker:
    """A process with callers that each make one picture after the other: a place in flight, a POST, one question."""

    def __init__(
        self,
        server: LeaseServer,
        api: Api,
        name: str = "a",
        *,
        requests_per_minute: int | None = 60,
        max_in_flight: int | None = 10,
        latency_seconds: Callable[[], float] = lambda: random.uniform(0.05, 0.3),
    ) -> None:
        settings = AccountSettings(
            api_key="key", requests_per_minute=requests_per_minute, max_in_flight=max_in_flight, account="acme"
        )
        self.client = server.client()
        self.lots = SharedLots(settings, self.client)
        self.places = Places(self.lots)
        self.api = api
        self.name = name
        self.latency_seconds = latency_seconds
        self.callers: list[asyncio.Task[None]] = []

    def start(self, callers: int = 30, pictures: int = 1_000_000) -> Worker:
        self.callers += [asyncio.ensure_future(self._make(pictures)) for _ in range(callers)]
        return self

    async def request(self, *, question: bool = False) -> None:
        place = await self.places.take_request(question=question)
        sent_at = now()
        entry = (sent_at, float("inf"), self.name)
        self.api.requests.append(entry)
        try:
            await asyncio.sleep(self.latency_seconds())
        finally:  # a killed process's request was answered as well
            self.api.requests[self.api.requests.index(entry)] = (sent_at, now(), self.name)
        place.done()

    async def _make(self, pictures: int) -> None:
        for _ in range(pictures):
            place = await self.places.take_in_flight()
            await self.request()
            self.api.in_flight += 1
            self.api.most_in_flight = max(self.api.most_in_flight, self.api.in_flight)
            asyncio.get_running_loop().call_later(PREDICTION_SECONDS, self._ended)
            await asyncio.sleep(PREDICTION_SECONDS)
            await self.request(question=True)
            place.done()

    def _ended(self) -> None:
        self.api.in_flight -= 1

    def kill(self) -> None:
        """As SIGKILL does: nothing is given back."""
        driver = self.lots._driver
        driver._closed = True
        for task in (*self.callers, *driver._calls, driver._task):
            if task is not None:
                task.cancel()

    async def stop(self) -> None:
        for task in self.callers:
            task.cancel()
        await asyncio.gather(*self.callers, return_exceptions=True)
        await self.lots.close()


async def takes(worker: Worker, kind: Kind, within_seconds: float) -> Place | None:
    """A place for one caller, if it comes in time."""
    take = worker.places.take_in_flight() if kind is Kind.IN_FLIGHT else worker.places.take_request()
    try:
        return await asyncio.wait_for(take, within_seconds)
    except asyncio.TimeoutError:
        return None


@pytest.fixture
def api() -> Iterator[Api]:
    """No test may send more than the page's limits allow; tests with other numbers use an `Api` of their own."""
    seen = Api()
    yield seen
    assert seen.worst_window() <= 60
    assert seen.most_in_flight <= 10


# -------------------------------------------------------------- where from


def test_a_prefect_server_in_the_settings_shares_the_limits_and_nothing_else_does() -> None:
    limited = AccountSettings(api_key="key")
    unlimited = AccountSettings(api_key="key", requests_per_minute=None, max_in_flight=None)
    assert isinstance(lot_source_for(limited), LocalLots)
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:4200/api"}):
        assert isinstance(lot_source_for(limited), SharedLots)
        assert isinstance(lot_source_for(unlimited), LocalLots)


# ------------------------------------------------------------------ fair share


@pytest.mark.parametrize(
    ("limit", "claims", "share"),
    [
        (60, {}, 60),
        (60, {2: None}, 30),
        (60, {2: None, 3: None, 4: None}, 15),
        (60, {2: 6}, 54),
        (60, {2: 60}, 30),
        (60, {2: 6, 3: None}, 27),
        (60, {2: 6, 3: 50}, 27),
        (10, {2: None, 3: None, 4: None}, 3),
        (10, {-1: None, -2: None, 4: None}, 2),
    ],
)
def test_a_share_is_what_all_who_want_more_can_have_alike(
    limit: int, claims: dict[int, int | None], share: int
) -> None:
    assert fair_share(limit, claims, 1) == (share, False)


def test_more_processes_than_places_take_turns() -> None:
    assert fair_share(2, {2: None, 3: None}, 1) == (1, True)


@pytest.mark.parametrize("limit", range(1, 40))
def test_the_shares_of_all_hungry_processes_are_the_limit(limit: int) -> None:
    for count in range(1, limit + 1):
        shares = [
            fair_share(limit, {other: None for other in range(count) if other != me}, me)[0] for me in range(count)
        ]
        assert sum(shares) == limit
        assert max(shares) - min(shares) <= 1


def test_a_holding_survives_as_the_id_of_a_leases_holder() -> None:
    for kind in Kind:
        holding = Holding(process=2**48 - 1, kind=kind, slots=10_000)
        assert Holding.from_uuid(holding.to_uuid()) == holding


# ------------------------------------------------------------------------ pace


def test_one_process_keeps_the_full_pace_and_is_never_over(api: Api) -> None:
    async def story() -> None:
        Worker(LeaseServer(), api).start()
        await asyncio.sleep(600)

    run(story())
    assert api.sent(60, 600) >= 0.97 * 9 * 60


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_evenly_and_waste_nothing(api: Api, count: int) -> None:
    server = LeaseServer()

    async def story() -> None:
        for name in range(count):
            Worker(server, api, str(name)).start()
        await asyncio.sleep(420)

    run(story())
    sent = [api.sent(60, 420, str(name)) for name in range(count)]
    assert sum(sent) >= 0.94 * 6 * 60
    assert max(sent) <= 1.25 * min(sent)


def test_a_process_with_little_to_do_leaves_the_rest_to_the_others(api: Api) -> None:
    server = LeaseServer()

    async def story() -> None:
        Worker(server, api, "busy").start()
        Worker(server, api, "modest").start(callers=1)
        await asyncio.sleep(420)

    run(story())
    assert api.sent(60, 420) >= 0.94 * 6 * 60
    assert api.sent(60, 420, "modest") >= 6 * 60 / 6.5  # two requests for each of its pictures, as fast as it can


def test_few_calls_are_made_and_few_at_once(api: Api) -> None:
    server = LeaseServer()

    async def story() -> None:
        Worker(server, api).start()
        await asyncio.sleep(300)

    run(story())
    assert server.most_under_way <= 3
    assert len(server.calls) <= 300 * 1.7


def test_a_big_account_is_leased_in_big_lots() -> None:
    server, api = LeaseServer(), Api()

    async def story() -> None:
        Worker(server, api, requests_per_minute=1200, max_in_flight=100).start(callers=120)
        await asyncio.sleep(150)

    run(story())
    assert api.worst_window() <= 1200
    assert api.most_in_flight <= 100
    assert api.sent(60, 120) >= 0.9 * 1200
    assert len(server.calls) <= 150 * 5


# ------------------------------------------------------- who joins, who is killed


def test_a_process_that_joins_gets_its_part_within_15_seconds(api: Api) -> None:
    server = LeaseServer()
    joined_at: list[float] = []

    async def story() -> None:
        Worker(server, api, "first").start()
        for name, at in (("second", 150.0), ("third", 330.0)):
            await asyncio.sleep(at - now())
            Worker(server, api, name).start()
            joined_at.append(now())
        await asyncio.sleep(180)

    run(story())
    for name, at, part in (("second", joined_at[0], 30), ("third", joined_at[1], 20)):
        assert api.sent(at, at + 15, name) >= 1
        assert api.sent(at + 15, at + 75, name) >= 0.75 * part
        assert api.sent(at + 75, at + 135, name) >= 0.9 * part


def test_a_killed_process_gives_its_part_back_when_its_leases_end(api: Api) -> None:
    server = LeaseServer()

    async def story() -> None:
        Worker(server, api, "survivor").start()
        killed = Worker(server, api, "killed").start()
        await asyncio.sleep(180)
        killed.kill()
        await asyncio.sleep(300)

    run(story())
    assert api.sent(180.5, 480, "killed") == 0
    assert api.sent(180 + 75 + 15, 180 + 75 + 15 + 60, "survivor") >= 45
    assert api.sent(360, 480, "survivor") >= 0.95 * 120


def test_a_process_that_is_done_gives_everything_back_and_asks_nothing_more(api: Api) -> None:
    server = LeaseServer()

    async def story() -> None:
        worker = Worker(server, api).start(callers=10, pictures=2)
        await asyncio.gather(*worker.callers)
        await asyncio.sleep(80)
        calls = len(server.calls)
        assert not server.leases
        assert server.active == {Kind.REQUESTS: 0, Kind.IN_FLIGHT: 0}
        await asyncio.sleep(3600)
        assert len(server.calls) == calls

    run(story())


def test_closing_gives_back_what_is_not_in_use(api: Api) -> None:
    server = LeaseServer()

    async def story() -> None:
        worker = Worker(server, api)
        place = await takes(worker, Kind.IN_FLIGHT, 5)
        assert place is not None
        place.unused()
        await worker.stop()
        assert not server.leases
        assert worker.client.closed

    run(story())


# ----------------------------------------------------------------- single places


def test_an_in_flight_place_unused_for_ten_seconds_goes_back(api: Api) -> None:
    server = LeaseServer()

    async def story() -> None:
        worker = Worker(server, api)
        place = await takes(worker, Kind.IN_FLIGHT, 5)
        assert place is not None
        await asyncio.sleep(200)
        assert server.leased(Kind.IN_FLIGHT) == 1
        place.done()
        await asyncio.sleep(9.5)
        assert server.leased(Kind.IN_FLIGHT) == 1
        await asyncio.sleep(1)
        assert server.leased(Kind.IN_FLIGHT) == 0

    run(story())


def test_a_request_place_that_was_not_used_is_free_at_once(api: Api) -> None:
    async def story() -> None:
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

    run(story())


def test_the_lease_of_a_late_answer_lasts_until_it_has_cooled(api: Api) -> None:
    server = LeaseServer()

    async def story() -> None:
        worker = Worker(server, api, latency_seconds=lambda: 130.0)
        await worker.request()
        answered_at = now()
        await asyncio.sleep(0.1)
        worker.kill()
        while server.leased(Kind.REQUESTS):
            await asyncio.sleep(1)
            server.reap()
        assert now() >= answered_at + WINDOW_SECONDS

    run(story())


def test_without_limits_nothing_is_asked_of_the_server() -> None:
    server, api = LeaseServer(), Api()

    async def story() -> None:
        worker = Worker(server, api, requests_per_minute=None, max_in_flight=None).start(callers=100)
        await asyncio.sleep(20)
        assert api.most_in_flight == 100
        assert worker.lots.limit(Kind.REQUESTS) is None
        assert worker.lots.pressure(Kind.REQUESTS) == 0.0
        await worker.stop()

    run(story())
    assert not server.calls


def test_one_limit_may_be_absent() -> None:
    server, api = LeaseServer(), Api()

    async def story() -> None:
        Worker(server, api, requests_per_minute=None).start()
        await asyncio.sleep(120)

    run(story())
    assert api.most_in_flight == 10
    assert api.sent(60, 120) >= 200
    assert set(server.limits) == {Kind.IN_FLIGHT}


def test_processes_take_turns_when_there_are_fewer_places_than_processes() -> None:
    server, api = LeaseServer(), Api()

    async def story() -> None:
        for name in "abc":
            Worker(server, api, name, requests_per_minute=None, max_in_flight=1).start(callers=3)
        await asyncio.sleep(300)

    run(story())
    assert api.most_in_flight == 1
    assert all(api.sent(0, 300, name) >= 10 for name in "abc")


# -------------------------------------------------------- the server's own numbers


@pytest.mark.parametrize("server_limit", [30, 90])
def test_of_two_different_numbers_the_smaller_one_counts(caplog: pytest.LogCaptureFixture, server_limit: int) -> None:
    server, api = LeaseServer(limits={Kind.REQUESTS: server_limit}, active={Kind.REQUESTS: 0}), Api()

    async def story() -> None:
        for name in "ab":
            Worker(server, api, name).start()
            await asyncio.sleep(90)
        await asyncio.sleep(120)

    run(story())
    smaller = min(60, server_limit)
    assert api.worst_window() <= smaller
    assert api.sent(120, 300) >= 0.9 * 3 * smaller
    assert server.limits[Kind.REQUESTS] == server_limit
    assert sum(str(server_limit) in record.getMessage() for record in caplog.records) == 2  # once a process


def test_a_limit_lowered_by_an_operator_counts_within_a_minute_and_a_half() -> None:
    server, api = LeaseServer(), Api()

    async def story() -> None:
        Worker(server, api).start()
        await asyncio.sleep(120)
        server.limits[Kind.REQUESTS] = 20
        await asyncio.sleep(90)
        api.requests.clear()
        await asyncio.sleep(180)

    run(story())
    assert api.worst_window() <= 20


def test_a_limit_deleted_by_hand_is_made_again(api: Api) -> None:
    server = LeaseServer()

    async def story() -> None:
        Worker(server, api).start()
        await asyncio.sleep(100)
        del server.limits[Kind.REQUESTS], server.active[Kind.REQUESTS]
        await asyncio.sleep(100)

    run(story())
    assert server.limits[Kind.REQUESTS] == 60
    assert api.sent(140, 200) >= 30


# --------------------------------------------------------------- the server away


def warnings(caplog: pytest.LogCaptureFixture, words: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if words in record.getMessage()]


def test_with_the_server_away_each_process_goes_on_with_its_share_and_says_so_once(
    api: Api, caplog: pytest.LogCaptureFixture
) -> None:
    server = LeaseServer()

    async def story() -> None:
        for name in "ab":
            Worker(server, api, name).start()
        await asyncio.sleep(150)
        server.down = True
        await asyncio.sleep(300)
        server.down = False
        await asyncio.sleep(200)

    run(story())
    for name in "ab":
        assert api.sent(210, 450, name) >= 0.85 * 4 * 30
    assert api.sent(510, 630) >= 0.9 * 120
    assert len(warnings(caplog, "gives no usable answer")) == 2
    assert len(warnings(caplog, "answers again")) == 2


def test_a_server_that_never_answered_leaves_the_whole_limit_to_the_process(
    api: Api, caplog: pytest.LogCaptureFixture
) -> None:
    server = LeaseServer(down=True)

    async def story() -> None:
        worker = Worker(server, api).start()
        await asyncio.sleep(6)
        assert api.sent(0, 6) >= 10
        await asyncio.sleep(180)
        await worker.stop()

    run(story())
    assert api.sent(60, 180) >= 0.9 * 120
    assert len(warnings(caplog, "60 requests and 10 in-flight")) == 1


def test_one_lost_call_is_no_absence(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    server = LeaseServer()

    async def story() -> None:
        worker = Worker(server, api).start()
        for _ in range(20):
            await asyncio.sleep(10)
            worker.client.cut = True
            await asyncio.sleep(0.1)
            worker.client.cut = False

    run(story())
    assert api.sent(60, 180) >= 0.85 * 120
    assert not warnings(caplog, "gives no usable answer")


def test_leases_that_ended_while_the_server_was_away_are_made_up_for(api: Api) -> None:
    """A server with leases on disk reaps them as it starts: their places are free there, but in use here."""
    server = LeaseServer()

    async def story() -> None:
        Worker(server, api, "a").start()
        await asyncio.sleep(100)
        server.down = True
        await asyncio.sleep(120)
        server.down = False
        await asyncio.sleep(5)
        Worker(server, api, "b").start()
        await asyncio.sleep(200)

    run(story())


# ------------------------------------------------------- restarts, leaked places


def test_after_a_restart_that_forgot_the_leases_no_limit_is_passed_and_the_leak_is_named(
    api: Api, caplog: pytest.LogCaptureFixture
) -> None:
    server = LeaseServer()

    async def story() -> None:
        Worker(server, api).start()
        await asyncio.sleep(100)
        server.restart()
        await asyncio.sleep(30)
        assert warnings(caplog, "prefect-eachlabs limits reset")
        assert api.sent(120, 130) == 0
        for kind in Kind:
            server.active[kind] = server.leased(kind)  # the reset
        await asyncio.sleep(170)

    run(story())
    assert api.sent(200, 300) >= 80
    assert len(warnings(caplog, "places of eachlabs-requests-acme are leaked")) == 1


def test_a_process_that_finds_leaked_places_names_them_within_30_seconds_of_waiting(
    api: Api, caplog: pytest.LogCaptureFixture
) -> None:
    server = LeaseServer(limits={Kind.REQUESTS: 60, Kind.IN_FLIGHT: 10}, active={Kind.REQUESTS: 0, Kind.IN_FLIGHT: 10})

    async def story() -> None:
        worker = Worker(server, api).start()
        await asyncio.sleep(30)
        assert warnings(caplog, "10 of the 10 places of eachlabs-in-flight-acme are leaked")
        await asyncio.sleep(200)
        assert len(warnings(caplog, "are leaked")) == 1
        await asyncio.sleep(200)
        assert len(warnings(caplog, "are leaked")) == 2
        server.active[Kind.IN_FLIGHT] = 0
        await asyncio.sleep(10)
        assert api.in_flight == 10
        await worker.stop()

    run(story())


def test_work_goes_on_with_the_places_that_are_not_leaked(api: Api) -> None:
    server = LeaseServer(limits={Kind.REQUESTS: 60}, active={Kind.REQUESTS: 24})

    async def story() -> None:
        Worker(server, api).start()
        await asyncio.sleep(300)

    run(story())
    assert api.sent(60, 300) >= 0.93 * 4 * 36


def test_the_places_of_a_killed_process_are_not_called_leaked(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    server = LeaseServer()

    async def story() -> None:
        Worker(server, api, "survivor").start()
        killed = [Worker(server, api, str(number)).start() for number in range(2)]
        await asyncio.sleep(150)
        for number, worker in enumerate(killed):
            await asyncio.sleep(17 * number)
            worker.kill()
        await asyncio.sleep(60)
        Worker(server, api, "newcomer").start()
        await asyncio.sleep(150)

    run(story())
    assert not warnings(caplog, "leaked")


def test_a_server_that_lists_no_leases_still_keeps_the_limits(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    server = LeaseServer(lists_leases=False)

    async def story() -> None:
        for name in "ab":
            Worker(server, api, name).start()
        await asyncio.sleep(300)

    run(story())
    assert api.sent(60, 300) >= 0.85 * 4 * 60
    assert not warnings(caplog, "leaked")


# -------------------------------------------------------------- whatever happens


def test_a_fault_of_ours_does_not_leave_callers_waiting(
    api: Api, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(self: LeaseClient, kind: Kind, slots: int, process: int) -> None:
        raise RuntimeError("never seen before")

    async def story() -> None:
        worker = Worker(LeaseServer(), api).start()
        await asyncio.sleep(100)
        with monkeypatch.context() as patch:
            patch.setattr(LeaseClient, "lease", broken)
            patch.setattr(LeaseClient, "renew", broken)
            await asyncio.sleep(100)
        await asyncio.sleep(160)
        await worker.stop()

    run(story())
    assert api.sent(300, 360) >= 45
    assert len(warnings(caplog, "never seen before")) == 1


@pytest.mark.parametrize("seed", range(8))
def test_whatever_happens_no_minute_holds_more_than_the_limit(seed: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    random.seed(seed)
    limit, most = random.choice([(60, 10), (7, 3), (120, 20)])
    server, api = LeaseServer(latency_seconds=random.choice([0.005, 0.05, 0.5])), Api()

    async def story() -> None:
        workers: list[Worker] = []
        for step in range(24):
            what = random.choice(["join", "join", "kill", "stop", "restart", "wait", "cut", "more"])
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
            elif what == "more" and workers:
                random.choice(workers).start(callers=3, pictures=10)
            await asyncio.sleep(random.choice([0.1, 5.0, 30.0, 90.0]))
        await asyncio.gather(*(worker.stop() for worker in workers))

    run(story())
    assert api.worst_window() <= limit
    assert api.most_in_flight <= most
    assert api.requests
