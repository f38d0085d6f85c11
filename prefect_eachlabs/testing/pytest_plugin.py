"""A pytest fixture for users' own flows: `pytest_plugins = ["prefect_eachlabs.testing.pytest_plugin"]`.

PYTEST_DONT_REWRITE: there is no assert in here, and pytest would warn where it was imported before.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from prefect_eachlabs.testing.emulator.options import EmulatorOptions
from prefect_eachlabs.testing.emulator.server import EmulatorServer

TEST_API_KEY = "emulator-key"


@pytest.fixture
def eachlabs_emulator(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[EmulatorServer]:
    """A fresh emulator for one test, with pictures that are ready at once and no limit but the ten in flight.

    EACHLABS_BASE_URL and EACHLABS_API_KEY lead to it while the test runs. Other options come by
    `@pytest.mark.parametrize("eachlabs_emulator", [EmulatorOptions(...)], indirect=True)`.
    """
    quick = EmulatorOptions(service_seconds=0.05, requests_per_minute=None, image_size_px=64)
    with EmulatorServer(getattr(request, "param", quick)) as server:
        monkeypatch.setenv("EACHLABS_BASE_URL", server.url)
        monkeypatch.setenv("EACHLABS_API_KEY", TEST_API_KEY)
        yield server
