"""A batch over two workers that die, and a run with them, while the server is restarted: billed once, within limits."""

from __future__ import annotations

import json
from typing import Any

import pytest

from prefect_eachlabs.batch.run import shard_of
from prefect_eachlabs.cli.automation import DEAD_RUNS, dead_runs
from tests.ui.conftest import BUCKET, Studio
from tests.ui.stage import BEAT_SECONDS, until

pytestmark = pytest.mark.slow

BATCH = "generate-batch/generate-batch"
ROWS = 30


def test_rows_over_two_workers_are_billed_once_though_workers_die_and_the_run_that_writes_the_report(
    studio: Studio,
) -> None:
    """Workers are killed alone, and their runs live on; then one of these too, while the server goes and comes again.

    For the server that is a machine that has lost its power: nobody is left who could say that the run has died.
    """
    s3, stage = studio.client(), studio.stage
    prompts = [f"a harbour {n} miles away" for n in range(ROWS)]
    rows = [f"harbour-{n},{prompt}" for n, prompt in enumerate(prompts)]
    # One of the first share keeps the run that writes the report at work.
    waits = next(n for n in range(ROWS) if shard_of(f"harbour-{n}", 2) == 0)
    studio.api.set_faults(f"prediction:slow,seconds=90,matching=harbour {waits} miles")
    dead_runs_end_soon(studio)
    while sum(worker.is_running for worker in stage.workers) < 2:
        stage.start_worker()

    def bought() -> list[str]:
        return sorted(one["input"]["prompt"] for one in studio.api.predictions() if "harbour" in one["input"]["prompt"])

    try:
        s3.put_object(Bucket=BUCKET, Key="tables/harbours.csv", Body="\n".join(["id,prompt", *rows]).encode())
        run_id = stage.run(
            BATCH,
            source=f"s3://{BUCKET}/tables/harbours.csv",
            destination=f"s3://{BUCKET}/harbours",
            shards=2,
            chunk_size=10,
        )
        shard = until(lambda: running_shard(studio), 240, f"the shard runs; {stage.tails()}", every_seconds=1)
        until(lambda: len(bought()) >= ROWS // 3, 240, "a third is bought", every_seconds=0.5)
        for worker in stage.workers:
            worker.kill()  # its runs live on, and write their logs to nobody
        assert stage.state(shard) == "RUNNING"
        assert stage.ended(shard)["state"]["type"] == "COMPLETED"
        until(lambda: len(bought()) == ROWS, 120, "the other lives on, too", every_seconds=0.5)
        assert stage.state(run_id) == "RUNNING"
        stage.kill_run(run_id)
        stage.stop_server()
        stage.start_server()
        dead = stage.ended(run_id)
        assert dead["state"]["type"] == "CRASHED"
        assert "heartbeats stopped" in dead["state"]["message"]
        stage.start_worker()
        # Its concurrency slot has ended with it, or this run would be cancelled.
        run = stage.ended(stage.run(BATCH, **dead["parameters"]))
        assert run["state"]["type"] == "COMPLETED", run["state"]["message"]
        body = s3.get_object(Bucket=BUCKET, Key="harbours/batches/harbours/report.json")["Body"].read()
        report: dict[str, Any] = json.loads(body)
        assert (report["items"], report["failed"], report["ambiguous"], report["skipped"]) == (ROWS, 0, 0, 0)
        assert report["stored"] + report["reused"] == ROWS
        assert bought() == sorted(prompts)
        told = {"event": {"name": ["eachlabs.batch.finished"]}, "resource": {"id": ["eachlabs.batch.harbours"]}}
        until(lambda: stage.ask("POST", "/events/filter", {"filter": told})["events"], 90, "the event is there")
        tallies = studio.api.tallies()
        assert tallies["worst_in_flight"] <= 10
        assert tallies["worst_window"] <= 60
    finally:
        studio.api.set_faults()
        s3.close()


def dead_runs_end_soon(studio: Studio) -> None:
    """The automation that `setup` made acts sooner."""
    (found,) = studio.stage.ask("POST", "/automations/filter", {"automations": {"name": {"any_": [DEAD_RUNS]}}})
    shortened = {**dead_runs(BEAT_SECONDS), "trigger": {**found["trigger"], "within": BEAT_SECONDS + 20}}
    studio.stage.ask("PUT", f"/automations/{found['id']}", shortened)


def running_shard(studio: Studio) -> str | None:
    wanted = {"name": {"like_": "share 2/2"}, "state": {"type": {"any_": ["RUNNING"]}}}
    runs = studio.stage.ask("POST", "/flow_runs/filter", {"flow_runs": wanted})
    return str(runs[0]["id"]) if runs else None
