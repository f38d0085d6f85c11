"""The flow over a table: chunks as task runs, artifacts, and a state that says what is not there."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run

from prefect_eachlabs import rows as rows_module
from prefect_eachlabs.batch.outcomes import BatchResult, Outcome, RowState
from prefect_eachlabs.batch.progress import Progress
from prefect_eachlabs.batch_artifacts import ProgressShown, chunk_markdown, report_markdown
from prefect_eachlabs.engine.sync_async import Plan
from prefect_eachlabs.errors import BadInput, BatchIncomplete
from prefect_eachlabs.flows.batch import generate_batch
from prefect_eachlabs.testing.emulator import EmulatorOptions
from tests.batch.cli_process import objects_of
from tests.flows.flow_fixtures import BUCKET, Studio

pytestmark = pytest.mark.usefixtures("prefect_server")


@pytest.fixture(autouse=True)
def _tables_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EACHLABS_REFERENCE_ROOTS", str(tmp_path))


def table(tmp_path: Path, prompts: Sequence[str]) -> str:
    path = tmp_path / "spring.tsv"
    path.write_text("\n".join(["prompt", *prompts]) + "\n", encoding="utf-8")
    return str(path)


def foxes(count: int) -> list[str]:
    return [f"fox number {number}" for number in range(count)]


def ended(source: str, studio: Studio, **more: Any) -> State[Any]:
    state: State[Any] = generate_batch(source, studio.destination, **more, return_state=True)
    return state


def result_of(state: State[Any]) -> dict[str, Any]:
    found = asyncio.run(state.aresult(raise_on_failure=False))
    if isinstance(found, BatchIncomplete):
        found = found.result
    told: dict[str, Any] = found.as_json() if isinstance(found, BatchResult) else found
    return told


def seen_of(state: State[Any]) -> tuple[list[Any], list[Any]]:
    """The flow run's task runs and artifacts."""
    run_id = state.state_details.flow_run_id
    assert run_id is not None
    return seen_of_run(run_id)


def seen_of_run(run_id: UUID) -> tuple[list[Any], list[Any]]:
    with get_client(sync_client=True) as client:
        runs = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run_id])))
        mine = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run_id]))
        return runs, client.read_artifacts(artifact_filter=mine)


def test_a_task_run_stands_for_a_chunk_and_one_more_run_needs_none(studio: Studio, tmp_path: Path) -> None:
    source = table(tmp_path, foxes(5))
    state = ended(source, studio, chunk_size=2)
    assert state.is_completed()
    assert str(state.message).startswith("5 stored, 0 reused of 5; $0.1950")
    result = result_of(state)
    assert (result["stored"], result["items"], result["cost_by_model"]["gemini"]["pictures"]) == (5, 5, 5)
    assert result["report_uri"] == f"{studio.destination}/batches/spring/report.json"
    assert studio.billed == 5

    runs, artifacts = seen_of(state)
    assert sorted(run.name for run in runs) == ["rows 2 to 3", "rows 4 to 5", "rows 6 to 6"]
    (progress,) = [one for one in artifacts if one.type == "progress"]
    assert progress.data == 100
    assert "5 of 5 (100%): 5 stored" in progress.description
    (report,) = [one for one in artifacts if one.key == "eachlabs-batch-spring"]
    assert "data:image/webp;base64," in report.data
    chunks = [one for one in artifacts if one.type == "markdown" and one.key is None]
    assert len(chunks) == 3
    assert any("fox number 4" in one.data for one in chunks)

    again = ended(source, studio)
    assert again.is_completed()
    assert result_of(again)["reused"] == 5
    assert seen_of(again)[0] == []
    assert studio.billed == 5


def test_a_row_without_a_picture_fails_the_run_with_the_reasons_by_kind(studio: Studio, tmp_path: Path) -> None:
    studio.api.set_faults("prediction:fail_moderation,matching=naked")
    source = table(tmp_path, ["a fox", "a naked fox", "  ", "two\tcells"])
    state = ended(source, studio)
    assert state.is_failed()
    assert "2 failed (1 bad input, 1 content refused)" in str(state.message)
    assert result_of(state)["stored"] == 1
    _, artifacts = seen_of(state)
    (report,) = [one for one in artifacts if one.key == "eachlabs-batch-spring"]
    assert "a naked fox" in report.data
    assert "content refused" in report.data
    assert ended(source, studio, fail_above=2).is_completed()
    assert ended(source, studio, fail_above=1).is_failed()


@pytest.mark.parametrize(
    ("failed", "fail_above", "exceeds"),
    [(0, 0, False), (1, 0, True), (2, 2, False), (2, 1, True), (2, 0.5, False), (2, 0.4, True)],
)
def test_what_may_fail_is_a_number_of_rows_or_below_1_a_share_of_them(
    failed: int, fail_above: float, exceeds: bool
) -> None:
    assert replace(RESULT, items=4, failed=failed).exceeds(fail_above) is exceeds


def test_a_dry_run_buys_nothing_and_says_what_it_would(studio: Studio, tmp_path: Path) -> None:
    state = ended(table(tmp_path, foxes(7)), studio, dry_run=True)
    assert state.is_completed()
    assert state.message == "Nothing was bought: 7 new, 0 there, 0 that cannot be bought."
    assert result_of(state)["new"] == 7
    assert studio.billed == 0


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"chunk_size": 0}, "chunk_size"),
        ({"chunk_size": 101}, "chunk_size"),
        ({"presigned_days": 8}, "presigned_days"),
        ({"budget_usd": 0}, "budget_usd"),
        ({"fail_above": -1}, "fail_above"),
        ({"batch_id": "a/b"}, "batch_id"),
        ({"model": "no model"}, "model"),
    ],
)
def test_what_a_form_may_not_hold_is_refused(studio: Studio, tmp_path: Path, given: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        generate_batch.fn(table(tmp_path, foxes(1)), studio.destination, **given)
    assert studio.billed == 0


def test_a_mistyped_model_is_one_sentence_in_the_first_second(studio: Studio, tmp_path: Path) -> None:
    state = ended(table(tmp_path, foxes(50)), studio, model="flux-1-1-por")
    said = "model: the catalogue has no model 'flux-1-1-por'. Did you mean flux-1-1-pro?"
    assert state.message == f"{said} `prefect-eachlabs models` lists what there is. Nothing was bought."
    assert not [row for row in studio.api.journal() if row["method"] == "POST"]


def test_where_the_catalogue_cannot_tell_the_order_does(studio: Studio, tmp_path: Path) -> None:
    studio.api.set_faults("models:error,status=400")  # a 500 would be asked again, for a quarter of a minute
    assert "1 failed" in str(ended(table(tmp_path, foxes(1)), studio, model="flux-1-1-por").message)


def test_rows_of_a_task_run_that_prefect_lost_are_obtained_all_the_same(
    studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @task(cache_policy=NO_CACHE)
    def lost(chunk: rows_module.ShownChunk) -> None:
        raise ConnectionError("the Prefect server is away")

    monkeypatch.setattr(rows_module, "generate_chunk", lost)
    state = ended(table(tmp_path, foxes(2)), studio)
    assert state.is_completed()
    assert result_of(state)["stored"] == 2 == studio.billed


class Ended(BaseException):
    """What Prefect's own signal is to a flow's body; that one ends the process, too."""


def test_a_cancelled_run_cancels_what_is_in_flight_its_chunks_end_as_cancelled_and_a_summary_is_left(
    studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    studio.api.emulator.options = EmulatorOptions(service_seconds=60, requests_per_minute=None)
    monkeypatch.setattr(rows_module, "NEWS_SECONDS", 0.2)
    run_ids: list[str] = []

    def terminated(self: ProgressShown, progress: Progress, **_: Any) -> Plan[None]:
        if studio.api.tallies()["in_flight"]:
            run_ids.append(str(flow_run.id))
        if len(run_ids) > 2:
            raise Ended
        yield from ()

    monkeypatch.setattr(ProgressShown, "show", terminated)
    with pytest.raises(Ended):
        generate_batch(table(tmp_path, foxes(30)), studio.destination)
    tallies = studio.api.tallies()
    assert tallies["in_flight"] == 0
    assert tallies["cancelled"] == tallies["billed"] > 0
    cancels = [row["path"] for row in studio.api.journal() if row["path"].endswith("/cancel")]
    assert len(cancels) == len(set(cancels)) == tallies["billed"]
    prefix = studio.destination.removeprefix(f"s3://{BUCKET}/") + "/batches/spring/"
    report = json.loads(objects_of(studio.s3, BUCKET, prefix)["report.json"])
    assert (report["state"], report["failures_by_kind"]["failed"]) == ("interrupted", {"cancelled": tallies["billed"]})
    assert (report["cost_usd"], report["cost_unknown"]) == (0, 0)
    runs, artifacts = seen_of_run(UUID(run_ids[-1]))
    assert {run.state.type.value for run in runs} == {"CANCELLED"}
    (summary,) = [one for one in artifacts if one.key == "eachlabs-batch-spring"]
    assert "interrupted" in summary.data


RESULT = BatchResult("b", "r", "completed", 1, 0, 0, 1, 0, 0, 0.0, 0, None, 0.0, 1.0, "s3://b/r", "s3://b/i")
HOSTILE = "<img src=x onerror=alert(1)> | [a](javascript:alert(1)) `code` **bold**"


def test_nothing_from_outside_is_markup_in_an_artifact() -> None:
    bad = Outcome(2, RowState.FAILED, prompt=HOSTILE, error={"kind": HOSTILE, "message": HOSTILE})
    result = replace(RESULT, batch_id=HOSTILE, why=HOSTILE, stopped_by=HOSTILE)
    for markdown in (chunk_markdown([bad]), report_markdown(result, [bad], [(bad, "data:image/webp;base64,AAAA")])):
        for sign in ("<img src", "](javascript", "**bold**", "`code`", "\n\n"):
            assert sign not in markdown


def test_a_source_may_stand_in_the_bucket_and_other_formats_are_stored_where_the_form_allows_them(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EACHLABS_REFERENCE_ROOTS", studio.destination)
    table = b"id,prompt,model,input.output_format\na,a fox,flux-1-1-pro,jpeg\nb,a hare,flux-1-1-pro,png\n"
    studio.put("in/mixed.csv", table)
    source = f"{studio.destination}/in/mixed.csv"
    assert "format not allowed" in str(ended(source, studio, formats="png").message)
    assert ended(source, studio, formats="png, jpeg", batch_id="zoo").is_completed()
    files = ["contact-sheet.png", "index.html", "report.json", "report.jsonl"]
    assert sorted(studio.keys("batches/zoo/"))[:4] == files
    assert sorted(studio.keys()) == ["a.jpg", "b.png"]
    assert studio.billed == 2
