"""Rows of the caller's own: any iterable of mappings, data frames, Arrow tables, in and out of flows."""

from __future__ import annotations

import asyncio
import gc
import pickle
import sqlite3
import weakref
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import closing
from typing import Any
from uuid import uuid4

import pyarrow
import pytest
from prefect import flow, task
from prefect.futures import PrefectConcurrentFuture, PrefectFuture

from prefect_eachlabs import agenerate_rows, generate_rows
from prefect_eachlabs.batch.outcomes import BatchResult, RowResult
from prefect_eachlabs.batch.run import Chunk
from prefect_eachlabs.errors import BadInput, BatchIncomplete
from prefect_eachlabs.rows import ChunkRuns
from tests.flows.flow_fixtures import Studio

pytestmark = pytest.mark.usefixtures("prefect_server")

FOXES = [{"id": f"fox-{number}", "prompt": f"fox number {number}", "shelf": number} for number in range(3)]
WITH_BAD = [
    {"id": "a", "prompt": "a fox"},
    {"id": "b", "prompt": "  "},
    {"id": "c", "prompt": "a naked fox"},
    {"prompt": "a hare"},
]


def statuses(result: BatchResult) -> list[str]:
    return [row.status for row in result]


def test_a_list_of_dicts_becomes_an_entry_a_row_in_their_order_and_only_who_asks_gets_an_error_that_holds_them(
    studio: Studio,
) -> None:
    studio.api.set_faults("prediction:fail_moderation,matching=naked")
    result = generate_rows(WITH_BAD, destination=studio.destination, batch_id="zoo", fail_above=2)
    assert statuses(result) == ["stored", "failed", "failed", "stored"]
    assert [row.id for row in result][:3] == ["a", "b", "c"]
    first = result.rows[0]
    assert first == RowResult("a", "stored", f"{studio.destination}/images/a.png", 0.039, None)
    assert str(result.rows[1].error).startswith("bad input: ")
    assert str(result.rows[2].error).startswith("content refused: ")
    assert (result.items, result.stored, result.failed) == (4, 2, 2)
    assert (result.cost_usd, result.report_uri) == (0.078, f"{studio.destination}/batches/zoo/report.json")
    assert [list(record) for record in result.records()] == [["id", "status", "uri", "cost_usd", "error"]] * 4
    ordered = studio.billed
    with pytest.raises(BatchIncomplete, match=r"2 reused, 2 failed \(1 bad input, 1 content refused\) of 4") as caught:
        generate_rows(WITH_BAD, destination=studio.destination, batch_id="zoo", fail_above=1)
    again = caught.value.result
    assert again is not None
    assert pickle.loads(pickle.dumps(caught.value)).result == again
    assert (statuses(again), again.cost_usd) == (["reused", "failed", "failed", "reused"], 0)
    assert studio.billed == ordered == 3, "the one that moderation refused was ordered, too"


class Ended(Chunk):
    """A chunk whose name stands, and whose rows nobody needs any more."""

    name = "rows 1 to 100"


def test_a_chunk_that_has_ended_is_let_go_of() -> None:
    """A hundred thousand rows are not kept for the sake of their task runs."""
    ends: list[Future[Any]] = []

    class Runner:
        def submit(self, shown: Any, parameters: dict[str, Any]) -> PrefectFuture[Any]:
            ends.append(Future())
            future: PrefectFuture[Any] = PrefectConcurrentFuture(uuid4(), ends[-1])
            future.chunk = parameters["chunk"]  # type: ignore[attr-defined]  # what Prefect's own hold of it
            return future

    runs, chunk = ChunkRuns(Runner(), None, None), Ended()  # type: ignore[arg-type]  # nothing is asked of them
    kept = weakref.ref(chunk)
    runs.show(chunk)
    del chunk
    gc.collect()
    assert kept() is not None
    ends.pop().set_result("100 stored")
    gc.collect()
    assert kept() is None


def test_a_flow_gets_the_result_though_rows_failed_and_prefect_walks_through_neither_rows_nor_result(
    studio: Studio,
) -> None:
    """A hundred thousand rows took Prefect 13 s and 150 MB, and nothing was found in them."""
    seen: list[str] = []

    class Row(dict[str, str]):
        def items(self) -> Any:
            seen.append(self["id"])
            return super().items()

    @flow
    def nightly() -> BatchResult:
        return generate_rows([Row(row) for row in WITH_BAD[:2]], destination=studio.destination)

    result = nightly()
    assert [row.uri for row in result] == [f"{studio.destination}/images/a.png", None]
    assert seen == ["a", "b"], "the batch's own walk"
    assert not isinstance(result.rows, (list, tuple)), "which Prefect would look into"
    assert "report.json" in studio.keys("batches/nightly/"), "the batch is named for its flow"


def test_a_wrong_key_stops_the_batch_and_each_row_says_so(studio: Studio) -> None:
    studio.api.set_faults("create:error,status=401")
    result = generate_rows(FOXES, destination=studio.destination)
    # Those whose order was on its way when the first was refused are told the same.
    assert "failed" in statuses(result)
    assert set(statuses(result)) <= {"failed", "skipped"}
    assert result.stopped_by is not None
    with pytest.raises(BatchIncomplete, match=r"Stopped: The API at .* does not accept the key"):
        generate_rows(FOXES, destination=studio.destination, fail_above=1_000)


def test_an_async_flow_awaits_it_and_what_its_budget_leaves_out_is_skipped(studio: Studio) -> None:
    @flow
    async def nightly() -> BatchResult:
        return await agenerate_rows(FOXES, destination=studio.destination, chunk_size=2, budget_usd=0.05)

    result = asyncio.run(nightly())  # type: ignore[arg-type]  # Prefect types its flows for both worlds
    assert statuses(result) == ["stored", "skipped", "skipped"]
    assert studio.billed == 1


def test_what_an_upstream_task_returns_is_waited_for(studio: Studio) -> None:
    @task
    def fetch() -> list[dict[str, Any]]:
        return FOXES[:1]

    @task
    def one(number: int) -> dict[str, Any]:
        return FOXES[number]

    @flow
    def nightly() -> tuple[BatchResult, BatchResult]:
        return (
            generate_rows(fetch.submit(), destination=studio.destination),
            generate_rows.submit(one.map([1, 2]), destination=studio.destination, batch_id="mapped").result(),
        )

    first, second = nightly()
    assert [row.id for row in first] == ["fox-0"]
    assert [row.id for row in second] == ["fox-1", "fox-2"]


def test_a_generator_that_belongs_to_its_thread_is_read_there_and_closed_before_anything_is_bought(
    studio: Studio,
) -> None:
    billed_when_read: list[int] = []

    def rows() -> Iterator[sqlite3.Row]:
        with closing(sqlite3.connect(":memory:")) as database:
            database.row_factory = sqlite3.Row
            database.execute("CREATE TABLE products (id TEXT, prompt TEXT, picture TEXT)")
            database.executemany("INSERT INTO products VALUES (?, ?, NULL)", [("a", "a fox"), ("b", "a hare")])
            yield from database.execute("SELECT * FROM products WHERE picture IS NULL")
        billed_when_read.append(studio.billed)

    assert statuses(generate_rows(rows(), destination=studio.destination)) == ["stored"] * 2
    assert billed_when_read == [0]


def test_an_arrow_table_keeps_its_types(studio: Studio) -> None:
    rows = pyarrow.table({"id": [1, 2], "prompt": ["a fox", None], "input.seed": [42, None]})
    result = generate_rows(rows, destination=studio.destination)
    assert [(row.id, row.status) for row in result] == [("1", "stored"), ("2", "failed")]
    (bought,) = studio.api.predictions()
    assert bought["input"]["seed"] == 42


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("prompts.csv", "generate_batch"),
        ({"prompt": "a fox"}, "list of dicts"),
        (5, "list of dicts"),
        ([{"text": "a fox"}], "no column 'prompt'"),
    ],
)
def test_what_is_no_rows_is_refused_before_anything_is_bought(studio: Studio, rows: Any, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        generate_rows(rows, destination=studio.destination)
    assert studio.billed == 0


def test_no_rows_are_a_batch_that_is_complete(studio: Studio) -> None:
    result = generate_rows([], destination=studio.destination, fail_above=0)
    assert (result.items, list(result)) == (0, [])
