"""A batch whose rows have reference pictures, from a bucket and from files: killed half-way, and finished."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import boto3
import pytest

from prefect_eachlabs.cli.main import main
from tests.api.reference_kit import picture_bytes
from tests.flows.flow_fixtures import BUCKET, Studio

Printed = pytest.CaptureFixture[str]


def table(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture
def refs(tmp_path: Path, studio: Studio, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is allowed, and a folder of the bucket."""
    folder = tmp_path / "refs"
    folder.mkdir()
    monkeypatch.setenv("EACHLABS_REFERENCE_ROOTS", f"{folder}:s3://{BUCKET}/refs")
    return folder


def put(key: str, shade: int) -> str:
    with closing(boto3.client("s3")) as s3:
        s3.put_object(Bucket=BUCKET, Key=key, Body=picture_bytes(shade))
    return f"s3://{BUCKET}/{key}"


def test_each_row_comes_to_an_end_of_its_own_and_bad_references_cost_nothing(
    studio: Studio, refs: Path, tmp_path: Path, capsys: Printed
) -> None:
    (refs / "fox.png").write_bytes(picture_bytes(1))
    (refs / "text.png").write_text("no picture")
    (tmp_path / "secret.png").write_bytes(picture_bytes(2))
    rows = [
        {"prompt": "plain"},
        {"prompt": "by name", "image_url": "fox.png"},
        {"prompt": "by path", "image_url": str(refs / "fox.png")},
        {"prompt": "object", "image_url": put("refs/a.png", 3)},
        {"prompt": "another model", "image_url": "fox.png", "model": "flux-kontext-pro"},
        {"prompt": "outside", "image_url": str(tmp_path / "secret.png")},
        {"prompt": "outside", "image_url": "../secret.png"},
        {"prompt": "no picture", "image_url": "text.png"},
        {"prompt": "no object", "image_url": f"s3://{BUCKET}/refs/none.png"},
        {"prompt": "another bucket", "image_url": "s3://another-bucket/a.png"},
        {"prompt": "no model of that kind", "image_url": "fox.png", "model": "imagen-4"},
    ]
    source = table(tmp_path / "rows.csv", rows)
    assert main(["batch", str(source), "--to", studio.destination, "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert (answer["stored"], answer["failed"], answer["failures_by_kind"]["failed"]) == (5, 6, {"bad input": 6})
    tallies = studio.api.tallies()
    assert (tallies["billed"], tallies["uploads"], tallies["violations"]) == (5, 1, {})


@pytest.mark.slow
def test_a_batch_of_40_with_references_that_is_killed_half_way_buys_nothing_again(
    studio: Studio, refs: Path, tmp_path: Path
) -> None:
    """20 rows with 10 files, 20 rows with 10 objects; SIGKILL after the 25th purchase."""
    rows = []
    for number in range(40):
        shade = number // 2 % 10
        if number % 2:
            reference = put(f"refs/{shade}.png", 100 + shade) if number < 20 else f"s3://{BUCKET}/refs/{shade}.png"
        else:
            (refs / f"{shade}.png").write_bytes(picture_bytes(shade))
            reference = f"{shade}.png"
        rows.append({"id": f"row-{number}", "prompt": f"picture {number}", "image_url": reference})
    source = table(tmp_path / "rows.csv", rows)
    environment = {**os.environ, "EACHLABS_CLAIM_SECONDS": "3", "EACHLABS_SETTLING_SECONDS": "2"}
    command = [sys.executable, "-m", "prefect_eachlabs", "batch", str(source), "--to", studio.destination, "--json"]

    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as first:
        while studio.billed < 25 and first.poll() is None:
            time.sleep(0.05)
        os.kill(first.pid, signal.SIGKILL)
        assert first.wait() == -signal.SIGKILL, "it was to be killed half-way"
    killed: dict[str, Any] = studio.api.tallies()
    assert killed["uploads"] == 10
    assert 25 <= killed["billed"] < 40

    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2_000:]
    answer = json.loads(done.stdout)
    assert answer["items"] == answer["stored"] + answer["reused"] == 40
    tallies = studio.api.tallies()
    assert (tallies["billed"], tallies["billed_too_often"]) == (40, 0)
    assert tallies["violations"] == {}
    assert tallies["uploads"] == tallies["requests_by_endpoint"]["presign"] <= 20, "each process uploads a file once"
    assert len(studio.keys("records/")) == 40
    sent = {one["input"]["prompt"]: one["input"]["image_url"] for one in studio.api.predictions()}
    assert len({url.partition("?")[0] for url in sent.values()}) <= 30
