"""The set-up: what it takes from the environment; the server's part is among the slow tests."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.settings import PREFECT_API_URL, PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
from prefect.workers.process import ProcessJobConfiguration, ProcessWorker

from prefect_eachlabs import EachlabsCredentials, S3Destination
from prefect_eachlabs.blocks import _loaded
from prefect_eachlabs.cli import automation
from prefect_eachlabs.cli.main import main
from prefect_eachlabs.cli.setup import credentials_given, destination_given, make_blocks, make_work_pool, save
from prefect_eachlabs.cli.work_pool import closed, closed_template, openings
from prefect_eachlabs.errors import SetupError
from prefect_eachlabs.models import Destination

KEY = "key-that-nobody-may-see"
PLACE = Destination.parse("s3://acme-pictures/daily")


def test_without_a_key_there_is_no_credentials_block_and_without_a_destination_none_of_that() -> None:
    assert credentials_given({}) is None
    assert destination_given({"AWS_REGION": "eu-central-1"}, None) is None


def test_the_block_gets_what_the_environment_says_and_nothing_more() -> None:
    given = credentials_given({"EACHLABS_API_KEY": KEY, "EACHLABS_REQUESTS_PER_MINUTE": "none"})
    assert given is not None
    assert (set(given), given["requests_per_minute"]) == ({"api_key", "requests_per_minute"}, 0)
    called = {"EACHLABS_WEBHOOK_URL": "https://hooks.test/in", "EACHLABS_WEBHOOK_SECRET": "s" * 16}
    given = credentials_given({"EACHLABS_API_KEY": KEY, **called})
    assert given is not None
    assert set(given) == {"api_key", "webhook_url", "webhook_secret"}
    assert "ssss" not in str(given)
    place = destination_given({"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9", "AWS_SECRET_ACCESS_KEY": "x"}, PLACE)
    assert place == {"bucket": "acme-pictures", "prefix": "daily", "endpoint_url": "http://127.0.0.1:9"}


def test_without_a_server_it_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("setup", "limits show"):
        with temporary_settings(restore_defaults={PREFECT_API_URL}):
            assert main([*command.split(), "--json"]) == 2
        assert "PREFECT_API_URL" in json.loads(capsys.readouterr().out)["error"]


@pytest.mark.parametrize("words", ["--tag x", "--tag =3", "--tag =", "--tag x=0", "--tag x=none", "--tag x=y"])
def test_a_tag_limit_that_is_none_is_refused(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["limits", "apply", *words.split()]) == 2
    assert "--tag" in capsys.readouterr().err


def test_a_tag_without_apply_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["limits", "show", "--tag", "x=3"]) == 2
    assert "apply" in capsys.readouterr().err


CHOSEN = {
    "command": "sh -c id",
    "env": {"X": "1"},
    "env.Y": "2",
    "working_dir": "/tmp",
    "name": "x",
    "labels": {"a": "b"},
}


@pytest.mark.usefixtures("prefect_server")
def test_in_a_closed_pool_no_job_variable_reaches_the_process() -> None:
    configuration = asyncio.run(ProcessJobConfiguration.from_template_and_values(closed_template(), CHOSEN))
    assert configuration == ProcessJobConfiguration()
    open_pool = ProcessWorker.get_default_base_job_template()
    assert openings(open_pool) == sorted(open_pool["variables"]["properties"])
    assert openings(closed_template()) == []
    assert closed(open_pool) == closed_template()


def test_an_env_that_is_written_into_a_template_is_open_since_prefect_merges_a_runs_own_into_it() -> None:
    template = closed_template()
    template["job_configuration"]["env"] = {}
    configuration = asyncio.run(ProcessJobConfiguration.from_template_and_values(template, CHOSEN))
    assert configuration.env == {"X": "1", "Y": "2"}, "Prefect merges it no more: then it may be written out"
    assert openings(template) == ["env"]
    assert closed(template) == {**template, "job_configuration": {"stream_output": True}}


@pytest.mark.usefixtures("prefect_server")
class TestOnAServer:
    def test_the_work_pool_is_made_once(self) -> None:
        assert {make_work_pool(), make_work_pool()} >= {"there"}

    def test_an_open_work_pool_is_closed_and_what_an_operator_chose_there_stays(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("prefect_eachlabs.cli.setup.WORK_POOL", "open")
        template = ProcessWorker.get_default_base_job_template()
        template["variables"]["properties"]["working_dir"]["default"] = "/srv/pictures"
        with get_client(sync_client=True) as client:
            client.create_work_pool(WorkPoolCreate(name="open", type="process", base_job_template=template))
            assert (make_work_pool(), make_work_pool()) == ("closed", "there")
            left = client.read_work_pool("open").base_job_template
        assert openings(left) == []
        assert left["job_configuration"] == {"stream_output": True, "working_dir": "/srv/pictures"}

    def test_a_work_pool_that_sets_env_stays_open_and_says_so(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("prefect_eachlabs.cli.setup.WORK_POOL", "with-env")
        template = ProcessWorker.get_default_base_job_template()
        template["variables"]["properties"]["env"]["default"] = {"HTTPS_PROXY": "http://proxy:3128"}
        with get_client(sync_client=True) as client:
            client.create_work_pool(WorkPoolCreate(name="with-env", type="process", base_job_template=template))
            assert make_work_pool() == "open"
            assert client.read_work_pool("with-env").base_job_template == template

    def test_a_work_pool_of_another_type_is_not_touched(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("prefect_eachlabs.cli.setup.WORK_POOL", "of-another-type")
        with get_client(sync_client=True) as client:
            client.create_work_pool(WorkPoolCreate(name="of-another-type", type="docker"), overwrite=True)
        with pytest.raises(SetupError, match="docker"):
            make_work_pool()

    def test_the_automation_that_ends_dead_runs_is_made_once(self) -> None:
        with get_client(sync_client=True) as client:
            assert {automation.make(client), automation.make(client)} >= {"there"}
            found = automation.find(client)
            assert found is not None
            assert (found["enabled"], found["trigger"]["within"]) == (True, 630)
            with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
                assert automation.make(client) == "there"
                client.delete_automation(found["id"])
                assert automation.make(client) == "none"

    def test_blocks_are_made_then_there_then_updated_and_what_a_person_set_stays(self) -> None:
        environ = {"EACHLABS_API_KEY": KEY, "AWS_REGION": "eu-central-1"}
        names = {"eachlabs-credentials/of-setup", "eachlabs-s3-destination/of-setup"}
        for wanted in ("made", "there"):
            assert make_blocks(environ, "of-setup", PLACE) == dict.fromkeys(names, wanted)
        EachlabsCredentials(api_key=KEY, account="studio").save("of-setup", overwrite=True)
        done = make_blocks({**environ, "EACHLABS_MAX_IN_FLIGHT": "3"}, "of-setup", PLACE)
        assert done["eachlabs-credentials/of-setup"] == "updated"
        block: Any = EachlabsCredentials.load("of-setup")
        assert (block.account, block.max_in_flight, block.requests_per_minute) == ("studio", 3, None)
        place: Any = S3Destination.load("of-setup")
        assert (place.bucket, place.region, place.access_key_id) == ("acme-pictures", "eu-central-1", "")
        _loaded.clear()

    def test_without_a_key_the_types_are_registered_all_the_same(self) -> None:
        done = make_blocks({}, "of-nobody", None)
        assert set(done) == {"eachlabs-credentials", "eachlabs-s3-destination"}

    def test_a_block_that_cannot_be_right_is_refused_with_its_field(self) -> None:
        with pytest.raises(SetupError, match="bucket"):
            save(S3Destination, "of-nobody", {"bucket": "a"})
