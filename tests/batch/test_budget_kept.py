"""Budgets of `batch`, in processes of their own: what was billed is read from the vendor's side alone."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefect_eachlabs.testing.emulator import EmulatorOptions, EmulatorServer
from prefect_eachlabs.testing.s3 import LocalS3
from tests.batch.cli_process import Command, command, emptied, objects_of, table_of

pytestmark = pytest.mark.slow

BUCKET = "budgets"
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


@pytest.fixture
def api() -> Iterator[EmulatorServer]:
    options = EmulatorOptions(service_seconds=0.5, requests_per_minute=None, image_size_px=64, pictures="plain")
    with EmulatorServer(options) as server:
        yield server


def batch(folder: Path, rows: int, *more: str) -> list[str]:
    return ["batch", table_of(folder, rows), "--to", f"s3://{BUCKET}/p", "--json", *more]


def billed_usd(api: EmulatorServer) -> float:
    """What the vendor has billed, when nothing is in flight any more."""
    tallies = api.tallies()
    assert tallies["in_flight"] == 0
    return float(tallies["cost_usd"])


def is_to_the_cent(
    running: Command, api: EmulatorServer, s3: LocalS3, budget_usd: float, before_usd: float = 0.0
) -> None:
    billed = billed_usd(api) - before_usd
    answer = running.answer
    assert billed <= budget_usd + 1e-9
    assert answer["cost_usd"] <= billed + 1e-9
    assert billed <= answer["cost_usd"] + answer["cost_unknown"] * PRICE_USD + 1e-9
    if not answer["cost_unknown"]:
        assert answer["cost_usd"] == pytest.approx(billed)
    report = json.loads(objects_of(s3, BUCKET, "p/batches/spring/")["report.json"])
    assert (report["cost_usd"], report["cost_unknown"]) == (answer["cost_usd"], answer["cost_unknown"])


def test_failing_downloads(api: EmulatorServer, s3: LocalS3, tmp_path: Path) -> None:
    api.set_faults("picture:error,status=503,first=4")
    with command(batch(tmp_path, 40, "--budget-usd", "0.20"), api, s3, tmp_path / "run") as running:
        assert running.wait() == 1
    is_to_the_cent(running, api, s3, 0.2)
    assert (running.answer["stored"], running.answer["reused"], running.answer["skipped"]) == (5, 0, 35)


def test_lost_answers_that_are_reported(api: EmulatorServer, s3: LocalS3, tmp_path: Path) -> None:
    with command(batch(tmp_path, 1), api, s3, tmp_path / "first") as running:  # tells the price
        assert running.wait() == 0
    api.set_faults("create:lost_answer=0.4")
    words = batch(tmp_path, 30, "--budget-usd", "0.40", "--on-ambiguous", "fail")
    with command(words, api, s3, tmp_path / "run") as running:
        assert running.wait() == 1
    is_to_the_cent(running, api, s3, 0.4, PRICE_USD)
    assert running.answer["cost_unknown"] == running.answer["ambiguous"] > 0


def test_lost_answers_of_the_first_order_of_all(api: EmulatorServer, s3: LocalS3, tmp_path: Path) -> None:
    api.set_faults("create:lost_answer,next=1")
    words = batch(tmp_path, 40, "--budget-usd", "0.20", "--on-ambiguous", "fail")
    with command(words, api, s3, tmp_path / "run") as running:
        assert running.wait() == 1
    is_to_the_cent(running, api, s3, 0.2)
    assert (running.answer["ambiguous"], running.answer["stored"]) == (1, 4)


def test_lost_answers_that_are_settled(api: EmulatorServer, s3: LocalS3, tmp_path: Path) -> None:
    api.set_faults("create:lost_answer=0.4")
    with command(batch(tmp_path, 40, "--budget-usd", "0.40"), api, s3, tmp_path / "run", **QUICK) as running:
        assert running.wait() == 1
    is_to_the_cent(running, api, s3, 0.4)
    assert (running.answer["stored"], running.answer["cost_unknown"]) == (10, 0)


def test_a_price_that_nobody_knows_is_said_before_the_one_picture_that_may_exceed_it(
    api: EmulatorServer, s3: LocalS3, tmp_path: Path
) -> None:
    with command(batch(tmp_path, 12, "--budget-usd", "0.01"), api, s3, tmp_path / "first") as running:
        running.until(lambda: api.tallies()["billed"] == 1)
        assert "can be exceeded by its price" in running.said
        assert running.wait() == 1
    assert billed_usd(api) == pytest.approx(PRICE_USD) == pytest.approx(running.answer["cost_usd"])
    with command(
        ["batch", table_of(tmp_path, 12), "--to", f"s3://{BUCKET}/other", "--json", "--budget-usd", "0.01"],
        api,
        s3,
        tmp_path / "second",
    ) as running:
        assert running.wait() == 1
    assert running.answer["skipped"] == 12
    assert api.tallies()["billed"] == 1, "the account's executions tell the price"


def test_one_run_killed_twice_on_a_bad_day(api: EmulatorServer, s3: LocalS3, tmp_path: Path) -> None:
    api.set_faults("picture:error,status=503,first=4", "create:lost_answer=0.2")
    words = [table_of(tmp_path, 30), f"s3://{BUCKET}/p", "flow-run-1", "0.40"]
    script = [sys.executable, "-c", ONE_RUN, *words]
    quick = {**QUICK, "EACHLABS_REFERENCE_ROOTS": str(tmp_path)}
    for number, kill_at in enumerate((3, 7)):
        with command(script, api, s3, tmp_path / str(number), **quick) as running:
            running.until(lambda kill_at=kill_at: api.tallies()["billed"] >= kill_at)  # type: ignore[misc]
    with command(script, api, s3, tmp_path / "last", **quick) as running:
        assert running.wait() == 0
    is_to_the_cent(running, api, s3, 0.4)
    # An item whose orders were killed twice, and left no trace, waits for a person and keeps its share of the budget.
    answer = running.answer
    assert (answer["stored"] + answer["ambiguous"], answer["reused"], answer["skipped"]) == (10, 0, 20)
    assert answer["cost_unknown"] == answer["ambiguous"]
