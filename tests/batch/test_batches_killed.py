"""The whole path at size: 80 real prompts, a bad network, a bad vendor, two kills; each picture is billed once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import boto3
import pytest

from prefect_eachlabs.testing.emulator import EmulatorOptions, EmulatorServer
from prefect_eachlabs.testing.s3 import LocalS3

FAULTS = (
    "create:lost_answer=0.04",
    "create:error=0.02",
    "create:error_after=0.02",
    "get:cut_body=0.06",
    "prediction:fail=0.02",
    "prediction:fail_moderation=0.02",
    "picture:truncated=0.02",
)
ROWS = 80
KILLED_AT = (12, 30)
BUCKET = "killed-batches"
DEADLINE_SECONDS = 600


def stored(s3: LocalS3) -> int:
    return s3.counts().get(f"PUT {BUCKET}/p/images", 0)


def start(
    source: Path, api: EmulatorServer, s3: LocalS3, folder: Path, number: int, *flags: str
) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "EACHLABS_API_KEY": "a-key-of-tests",
        "EACHLABS_BASE_URL": api.url,
        "EACHLABS_REQUESTS_PER_MINUTE": "none",
        "EACHLABS_MAX_IN_FLIGHT": "none",
        # Settling waits for the end of claims: shorter ones make a shorter test.
        "EACHLABS_CLAIM_SECONDS": "12",
        "EACHLABS_SETTLING_SECONDS": "4",
        "AWS_ENDPOINT_URL_S3": s3.url,
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
    }
    with (folder / f"{number}.json").open("wb") as out, (folder / f"{number}.log").open("wb") as log:
        command = [sys.executable, "-m", "prefect_eachlabs", "batch", str(source), "--to", f"s3://{BUCKET}/p", "--json"]
        return subprocess.Popen([*command, *flags], stdout=out, stderr=log, env=environment, cwd=folder)


def finish(process: subprocess.Popen[bytes], folder: Path, number: int) -> dict[str, Any]:
    """What a run said in the end: some rows fail for good."""
    try:
        assert process.wait(DEADLINE_SECONDS) == 1, (folder / f"{number}.log").read_text()
    finally:
        process.kill()
        process.wait()
    answer: dict[str, Any] = json.loads((folder / f"{number}.json").read_text())
    assert answer["items"] == sum(answer[state] for state in ("stored", "reused", "failed", "ambiguous")) == ROWS
    return answer


@pytest.mark.slow
def test_a_batch_killed_twice_on_a_bad_day_is_finished_and_billed_once(
    local_s3: LocalS3, require_shared: Callable[[str], Path], tmp_path: Path
) -> None:
    lines = require_shared("PartiPrompts.tsv").read_text().splitlines(keepends=True)
    source = tmp_path / "PartiPrompts.tsv"
    source.write_text("".join(lines[: ROWS + 1]))
    local_s3.create_bucket(BUCKET)
    options = EmulatorOptions(
        service_seconds=0.05, requests_per_minute=None, max_in_flight=None, image_size_px=64, pictures="plain"
    )
    with EmulatorServer(options) as api:
        api.set_faults(*FAULTS)
        for number, most in enumerate(KILLED_AT):
            process = start(source, api, local_s3, tmp_path, number)
            try:
                deadline = time.monotonic() + DEADLINE_SECONDS
                while stored(local_s3) < most:
                    assert process.poll() is None, (tmp_path / f"{number}.log").read_text()
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
            finally:
                process.kill()
                process.wait()
        answer = finish(start(source, api, local_s3, tmp_path, 2), tmp_path, 2)
        # Killed in its first order and answered 500 in its second, a row waits for a person who says that it may.
        assert api.tallies()["billed"] == ROWS - answer["ambiguous"]
        api.set_faults()
        for number in (3, 4):  # a word is about what was ambiguous when its run began, told by whole seconds
            answer = finish(start(source, api, local_s3, tmp_path, number, "--retry-ambiguous"), tmp_path, number)
            if not answer["ambiguous"]:
                break
        tallies = api.tallies()

    with (
        closing(boto3.client("s3", endpoint_url=local_s3.url)) as s3,
        s3.get_object(Bucket=BUCKET, Key="p/batches/PartiPrompts/report.jsonl")["Body"] as body,
    ):
        lines = [line for line in body.read().decode().splitlines() if '"ambiguous"' in line]
    assert answer["ambiguous"] == 0, lines
    assert set(answer["failures_by_kind"]["failed"]) <= {"prediction failed", "content refused", "not a PNG"}
    assert tallies["billed_too_often"] == 0
    assert tallies["billed"] == tallies["distinct_inputs"]

    with closing(boto3.client("s3", endpoint_url=local_s3.url)) as s3:
        with s3.get_object(Bucket=BUCKET, Key="p/batches/PartiPrompts/report.jsonl")["Body"] as body:
            report = [json.loads(line) for line in body.read().splitlines()]
        pages = s3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix="p/images/")
        pictures = {row["Key"].rpartition("/")[2] for page in pages for row in page.get("Contents", [])}
    states = Counter(row["state"] for row in report)
    assert [row["row"] for row in report] == list(range(2, ROWS + 2))
    assert {f"{row['item_id']}.png" for row in report if row["state"] in ("stored", "reused")} == pictures
    assert answer["stored"] == states["stored"]
    assert answer["pictures_cost_usd"] == pytest.approx(len(pictures) * options.cost_usd)
