"""What ends teach about durations, and what they must not."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_eachlabs.polling.schedule import Durations


def learn(durations: Durations, *, told: float | None, pending_at: float = 0.0, ended_at: float) -> None:
    durations.learn("m", told_seconds=told, pending_at=pending_at, ended_at=ended_at)


def test_before_anything_is_known_it_is_what_the_models_page_states() -> None:
    durations = Durations()
    assert not durations.known("m")
    assert durations.quantile("m", 0.5) == 5.0
    assert durations.quantile("m", 0.05) < 4
    assert durations.quantile("m", 0.97) > 6


def test_quantiles_follow_what_the_api_tells() -> None:
    durations, rng = Durations(), random.Random(1)
    for _ in range(200):
        learn(durations, told=rng.uniform(10, 20), ended_at=25)
    assert durations.known("m")
    assert not durations.known("other")
    for share in (0.05, 0.5, 0.9, 0.97):
        assert durations.quantile("m", share) == pytest.approx(10 + 10 * share, abs=2)


def test_a_figure_that_cannot_be_is_not_believed() -> None:
    """Milliseconds where seconds were expected; or a model's own time without its time in the queue."""
    durations = Durations()
    for _ in range(30):
        learn(durations, told=5000.0, pending_at=4.9, ended_at=5.1)
    assert durations.quantile("m", 0.5) == pytest.approx(5, abs=0.1)
    for _ in range(60):
        learn(durations, told=1.0, pending_at=6.9, ended_at=7.1)
    assert durations.quantile("m", 0.5) == pytest.approx(7, abs=0.1)


def test_asking_late_does_not_teach_to_ask_later_still() -> None:
    """Without a figure, "it had ended when we asked" must not become its duration."""
    durations = Durations()
    for _ in range(200):
        learn(durations, told=None, ended_at=durations.quantile("m", 0.97) + 15)
    assert durations.quantile("m", 0.97) < 7


@pytest.mark.parametrize("true_seconds", [1.0, 5.0, 30.0])
def test_without_figures_the_late_age_settles_near_the_truth(true_seconds: float) -> None:
    """Asked at the late age: ended, or pending and asked again soon; that alone finds the duration."""
    durations, rng = Durations(), random.Random(1)
    asked_in_vain = 0
    for number in range(600):
        ends_at = true_seconds * rng.uniform(0.9, 1.1)
        pending_at, asked_at = 0.0, durations.quantile("m", 0.97)
        while asked_at < ends_at:
            asked_in_vain += number >= 400
            pending_at, asked_at = asked_at, asked_at + 0.2 * durations.quantile("m", 0.5)
        learn(durations, told=None, pending_at=pending_at, ended_at=asked_at)
    assert 0.85 * true_seconds <= durations.quantile("m", 0.97) <= 1.6 * true_seconds
    assert asked_in_vain < 0.4 * 200


def test_one_that_took_an_hour_does_not_make_the_next_wait_for_hours() -> None:
    durations = Durations()
    learn(durations, told=3600.0, ended_at=3600)
    assert durations.quantile("m", 0.9) < 120


def test_after_a_slow_hour_the_fast_ones_are_believed_soon() -> None:
    durations = Durations()
    for _ in range(1000):
        learn(durations, told=100.0, ended_at=100)
    for _ in range(40):
        learn(durations, told=5.0, ended_at=100)
    assert durations.quantile("m", 0.97) == 5.0


@given(
    ends=st.lists(st.tuples(st.one_of(st.none(), st.floats(0, 1e6)), st.floats(0, 1e5), st.floats(0, 1e5)), max_size=99)
)
def test_quantiles_are_positive_and_in_order_whatever_is_learned(
    ends: list[tuple[float | None, float, float]],
) -> None:
    durations = Durations()
    for told, pending_at, longer in ends:
        learn(durations, told=told, pending_at=pending_at, ended_at=pending_at + longer)
    quantiles = [durations.quantile("m", share / 20) for share in range(21)]
    assert quantiles == sorted(quantiles)
    assert quantiles[0] > 0
