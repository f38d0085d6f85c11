"""A local S3 for the tests of one file, empty and without faults for each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from botocore.retries.standard import ExponentialBackoff
from moto.s3.models import s3_backends

from prefect_eachlabs.storage.s3 import S3Store
from prefect_eachlabs.testing.s3 import ACCOUNT, LocalS3


def backend() -> Any:
    """moto's own bucket behind the server."""
    return s3_backends[ACCOUNT]["aws"].buckets["pictures"]


@pytest.fixture(scope="module")
def server() -> Iterator[LocalS3]:
    with LocalS3(buckets=["pictures"]) as running:
        yield running


@pytest.fixture
def s3(server: LocalS3, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalS3]:
    """The server, empty and without faults; boto3 repeats without waiting."""
    monkeypatch.setattr(ExponentialBackoff, "delay_amount", lambda *_: 0.0)
    backend().keys.clear()
    yield server
    server.set_faults()


@pytest.fixture
def bucket(s3: LocalS3) -> S3Store:
    return S3Store("pictures", s3.access)
