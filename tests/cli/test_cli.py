"""The command line as a person and a script use it: what it prints, where, and how it ends."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from prefect_eachlabs.cli import generate
from prefect_eachlabs.cli.account import limiter_maker, may_have_prefect_server
from prefect_eachlabs.cli.main import COMMANDS, exit_status, main
from prefect_eachlabs.errors import (
    BadInput,
    EachlabsError,
    ItemConflict,
    KeyRefused,
    NotSent,
    OutcomeUnknown,
    PredictionFailed,
    Rejected,
    SetupError,
    StoreFailed,
    Throttled,
)
from prefect_eachlabs.retry import retry_while_retryable
from tests.flows.flow_fixtures import Studio
from tests.virtual_time import run

STORED_KEYS = {
    *("item_id", "prediction_id", "status", "uri", "sha256", "width_px", "height_px", "cost_usd"),
    *("predict_time_seconds", "reused"),
}
FAILED_KEYS = {"status", "error", "item_id", "prediction_id"}
HEAVY = {"prefect", "boto3", "httpx", "pydantic", "fastapi", "starlette", "PIL", "moto", "pyarrow"}

Printed = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _quick_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "FIRST_PAUSE_SECONDS", 0.01)


def the_json(printed: Printed) -> dict[str, Any]:
    """The one JSON object on stdout; fails when anything else is there."""
    out = printed.readouterr().out
    assert out.count("\n") == 1, out
    answer: dict[str, Any] = json.loads(out)
    return answer


# ---------------------------------------------------------------------------------------------- in general


def test_help_lists_every_command_and_no_help_loads_anything_heavy() -> None:
    script = (
        "import sys; from prefect_eachlabs.cli.main import COMMANDS, main\n"
        "assert main(['--help']) == 0; print('first:', {'cyclopts', 'rich'} & set(sys.modules))\n"
        "assert all(main([command, '--help']) == 0 for command in COMMANDS)\n"
        f"print('heavy:', sorted({HEAVY!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert all(f"  {command} " in done.stdout for command in COMMANDS)
    assert done.stderr == ""
    assert "\nfirst: set()\n" in done.stdout
    assert done.stdout.splitlines()[-1] == "heavy: []"


def test_the_version_is_the_packages(capsys: Printed) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("prefect-eachlabs 0.")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "Which command?"),
        (["paint"], "Unknown command 'paint'."),
        (["generat", "a fox"], "Unknown command 'generat'. Did you mean generate?"),
        (["--quiet", "generate", "a fox"], "Unknown command '--quiet'"),
        (["generate", "a fox", "--to", "s3://acme/a", "--input", "seed"], "'seed' must be NAME=JSON"),
        (["generate", "a fox", "--to", "s3://acme/a", "--color", "red"], "Unknown option: --color."),
        (
            ["generate", "a fox", "--to", "s3://acme/a", "--replce"],
            "Unknown option: --replce. Did you mean --replace? See",
        ),
        (["generate", "a fox", "another", "--to", "s3://acme/a"], "'another'"),
        (["generate", "a fox", "--to"], "--to requires an argument"),
        (["batch"], "requires"),
        (["generate", "a fox", "--to", "s3://acme/a", "--on-ambiguous", "guess"], 'Invalid value "guess"'),
        (["generate", "a fox", "--to", "s3://acme/a", "--deadline-seconds", "0"], "must be greater than 0"),
        (["generate", "a fox", "--to", "s3://acme/a", "--deadline-seconds", "nan"], "must be greater than 0"),
        (["generate", "a fox", "--to", "s3://acme/a", "--deadline-seconds", "soon"], 'unable to convert "soon"'),
        (["emulator", "--max-in-flight", "many"], 'unable to convert "many"'),
        (["demo", "--pictures", "0"], 'Invalid value "0" for --pictures'),
    ],
)
def test_words_that_are_no_command_line_end_with_2_and_say_why(words: list[str], said: str, capsys: Printed) -> None:
    assert main(words) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert said in printed.err
    assert printed.err.startswith("prefect-eachlabs: ")
    assert printed.err.count("\n") == 1
    if "--input" not in words:  # what is refused by the command itself says what it wants
        assert re.search(r"See `prefect-eachlabs (\w+ )?--help`\.$", printed.err)


@pytest.mark.parametrize("words", [["generate", "a fox"], ["batch", "prompts.csv"], ["settle"]])
def test_without_a_destination_nothing_begins(
    words: list[str], capsys: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EACHLABS_API_KEY", "a-key-of-tests")
    assert main(words) == 2
    assert re.search(r"No destination: .*EACHLABS_DESTINATION", capsys.readouterr().err)


def test_a_script_that_asks_for_json_gets_json_for_wrong_usage_too(capsys: Printed) -> None:
    assert main(["generate", "--json"]) == 2
    assert the_json(capsys).keys() == FAILED_KEYS


def test_2_is_for_what_a_person_must_set_right_and_1_for_what_befell_an_item() -> None:
    to_set_right = (BadInput, SetupError, KeyRefused)
    for kind in (*to_set_right, ItemConflict, Rejected, Throttled, OutcomeUnknown, PredictionFailed, StoreFailed):
        assert exit_status(kind("x")) == (2 if kind in to_set_right else 1), kind


# ------------------------------------------------------------------------------------------------ generate


def test_a_prompt_becomes_a_picture_and_is_not_bought_again(studio: Studio, capsys: Printed) -> None:
    words = ["generate", "a red fox", "--to", studio.destination, "--item-id", "fox"]
    assert main(words) == 0
    line = capsys.readouterr().out
    assert line.startswith(f"{studio.destination}/images/fox.png  (64 x 64 px, ")
    assert line.endswith("$0.0390)\n")

    assert main(words) == 0
    assert "bought earlier, nothing was bought now" in capsys.readouterr().out

    assert main([*words, "--json"]) == 0
    answer = the_json(capsys)
    assert answer.keys() == STORED_KEYS
    assert (answer["status"], answer["item_id"], answer["reused"]) == ("stored", "fox", True)
    assert len(answer["sha256"]) == 64
    assert studio.billed == 1
    assert studio.keys() == ["fox.png"]


def test_an_id_that_stands_for_another_prompt_is_refused_unless_it_is_to_be_replaced(
    studio: Studio, capsys: Printed
) -> None:
    words = ["--to", studio.destination, "--item-id", "fox", "--json"]
    assert main(["generate", "a red fox", *words]) == 0
    bought = the_json(capsys)
    assert main(["generate", "a blue fox", *words]) == 1
    refused = the_json(capsys)
    assert refused.keys() == FAILED_KEYS
    assert (refused["status"], refused["prediction_id"]) == ("failed", bought["prediction_id"])
    assert "--replace" in refused["error"]
    assert studio.billed == 1

    assert main(["generate", "a blue fox", *words, "--replace"]) == 0
    assert the_json(capsys)["sha256"] != bought["sha256"]
    assert studio.billed == 2


@pytest.mark.parametrize(
    ("prompt", "more", "said"),
    [
        ("", [], "prompt: empty or blank"),
        ("a \udcff fox", [], "lone surrogate"),
        (
            "a fox",
            ["--image-url", "ftp://example.org/a.png"],
            "image_url: 'ftp://example.org/a.png' is not an http(s) URL",
        ),
        ("a fox", ["--item-id", "a/b"], "item_id: 'a/b' must be 1 to 128 of A-Z a-z 0-9 _ -"),
        ("a fox", ["--to", "acme/daily"], "destination: 'acme/daily' must be s3://BUCKET"),
    ],
)
def test_a_bad_input_is_refused_before_anything_is_bought(
    prompt: str, more: list[str], said: str, studio: Studio, capsys: Printed
) -> None:
    words = ["generate", prompt, "--to", studio.destination, *more]
    assert main(words) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("prefect-eachlabs: ")
    assert said in printed.err
    assert main([*words, "--json"]) == 2
    answer = the_json(capsys)
    assert answer.keys() == FAILED_KEYS
    assert said in answer["error"]
    assert studio.api.tallies()["requests"] == 0


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("EACHLABS_API_KEY", "", "Set EACHLABS_API_KEY"),
        ("EACHLABS_BASE_URL", "http://api.example.org", "EACHLABS_BASE_URL: the base URL must be https"),
        ("EACHLABS_MAX_IN_FLIGHT", "0", "EACHLABS_MAX_IN_FLIGHT: Input should be greater than or equal to 1"),
    ],
)
def test_a_wrong_set_up_ends_with_2_and_names_the_variable(
    variable: str, value: str, said: str, studio: Studio, capsys: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    assert main(["generate", "a fox", "--to", studio.destination, "--json"]) == 2
    assert said in the_json(capsys)["error"]
    assert studio.api.tallies()["requests"] == 0


def test_a_failed_prediction_ends_with_1_and_is_bought_again_only_when_asked(studio: Studio, capsys: Printed) -> None:
    studio.api.set_faults("prediction:fail_text,next=1")
    words = ["generate", "a fox", "--to", studio.destination, "--json"]
    assert main(words) == 1
    first = the_json(capsys)
    assert first.keys() == FAILED_KEYS
    assert first["status"] == "failed"
    assert first["prediction_id"]
    assert first["item_id"]
    assert main(words) == 1
    assert "--retry-failed" in the_json(capsys)["error"]
    assert main([*words, "--retry-failed"]) == 0
    assert the_json(capsys)["status"] == "stored"


def test_a_lost_answer_that_is_to_be_reported_is_ambiguous(studio: Studio, capsys: Printed) -> None:
    studio.api.set_faults("create:lost_answer")
    assert main(["generate", "a fox", "--to", studio.destination, "--on-ambiguous", "fail", "--json"]) == 1
    answer = the_json(capsys)
    assert (answer["status"], answer["prediction_id"]) == ("ambiguous", None)
    assert answer["item_id"]
    assert studio.billed == 1


def test_what_may_be_repeated_is_repeated(studio: Studio, capsys: Printed) -> None:
    studio.api.set_faults("create:throttled,next=1")
    assert main(["generate", "a fox", "--to", studio.destination, "--json"]) == 0
    assert the_json(capsys)["status"] == "stored"
    assert studio.billed == 1


def test_an_unfinished_prediction_is_given_up_at_its_deadline(studio: Studio, capsys: Printed) -> None:
    studio.api.set_faults("prediction:stuck")
    words = ["generate", "a fox", "--to", studio.destination, "--deadline-seconds", "0.2", "--json"]
    assert main(words) == 1
    answer = the_json(capsys)
    assert "0.2 s after its POST" in answer["error"]
    assert answer["prediction_id"]


def test_ctrl_c_cancels_what_is_in_flight_and_ends_with_130(
    studio: Studio, capsys: Printed, caplog: pytest.LogCaptureFixture
) -> None:
    studio.api.set_faults("prediction:stuck")
    given_up = threading.Event()

    def press_ctrl_c_once_it_is_bought() -> None:
        while not given_up.wait(0.01):
            if studio.api.tallies()["in_flight"]:
                os.kill(os.getpid(), signal.SIGINT)
                return

    presser = threading.Thread(target=press_ctrl_c_once_it_is_bought)
    presser.start()
    try:
        assert main(["generate", "a fox", "--to", studio.destination, "--json"]) == 130
    finally:
        given_up.set()
        presser.join()
    answer = the_json(capsys)
    assert answer["status"] == "failed"
    assert "in progress: the API confirms 1 as cancelled" in answer["error"]
    assert "120 s at most. Ctrl-C again ends it at once." in caplog.text
    assert answer["prediction_id"] == studio.api.predictions()[0]["id"]
    assert (studio.api.tallies()["cancelled"], studio.api.tallies()["in_flight"]) == (1, 0)


@pytest.mark.parametrize(
    ("name", "text", "may_have"),
    [
        ("prefect.toml", "[server]", True),
        (".env", "PREFECT_API_URL=http://127.0.0.1:4200/api", True),
        (".env", "COLOUR=red", False),
        ("pyproject.toml", "[tool.prefect]", True),
        ("pyproject.toml", "[project]", False),
        ("home/profiles.toml", "", True),
    ],
)
def test_prefect_is_asked_for_a_server_only_where_its_settings_may_name_one(
    name: str, text: str, may_have: bool, tmp_path: Path
) -> None:
    (tmp_path / "home").mkdir()
    environ = {"PREFECT_HOME": str(tmp_path / "home")}
    assert not may_have_prefect_server(environ, tmp_path)
    (tmp_path / name).write_text(text)
    assert may_have_prefect_server(environ, tmp_path) is may_have
    assert may_have_prefect_server({"PREFECT_API_URL": "http://127.0.0.1:4200/api"}, tmp_path)


def test_with_a_prefect_server_the_limits_are_the_servers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    assert limiter_maker() is None
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:4200/api")
    source = limiter_maker()
    assert source is not None
    assert source.__name__ == "limiter_for"


# ------------------------------------------------------------------------------------------- perseverance


class Trouble:
    """Raises what it was given, one error an attempt, then returns; keeps the times of the attempts."""

    def __init__(self, *errors: EachlabsError) -> None:
        self.errors = list(errors)
        self.at: list[float] = []

    async def __call__(self) -> str:
        self.at.append(asyncio.get_running_loop().time())
        if self.errors:
            raise self.errors.pop(0)
        return "done"


def test_perseverance_pauses_longer_each_time() -> None:
    trouble = Trouble(*(NotSent("no") for _ in range(4)))
    assert run(retry_while_retryable(trouble, attempts=5, first_pause_seconds=1.0)) == "done"
    pauses = [later - earlier for earlier, later in itertools.pairwise(trouble.at)]
    for pause, mean in zip(pauses, (1, 2, 4, 8), strict=True):
        assert mean * 0.5 <= pause <= mean * 1.5


def test_perseverance_ends_after_its_attempts_with_the_last_error() -> None:
    trouble = Trouble(*(NotSent(f"attempt {number}") for number in (1, 2, 3, 4)))
    with pytest.raises(NotSent, match="attempt 3"):
        run(retry_while_retryable(trouble, attempts=3))
    assert len(trouble.at) == 3


def test_what_is_still_the_same_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    run(retry_while_retryable(Trouble(NotSent("away"), NotSent("away"), NotSent("slow"))))
    said = [message.partition(" Trying")[0] for message in caplog.messages]
    assert said == ["away", "The same again.", "slow"]


@pytest.mark.parametrize("error", [OutcomeUnknown("?"), PredictionFailed("no"), BadInput("no"), SetupError("no")])
def test_what_must_not_be_repeated_is_not(error: EachlabsError) -> None:
    trouble = Trouble(error)
    with pytest.raises(type(error)):
        run(retry_while_retryable(trouble))
    assert len(trouble.at) == 1


@pytest.mark.parametrize(("asked_seconds", "waited_seconds"), [(30, 30), (120, 120), (3_600, 120)])
def test_a_pause_that_was_asked_for_is_kept_up_to_two_minutes(asked_seconds: float, waited_seconds: float) -> None:
    trouble = Trouble(Throttled("slow down", retry_after_seconds=asked_seconds))
    run(retry_while_retryable(trouble))
    assert trouble.at[1] == pytest.approx(waited_seconds)


# ------------------------------------------------------------------------------------------------ emulator


def test_the_emulator_serves_until_ctrl_c_and_ends_with_0() -> None:
    command = [sys.executable, "-m", "prefect_eachlabs", "emulator", "--port", "0", "--max-in-flight", "none"]
    command += ["--fault", "create:throttled=5%", "--api-key", "good", "--any-model", "--service-seconds", "0.5"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as served:
        try:
            assert served.stdout is not None
            url = served.stdout.readline().split()[-1]
            about = httpx.get(f"{url}/_emulator").json()
            served.send_signal(signal.SIGINT)
            _, said = served.communicate(timeout=30)
            assert f"\n  export EACHLABS_BASE_URL={url} EACHLABS_API_KEY=good\n" in said
        finally:
            served.kill()
    assert served.returncode == 0
    assert "Traceback" not in said
    options = about["options"]
    assert (options["max_in_flight"], options["service_seconds"], options["strict_models"]) == (None, 0.5, False)
    assert options["requests_per_minute"] == 60
    assert [fault["rate"] for fault in options["faults"]] == [0.05]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--max-in-flight", "0"], "--max-in-flight: Input should be greater than or equal to 1"),
        (["--spread", "9"], "--spread: Input should be less than or equal to 2"),
        (["--fault", "create:nonsense"], "--fault: create knows no fault 'nonsense'; it knows cut"),
        (["--fault", "nonsense"], "--fault: Input should be 'create'"),
        (["--image-size-px", "1"], "--image-size-px: Input should be greater than or equal to 16"),
        (["--host", "192.0.2.1"], "Cannot listen on 192.0.2.1:8700 (Cannot assign requested address): choose another"),
    ],
)
def test_an_emulator_that_cannot_be_ends_with_2_and_names_the_flag(
    words: list[str], said: str, capsys: Printed
) -> None:
    assert main(["emulator", *words]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("words", [["emulator"], ["s3"], ["webhooks", "serve"]])
def test_a_port_that_is_taken_or_none_is_refused_in_a_line(
    words: list[str], capsys: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EACHLABS_WEBHOOK_SECRET", "a-secret-of-tests-that-is-long-enough")
    assert main([*words, "--port", "80000"]) == 2
    assert 'Invalid value "80000" for --port. A port is 0 to 65535.' in capsys.readouterr().err
    # Not by the environment, which Prefect has read when another test of this process has asked it.
    settings = temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"})
    with settings, socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main([*words, "--port", str(port)]) == 2
    assert capsys.readouterr().err == f"prefect-eachlabs: Port {port} is taken: choose another with --port.\n"
