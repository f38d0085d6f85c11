"""What becomes of futures, places and predictions that take too long."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta, timezone

import pytest

from prefect_eachlabs.errors import PredictionTimedOut
from prefect_eachlabs.models import Prediction, PredictionStatus
from tests.limits.local import local_limiter
from tests.polling.model_api import ModelApi, Shop, a_shop, gaps_of, in_flight, in_shop, now, seconds

# ---- the end, and what comes with it


@pytest.mark.parametrize("has_executions", [True, False])
def test_the_end_carries_all_that_is_known(has_executions: bool) -> None:
    async def story(shop: Shop) -> list[Prediction]:
        return list(await asyncio.gather(*(shop.buy() for _ in range(3))))

    ends = in_shop(story, has_executions=has_executions)
    assert len({end.id for end in ends}) == 3
    for end in ends:
        assert (end.item_id, end.model) == (f"i-{end.id}", "gemini")
        assert end.status is PredictionStatus.SUCCEEDED
        assert end.output_urls == (f"https://pictures.test/{end.id}.0.png",)
        assert end.input == {"prompt": "a fox"}
        assert end.created_at is not None
        assert end.cost_usd == 0.04
        assert end.predict_time_seconds == pytest.approx(5, abs=2)


@pytest.mark.parametrize("end", [PredictionStatus.FAILED, PredictionStatus.CANCELLED])
@pytest.mark.parametrize("callers", [1, 4])
def test_a_prediction_that_fails_is_an_end_learned_by_id(end: PredictionStatus, callers: int) -> None:
    async def story(shop: Shop) -> list[Prediction]:
        return list(await asyncio.gather(*(shop.buy() for _ in range(callers))))

    assert {known.status for known in in_shop(story, end=end)} == {end}


@a_shop()
async def test_watching_the_same_prediction_again_is_the_same_future_and_takes_one_place(shop: Shop) -> None:
    prediction = await shop.api.create()
    first = shop.poller.watch(prediction, slot=None)
    assert in_flight(shop) == 0
    assert shop.poller.watch(prediction, slot=await shop.limiter.take_in_flight()) is first
    assert in_flight(shop) == 0.1
    shop.poller.watch(prediction, slot=await shop.limiter.take_in_flight())
    assert in_flight(shop) == 0.1
    await first
    assert in_flight(shop) == 0


@a_shop()
async def test_an_end_is_remembered_and_a_place_for_it_comes_straight_back(shop: Shop) -> None:
    end = await shop.buy()
    assert shop.poller.end_of(end.id) is end
    again = shop.poller.watch(Prediction(id=end.id), slot=await shop.limiter.take_in_flight())
    assert again.result() is end
    assert in_flight(shop) == 0
    assert shop.poller.end_of("other") is None


@a_shop()
async def test_only_so_many_ends_are_remembered(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prefect_eachlabs.polling.poller.ENDS_REMEMBERED", 3)

    for _ in range(5):
        await shop.buy()
    assert [shop.poller.end_of(f"p{number}") is not None for number in range(1, 6)] == [False, False, True, True, True]


@a_shop()
async def test_what_is_known_by_its_id_alone_gains_what_a_later_call_knows(shop: Shop) -> None:
    prediction = await shop.api.create()
    future = shop.poller.watch(Prediction(id=prediction.id), slot=None)
    shop.poller.watch(prediction, slot=None)
    assert (await future).item_id == "i-p1"


@a_shop(requests_per_minute=60)
async def test_what_may_have_ended_long_ago_is_asked_about_at_once(shop: Shop) -> None:
    old = await shop.api.create()
    older = await shop.api.create()
    await asyncio.sleep(100)
    began_at = now()
    await shop.poller.watch(Prediction(id=old.id), slot=None)
    took_by_id = now() - began_at
    created_at = datetime.now(timezone.utc) - timedelta(seconds=100)
    await shop.poller.watch(older.model_copy(update={"created_at": created_at}), slot=None)
    assert max((took_by_id, now() - began_at)) < 0.3


@a_shop()
async def test_an_awaiter_that_is_cancelled_leaves_the_watching_alone(shop: Shop) -> None:
    prediction = await shop.api.create()
    place = await shop.limiter.take_in_flight()
    awaiter = asyncio.ensure_future(asyncio.wait_for(shop.poller.watch(prediction, slot=place), 1))
    with pytest.raises((asyncio.TimeoutError, TimeoutError)):
        await awaiter
    assert (await shop.poller.watch(prediction, slot=None)).status.ended
    assert in_flight(shop) == 0


# ---- GETs that are held open


@a_shop(has_executions=False, duration=seconds(5))
async def test_a_get_that_hangs_holds_nobody_else_up(shop: Shop) -> None:
    shop.api.hangs["p1"] = 70.0
    known: dict[str, float] = {}

    async def one() -> None:
        end = await shop.buy()
        known[end.id] = now()

    await asyncio.gather(*(one() for _ in range(5)))
    assert all(at < 5.6 for id, at in known.items() if id != "p1")
    assert known["p1"] < 40  # asked again while the first question is still out


async def test_held_questions_are_bounded() -> None:
    class Counting(ModelApi):
        out = 0
        most = 0

        async def get(self, prediction_id: str) -> Prediction:
            self.out += 1
            Counting.most = max(Counting.most, self.out)
            try:
                return await super().get(prediction_id)
            finally:
                self.out -= 1

    shop = Shop(
        Counting(holds=True, has_executions=False),
        local_limiter(requests_per_minute=None, max_in_flight=None),
    )
    for _ in range(2):
        await asyncio.gather(*(shop.buy() for _ in range(70)))
    await shop.poller.close()
    assert 32 <= Counting.most <= 64


# ---- hurry, patience, the end of it


@a_shop(requests_per_minute=60, duration=seconds(300))
async def test_hurry_asks_at_once_and_again_until_the_end(shop: Shop) -> None:
    prediction = await shop.api.create()
    future = shop.poller.watch(prediction, slot=None)
    shop.poller.hurry("unknown")
    await asyncio.sleep(1)
    shop.poller.hurry(prediction.id)
    await asyncio.sleep(1)
    shop.api.jobs[prediction.id].end = PredictionStatus.CANCELLED
    shop.api.jobs[prediction.id].seconds = 0
    assert (await future).status is PredictionStatus.CANCELLED
    times = shop.api.times("get")
    assert times[0] == pytest.approx(1.1, abs=0.1)
    assert times[-1] < 4.5


@a_shop(requests_per_minute=60, duration=seconds(1e9))
async def test_a_prediction_long_overdue_is_asked_about_ever_less_often_and_keeps_its_place_for_an_hour(
    shop: Shop,
) -> None:
    place = await shop.limiter.take_in_flight()
    shop.poller.watch(await shop.api.create(), slot=place)
    await asyncio.sleep(3500)
    assert in_flight(shop) == 0.1
    await asyncio.sleep(200)
    assert in_flight(shop) == 0
    times = shop.api.times("get")
    gaps = gaps_of(times)
    assert max(gaps) <= 62
    assert min(gaps[-20:]) >= 58
    assert len(times) < 120


def test_many_that_never_end_leave_most_requests_to_others() -> None:
    async def story(shop: Shop) -> float:
        for _ in range(25):
            shop.poller.watch(await shop.api.create(), slot=None)
        await asyncio.sleep(900)
        return shop.api.count("get") / 15

    duration = seconds(1e9)
    assert in_shop(story, requests_per_minute=150, max_in_flight=None, has_executions=False, duration=duration) < 60


@a_shop(duration=seconds(1e9))
async def test_after_a_day_it_is_given_up(shop: Shop) -> None:
    with pytest.raises(PredictionTimedOut) as error:
        await shop.poller.watch(await shop.api.create(), slot=None)
    assert error.value.prediction_id == "p1"
    assert 86_400 < now() < 86_600


@a_shop(requests_per_minute=60, duration=seconds(1e9))
async def test_close_cancels_the_futures_and_leaves_nothing_behind(shop: Shop) -> None:
    futures = []
    for _ in range(5):
        place = await shop.limiter.take_in_flight()
        futures.append(shop.poller.watch(await shop.api.create(), slot=place))
    await asyncio.sleep(5)
    await shop.poller.close()
    await shop.poller.close()
    await shop.limiter.close()
    assert [future.cancelled() for future in futures] == [True] * 5
    assert in_flight(shop) == 0.5  # they go on at the API
    assert [task for task in asyncio.all_tasks() if task is not asyncio.current_task()] == []
    assert shop.poller.watch(Prediction(id="p9"), slot=None).cancelled()
