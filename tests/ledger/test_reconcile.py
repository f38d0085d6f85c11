"""The parts of finding out: echoes, markers, and what one look at the executions and the records shows."""

from __future__ import annotations

import asyncio
import json
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from prefect_eachlabs.errors import StoreFailed
from prefect_eachlabs.ledger.adoption import lock_prediction
from prefect_eachlabs.ledger.evidence import (
    CLOCK_MARGIN,
    READ_BACK_SECONDS,
    UNCERTAIN,
    Evidence,
    Listing,
    Span,
    Zone,
    fit,
    is_near,
    may_share_an_echo,
    normalised,
)
from prefect_eachlabs.ledger.reconcile import READS_AT_A_TIME, Reconciler
from prefect_eachlabs.ledger.records import Intent, Ledger, RecordState, VersionedRecord, amended, new_record
from prefect_eachlabs.models import Destination, Execution, Item, PredictionStatus
from prefect_eachlabs.settings import AccountSettings
from tests.memory_store import MemoryStore

# ------------------------------------------------------------------------------- echoes

SIGNED = "https://bucket.invalid/fox.png?X-Amz-Signature={}&X-Amz-Date=2026"


@pytest.mark.parametrize(
    ("echo", "sent"),
    [
        ({"prompt": "a fox"}, {"prompt": "a fox"}),
        ({"prompt": "a fox"}, {"prompt": "  a\u00a0 fox\n"}),
        ({"prompt": "Caf\u00e9"}, {"prompt": "Cafe\u0301"}),
        ({"prompt": "a", "seed": 1.0}, {"prompt": "a", "seed": 1}),
        ({"prompt": "a", "num_outputs": 1, "safety": {"level": 2}}, {"prompt": "a"}),
        ({"prompt": "a", "image": SIGNED.format("x")}, {"prompt": "a", "image": SIGNED.format("y")}),
        ({"images": [SIGNED.format("x")]}, {"images": (SIGNED.format("y"),)}),
        ({"a": None, "b": True}, {"a": None, "b": True}),
    ],
)
def test_an_echo_is_that_of_its_input(echo: dict[str, Any], sent: dict[str, Any]) -> None:
    assert fit(echo, sent) == len(sent)
    assert may_share_an_echo(sent, echo)


@pytest.mark.parametrize(
    ("echo", "sent"),
    [
        ({"prompt": "a fox"}, {"prompt": "a Fox"}),
        ({"prompt": "a"}, {"prompt": "a", "seed": 1}),
        ({"prompt": "a", "seed": 2}, {"prompt": "a", "seed": 1}),
        ({"prompt": "a", "seed": True}, {"prompt": "a", "seed": 1}),
        ({"prompt": "a", "seed": "1"}, {"prompt": "a", "seed": 1}),
        ({"prompt": "a", "x": None}, {"prompt": "a", "x": 0}),
        ({"images": ["a", "b"]}, {"images": ["b", "a"]}),
        ({"image": "https://h.invalid/a.png?size=1"}, {"image": "https://h.invalid/a.png?size=2"}),
        ({}, {"prompt": "a"}),
    ],
)
def test_an_echo_is_not_that_of_another_input(echo: dict[str, Any], sent: dict[str, Any]) -> None:
    assert fit(echo, sent) is None


@pytest.mark.parametrize(
    ("echo", "sent"),
    [
        ({"prompt": "a &quot;fox&quot; &amp;amp; a hen"}, {"prompt": 'a "fox" & a hen'}),
        ({"prompt": "x" * 100}, {"prompt": "x" * 5000}),
        ({"prompt": "a fox", "image_url": "https://vendor.invalid/1"}, {"prompt": "a fox", "image_url": "https://b/2"}),
        ({"prompt": "a fox"}, {"prompt": "a fox", "negative": None}),
        ({"prompt": "a fox", "seed": "1"}, {"prompt": "a fox", "seed": 1}),
        ({"prompt": "A fox."}, {"prompt": "a fox"}),
        ({"prompt": "a", "more": {"images": ["https://v/1"]}}, {"prompt": "a", "more": {"images": ["https://b/2"]}}),
    ],
)
def test_an_echo_is_near_an_input_that_was_cut_escaped_rehosted_or_tidied(
    echo: dict[str, Any], sent: dict[str, Any]
) -> None:
    assert fit(echo, sent) is None
    assert is_near(echo, sent)


@pytest.mark.parametrize(
    ("echo", "sent"),
    [
        ({"prompt": "a fox"}, {"prompt": "a hare"}),
        ({"prompt": "a fox in the snow"}, {"prompt": "a fox"}),
        ({"prompt": "a fox", "seed": 2}, {"prompt": "a fox", "seed": 1}),
        ({"prompt": "a fox"}, {"prompt": "a fox", "seed": 1}),
        ({"prompt": "\U0001f98a"}, {"prompt": "\U0001f407"}),
        ({"prompt": ["a fox"]}, {"prompt": "a fox"}),
        ({}, {"prompt": "a fox"}),
    ],
)
def test_an_echo_of_another_input_is_not_near(echo: dict[str, Any], sent: dict[str, Any]) -> None:
    assert not is_near(echo, sent)


def test_an_echo_of_marks_on_one_letter_is_compared_in_no_time() -> None:
    """Quadratic, each would take minutes."""
    marks = "a" + "\u0301\u0323" * 400_000
    assert fit({"prompt": marks}, {"prompt": marks}) == 1
    assert fit({"prompt": marks}, {"prompt": "a fox"}) is None
    assert not is_near({"prompt": marks}, {"prompt": "a fox"})


values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
inputs = st.dictionaries(st.sampled_from(["prompt", "seed", "size"]), values, max_size=3)


@given(inputs, inputs)
def test_whose_echo_fits_two_inputs_may_be_that_of_either(sent: dict[str, Any], defaults: dict[str, Any]) -> None:
    echo = json.loads(json.dumps({**defaults, **sent}))
    assert fit(echo, sent) == len(sent)
    assert normalised(normalised(echo)) == normalised(echo)
    if fit(echo, defaults) is not None:
        assert may_share_an_echo(sent, defaults)
        assert may_share_an_echo(defaults, sent)


# ------------------------------------------------------------------------------- markers

MARKER = "kit/adopted/p-1"


async def record(ledger: Ledger, item_id: str, **changes: Any) -> None:
    first = new_record(Item.wanted("a fox", item_id=item_id), run_id="run-1")
    await ledger.write(amended(first, **changes), replacing=None)


async def test_a_marker_names_the_item_that_found_the_prediction_and_is_resumed_by_it_alone(
    ledger: Ledger, store: MemoryStore
) -> None:
    await record(ledger, "fox", intent=Intent.SETTLE)
    assert await lock_prediction(ledger, "p-1", "fox") == "fox"
    assert store.json(MARKER)["item_id"] == "fox"
    assert store.json(MARKER)["prediction_id"] == "p-1"
    assert await lock_prediction(ledger, "p-1", "hare") == "fox"
    assert await lock_prediction(ledger, "p-1", "fox") == "fox"


@pytest.mark.parametrize(
    ("changes", "holder"),
    [
        ({}, "fox"),
        ({"intent": Intent.SETTLE}, "fox"),
        ({"state": RecordState.AMBIGUOUS}, "fox"),
        ({"state": RecordState.CREATED, "prediction_id": "p-1"}, "fox"),
        ({"state": RecordState.STORED, "prediction_id": "p-2", "also_bought": ["p-1"]}, "fox"),
        ({"state": RecordState.STORED, "prediction_id": "p-2", "earlier": ["p-1"]}, "fox"),
        ({"state": RecordState.CREATED, "prediction_id": "p-2"}, "hare"),
        ({"state": RecordState.STORED, "prediction_id": "p-2"}, "hare"),
        ({"state": RecordState.FAILED}, "hare"),
        ({"intent": Intent.IDLE}, "hare"),
    ],
)
async def test_a_marker_is_taken_over_where_its_holder_will_never_take_the_prediction(
    ledger: Ledger, store: MemoryStore, changes: dict[str, Any], holder: str
) -> None:
    await record(ledger, "fox", intent=Intent.SETTLE)
    await lock_prediction(ledger, "p-1", "fox")
    now = await ledger.read("fox")
    assert now is not None
    await ledger.write(amended(now.record, **changes), replacing=now)
    assert await lock_prediction(ledger, "p-1", "hare") == holder
    assert store.json(MARKER)["item_id"] == holder


@pytest.mark.parametrize("refused", [False, True])
async def test_a_marker_whose_answer_was_lost_is_ones_own(ledger: Ledger, store: MemoryStore, refused: bool) -> None:
    store.lose_put(refused=refused)
    assert await lock_prediction(ledger, "p-1", "fox") == "fox"


async def test_a_marker_that_cannot_be_written_is_a_failure_of_the_store(ledger: Ledger, store: MemoryStore) -> None:
    for nth in range(1, 6):
        store.fail_put(nth)
    with pytest.raises(StoreFailed):
        await lock_prediction(ledger, "p-1", "fox")
    assert not store.keys("kit/adopted/")


@pytest.mark.parametrize("body", [b"", b"{}", b"[]", b'{"item_id": "../../x"}', b"\xff"])
async def test_an_unreadable_marker_is_respected(ledger: Ledger, store: MemoryStore, body: bytes) -> None:
    await store.put(MARKER, body, content_type="application/json")
    assert await lock_prediction(ledger, "p-1", "fox") != "fox"
    assert store.objects[MARKER].body == body


async def test_an_id_of_any_form_is_one_key(ledger: Ledger, store: MemoryStore) -> None:
    await lock_prediction(ledger, "../records/fox.json?x#y", "fox")
    assert store.keys() == ["kit/adopted/..%2Frecords%2Ffox.json%3Fx%23y"]


# --------------------------------------------------------------------------- one look

BUCKET_NOW = datetime(2026, 1, 1, 12, tzinfo=timezone.utc)
SETTLING_SECONDS = 60.0
SPAN = Span(BUCKET_NOW - timedelta(seconds=100), BUCKET_NOW + timedelta(seconds=22), 40.0)
"""Of an order that was claimed 100 s ago."""


def seconds(number: float) -> timedelta:
    return timedelta(seconds=number)


def row(name: str, created_at: datetime | None, model: str | None = "gemini") -> Execution:
    return Execution(id=name, model=model, status=PredictionStatus.SUCCEEDED, created_at=created_at)


def known(age_seconds: float, **changes: Any) -> VersionedRecord:
    """A record that the bucket calls so old, of a prediction that its buyer's clock calls as old."""
    base = new_record(Item.wanted("a fox", item_id="fox"), run_id="run-1")
    made = datetime.now(timezone.utc) - seconds(age_seconds)
    default = {"state": RecordState.STORED, "prediction_id": "p-known", "created_at": made}
    record = base.model_copy(update={"write_id": "w", **default, **changes})
    return VersionedRecord(record, "etag", age_seconds, BUCKET_NOW - seconds(age_seconds))


NO_SKEW = (timedelta(0), timedelta(0))


def look(
    rows: list[Execution],
    *records: VersionedRecord,
    ahead: tuple[timedelta, timedelta] | None = NO_SKEW,
    is_whole: bool = True,
    has_end: bool = True,
    now: float = 0.0,
) -> Evidence:
    """A look that began at 0, and whose records were read at `now`."""
    evidence = Evidence(Listing(tuple(rows), is_whole, has_end, ahead), 0.0, 100.0)
    for held in records:
        evidence.read(held, ours={"mine": "run-9"}, claim_seconds=60.0, settling_seconds=SETTLING_SECONDS, now=now)
    return evidence


def shown(evidence: Evidence) -> dict[str, Zone]:
    return {found.id: zone for zone, found in evidence.candidates([("gemini", SPAN)])}


@pytest.mark.parametrize("skew", [timedelta(0), timedelta(hours=-14), timedelta(hours=14), timedelta(days=-4000)])
def test_what_may_have_been_bought_is_what_was_made_between_the_claim_and_its_end(skew: timedelta) -> None:
    api_now = BUCKET_NOW + skew
    rows = [row(f"p-{age}", api_now - seconds(age)) for age in range(-200, 2000, 10)]
    zones = shown(look(rows, ahead=(skew, skew)))
    margin = int(CLOCK_MARGIN.total_seconds())
    assert zones == {
        **{f"p-{age}": Zone.TIGHT for age in range(60, 101, 10)},
        **{f"p-{age}": Zone.WITHIN for age in range(-22 - margin, 60) if age % 10 == 0},
        **{f"p-{age}": Zone.DOUBTFUL for age in range(110, 100 + margin + 1, 10)},
    }


def test_the_nearest_to_the_claim_comes_first_and_what_is_doubtful_last() -> None:
    rows = [row(name, BUCKET_NOW - seconds(age)) for name, age in (("far", 1), ("near", 99), ("mid", 70), ("old", 120))]
    assert list(shown(look(rows))) == ["near", "mid", "far", "old"]


@pytest.mark.parametrize("skew_seconds", [-50_000.0, 50_000.0])
def test_where_the_list_contradicts_its_own_date_nothing_is_left_out_and_nothing_adopted(skew_seconds: float) -> None:
    """A prediction that is known by id shows how far its rows are off."""
    skew = seconds(skew_seconds)
    rows = [row("p-known", BUCKET_NOW + skew - seconds(12)), row("p-lost", BUCKET_NOW + skew - seconds(99))]
    zones = shown(look(rows, known(10)))
    assert zones == {"p-lost": Zone.DOUBTFUL}


@pytest.mark.parametrize("old_seconds", [0.0, 2.0, 10.0, 50.0])
def test_a_date_of_the_answer_that_is_some_seconds_old_changes_nothing(old_seconds: float) -> None:
    told = (-seconds(old_seconds), -seconds(old_seconds))
    rows = [row("p-known", BUCKET_NOW - seconds(10)), row("p-lost", BUCKET_NOW - seconds(99))]
    assert shown(look(rows, known(10), ahead=told)) == {"p-lost": Zone.TIGHT}


def test_answers_that_took_long_leave_no_execution_out() -> None:
    rows = [row("p-lost", BUCKET_NOW - seconds(99))]
    for low, high in ((-20, 0), (0, 20), (-4000, 0), (0, 4000)):
        assert "p-lost" in shown(look(rows, ahead=(seconds(low), seconds(high))))
    assert shown(look(rows, ahead=(seconds(0), UNCERTAIN + seconds(5)))) == {"p-lost": Zone.DOUBTFUL}


def test_without_a_date_of_the_answer_nothing_is_adopted_and_nothing_recent_left_out() -> None:
    rows = [row("new", BUCKET_NOW), row("old", BUCKET_NOW - seconds(90)), row("older", BUCKET_NOW - seconds(9000))]
    assert shown(look(rows, ahead=None)) == {"new": Zone.DOUBTFUL, "old": Zone.DOUBTFUL}


def test_rows_without_a_date_are_doubtful_unless_they_stand_below_what_was_bought_long_before() -> None:
    rows = [row("above", None), row("p-known", BUCKET_NOW - seconds(1000)), row("below", None)]
    assert shown(look(rows, known(990))) == {"above": Zone.DOUBTFUL}


def test_rows_without_a_model_count_and_others_where_nothing_known_shows_the_models_name() -> None:
    lately = BUCKET_NOW - seconds(50)
    rows = [row("a", lately), row("b", lately, None), row("c", lately, "flux"), row("p-known", lately)]
    assert set(shown(look(rows))) == {"a", "b", "c", "p-known"}
    assert set(shown(look(rows, known(40)))) == {"a", "b"}
    renamed = [*rows[:3], row("p-known", lately, "flux")]
    evidence = look(renamed, known(40))
    assert set(shown(evidence)) == {"a", "b", "c"}
    assert "another model's name, 'flux'" in (evidence.blind_for("gemini") or "")
    assert evidence.blind_for("flux") is None


def test_what_a_record_or_this_process_names_is_no_candidate() -> None:
    rows = [row(name, BUCKET_NOW) for name in ("a", "b", "c", "d", "e")]
    evidence = look(rows, known(10, prediction_id="a", also_bought=["b"], earlier=["c"]))
    evidence.know("d", 5.0, settling_seconds=SETTLING_SECONDS, now=0.0)
    assert list(shown(evidence)) == ["e"]


@pytest.mark.parametrize(
    ("age_seconds", "has_end", "blind"),
    [(59.0, True, False), (61.0, True, True), (900.0, False, True), (2000.0, False, False), (2000.0, True, True)],
)
def test_a_list_is_blind_that_does_not_show_what_it_must(age_seconds: float, has_end: bool, blind: bool) -> None:
    assert (look([], known(age_seconds), has_end=has_end).blind_for("gemini") is not None) is blind
    assert look([row("p-known", BUCKET_NOW)], known(age_seconds), has_end=has_end).blind_for("gemini") is None


@pytest.mark.parametrize(("age_seconds", "blind"), [(59.0, False), (61.0, True), (900.0, True), (2000.0, False)])
def test_what_this_process_bought_must_be_listed_too(age_seconds: float, blind: bool) -> None:
    evidence = look([])
    evidence.know("p-known", age_seconds, settling_seconds=SETTLING_SECONDS, now=0.0)
    assert (evidence.blind_for("gemini") is not None) is blind


def test_what_was_bought_while_the_look_took_its_time_need_not_be_listed() -> None:
    """The records are read 30 s after the walk began: 80 s of age are 50 s then."""
    assert look([], known(80), now=30.0).blind_for("gemini") is None
    assert look([], known(95), now=30.0).blind_for("gemini") is not None
    evidence = look([])
    evidence.know("p-known", 80.0, settling_seconds=SETTLING_SECONDS, now=30.0)
    assert evidence.blind_for("gemini") is None


def test_what_was_cancelled_may_be_missing_and_a_walk_that_had_no_end_is_blind() -> None:
    for changes in ({"state": RecordState.CANCELLED}, {"cancel_requested": True}):
        evidence = look([], known(90, **changes))
        evidence.know("p-known", 90.0, settling_seconds=SETTLING_SECONDS, now=0.0)
        assert evidence.blind_for("gemini") is None
    assert "too long" in (look([], is_whole=False).blind_for("gemini") or "")


@pytest.mark.parametrize(
    ("age_seconds", "changes", "live"),
    [
        (0.0, {}, True),
        (61.0, {}, True),
        (62.0, {}, False),
        (0.0, {"intent": Intent.SETTLE}, False),
        (0.0, {"intent": Intent.IDLE}, False),
        (0.0, {"state": RecordState.CREATED, "prediction_id": "p-1"}, False),
    ],
)
def test_a_live_claim_of_another_with_the_same_input_is_waited_for(
    age_seconds: float, changes: dict[str, Any], live: bool
) -> None:
    claim = known(age_seconds, **{"state": RecordState.CLAIMED, "prediction_id": None, **changes})
    assert look([], claim).is_being_bought("gemini", {"prompt": " a  fox"}) is live
    assert not look([], claim).is_being_bought("gemini", {"prompt": "a hare"})
    assert not look([], claim).is_being_bought("flux", {"prompt": "a fox"})


def test_a_claim_that_is_settled_here_is_no_other_claim() -> None:
    claim = {"state": RecordState.CLAIMED, "prediction_id": None, "intent": Intent.SETTLE}
    assert look([], known(5, item_id="mine", run_id="run-9", **claim)).unsettled == []
    assert len(look([], known(5, item_id="mine", run_id="run-8", **claim)).unsettled) == 1
    assert 2 * CLOCK_MARGIN.total_seconds() < READ_BACK_SECONDS, "records of all candidates are read"


async def test_thousands_of_records_are_read_without_a_task_for_each() -> None:
    """So much may a batch without limits have bought since the claim that is to be settled."""
    tasks = asked = 0

    async def counted(*_: str) -> None:
        nonlocal tasks, asked
        asked += 1
        tasks = max(tasks, len(asyncio.all_tasks()))

    ledger = Ledger(MemoryStore(on_operation=counted, latency_seconds=0.01), Destination(bucket="b", prefix="p"))
    nobody: Any = SimpleNamespace(named_listeners=[])
    settings = AccountSettings(api_key=SecretStr("k"))
    reconciler = Reconciler(nobody, nobody, ledger, settings, known=dict, webhooks=nobody)
    await reconciler._read_each([f"item-{number}" for number in range(2_000)], nobody)
    assert asked == 2 * 2_000
    assert tasks <= READS_AT_A_TIME + 2
