"""Each fault does what it says, at the calls that it names. The wire is in test_emulator_server.py."""

from __future__ import annotations

import asyncio
import re
from typing import Any
from uuid import UUID

import httpx
import pytest
from pydantic import ValidationError

from prefect_eachlabs.testing.emulator import Emulator, EmulatorOptions, Fault, InProcessTransport, kinds_of, state
from prefect_eachlabs.testing.emulator.faults import BEFORE, ENDPOINTS, FaultRules
from tests.testing.emulator_kit import KEY, ORDER, Api, in_virtual_time

# ---------------------------------------------------------------- which is hit


def rules(*faults: str, seed: int = 0) -> FaultRules:
    return FaultRules([Fault.parse(fault) for fault in faults], seed=seed)


def hits(rules: FaultRules, calls: int, **call: Any) -> list[int]:
    return [number for number in range(1, calls + 1) if rules.draw("create", "after", **call)]


def test_a_fault_hits_the_calls_it_names() -> None:
    assert hits(rules("create:lost_answer,at=2+5"), 10) == [2, 5]
    assert hits(rules("create:lost_answer,next=3"), 10) == [1, 2, 3]
    assert hits(rules("create:lost_answer"), 3) == [1, 2, 3]
    matching = rules("create:lost_answer,matching=naked")
    assert (hits(matching, 2, text="a fox"), hits(matching, 2, text="a naked mole rat")) == ([], [1, 2])
    sticky = rules("picture:truncated,at=1,sticky")
    assert [sticky.draw("picture", subject=name) is not None for name in "abab"] == [True, False, True, False]


def test_a_rate_is_kept_and_the_same_for_the_same_seed() -> None:
    one = hits(rules("create:lost_answer=5%", seed=1), 2_000)
    assert 70 < len(one) < 130
    assert one == hits(rules("create:lost_answer=0.05", seed=1), 2_000)
    assert one != hits(rules("create:lost_answer=0.05", seed=2), 2_000)


def test_a_fault_may_hit_the_first_calls_of_each_picture_or_of_a_share_of_them() -> None:
    def struck(fault: str) -> list[int]:
        made = rules(fault)
        return [sum(made.draw("picture", subject=str(name)) is not None for _ in range(4)) for name in range(200)]

    assert set(struck("picture:not_found,first=2")) == {2}
    share = struck("picture:not_found=0.25,first=2")
    assert set(share) == {0, 2}
    assert 30 < share.count(2) < 70


def test_faults_set_anew_replace_those_before_and_go_on_counting_calls() -> None:
    made = rules("create:lost_answer,at=1+2")
    assert hits(made, 1) == [1]
    made.set([Fault.parse("create:lost_answer,at=2")])
    assert hits(made, 1) == [1], "the second call since the start"
    made.set([Fault.parse("create:lost_answer,next=1")])
    assert hits(made, 3) == [1]
    assert made.injected == {"create:lost_answer": 3}


@pytest.mark.parametrize(
    "text",
    [
        *("", "create", "create:nonsense", "nowhere:error", "picture:lost_answer", "create:error=2"),
        *("create:error=x", "create:error,at=0", "create:error,colour=red", "picture:error,first=0"),
    ],
)
def test_what_is_not_a_fault_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        Fault.parse(text)


def test_every_kind_of_fault_can_be_written() -> None:
    faults = [Fault.parse(f"{endpoint}:{kind}=0.5") for endpoint in ENDPOINTS for kind in kinds_of(endpoint)]
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
    for wrong in (None, "create:error", ["create:no"], [{"on": "x"}], [1]):
        assert api.call("POST", "/_emulator/faults", json={"faults": wrong}).status_code == 400, wrong
    assert "lost_answer" in api.call("GET", "/_emulator").json()["fault_kinds"]["create"]


# ------------------------------------------------------------------- each of them

PROMPT = '  Cafe\u0301  "fox" & a hen'
INPUT = {"prompt": PROMPT, "image_url": "https://e.com/a.png", "seed": None}
NEEDS = {"short_pages": ",value=1", "short_pages_untold": ",value=1", "echo_cut": ",value=8"}
"""What a kind needs so that three short rows show it."""


async def life(http: httpx.AsyncClient, emulator: Emulator, endpoint: str) -> list[object]:
    """A prediction from its POST to its picture, and a request to each other endpoint: what a client sees of one."""
    loop, seen = asyncio.get_running_loop(), list[object]()

    async def ask(of: str, method: str, path: str, **request: Any) -> None:
        if of not in ("create", endpoint) and not (endpoint == "prediction" and of in ("get", "executions", "picture")):
            return
        began = loop.time()
        try:
            answer = await http.request(method, path, **request)
        except httpx.TransportError as error:
            seen.append(type(error))
            return
        headers = [answer.headers.get(name) for name in ("content-type", "content-length", "location", "retry-after")]
        alike = re.sub(rb"\d{4}-\d\d-\d\dT[\d:.]+|[0-9a-f]{32}", b"...", answer.content)
        seen.append((answer.status_code, *headers, alike, round(loop.time() - began, 3)))

    for _ in range(2):
        emulator.announce_foreign(ORDER, base_url="http://emulator")
    await ask("create", "POST", "/v1/prediction/", json={"model": "gemini", "input": INPUT})
    bought = next((one["id"] for one in emulator.predictions() if not one["foreign"]), "none")
    for seconds in (1, 5):
        await asyncio.sleep(seconds)
        await ask("get", "GET", f"/v1/prediction/{bought}")
        await ask("executions", "GET", "/v1/executions", params={"limit": 2})
    await ask("picture", "GET", f"/files/{bought}.png", headers={"X-API-Key": ""})
    await ask("models", "GET", "/v1/models")
    await ask("webhooks", "GET", "/v1/webhooks")
    await ask("presign", "POST", "/v1/upload/presign", json={"content_type": "image/png"})
    upload = emulator.uploads.presign("image/png")
    url = f"/storage/uploads/{upload.id}?X-Amz-Signature={upload.signature}"
    await ask("upload", "PUT", url, content=b"x", headers={"X-API-Key": "", **upload.required_headers})
    await ask("create", "POST", "/v1/prediction/", json=ORDER)
    last = emulator.predictions()[-1]["id"]
    await ask("cancel", "POST", f"/v1/prediction/{last}/cancel")
    if endpoint == "prediction":
        emulator.cancel(emulator.ledger.get(last, loop.time()) or pytest.fail("it was bought"))
        await ask("get", "GET", f"/v1/prediction/{last}")
    return [*seen, emulator.tallies()["billed"]]


def told(endpoint: str, fault: str | None) -> tuple[list[object], dict[str, int]]:
    ids = (str(UUID(int=number)) for number in range(100))  # the same each time

    async def story(http: httpx.AsyncClient, emulator: Emulator) -> tuple[list[object], dict[str, int]]:
        return await life(http, emulator, endpoint), emulator.tallies()["faults"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state, "new_id", lambda: next(ids))
        return in_virtual_time(story, faults=[fault] if fault else [], service_seconds=5)


@pytest.mark.parametrize("endpoint", sorted(set(ENDPOINTS) - {"webhook"}))
def test_every_fault_is_seen_and_counted_and_bills_what_it_says(endpoint: str) -> None:
    (*well, billed), _ = told(endpoint, None)
    assert billed == 2
    assert told(endpoint, None)[0] == [*well, billed], "without a fault nothing differs"
    for kind in kinds_of(endpoint):
        (*seen, billed), injected = told(endpoint, f"{endpoint}:{kind}{NEEDS.get(kind, '')}")
        assert seen != well, kind
        assert [*injected] == [f"{endpoint}:{kind}"]
        done_before = endpoint == "create" and kind in BEFORE and kind != "late"
        assert billed == (0 if done_before else 2), kind


# ------------------------------------------------------------------------- POST


def test_a_prompt_may_be_refused_for_ever_or_at_first_while_others_are_taken() -> None:
    for_ever = Api(faults=["create:error,status=500,matching=fox"])
    assert [for_ever.create(prompt).status_code for prompt in ("a fox", "a hen", "a fox")] == [500, 200, 500]
    at_first = Api(faults=["create:error,first=1"])
    assert [at_first.create(prompt).status_code for prompt in ("a", "b", "a", "b")] == [503, 503, 200, 200]


def test_the_nth_accepted_post_loses_its_answer_whatever_was_refused_before() -> None:
    api = Api(faults=["create:error,at=1", "create:error_after,at=2"])
    assert [api.create().status_code for _ in range(4)] == [503, 200, 500, 200]


@pytest.mark.parametrize(("fault", "billed"), [("late_answer", 1), ("late", 0)])
def test_a_late_answer_is_accepted_at_once_and_a_late_post_when_it_is_late(fault: str, billed: int) -> None:
    async def story(http: httpx.AsyncClient, emulator: Emulator) -> tuple[int, int, int]:
        posting = asyncio.ensure_future(http.post("/v1/prediction/", json=ORDER))
        await asyncio.sleep(49)
        early = emulator.tallies()["billed"]
        return early, (await posting).status_code, emulator.tallies()["billed"]

    assert in_virtual_time(story, faults=[f"create:{fault},seconds=50"]) == (billed, 200, 1)


def test_a_post_goes_on_when_its_client_has_stopped_waiting() -> None:
    async def story(http: httpx.AsyncClient, emulator: Emulator) -> tuple[int, int]:
        with pytest.raises(httpx.ReadTimeout):
            await http.post("/v1/prediction/", json=ORDER, timeout=30)
        early = emulator.tallies()["billed"]
        await asyncio.sleep(20)
        return early, emulator.tallies()["billed"]

    assert in_virtual_time(story, faults=["create:late,seconds=50"]) == (0, 1)


def test_a_cut_without_a_socket_looks_like_one() -> None:
    api = Api(faults=["create:lost_answer"])
    with pytest.raises(httpx.RemoteProtocolError):
        api.create()
    assert api.tallies()["billed"] == 1
    assert api.emulator.journal.entries[0].status is None


# ------------------------------------------------------------------- predictions


def ended(fault: str, prompt: str = "a fox", **input: Any) -> tuple[Api, dict[str, Any]]:
    api = Api(faults=[f"prediction:{fault}"], service_seconds=0, strict_models=False)
    return api, api.get(api.buy(input={"prompt": prompt, **input}))


def test_a_success_may_be_seen_before_its_output_and_a_cost_be_told_late() -> None:
    api = Api(faults=["prediction:late_output,seconds=30", "prediction:late_cost,seconds=20"], service_seconds=5)
    bought, seen = api.buy(), []
    for moment in (1_005, 1_024, 1_025, 1_034, 1_035):
        api.time = moment
        view, row = api.get(bought), api.rows()[0]
        assert (view["status"], view["output"]) == ("success", row["output"])
        assert view["metrics"]["cost"] == row["execution_cost"]
        seen.append((view["output"] is not None, row["execution_cost"]))
    assert seen == [(False, 0), (False, 0), (False, 0.039), (False, 0.039), (True, 0.039)]


def test_a_prediction_may_be_missing_from_the_listing_or_late_in_it() -> None:
    api = Api(faults=["prediction:unlisted,at=1", "prediction:listed_late,seconds=30,at=2"])
    unlisted, late = api.buy("a"), api.buy("b")
    api.time += 29
    assert api.rows() == []
    api.time += 1
    assert [row["id"] for row in api.rows()] == [late]
    assert api.get(unlisted)["status"] == "success"


def test_faults_of_different_aspects_may_hit_the_same_prediction() -> None:
    api = Api(faults=["prediction:output_list", "prediction:echo_none", "prediction:output_json", "prediction:slow"])
    bought = api.buy()
    api.time += 65
    view = api.get(bought)
    assert isinstance(view["output"], list), "the first of one aspect wins"
    assert "input" not in view


def test_a_twin_of_another_key_is_in_the_list_and_on_nobodys_bill() -> None:
    api = Api(faults=["prediction:foreign_twin,seconds=2"])
    api.buy()
    assert len(api.rows()) == 1
    api.time += 2
    assert len(api.rows()) == 2
    assert (api.tallies()["billed"], api.tallies()["foreign"]) == (1, 1)
    foreign = api.call("POST", "/_emulator/foreign", json={**ORDER, "count": 3}).json()["prediction_ids"]
    assert len(set(foreign) & {row["id"] for row in api.rows()}) == 3


# ------------------------------------------------------------- lists that see badly


# --------------------------------------------------------------- the key, quoted


@pytest.mark.parametrize("where", ["error", "logs", "output"])
def test_a_prediction_may_quote_the_key(where: str) -> None:
    api, view = ended(f"key_in_{where}")
    assert view["status"] == ("failed" if where == "error" else "success")
    assert KEY in (view["logs"] if where == "logs" else str(view["output"]))
    assert where != "output" or api.download(view["output"]).content.startswith(b"\x89PNG")
    assert KEY not in str(api.call("GET", "/_emulator/predictions").json())


async def test_the_transport_cleans_up_after_itself() -> None:
    transport = InProcessTransport(EmulatorOptions(faults=["create:late,seconds=600"]))
    async with httpx.AsyncClient(transport=transport, base_url="http://e", headers={"X-API-Key": KEY}) as http:
        with pytest.raises(httpx.ReadTimeout):
            await http.post("/v1/prediction/", json=ORDER, timeout=1)
