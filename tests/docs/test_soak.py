"""A short soak: everything fails at rates, processes are killed, and the books are right all the same."""

from __future__ import annotations

import importlib
import io
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boto3
import httpx
import pytest

from prefect_eachlabs.cli import batch
from prefect_eachlabs.cli.main import main
from prefect_eachlabs.engine.runtime import close_gateways
from prefect_eachlabs.testing.emulator import EmulatorOptions, EmulatorServer
from tests.flows.flow_fixtures import Studio
from tests.ui.stage import is_begun_from

SOAK = Path(__file__).resolve().parents[2] / "benchmarks" / "soak.py"
ENDS_WITHIN_SECONDS = 900
MUST_BE_ZERO = {
    "wanted and not stored",
    "billed twice",
    "paid and not in the bucket",
    "two items with one picture",
    "orders beyond the second of what is answered 500 for ever",
    "reports whose cost is not the bill",
    "budgets exceeded",
    "sums and names that the audit has otherwise",
    "in flight at a Ctrl-C and not asked to cancel",
    "batches that did not end in time",
    "batches refused as wrong",
    "limits exceeded",
    "keys sent to the file host, other offences",
    "exceptions outside the tree of errors",
}


@pytest.mark.slow
def test_a_soak_of_half_a_minute_injects_its_faults_and_its_books_are_right(
    kept_database: Path, tmp_path: Path
) -> None:
    pytest.importorskip("moto")
    page, home = tmp_path / "soak.md", tmp_path / "home"
    home.mkdir()
    is_begun_from(kept_database, home)
    command = [sys.executable, str(SOAK), "--minutes", "0.5", "--seed", "3", "--output", str(page)]
    command += ["--prefect-home", str(home)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path)
    try:
        said, _ = process.communicate(timeout=ENDS_WITHIN_SECONDS)
    finally:
        process.terminate()  # it ends what it has started
        process.communicate()
    assert process.returncode == 0, said
    zeros = re.findall(r"^  (.+) \(must be 0\) +([\d,]+)$", said, re.MULTILINE)
    assert dict(zeros) == dict.fromkeys(MUST_BE_ZERO, "0")
    injected = dict(re.findall(r"^  faults injected: (.+?) {2,}([\d,]+)$", said, re.MULTILINE))
    assert len(injected) >= 10, "API, file host, S3, kills, freezes, clock jumps, full disks, a restart, scenes"
    # Half a minute is short: a sort or two may not have had its turn.
    assert sum(count == "0" for count in injected.values()) <= 2, injected
    numbers = dict(re.findall(r"^  (pictures \w+|left to a person).*? {2,}([\d,]+)$", said, re.MULTILINE))
    wanted, stored, left_open = (
        int(numbers[name]) for name in ("pictures wanted", "pictures stored", "left to a person")
    )
    assert stored + left_open == wanted
    assert "# Soak: faults in numbers" in page.read_text()


@pytest.fixture
def books(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The judge, and a world of four foxes of which somebody has bought every one."""
    monkeypatch.syspath_prepend(SOAK.parent)
    judge = importlib.import_module("soak_judge")
    monkeypatch.setattr(batch, "limiter_maker", lambda: None)
    studio.s3.create_bucket(judge.BUCKET)
    wanted = [judge.Wanted(f"i{number}", f"fox {number}") for number in range(4)]
    nobody = SimpleNamespace(name="nobody", group=SimpleNamespace(wanted_of=lambda number: []))
    alone = SimpleNamespace(name="alone", group=SimpleNamespace(wanted_of=lambda number: wanted))
    options = EmulatorOptions(
        service_seconds=0.05, requests_per_minute=None, pictures="plain", image_size_px=judge.PICTURE_PX
    )
    with EmulatorServer(options) as api:
        monkeypatch.setenv("EACHLABS_BASE_URL", api.url)
        yield SimpleNamespace(
            judge=judge,
            wanted=wanted,
            api=api,
            world=SimpleNamespace(
                emulator=api,
                predictions=api.predictions,
                s3_url=studio.s3.url,
                replaced=lambda: ([], []),
                steady=alone,
                on_a_full_disk=nobody,
                interrupted=nobody,
                hopeless=nobody,
                budgeted=alone,
                last=alone,
                accepted_before_the_last_run=None,
                audit=lambda: audited(judge.DESTINATION),
            ),
        )
        close_gateways()


def audited(destination: str) -> Any:
    with redirect_stdout(io.StringIO()) as printed:
        main(["audit", destination, "--json"])
    return json.loads(printed.getvalue())


def verdict_of(books: Any, answer: dict[str, Any], *more: Any, exceptions: Sequence[str] = (), status: int = 0) -> Any:
    said = {"buyer": "alone", "source": 1, "run_id": "r", "accepted": 0, "status": status, "answer": answer}
    books.world.batches = lambda: [said]
    return books.judge.judge(books.world, [*books.wanted, *more], exceptions, ([], []))


def not_zero(verdict: Any) -> dict[str, int]:
    return {name: count for name, count in verdict.must_be_zero.items() if count}


def test_the_books_show_what_was_bought_twice_lost_left_out_or_told_wrongly(
    books: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source.csv"
    source.write_text("id,prompt\n" + "".join(f"{one.item_id},{one.prompt}\n" for one in books.wanted))
    assert main(["batch", str(source), "--to", books.judge.DESTINATION, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    verdict = verdict_of(books, answer)
    assert (verdict.wanted, verdict.billed, verdict.stored) == (4, 4, 4)
    assert verdict.is_well, verdict.named
    assert set(verdict.must_be_zero) == MUST_BE_ZERO
    assert not_zero(verdict_of(books, {**answer, "cost_usd": 0.0})) == {"reports whose cost is not the bill": 1}
    assert verdict_of(books, {**answer, "cost_usd": 0.0, "cost_unknown": 4}).is_well, "it says what it does not know"
    assert not_zero(verdict_of(books, answer, status=2)) == {"batches refused as wrong": 1}

    # A second order of one picture, two that nobody wanted and a budget does not cover, and a picture that is gone.
    for prompt in ("fox 0", "fox 2", "a badger"):
        order = {"model": "gemini", "version": "2.0-flash-exp-image-generation", "input": {"prompt": prompt}}
        httpx.post(f"{books.api.url}/v1/prediction/", json=order, headers={"X-API-Key": "key"}).raise_for_status()
    while books.api.tallies()["in_flight"]:
        time.sleep(0.01)
    with closing(boto3.client("s3")) as s3:
        image_key = books.judge.Destination.parse(books.judge.DESTINATION).image_key
        s3.delete_object(Bucket=books.judge.BUCKET, Key=image_key("i1"))
    verdict = verdict_of(books, answer, books.judge.Wanted("i4", "an owl"), exceptions=["Traceback"])
    assert not verdict.is_well
    assert not_zero(verdict) == {
        "wanted and not stored": 2,
        "billed twice": 3,
        "paid and not in the bucket": 4,
        "reports whose cost is not the bill": 2,  # the run's, and the sum of all pictures
        "sums and names that the audit has otherwise": 1,  # to it, what no record names is another tool's
        "exceptions outside the tree of errors": 1,
    }


def test_the_books_show_a_budget_that_was_not_kept_and_orders_without_end(books: Any) -> None:
    for number in range(8):
        order = {"model": "gemini", "input": {"prompt": f"fox {number % 4}"}}
        httpx.post(f"{books.api.url}/v1/prediction/", json=order, headers={"X-API-Key": "key"}).raise_for_status()
    books.api.set_faults("create:empty_error,matching=poison")
    for _ in range(3):
        order = {"model": "gemini", "input": {"prompt": "an (poison) apple"}}
        httpx.post(f"{books.api.url}/v1/prediction/", json=order, headers={"X-API-Key": "key"})
    while books.api.tallies()["in_flight"]:
        time.sleep(0.01)
    verdict = verdict_of(
        books, {"cost_usd": 0.312, "pictures_cost_usd": 0.0}, books.judge.Wanted("i5", "an (poison) apple")
    )
    assert verdict.must_be_zero["budgets exceeded"] == 1, "eight pictures on a budget of six"
    assert verdict.must_be_zero["orders beyond the second of what is answered 500 for ever"] == 1
    assert verdict.must_be_zero["wanted and not stored"] == 4, "the apple cannot be had"
