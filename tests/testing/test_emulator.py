"""The emulator's rules: keys, limits, the walk of statuses, money, lists and uploads."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta, timezone
from email.utils import parsedate_to_datetime
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from prefect_eachlabs.testing.emulator import Emulator, EmulatorOptions, state
from tests.testing.emulator_kit import KEY, ORDER, Api, in_virtual_time

# ------------------------------------------------------------------------- keys


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"X-API-Key": "k"}, 200),
        ({"Authorization": "Bearer k"}, 200),
        ({"authorization": "bearer k"}, 200),
        ({}, 401),
        ({"X-API-Key": ""}, 401),
        ({"X-API-Key": "other"}, 401),
        ({"Authorization": "Basic k"}, 401),
    ],
    ids=str,
)
def test_a_good_key_is_wanted_in_either_header(headers: dict[str, str], status: int) -> None:
    api = Api(key=None, api_keys=["k"])
    assert api.call("POST", "/v1/prediction/", json=ORDER, headers=headers).status_code == status
    assert api.tallies()["billed"] == (status == 200)
    assert api.tallies()["unauthorized"] == (status == 401)


def test_the_catalogue_is_public_and_any_key_is_good_when_none_are_named() -> None:
    assert Api(key=None).call("GET", "/v1/model", params={"slug": "gemini"}).status_code == 200
    assert Api(key="whatever").call("GET", "/v1/executions").status_code == 200


def test_keys_are_hashed_in_the_journal_and_hidden_in_the_options() -> None:
    api = Api(api_keys=[KEY])
    api.buy()
    judge = api.call("GET", "/_emulator/journal").text + api.call("GET", "/_emulator/").text
    assert KEY not in judge + repr(api.emulator.options)
    assert len(api.call("GET", "/_emulator/journal").json()["requests"][0]["key"]) == 12


def test_sending_a_key_both_ways_or_to_a_file_is_a_violation() -> None:
    api = Api()
    api.call("GET", "/v1/executions", headers={"Authorization": f"Bearer {KEY}"})
    api.call("GET", "/files/none.png")
    assert api.tallies()["violations"] == {"both_auth_headers": 1, "key_sent_to_a_file_host": 1}


# ----------------------------------------------------------------------- limits


def test_the_60th_request_of_a_minute_is_let_in_and_the_61st_is_not() -> None:
    api = Api()
    assert [api.call("GET", "/v1/executions").status_code for _ in range(61)] == [200] * 60 + [429]
    tallies = api.tallies()
    assert (tallies["rejected_429"], tallies["worst_window"]) == (1, 61)
    assert tallies["violations"] == {"over_requests_per_minute": 1}


def test_a_place_of_the_window_is_free_60_seconds_later_and_not_before() -> None:
    api = Api(requests_per_minute=2)
    seen = []
    for moment in (0, 20, 59.999, 60, 60, 80):
        api.time = 1_000 + moment
        seen.append(api.call("GET", "/v1/executions").status_code)
    assert seen == [200, 200, 429, 200, 429, 200]


def test_requests_are_counted_for_each_key_and_downloads_are_not() -> None:
    api = Api(requests_per_minute=1)
    assert api.call("GET", "/v1/executions").status_code == 200
    assert api.call("GET", "/v1/executions", headers={"X-API-Key": "other"}).status_code == 200
    assert api.download("/files/x.png").status_code == 404
    assert api.call("GET", "/v1/models").status_code == 429, "a request with a key counts wherever it goes"


def test_rejected_requests_keep_the_gate_shut_only_when_asked() -> None:
    for counted, last in ((False, 200), (True, 429)):
        api = Api(requests_per_minute=1, count_rejected=counted)
        api.call("GET", "/v1/executions")
        api.time += 30
        assert api.call("GET", "/v1/executions").status_code == 429
        api.time += 30
        assert api.call("GET", "/v1/executions").status_code == last


def test_the_10th_in_flight_is_taken_and_the_11th_is_not_until_one_ends() -> None:
    api = Api(requests_per_minute=None)
    bought = [api.buy() for _ in range(10)]
    refused = api.create()
    assert (refused.status_code, refused.json()["status"]) == (429, 429)
    assert "10 predictions are in flight" in refused.json()["details"]
    api.call("POST", f"/v1/prediction/{bought[0]}/cancel")
    assert api.create().status_code == 200, "a cancelled one gives its slot back at once"
    api.time += 5
    assert api.create().status_code == 200
    tallies = api.tallies()
    assert (tallies["billed"], tallies["worst_in_flight"], tallies["rejected_429"]) == (12, 10, 1)


def test_retry_after_comes_as_asked() -> None:
    seconds = Api(requests_per_minute=1, retry_after="seconds")
    seconds.call("GET", "/v1/executions")
    seconds.time += 12.5
    assert seconds.call("GET", "/v1/executions").headers["retry-after"] == "48"
    date = Api(max_in_flight=1, retry_after="date", clock_skew_seconds=3_600)
    date.buy()
    headers = date.create().headers
    wait = parsedate_to_datetime(headers["retry-after"]) - parsedate_to_datetime(headers["date"])
    assert wait.total_seconds() == 5
    assert "retry-after" not in Api(max_in_flight=1).create().headers


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
    bought, walk = api.buy(), []
    assert api.download(f"/files/{bought}.png").status_code == 404
    for moment in (0, 0.7, 0.8, 4.9, 5.0, 6.9, 7.0):
        api.time = 1_000 + moment
        view = api.get(bought)
        walk.append((view["status"], view["metrics"]["cost"]))
    assert walk == [
        *[("starting", 0)] * 2,
        *[("processing", 0)] * 2,
        *[("success", 0)] * 2,
        ("success", 0.039),
    ]
    assert (view["input"], view["metrics"]["predict_time"]) == ({"prompt": "a red fox"}, 5)
    assert view["output"] == f"http://emulator/files/{bought}.png"
    picture = api.download(view["output"])
    assert picture.content.startswith(b"\x89PNG")
    assert picture.headers["content-type"] == "image/png"
    assert api.tallies()["downloads"] == 1


def test_a_cancelled_prediction_stays_cancelled_and_costs_nothing() -> None:
    api = Api()
    bought, ended = api.buy(), api.buy("another")
    api.time += 1
    said = api.call("POST", f"/v1/prediction/{bought}/cancel").json()
    assert said == {"status": "cancelled", "message": "Prediction canceled successfully", "predictionID": bought}
    api.time += 100
    assert api.call("POST", f"/v1/prediction/{ended}/cancel").status_code == 200
    assert (api.get(bought)["status"], api.get(ended)["status"]) == ("cancelled", "success")
    assert api.get(bought)["metrics"] == {"predict_time": 1.0, "cost": 0}
    assert (api.tallies()["cancelled"], api.tallies()["cost_usd"]) == (1, 0.039)


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"{", 400, "invalid request body"),
        (b"[]", 400, "invalid request body"),
        (b'{"model": "gemini", "input": {"prompt": "\\ud800"}}', 400, "invalid request body"),
        (b"[" * 100_000, 400, "invalid request body"),
        (b"x" * (4 * 1024 * 1024 + 1), 413, "request body too large"),
        (b'{"input": {"prompt": "a"}}', 400, "model is required"),
        (b'{"model": "gemini", "input": "a"}', 400, "input is required"),
        (b'{"model": "gemini", "version": null, "input": {"prompt": "a"}}', 400, "version must be a string"),
        (b'{"model": "gemini", "webhook_url": "ftp://x", "input": {"prompt": "a"}}', 400, "webhook_url must be"),
        (b'{"model": "no-such-model", "input": {"prompt": "a"}}', 404, "model not found"),
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


def test_long_polling_holds_a_get_until_the_end_its_time_or_a_cancel() -> None:
    async def story(http: httpx.AsyncClient, _: Emulator) -> list[tuple[float, str]]:
        async def held(prompt: str, cancel_after: float | None = None) -> tuple[float, str]:
            body = {"model": "gemini", "input": {"prompt": prompt}}
            bought = (await http.post("/v1/prediction/", json=body)).json()["predictionID"]
            began, asking = loop.time(), asyncio.ensure_future(http.get(f"/v1/prediction/{bought}"))
            if cancel_after is not None:
                await asyncio.sleep(cancel_after)
                await http.post(f"/v1/prediction/{bought}/cancel")
            answer = await asking
            return round(loop.time() - began, 3), answer.json()["status"]

        loop = asyncio.get_running_loop()
        return [await held("slow"), await held("quick"), await held("slow", cancel_after=2)]

    faults = ["prediction:slow,seconds=100,matching=slow"]
    told = in_virtual_time(story, long_poll_seconds=60, service_seconds=5, faults=faults)
    assert told == [(60, "processing"), (5, "success"), (2, "cancelled")]


# ----------------------------------------------------------------------- tallies


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


def test_the_journal_tells_each_request_and_the_judge_is_not_in_it() -> None:
    api = Api()
    bought = api.buy()
    api.time += 1
    api.get(bought)
    assert api.call("GET", "/_emulator/tallies").json()["requests_by_endpoint"] == {"create": 1, "get": 1}
    journal = api.call("GET", "/_emulator/journal").json()
    told = [(row["at"], row["method"], row["endpoint"], row["status"]) for row in journal["requests"]]
    assert told == [(1_000, "POST", "create", 200), (1_001, "GET", "get", 200)]
    assert {row["prediction_id"] for row in journal["requests"]} == {bought}
    assert (journal["total"], journal["dropped"]) == (2, 0)
    later = api.call("GET", "/_emulator/journal", params={"after": 1}).json()["requests"]
    assert [row["number"] for row in later] == [2]


def test_journal_predictions_and_uploads_are_bounded_and_the_tallies_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "_KEPT_UPLOADS", 1)
    api = Api(requests_per_minute=None, service_seconds=0, keep_requests=3, keep_predictions=2)
    bought = [api.buy(str(number)) for number in range(5)]
    assert api.call("GET", "/_emulator/journal").json()["dropped"] == 2
    assert [api.call("GET", f"/v1/prediction/{one}").status_code for one in bought] == [404, 404, 404, 200, 200]
    assert (api.tallies()["billed"], api.tallies()["succeeded"]) == (5, 5)
    first, second = (api.emulator.uploads.presign("image/png") for _ in range(2))
    assert (api.emulator.uploads.get(first.id), api.emulator.uploads.get(second.id)) == (None, second)


def test_a_reset_forgets_all_but_the_options() -> None:
    api = Api(requests_per_minute=2)
    api.buy()
    api.call("POST", "/_emulator/reset")
    tallies = api.tallies()
    assert (tallies["billed"], tallies["requests"], tallies["worst_window"]) == (0, 0, 0)
    assert [api.create().status_code for _ in range(3)] == [200, 200, 429]


@pytest.mark.parametrize(
    "wrong", [{"service_seconds": -1}, {"max_in_flight": 0}, {"image_size_px": 5}, {"nonsense": 1}, {"faults": "x"}]
)
def test_options_out_of_bounds_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        EmulatorOptions(**wrong)


def test_the_defaults_are_those_of_the_models_page() -> None:
    options = EmulatorOptions()
    assert (options.requests_per_minute, options.max_in_flight, options.service_seconds) == (60, 10, 5)


# ------------------------------------------------------------------------ lists


def test_executions_come_newest_first_in_words_of_their_own_and_without_inputs() -> None:
    api = Api(service_seconds=10, faults=["prediction:fail,at=2"])
    good, bad, cancelled = api.buy("a"), api.buy("b"), api.buy("c")
    api.call("POST", f"/v1/prediction/{cancelled}/cancel")
    words = []
    for moment in (1_000, 1_005, 1_010):
        api.time = moment
        rows = api.rows()
        words.append([row["status"] for row in rows])
    assert [row["id"] for row in rows] == [cancelled, bad, good]
    assert words == [
        ["cancelled", "created", "created"],
        ["cancelled", "starting", "starting"],
        ["cancelled", "error", "success"],
    ]
    assert (rows[2]["output"], rows[2]["execution_cost"]) == (f"http://emulator/files/{good}.png", 0.039)
    assert (rows[1]["output"], rows[1]["execution_cost"]) == (None, 0)
    assert all("input" not in row for row in rows)


def test_pages_are_cut_by_limit_and_offset_and_default_to_20() -> None:
    api = Api(requests_per_minute=None, max_in_flight=None, service_seconds=0, total_cap=12)
    bought = [api.buy(str(number)) for number in range(25)][::-1]
    assert [row["id"] for row in api.rows()] == bought[:20]
    assert [row["id"] for row in api.rows(limit=10, offset=20)] == bought[20:]
    totals = [api.page(limit=10, offset=offset) for offset in (0, 20)]
    assert [(page["total_count"], page["total_capped"]) for page in totals] == [(12, True), (25, False)]


def test_executions_can_be_asked_for_by_model_and_time() -> None:
    api = Api()
    gemini = api.buy("a")
    api.time += 100
    imagen = api.buy(model="imagen-4")
    between = api.emulator.clock.date(1_050).isoformat()
    assert [row["id"] for row in api.rows(model="imagen-4")] == [imagen]
    assert [row["id"] for row in api.rows(**{"from": between})] == [imagen]
    assert [row["id"] for row in api.rows(to=between)] == [gemini]
    api.time += timedelta(days=91).total_seconds()
    assert api.rows() == [], "without a date: the last 90 days"
    assert len(api.rows(**{"from": "2000-01-01T00:00:00Z"})) == 2


def test_a_filter_that_the_emulator_does_not_have_is_not_ignored() -> None:
    assert Api().call("GET", "/v1/executions", params={"status": "error"}).status_code == 501


def test_a_listing_delay_shows_the_world_as_it_was() -> None:
    api = Api(listing_delay_seconds=10, service_seconds=5)
    bought, seen = api.buy(), []
    for moment in (1_000, 1_009.9, 1_010, 1_015):
        api.time = moment
        seen.append([row["status"] for row in api.rows()])
    assert seen == [[], [], ["created"], ["success"]]
    assert api.get(bought)["status"] == "success"


def test_dates_and_filters_are_off_by_the_skew() -> None:
    api = Api(clock_skew_seconds=3_600)
    api.buy()
    created = datetime.fromisoformat(api.rows()[0]["created_at"].replace("Z", "+00:00"))
    assert timedelta(minutes=55) < created - datetime.now(timezone.utc) < timedelta(minutes=65)
    answered = parsedate_to_datetime(api.call("GET", "/v1/executions").headers["date"])
    assert abs(answered - created) < timedelta(seconds=2), "the whole vendor's clock is off"
    assert api.rows(**{"from": (created - timedelta(seconds=1)).isoformat()}) != []
    assert api.rows(**{"from": (created + timedelta(seconds=1)).isoformat()}) == []


# ---------------------------------------------------------------------- uploads


def presigned(api: Api, content_type: str = "image/png") -> dict[str, Any]:
    answer = api.call("POST", "/v1/upload/presign", json={"content_type": content_type, "file_type": "image"})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def put(api: Api, url: str, body: bytes, headers: dict[str, str]) -> int:
    return api.call("PUT", url, content=body, headers={"X-API-Key": "", **headers}).status_code


def test_an_upload_with_the_required_headers_is_served_at_its_public_url() -> None:
    api = Api()
    upload = presigned(api)
    url, headers = upload["presigned_url"], upload["required_headers"]
    assert api.download(upload["public_url"]).status_code == 404
    assert put(api, url, b"x", {}) == put(api, url, b"x", {**headers, "content-type": "image/jpeg"}) == 403
    assert put(api, url.replace("Signature=", "Signature=0"), b"x", headers) == 403
    assert [put(api, url, b"bytes", headers) for _ in range(2)] == [200, 200]
    served = api.download(upload["public_url"])
    assert (served.content, served.headers["content-type"]) == (b"bytes", "image/png")
    assert (api.tallies()["uploads"], [*api.tallies()["uploaded_more_than_once"].values()]) == (2, [2])


def test_an_upload_at_the_cap_is_taken_and_one_byte_more_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert state.MAX_UPLOAD_BYTES == 100_000_000
    monkeypatch.setattr("prefect_eachlabs.testing.emulator.routes.MAX_UPLOAD_BYTES", 1_000)
    api = Api()
    upload = presigned(api)
    assert put(api, upload["presigned_url"], bytes(1_001), upload["required_headers"]) == 400
    assert put(api, upload["presigned_url"], bytes(1_000), upload["required_headers"]) == 200


def test_a_reference_that_was_never_uploaded_or_ends_too_early_is_a_violation() -> None:
    api = Api()
    upload = presigned(api)
    order = {"prompt": "a fox", "image_url": upload["public_url"]}
    bad = api.buy(input=order)
    put(api, upload["presigned_url"], b"x", upload["required_headers"])
    good = api.buy(input=order)
    signed = "https://b/k.png?X-Amz-Date=20200101T000000Z&X-Amz-Expires=60&X-Amz-Signature=x"
    api.buy(input={"prompt": "a fox", "image_url": signed})
    api.time += 20
    assert api.get(bad)["output"]["classification"]["category"] == "invalid_user_input"
    assert api.get(good)["status"] == "success"
    assert api.tallies()["violations"] == {"reference_not_uploaded": 1, "reference_expires_too_early": 1}
