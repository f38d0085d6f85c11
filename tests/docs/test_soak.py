"""A short soak: everything fails at rates, processes are killed, and the books are right all the same."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import boto3
import httpx
import pytest

from prefect_eachlabs.cli import batch
from prefect_eachlabs.cli.main import main
from tests.flows.flow_fixtures import Studio

SOAK = Path(__file__).resolve().parents[2] / "benchmarks" / "soak.py"
ENDS_WITHIN_SECONDS = 900
MUST_BE_ZERO = {
    "wanted and not stored",
    "billed twice",
    "paid and lost",
    "two items with one picture",
    "limits exceeded",
    "keys sent to the file host, other offences",
    "exceptions outside the tree of errors",
}


@pytest.mark.slow
def test_a_soak_of_most_of_a_minute_injects_every_sort_of_fault_and_its_books_are_right(tmp_path: Path) -> None:
    pytest.importorskip("moto")
    page = tmp_path / "soak.md"
    command = [sys.executable, str(SOAK), "--minutes", "0.7", "--seed", "3", "--output", str(page)]
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
    assert len(injected) == 8, "API, file host, S3, kills, freezes, clock jumps, full disks, a restart"
    assert all(int(count.replace(",", "")) > 0 for count in injected.values()), injected
    numbers = dict(re.findall(r"^  (pictures \w+).*? {2,}([\d,]+)$", said, re.MULTILINE))
    assert numbers["pictures stored"] == numbers["pictures wanted"]
    assert "# Soak: faults in numbers" in page.read_text()


def test_the_books_show_what_was_bought_twice_lost_or_left_out(
    studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(SOAK.parent)
    judge = importlib.import_module("soak_judge")
    monkeypatch.setattr(batch, "source_of_places", lambda: None)
    studio.s3.create_bucket(judge.BUCKET)
    wanted = [judge.Wanted(f"i{number}", f"fox {number}") for number in range(4)]
    source = tmp_path / "source.csv"
    source.write_text("id,prompt\n" + "".join(f"{one.item_id},{one.prompt}\n" for one in wanted))
    assert main(["batch", str(source), "--to", judge.DESTINATION, "--json"]) == 0
    world = SimpleNamespace(emulator=studio.api, predictions=studio.api.predictions, s3_url=studio.s3.url)
    verdict = judge.judge(world, wanted, [])
    assert (verdict.wanted, verdict.billed, verdict.stored) == (4, 4, 4)
    assert verdict.is_well

    # A second order of one picture, an order that nobody wanted, and a picture that is gone.
    for prompt in ("fox 0", "a badger"):
        order = {"model": "gemini", "version": "2.0-flash-exp-image-generation", "input": {"prompt": prompt}}
        httpx.post(f"{studio.api.url}/v1/prediction/", json=order, headers={"X-API-Key": "key"}).raise_for_status()
    while studio.api.tallies()["in_flight"]:
        time.sleep(0.01)
    s3 = boto3.client("s3")
    s3.delete_object(Bucket=judge.BUCKET, Key=judge.Destination.parse(judge.DESTINATION).image_key("i1"))
    s3.close()
    verdict = judge.judge(world, [*wanted, judge.Wanted("i4", "an owl")], ["Traceback"])
    assert not verdict.is_well
    assert {name: count for name, count in verdict.must_be_zero.items() if count} == {
        "wanted and not stored": 2,
        "billed twice": 2,
        "paid and lost": 2,
        "exceptions outside the tree of errors": 1,
    }
