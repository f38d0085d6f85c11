"""Faults that a buyer once lost money to: lists that see badly, strange echoes, late ends, quoted keys."""

from __future__ import annotations

import re
from typing import Any

import httpx
import pytest

from prefect_eachlabs.testing.emulator import Fault
from prefect_eachlabs.testing.emulator.faults import FaultBook
from tests.testing.test_emulator import KEY, Api


def with_25_bought(fault: str) -> tuple[Api, list[str]]:
    """An account with 25 predictions that have ended, and their ids, newest first."""
    api = Api(faults=[fault], requests_per_minute=None, max_in_flight=None, service_seconds=0)
    return api, [api.buy(str(number)) for number in range(25)][::-1]


def page(api: Api, **query: Any) -> dict[str, Any]:
    return dict(api.call("GET", "/v1/executions", params=query).json())


# -------------------------------------------------------------------- which is hit


def test_a_fault_may_hit_the_first_calls_of_each_picture() -> None:
    api = Api(faults=["picture:not_found,first=2"], service_seconds=0)
    one, two = api.buy("a"), api.buy("b")
    seen = [api.call("GET", f"/files/{name}.png").status_code for name in (one, one, two, one, two, two)]
    assert seen == [404, 404, 404, 200, 404, 200]


def test_with_a_rate_it_hits_the_first_calls_of_so_many_pictures() -> None:
    book = FaultBook([Fault.parse("picture:not_found=0.25,first=2")])
    hits = [sum(book.draw("picture", subject=str(picture)) is not None for _ in range(4)) for picture in range(200)]
    assert set(hits) == {0, 2}
    assert 30 < hits.count(2) < 70


@pytest.mark.parametrize("status", [404, 410, 503])
def test_a_picture_may_be_missing_at_first(status: int) -> None:
    api = Api(faults=[f"picture:error,status={status},first=1"], service_seconds=0)
    bought = api.buy()
    assert [api.call("GET", f"/files/{bought}.png").status_code for _ in range(2)] == [status, 200]


def test_a_prompt_may_be_refused_for_ever_or_at_first_while_others_are_taken() -> None:
    for_ever = Api(faults=["create:error,status=500,matching=fox"])
    assert [for_ever.create(prompt).status_code for prompt in ("a fox", "a hen", "a fox")] == [500, 200, 500]
    assert for_ever.tallies()["billed"] == 1
    at_first = Api(faults=["create:error,first=1"])
    assert [at_first.create(prompt).status_code for prompt in ("a", "b", "a", "b")] == [503, 503, 200, 200]


# ----------------------------------------------------------------------- the list


def test_a_list_may_be_empty_whatever_there_is() -> None:
    api, bought = with_25_bought("executions:empty_list")
    assert page(api) == {"executions": [], "total_count": 0, "total_capped": False, "offset": 0, "limit": 20}
    assert api.get(bought[0])["status"] == "success"


@pytest.mark.parametrize("told", [True, False])
def test_a_page_may_hold_fewer_rows_than_were_asked_for(told: bool) -> None:
    api, bought = with_25_bought(f"executions:short_pages{'' if told else '_untold'},value=10")
    pages = [page(api, limit=100, offset=offset) for offset in (0, 10, 20)]
    assert [[row["id"] for row in one["executions"]] for one in pages] == [bought[:10], bought[10:20], bought[20:]]
    told_about = {"limit": 10, "total_count": 25} if told else {}
    assert {name: pages[0][name] for name in ("limit", "total_count") if name in pages[0]} == told_about
    assert len(page(api, limit=5)["executions"]) == 5


def test_rows_may_name_the_model_otherwise_than_the_filter_does() -> None:
    api, bought = with_25_bought("executions:other_model")
    rows = api.rows(model="gemini", limit=100)
    assert [row["id"] for row in rows] == bought
    assert {row["model"] for row in rows} == {"gemini-2.0-flash-exp"}
    assert Api(faults=["executions:other_model,value=google/{model}"], service_seconds=0).rows() == []


def test_rows_may_have_ids_that_get_does_not_know() -> None:
    api, bought = with_25_bought("executions:other_ids")
    row = api.rows()[0]
    assert row["id"] == f"exec_{bought[0]}"
    assert api.call("GET", f"/v1/prediction/{row['id']}").status_code == 404


def test_dates_may_come_without_a_time_zone() -> None:
    api, _ = with_25_bought("executions:naive_dates")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+", api.rows()[0]["created_at"])


# ----------------------------------------------------------------------- the echo


@pytest.mark.parametrize(
    ("fault", "echo"),
    [
        ("echo_cut,value=10", {"prompt": 'a "fox" & ', "image_url": "https://ex", "seed": None}),
        (
            "echo_escaped",
            {"prompt": "a &quot;fox&quot; &amp; a hen", "image_url": "https://example.com/a.png", "seed": None},
        ),
        (
            "echo_rehosted",
            {"prompt": 'a "fox" & a hen', "image_url": "https://storage.eachlabs.example/a.png", "seed": None},
        ),
        ("echo_without_nulls", {"prompt": 'a "fox" & a hen', "image_url": "https://example.com/a.png"}),
    ],
)
def test_an_echo_may_nearly_be_what_was_sent(fault: str, echo: dict[str, Any]) -> None:
    api = Api(faults=[f"prediction:{fault}"], strict_models=False)
    order = {"prompt": 'a "fox" & a hen', "image_url": "https://example.com/a.png", "seed": None}
    assert api.get(api.buy(input=order))["input"] == echo


# -------------------------------------------------------------------- late ends


def test_a_success_may_be_seen_before_its_output() -> None:
    api = Api(faults=["prediction:late_output,seconds=30"], service_seconds=5)
    bought = api.buy()
    seen = []
    for moment in (1_005, 1_034, 1_035):
        api.clock.time = moment
        view, row = api.get(bought), api.rows()[0]
        seen.append((view["status"], view["output"], row["output"]))
    url = f"http://emulator/files/{bought}.png"
    assert seen == [("success", None, None), ("success", None, None), ("success", url, url)]


def test_a_cost_may_be_told_late() -> None:
    api = Api(faults=["prediction:late_cost,seconds=30"], service_seconds=5)
    bought = api.buy()
    seen = []
    for moment in (1_005, 1_034, 1_035):
        api.clock.time = moment
        seen.append((api.get(bought)["metrics"]["cost"], api.rows()[0]["execution_cost"]))
    assert seen == [(0, 0), (0, 0), (0.039, 0.039)]
    assert api.tallies()["cost_usd"] == 0.039


# --------------------------------------------------------------- the key, quoted


@pytest.mark.parametrize("where", ["error", "logs", "output"])
def test_a_prediction_may_quote_the_key(where: str) -> None:
    api = Api(faults=[f"prediction:key_in_{where}"])
    bought = api.buy()
    api.clock.time += 5
    view = api.get(bought)
    assert view["status"] == ("failed" if where == "error" else "success")
    assert KEY in (view["logs"] if where == "logs" else str(view["output"]))
    if where == "output":
        assert api.together(lambda http: httpx_get_without_key(http, view["output"])).content.startswith(b"\x89PNG")
    assert KEY not in str(api.call("GET", "/_emulator/predictions").json())


async def httpx_get_without_key(http: httpx.AsyncClient, url: str) -> httpx.Response:
    return await http.get(url, headers={"X-API-Key": ""})


@pytest.mark.parametrize("endpoint", ["create", "get", "executions"])
def test_a_refusal_may_quote_the_key(endpoint: str) -> None:
    api = Api(faults=[f"{endpoint}:quoted_key,next=1"])
    answers = {
        "create": api.create,
        "get": lambda: api.call("GET", "/v1/prediction/x"),
        "executions": lambda: api.call("GET", "/v1/executions"),
    }
    refused = answers[endpoint]()
    assert refused.status_code == 400
    assert KEY in refused.json()["error"]
    assert KEY in refused.json()["details"]
    assert KEY not in api.call("GET", "/_emulator/journal").text
