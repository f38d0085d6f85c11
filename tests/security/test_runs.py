"""Who may start runs, and nothing else, runs no code on the workers. On a real server, with a worker."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from prefect_eachlabs.cli.work_pool import openings
from tests.security.hostile import hostile_api
from tests.ui.conftest import BUCKET, Studio
from tests.ui.stage import Stage, until

pytestmark = pytest.mark.slow

KEY = "a-key-of-tests"
DEPLOYMENT = "generate-image/generate-image"


@pytest.fixture(scope="module")
def stage(studio_on_sqlite: Studio) -> Stage:
    """Set up as the documentation says, with one worker."""
    return studio_on_sqlite.stage


def hostile_variables(told: Path, url: str) -> list[dict[str, Any]]:
    """What a stranger would choose."""
    return [
        {"command": f"sh -c 'echo $EACHLABS_API_KEY > {told}'"},
        {"env": {"EACHLABS_BASE_URL": url, "BASH_ENV": str(told), "PYTHONSTARTUP": str(told)}},
        {"env.EACHLABS_BASE_URL": url},
        {"working_dir": str(told.parent)},
        {"name": "{{ $EACHLABS_API_KEY }}", "labels": {"key": "{{ prefect.blocks.eachlabs-credentials.default }}"}},
    ]


def start(stage: Stage, variables: dict[str, Any], item_id: str, at: str | None = None) -> httpx.Response:
    """What the Run form sends."""
    parameters = {"prompt": "a fox", "destination": f"s3://{BUCKET}/x", "item_id": item_id}
    body: dict[str, Any] = {"parameters": parameters, "job_variables": variables}
    body["state"] = {"type": "SCHEDULED", "state_details": {"scheduled_time": at}}
    path = f"{stage.url}/deployments/{stage.deployment(DEPLOYMENT)['id']}/create_flow_run"

    def answered() -> httpx.Response | None:
        answer = httpx.post(path, json=body, timeout=30)
        return None if answer.status_code == 503 else answer  # SQLite is busy

    return until(answered, 60, "the server answers")


def test_job_variables_are_refused(stage: Stage, tmp_path: Path) -> None:
    for variables in hostile_variables(tmp_path / "told", "https://evil.invalid"):
        answer = start(stage, variables, "refused")
        assert answer.status_code == 422, (variables, answer.text)
        assert "Additional properties are not allowed" in answer.text
    run_id = start(stage, {}, "patched", "2099-01-01T00:00:00Z").json()["id"]
    changed = {"job_variables": {"command": "sh -c id"}}
    assert httpx.patch(f"{stage.url}/flow_runs/{run_id}", json=changed, timeout=30).status_code == 422
    assert stage.flow_run(run_id)["job_variables"] == {}


def test_job_variables_that_a_server_takes_unchecked_do_nothing(stage: Stage, tmp_path: Path) -> None:
    pool = stage.ask("GET", "/work_pools/eachlabs")["base_job_template"]
    assert openings(pool) == []
    unchecked = json.loads(json.dumps(pool))
    unchecked["variables"]["additionalProperties"] = True
    stage.ask("PATCH", "/work_pools/eachlabs", {"base_job_template": unchecked})
    told = tmp_path / "told"
    try:
        with hostile_api() as url:
            everything = {name: value for one in hostile_variables(told, url) for name, value in one.items()}
            answer = start(stage, everything, "unchecked")
            assert answer.status_code == 201, answer.text
            run = stage.ended(answer.json()["id"])
        assert run["state"]["type"] == "COMPLETED", run["state"]["message"]
        assert not told.exists()
        assert KEY not in json.dumps(run)
        assert KEY not in stage.tails()
    finally:
        stage.ask("PATCH", "/work_pools/eachlabs", {"base_job_template": pool})


def test_in_a_pool_as_prefect_makes_it_a_run_runs_any_command_and_doctor_and_setup_say_so(
    stage: Stage, tmp_path: Path
) -> None:
    """The control."""
    pool = stage.ask("GET", "/work_pools/eachlabs")["base_job_template"]
    from prefect.workers.process import ProcessWorker

    stage.ask("PATCH", "/work_pools/eachlabs", {"base_job_template": ProcessWorker.get_default_base_job_template()})
    told = tmp_path / "told"
    started = start(stage, hostile_variables(told, "")[0], "commanded")
    until(lambda: told.exists() and told.read_text(), 240, f"the command runs; {started.text} {stage.tails()}")
    assert told.read_text().strip() == KEY
    doctor = stage.command("prefect-eachlabs", "doctor", "--json", status=None)
    (found,) = (one for one in json.loads(doctor.stdout)["findings"] if one["about"] == "job variables")
    assert found["state"] == "MEND"
    said = stage.command("prefect-eachlabs", "setup").stdout
    assert "closed now: whoever could start a run could choose its command" in said
    assert stage.ask("GET", "/work_pools/eachlabs")["base_job_template"] == pool
    assert start(stage, hostile_variables(told, "")[0], "commanded").status_code == 422
