"""A server on PostgreSQL or SQLite, one worker, an API and a bucket for all slow tests of this folder."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from prefect_eachlabs.testing.emulator import EmulatorOptions, EmulatorServer
from prefect_eachlabs.testing.s3 import LocalS3
from tests.ui.stage import PostgreSQL, Stage, opened

BUCKET = "acme-pictures-of-workers"
PLACE = f"s3://{BUCKET}/daily"
IMAGE = "generate-image/generate-image"
SERVICE_SECONDS = 2.0
CLAIM_SECONDS = 20


@dataclass
class Studio:
    """Everything that operators have."""

    stage: Stage
    api: EmulatorServer
    s3: LocalS3

    def client(self) -> Any:
        import boto3

        return boto3.client("s3", endpoint_url=self.s3.url)

    def record(self, item_id: str) -> dict[str, Any] | None:
        """The item's record, as the bucket has it."""
        s3 = self.client()
        try:
            body = s3.get_object(Bucket=BUCKET, Key=f"daily/records/{item_id}.json")["Body"].read()
        except s3.exceptions.NoSuchKey:
            return None
        finally:
            s3.close()
        record: dict[str, Any] = json.loads(body)
        return record

    def predictions(self, prompt: str) -> list[dict[str, Any]]:
        """What was bought for a prompt."""
        return [one for one in self.api.predictions() if one["input"]["prompt"] == prompt]


@pytest.fixture(scope="session")
def database(require_tool: Callable[[str], Path]) -> Iterator[PostgreSQL]:
    server = PostgreSQL(require_tool("initdb").parent)
    try:
        server.start()
        yield server
    finally:
        server.stop()


@contextlib.contextmanager
def made(folder: Path, database: str | Path) -> Iterator[Studio]:
    """Set up and deployed as README says, with one worker."""
    options = EmulatorOptions(service_seconds=SERVICE_SECONDS, spread=0, image_size_px=256)
    with EmulatorServer(options) as api, LocalS3(buckets=[BUCKET]) as s3:
        given = {
            "EACHLABS_BASE_URL": api.url,
            "EACHLABS_API_KEY": "a-key-of-tests",
            "EACHLABS_REFERENCE_ROOTS": f"s3://{BUCKET}/tables",
            "EACHLABS_CLAIM_SECONDS": str(CLAIM_SECONDS),
            "EACHLABS_SETTLING_SECONDS": "3",
            "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
            "AWS_ENDPOINT_URL_S3": s3.url,
        }
        with opened(folder, database, given) as stage:
            stage.command("prefect-eachlabs", "setup", "--destination", PLACE, "--deploy")
            stage.start_worker()
            yield Studio(stage, api, s3)


@pytest.fixture(scope="session")
def studio(database: PostgreSQL, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    with made(tmp_path_factory.mktemp("stage"), database.url) as studio:
        yield studio
