"""The kit's clock, for every test of the protocol."""

from __future__ import annotations

import pytest

from tests.protocol.kit import machine_clocks

__all__ = ["machine_clocks"]


@pytest.fixture(autouse=True)
def _machine_clocks(machine_clocks: None) -> None:
    """Nothing here asks the real time."""
