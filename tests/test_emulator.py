"""The emulator's rules: keys, limits, the walk of statuses, money, the listing, uploads. Time moves by assignment."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from email.utils import parsedate_to_datetime
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from prefect_eachlabs.emulator import Emulator, EmulatorOptions, InProcessTransport, ManualClock
from prefect_eachlabs.emulator.uploads import MAX_UPLOAD_BYTES
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


# ------------------------------------------------------------------ predictions


def test_the_walk_of_statuses_ends_with_a_picture_and_its_cost() -> None:
    api = Api(service_seconds=5, settle_seconds=2)
    bought = api.buy()
    walk = []
    for moment in (0, 0.7, 0.8, 4.9, 5.0, 6.9, 7.0):
        api.clock.time = 1_000 + moment
        view = api.get(bought)
        walk.append((view["status"], view["metrics"]["cost"]))
    assert walk == [
        ("starting", 0),
        ("starting", 0),
        ("processing", 0),
        ("processing", 0),
        ("success", 0),
        ("success", 0),
        ("success", 0.039),
    ]
    assert view["input"] == {"prompt": "a red fox"}
    assert view["metrics"]["predict_time"] == 5
    assert view["output"] == f"http://emulator/files/{bought}.png"
    picture = api.call("GET", view["output"], headers={"X-API-Key": ""})
    assert picture.content.startswith(b"\x89PNG")
    assert picture.headers["content-type"] == "image/png"
    assert api.tallies()["downloads"] == 1


def test_service_times_are_drawn_around_the_mean_and_the_same_for_the_same_seed() -> None:
    def ends(seed: int) -> list[float]:
        emulator = Emulator(EmulatorOptions(seed=seed, service_seconds=5, spread=0.3), clock=ManualClock())
        order = {"model": "gemini", "input": {"prompt": "x"}}
        return [emulator.accept(order, key="k", base_url="http://emulator").ends for _ in range(200)]

    assert ends(1) == ends(1) != ends(2)
    assert 4.7 < sum(ends(1)) / 200 < 5.3
    assert 1 <= min(ends(1)) < 4 < 6 < max(ends(1)) <= 15


@pytest.mark.parametrize("slash", ["", "/"])
def test_both_slash_forms_lead_to_the_same(slash: str) -> None:
    api = Api()
    order = {"model": "gemini", "version": "v", "input": {"prompt": "a fox"}}
    answer = api.call("POST", f"/v1/prediction{slash}", json=order)
    assert answer.json()["status"] == "success"
    assert api.call("GET", f"/v1/prediction/{answer.json()['predictionID']}{slash}").status_code == 200


def test_a_cancelled_prediction_stays_cancelled_and_costs_nothing() -> None:
    api = Api()
    bought = api.buy()
    api.clock.time += 1
    said = api.call("POST", f"/v1/prediction/{bought}/cancel").json()
    assert said == {"status": "cancelled", "message": "Prediction canceled successfully", "predictionID": bought}
    api.clock.time += 100
    assert api.get(bought)["status"] == "cancelled"
    assert api.get(bought)["metrics"] == {"predict_time": 1.0, "cost": 0}
    assert (api.tallies()["cancelled"], api.tallies()["cost_usd"]) == (1, 0)
    assert api.rows()[0]["status"] == "cancelled"


def test_a_cancel_after_the_end_changes_nothing() -> None:
    api = Api()
    bought = api.buy()
    api.clock.time += 5
    assert api.call("POST", f"/v1/prediction/{bought}/cancel").status_code == 200
    assert api.get(bought)["status"] == "success"


def test_an_unknown_prediction_is_a_404() -> None:
    api = Api()
    for method, path in (("GET", "/v1/prediction/none"), ("POST", "/v1/prediction/none/cancel")):
        answer = api.call(method, path)
        assert (answer.status_code, answer.json()) == (404, {"error": "Prediction not found"})
    assert api.call("GET", "/v1/nowhere").json() == {"error": "Not Found"}
    assert api.call("PUT", "/v1/prediction").status_code == 405


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"{", 400, "invalid request body"),
        (b"[]", 400, "invalid request body"),
        (b'{"model": "gemini", "input": {"prompt": "\\ud800"}}', 400, "invalid request body"),
        (b"[" * 100_000, 400, "invalid request body"),
        (b"x" * (4 * 1024 * 1024 + 1), 413, "request body too large"),
        (b'{"input": {"prompt": "a"}}', 400, "model is required"),
        (b'{"model": "gemini"}', 400, "input is required"),
        (b'{"model": "gemini", "input": "a"}', 400, "input is required"),
        (b'{"model": "gemini", "version": null, "input": {"prompt": "a"}}', 400, "version must be a string"),
        (b'{"model": "gemini", "webhook_url": "", "input": {"prompt": "a"}}', 400, "webhook_url must be"),
        (b'{"model": "gemini", "webhook_url": "ftp://x", "input": {"prompt": "a"}}', 400, "webhook_url must be"),
        (b'{"model": "no-such-model", "input": {"prompt": "a"}}', 404, "model not found"),
        (b'{"model": "gemini", "input": {}}', 400, "does not match the model's request_schema"),
        (b'{"model": "gemini", "input": {"prompt": ""}}', 400, "does not match the model's request_schema"),
        (b'{"model": "flux-1-1-pro", "input": {"prompt": "a", "mood": 1}}', 400, "does not match the model's"),
    ],
    ids=lambda value: str(value[:50]) if isinstance(value, bytes) else None,
)
def test_a_wrong_order_is_refused_and_costs_nothing(body: bytes, status: int, said: str) -> None:
    api = Api()
    answer = api.call("POST", "/v1/prediction/", content=body)
    assert (answer.status_code, said in answer.json()["error"]) == (status, True), answer.text
    assert api.tallies()["billed"] == 0


def test_the_api_of_2025_wanted_a_version() -> None:
    api = Api(require_version=True)
    assert api.create().status_code == 400
    assert api.create(version="2.0-flash-exp-image-generation").status_code == 200


def test_without_strict_models_any_model_is_taken() -> None:
    api = Api(strict_models=False)
    assert api.call("POST", "/v1/prediction", json={"model": "mine", "input": {}}).status_code == 200


def test_a_model_with_several_outputs_puts_out_a_list_and_costs_for_each() -> None:
    api = Api()
    order = {"model": "imagen-4", "input": {"prompt": "a fox", "num_images": 3}}
    bought = api.call("POST", "/v1/prediction", json=order).json()["predictionID"]
    api.clock.time += 5
    urls = api.get(bought)["output"]
    assert len(urls) == 3
    pictures = {api.call("GET", url, headers={"X-API-Key": ""}).content for url in urls}
    assert len(pictures) == 3
    assert api.tallies()["cost_usd"] == pytest.approx(3 * 0.039)
    assert api.call("GET", f"/files/{bought}-4.png").status_code == 404


@pytest.mark.parametrize(("form", "magic"), [("jpeg", b"\xff\xd8"), ("webp", b"RIFF"), ("gif", b"GIF8")])
def test_other_formats_come_where_the_model_is_asked_for_them(form: str, magic: bytes) -> None:
    api = Api()
    order = {"model": "flux-1-1-pro", "input": {"prompt": "a fox", "output_format": form}}
    bought = api.call("POST", "/v1/prediction", json=order).json()["predictionID"]
    api.clock.time += 5
    url = api.get(bought)["output"]
    assert url.endswith(f".{form}")
    assert api.call("GET", url).content.startswith(magic)


def test_a_picture_is_there_at_the_end_and_not_before() -> None:
    api = Api()
    bought = api.buy()
    assert api.call("GET", f"/files/{bought}.png").status_code == 404
    api.clock.time += 5
    assert api.call("GET", f"/files/{bought}.png").status_code == 200


def test_long_polling_holds_a_get_until_the_end() -> None:
    api = Api(long_poll_seconds=60)
    bought = api.buy()

    async def story(http: httpx.AsyncClient) -> str:
        held = asyncio.ensure_future(http.get(f"/v1/prediction/{bought}"))
        for moment in (1, 2, 4.9):
            await _settled()
            api.clock.time = 1_000 + moment
        await _settled()
        assert not held.done()
        api.clock.time = 1_005
        return str((await held).json()["status"])

    assert api.together(story) == "success"


def test_long_polling_lets_go_after_its_time_or_a_cancel() -> None:
    api = Api(long_poll_seconds=2)
    first, second = api.buy("a"), api.buy("b")

    async def story(http: httpx.AsyncClient) -> list[str]:
        held = [asyncio.ensure_future(http.get(f"/v1/prediction/{bought}")) for bought in (first, second)]
        await _settled()
        await http.post(f"/v1/prediction/{first}/cancel")
        cancelled = (await held[0]).json()["status"]
        assert not held[1].done()
        api.clock.time += 2
        return [cancelled, (await held[1]).json()["status"]]

    assert api.together(story) == ["cancelled", "processing"]


async def _settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


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


@pytest.mark.parametrize("wrong", [{"service_seconds": -1}, {"max_in_flight": 0}, {"image_size_px": 5}, {"nonsense": 1}])
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


def test_an_echo_is_what_was_sent() -> None:
    api = Api()
    prompt = "  Cafe\u0301 – “naïve” 🦊 漢字  "
    bought = api.buy(prompt)
    assert api.get(bought)["input"] == {"prompt": prompt}
    assert json.loads(api.call("GET", f"/v1/prediction/{bought}").content)["input"]["prompt"] == prompt


def test_the_upload_cap_is_100_megabytes() -> None:
    assert MAX_UPLOAD_BYTES == 100_000_000
