"""The emulator on real sockets: cut connections, starting and stopping, the pytest fixture, the foreground server."""

from __future__ import annotations

import logging
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from logging.handlers import QueueHandler

import httpx
import pytest

from prefect_eachlabs.testing.emulator import EmulatorOptions, EmulatorServer
from prefect_eachlabs.testing.emulator.predictions import Job
from prefect_eachlabs.testing.pytest_plugin import TEST_API_KEY

pytest_plugins = ["prefect_eachlabs.testing.pytest_plugin"]

ORDER = {"model": "gemini", "version": "2.0-flash-exp-image-generation", "input": {"prompt": "a red fox"}}
IMPATIENT = httpx.Timeout(20, read=0.2)


@pytest.fixture(scope="module")
def server() -> Iterator[EmulatorServer]:
    options = EmulatorOptions(service_seconds=0, requests_per_minute=None, max_in_flight=None, image_size_px=64)
    with EmulatorServer(options) as running:
        yield running


@pytest.fixture
def http(server: EmulatorServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, headers={"X-API-Key": "k"}, trust_env=False) as client:
        yield client
    server.set_faults()
    server.reset()


def output_of(http: httpx.Client) -> str:
    bought = http.post("/v1/prediction/", json=ORDER).json()["predictionID"]
    return str(http.get(f"/v1/prediction/{bought}").json()["output"])


# ------------------------------------------------------------------- cutting


@pytest.mark.parametrize(
    ("fault", "error", "billed"),
    [
        ("create:cut", httpx.RemoteProtocolError, 0),
        ("create:reset", httpx.ReadError, 0),
        ("create:lost_answer", httpx.RemoteProtocolError, 1),
        ("create:lost_reset", httpx.ReadError, 1),
        ("create:cut_body", httpx.RemoteProtocolError, 1),
    ],
)
def test_a_post_is_really_cut(
    server: EmulatorServer,
    http: httpx.Client,
    fault: str,
    error: type[Exception],
    billed: int,
    capfd: pytest.CaptureFixture[str],
) -> None:
    server.set_faults(f"{fault},next=1")
    with pytest.raises(error):
        http.post("/v1/prediction/", json=ORDER)
    assert http.post("/v1/prediction/", json=ORDER).status_code == 200, "the next one is answered"
    tallies = server.tallies()
    assert (tallies["billed"], tallies["faults"]) == (billed + 1, {fault: 1})
    assert server.journal()[0]["fault"] == fault
    assert "".join(capfd.readouterr()) == "", "cutting makes no noise"


@pytest.mark.parametrize(("fault", "part"), [("reset", 0), ("cut", 0.5), ("wrong_length", 1)])
def test_a_download_is_really_cut(server: EmulatorServer, http: httpx.Client, fault: str, part: float) -> None:
    url = output_of(http)
    whole = httpx.get(url, trust_env=False).content
    server.set_faults(f"picture:{fault}")
    came: list[bytes] = []
    with httpx.Client(trust_env=False) as client, pytest.raises(httpx.TransportError), client.stream("GET", url) as got:
        came.extend(got.iter_bytes())
    assert b"".join(came) == whole[: int(len(whole) * part)]


# --------------------------------------------------------- starting and stopping


def test_a_stopped_server_leaves_no_thread_and_no_port_and_its_tallies_stay() -> None:
    before = set(threading.enumerate())
    with EmulatorServer(EmulatorOptions(service_seconds=0)) as server:
        assert httpx.post(f"{server.url}/v1/prediction", json=ORDER, headers={"X-API-Key": "k"}).status_code == 200
    assert [thread for thread in threading.enumerate() if thread not in before and "emulator" in thread.name] == []
    assert (server.tallies()["billed"], len(server.journal())) == (1, 1)
    with pytest.raises(httpx.ConnectError):
        httpx.get(server.url, trust_env=False)
    server.stop()


def test_stopping_waits_for_no_answer_that_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    failures: list[Exception] = []
    is_held = threading.Event()
    with EmulatorServer(EmulatorOptions(long_poll_seconds=600, service_seconds=600)) as server:
        hold = server.emulator.hold

        async def noticed_hold(job: Job) -> None:
            is_held.set()
            await hold(job)

        monkeypatch.setattr(server.emulator, "hold", noticed_hold)
        headers = {"X-API-Key": "k"}
        bought = httpx.post(f"{server.url}/v1/prediction", json=ORDER, headers=headers).json()["predictionID"]

        def ask() -> None:
            try:
                httpx.get(f"{server.url}/v1/prediction/{bought}", headers=headers, timeout=None)
            except httpx.TransportError as error:
                failures.append(error)

        asking = threading.Thread(target=ask)
        asking.start()
        assert is_held.wait(20)
    asking.join()
    assert len(failures) == 1


def test_a_server_that_was_stopped_comes_back_on_its_port_and_remembers() -> None:
    server = EmulatorServer(EmulatorOptions(service_seconds=0, image_size_px=32))
    with server:
        url = server.url
        with httpx.Client(base_url=url, headers={"X-API-Key": "k"}, trust_env=False) as http:
            output = output_of(http)
            assert httpx.get(output, trust_env=False).status_code == 200
    with server:
        assert server.url == url
        assert httpx.get(output, trust_env=False).status_code == 200
        assert server.tallies()["downloads"] == 2


def test_the_fixture_leads_flows_to_the_emulator(eachlabs_emulator: EmulatorServer) -> None:
    assert os.environ["EACHLABS_BASE_URL"] == eachlabs_emulator.url
    headers = {"X-API-Key": os.environ["EACHLABS_API_KEY"]}
    assert httpx.post(f"{eachlabs_emulator.url}/v1/prediction/", json=ORDER, headers=headers).status_code == 200
    assert eachlabs_emulator.tallies()["billed"] == 1
    assert TEST_API_KEY not in str(eachlabs_emulator.journal())


def test_the_fixture_gives_each_test_a_fresh_one(eachlabs_emulator: EmulatorServer) -> None:
    assert eachlabs_emulator.tallies()["requests"] == 0


@pytest.mark.parametrize("eachlabs_emulator", [EmulatorOptions(max_in_flight=1, service_seconds=60)], indirect=True)
def test_the_fixture_takes_other_options(eachlabs_emulator: EmulatorServer) -> None:
    url, headers = f"{eachlabs_emulator.url}/v1/prediction/", {"X-API-Key": "k"}
    assert [httpx.post(url, json=ORDER, headers=headers).status_code for _ in range(2)] == [200, 429]


def test_the_judge_tells_each_prediction_and_adds_others(server: EmulatorServer, http: httpx.Client) -> None:
    bought = http.post("/v1/prediction/", json=ORDER).json()["predictionID"]
    foreign = server.add_foreign(ORDER)
    told = server.predictions()
    assert [(one["id"], one["foreign"], one["status"]) for one in told] == [
        (bought, False, "success"),
        (foreign, True, "success"),
    ]
    assert told[0]["input"] == ORDER["input"]
    assert http.get("/_emulator/predictions").json() == told


def test_each_request_is_a_line_in_the_log(server: EmulatorServer, http: httpx.Client) -> None:
    lines: queue.Queue[logging.LogRecord] = queue.Queue()
    logger, handler = logging.getLogger("prefect_eachlabs.testing.emulator"), QueueHandler(lines)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel("INFO")
    try:
        http.get("/v1/model", params={"slug": "\x1b[2Jfox"})
        assert lines.get(timeout=30).getMessage() == "GET /v1/model: 404"  # it comes after the answer
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


_FOREGROUND = """
from prefect_eachlabs.testing.emulator import EmulatorOptions, run_emulator
run_emulator(EmulatorOptions(), port=0)
"""


def test_in_the_foreground_it_says_one_line_and_ends_when_told() -> None:
    command = [sys.executable, "-c", _FOREGROUND]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            url = line.split()[-1]
            assert line == f"Eachlabs emulator ready at {url}\n"
            assert url.startswith("http://127.0.0.1:")
            assert httpx.get(f"{url}/v1/models", trust_env=False).status_code == 200
            process.terminate()
            out, noise = process.communicate(timeout=20)
        finally:
            process.kill()
    assert (out, noise) == ("", "")
    assert process.returncode == -signal.SIGTERM
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", int(url.rsplit(":", 1)[1]))) != 0
