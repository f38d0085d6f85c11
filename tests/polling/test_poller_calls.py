"""How much faster it is when the vendor calls, and never slower when it does not: measured in virtual time."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from pydantic import SecretStr

from prefect_eachlabs.models import Prediction
from prefect_eachlabs.settings import AccountSettings
from prefect_eachlabs.webhooks.calls import Call, write_id_in
from prefect_eachlabs.webhooks.costs import LateCosts
from prefect_eachlabs.webhooks.webhooks import Webhooks
from tests.limits.local import local_limiter
from tests.polling.model_api import Job, ModelApi, Shop, now
from tests.polling.test_poller_pace import assert_within_the_limits, shop_for
from tests.virtual_time import run

SETTINGS = AccountSettings(
    api_key=SecretStr("a-key"),
    webhook_url="https://hooks.test/in",
    webhook_secret=SecretStr("the secret of all orders' secrets"),
)
Late = Callable[[random.Random, float], float | None]
"""How many seconds after its end a prediction's call comes, at which time; None: it does not."""


def at_once(rng: random.Random, at: float) -> float | None:
    return 0.05


@dataclass
class CalledShop(Shop):
    """A shop that the API calls."""

    late: Late = at_once

    def __post_init__(self) -> None:
        super().__post_init__()
        self.webhooks = Webhooks(SETTINGS, self.poller)
        self.costs = LateCosts(self.api, self.limiter, self.poller, self._note, self.webhooks.heard)
        self.webhooks.end_listeners.append(self.costs.expect)
        self.told = 0
        self._calls: set[asyncio.Task[None]] = set()

    async def _note(self, _: object) -> bool:
        self.told += 1
        return True

    async def buy(self, model: str = "gemini", input: dict[str, object] | None = None) -> Prediction:
        in_flight = await self.limiter.take_in_flight()
        request = await self.limiter.take_request()
        name = self.webhooks.name()
        callback = self.webhooks.callback(name)
        assert callback is not None
        try:
            prediction = await self.api.create(model, input)
        finally:
            request.done()
        job = self.api.jobs[prediction.id]
        task = asyncio.ensure_future(self._call(job, callback.url, callback.secret))
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)
        future = self.poller.watch(prediction, slot=in_flight)
        self.webhooks.bought([name], prediction)
        end = await asyncio.shield(future)
        self.ends.append((job.began_at + job.seconds, now()))
        return end

    async def _call(self, job: Job, url: str, secret: str) -> None:
        ended_at = job.began_at + job.seconds
        late = self.late(self.api.rng, ended_at)
        if late is not None:
            await asyncio.sleep(max(0.0, ended_at + late - now()))
            body = json.dumps({"exec_id": job.id, "status": "succeeded", "output": job.urls[0]}).encode()
            self.webhooks.take(Call(body, write_id_in(url), secret))


def called_shop(*, callers: int = 20, minutes: float = 4, late: Late = at_once, **api: object) -> CalledShop:
    async def story() -> CalledShop:
        model = ModelApi(**api)  # type: ignore[arg-type]
        limiter = local_limiter(requests_per_minute=model.requests_per_minute, max_in_flight=model.max_in_flight)
        shop = CalledShop(model, limiter, late=late)
        tasks = [asyncio.ensure_future(shop.buy_for_ever()) for _ in range(callers)]
        await asyncio.sleep(60 * minutes)
        assert [task for task in tasks if task.done()] == []
        await shop.costs.aclose()
        await shop.poller.close()
        return shop

    return run(story())


def test_at_60_a_minute_every_request_buys() -> None:
    shop = called_shop(requests_per_minute=60, max_in_flight=10)
    assert_within_the_limits(shop)
    assert shop.per_minute(60, 240) >= 57  # 60 is the limit itself


def test_without_a_request_limit_a_picture_costs_little_more_than_its_order() -> None:
    shop = called_shop(minutes=3, max_in_flight=10)
    asked = shop_for(callers=20, minutes=3, max_in_flight=10)
    assert_within_the_limits(shop)
    assert sum(at > 60 for at, _, _ in shop.api.asked) <= 1.1 * 2 * shop.per_minute(60, 180)
    assert shop.per_minute(60, 180) >= asked.per_minute(60, 180), "and is no slower"
    assert shop.told >= 0.5 * len(shop.ends), "costs come, once a minute"
    assert sum(at > 60 for at in shop.api.times("executions")) <= 3 * 2, "a hundred rows a page, once a minute"


def test_for_a_long_job_nobody_asks_for_minutes() -> None:
    shop = called_shop(callers=5, minutes=30, max_in_flight=5, duration=lambda rng: rng.uniform(240, 300))
    late = [at for at, name, _ in shop.api.asked if name == "get" and at > 700]
    assert late == []
    listed = [at for at in shop.api.times("executions") if at > 700]
    assert len(listed) <= 18, "costs alone, once a minute at most"


@pytest.mark.parametrize(("limits", "minutes"), [({"requests_per_minute": 60}, 4), ({}, 1.5)])
def test_where_none_ever_comes_it_is_as_fast_as_without(limits: dict[str, int], minutes: float) -> None:
    without = shop_for(callers=20, minutes=minutes, max_in_flight=10, **limits)
    shop = called_shop(minutes=minutes, late=lambda rng, at: None, max_in_flight=10, **limits)
    assert_within_the_limits(shop)
    assert shop.webhooks.given_up
    assert shop.per_minute(0, 60 * minutes) >= 0.98 * without.per_minute(0, 60 * minutes)


@pytest.mark.parametrize(("limits", "minutes"), [({"requests_per_minute": 60}, 4), ({}, 0.5)])
def test_calls_that_stop_cost_half_a_minute_once(limits: dict[str, int], minutes: float) -> None:
    shop = called_shop(minutes=3 + minutes, late=lambda rng, at: 0.05 if at < 120 else None, max_in_flight=10, **limits)
    without = shop_for(callers=20, minutes=1 + minutes, max_in_flight=10, **limits)
    assert_within_the_limits(shop)
    assert shop.webhooks.given_up
    # Calls free slots one by one, pages ten at a time: it takes minutes until the orders come in groups again.
    wanted = 0.85 * without.per_minute(60, 60 + 60 * minutes)
    assert shop.per_minute(180, 180 + 60 * minutes) >= wanted


def test_calls_that_come_again_are_counted_on_again() -> None:
    def late(rng: random.Random, at: float) -> float | None:
        return None if 120 <= at < 240 else 0.05

    shop = called_shop(minutes=7, late=late, requests_per_minute=60, max_in_flight=10)
    assert not shop.webhooks.given_up
    assert shop.per_minute(300, 420) >= 57


def test_a_tenth_that_is_lost_is_found_by_asking_and_the_rest_goes_on() -> None:
    def late(rng: random.Random, at: float) -> float | None:
        return None if rng.random() < 0.1 else rng.uniform(0.05, 0.5)

    shop = called_shop(minutes=4, late=late, requests_per_minute=60, max_in_flight=10)
    assert_within_the_limits(shop)
    assert not shop.webhooks.given_up
    assert shop.per_minute(60, 240) >= 50
    assert max(shop.delays()) <= 60


def test_calls_that_become_late_are_waited_for_for_two_minutes_at_most() -> None:
    """The list says how late they were; it is asked once a minute, for costs."""
    limits = {"requests_per_minute": 60, "max_in_flight": 10}
    shop = called_shop(minutes=6, late=lambda rng, at: 0.05 if at < 120 else 21.0, **limits)
    assert_within_the_limits(shop)
    assert shop.webhooks.given_up
    assert shop.per_minute(240, 360) >= 48


@pytest.mark.parametrize("seed", [4, 9])
def test_calls_that_are_always_late_are_not_waited_for(seed: int) -> None:
    """The vendor's first two attempts fail each time: asking is faster than that."""
    limits = {"requests_per_minute": 60, "max_in_flight": 10, "seed": seed}
    shop = called_shop(late=lambda rng, at: 21.0, **limits)
    without = shop_for(callers=20, minutes=4, **limits)
    assert_within_the_limits(shop)
    assert shop.per_minute(60, 240) >= 0.95 * without.per_minute(60, 240)
