"""Other teams ask for a picture by an event."""

from __future__ import annotations

from typing import Any

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from prefect_eachlabs import BadInput, SetupError, events, request_picture
from prefect_eachlabs.models import Item

SERVER = "http://127.0.0.1:4200/api"


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    heard: list[dict[str, Any]] = []
    monkeypatch.setattr(events, "emit_event", lambda event, **facts: heard.append({"event": event, **facts}))
    return heard


def test_a_request_names_the_item_and_holds_the_prompt(sent: list[dict[str, Any]]) -> None:
    with temporary_settings({PREFECT_API_URL: SERVER}):
        assert request_picture("a red fox", item_id="order-7") == "order-7"
    (event,) = sent
    assert event["event"] == "eachlabs.picture.requested"
    assert event["resource"]["prefect.resource.id"] == "eachlabs.picture.order-7"
    assert event["payload"] == {"prompt": "a red fox", "item_id": "order-7"}


def test_without_a_name_equal_prompts_are_one_item(sent: list[dict[str, Any]]) -> None:
    with temporary_settings({PREFECT_API_URL: SERVER}):
        names = {request_picture("a red fox"), request_picture("a red fox"), request_picture("a blue fox")}
    assert names == {Item.wanted("a red fox").item_id, Item.wanted("a blue fox").item_id}


@pytest.mark.parametrize(
    ("prompt", "item_id"), [("", "order-7"), ("   ", ""), ("a fox", "order 7"), ("a fox", "x" * 129)]
)
def test_what_could_never_be_bought_is_not_asked_for(sent: list[dict[str, Any]], prompt: str, item_id: str) -> None:
    with temporary_settings({PREFECT_API_URL: SERVER}), pytest.raises(BadInput):
        request_picture(prompt, item_id=item_id)
    assert not sent


def test_without_a_server_nobody_would_hear_it(sent: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with temporary_settings(restore_defaults={PREFECT_API_URL}), pytest.raises(SetupError, match="PREFECT_API_URL"):
        request_picture("a red fox")
    assert not sent
