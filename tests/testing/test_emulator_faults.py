"""Each fault does what it says, at the calls that it names. The wire is in test_emulator_server.py."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from prefect_eachlabs.testing.emulator import EmulatorOptions, Fault, InProcessTransport, kinds_of
from prefect_eachlabs.testing.emulator.faults import FaultBook
from tests.testing.test_emulator import KEY, Api, settled
from tests.virtual_time import run

# ---------------------------------------------------------------- which is hit


def hits(book: FaultBook, calls: int, **call: Any) -> list[int]:
    return [number for number in range(1, calls + 1) if book.draw("create", "after", **call)]


def test_a_fault_hits_the_calls_it_names() -> None:
    assert hits(FaultBook([Fault.parse("create:lost_answer,at=2+5")]), 10) == [2, 5]
    assert hits(FaultBook([Fault.parse("create:lost_answer,next=3")]), 10) == [1, 2, 3]
    assert hits(FaultBook([Fault.parse("create:lost_answer")]), 3) == [1, 2, 3]


def test_a_rate_is_kept_and_the_same_for_the_same_seed() -> None:
    fault = Fault.parse("create:lost_answer=5%")
    assert fault.rate == 0.05
    one = hits(FaultBook([fault], seed=1), 2_000)
    assert 70 < len(one) < 130
    assert one == hits(FaultBook([fault], seed=1), 2_000)
    assert one != hits(FaultBook([fault], seed=2), 2_000)


def test_a_fault_may_wait_for_a_prompt() -> None:
    book = FaultBook([Fault.parse("create:lost_answer,matching=naked")])
    assert hits(book, 2, text="a fox") == []
    assert hits(book, 2, text="a naked mole rat") == [1, 2]


def test_a_sticky_fault_hits_what_it_hit_again() -> None:
    book = FaultBook([Fault.parse("picture:truncated,at=1,sticky")])
    assert [book.draw("picture", subject=name) is not None for name in "abab"] == [True, False, True, False]


def test_faults_set_anew_replace_those_before_and_go_on_counting_calls() -> None:
    book = FaultBook([Fault.parse("create:lost_answer,at=1+2")])
    assert hits(book, 1) == [1]
    book.set([Fault.parse("create:lost_answer,at=2")])
    assert hits(book, 1) == [1], "the second call since the start"
    book.set([Fault.parse("create:lost_answer,next=1")])
    assert hits(book, 3) == [1]
    assert book.injected == {"create:lost_answer": 3}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "create",
        "create:nonsense",
        "nowhere:error",
        "picture:lost_answer",
        "create:error=2",
        "create:error=x",
        "create:error,at=0",
        "create:error,colour=red",
        "create:error,status=99",
    ],
)
def test_what_is_no_fault_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        Fault.parse(text)


def test_every_kind_of_fault_can_be_written() -> None:
    endpoints = ("create", "get", "cancel", "executions", "models", "presign", "upload", "prediction", "picture")
    faults = [Fault.parse(f"{endpoint}:{kind}=0.5") for endpoint in endpoints for kind in kinds_of(endpoint)]
    assert len(faults) == len({fault.name for fault in faults}) > 150
    assert EmulatorOptions(faults=[fault.name for fault in faults])
    with pytest.raises(ValidationError, match="lost_answer"):
        EmulatorOptions(faults=["create:lost"])


def test_faults_are_set_read_and_refused_over_http() -> None:
    api = Api()
    said = api.call("POST", "/_emulator/faults", json={"faults": ["create:error,next=1", {"on": "get", "kind": "cut"}]})
    assert said.json() == {"faults": 2}
    assert api.call("GET", "/_emulator/faults").json() == [
        {"on": "create", "kind": "error", "next": 1},
        {"on": "get", "kind": "cut"},
    ]
    assert [api.create().status_code for _ in range(2)] == [503, 200]
    for wrong in (
        {},
        {"faults": "create:error"},
        {"faults": ["create:no"]},
        {"faults": [{"on": "x"}]},
        {"faults": [1]},
    ):
        assert api.call("POST", "/_emulator/faults", json=wrong).status_code == 400, wrong
    assert "lost_answer" in api.call("GET", "/_emulator").json()["fault_kinds"]["create"]


# ------------------------------------------------------------------------- POST


@pytest.mark.parametrize(
    ("fault", "status", "content_type"),
    [
        ("create:error", 503, "application/json"),
        ("create:error,status=500", 500, "application/json"),
        ("create:empty_error", 500, "application/json"),
        ("create:html", 502, "text/html"),
        ("create:throttled", 429, "application/json"),
        ("create:no_balance", 402, "application/json"),
        ("create:redirect", 307, None),
    ],
)
def test_a_fault_before_the_post_is_accepted_bills_nothing(fault: str, status: int, content_type: str | None) -> None:
    api = Api(faults=[fault])
    answer = api.create()
    assert answer.status_code == status
    assert answer.headers.get("content-type", "").split(";")[0] == (content_type or "")
    assert api.tallies()["billed"] == 0
    name = fault.partition(",")[0]
    assert list(api.tallies()["faults"]) == [name]
    assert api.emulator.journal.entries[0].fault == name


def test_a_redirect_leads_where_it_is_told() -> None:
    assert Api(faults=["create:redirect"]).create().headers["location"] == "/v1/prediction"
    elsewhere = Api(faults=["create:redirect,value=http://127.0.0.1:9/x,status=301"]).create()
    assert (elsewhere.status_code, elsewhere.headers["location"]) == (301, "http://127.0.0.1:9/x")


@pytest.mark.parametrize(
    ("fault", "status"),
    [("create:error_after", 500), ("create:html_after", 504), ("create:malformed", 200), ("create:no_id", 200)],
)
def test_a_fault_after_the_post_was_accepted_bills_it(fault: str, status: int) -> None:
    api = Api(faults=[fault])
    answer = api.create()
    assert answer.status_code == status
    assert api.rows()[0]["id"] not in answer.text
    assert api.tallies()["billed"] == 1


def test_a_malformed_answer_is_no_json() -> None:
    with pytest.raises(json.JSONDecodeError):
        Api(faults=["create:malformed"]).create().json()
    assert Api(faults=["create:malformed,value=[[["]).create().text == "[[["


@pytest.mark.parametrize("name", ["prediction_id", "id", "exec_id"])
def test_the_id_may_come_under_another_name(name: str) -> None:
    api = Api(faults=[f"create:id_name,value={name}"])
    assert api.get(api.create().json()[name])["status"] == "starting"


def test_the_nth_accepted_post_loses_its_answer_whatever_was_refused_before() -> None:
    api = Api(faults=["create:error,at=1", "create:error_after,at=2"])
    assert [api.create().status_code for _ in range(4)] == [503, 200, 500, 200]


def test_a_late_answer_is_accepted_at_once_and_a_late_post_when_it_is_late() -> None:
    for fault, billed in (("create:late_answer,seconds=50", 1), ("create:late,seconds=50", 0)):
        api = Api(faults=[fault])

        async def story(http: httpx.AsyncClient, api: Api = api) -> tuple[int, int, int]:
            order = {"model": "gemini", "input": {"prompt": "a fox"}}
            posting = asyncio.ensure_future(http.post("/v1/prediction/", json=order))
            await settled()
            early = api.tallies()["billed"]
            assert not posting.done()
            api.clock.time += 50
            return early, (await posting).status_code, api.tallies()["billed"]

        assert api.together(story) == (billed, 200, 1)


def test_a_post_goes_on_when_its_client_has_stopped_waiting() -> None:
    transport = InProcessTransport(EmulatorOptions(faults=["create:late,seconds=50"]))

    async def story() -> tuple[int, int]:
        async with httpx.AsyncClient(transport=transport, base_url="http://e", headers={"X-API-Key": KEY}) as http:
            with pytest.raises(httpx.ReadTimeout):
                await http.post("/v1/prediction/", json={"model": "gemini", "input": {"prompt": "a"}}, timeout=30)
            early = transport.emulator.tallies()["billed"]
            await asyncio.sleep(20)
            return early, transport.emulator.tallies()["billed"]

    assert run(story()) == (0, 1)


def test_a_cut_without_a_socket_looks_like_one() -> None:
    api = Api(faults=["create:lost_answer"])
    with pytest.raises(httpx.RemoteProtocolError):
        api.create()
    assert api.tallies()["billed"] == 1
    assert api.emulator.journal.entries[0].status is None


# -------------------------------------------------------------------------- GET


def test_a_get_may_not_find_a_young_prediction() -> None:
    api = Api(faults=["get:not_found,seconds=3"])
    bought = api.buy()
    assert api.call("GET", f"/v1/prediction/{bought}").status_code == 404
    api.clock.time += 3
    assert api.get(bought)["status"] == "processing"


def test_a_get_may_be_stale_say_strange_words_or_keep_the_input_to_itself() -> None:
    api = Api(faults=["get:stale,seconds=2,next=1", "get:status_word,value=reticulating,at=2", "get:no_echo,at=3"])
    bought = api.buy()
    api.clock.time += 6
    assert api.get(bought)["status"] == "processing"
    assert api.get(bought)["status"] == "reticulating"
    assert "input" not in api.get(bought)
    assert api.get(bought)["status"] == "success"


@pytest.mark.parametrize("endpoint", ["get", "executions", "models", "cancel", "presign"])
def test_every_endpoint_knows_the_faults_of_the_wire(endpoint: str) -> None:
    api = Api(faults=[f"{endpoint}:error,at=1", f"{endpoint}:html,at=2", f"{endpoint}:malformed,at=1"])
    bought = api.buy()
    method, path = {
        "get": ("GET", f"/v1/prediction/{bought}"),
        "executions": ("GET", "/v1/executions"),
        "models": ("GET", "/v1/models"),
        "cancel": ("POST", f"/v1/prediction/{bought}/cancel"),
        "presign": ("POST", "/v1/upload/presign"),
    }[endpoint]
    body = {"content_type": "image/png"} if endpoint == "presign" else None
    answers = [api.call(method, path, json=body) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [503, 502, 200, 200]
    with pytest.raises(json.JSONDecodeError):
        answers[2].json()
    assert answers[3].json()
