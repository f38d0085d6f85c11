"""Batches in processes of their own, on a bad day, killed twice: each picture is billed once, and a budget is kept."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from prefect_eachlabs.testing.emulator import EmulatorOptions, EmulatorServer
from prefect_eachlabs.testing.s3 import LocalS3
from tests.batch.cli_process import command, emptied, objects_of, table_of

pytestmark = pytest.mark.slow

FAULTS = (
    *("create:lost_answer=0.04", "create:error=0.02", "create:error_after=0.02", "get:cut_body=0.06"),
    *("prediction:fail=0.02", "prediction:fail_moderation=0.02", "picture:truncated=0.02"),
)
ROWS = 80
BUCKET = "killed-batches"
PRICE_USD = 0.039
QUICK = {"EACHLABS_CLAIM_SECONDS": "12", "EACHLABS_SETTLING_SECONDS": "4"}
"""Settling waits for the end of claims: shorter ones make a shorter test."""

ONE_RUN = """
import asyncio, json, sys
from prefect_eachlabs.batch.plan import open_batch
from prefect_eachlabs.batch.worker import ThreadWorker
from prefect_eachlabs.batch.run import BatchOptions
from prefect_eachlabs.engine.runtime import close_gateways, gateway_for
from prefect_eachlabs.models import Destination

source, destination, run_id, budget_usd = sys.argv[1:]
gateway, worker = gateway_for(), ThreadWorker()

async def work():
    options = BatchOptions(run_id=run_id, budget_usd=float(budget_usd))
    batch = await open_batch(gateway.engine, source, Destination.parse(destination), options, worker=worker)
    return await batch.run(window=40)

result = gateway.call(work())
close_gateways()
worker.close()
print(json.dumps(result.as_json()))
"""
"""A run with an id, as a flow run's is, which Prefect may start again."""


@pytest.fixture
def s3() -> Iterator[LocalS3]:
    with LocalS3(buckets=[BUCKET]) as server:
        yield emptied(server, BUCKET)


def test_a_batch_killed_twice_on_a_bad_day_is_finished_and_billed_once(
    s3: LocalS3, require_shared: Callable[[str], Path], tmp_path: Path
) -> None:
    lines = require_shared("PartiPrompts.tsv").read_text().splitlines(keepends=True)
    source = tmp_path / "PartiPrompts.tsv"
    source.write_text("".join(lines[: ROWS + 1]))
    words = ["batch", str(source), "--to", f"s3://{BUCKET}/p", "--json"]
    unlimited = {**QUICK, "EACHLABS_MAX_IN_FLIGHT": "none"}
    options = EmulatorOptions(
        service_seconds=0.05, requests_per_minute=None, max_in_flight=None, image_size_px=64, pictures="plain"
    )

    def finished(number: int, *flags: str) -> dict[str, int]:
        """What a run says in the end: some rows fail for good."""
        with command([*words, *flags], api, s3, tmp_path / str(number), **unlimited) as running:
            assert running.wait() == 1, running.said
        states = ("stored", "reused", "failed", "ambiguous")
        assert running.answer["items"] == sum(running.answer[state] for state in states) == ROWS
        return running.answer

    with EmulatorServer(options) as api:
        api.set_faults(*FAULTS)
        for number, most in enumerate((12, 30)):
            with command(words, api, s3, tmp_path / str(number), **unlimited) as running:
                running.until(lambda most=most: s3.counts().get(f"PUT {BUCKET}/p/images", 0) >= most)  # type: ignore[misc]
        answer = finished(2)
        # Killed in its first order and answered 500 in its second, a row waits for a person who says that it may.
        assert api.tallies()["billed"] == ROWS - answer["ambiguous"]
        api.set_faults()
        for number in (3, 4):  # a word is about what was ambiguous when its run began, told by whole seconds
            answer = finished(number, "--retry-ambiguous")
            if not answer["ambiguous"]:
                break
        tallies = api.tallies()

    lines = objects_of(s3, BUCKET, "p/batches/PartiPrompts/")["report.jsonl"].decode().splitlines()
    assert answer["ambiguous"] == 0, [line for line in lines if '"ambiguous"' in line]
    assert set(answer["failures_by_kind"]["failed"]) <= {"prediction failed", "content refused", "not a PNG"}
    assert tallies["billed_too_often"] == 0
    assert tallies["billed"] == tallies["distinct_inputs"]
    report, pictures = [json.loads(line) for line in lines], set(objects_of(s3, BUCKET, "p/images/"))
    assert [row["row"] for row in report] == list(range(2, ROWS + 2))
    assert {f"{row['item_id']}.png" for row in report if row["state"] in ("stored", "reused")} == pictures
    assert answer["stored"] == Counter(row["state"] for row in report)["stored"]
    assert answer["pictures_cost_usd"] == pytest.approx(len(pictures) * options.cost_usd)


def test_one_run_killed_twice_keeps_its_one_budget_and_tells_it_to_the_cent(s3: LocalS3, tmp_path: Path) -> None:
    words = [table_of(tmp_path, 30), f"s3://{BUCKET}/p", "flow-run-1", "0.40"]
    script = [sys.executable, "-c", ONE_RUN, *words]
    quick = {**QUICK, "EACHLABS_REFERENCE_ROOTS": str(tmp_path)}
    options = EmulatorOptions(service_seconds=0.5, requests_per_minute=None, image_size_px=64, pictures="plain")
    with EmulatorServer(options) as api:
        api.set_faults("picture:error,status=503,first=4", "create:lost_answer=0.2")
        for number, kill_at in enumerate((3, 7)):
            with command(script, api, s3, tmp_path / str(number), **quick) as running:
                running.until(lambda kill_at=kill_at: api.tallies()["billed"] >= kill_at)  # type: ignore[misc]
        with command(script, api, s3, tmp_path / "last", **quick) as running:
            assert running.wait() == 0
        tallies, answer = api.tallies(), running.answer
    assert tallies["in_flight"] == 0
    assert tallies["cost_usd"] <= 0.4
    left_usd = tallies["cost_usd"] - answer["cost_usd"]
    assert -1e-9 <= left_usd <= answer["cost_unknown"] * PRICE_USD + 1e-9
    report = json.loads(objects_of(s3, BUCKET, "p/batches/spring/")["report.json"])
    assert (report["cost_usd"], report["cost_unknown"]) == (answer["cost_usd"], answer["cost_unknown"])
    # An item whose orders were killed twice, and left no trace, waits for a person and keeps its share of the budget.
    assert (answer["stored"] + answer["ambiguous"], answer["reused"], answer["skipped"]) == (10, 0, 20)
    assert answer["cost_unknown"] == answer["ambiguous"]
