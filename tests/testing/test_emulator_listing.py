"""What the emulator lists (executions, models) and keeps (uploads)."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import pytest

from tests.testing.test_emulator import Api

# ------------------------------------------------------------------- executions


def test_executions_come_newest_first_without_inputs() -> None:
    api = Api(service_seconds=5)
    first = api.buy("a")
    api.clock.time += 5
    second = api.buy("b")
    rows = api.rows()
    assert [(row["id"], row["status"]) for row in rows] == [(second, "created"), (first, "success")]
    assert rows[1]["output"] == f"http://emulator/files/{first}.png"
    assert (rows[1]["execution_cost"], rows[1]["run_time"]) == (0.039, 5)
    assert (rows[0]["output"], rows[0]["execution_cost"], rows[0]["completed_at"]) == (None, 0, None)
    assert all("input" not in row for row in rows)
    assert datetime.fromisoformat(rows[1]["created_at"].replace("Z", "+00:00"))


def test_executions_have_a_vocabulary_of_their_own() -> None:
    api = Api(faults=["prediction:fail,at=2"], service_seconds=10)
    words = []
    api.buy("a")
    bad, cancelled = api.buy("b"), api.buy("c")
    api.call("POST", f"/v1/prediction/{cancelled}/cancel")
    for moment in (1_000, 1_005, 1_010):
        api.clock.time = moment
        words.append([row["status"] for row in reversed(api.rows())])
    assert words == [
        ["created", "created", "cancelled"],
        ["starting", "starting", "cancelled"],
        ["success", "error", "cancelled"],
    ]
    assert [row["id"] for row in api.rows(status="error")] == [bad]
    assert len(api.rows(status="success,error")) == 2
    assert [row["id"] for row in api.rows(error_classification="provider_error")] == [bad]


def test_pages_are_cut_by_limit_and_offset_and_default_to_20() -> None:
    api = Api(requests_per_minute=None, max_in_flight=None, service_seconds=0)
    bought = [api.buy(str(number)) for number in range(25)][::-1]
    assert [row["id"] for row in api.rows()] == bought[:20]
    assert [row["id"] for row in api.rows(limit=10, offset=20)] == bought[20:]
    page = api.call("GET", "/v1/executions", params={"limit": 10, "offset": 10}).json()
    assert {name: page[name] for name in ("total_count", "total_capped", "limit", "offset")} == {
        "total_count": 25,
        "total_capped": False,
        "limit": 10,
        "offset": 10,
    }


def test_the_total_is_capped_until_the_last_page() -> None:
    api = Api(requests_per_minute=None, max_in_flight=None, service_seconds=0, total_cap=5)
    for number in range(12):
        api.buy(str(number))
    pages = [api.call("GET", "/v1/executions", params={"limit": 5, "offset": at}).json() for at in (0, 5, 10)]
    assert [(page["total_count"], page["total_capped"]) for page in pages] == [(5, True), (5, True), (12, False)]


def test_executions_can_be_asked_for_by_model_and_time() -> None:
    api = Api()
    gemini = api.buy("a")
    api.clock.time += 100
    order = {"model": "imagen-4", "input": {"prompt": "b"}}
    imagen = api.call("POST", "/v1/prediction", json=order).json()["predictionID"]
    assert [row["id"] for row in api.rows(model="imagen-4")] == [imagen]
    between = (api.emulator.calendar.true_date(1_050)).isoformat()
    assert [row["id"] for row in api.rows(**{"from": between})] == [imagen]
    assert [row["id"] for row in api.rows(to=between)] == [gemini]
    assert api.rows(workflow_id="wf_1") == []


def test_without_from_the_window_is_the_last_90_days() -> None:
    api = Api()
    old = api.buy("a")
    api.clock.time += timedelta(days=91).total_seconds()
    assert api.rows() == []
    assert [row["id"] for row in api.rows(**{"from": "2000-01-01T00:00:00Z"})] == [old]


@pytest.mark.parametrize(
    "query",
    [
        {"limit": "101"},
        {"limit": "0"},
        {"limit": "ten"},
        {"limit": "²"},
        {"offset": "-1"},
        {"status": "failed"},
        {"status": "success,Error"},
        {"from": "yesterday"},
        {"to": "2026-01-01"},
        {"error_classification": "bad luck"},
    ],
    ids=str,
)
def test_a_wrong_query_is_a_400_that_says_what_may_stand_there(query: dict[str, str]) -> None:
    answer = Api().call("GET", "/v1/executions", params=query)
    assert answer.status_code == 400
    assert next(iter(query)) in answer.json()["error"]


def test_a_listing_delay_shows_the_world_as_it_was() -> None:
    api = Api(listing_delay_seconds=10, service_seconds=5)
    bought = api.buy()
    seen = []
    for moment in (1_000, 1_009.9, 1_010, 1_015):
        api.clock.time = moment
        seen.append([row["status"] for row in api.rows()])
    assert seen == [[], [], ["created"], ["success"]]
    assert api.get(bought)["status"] == "success"


def test_dates_are_off_by_the_skew_and_the_filters_with_them() -> None:
    api = Api(clock_skew_seconds=3_600)
    api.buy()
    created = datetime.fromisoformat(api.rows()[0]["created_at"].replace("Z", "+00:00"))
    assert abs((created - api.emulator.calendar.true_date(1_000)).total_seconds() - 3_600) < 0.01
    assert len(api.rows(**{"from": (created - timedelta(seconds=1)).isoformat()})) == 1
    assert len(api.rows(**{"from": (created + timedelta(seconds=1)).isoformat()})) == 0
    assert len(api.rows(to=(created + timedelta(hours=1)).strftime("%Y-%m-%dT%H:%M:%S.5Z"))) == 1


def test_the_executions_endpoint_may_be_missing_stale_or_hold_back_rows() -> None:
    api = Api(requests_per_minute=None, max_in_flight=None, service_seconds=0)
    for number in range(100):
        api.buy(str(number))
    api.clock.time += 30

    def listed(*faults: str) -> list[Any]:
        api.call("POST", "/_emulator/faults", json={"faults": list(faults)})
        answer = api.call("GET", "/v1/executions", params={"limit": 100})
        return answer.json()["executions"] if answer.status_code == 200 else [answer.status_code]

    assert listed("executions:missing") == [404]
    assert listed("executions:stale,seconds=31") == []
    assert len(listed("executions:stale,seconds=29")) == 100
    some = listed("executions:missing_rows=0.3")
    assert 50 < len(some) < 90
    assert listed("executions:missing_rows=0.3") == some, "a missing row stays missing"
    assert listed("executions:missing_rows") == []
    assert api.tallies()["faults"]["executions:missing_rows"] == 2 * (100 - len(some)) + 100


# --------------------------------------------------------------- others' rows


def test_a_foreign_twin_is_listed_and_readable_and_costs_us_nothing() -> None:
    api = Api(faults=["prediction:foreign_twin,seconds=3,at=1"])
    ours = api.buy("the same")
    assert [row["id"] for row in api.rows()] == [ours]
    api.clock.time += 3
    foreign = next(row["id"] for row in api.rows() if row["id"] != ours)
    assert api.get(foreign)["input"] == api.get(ours)["input"]
    api.clock.time += 60
    tallies = api.tallies()
    assert (tallies["billed"], tallies["foreign"], tallies["succeeded"], tallies["worst_in_flight"]) == (1, 1, 1, 1)
    assert tallies["billed_by_input"] == []
    assert tallies["cost_usd"] == pytest.approx(0.039)


def test_foreign_predictions_can_be_added_by_hand() -> None:
    api = Api(max_in_flight=1)
    order = {"model": "gemini", "input": {"prompt": "theirs"}, "count": 3}
    ids = api.call("POST", "/_emulator/foreign", json=order).json()["prediction_ids"]
    assert {row["id"] for row in api.rows()} == set(ids)
    assert api.create("ours").status_code == 200, "another key's predictions take none of our places"
    assert api.call("POST", "/_emulator/foreign", json={**order, "count": 0}).status_code == 400


# ----------------------------------------------------------------------- models


def test_the_catalogue_holds_models_of_every_kind_of_schema() -> None:
    api = Api()
    models = {model["slug"]: model for model in api.call("GET", "/v1/models").json()}
    assert models["flux-1-1-pro"]["request_schema"]["additionalProperties"] is False
    assert models["imagen-4"]["output_type"] == "array"
    assert "request_schema" not in models["schemaless"]
    names = {name for model in models.values() for name in model.get("request_schema", {}).get("properties", {})}
    assert {"image_url", "image", "image_urls", "input_image", "images"} <= names
    assert [model["slug"] for model in api.call("GET", "/v1/models", params={"name": "BANANA"}).json()] == [
        "nano-banana-pro-edit"
    ]
    assert len(api.call("GET", "/v1/models", params={"limit": 2, "offset": 1}).json()) == 2
    assert api.call("GET", "/v1/models", params={"limit": 501}).status_code == 400


def test_a_model_is_found_by_its_slug() -> None:
    api = Api()
    assert api.call("GET", "/v1/model", params={"slug": "gemini"}).json()["title"] == "Gemini 2.0 Flash Image"
    assert api.call("GET", "/v1/model").json() == {"error": "slug parameter is required"}
    assert api.call("GET", "/v1/model", params={"slug": "no"}).status_code == 404


def test_no_webhook_was_ever_sent() -> None:
    api = Api()
    assert api.call("GET", "/v1/webhooks").json() == {"webhooks": [], "limit": 50, "offset": 0, "total_count": 0}
    assert api.call("GET", "/v1/webhooks/none").status_code == 404
