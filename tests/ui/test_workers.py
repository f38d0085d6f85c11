"""Deployments through a worker: run, cancelled, killed, scheduled; what the server and the bucket say afterwards."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import closing
from datetime import datetime, timezone
from typing import Any

import pytest

from tests.ui.conftest import BUCKET, IMAGE, PLACE, Studio
from tests.ui.stage import until

pytestmark = pytest.mark.slow

BATCH = "generate-batch/generate-batch"
TO_THE_BLOCK = "eachlabs-s3-destination/default"


def form(studio: Studio, name: str) -> dict[str, Any]:
    fields: dict[str, Any] = studio.stage.deployment(name)["parameter_openapi_schema"]["properties"]
    return fields


def test_all_deployments_are_there_with_their_schedules_and_forms(studio: Studio) -> None:
    batch = studio.stage.deployment("generate-batch/generate-batch")
    assert batch["global_concurrency_limit"]["limit"] == 1
    assert batch["concurrency_options"]["collision_strategy"] == "CANCEL_NEW"
    for name, cron in (
        ("generate-batch/generate-batch", "0 2 * * *"),
        ("scheduled-image/scheduled-image", "0 6 * * *"),
        ("settle/settle", "30 */6 * * *"),
    ):
        (schedule,) = studio.stage.deployment(name)["schedules"]
        assert (schedule["schedule"]["cron"], schedule["schedule"]["timezone"]) == (cron, "Europe/Berlin")
    for name in (IMAGE, "generate-image/requested-image", "generate-batch/shard"):
        assert form(studio, name)["destination"]["title"] == "Destination"


def test_set_up_twice_and_looked_at_all_is_well(studio: Studio) -> None:
    again = json.loads(studio.stage.command("prefect-eachlabs", "setup", "--destination", PLACE, "--json").stdout)
    assert {done for what in ("work_pool", "blocks", "automations") for done in again[what].values()} == {"there"}

    def looked_at() -> tuple[dict[str, Any], str] | None:
        """Where all begins at once a worker takes its time to come, and a slot to be given."""
        seen = studio.stage.command("prefect-eachlabs", "doctor", "--to", TO_THE_BLOCK, "--json", status=None)
        found = {one["about"]: one for one in json.loads(seen.stdout)["findings"]}
        print(*(one for one in found.values() if one["state"] != "ok"), sep="\n")
        # The automation of dead runs may be that of the tests of shards, which wait for less.
        is_well = {found[about]["state"] for about in found.keys() - {"webhooks", "dead runs"}} == {"ok"}
        return (found, seen.stdout + seen.stderr) if is_well else None

    found, printed = until(looked_at, 120, "all is well")
    assert found["webhooks"]["state"] == "-"  # they are not set up
    assert found["leases"]["said"] == "filesystem"
    assert "a-key-of-tests" not in printed


def test_a_run_on_a_worker_without_a_clone_leaves_a_picture_an_artifact_and_an_event(studio: Studio) -> None:
    billed = studio.api.tallies()["billed"]
    run_id = studio.stage.run(IMAGE, prompt="a <red> fox", destination=TO_THE_BLOCK, item_id="fox")
    run = studio.stage.ended(run_id)
    assert (run["state"]["type"], run["name"]) == ("COMPLETED", "fox")
    (artifact,) = studio.stage.artifacts(run_id)
    assert artifact["key"] == "eachlabs-fox"
    assert 'src="data:image/jpeg;base64,' in artifact["data"]
    record = studio.record("fox")
    assert record is not None
    assert record["state"] == "stored"
    assert studio.api.tallies()["billed"] == billed + 1
    assert not list(studio.stage.empty_folder.iterdir())

    def told() -> list[dict[str, Any]] | None:
        where = {"event": {"prefix": ["eachlabs."]}, "resource": {"id": ["eachlabs.picture.fox"]}}
        events: list[dict[str, Any]] = studio.stage.ask("POST", "/events/filter", {"filter": where})["events"]
        return events or None

    events = until(told, 90, "the event is on the server")
    assert [one["event"] for one in events] == ["eachlabs.picture.stored"]
    roles = {related["prefect.resource.role"] for related in events[0]["related"]}
    assert roles >= {"flow-run", "flow", "deployment", "task-run"}
    assert "fox>" not in json.dumps(events)
    assert "a-key-of-tests" not in json.dumps(studio.stage.flow_run(run_id))


def test_a_cancelled_batch_ends_its_chunks_as_cancelled_and_says_what_it_has_bought(studio: Studio) -> None:
    prompts = ["a hare", "a hare in snow", *(f"a mole that stays for day {number}" for number in range(6))]
    studio.api.set_faults("prediction:slow,seconds=120,matching=stays")
    place = f"s3://{BUCKET}/moles"
    with closing(studio.client()) as s3:
        s3.put_object(Bucket=BUCKET, Key="tables/moles.csv", Body="\n".join(["prompt", *prompts]).encode())
        run_id = studio.stage.run(BATCH, source=f"s3://{BUCKET}/tables/moles.csv", destination=place, chunk_size=4)

        def is_under_way() -> bool:
            listed = s3.list_objects_v2(Bucket=BUCKET, Prefix="moles/records/").get("Contents", [])
            records = [json.load(s3.get_object(Bucket=BUCKET, Key=one["Key"])["Body"]) for one in listed]
            states = Counter(record["state"] for record in records)
            return states == {"created": len(prompts) - 2, "stored": 2}

        until(is_under_way, 240, "all are ordered, and two are stored")
    studio.stage.cancel(run_id)
    assert studio.stage.ended(run_id)["state"]["type"] == "CANCELLED"
    studio.api.set_faults()
    body = {"flow_runs": {"id": {"any_": [run_id]}}}
    states = until(
        lambda: [one["state"]["type"] for one in studio.stage.ask("POST", "/task_runs/filter", body)], 90, "task runs"
    )
    assert set(states) == {"CANCELLED"}
    (report,) = [one for one in studio.stage.artifacts(run_id) if one["key"] == "eachlabs-batch-moles"]
    assert "interrupted" in report["data"]
    assert "2 stored" in report["data"] or "<td>2</td>" in report["data"]


def test_a_run_killed_after_its_posts_is_finished_by_the_next_one_and_billed_once(studio: Studio) -> None:
    """One row waits for its picture, one for the answer to its order."""
    states = {"a dog that lingers": "created", "a cow whose answer is late": "claimed"}
    rows = ["id,prompt", *(f"{prompt.split()[1]},{prompt}" for prompt in states)]
    s3 = studio.client()
    try:
        s3.put_object(Bucket=BUCKET, Key="tables/animals.csv", Body="\n".join(rows).encode())
    finally:
        s3.close()
    studio.api.set_faults(
        "prediction:slow,seconds=30,matching=lingers", "create:late_answer,seconds=30,matching=whose answer"
    )

    def start() -> str:
        return studio.stage.run(BATCH, source=f"s3://{BUCKET}/tables/animals.csv", destination=PLACE)

    def states_are_noted() -> bool:
        found = {prompt: studio.record(prompt.split()[1]) or {} for prompt in states}
        return {prompt: record.get("state") for prompt, record in found.items()} == states

    killed = start()
    until(lambda: all(map(studio.predictions, states)), 240, "they are bought", every_seconds=0.05)
    until(states_are_noted, 20, "the records say so")
    studio.stage.kill_run(killed)
    studio.api.set_faults()
    assert states_are_noted()
    assert studio.stage.ended(killed)["state"]["type"] == "CRASHED"
    again = studio.stage.ended(start())
    assert again["state"]["type"] == "COMPLETED", again["state"]["message"]
    for prompt in states:
        assert [one["status"] for one in studio.predictions(prompt)] == ["success"]


def test_a_scheduled_run_fires_by_itself(studio: Studio) -> None:
    deployment = studio.stage.deployment("scheduled-image/scheduled-image")
    path = f"/deployments/{deployment['id']}/schedules"
    prompt = "a lighthouse, scheduled"
    parameters = {"prompt_template": prompt, "destination": f"{PLACE}-scheduled", "item_id_template": "{date:%Y}"}
    anchor = datetime.now(timezone.utc).isoformat()
    # Whenever the server comes to look at the new schedule, the next run is near, and the one after it is not.
    schedule = {"schedule": {"interval": 40, "anchor_date": anchor}, "active": True, "parameters": parameters}
    (made,) = studio.stage.ask("POST", path, [schedule])
    wanted = {"deployment_id": {"any_": [deployment["id"]]}}

    def begun() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = studio.stage.ask("POST", "/flow_runs/filter", {"flow_runs": wanted})
        return [run for run in found if run["auto_scheduled"] and run["state"]["type"] not in ("SCHEDULED", "PENDING")]

    try:
        first = until(begun, 240, f"a scheduled run begins; {studio.stage.tails()}", every_seconds=1)[0]
    finally:
        studio.stage.ask("DELETE", f"{path}/{made['id']}")
    run = studio.stage.ended(first["id"])
    assert (run["state"]["type"], run["state"]["message"]) == ("COMPLETED", None)
    assert run["name"] == f"{datetime.now(timezone.utc):%Y}"
    assert len(studio.predictions(prompt)) == 1
