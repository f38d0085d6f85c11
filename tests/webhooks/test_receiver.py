"""The receiver stands in the open: every request is answered at once, within bounds, and logs nothing of itself."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from prefect_eachlabs.webhooks.calls import MAX_BODY_BYTES, Call, secret_of
from prefect_eachlabs.webhooks.prefect_events import EventForwarder
from prefect_eachlabs.webhooks.receiver import BODY_WITHIN_SECONDS, receiver_app
from prefect_eachlabs.webhooks.webhooks import Verdict
from tests.virtual_time import run

MASTER = "the secret of all orders' secrets"
ORDER = "0" * 32
SECRET = secret_of(MASTER, ORDER)
URL = f"http://receiver/in?write_id={ORDER}"
BODY = json.dumps({"exec_id": "p-1", "status": "succeeded", "output": "https://x.test/1.png"}).encode()


def ask(take: Callable[[Call], Verdict], method: str = "POST", **given: Any) -> httpx.Response:
    async def story() -> httpx.Response:
        transport = httpx.ASGITransport(receiver_app(take), raise_app_exceptions=True)
        async with httpx.AsyncClient(transport=transport) as http:
            return await http.request(method, given.pop("url", URL), **given)

    return run(story())


def test_good_calls_are_acknowledged_and_all_others_refused() -> None:
    hand_on = EventForwarder(MASTER)
    good = {"X-Webhook-Secret": SECRET}
    assert ask(hand_on.take, content=BODY, headers=good).status_code == 202
    assert ask(hand_on.take, content=BODY, headers=good).status_code == 202, "twice"
    assert ask(hand_on.take, content=BODY).status_code == 401
    assert ask(hand_on.take, content=BODY, headers={"X-Webhook-Secret": MASTER}).status_code == 401
    assert ask(hand_on.take, content=BODY, headers=good, url="http://receiver/in").status_code == 401, "no order named"
    assert ask(hand_on.take, content=BODY, headers=good, url=URL[:-1] + "1").status_code == 401, "another order"
    assert ask(hand_on.take, content=b"{", headers=good).status_code == 400
    assert ask(hand_on.take, content=b"").status_code == 401, "the body is not read before the secret"
    assert ask(hand_on.take, "PUT", content=BODY, headers=good).status_code == 405
    assert ask(hand_on.take, "GET").status_code == 200


def test_a_body_is_bounded_and_is_not_waited_for() -> None:
    taken: list[Call] = []

    def take(call: Call) -> Verdict:
        taken.append(call)
        return Verdict.TAKEN

    assert ask(take, content=b"x" * MAX_BODY_BYTES).status_code == 202
    assert ask(take, content=b"x" * (MAX_BODY_BYTES + 1)).status_code == 413

    async def story() -> tuple[int, float]:
        """A caller who sends half a body and then nothing."""
        answers: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            await asyncio.sleep(2.0)
            return {"type": "http.request", "body": b"x", "more_body": True}

        async def send(message: Any) -> None:
            answers.append(message)

        scope = {"type": "http", "method": "POST", "headers": [], "query_string": b""}
        await receiver_app(take)(scope, receive, send)
        return answers[0]["status"], asyncio.get_running_loop().time()

    assert run(story()) == (408, BODY_WITHIN_SECONDS)
    assert len(taken) == 1


async def test_a_caller_who_leaves_is_nobodys_fault() -> None:
    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def send(_: Any) -> None:
        pass

    scope = {"type": "http", "method": "POST", "headers": [], "query_string": b"\xff"}
    await receiver_app(lambda call: Verdict.TAKEN)(scope, receive, send)


def test_when_too_many_wait_the_vendor_is_asked_to_call_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prefect_eachlabs.webhooks.prefect_events.MOST_WAITING", 1)
    hand_on = EventForwarder(MASTER)
    good = {"X-Webhook-Secret": SECRET}
    assert ask(hand_on.take, content=BODY, headers=good).status_code == 202
    assert ask(hand_on.take, content=BODY, headers=good).status_code == 503


def test_nothing_of_a_request_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="prefect_eachlabs"), caplog.at_level(logging.DEBUG, logger="uvicorn"):
        hand_on = EventForwarder(MASTER)
        for secret in (SECRET, "a-wrong-secret"):
            ask(hand_on.take, content=b'{"prompt": "of a body"}', headers={"X-Webhook-Secret": secret})
    said = "\n".join(record.getMessage() for record in caplog.records if not record.name.startswith("httpx"))
    assert "of a body" not in said
    assert "wrong-secret" not in said
    assert SECRET not in said
