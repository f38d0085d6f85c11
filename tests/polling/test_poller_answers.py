"""What the watcher believes, whom it asks again, and what it leaves alone."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections import deque
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefect_eachlabs.errors import EachlabsError, KeyRefused, NotSent, Rejected, Throttled, Unanswered
from prefect_eachlabs.limits.limiter import Kind
from prefect_eachlabs.models import Prediction
from prefect_eachlabs.polling.schedule import Schedule
from tests.limits.local import local_limiter
from tests.polling.model_api import Job, ModelApi, Shop, a_shop, gaps_of, in_flight, in_shop, now, refused, seconds

# ---- what a row of executions is worth


@a_shop(requests_per_minute=60)
async def test_rows_are_believed_once_one_end_has_shown_that_its_model_makes_one_picture(shop: Shop) -> None:
    """Of the mission's model, too: a row shows one output, whatever there is."""
    await asyncio.gather(*(shop.buy() for _ in range(10)))
    assert shop.api.count("get") == 1


@a_shop(requests_per_minute=600)
async def test_of_another_model_the_first_end_is_learned_by_id_and_rows_are_believed_then(shop: Shop) -> None:
    await asyncio.gather(*(shop.buy("flux") for _ in range(10)))
    first = shop.api.count("get")
    assert first >= 1
    await asyncio.gather(*(shop.buy("flux") for _ in range(10)))
    assert shop.api.count("get") - first <= 3  # one that is due alone is asked about by id: a page would tell no more


@pytest.mark.parametrize("model", ["flux", "gemini"])
@a_shop(urls=3)
async def test_several_outputs_are_asked_for_by_id(shop: Shop, model: str) -> None:
    ends: list[Prediction] = []
    for _ in range(2):
        ends += await asyncio.gather(*(shop.buy(model, {"num_images": 3}) for _ in range(5)))
    assert {len(end.output_urls) for end in ends} == {3}


@a_shop(urls=2)
async def test_a_model_that_was_seen_to_make_several_is_never_believed_again(shop: Shop) -> None:
    counts = [len((await shop.buy()).output_urls)]
    counts += [len(end.output_urls) for end in await asyncio.gather(*(shop.buy() for _ in range(5)))]
    assert counts == [2] * 6


def test_what_a_sweep_does_not_show_is_asked_for_by_itself() -> None:
    def shows(job: Job) -> bool:
        return int(job.id[1:]) % 3 != 0

    async def story(shop: Shop) -> list[str]:
        await asyncio.gather(*(shop.buy() for _ in range(9)))
        return sorted({about for _, endpoint, about in shop.api.asked if endpoint == "get"})

    assert in_shop(story, shows=shows, duration=seconds(5)) == ["p1", "p3", "p6", "p9"], "p1 tells of its model"


# ---- where the list is no good


@pytest.mark.parametrize("fault", [refused(404), KeyRefused("no", status_code=403)])
@a_shop(duration=seconds(25))
async def test_a_list_that_is_missing_or_refused_is_left_alone_for_ten_minutes(
    shop: Shop, fault: EachlabsError
) -> None:
    shop.api.faults["executions"] = deque([fault] * 3)
    while now() < 660:
        await asyncio.gather(*(shop.buy() for _ in range(3)))
    times = shop.api.times("executions")
    assert len(times) == 2
    assert 600 <= times[1] - times[0] < 610


@a_shop()
async def test_a_list_that_does_not_answer_is_asked_again_later_each_time(shop: Shop) -> None:
    shop.api.faults["executions"] = deque([Unanswered("cut")] * 4 + [ValueError("unforeseen")])
    while now() < 120:
        await asyncio.gather(*(shop.buy() for _ in range(3)))
    times = shop.api.times("executions")
    for gap, at_least in zip(gaps_of(times)[:5], (2, 4, 8, 16, 32), strict=True):
        assert at_least <= gap < at_least + 6


async def test_a_list_that_hangs_does_not_keep_the_ends_from_being_known() -> None:
    class Hanging(ModelApi):
        async def executions(self, **_: Any) -> Any:
            await asyncio.sleep(60)
            raise Unanswered("time-out")

    shop = Shop(Hanging(duration=seconds(5)), local_limiter(requests_per_minute=60, max_in_flight=10))
    await asyncio.gather(*(shop.buy() for _ in range(10)))
    await shop.poller.close()
    assert now() < 12


@a_shop(requests_per_minute=60, list_lag_seconds=1)
async def test_a_list_a_second_behind_is_good_enough(shop: Shop) -> None:
    for _ in range(4):
        await asyncio.gather(*(shop.buy() for _ in range(10)))
    assert shop.api.count("get") <= 4


# ---- questions that go wrong


@pytest.mark.parametrize("fault", [Unanswered("cut"), NotSent("no route"), refused(422), RuntimeError("unforeseen")])
@a_shop(requests_per_minute=60)
async def test_a_question_that_is_not_answered_is_asked_again_later_each_time(shop: Shop, fault: Exception) -> None:
    shop.api.faults["get"] = deque([fault] * 4)
    assert (await shop.buy()).status.ended
    assert 3.5 + (0.5 + 1 + 2 + 4) <= now() <= 16


async def test_a_question_that_was_not_sent_gives_its_place_back_at_once() -> None:
    class Unreachable(ModelApi):
        async def get(self, prediction_id: str) -> Prediction:
            raise NotSent("no route")

    limiter = local_limiter(requests_per_minute=60, max_in_flight=10)
    shop = Shop(Unreachable(), limiter)
    buying = asyncio.ensure_future(shop.buy())
    await asyncio.sleep(50)
    buying.cancel()
    await shop.poller.close()
    assert limiter.pressure(Kind.REQUESTS) == pytest.approx(1 / 60)


@a_shop(has_executions=False, duration=seconds(5))
async def test_a_throttled_question_silences_all_questions_for_as_long_as_the_api_asks(shop: Shop) -> None:
    shop.api.faults["get"] = deque([Throttled("slow down", retry_after_seconds=20)])
    await asyncio.gather(*(shop.buy() for _ in range(5)))
    times = [at for at, endpoint, _ in shop.api.asked if endpoint != "create"]
    gaps = gaps_of(times)
    assert max(gaps) >= 20
    assert gaps.index(max(gaps)) <= 1 + 4  # after the sweep, the throttled one, and those that were under way


@a_shop()
async def test_an_id_that_the_api_does_not_know_yet_is_asked_for_again(shop: Shop) -> None:
    shop.api.faults["get"] = deque([refused(404)] * 5)
    assert (await shop.buy()).status.ended


@a_shop()
async def test_an_id_that_stays_unknown_is_an_error_after_half_a_minute(shop: Shop) -> None:
    place = await shop.limiter.take_in_flight()
    with pytest.raises(Rejected) as error:
        await shop.poller.watch(Prediction(id="nowhere"), slot=place)
    assert error.value.status_code == 404
    assert in_flight(shop) == 0
    assert 30 <= now() < 65


@a_shop(has_executions=False)
async def test_a_key_that_is_refused_ends_all_watching(shop: Shop) -> None:
    shop.api.faults["get"] = deque([KeyRefused("no", status_code=401)])
    ends = await asyncio.gather(*(shop.buy() for _ in range(3)), return_exceptions=True)
    assert in_flight(shop) == 0
    assert sum(isinstance(end, KeyRefused) for end in ends) == 3


@a_shop()
async def test_a_403_right_after_good_answers_is_about_that_prediction_alone(shop: Shop) -> None:
    buying = [asyncio.ensure_future(shop.buy()) for _ in range(3)]
    await asyncio.sleep(3.8)
    shop.api.faults["get"] = deque([KeyRefused("not yours", status_code=403)])
    with pytest.raises(KeyRefused):
        await shop.poller.watch(Prediction(id="of-another"), slot=None)
    assert all(end.status.ended for end in await asyncio.gather(*buying))


def test_an_error_that_nobody_awaits_is_no_noise(caplog: pytest.LogCaptureFixture) -> None:
    async def story(shop: Shop) -> None:
        shop.api.faults["get"] = deque([KeyRefused("no", status_code=401)])
        shop.poller.watch(Prediction(id="p9"), slot=None)
        await asyncio.sleep(10)

    with caplog.at_level(logging.WARNING):
        in_shop(story)
        gc.collect()
    assert caplog.records == []


@a_shop()
async def test_a_fault_of_its_own_does_not_stop_the_watcher(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    decide = Schedule.decide
    faults = deque([ZeroDivisionError()] * 3)

    def stumbling(self: Schedule, at: float) -> Any:
        if self.watched and faults:
            raise faults.popleft()
        return decide(self, at)

    monkeypatch.setattr(Schedule, "decide", stumbling)

    assert (await shop.buy()).status.ended
    assert [record.levelno for record in caplog.records] == [logging.ERROR] * 3


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


@settings(max_examples=20, deadline=None)
@given(day=bad_days, on_get=some_faults, on_list=some_faults, hidden=st.sets(st.integers(1, 8)))
def test_whatever_goes_wrong_every_end_is_seen_and_every_place_comes_back(
    day: dict[str, Any], on_get: list[Exception], on_list: list[Exception], hidden: set[int]
) -> None:
    async def story(shop: Shop) -> None:
        api = shop.api
        api.faults = {"get": deque(on_get), "executions": deque(on_list)}
        ends = await asyncio.gather(*(shop.buy() for _ in range(8)), return_exceptions=True)
        # A 404 after half a minute is an answer; nothing else is.
        assert all(isinstance(end, Prediction) or getattr(end, "status_code", 0) == 404 for end in ends)
        assert in_flight(shop) == 0
        assert api.throttled == 0
        assert api.most_in_flight <= day["max_in_flight"]
        assert api.worst_minute() <= (api.requests_per_minute or 100_000)

    in_shop(story, shows=lambda job: int(job.id[1:]) not in hidden, **day)
