"""The emulator calls as the vendor's texts say, and badly on request."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from prefect_eachlabs.testing.emulator import Emulator, EmulatorOptions, InProcessTransport, kinds_of
from tests.testing.emulator_kit import KEY, ORDER
from tests.virtual_time import run

CALLED = {**ORDER, "webhook_url": "https://hooks.test/in?write_id=1", "webhook_secret": "the secret of this order"}


class Hook(httpx.AsyncBaseTransport):
    """Receives calls, and answers so many of them with an error first."""

    def __init__(self, errors: int = 0) -> None:
        self.errors = errors
        self.calls: list[tuple[float, httpx.Request]] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        await request.aread()
        self.calls.append((asyncio.get_running_loop().time(), request))
        self.errors -= 1
        return httpx.Response(500 if self.errors >= 0 else 204, request=request)


def called(*faults: str, errors: int = 0, cancel: bool = False, **options: Any) -> tuple[Hook, Any, Any]:
    """What a hook saw of one order, and the list of webhooks afterwards, and the order's own."""

    async def story() -> tuple[Hook, Any, Any]:
        hook = Hook(errors)
        told = EmulatorOptions(faults=faults, service_seconds=5.0, spread=0.0, pictures="plain", **options)
        emulator = Emulator(told, threads=False, outwards=hook)
        http = httpx.AsyncClient(
            transport=InProcessTransport(emulator), base_url="http://emulator", headers={"X-API-Key": KEY}
        )
        async with http:
            await http.post("/v1/prediction/", json=ORDER)  # asks for no call
            bought = (await http.post("/v1/prediction/", json=CALLED)).json()["predictionID"]
            if cancel:
                await http.post(f"/v1/prediction/{bought}/cancel")
            await asyncio.sleep(120)
            page = await http.get("/v1/webhooks")
            assert bought in page.text or cancel or page.status_code == 404
            one = await http.get(f"/v1/webhooks/{bought}")
        return hook, page.json(), one.json()

    return run(story())


def test_it_calls_once_at_the_end_with_the_orders_secret() -> None:
    hook, page, _ = called()
    ((at, request),) = hook.calls
    assert at == pytest.approx(5.0, abs=0.1)
    assert str(request.url) == CALLED["webhook_url"]
    assert request.headers["x-webhook-secret"] == CALLED["webhook_secret"]
    body = json.loads(request.content)
    assert list(body) == ["exec_id", "flow_id", "status", "output", "error"]
    assert (body["status"], body["error"]) == ("succeeded", "")
    assert [row["url"] for row in page["webhooks"]] == [CALLED["webhook_url"]]


def test_the_older_form_is_signed_and_repeats_the_input() -> None:
    hook, _, _ = called(webhooks="older")
    ((_, request),) = hook.calls
    assert "x-webhook-secret" not in request.headers
    assert len(request.headers["x-webhook-signature"]) == 64
    body = json.loads(request.content)
    assert (body["status"], body["input"]) == ("success", ORDER["input"])


def test_a_failures_reason_stands_in_the_output() -> None:
    hook, _, _ = called("prediction:fail")
    body = json.loads(hook.calls[0][1].content)
    assert body["status"] == "failed"
    assert body["output"][0]["error"]


def test_what_is_not_acknowledged_is_tried_three_times_ten_seconds_apart() -> None:
    hook, _, _ = called(errors=5)
    assert [round(at) for at, _ in hook.calls] == [5, 15, 25]


def test_there_is_no_call_after_a_cancel_and_none_where_webhooks_are_not_there() -> None:
    assert called(cancel=True)[0].calls == []
    hook, page, _ = called(webhooks="none")
    assert hook.calls == []
    assert "webhooks" not in page


SEEN = {"lost": 0, "attempt_lost": 1, "twice": 2, "late": 1, "forged": 5, "stolen": 3, "malformed": 1, "huge": 1}


@pytest.mark.parametrize("kind", kinds_of("webhook"))
def test_every_fault_is_seen(kind: str) -> None:
    hook, _, _ = called(f"webhook:{kind}")
    assert len(hook.calls) == SEEN[kind]
    if kind in ("late", "attempt_lost"):
        assert hook.calls[0][0] >= 15
