"""What tests of tasks and flows share: Prefect's embedded server, an emulator, a bucket."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
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
def prefect_server() -> Iterator[None]:
    """A Prefect server, once for all tests; its global limits are the account's, as on a server of one's own."""
    from prefect.testing.utilities import prefect_test_harness  # two seconds that most tests need not pay

    with prefect_test_harness(server_startup_timeout=300):
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
        with closing(boto3.client("s3")) as s3:
            s3.create_bucket(Bucket=BUCKET)
        yield Studio(api, local_s3, f"s3://{BUCKET}/{request.node.name[:60]}")
        close_gateways()
