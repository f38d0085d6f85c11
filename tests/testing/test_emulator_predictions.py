"""A prediction at the emulator from its order to its picture. Time moves by assignment."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest

from prefect_eachlabs.testing.emulator import Emulator, EmulatorOptions, ManualClock
from tests.testing.test_emulator import Api, settled


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
    assert 1 <= min(ends(1)) < 4
    assert 6 < max(ends(1)) <= 15


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
            await settled()
            api.clock.time = 1_000 + moment
        await settled()
        assert not held.done()
        api.clock.time = 1_005
        return str((await held).json()["status"])

    assert api.together(story) == "success"


def test_long_polling_lets_go_after_its_time_or_a_cancel() -> None:
    api = Api(long_poll_seconds=2)
    first, second = api.buy("a"), api.buy("b")

    async def story(http: httpx.AsyncClient) -> list[str]:
        held = [asyncio.ensure_future(http.get(f"/v1/prediction/{bought}")) for bought in (first, second)]
        await settled()
        await http.post(f"/v1/prediction/{first}/cancel")
        cancelled = (await held[0]).json()["status"]
        assert not held[1].done()
        api.clock.time += 2
        return [cancelled, (await held[1]).json()["status"]]

    assert api.together(story) == ["cancelled", "processing"]


def test_an_echo_is_what_was_sent() -> None:
    api = Api()
    prompt = "  Cafe\u0301 – “naïve” 🦊 漢字  "
    bought = api.buy(prompt)
    assert api.get(bought)["input"] == {"prompt": prompt}
    assert json.loads(api.call("GET", f"/v1/prediction/{bought}").content)["input"]["prompt"] == prompt
