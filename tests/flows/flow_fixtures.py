"""What tests of tasks and flows share: Prefect's embedded server, an emulator, a bucket."""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest

from prefect_eachlabs.engine.runtime import close_gateways
from prefect_eachlabs.testing.emulator import EmulatorOptions, EmulatorServer
from prefect_eachlabs.testing.s3 import LocalS3

BUCKET = "acme-pictures"


@dataclass
class Studio:
    """An API and a bucket for one test."""

    api: EmulatorServer
    s3: LocalS3
    destination: str

    @property
    def billed(self) -> int:
        return int(self.api.tallies()["billed"])

    def keys(self, folder: str = "images/") -> list[str]:
        """The keys under a folder of the destination."""
        prefix = self.destination.removeprefix(f"s3://{BUCKET}/") + "/" + folder
        with closing(boto3.client("s3")) as s3:
            rows: list[Any] = s3.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])
        return [row["Key"].removeprefix(prefix) for row in rows]


@pytest.fixture(scope="session")
def prefect_server(request: pytest.FixtureRequest) -> Iterator[None]:
    """A Prefect server, once for all tests; its global limits are the account's, as on a server of one's own.

    What tests with a server would mostly take: its migrations (6 s of CPU, so their outcome is kept in pytest's
    cache), the client's two seconds after each "database is locked", the second in which a flow run notices that its
    heartbeats may stop, and logs that are sent to the server, where no test reads them.
    """
    import prefect  # two seconds that most tests need not pay
    from prefect.client import base
    from prefect.settings import (
        PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
        PREFECT_LOGGING_TO_API_ENABLED,
        temporary_settings,
    )
    from prefect.testing import utilities

    kept = request.config.cache.mkdir("prefect-server") / f"{prefect.__version__}.db"
    folder = Path(tempfile.mkdtemp())  # the harness removes it
    if is_kept := kept.exists():
        shutil.copy(kept, folder / "prefect-test.db")
    lean = {PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None, PREFECT_LOGGING_TO_API_ENABLED: False}
    with pytest.MonkeyPatch.context() as patch, temporary_settings(lean):
        patch.setattr(utilities, "mkdtemp", lambda: str(folder))
        patch.setattr(base, "clamped_poisson_interval", lambda seconds, _: seconds / 20)
        with utilities.prefect_test_harness(server_startup_timeout=300):
            if not is_kept:
                half = kept.with_suffix(f".{os.getpid()}")
                with (
                    closing(sqlite3.connect(folder / "prefect-test.db")) as made,
                    closing(sqlite3.connect(half)) as copy,
                ):
                    made.backup(copy)
                half.replace(kept)
            yield


@pytest.fixture(scope="session")
def local_s3() -> Iterator[LocalS3]:
    with LocalS3() as server:
        yield server


@pytest.fixture
def studio(local_s3: LocalS3, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Studio]:
    """A fresh emulator and a destination of one's own, both named in the environment."""
    options = EmulatorOptions(service_seconds=0.05, requests_per_minute=None, image_size_px=64)
    with EmulatorServer(options) as api:
        monkeypatch.setenv("EACHLABS_BASE_URL", api.url)
        monkeypatch.setenv("EACHLABS_API_KEY", "a-key-of-tests")
        monkeypatch.setenv("EACHLABS_REQUESTS_PER_MINUTE", "none")
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", local_s3.url)
        local_s3.create_bucket(BUCKET)
        yield Studio(api, local_s3, f"s3://{BUCKET}/{request.node.name[:60]}")
        close_gateways()
