"""`setup --deploy`: what it hands to Prefect's own deploy, which the slow tests let run."""

from __future__ import annotations

from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.schedules import CronSchedule

from prefect_eachlabs import S3Destination
from prefect_eachlabs.cli import deployments
from prefect_eachlabs.errors import SetupError
from prefect_eachlabs.flows import generate_batch


@pytest.fixture
def handed_over(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    heard: list[dict[str, Any]] = []
    monkeypatch.setattr(deployments, "_deploy", heard.append)
    return heard


def of(handed_over: list[dict[str, Any]], name: str) -> dict[str, Any]:
    (wanted,) = handed_over
    (found,) = [one for one in wanted["deployments"] if one["name"] == name]
    return dict(found)


@pytest.mark.usefixtures("prefect_server")
def test_forms_are_filled_in_with_the_block_that_is_there(handed_over: list[dict[str, Any]]) -> None:
    with get_client(sync_client=True) as client:
        assert "destination" not in of_block(client, "of-nobody", handed_over)
        S3Destination(bucket="acme-pictures", prefix="daily").save("of-deploy", overwrite=True)
        assert of_block(client, "of-deploy", handed_over)["destination"] == "eachlabs-s3-destination/of-deploy"


def of_block(client: Any, block: str, handed_over: list[dict[str, Any]]) -> dict[str, Any]:
    handed_over.clear()
    deployments.deploy(client, block)
    found: dict[str, Any] = of(handed_over, "settle")["parameters"]
    return found


@pytest.mark.usefixtures("prefect_server")
def test_what_a_person_has_set_stays(handed_over: list[dict[str, Any]]) -> None:
    with get_client(sync_client=True) as client:
        flow_id = client.create_flow(generate_batch)
        schedule = DeploymentScheduleCreate(schedule=CronSchedule(cron="0 4 * * *"), active=True, slug="nightly")
        theirs = {"source": "s3://acme-pictures/tables/of-a-person.csv", "of_an_older_form": 1}
        made = client.create_deployment(flow_id, "generate-batch", parameters=theirs, schedules=[schedule])
        try:
            done = deployments.deploy(client, "of-nobody")
        finally:
            client.delete_deployment(made)
    assert done["generate-batch/generate-batch"] == "updated"
    assert done["settle/settle"] == "made"
    batch = of(handed_over, "generate-batch")
    assert "schedules" not in batch
    assert batch["parameters"] == {"source": theirs["source"]}
    assert of(handed_over, "settle")["schedules"]


@pytest.mark.slow
@pytest.mark.usefixtures("at_server_process")
def test_what_prefect_refuses_is_one_sentence() -> None:
    with pytest.raises(SetupError, match="no-such-pool"):
        deployments._deploy(
            {
                "pull": [],
                "deployments": [
                    {
                        "name": "x",
                        "entrypoint": "prefect_eachlabs.flows.settle_leftovers",
                        "work_pool": {"name": "no-such-pool"},
                    }
                ],
            }
        )
