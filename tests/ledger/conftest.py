"""A ledger in memory."""

from __future__ import annotations

import pytest

from prefect_eachlabs.ledger.records import Ledger
from prefect_eachlabs.models import Destination
from tests.memory_store import MemoryStore

DESTINATION = Destination.parse("s3://bucket/kit")


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def ledger(store: MemoryStore) -> Ledger:
    return Ledger(store, DESTINATION)
