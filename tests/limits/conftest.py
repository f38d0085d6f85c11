"""What tests of limits in virtual time share: nothing that differs from day to day, and an API that counts."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from tests.limits.lease_server import LeaseServer
from tests.limits.lease_workers import Api


@pytest.fixture(autouse=True)
def the_same_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    random.seed(20261122)
    monkeypatch.setattr("prefect_eachlabs.limits.leases.suspended_seconds", lambda: 0.0)


@pytest.fixture
def server() -> LeaseServer:
    return LeaseServer()


@pytest.fixture
def api() -> Iterator[Api]:
    """No test may send more than the page's limits allow; tests with other numbers use an `Api` of their own."""
    seen = Api()
    yield seen
    assert seen.worst_window() <= 60
    assert seen.most_in_flight <= 10
