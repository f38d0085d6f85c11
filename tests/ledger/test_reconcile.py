"""The parts of finding out: echoes, markers, and what one look at the executions and the records shows."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_eachlabs.errors import StoreFailed
from prefect_eachlabs.ledger.adoption import take_adoption_marker
from prefect_eachlabs.ledger.echoes import fit, may_share_an_echo, normalised
from prefect_eachlabs.ledger.evidence import CLOCK_MARGIN, READ_BACK_SECONDS, Evidence
from prefect_eachlabs.ledger.records import Intent, Ledger, RecordState, VersionedRecord, amended, new_record
from prefect_eachlabs.models import Destination, Execution, Item, PredictionStatus
from tests.memory_store import MemoryStore
from tests.virtual_time import run

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

DESTINATION = Destination.parse("s3://bucket/kit")
MARKER = "kit/adopted/p-1"


def with_ledger(story: Callable[[Ledger, MemoryStore], Awaitable[Any]]) -> Any:
    async def whole() -> Any:
        store = MemoryStore()
        return await story(Ledger(store, DESTINATION), store)

    return run(whole())


async def record(ledger: Ledger, item_id: str, **changes: Any) -> None:
    first = new_record(Item.wanted("a fox", item_id=item_id), run_id="run-1")
    await ledger.write(amended(first, **changes), replacing=None)


def test_a_marker_names_the_item_that_found_the_prediction_and_is_resumed_by_it_alone() -> None:
    async def story(ledger: Ledger, store: MemoryStore) -> None:
        await record(ledger, "fox", intent=Intent.SETTLE)
        assert await take_adoption_marker(ledger, "p-1", "fox") == "fox"
        assert store.json(MARKER)["item_id"] == "fox"
        assert store.json(MARKER)["prediction_id"] == "p-1"
        assert await take_adoption_marker(ledger, "p-1", "hare") == "fox"
        assert await take_adoption_marker(ledger, "p-1", "fox") == "fox"

    with_ledger(story)


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
def test_a_marker_is_taken_over_where_its_holder_will_never_take_the_prediction(
    changes: dict[str, Any], holder: str
) -> None:
    async def story(ledger: Ledger, store: MemoryStore) -> None:
        await record(ledger, "fox", intent=Intent.SETTLE)
        await take_adoption_marker(ledger, "p-1", "fox")
        now = await ledger.read("fox")
        assert now is not None
        await ledger.write(amended(now.record, **changes), replacing=now)
        assert await take_adoption_marker(ledger, "p-1", "hare") == holder
        assert store.json(MARKER)["item_id"] == holder

    with_ledger(story)


@pytest.mark.parametrize("refused", [False, True])
def test_a_marker_whose_answer_was_lost_is_ones_own(refused: bool) -> None:
    async def story(ledger: Ledger, store: MemoryStore) -> None:
        store.lose_put(refused=refused)
        assert await take_adoption_marker(ledger, "p-1", "fox") == "fox"

    with_ledger(story)


def test_a_marker_that_cannot_be_written_is_a_failure_of_the_store() -> None:
    async def story(ledger: Ledger, store: MemoryStore) -> None:
        for nth in range(1, 6):
            store.fail_put(nth)
        with pytest.raises(StoreFailed):
            await take_adoption_marker(ledger, "p-1", "fox")
        assert not store.keys("kit/adopted/")

    with_ledger(story)


@pytest.mark.parametrize("body", [b"", b"{}", b"[]", b'{"item_id": "../../x"}', b"\xff"])
def test_an_unreadable_marker_is_respected(body: bytes) -> None:
    async def story(ledger: Ledger, store: MemoryStore) -> None:
        await store.put(MARKER, body, content_type="application/json")
        assert await take_adoption_marker(ledger, "p-1", "fox") != "fox"
        assert store.objects[MARKER].body == body

    with_ledger(story)


def test_an_id_of_any_form_is_one_key() -> None:
    async def story(ledger: Ledger, store: MemoryStore) -> None:
        await take_adoption_marker(ledger, "../records/fox.json?x#y", "fox")
        assert store.keys() == ["kit/adopted/..%2Frecords%2Ffox.json%3Fx%23y"]

    with_ledger(story)


# --------------------------------------------------------------------------- one look

BUCKET_NOW = datetime(2026, 1, 1, 12, tzinfo=timezone.utc)
SETTLING_SECONDS = 60.0


def row(name: str, created_at: datetime | None, model: str = "gemini") -> Execution:
    return Execution(id=name, model=model, status=PredictionStatus.SUCCEEDED, created_at=created_at)


def known(age_seconds: float, *, machine: datetime | None = None, **changes: Any) -> VersionedRecord:
    """A record that the bucket calls so old."""
    base = new_record(Item.wanted("a fox", item_id="fox"), run_id="run-1")
    default = {"state": RecordState.STORED, "prediction_id": "p-known", "created_at": machine}
    record = base.model_copy(update={"write_id": "w", **default, **changes})
    return VersionedRecord(record, "etag", age_seconds, BUCKET_NOW - timedelta(seconds=age_seconds))


def look(
    rows: list[Execution],
    *records: VersionedRecord,
    oldest_seconds: float = 100.0,
    is_whole: bool = True,
    now: float = 0.0,
) -> Evidence:
    """A look that began at 0, and whose records were read at `now`."""
    sight = Evidence(0.0, oldest_seconds, tuple(rows), is_whole)
    for held in records:
        sight.read(held, ours=["ours"], claim_seconds=60.0, settling_seconds=SETTLING_SECONDS, now=now)
    return sight


@pytest.mark.parametrize("skew", [timedelta(0), timedelta(hours=-14), timedelta(hours=14), timedelta(days=-4000)])
def test_no_execution_since_the_oldest_claim_is_ever_left_out_whatever_the_clocks(skew: timedelta) -> None:
    api_now = BUCKET_NOW + skew
    rows = [row(f"p-{age}", api_now - timedelta(seconds=age)) for age in range(0, 2000, 20)]
    reading = known(40, machine=datetime.now(timezone.utc), prediction_id="p-40")
    for sight in (look(rows), look(rows, reading)):
        shown = {candidate.id for candidate in sight.candidates({"gemini"})}
        assert {f"p-{age}" for age in range(0, 101, 20)} - sight.named <= shown
        assert f"p-{int(100 + CLOCK_MARGIN.total_seconds()) + 80}" not in shown


def test_a_record_that_was_written_late_narrows_nothing_wrongly() -> None:
    """Its prediction is ten minutes older than the record: the API's clock seems to be behind, and is not."""
    rows = [row("p-old", BUCKET_NOW - timedelta(seconds=640)), row("p-new", BUCKET_NOW - timedelta(seconds=90))]
    sight = look(rows, known(40, machine=datetime.now(timezone.utc), prediction_id="p-old"))
    assert [candidate.id for candidate in sight.candidates({"gemini"})] == ["p-new"]


def test_records_that_are_read_long_after_the_walk_leave_no_execution_out() -> None:
    """Ten minutes for many records: the oldest claim was 100 s old when the walk began."""
    walked_at = BUCKET_NOW - timedelta(seconds=600)
    rows = [row("p-known", walked_at), row("p-lost", walked_at - timedelta(seconds=99))]
    sight = look(rows, known(600, machine=datetime.now(timezone.utc)), now=600.0)
    assert [candidate.id for candidate in sight.candidates({"gemini"})] == ["p-lost"]


def test_candidates_come_oldest_first_and_rows_without_a_date_or_model_count() -> None:
    rows = [row("c", BUCKET_NOW), row("a", BUCKET_NOW - timedelta(seconds=9)), row("b", None), row("x", None, "flux")]
    rows.append(Execution(id="d", status=PredictionStatus.PENDING, created_at=BUCKET_NOW - timedelta(seconds=5)))
    assert [candidate.id for candidate in look(rows).candidates({"gemini"})] == ["a", "d", "c", "b"]


def test_what_a_record_or_this_process_names_is_no_candidate() -> None:
    rows = [row(name, BUCKET_NOW) for name in ("a", "b", "c", "d", "e")]
    sight = look(rows, known(10, prediction_id="a", also_bought=["b"], earlier=["c"]))
    sight.know("d", 5.0, settling_seconds=SETTLING_SECONDS, now=0.0)
    assert [candidate.id for candidate in sight.candidates({"gemini"})] == ["e"]


@pytest.mark.parametrize(("age_seconds", "blind"), [(59.0, False), (61.0, True), (900.0, True), (2000.0, False)])
def test_a_list_is_blind_that_does_not_show_what_it_must(age_seconds: float, blind: bool) -> None:
    made = datetime.now(timezone.utc) - timedelta(seconds=age_seconds)
    assert (look([], known(age_seconds, machine=made)).blind_for() is not None) is blind
    sight = look([])
    sight.know("p-known", age_seconds, settling_seconds=SETTLING_SECONDS, now=0.0)
    assert (sight.blind_for() is not None) is blind
    assert look([row("p-known", BUCKET_NOW)], known(age_seconds, machine=made)).blind_for() is None


def test_what_was_bought_while_the_look_took_its_time_need_not_be_listed() -> None:
    """The records are read 30 s after the walk began: 80 s of age are 50 s then."""
    made = datetime.now(timezone.utc) - timedelta(seconds=80)
    assert look([], known(80, machine=made), now=30.0).blind_for() is None
    assert look([], known(95, machine=made), now=30.0).blind_for() is not None
    sight = look([])
    sight.know("p-known", 80.0, settling_seconds=SETTLING_SECONDS, now=30.0)
    assert sight.blind_for() is None


def test_what_was_cancelled_may_be_missing_and_a_walk_that_had_no_end_is_blind() -> None:
    made = datetime.now(timezone.utc) - timedelta(seconds=90)
    for changes in ({"state": RecordState.CANCELLED}, {"cancel_requested": True}):
        sight = look([], known(90, machine=made, **changes))
        sight.know("p-known", 90.0, settling_seconds=SETTLING_SECONDS, now=0.0)
        assert sight.blind_for() is None
    assert "too long" in (look([], is_whole=False).blind_for() or "")


@pytest.mark.parametrize(
    ("age_seconds", "changes", "live"),
    [
        (0.0, {}, True),
        (61.0, {}, True),
        (62.0, {}, False),
        (0.0, {"intent": Intent.SETTLE}, False),
        (0.0, {"intent": Intent.IDLE}, False),
        (0.0, {"write_id": "ours"}, False),
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


def test_the_executions_whose_records_must_have_been_read_are_known_by_the_workers_clocks() -> None:
    """Only when no record tells how far the API's clock is off, everything is read."""
    now, skew = datetime.now(timezone.utc), timedelta(hours=-14)
    rows = [row("p-known", now + skew - timedelta(seconds=30))]
    fresh, old = row("x", now + skew - timedelta(seconds=90)), row("y", now + skew - timedelta(seconds=900))
    sight = look(rows, known(20, machine=now - timedelta(seconds=30)))
    assert sight.has_read_its_record(fresh)
    assert not sight.has_read_its_record(old)
    assert not sight.has_read_its_record(row("z", None))
    assert not look(rows).has_read_its_record(fresh)
    assert READ_BACK_SECONDS >= 300, "five minutes of margin for clocks"
