"""A batch over two workers, one of which dies: bought once, within the limits, one report."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.ui.conftest import BUCKET, Studio
from tests.ui.stage import until

pytestmark = pytest.mark.slow

ROWS = 60


def test_sixty_rows_over_two_workers_one_of_which_dies_are_billed_once_within_the_limits(studio: Studio) -> None:
    s3, prompts = studio.client(), [f"a harbour at {n} o'clock" for n in range(ROWS)]
    try:
        s3.put_object(Bucket=BUCKET, Key="tables/harbours.csv", Body="\n".join(["prompt", *prompts]).encode())
        worker = studio.stage.start_worker()
        run_id = studio.stage.run(
            "generate-batch/generate-batch",
            source=f"s3://{BUCKET}/tables/harbours.csv",
            destination=f"s3://{BUCKET}/harbours",
            shards=2,
            chunk_size=10,
        )

        def bought() -> int:
            return sum(one["input"]["prompt"] in prompts for one in studio.api.predictions())

        def running_shard() -> str | None:
            runs = studio.stage.ask("POST", "/flow_runs/filter", {"flow_runs": {"name": {"any_": ["shard 1 of 2"]}}})
            return str(runs[0]["id"]) if runs and runs[0]["state"]["type"] == "RUNNING" else None

        shard = until(running_shard, 120, f"the shard runs; {studio.stage.tails()}", every_seconds=1)
        until(lambda: bought() >= ROWS // 3, 120, "a third is bought", every_seconds=0.5)
        studio.stage.kill_run(shard)
        worker.kill()
        studio.stage.start_worker()
        run = studio.stage.ended(run_id, within_seconds=300)
        if run["state"]["type"] != "COMPLETED":  # it was the first one's worker that died: the next run finishes it
            again = studio.stage.run("generate-batch/generate-batch", **run["parameters"])
            run = studio.stage.ended(again, within_seconds=300)
        assert run["state"]["type"] == "COMPLETED", run["state"]["message"]
        body = s3.get_object(Bucket=BUCKET, Key="harbours/batches/harbours/report.json")["Body"].read()
        report: dict[str, Any] = json.loads(body)
        assert (report["items"], report["failed"], report["ambiguous"], report["skipped"]) == (ROWS, 0, 0, 0)
        assert report["stored"] + report["reused"] == ROWS
        ours = [one for one in studio.api.predictions() if one["input"]["prompt"] in prompts]
        assert sorted(one["input"]["prompt"] for one in ours) == sorted(prompts)
        tallies = studio.api.tallies()
        assert tallies["worst_in_flight"] <= 10
        assert tallies["worst_window"] <= 60
    finally:
        s3.close()
