"""How close to the limits the watcher lets callers come, and never over them: measured in virtual time."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from prefect_eachlabs.limits.limiter import Kind
from tests.limits.local import local_limiter
from tests.polling.model_api import ModelApi, Shop
from tests.virtual_time import run


def shop_for(*, callers: int, minutes: float, **api: Any) -> Shop:
    """So many callers buy one picture after the other, for so long."""

    async def story() -> Shop:
        model = ModelApi(**api)
        limiter = local_limiter(requests_per_minute=model.requests_per_minute, max_in_flight=model.max_in_flight)
        shop = Shop(model, limiter)
        tasks = [asyncio.ensure_future(shop.buy_for_ever()) for _ in range(callers)]
        await asyncio.sleep(60 * minutes)
        assert [task for task in tasks if task.done()] == []
        await shop.poller.close()
        return shop

    return run(story())


def assert_within_the_limits(shop: Shop) -> None:
    """As the API saw it."""
    assert shop.api.throttled == 0
    if shop.api.requests_per_minute is not None:
        assert shop.api.worst_minute() <= shop.api.requests_per_minute
    if shop.api.max_in_flight is not None:
        assert shop.api.most_in_flight <= shop.api.max_in_flight


def steadily(rng: random.Random) -> float:
    return 5.0


def widely(rng: random.Random) -> float:
    return 5.0 * rng.lognormvariate(0, 0.25)


def with_stragglers(rng: random.Random) -> float:
    return 25.0 if rng.random() < 0.03 else rng.uniform(4.5, 5.5)


def test_at_60_a_minute_sweeps_leave_nearly_all_requests_to_creates() -> None:
    shop = shop_for(callers=20, minutes=4, requests_per_minute=60, max_in_flight=10)
    assert_within_the_limits(shop)
    assert shop.per_minute(60, 240) >= 52  # 54.5 is all there is
    assert shop.per_minute(0, 60) >= 48
    assert len(shop.api.asked) / len(shop.ends) <= 1.15


@pytest.mark.parametrize(
    "given",
    [
        {"duration": steadily},
        {"duration": widely},
        {"duration": with_stragglers},
        {"callers": 10},
        {"tells_time": False},
    ],
    ids=["steady", "wide", "with stragglers", "no more callers than slots", "no duration told"],
)
def test_it_is_as_good_at_other_durations_with_few_callers_and_where_no_duration_is_told(given: dict[str, Any]) -> None:
    shop = shop_for(**{"callers": 20, "minutes": 4, "requests_per_minute": 60, "max_in_flight": 10, **given})
    assert_within_the_limits(shop)
    assert shop.per_minute(60, 240) >= 50


@pytest.mark.parametrize("holds", [False, True])
def test_at_60_a_minute_without_executions_one_question_each_is_enough(holds: bool) -> None:
    shop = shop_for(callers=20, minutes=4, requests_per_minute=60, max_in_flight=10, has_executions=False, holds=holds)
    assert_within_the_limits(shop)
    assert shop.per_minute(60, 240) >= 28.5  # 30 is all there is
    assert len(shop.api.asked) / len(shop.ends) <= 2.12


def test_others_rows_on_every_page_leave_it_at_one_question_each() -> None:
    """A busy organization pushes ours off the first page: the list is blind and left alone."""
    shop = shop_for(callers=20, minutes=4, requests_per_minute=60, max_in_flight=10, foreign_rows=120)
    assert_within_the_limits(shop)
    assert shop.per_minute(60, 240) >= 28.5
    assert shop.api.count("executions") <= 3


@pytest.mark.parametrize("has_executions", [True, False])
def test_without_a_request_limit_places_in_flight_are_never_idle_for_long(has_executions: bool) -> None:
    shop = shop_for(callers=20, minutes=2, max_in_flight=10, has_executions=has_executions)
    assert_within_the_limits(shop)
    assert shop.per_minute(60, 120) >= 115.5  # 120 is all there is, without a network
    delays = shop.delays(60)
    assert sum(delays) / len(delays) <= 0.15
    assert delays[int(0.95 * len(delays))] <= 0.3
    assert delays[-1] <= 0.6  # one in twenty ends before the first look
    assert len(shop.api.asked) / len(shop.ends) <= (5 if has_executions else 9)


def test_a_get_that_is_held_open_tells_the_end_at_once_and_costs_one_request() -> None:
    shop = shop_for(callers=20, minutes=2, max_in_flight=10, has_executions=False, holds=True)
    assert_within_the_limits(shop)
    assert shop.per_minute(60, 120) >= 117.5
    assert len(shop.api.asked) / len(shop.ends) <= 2.1


def test_at_600_a_minute_and_100_in_flight_a_sweep_tells_of_many() -> None:
    shop = shop_for(callers=110, minutes=2, requests_per_minute=600, max_in_flight=100)
    assert_within_the_limits(shop)
    assert shop.per_minute(60, 120) >= 560
    assert shop.per_minute(0, 60) >= 480  # the first end of a model is learned by id, and the others wait for it


def test_without_limits_hundreds_in_flight_take_few_requests() -> None:
    shop = shop_for(callers=100, minutes=0.02, duration=lambda rng: 0.05, one_way_seconds=(0.002, 0.004))
    questions = len(shop.api.asked) - shop.api.count("create")
    assert questions / len(shop.ends) <= 0.2
    delays = shop.delays(0.8)
    assert sum(delays) / len(delays) <= 0.05


def test_hundreds_in_flight_beyond_one_page_are_found_on_further_pages() -> None:
    shop = shop_for(callers=120, minutes=0.25)
    offsets = {about for _, endpoint, about in shop.api.asked if endpoint == "executions"}
    assert len(offsets) > 5
    delays = shop.delays(10)
    assert sum(delays) / len(delays) <= 0.3
    assert sum(at > 10 for at, _, _ in shop.api.asked) <= 2 * len(delays)


@pytest.mark.parametrize("requests_per_minute", [60, None])
def test_one_prediction_alone_is_known_soon_and_for_few_questions(requests_per_minute: int | None) -> None:
    async def story() -> tuple[list[float], list[int]]:
        shop = Shop(ModelApi(seed=3), local_limiter(requests_per_minute=requests_per_minute, max_in_flight=10))
        questions = []
        for _ in range(12):
            before = len(shop.api.asked)
            await shop.buy()
            questions.append(len(shop.api.asked) - before - 1)
            await asyncio.sleep(30)
        await shop.poller.close()
        return shop.delays(), questions

    delays, questions = run(story())
    assert sum(delays) / len(delays) <= (0.5 if requests_per_minute else 0.15)
    assert max(delays) <= (1.0 if requests_per_minute else 0.3)
    assert sum(questions[2:]) / 10 <= (5 if requests_per_minute else 15)


def test_a_few_at_once_with_requests_to_spare_are_known_within_half_a_second() -> None:
    async def story() -> Shop:
        shop = Shop(
            ModelApi(requests_per_minute=60, max_in_flight=10),
            local_limiter(requests_per_minute=60, max_in_flight=10),
        )
        await asyncio.gather(*(shop.buy() for _ in range(5)))
        await shop.poller.close()
        return shop

    shop = run(story())
    delays = shop.delays()
    assert sum(delays) / len(delays) <= 0.5
    assert len(shop.api.asked) <= 5 + 9


async def test_nothing_is_asked_and_nothing_kept_when_nothing_is_watched() -> None:
    api = ModelApi(requests_per_minute=60, max_in_flight=10)
    limiter = local_limiter(requests_per_minute=60, max_in_flight=10)
    shop = Shop(api, limiter)
    await asyncio.gather(*(shop.buy() for _ in range(30)))
    await asyncio.sleep(120)
    asked = len(api.asked)
    assert (limiter.pressure(Kind.REQUESTS), limiter.pressure(Kind.IN_FLIGHT)) == (0, 0)
    await asyncio.sleep(3600)
    await shop.poller.close()
    assert (len(api.asked) - asked) == 0
