"""How a prediction may end otherwise than hoped: failures, shapes of output, echoes, listing, time."""

from __future__ import annotations

import json
import unicodedata
from typing import Any

import pytest

from tests.testing.test_emulator import Api


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
