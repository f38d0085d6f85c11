"""The emulator's rules: keys, limits, the walk of statuses, money, the listing, uploads. Time moves by assignment."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from email.utils import parsedate_to_datetime
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from prefect_eachlabs.testing.emulator import Emulator, EmulatorOptions, InProcessTransport, ManualClock
from tests.virtual_time import run

KEY = "a-test-key"


class Api:
    """The emulator, called without a socket, on a clock that stands still."""

    def __init__(self, key: str | None = KEY, **options: Any) -> None:
        self.clock = ManualClock(1_000)
        options = {"spread": 0.0, "image_size_px": 32, **options}
        self.emulator = Emulator(EmulatorOptions(**options), clock=self.clock, threads=False)
        self.transport = InProcessTransport(self.emulator)
        self.headers = {} if key is None else {"X-API-Key": key}

    def together(self, story: Callable[[httpx.AsyncClient], Awaitable[Any]]) -> Any:
        async def told() -> Any:
            async with httpx.AsyncClient(
                transport=self.transport, base_url="http://emulator", headers=self.headers
            ) as http:
                return await story(http)

        return asyncio.run(told())

    def call(self, method: str, path: str, **request: Any) -> httpx.Response:
        answer: httpx.Response = self.together(lambda http: http.request(method, path, **request))
        return answer

    def create(self, prompt: str = "a red fox", **body: Any) -> httpx.Response:
        return self.call("POST", "/v1/prediction/", json={"model": "gemini", "input": {"prompt": prompt}, **body})

    def buy(self, prompt: str = "a red fox", **body: Any) -> str:
        answer = self.create(prompt, **body)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["predictionID"])

    def get(self, prediction_id: str) -> dict[str, Any]:
        answer = self.call("GET", f"/v1/prediction/{prediction_id}")
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def rows(self, **query: Any) -> list[dict[str, Any]]:
        answer = self.call("GET", "/v1/executions", params=query)
        assert answer.status_code == 200, answer.text
        return list(answer.json()["executions"])

    def tallies(self) -> dict[str, Any]:
        return self.emulator.tallies()


async def settled() -> None:
    """Comes back when every task has gone as far as it gets while time stands still."""
    for _ in range(20):
        await asyncio.sleep(0)


# ------------------------------------------------------------------------- keys


@pytest.mark.parametrize(
    "headers", [{"X-API-Key": "k"}, {"Authorization": "Bearer k"}, {"authorization": "bearer k"}], ids=str
)
def test_both_auth_headers_are_taken(headers: dict[str, str]) -> None:
    api = Api(key=None, api_keys=["k"])
    assert api.call("GET", "/v1/executions", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers", [{}, {"X-API-Key": ""}, {"X-API-Key": "other"}, {"Authorization": "Basic k"}, {"Authorization": "k"}]
)
def test_without_a_good_key_the_answer_is_401_and_nothing_is_billed(headers: dict[str, str]) -> None:
    api = Api(key=None, api_keys=["k"])
    order = {"model": "gemini", "input": {"prompt": "a fox"}}
    answer = api.call("POST", "/v1/prediction/", json=order, headers=headers)
    assert answer.status_code == 401
    assert answer.json() == {"error": "Invalid or missing API key"}
    assert api.tallies()["unauthorized"] == 1
    assert api.tallies()["billed"] == 0


def test_any_key_is_good_when_none_are_named() -> None:
    assert Api(key="whatever").call("GET", "/v1/executions").status_code == 200


def test_keys_are_hashed_in_the_journal_and_hidden_in_the_options() -> None:
    api = Api(api_keys=[KEY])
    api.buy()
    desk = api.call("GET", "/_emulator/journal").text + api.call("GET", "/_emulator/").text + repr(api.emulator.options)
    assert KEY not in desk
    assert len(api.call("GET", "/_emulator/journal").json()["requests"][0]["key"]) == 12


def test_sending_a_key_both_ways_or_to_a_file_is_a_violation() -> None:
    api = Api()
    api.call("GET", "/v1/executions", headers={"Authorization": f"Bearer {KEY}"})
    api.call("GET", "/files/none.png")
    assert api.tallies()["violations"] == {"both_auth_headers": 1, "key_sent_to_a_file_host": 1}


def test_the_catalogue_is_public() -> None:
    api = Api(key=None)
    assert api.call("GET", "/v1/models").status_code == 200
    assert api.call("GET", "/v1/model", params={"slug": "gemini"}).status_code == 200


def test_the_request_id_comes_back_or_is_made() -> None:
    api = Api()
    sent = api.call("GET", "/v1/executions", headers={"X-Request-Id": "mine-1"})
    assert sent.headers["x-request-id"] == "mine-1"
    assert len(api.call("GET", "/v1/executions").headers["x-request-id"]) == 36
    assert api.emulator.journal.entries[0].request_id == "mine-1"


# ----------------------------------------------------------------------- limits


def test_the_60th_request_of_a_minute_is_let_in_and_the_61st_is_not() -> None:
    api = Api()
    assert [api.call("GET", "/v1/executions").status_code for _ in range(61)] == [200] * 60 + [429]
    tallies = api.tallies()
    assert (tallies["rejected_429"], tallies["worst_window"]) == (1, 61)
    assert tallies["violations"] == {"over_requests_per_minute": 1}


def test_a_place_of_the_window_is_free_60_seconds_later_and_not_before() -> None:
    api = Api(requests_per_minute=2)
    api.call("GET", "/v1/executions")
    api.clock.time += 20
    api.call("GET", "/v1/executions")
    api.clock.time = 1_059.999
    assert api.call("GET", "/v1/executions").status_code == 429
    api.clock.time = 1_060
    assert [api.call("GET", "/v1/executions").status_code for _ in range(2)] == [200, 429]
    api.clock.time = 1_080
    assert api.call("GET", "/v1/executions").status_code == 200


def test_requests_are_counted_for_each_key_and_downloads_are_not() -> None:
    api = Api(requests_per_minute=1)
    assert api.call("GET", "/v1/executions").status_code == 200
    assert api.call("GET", "/v1/executions", headers={"X-API-Key": "other"}).status_code == 200
    assert api.call("GET", "/files/x.png", headers={"X-API-Key": ""}).status_code == 404
    assert api.call("GET", "/v1/models").status_code == 429, "a request with a key counts wherever it goes"
    assert api.call("GET", "/v1/models", headers={"X-API-Key": ""}).status_code == 200


def test_rejected_requests_keep_the_gate_shut_only_when_asked() -> None:
    for counted, last in ((False, 200), (True, 429)):
        api = Api(requests_per_minute=1, count_rejected=counted)
        api.call("GET", "/v1/executions")
        api.clock.time += 30
        assert api.call("GET", "/v1/executions").status_code == 429
        api.clock.time += 30
        assert api.call("GET", "/v1/executions").status_code == last


def test_the_10th_in_flight_is_taken_and_the_11th_is_not() -> None:
    api = Api(requests_per_minute=None)
    assert [api.create().status_code for _ in range(11)] == [200] * 10 + [429]
    refused = api.create()
    assert refused.json()["status"] == 429
    assert "10 predictions are in flight" in refused.json()["details"]
    tallies = api.tallies()
    assert (tallies["billed"], tallies["worst_in_flight"], tallies["rejected_429"]) == (10, 10, 2)
    api.clock.time += 5
    assert api.create().status_code == 200


def test_a_cancelled_prediction_gives_its_place_back_at_once() -> None:
    api = Api(max_in_flight=1)
    first = api.buy()
    assert api.create().status_code == 429
    api.call("POST", f"/v1/prediction/{first}/cancel")
    assert api.create().status_code == 200


def test_without_limits_nothing_is_refused_and_the_worst_is_known() -> None:
    api = Api(requests_per_minute=None, max_in_flight=None)
    for _ in range(70):
        api.buy()
    assert (api.tallies()["worst_window"], api.tallies()["worst_in_flight"]) == (70, 70)


def test_retry_after_comes_as_asked() -> None:
    seconds = Api(requests_per_minute=1, retry_after="seconds")
    seconds.call("GET", "/v1/executions")
    seconds.clock.time += 12.5
    assert seconds.call("GET", "/v1/executions").headers["retry-after"] == "48"
    date = Api(max_in_flight=1, retry_after="date")
    date.buy()
    wait = parsedate_to_datetime(date.create().headers["retry-after"]) - date.emulator.calendar.true_date(1_000)
    assert 4 < wait.total_seconds() <= 5, "a date has no fractions of a second"
    none = Api(requests_per_minute=1)
    none.call("GET", "/v1/executions")
    assert "retry-after" not in none.call("GET", "/v1/executions").headers


def test_a_balance_that_does_not_cover_what_is_in_flight_is_a_402() -> None:
    api = Api(balance_usd=0.08, cost_usd=0.039)
    api.buy()
    second = api.buy()
    refused = api.create()
    assert (refused.status_code, refused.json()["error"]) == (402, "insufficient balance")
    api.call("POST", f"/v1/prediction/{second}/cancel")
    assert api.create().status_code == 200, "cancelled predictions cost nothing"
    assert api.tallies()["billed"] == 3


# ---------------------------------------------------------------------- tallies


def test_an_input_that_was_billed_twice_is_named_with_its_predictions() -> None:
    api = Api()
    twice = [api.buy("a", version="1"), api.buy("a", version="1")]
    api.buy("a", version="2")
    api.buy("b", version="1")
    tallies = api.tallies()
    assert (tallies["billed"], tallies["distinct_inputs"], tallies["billed_too_often"]) == (4, 3, 1)
    assert tallies["billed_by_input"] == [
        {"model": "gemini", "version": "1", "input": {"prompt": "a"}, "billed": 2, "prediction_ids": twice}
    ]


def test_the_journal_tells_each_request_and_the_desk_is_not_in_it() -> None:
    api = Api()
    bought = api.buy()
    api.clock.time += 1
    api.get(bought)
    assert api.call("GET", "/_emulator/tallies").json()["requests_by_endpoint"] == {"create": 1, "get": 1}
    journal = api.call("GET", "/_emulator/journal").json()
    assert [(row["method"], row["endpoint"], row["status"], row["prediction_id"]) for row in journal["requests"]] == [
        ("POST", "create", 200, bought),
        ("GET", "get", 200, bought),
    ]
    assert [row["at"] for row in journal["requests"]] == [1_000, 1_001]
    assert (journal["total"], journal["dropped"]) == (2, 0)
    later = api.call("GET", "/_emulator/journal", params={"after": 1}).json()["requests"]
    assert [row["number"] for row in later] == [2]


def test_journal_and_ledger_are_bounded_and_the_tallies_go_on() -> None:
    api = Api(keep_requests=3, keep_predictions=2, requests_per_minute=None, service_seconds=0)
    bought = [api.buy(str(number)) for number in range(5)]
    assert api.call("GET", "/_emulator/journal").json()["dropped"] == 2
    assert [api.call("GET", f"/v1/prediction/{one}").status_code for one in bought] == [404, 404, 404, 200, 200]
    assert (api.tallies()["billed"], api.tallies()["succeeded"]) == (5, 5)


def test_a_reset_forgets_all_but_the_options() -> None:
    api = Api(requests_per_minute=2)
    api.buy()
    api.call("POST", "/_emulator/reset")
    tallies = api.tallies()
    assert (tallies["billed"], tallies["requests"], tallies["worst_window"]) == (0, 0, 0)
    assert [api.create().status_code for _ in range(3)] == [200, 200, 429]


@pytest.mark.parametrize(
    "wrong", [{"service_seconds": -1}, {"max_in_flight": 0}, {"image_size_px": 5}, {"nonsense": 1}]
)
def test_options_out_of_bounds_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        EmulatorOptions(**wrong)


def test_it_lives_in_virtual_time_too() -> None:
    transport = InProcessTransport(EmulatorOptions(spread=0))

    async def story() -> tuple[str, float]:
        async with httpx.AsyncClient(
            transport=transport, base_url="http://emulator", headers={"X-API-Key": KEY}, timeout=None
        ) as http:
            order = {"model": "gemini", "input": {"prompt": "a fox"}}
            bought = (await http.post("/v1/prediction/", json=order)).json()["predictionID"]
            await asyncio.sleep(5)
            view = (await http.get(f"/v1/prediction/{bought}")).json()
            assert (await http.get(view["output"])).content.startswith(b"\x89PNG")
            return view["status"], asyncio.get_running_loop().time()

    assert run(story()) == ("success", 5.0)
    assert transport.emulator.tallies()["succeeded"] == 1
