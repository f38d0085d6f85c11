"""Each fault does what it says, at the calls that it names. The wire is in test_emulator_server.py."""

from __future__ import annotations

import asyncio
import io
import json
import unicodedata
import zlib
from typing import Any

import httpx
import pytest
from PIL import Image
from pydantic import ValidationError

from prefect_eachlabs.emulator import EmulatorOptions, Fault, InProcessTransport, kinds_of
from prefect_eachlabs.emulator.faults import FaultBook
from prefect_eachlabs.emulator.pictures import CAPTION, draw, plain_png
from prefect_eachlabs.emulator.spoilt import bomb, zeros_deflated
from tests.test_emulator import KEY, Api, _settled
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
    ["", "create", "create:nonsense", "nowhere:error", "create:error=2", "create:error=x", "create:error,at=0"]
    + ["create:error,colour=red", "picture:lost_answer", "create:error,status=99"],
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
    for wrong in ({}, {"faults": "create:error"}, {"faults": ["create:no"]}, {"faults": [{"on": "x"}]}, {"faults": [1]}):
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
    assert list(api.tallies()["faults"]) == [fault.split(",")[0]]
    assert api.emulator.journal.entries[0].fault == fault.split(",")[0]


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
            await _settled()
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


# ------------------------------------------------------------------ predictions


def ended(fault: str, prompt: str = "a fox") -> tuple[Api, dict[str, Any]]:
    api = Api(faults=[fault])
    bought = api.buy(prompt)
    api.clock.time += 5
    return api, api.get(bought)


@pytest.mark.parametrize(
    ("fault", "code", "retryable", "category"),
    [
        ("fail", "PROVIDER_FAILED", False, "provider_error"),
        ("fail,value=MODEL_BROKE", "MODEL_BROKE", False, "provider_error"),
        ("fail_retryable", "PROVIDER_UNAVAILABLE", True, "provider_unavailable"),
        ("fail_moderation", "CONTENT_MODERATION", False, "content_moderation"),
        ("fail_logs", "PROVIDER_FAILED", False, "provider_error"),
        ("fail_under_success", "PROVIDER_FAILED", False, "provider_error"),
    ],
)
def test_a_failing_prediction_has_its_envelope_and_costs_nothing(
    fault: str, code: str, retryable: bool, category: str
) -> None:
    api, view = ended(f"prediction:{fault}")
    envelope = json.loads(view["logs"]) if "logs" in fault else view["output"]
    assert view["status"] == ("success" if "under_success" in fault else "failed")
    assert (envelope["error_code"], envelope["retryable"]) == (code, retryable)
    assert envelope["classification"]["category"] == category
    assert envelope["error_message"]
    assert (view["metrics"]["cost"], api.tallies()["cost_usd"], api.rows()[0]["output"]) == (0, 0, None)


def test_a_failure_may_be_text_in_the_logs() -> None:
    _, view = ended("prediction:fail_text")
    assert (view["status"], view["output"]) == ("failed", "")
    assert "out of memory" in view["logs"]


@pytest.mark.parametrize(
    ("fault", "shape"),
    [
        ("output_list", ["URL"]),
        ("output_object", {"url": "URL", "content_type": "image/png"}),
        ("output_images", {"images": [{"url": "URL", "content_type": "image/png"}], "seed": 1}),
        ("output_json", '{"images": ["URL"]}'),
        ("output_empty", ""),
        ("output_null", None),
        ("output_several,value=2", ["URL", "URL2"]),
    ],
)
def test_an_output_may_have_any_shape_that_was_seen(fault: str, shape: object) -> None:
    _, view = ended(f"prediction:{fault}")
    url = f"http://emulator/files/{view['id']}"
    expected = json.dumps(shape).replace("URL2", f"{url}-2.png").replace("URL", f"{url}.png")
    assert view["status"] == "success"
    assert json.dumps(view["output"]) == expected


def test_a_success_may_come_without_any_output() -> None:
    _, view = ended("prediction:output_missing")
    assert "output" not in view


def test_an_echo_may_be_normalised_completed_wrapped_or_missing() -> None:
    prompt = "  Cafe\u0301  noir "
    assert ended("prediction:echo_normalised", prompt)[1]["input"] == {"prompt": "Café noir"}
    assert unicodedata.is_normalized("NFC", ended("prediction:echo_normalised", prompt)[1]["input"]["prompt"])
    assert ended("prediction:echo_defaults", prompt)[1]["input"] == {
        "num_outputs": 1,
        "safety_tolerance": 2,
        "prompt": prompt,
    }
    assert json.loads(ended("prediction:echo_text", prompt)[1]["input"]) == {"prompt": prompt}
    assert "input" not in ended("prediction:echo_none", prompt)[1]


def test_a_prediction_may_be_stuck_or_slow() -> None:
    api = Api(faults=["prediction:stuck,at=1", "prediction:slow,seconds=10,at=2"])
    stuck, slow = api.buy("a"), api.buy("b")
    api.clock.time += 14.9
    assert api.get(slow)["status"] == "processing"
    api.clock.time += 0.1
    assert api.get(slow)["status"] == "success"
    api.clock.time += 1e6
    assert api.get(stuck)["status"] == "processing"
    assert api.tallies()["in_flight"] == 1
    api.call("POST", f"/v1/prediction/{stuck}/cancel")
    assert api.get(stuck)["status"] == "cancelled"


def test_a_prediction_may_be_missing_from_the_listing_or_late_in_it() -> None:
    api = Api(faults=["prediction:unlisted,at=1", "prediction:listed_late,seconds=30,at=2"])
    unlisted, late = api.buy("a"), api.buy("b")
    api.clock.time += 29
    assert api.rows() == []
    api.clock.time += 1
    assert [row["id"] for row in api.rows()] == [late]
    assert api.get(unlisted)["status"] == "success"


def test_a_cancel_may_have_no_effect() -> None:
    api = Api(faults=["prediction:uncancellable"])
    bought = api.buy()
    assert api.call("POST", f"/v1/prediction/{bought}/cancel").json()["status"] == "cancelled"
    api.clock.time += 5
    assert api.get(bought)["status"] == "success"
    assert (api.tallies()["cancelled"], api.tallies()["succeeded"]) == (0, 1)


def test_faults_of_different_aspects_may_hit_the_same_prediction() -> None:
    api = Api(faults=["prediction:output_list", "prediction:echo_none", "prediction:output_json", "prediction:slow"])
    bought = api.buy()
    api.clock.time += 65
    view = api.get(bought)
    assert isinstance(view["output"], list), "the first of one aspect wins"
    assert "input" not in view


# --------------------------------------------------------------------- pictures


def downloaded(fault: str) -> tuple[httpx.Response, bytes]:
    api = Api(faults=[f"picture:{fault},at=2"])
    bought = api.buy()
    api.clock.time += 5
    api.headers = {}
    whole, spoilt = (api.call("GET", f"/files/{bought}.png") for _ in range(2))
    assert api.tallies()["faults"] == {f"picture:{fault}": 1}
    return spoilt, whole.content


def test_a_picture_may_be_truncated_or_longer_than_it_is() -> None:
    spoilt, whole = downloaded("truncated")
    assert 0 < len(spoilt.content) < len(whole)
    assert whole.startswith(spoilt.content)
    spoilt, whole = downloaded("trailing")
    assert spoilt.content.startswith(whole)
    assert len(spoilt.content) > len(whole)
    assert downloaded("empty")[0].content == b""


def test_a_picture_may_have_a_wrong_bit() -> None:
    spoilt, whole = downloaded("bad_crc")
    assert len(spoilt.content) == len(whole)
    assert sum(one != other for one, other in zip(spoilt.content, whole, strict=True)) == 1
    at = whole.index(b"IDAT")
    length = int.from_bytes(whole[at - 4 : at], "big")
    crc = int.from_bytes(spoilt.content[at + 4 + length : at + 8 + length], "big")
    assert zlib.crc32(spoilt.content[at : at + 4 + length]) != crc


def test_a_picture_may_be_a_page_or_a_jpeg() -> None:
    page, _ = downloaded("html")
    assert (page.status_code, page.headers["content-type"].split(";")[0]) == (200, "text/html")
    jpeg, _ = downloaded("jpeg")
    assert (jpeg.content[:2], jpeg.headers["content-type"]) == (b"\xff\xd8", "image/png")


@pytest.mark.parametrize(("fault", "status"), [("not_found", 404), ("error", 503), ("throttled", 429)])
def test_a_download_may_be_refused(fault: str, status: int) -> None:
    assert downloaded(fault)[0].status_code == status


def test_a_redirect_ends_at_the_picture_and_a_loop_nowhere() -> None:
    api = Api(faults=["picture:redirect,at=1", "picture:redirect_loop,at=2"])
    bought = api.buy()
    api.clock.time += 5
    api.headers = {}
    followed = api.call("GET", f"/files/{bought}.png", follow_redirects=True)
    assert followed.content.startswith(b"\x89PNG")
    with pytest.raises(httpx.TooManyRedirects):
        api.call("GET", f"/files/{bought}.png", follow_redirects=True)


def test_a_slow_picture_drips() -> None:
    transport = InProcessTransport(
        EmulatorOptions(service_seconds=0, image_size_px=32, faults=["picture:slow,seconds=40"])
    )

    async def story() -> tuple[bytes, float]:
        async with httpx.AsyncClient(transport=transport, base_url="http://e", timeout=None) as http:
            order = {"model": "gemini", "input": {"prompt": "a"}}
            bought = (await http.post("/v1/prediction", json=order, headers={"X-API-Key": KEY})).json()["predictionID"]
            picture = await http.get(f"/files/{bought}.png")
            return picture.content[:4], asyncio.get_running_loop().time()

    assert run(story()) == (b"\x89PNG", pytest.approx(40))


def test_a_bomb_is_small_and_inflates_as_it_says() -> None:
    assert zlib.decompress(zeros_deflated(3)) == bytes(3 * 1024 * 1024)
    packed = bomb(512, 512, 1_024)
    assert len(packed) < 2 * 1024 * 1024
    inflate = zlib.decompressobj()
    data = packed[packed.index(b"IDAT") + 4 :]
    inflated = 0
    while inflated < 2 * 1024 * 1024 and data:
        inflated += len(inflate.decompress(data, 1024 * 1024))
        data = inflate.unconsumed_tail
    assert inflated > 512 * 512 * 3
    assert downloaded("bomb")[0].content == packed


# ---------------------------------------------------------------------- drawing


@pytest.mark.parametrize(
    "prompt",
    [
        "a red fox in the snow",
        "",
        " \n\t ",
        "漢字 and emoji 🦊👩‍👩‍👧 und “Füße” – العربية Привет e\u0301",
        "\ud800 half a character \x00\x1b[31m",
        "x" * 3_000,
        "word " * 2_000,
        "\u202eright to left\u2066",
    ],
    ids=ascii,
)
@pytest.mark.parametrize("size_px", [16, 128])
def test_any_prompt_can_be_drawn(prompt: str, size_px: int) -> None:
    picture = Image.open(io.BytesIO(draw(prompt, size_px=size_px, seed="s")))
    picture.load()
    assert (picture.format, picture.size) == ("PNG", (size_px, size_px))


def test_pictures_differ_by_prompt_and_seed_and_repeat_themselves() -> None:
    one = draw("a", size_px=64, seed="1")
    assert one == draw("a", size_px=64, seed="1")
    assert len({one, draw("b", size_px=64, seed="1"), draw("a", size_px=64, seed="2")}) == 3


def test_a_plain_picture_is_whole_and_says_who_made_it() -> None:
    picture = Image.open(io.BytesIO(plain_png(64, "seed")))
    picture.load()
    assert picture.size == (64, 64)
    assert CAPTION in picture.info["Comment"]


def test_plain_pictures_can_be_asked_for() -> None:
    api = Api(pictures="plain", picture_query="?X-Amz-Signature=secret")
    bought = api.buy()
    api.clock.time += 5
    url = api.get(bought)["output"]
    assert url.endswith(".png?X-Amz-Signature=secret")
    assert api.call("GET", url).content == plain_png(32, f"{bought}/1")
