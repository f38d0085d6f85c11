"""What other teams build on it: an event of their own."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.ui.conftest import Studio
from tests.ui.stage import until

pytestmark = pytest.mark.slow


def test_an_event_of_another_team_becomes_a_picture(studio_on_sqlite: Studio) -> None:
    studio = studio_on_sqlite
    prompt = """a "quoted" {{ event.id }} {% raw %} fox\nin two lines, 50 % grey"""
    ask = (
        "import sys; from prefect.events import emit_event\n"
        "emit_event('eachlabs.picture.requested', resource={'prefect.resource.id': 'eachlabs.picture.order-7'},"
        " payload={'prompt': sys.argv[1], 'item_id': 'order-7'})"
    )
    environment = studio.stage.environment("another-team")
    for name in ("EACHLABS_API_KEY", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        environment.pop(name, None)
    deployment = studio.stage.deployment("generate-image/requested-image")

    def ended() -> list[dict[str, Any]]:
        wanted = {"deployment_id": {"any_": [deployment["id"]]}}
        runs: list[dict[str, Any]] = studio.stage.ask("POST", "/flow_runs/filter", {"flow_runs": wanted})
        return [run for run in runs if run["state"]["type"] in ("COMPLETED", "FAILED", "CRASHED")]

    subprocess.run([sys.executable, "-c", ask, prompt], env=environment, cwd=ROOT, capture_output=True, check=True)
    (run,) = until(ended, 240, f"a run for the event; {studio.stage.tails()}")
    assert run["state"]["type"] == "COMPLETED", run["state"]["message"]
    record = studio.record("order-7")
    assert record is not None
    assert record["state"] == "stored"
    assert len(studio.predictions(prompt)) == 1
