"""A batch's events, and the automations that are shipped, on a server that acts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import StateType
from prefect.events import RelatedResource, emit_event
from prefect.events.schemas.automations import AutomationCore
from prefect.flow_engine import run_flow_sync
from prefect.states import Completed, Running

from prefect_eachlabs import events
from prefect_eachlabs.cli.automation import dead_runs
from prefect_eachlabs.flows import generate_batch
from tests.conftest import ROOT
from tests.flows.flow_fixtures import Studio

SHIPPED = {
    one["name"]: one
    for one in yaml.safe_load((ROOT / "deployments" / "automation.yaml").read_text(encoding="utf-8"))["automations"]
}


def until(look: Callable[[], Any], within_seconds: float = 60) -> None:
    """Events travel by themselves: there is no clock of ours to move."""
    deadline = time.monotonic() + within_seconds
    while not look():
        assert time.monotonic() < deadline, f"not within {within_seconds:.0f} s"
        time.sleep(0.1)


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    heard: list[tuple[str, dict[str, Any], dict[str, Any]]] = []

    def emit(event: str, *, resource: dict[str, Any], payload: dict[str, Any]) -> None:
        heard.append((event, resource, payload))

    monkeypatch.setattr(events, "emit_event", emit)
    return heard


@pytest.fixture(autouse=True)
def _tables_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EACHLABS_REFERENCE_ROOTS", str(tmp_path))


def table(tmp_path: Path, prompts: list[str]) -> str:
    path = tmp_path / "zoo.csv"
    path.write_text("\n".join(["prompt", *prompts]) + "\n", encoding="utf-8")
    return str(path)


@pytest.mark.usefixtures("prefect_server")
def test_a_batch_tells_of_chunks_with_failures_and_of_its_end_and_of_nothing_else(
    studio: Studio, tmp_path: Path, sent: list[tuple[str, dict[str, Any], dict[str, Any]]]
) -> None:
    studio.api.set_faults("prediction:fail_moderation,matching=naked")
    prompts = ["a naked fox", "a naked hare", "a dog", "a cat", "a cow", "a hen", "a naked cat", "a goat", "a pig"]
    generate_batch(table(tmp_path, prompts), studio.destination, chunk_size=3, fail_above=9)
    told = sorted((event, resource.get("eachlabs.failures"), facts.get("rows")) for event, resource, facts in sent)
    assert told == [
        (events.BATCH_FINISHED, None, None),
        (events.ROWS_FAILED, "most", "rows 2 to 4"),
        (events.ROWS_FAILED, "some", "rows 8 to 10"),
    ]
    (most,) = [facts for _, resource, facts in sent if resource.get("eachlabs.failures") == "most"]
    assert most == {"batch_id": "zoo", "rows": "rows 2 to 4", "count": 3, "failed": 2, "kinds": {"content refused": 2}}
    assert "naked" not in repr(sent)


@pytest.mark.usefixtures("prefect_server")
def test_a_budget_that_is_spent_is_an_event_of_its_own_and_no_failure(
    studio: Studio, tmp_path: Path, sent: list[tuple[str, dict[str, Any], dict[str, Any]]]
) -> None:
    source = table(tmp_path, [f"fox {number}" for number in range(5)])
    generate_batch(source, studio.destination, budget_usd=0.1, fail_above=9)
    assert studio.billed == 2
    assert [event for event, _, _ in sent] == [events.BUDGET_REACHED, events.BATCH_FINISHED]


@pytest.fixture
def client(prefect_server: None) -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as found:
        yield found


def test_a_server_takes_every_automation_that_is_shipped(client: SyncPrefectClient) -> None:
    for shipped in SHIPPED.values():
        made = client.request("POST", "/automations/", json=AutomationCore(**shipped).model_dump(mode="json"))
        client.request("DELETE", f"/automations/{made.raise_for_status().json()['id']}").raise_for_status()


@pytest.mark.parametrize(
    ("name", "fault", "count"),
    [
        ("eachlabs-stop-a-batch-that-fails", "prediction:fail_moderation", 3),
        ("eachlabs-pause-without-money", "create:error,status=402", 1),
    ],
)
def test_a_deployment_whose_batch_fails_is_paused(
    name: str, fault: str, count: int, studio: Studio, tmp_path: Path, client: SyncPrefectClient
) -> None:
    automation = client.request("POST", "/automations/", json=AutomationCore(**SHIPPED[name]).model_dump(mode="json"))
    automation.raise_for_status()
    try:
        flow_id = client.create_flow(generate_batch)
        deployment_id = client.create_deployment(flow_id, name, entrypoint="prefect_eachlabs.flows.generate_batch")
        source = table(tmp_path, [f"fox {number}" for number in range(count)])
        run = client.create_flow_run_from_deployment(
            deployment_id,
            parameters={"source": source, "destination": studio.destination, "chunk_size": 1, "fail_above": 9},
        )
        studio.api.set_faults(fault)
        run_flow_sync(generate_batch, flow_run=run, parameters=run.parameters, return_type="state")
        until(lambda: client.read_deployment(deployment_id).paused)
    finally:
        client.request("DELETE", f"/automations/{automation.json()['id']}").raise_for_status()


@pytest.mark.slow
@pytest.mark.usefixtures("at_server_process")
def test_a_run_whose_heartbeats_stop_ends_as_crashed_and_one_that_has_ended_stays() -> None:
    shortened = dead_runs(30)
    shortened["trigger"]["within"] = 10  # the least that Prefect takes
    with get_client(sync_client=True) as client:
        made = client.request("POST", "/automations/", json={**shortened, "name": "of-a-test"})
        try:
            flow_id = client.create_flow(generate_batch)
            ours = client.create_deployment(flow_id, "dead", tags=["eachlabs"])  # whose runs have its tags
            theirs = client.create_deployment(flow_id, "of-others")
            dead, ended, of_others = (
                client.create_flow_run_from_deployment(one, state=Running()) for one in (ours, ours, theirs)
            )
            for run in (dead, ended, of_others):
                tags = [
                    RelatedResource({"prefect.resource.id": f"prefect.tag.{t}", "prefect.resource.role": "tag"})
                    for t in run.tags
                ]
                resource = {"prefect.resource.id": f"prefect.flow-run.{run.id}"}
                emit_event("prefect.flow-run.heartbeat", resource=resource, related=tags)
            client.set_flow_run_state(ended.id, Completed(), force=True)
            until(lambda: client.read_flow_run(dead.id).state_type is StateType.CRASHED)
            assert client.read_flow_run(ended.id).state_type is StateType.COMPLETED
            assert of_others.tags == []
            assert client.read_flow_run(of_others.id).state_type is StateType.RUNNING
        finally:
            client.delete_automation(made.json()["id"])
