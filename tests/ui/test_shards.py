"""A batch over two workers, one of which dies, while the server is restarted: billed once, within the limits."""

from __future__ import annotations

import json
from typing import Any

import pytest

from prefect_eachlabs.cli.automation import DEAD_RUNS, dead_runs
from tests.ui.conftest import BUCKET, Studio
from tests.ui.stage import BEAT_SECONDS, until

pytestmark = pytest.mark.slow

BATCH = "generate-batch/generate-batch"
ROWS = 30


@pytest.mark.parametrize("what", ["is killed alone", "loses its power"])
def test_rows_over_two_workers_are_billed_once_though_one_dies(studio: Studio, what: str) -> None:
    """The worker is that of the run that writes the report. With its power, the server goes and comes again."""
    s3, stage, name = studio.client(), studio.stage, what.rpartition(" ")[2]
    prompts = [f"{name} harbour at {n} o'clock" for n in range(ROWS)]
    dead_runs_end_soon(studio)
    while sum(worker.is_running for worker in stage.workers) < 2:
        stage.start_worker()

    def bought() -> list[str]:
        return sorted(one["input"]["prompt"] for one in studio.api.predictions() if name in one["input"]["prompt"])

    try:
        s3.put_object(Bucket=BUCKET, Key=f"tables/{name}.csv", Body="\n".join(["prompt", *prompts]).encode())
        run_id = stage.run(
            BATCH,
            source=f"s3://{BUCKET}/tables/{name}.csv",
            destination=f"s3://{BUCKET}/harbours",
            shards=2,
            chunk_size=10,
        )
        until(lambda: running_shard(studio), 240, f"the shard runs; {stage.tails()}", every_seconds=1)
        until(lambda: len(bought()) >= ROWS // 3, 240, "a third is bought", every_seconds=0.5)
        worker = stage.worker_of(run_id)
        if what == "is killed alone":
            worker.kill()  # its runs live on, and write their logs to nobody
        else:
            stage.cut_power(worker)
            stage.stop_server()
            stage.start_server()
            dead = stage.ended(run_id)
            assert dead["state"]["type"] == "CRASHED"
            assert "heartbeats stopped" in dead["state"]["message"]
            stage.start_worker()
            # Its concurrency slot has ended with it, or this run would be cancelled.
            run_id = stage.run(BATCH, **stage.flow_run(run_id)["parameters"])
        run = stage.ended(run_id, within_seconds=300)
        assert run["state"]["type"] == "COMPLETED", run["state"]["message"]
        body = s3.get_object(Bucket=BUCKET, Key=f"harbours/batches/{name}/report.json")["Body"].read()
        report: dict[str, Any] = json.loads(body)
        assert (report["items"], report["failed"], report["ambiguous"], report["skipped"]) == (ROWS, 0, 0, 0)
        assert report["stored"] + report["reused"] == ROWS
        assert bought() == sorted(prompts)
        told = {"event": {"name": ["eachlabs.batch.finished"]}, "resource": {"id": [f"eachlabs.batch.{name}"]}}
        until(lambda: stage.ask("POST", "/events/filter", {"filter": told})["events"], 90, "the event is there")
        tallies = studio.api.tallies()
        assert tallies["worst_in_flight"] <= 10
        assert tallies["worst_window"] <= 60
    finally:
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
