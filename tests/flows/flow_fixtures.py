"""What tests of tasks and flows share: Prefect's embedded server, an emulator, a bucket."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, nullcontext
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

    def key(self, name: str) -> str:
        """Where something of the destination lies in the bucket."""
        return f"{self.destination.removeprefix(f's3://{BUCKET}/')}/{name}"

    def get(self, name: str) -> bytes:
        with closing(boto3.client("s3")) as s3, s3.get_object(Bucket=BUCKET, Key=self.key(name))["Body"] as body:
            return bytes(body.read())

    def put(self, name: str, body: bytes) -> None:
        with closing(boto3.client("s3")) as s3:
            s3.put_object(Bucket=BUCKET, Key=self.key(name), Body=body)

    def delete(self, name: str) -> None:
        with closing(boto3.client("s3")) as s3:
            s3.delete_object(Bucket=BUCKET, Key=self.key(name))

    def keys(self, folder: str = "images/") -> list[str]:
        """The keys under a folder of the destination."""
        prefix = self.key(folder)
        with closing(boto3.client("s3")) as s3:
            rows: list[Any] = s3.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])
        return [row["Key"].removeprefix(prefix) for row in rows]


def last_artifact(key: str) -> Any:
    """The newest of that key at the server."""
    from prefect.client.orchestration import get_client  # a second that most tests need not pay

    with get_client(sync_client=True) as client:
        found = client.read_artifacts(limit=200)
    return max((one for one in found if one.key == key), key=lambda one: one.created)


@pytest.fixture(scope="session")
def prefect_server(kept_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A Prefect server, once for all tests; its global limits are the account's, as on a server of one's own.

    What `prefect_test_harness` and tests on it would mostly take: the server's code in this process as well (3 s of
    CPU), its migrations (9 s), the client's two seconds after each "database is locked", the second in which a flow
    run notices that its heartbeats may stop, and logs that are sent to the server, where no test reads them.
    """
    from prefect import context, flow_engine, settings  # two seconds that most tests need not pay
    from prefect.client import base
    from prefect.events.worker import EventsWorker

    from tests.ui.stage import SERVER, Process, answers, environment_of_server, free_port, migrated, until

    folder = tmp_path_factory.mktemp("prefect-server")
    port = str(free_port())
    url = f"http://127.0.0.1:{port}/api"
    command = [sys.executable, *SERVER, port, "--log-level", "error", "--lifespan", "on"]
    environment = {
        **os.environ,
        **environment_of_server(folder),
        "PREFECT_SERVER_UI_ENABLED": "false",
        "PREFECT__SERVER_EPHEMERAL": "1",
    }
    lean = {settings.PREFECT_API_URL: url, settings.PREFECT_LOGGING_TO_API_ENABLED: False}
    with ExitStack() as stack:
        with migrated(folder, kept_database):
            server = Process(command, environment, folder / "log")
            stack.callback(server.stop)
            until(lambda: answers(url, server), 300, "the server answers")
        stack.enter_context(settings.temporary_settings(lean))
        stack.enter_context(context._temporary_global_settings_context(context.get_settings_context()))  # for threads
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(base, "clamped_poisson_interval", lambda seconds, _: seconds / 20)
        patch.setattr(flow_engine, "_send_heartbeats", lambda *_, **__: nullcontext())
        yield
        EventsWorker.drain_all()


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
