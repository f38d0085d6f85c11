"""The doctor: each line ok, or what to do; it costs nothing and says no secret."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from prefect_eachlabs.cli import automation, doctor
from prefect_eachlabs.cli.doctor import Finding, State
from prefect_eachlabs.cli.main import main
from prefect_eachlabs.limits.admin import LimitStatus
from prefect_eachlabs.limits.limiter import Kind
from prefect_eachlabs.storage.s3 import S3Store
from prefect_eachlabs.testing.emulator import EmulatorOptions, EmulatorServer
from tests.flows.flow_fixtures import Studio


@pytest.fixture(autouse=True)
def _no_server() -> Iterator[None]:
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        yield


def findings(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, dict[str, Any]], str]:
    status = main(["doctor", "--json", *words])
    out = capsys.readouterr().out
    return status, {one["about"]: one for one in json.loads(out)["findings"]}, out


def test_what_is_right_is_ok_costs_nothing_and_a_persons_lines_say_what_to_do(
    studio: Studio, capsys: pytest.CaptureFixture[str]
) -> None:
    status, found, out = findings(capsys, "--to", studio.destination)
    ok = {about for about, one in found.items() if one["state"] == "ok"}
    assert (status, ok) == (0, {"versions", "account", "API", "bucket", "Prefect"})
    assert [request["method"] for request in studio.api.journal()] == ["GET", "GET"]
    assert studio.billed == 0
    assert studio.keys("") == ["doctor.txt"]
    assert "a-key-of-tests" not in out
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for words in ("ok      versions", "ok      API", "-       bucket", "ok      Prefect", "→ To share them over"):
        assert words in out


def webhooks_of(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, **given: str) -> dict[str, Any]:
    for name, value in given.items():
        monkeypatch.setenv(f"EACHLABS_WEBHOOK_{name.upper()}", value)
    found: dict[str, Any] = findings(capsys)[1]["webhooks"]
    assert SECRET not in str(found)
    return found


SECRET = "the secret of all orders' secrets"


def test_it_calls_itself_through_the_configured_url(
    studio: Studio, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "CALL_WITHIN_SECONDS", 1.0)
    assert webhooks_of(capsys, monkeypatch)["state"] == "-"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{free.getsockname()[1]}"
    url = f"http://{place}/in"
    good = webhooks_of(capsys, monkeypatch, url=url, secret=SECRET, listen=place)
    assert (good["state"], f"came in by port {place}" in good["said"]) == ("ok", True)
    wrong = webhooks_of(capsys, monkeypatch, url="http://127.0.0.1:9/in")
    assert (wrong["state"], "did not come in" in wrong["said"]) == ("MEND", True)
    nowhere = webhooks_of(capsys, monkeypatch, listen="")
    assert (nowhere["state"], "nothing can come in" in nowhere["said"]) == ("MEND", True)
    assert studio.billed == 0


def test_without_a_key_it_says_so_and_asks_nobody(capsys: pytest.CaptureFixture[str]) -> None:
    status, found, _ = findings(capsys)
    assert (status, found["account"]["state"], found["API"]["state"]) == (2, "WRONG", "-")
    assert "EACHLABS_API_KEY" in found["account"]["said"]


def test_a_refused_key_is_told_apart_from_an_api_that_is_away(
    studio: Studio, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with EmulatorServer(EmulatorOptions(api_keys=frozenset({"another-key"}))) as strict:
        monkeypatch.setenv("EACHLABS_BASE_URL", strict.url)
        status, found, _ = findings(capsys)
    assert status == 2
    assert "refuses the key" in found["API"]["said"]
    monkeypatch.setenv("EACHLABS_BASE_URL", "http://127.0.0.1:9")
    status, found, _ = findings(capsys)
    assert (status, found["API"]["state"]) == (2, "WRONG")
    assert "refuses" not in found["API"]["said"]


def test_a_throttled_account_works_and_should_be_looked_at(studio: Studio, capsys: pytest.CaptureFixture[str]) -> None:
    studio.api.set_faults("executions:throttled,next=1")
    status, found, _ = findings(capsys)
    assert (status, found["API"]["state"]) == (1, "MEND")


def test_a_bucket_that_is_not_there_is_named_with_what_to_do(
    studio: Studio, capsys: pytest.CaptureFixture[str]
) -> None:
    status, found, _ = findings(capsys, "--to", "s3://no-such-bucket/x")
    assert (status, found["bucket"]["state"]) == (2, "WRONG")
    assert "create it" in found["bucket"]["said"]


def test_a_store_without_conditions_is_wrong(
    studio: Studio, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = S3Store.put

    async def put(self: S3Store, key: str, body: bytes, **how: Any) -> str:
        return await real(self, key, body, **{**how, "if_match": None, "if_absent": False})

    monkeypatch.setattr(S3Store, "put", put)
    status, found, _ = findings(capsys, "--to", studio.destination)
    assert (status, found["bucket"]["state"]) == (2, "WRONG")
    assert "ignores conditions" in found["bucket"]["said"]


def test_versions_that_do_not_go_together_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor.metadata.version
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "3.8.8" if name == "prefect" else real(name))
    found = doctor.versions()
    assert found.state is State.WRONG
    assert "prefect 3.8.8 is not" in found.said
    assert "constraints.txt" in found.advice


def limit(**facts: Any) -> Finding:
    given: dict[str, Any] = {"name": "eachlabs-in-flight-default", "kind": Kind.IN_FLIGHT, "limit": 10, "setting": 10}
    return doctor._limit(LimitStatus(**{**given, **facts}))


def test_each_fault_of_a_limit_has_its_command() -> None:
    assert limit(in_use=3).state is State.OK
    assert limit(setting=None, limit=None).state is State.OK
    assert "setup" in limit(limit=None).advice
    assert "apply" in limit(limit=5).advice


@pytest.mark.parametrize(
    ("told", "workers", "state"),
    [
        ({}, 1, State.OK),
        ({}, 2, State.MEND),
        ({"connection_url": "**********"}, 2, State.OK),
        ({"connection_url": "**********", "driver": "sqlite+aiosqlite"}, 2, State.MEND),
        ({"connection_url": None, "driver": "postgresql+asyncpg"}, 2, State.OK),
    ],
)
def test_sqlite_is_for_one_worker(told: dict[str, Any], workers: int, state: State) -> None:
    assert doctor._database(told, workers).state is state


def test_an_open_work_pool_should_be_closed() -> None:
    assert doctor.job_variables([]).state is State.OK
    found = doctor.job_variables(["command", "env"])
    assert (found.state, "command, env" in found.said, "setup" in found.advice) == (State.MEND, True, True)


def test_dead_runs_that_nobody_ends_should_be_mended() -> None:
    as_made = automation.dead_runs(180)
    assert doctor.dead_runs(as_made, 180).state is State.OK
    for found, beat_seconds, words in (
        (None, 180, "setup makes it"),
        ({**as_made, "enabled": False}, 180, "switch it on"),
        (as_made, 600, "anew"),
        (as_made, None, "HEARTBEAT_FREQUENCY"),
    ):
        said = doctor.dead_runs(found, beat_seconds)
        assert (said.state, words in said.advice) == (State.MEND, True)


def test_leases_in_memory_should_be_mended() -> None:
    assert doctor._leases(doctor.MEMORY_LEASES).state is State.MEND
    assert doctor._leases(doctor.FILE_LEASES) == Finding("leases", State.OK, "filesystem")


def test_a_server_that_is_away_is_wrong(studio: Studio, capsys: pytest.CaptureFixture[str]) -> None:
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        status, found, _ = findings(capsys)
    assert (status, found["Prefect"]["state"]) == (2, "WRONG")
    assert "PREFECT_API_URL" in found["Prefect"]["advice"]


def test_an_account_without_a_free_place_is_not_asked(
    studio: Studio, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def busy(*_: object) -> float:
        raise asyncio.TimeoutError

    monkeypatch.setattr(doctor, "_ask", busy)
    status, found, _ = findings(capsys)
    assert (status, found["API"]["state"]) == (1, "MEND")
    assert not studio.api.journal()
