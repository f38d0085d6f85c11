"""The kit's clock, for every test of the protocol."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.protocol.kit import patched_clocks


@pytest.fixture(autouse=True)
def _machine_clocks() -> Iterator[None]:
    """Nothing here asks the real time."""
    undo = patched_clocks()
    yield
    undo()
