"""What a call may change: the end of the one prediction that its order bought, once, and nothing else."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from pydantic import SecretStr

from prefect_eachlabs.models import Prediction, PredictionStatus
from prefect_eachlabs.net.redaction import shown
from prefect_eachlabs.polling.poller import Poller
from prefect_eachlabs.settings import AccountSettings
from prefect_eachlabs.webhooks import webhooks as room
from prefect_eachlabs.webhooks.calls import Call, secret_of
from prefect_eachlabs.webhooks.webhooks import Verdict, Webhooks
from tests.limits.local import local_limiter
from tests.polling.model_api import ModelApi

MASTER = "the secret of all orders' secrets"
SETTINGS = AccountSettings(
    api_key=SecretStr("a-key"), webhook_url="https://hooks.test/in", webhook_secret=SecretStr(MASTER)
)


def call(write_id: str | None, prediction_id: str = "p1", *, by: str | None = None, **said: Any) -> Call:
    told = {"exec_id": prediction_id, "status": "succeeded", "output": "https://x.test/1.png", **said}
    return Call(json.dumps(told).encode(), write_id, secret_of(MASTER, by or write_id or ""))


def of_an_account() -> Webhooks:
    return Webhooks(SETTINGS, Poller(ModelApi(), local_limiter(requests_per_minute=None, max_in_flight=None)))


@pytest.fixture
def webhooks() -> Webhooks:
    return of_an_account()


@pytest.fixture
def poller(webhooks: Webhooks) -> Poller:
    return webhooks._poller


def ordered(webhooks: Webhooks, poller: Poller, prediction_id: str = "p1") -> tuple[str, asyncio.Future[Prediction]]:
    name = webhooks.name()
    assert webhooks.callback(name) is not None
    prediction = Prediction(id=prediction_id, model="gemini")
    future = poller.watch(prediction, slot=None)
    webhooks.bought([name], prediction)
    return name, future


async def test_a_call_ends_its_orders_prediction_once(webhooks: Webhooks, poller: Poller) -> None:
    name, future = ordered(webhooks, poller)
    assert webhooks.take(call(name)) is Verdict.TAKEN
    end = await future
    assert (end.status, end.output_urls) == (PredictionStatus.SUCCEEDED, ("https://x.test/1.png",))
    assert webhooks.take(call(name, output="https://y.test/2.png")) is Verdict.KEPT
    assert poller.end_of("p1") == end, "a replay changes nothing"


async def test_another_orders_secret_tells_nothing_of_this_one(webhooks: Webhooks, poller: Poller) -> None:
    name, future = ordered(webhooks, poller)
    other, _ = ordered(webhooks, poller, "p2")
    assert webhooks.take(call(name, by=other)) is Verdict.REFUSED
    assert webhooks.take(call(other, "p1")) is Verdict.CONTRADICTS
    assert webhooks.take(call(None, "p1", by=other)) is Verdict.CONTRADICTS
    assert webhooks.take(call("f" * 32, "p1")) is Verdict.KEPT, "an order that nobody here knows"
    assert not future.done()
    assert webhooks.counts == {Verdict.REFUSED: 1, Verdict.CONTRADICTS: 2, Verdict.KEPT: 1}


async def test_a_call_that_comes_before_the_orders_answer_is_kept_for_it(webhooks: Webhooks, poller: Poller) -> None:
    name = webhooks.name()
    webhooks.callback(name)
    named: list[str] = []
    webhooks.named_listeners.append(named.append)
    assert webhooks.take(call(name)) is Verdict.KEPT
    assert named == [name]
    assert webhooks.prediction_of(["another", name]) == "p1"
    prediction = Prediction(id="p1")
    future = poller.watch(prediction, slot=None)
    webhooks.bought([name], prediction)
    assert (await future).status is PredictionStatus.SUCCEEDED


async def test_a_kept_call_for_another_prediction_than_the_answer_names_changes_nothing(
    webhooks: Webhooks, poller: Poller
) -> None:
    name = webhooks.name()
    webhooks.callback(name)
    webhooks.take(call(name, "p9"))
    future = poller.watch(Prediction(id="p1"), slot=None)
    webhooks.bought([name], Prediction(id="p1"))
    assert not future.done()


async def test_a_call_that_names_no_order_is_known_by_its_secret_among_those_that_wait(
    webhooks: Webhooks, poller: Poller
) -> None:
    name, future = ordered(webhooks, poller)
    assert webhooks.take(call(None, by=name)) is Verdict.TAKEN
    assert future.done()
    assert webhooks.take(call(None, by=name)) is Verdict.REFUSED, "a leaked secret of an order that has ended"


@pytest.mark.parametrize("said", [{"status": "processing"}, {"output": ""}, {"status": "failed", "output": []}])
async def test_what_does_not_tell_the_whole_end_ends_nothing(
    webhooks: Webhooks, poller: Poller, said: dict[str, Any]
) -> None:
    name, future = ordered(webhooks, poller)
    webhooks.take(call(name, **said))
    assert not future.done()


def test_without_a_secret_or_a_url_nobody_is_believed_or_asked_to_call(poller: Poller) -> None:
    nothing = {"webhook_url": "", "webhook_secret": SecretStr("")}
    webhooks = Webhooks(SETTINGS.model_copy(update=nothing), poller)
    assert webhooks.name() == ""
    assert webhooks.callback("") is None
    no_secret = Call(b"{}", "0" * 32, secret_of("", "0" * 32))
    assert webhooks.take(no_secret) is Verdict.REFUSED


def test_the_secret_of_a_block_is_shown_nowhere(poller: Poller) -> None:
    mine = "a block's own secret, of no environment"
    assert mine in shown(f"it is {mine}")
    Webhooks(SETTINGS.model_copy(update={"webhook_secret": SecretStr(mine)}), poller)
    assert shown(f"it is {mine}") == "it is ***"


async def test_what_is_remembered_has_an_end(webhooks: Webhooks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "REMEMBERED", 10)

    for number in range(50):
        webhooks.take(call(f"{number:032x}"))
        webhooks.callback(webhooks.name())
    assert len(webhooks._kept) == len(webhooks._orders) == 10


async def test_a_way_that_cannot_be_opened_is_said_once_and_asking_goes_on(
    poller: Poller, caplog: pytest.LogCaptureFixture
) -> None:
    async def taken(_: object) -> Any:
        raise OSError("Address already in use")

    one = Webhooks(SETTINGS, poller, taken)
    assert [await one.open() for _ in range(3)] == [False] * 3
    await one.aclose()
    assert [record.levelname for record in caplog.records if "cannot come in here" in record.message] == ["WARNING"]
