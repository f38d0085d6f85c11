"""`prefect-eachlabs` as a process of its own, at an emulator and an S3 that the test holds: only they are believed."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import boto3

from prefect_eachlabs.testing.emulator import EmulatorServer
from prefect_eachlabs.testing.s3 import LocalS3

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_SECONDS = 240.0


class Command:
    """A process of the command line, and what it said.

    Args:
        words: What follows `prefect-eachlabs`; or a whole command that begins with Python's path.
        api: The vendor.
        s3: The store.
        folder: Where it runs, and where its output goes.
        settings: Fields of the environment that differ.
    """

    def __init__(self, words: list[str], api: EmulatorServer, s3: LocalS3, folder: Path, **settings: str) -> None:
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("EACHLABS_", "PREFECT_"))},
            "EACHLABS_API_KEY": "a-key-of-tests",
            "EACHLABS_BASE_URL": api.url,
            "EACHLABS_REQUESTS_PER_MINUTE": "none",
            "EACHLABS_MAX_IN_FLIGHT": "10",
            "AWS_ENDPOINT_URL_S3": s3.url,
            "PYTHONPATH": str(ROOT),
            # The limits of a test are nobody else's.
            "XDG_STATE_HOME": str(folder / "state"),
            **settings,
        }
        self.out, self.err = folder / "out.json", folder / "err.log"
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.process = subprocess.Popen(
                words if words[0] == sys.executable else [sys.executable, "-m", "prefect_eachlabs", *words],
                stdout=out,
                stderr=err,
                env=environment,
                cwd=folder,
            )

    def until(self, condition: Callable[[], bool]) -> None:
        """Looks until it is so, while the process runs."""
        give_up_at = time.monotonic() + DEADLINE_SECONDS
        while not condition():
            assert self.process.poll() is None, self.err.read_text()
            assert time.monotonic() < give_up_at, self.err.read_text()
            time.sleep(0.02)

    def press_ctrl_c(self, instead: int = signal.SIGINT) -> None:
        self.process.send_signal(instead)

    def interrupt_another_thread(self) -> None:
        """SIGINT as the kernel may deliver it: to a thread that is not the main one. Linux alone."""
        process_id = self.process.pid
        threads = {int(name) for name in os.listdir(f"/proc/{process_id}/task")} - {process_id}
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.tgkill(process_id, min(threads), signal.SIGINT) == 0, os.strerror(ctypes.get_errno())

    def wait(self) -> int:
        return self.process.wait(DEADLINE_SECONDS)

    @property
    def said(self) -> str:
        return self.err.read_text()

    @property
    def answer(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.out.read_text())
        return found


@contextmanager
def command(words: list[str], api: EmulatorServer, s3: LocalS3, folder: Path, **settings: str) -> Iterator[Command]:
    """A process that is over when the block is."""
    folder.mkdir(exist_ok=True)
    running = Command(words, api, s3, folder, **settings)
    try:
        yield running
    finally:
        running.process.kill()
        running.process.wait()


def table_of(folder: Path, rows: int) -> str:
    """A CSV of so many prompts."""
    path = folder / "spring.csv"
    path.write_text("id,prompt\n" + "".join(f"i{number},fox {number}\n" for number in range(rows)), encoding="utf-8")
    return str(path)


def emptied(s3: LocalS3, bucket: str) -> LocalS3:
    """The store without what an earlier test of this process has left there: all servers hold the same objects."""
    with closing(boto3.client("s3", endpoint_url=s3.url)) as client:
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket):
            for row in page.get("Contents", []):
                client.delete_object(Bucket=bucket, Key=row["Key"])
    return s3


def objects_of(s3: LocalS3, bucket: str, prefix: str) -> dict[str, bytes]:
    """Everything under a prefix."""
    with closing(boto3.client("s3", endpoint_url=s3.url)) as client:
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        keys = [row["Key"] for page in pages for row in page.get("Contents", [])]
        found = {}
        for key in keys:
            with client.get_object(Bucket=bucket, Key=key)["Body"] as body:
                found[key.removeprefix(prefix)] = body.read()
    return found


def cancels_of(api: EmulatorServer) -> Counter[str]:
    """Prediction id → how often the vendor was asked to cancel it."""
    asked = [
        row["path"] for row in api.journal() if row["method"] == "POST" and row["path"].rstrip("/").endswith("/cancel")
    ]
    return Counter(path.rstrip("/").split("/")[-2] for path in asked)
