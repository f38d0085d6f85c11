"""What the watcher believes, whom it asks again, and what becomes of futures and places."""

from __future__ import annotations

import asyncio
import gc
import logging
import random
from collections import deque
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta, timezone
from itertools import pairwise
from typing import Any, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefect_eachlabs.errors import (
    EachlabsError,
    KeyRefused,
    NotSent,
    PredictionTimedOut,
    Rejected,
    Throttled,
    Unanswered,
)
from prefect_eachlabs.models import Prediction, PredictionStatus
from prefect_eachlabs.pacing import Kind, LocalLots, Places
from tests.model_api import Job, ModelApi, Shop, now
from tests.virtual_time import run

T = TypeVar("T")


def in_shop(
    story: Callable[[Shop], Awaitable[T]],
    *,
    requests_per_minute: int | None = None,
    max_in_flight: int | None = 10,
    **api: Any,
) -> T:
    """Runs a story in a shop; what was taken must be back when its last prediction has ended."""

    async def whole() -> T:
        model = ModelApi(requests_per_minute=requests_per_minute, max_in_flight=max_in_flight, **api)
        lots = LocalLots(requests_per_minute=requests_per_minute, max_in_flight=max_in_flight)
        shop = Shop(model, Places(lots))
        result = await story(shop)
        await shop.watcher.close()
        await asyncio.sleep(61)
        assert shop.places.pressure(Kind.REQUESTS) == 0
        return result

    return run(whole())


def seconds(value: float) -> Callable[[random.Random], float]:
    return lambda rng: value


def in_flight(shop: Shop) -> float:
    return shop.places.pressure(Kind.IN_FLIGHT)


def gaps_of(times: list[float]) -> list[float]:
    return [later - earlier for earlier, later in pairwise(times)]


def refused(status_code: int) -> Rejected:
    return Rejected("no", status_code=status_code)


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


def test_watching_the_same_prediction_again_is_the_same_future_and_takes_one_place() -> None:
    async def story(shop: Shop) -> None:
        prediction = await shop.api.create()
        first = shop.watcher.watch(prediction, place=None)
        assert in_flight(shop) == 0
        assert shop.watcher.watch(prediction, place=await shop.places.take_in_flight()) is first
        assert in_flight(shop) == 0.1
        shop.watcher.watch(prediction, place=await shop.places.take_in_flight())
        assert in_flight(shop) == 0.1
        await first
        assert in_flight(shop) == 0

    in_shop(story)


def test_an_end_is_remembered_and_a_place_for_it_comes_straight_back() -> None:
    async def story(shop: Shop) -> None:
        end = await shop.buy()
        assert shop.watcher.end_of(end.id) is end
        again = shop.watcher.watch(Prediction(id=end.id), place=await shop.places.take_in_flight())
        assert again.result() is end
        assert in_flight(shop) == 0
        assert shop.watcher.end_of("other") is None

    in_shop(story)


def test_only_so_many_ends_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prefect_eachlabs.answers.ENDS_REMEMBERED", 3)

    async def story(shop: Shop) -> list[bool]:
        for _ in range(5):
            await shop.buy()
        return [shop.watcher.end_of(f"p{number}") is not None for number in range(1, 6)]

    assert in_shop(story) == [False, False, True, True, True]


def test_what_is_known_by_its_id_alone_gains_what_a_later_call_knows() -> None:
    async def story(shop: Shop) -> Prediction:
        prediction = await shop.api.create()
        future = shop.watcher.watch(Prediction(id=prediction.id), place=None)
        shop.watcher.watch(prediction, place=None)
        return await future

    assert in_shop(story).item_id == "i-p1"


def test_what_may_have_ended_long_ago_is_asked_about_at_once() -> None:
    async def story(shop: Shop) -> tuple[float, float]:
        old = await shop.api.create()
        older = await shop.api.create()
        await asyncio.sleep(100)
        began_at = now()
        await shop.watcher.watch(Prediction(id=old.id), place=None)
        took_by_id = now() - began_at
        created_at = datetime.now(timezone.utc) - timedelta(seconds=100)
        await shop.watcher.watch(older.model_copy(update={"created_at": created_at}), place=None)
        return took_by_id, now() - began_at

    assert max(in_shop(story, requests_per_minute=60)) < 0.3


def test_an_awaiter_that_is_cancelled_leaves_the_watching_alone() -> None:
    async def story(shop: Shop) -> None:
        prediction = await shop.api.create()
        place = await shop.places.take_in_flight()
        awaiter = asyncio.ensure_future(asyncio.wait_for(shop.watcher.watch(prediction, place=place), 1))
        with pytest.raises((asyncio.TimeoutError, TimeoutError)):
            await awaiter
        assert (await shop.watcher.watch(prediction, place=None)).status.ended
        assert in_flight(shop) == 0

    in_shop(story)


# ---- what a row of executions is worth


def test_rows_of_the_missions_model_are_believed() -> None:
    async def story(shop: Shop) -> int:
        await asyncio.gather(*(shop.buy() for _ in range(10)))
        return shop.api.count("get")

    assert in_shop(story, requests_per_minute=60) == 0


def test_of_another_model_the_first_end_is_learned_by_id_and_rows_are_believed_then() -> None:
    async def story(shop: Shop) -> tuple[int, int]:
        await asyncio.gather(*(shop.buy("flux") for _ in range(10)))
        first = shop.api.count("get")
        await asyncio.gather(*(shop.buy("flux") for _ in range(10)))
        return first, shop.api.count("get") - first

    first, then = in_shop(story, requests_per_minute=600)
    assert first >= 1
    assert then <= 3  # one that is due alone is asked about by id: a page would tell no more


@pytest.mark.parametrize("model", ["flux", "gemini"])
def test_several_outputs_are_asked_for_by_id(model: str) -> None:
    async def story(shop: Shop) -> list[Prediction]:
        ends: list[Prediction] = []
        for _ in range(2):
            ends += await asyncio.gather(*(shop.buy(model, {"num_images": 3}) for _ in range(5)))
        return ends

    assert {len(end.output_urls) for end in in_shop(story, urls=3)} == {3}


def test_a_model_that_was_seen_to_make_several_is_never_believed_again() -> None:
    async def story(shop: Shop) -> list[int]:
        counts = [len((await shop.buy()).output_urls)]
        counts += [len(end.output_urls) for end in await asyncio.gather(*(shop.buy() for _ in range(5)))]
        return counts

    assert in_shop(story, urls=2) == [2] * 6


def test_what_a_sweep_does_not_show_is_asked_for_by_itself() -> None:
    def shows(job: Job) -> bool:
        return int(job.id[1:]) % 3 != 0

    async def story(shop: Shop) -> list[str]:
        await asyncio.gather(*(shop.buy() for _ in range(9)))
        return sorted({about for _, endpoint, about in shop.api.asked if endpoint == "get"})

    assert in_shop(story, shows=shows, duration=seconds(5)) == ["p3", "p6", "p9"]


# ---- where the list is no good


@pytest.mark.parametrize("fault", [refused(404), KeyRefused("no", status_code=403)])
def test_a_list_that_is_missing_or_refused_is_left_alone_for_ten_minutes(fault: EachlabsError) -> None:
    async def story(shop: Shop) -> list[float]:
        shop.api.faults["executions"] = deque([fault] * 1000)
        while now() < 900:
            await asyncio.gather(*(shop.buy() for _ in range(3)))
        return shop.api.times("executions")

    times = in_shop(story)
    assert len(times) == 2
    assert 600 <= times[1] - times[0] < 610


def test_a_list_that_does_not_answer_is_asked_again_later_each_time() -> None:
    async def story(shop: Shop) -> list[float]:
        shop.api.faults["executions"] = deque([Unanswered("cut")] * 4 + [ValueError("unforeseen")])
        while now() < 120:
            await asyncio.gather(*(shop.buy() for _ in range(3)))
        times = shop.api.times("executions")
        return gaps_of(times)[:5]

    for gap, at_least in zip(in_shop(story), (2, 4, 8, 16, 32), strict=True):
        assert at_least <= gap < at_least + 6


def test_a_list_that_hangs_does_not_keep_the_ends_from_being_known() -> None:
    class Hanging(ModelApi):
        async def executions(self, *, limit: int = 100, offset: int = 0) -> Any:
            await asyncio.sleep(60)
            raise Unanswered("time-out")

    async def story() -> float:
        shop = Shop(Hanging(duration=seconds(5)), Places(LocalLots(requests_per_minute=60, max_in_flight=10)))
        await asyncio.gather(*(shop.buy() for _ in range(10)))
        await shop.watcher.close()
        return now()

    assert run(story()) < 12


@pytest.mark.parametrize("requests_per_minute", [None, 60])
def test_a_list_that_is_far_behind_is_found_out_and_left_alone(requests_per_minute: int | None) -> None:
    async def story(shop: Shop) -> tuple[float, int, int]:
        await asyncio.gather(*(shop.buy() for _ in range(10)))
        await asyncio.gather(*(shop.buy() for _ in range(10)))
        sweeps = shop.api.count("executions")
        await asyncio.gather(*(shop.buy() for _ in range(10)))
        return max(shop.delays()), sweeps, shop.api.count("executions")

    worst, sweeps, sweeps_then = in_shop(story, requests_per_minute=requests_per_minute, list_lag_seconds=60)
    assert worst < 60
    assert sweeps_then == sweeps


def test_a_list_a_second_behind_is_good_enough() -> None:
    async def story(shop: Shop) -> int:
        for _ in range(4):
            await asyncio.gather(*(shop.buy() for _ in range(10)))
        return shop.api.count("get")

    assert in_shop(story, requests_per_minute=60, list_lag_seconds=1) <= 4


# ---- questions that go wrong


@pytest.mark.parametrize("fault", [Unanswered("cut"), NotSent("no route"), refused(422), RuntimeError("unforeseen")])
def test_a_question_that_is_not_answered_is_asked_again_later_each_time(fault: Exception) -> None:
    async def story(shop: Shop) -> tuple[bool, float]:
        shop.api.faults["get"] = deque([fault] * 4)
        end = await shop.buy()
        return end.status.ended, now()

    ended, known_at = in_shop(story, requests_per_minute=60)
    assert ended
    assert 3.5 + (0.5 + 1 + 2 + 4) <= known_at <= 16


def test_a_question_that_was_not_sent_gives_its_place_back_at_once() -> None:
    class Unreachable(ModelApi):
        async def get(self, prediction_id: str) -> Prediction:
            raise NotSent("no route")

    async def story() -> float:
        places = Places(LocalLots(requests_per_minute=60, max_in_flight=10))
        shop = Shop(Unreachable(), places)
        buying = asyncio.ensure_future(shop.buy())
        await asyncio.sleep(50)
        buying.cancel()
        await shop.watcher.close()
        return places.pressure(Kind.REQUESTS)

    assert run(story()) == pytest.approx(1 / 60)  # the create's


def test_a_throttled_question_silences_all_questions_for_as_long_as_the_api_asks() -> None:
    async def story(shop: Shop) -> list[float]:
        shop.api.faults["get"] = deque([Throttled("slow down", retry_after_seconds=20)])
        await asyncio.gather(*(shop.buy() for _ in range(5)))
        return [at for at, endpoint, _ in shop.api.asked if endpoint != "create"]

    times = in_shop(story, has_executions=False, duration=seconds(5))
    gaps = gaps_of(times)
    assert max(gaps) >= 20
    assert gaps.index(max(gaps)) <= 1 + 4  # after the sweep, the throttled one, and those that were under way


def test_an_id_that_the_api_does_not_know_yet_is_asked_for_again() -> None:
    async def story(shop: Shop) -> bool:
        shop.api.faults["get"] = deque([refused(404)] * 5)
        return (await shop.buy()).status.ended

    assert in_shop(story)


def test_an_id_that_stays_unknown_is_an_error_after_half_a_minute() -> None:
    async def story(shop: Shop) -> float:
        place = await shop.places.take_in_flight()
        with pytest.raises(Rejected) as error:
            await shop.watcher.watch(Prediction(id="nowhere"), place=place)
        assert error.value.status_code == 404
        assert in_flight(shop) == 0
        return now()

    assert 30 <= in_shop(story) < 65


def test_a_key_that_is_refused_ends_all_watching() -> None:
    async def story(shop: Shop) -> int:
        shop.api.faults["get"] = deque([KeyRefused("no", status_code=401)])
        ends = await asyncio.gather(*(shop.buy() for _ in range(3)), return_exceptions=True)
        assert in_flight(shop) == 0
        return sum(isinstance(end, KeyRefused) for end in ends)

    assert in_shop(story, has_executions=False) == 3


def test_a_403_right_after_good_answers_is_about_that_prediction_alone() -> None:
    async def story(shop: Shop) -> None:
        buying = [asyncio.ensure_future(shop.buy()) for _ in range(3)]
        await asyncio.sleep(3.8)
        shop.api.faults["get"] = deque([KeyRefused("not yours", status_code=403)])
        with pytest.raises(KeyRefused):
            await shop.watcher.watch(Prediction(id="of-another"), place=None)
        assert all(end.status.ended for end in await asyncio.gather(*buying))

    in_shop(story)


def test_an_error_that_nobody_awaits_is_no_noise(caplog: pytest.LogCaptureFixture) -> None:
    async def story(shop: Shop) -> None:
        shop.api.faults["get"] = deque([KeyRefused("no", status_code=401)])
        shop.watcher.watch(Prediction(id="p9"), place=None)
        await asyncio.sleep(10)

    with caplog.at_level(logging.WARNING):
        in_shop(story)
        gc.collect()
    assert caplog.records == []


def test_a_fault_of_its_own_does_not_stop_the_watcher(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from prefect_eachlabs.schedule import Schedule

    decide = Schedule.decide
    faults = deque([ZeroDivisionError()] * 3)

    def stumbling(self: Schedule, at: float) -> Any:
        if self.watched and faults:
            raise faults.popleft()
        return decide(self, at)

    monkeypatch.setattr(Schedule, "decide", stumbling)

    async def story(shop: Shop) -> bool:
        return (await shop.buy()).status.ended

    assert in_shop(story)
    assert [record.levelno for record in caplog.records] == [logging.ERROR] * 3


# ---- GETs that are held open


def test_a_get_that_hangs_holds_nobody_else_up() -> None:
    async def story(shop: Shop) -> dict[str, float]:
        shop.api.hangs["p1"] = 70.0
        known: dict[str, float] = {}

        async def one() -> None:
            end = await shop.buy()
            known[end.id] = now()

        await asyncio.gather(*(one() for _ in range(5)))
        return known

    known = in_shop(story, has_executions=False, duration=seconds(5))
    assert all(at < 5.6 for id, at in known.items() if id != "p1")
    assert known["p1"] < 40  # asked again while the first question is still out


def test_held_questions_are_bounded() -> None:
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

    async def story() -> None:
        shop = Shop(
            Counting(holds=True, has_executions=False), Places(LocalLots(requests_per_minute=None, max_in_flight=None))
        )
        for _ in range(2):
            await asyncio.gather(*(shop.buy() for _ in range(150)))
        await shop.watcher.close()

    run(story())
    assert 32 <= Counting.most <= 64


# ---- hurry, patience, the end of it


def test_hurry_asks_at_once_and_again_until_the_end() -> None:
    async def story(shop: Shop) -> list[float]:
        prediction = await shop.api.create()
        future = shop.watcher.watch(prediction, place=None)
        shop.watcher.hurry("unknown")
        await asyncio.sleep(1)
        shop.watcher.hurry(prediction.id)
        await asyncio.sleep(1)
        shop.api.jobs[prediction.id].end = PredictionStatus.CANCELLED
        shop.api.jobs[prediction.id].seconds = 0
        assert (await future).status is PredictionStatus.CANCELLED
        return shop.api.times("get")

    times = in_shop(story, requests_per_minute=60, duration=seconds(300))
    assert times[0] == pytest.approx(1.1, abs=0.1)
    assert times[-1] < 4.5


def test_a_prediction_long_overdue_is_asked_about_ever_less_often_and_keeps_its_place_for_an_hour() -> None:
    async def story(shop: Shop) -> list[float]:
        place = await shop.places.take_in_flight()
        shop.watcher.watch(await shop.api.create(), place=place)
        await asyncio.sleep(3500)
        assert in_flight(shop) == 0.1
        await asyncio.sleep(200)
        assert in_flight(shop) == 0
        return shop.api.times("get")

    times = in_shop(story, requests_per_minute=60, duration=seconds(1e9))
    gaps = gaps_of(times)
    assert max(gaps) <= 62
    assert min(gaps[-20:]) >= 58
    assert len(times) < 120


def test_many_that_never_end_leave_most_requests_to_others() -> None:
    async def story(shop: Shop) -> float:
        for _ in range(100):
            shop.watcher.watch(await shop.api.create(), place=None)
        await asyncio.sleep(900)
        return shop.api.count("get") / 15

    duration = seconds(1e9)
    assert in_shop(story, requests_per_minute=600, max_in_flight=None, has_executions=False, duration=duration) < 200


def test_after_a_day_it_is_given_up() -> None:
    async def story(shop: Shop) -> None:
        with pytest.raises(PredictionTimedOut) as error:
            await shop.watcher.watch(await shop.api.create(), place=None)
        assert error.value.prediction_id == "p1"
        assert 86_400 < now() < 86_600

    in_shop(story, duration=seconds(1e9))


def test_close_cancels_the_futures_and_leaves_nothing_behind() -> None:
    async def story(shop: Shop) -> None:
        futures = []
        for _ in range(5):
            place = await shop.places.take_in_flight()
            futures.append(shop.watcher.watch(await shop.api.create(), place=place))
        await asyncio.sleep(5)
        await shop.watcher.close()
        await shop.watcher.close()
        assert [future.cancelled() for future in futures] == [True] * 5
        assert in_flight(shop) == 0.5  # they go on at the API
        assert [task for task in asyncio.all_tasks() if task is not asyncio.current_task()] == []
        assert shop.watcher.watch(Prediction(id="p9"), place=None).cancelled()

    in_shop(story, requests_per_minute=60, duration=seconds(1e9))


FAULTS: list[Exception] = [
    Unanswered("cut"),
    NotSent("no route"),
    Throttled("slow down", retry_after_seconds=2),
    Throttled("slow down"),
    refused(404),
    refused(422),
    ValueError("unforeseen"),
]
some_faults = st.lists(st.sampled_from(FAULTS), max_size=12)
bad_days = st.fixed_dictionaries(
    {
        "requests_per_minute": st.sampled_from([None, 60, 30]),
        "max_in_flight": st.sampled_from([3, 10]),
        "holds": st.booleans(),
        "urls": st.sampled_from([1, 2]),
        "list_lag_seconds": st.sampled_from([0.0, 3.0, 20.0]),
        "seed": st.integers(0, 100),
    }
)


@settings(max_examples=30, deadline=None)
@given(day=bad_days, on_get=some_faults, on_list=some_faults, hidden=st.sets(st.integers(1, 12)))
def test_whatever_goes_wrong_every_end_is_seen_and_every_place_comes_back(
    day: dict[str, Any], on_get: list[Exception], on_list: list[Exception], hidden: set[int]
) -> None:
    async def story(shop: Shop) -> None:
        api = shop.api
        api.faults = {"get": deque(on_get), "executions": deque(on_list)}
        ends = await asyncio.gather(*(shop.buy() for _ in range(12)), return_exceptions=True)
        # A 404 after half a minute is an answer; nothing else is.
        assert all(isinstance(end, Prediction) or getattr(end, "status_code", 0) == 404 for end in ends)
        assert in_flight(shop) == 0
        assert api.throttled == 0
        assert api.most_in_flight <= day["max_in_flight"]
        assert api.worst_minute() <= (api.requests_per_minute or 100_000)

    in_shop(story, shows=lambda job: int(job.id[1:]) not in hidden, **day)
