"""The demo: whole, in a process of its own (slow); and its parts."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import httpx
import pytest
from PIL import Image

from prefect_eachlabs.cli import demo, demo_stage, demo_ui
from prefect_eachlabs.cli.demo import Progress
from prefect_eachlabs.cli.main import main
from prefect_eachlabs.errors import SetupError
from prefect_eachlabs.models import Item
from tests.ui.stage import until

# ---------------------------------------------------------------------------------------------- as a whole


@pytest.fixture
def hostile(tmp_path: Path) -> Mapping[str, str]:
    """A user's own set-up that the demo must neither use nor touch: it leads nowhere."""
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / ".env").write_text("PREFECT_API_URL=http://127.0.0.1:9/from-dot-env\n")
    (tmp_path / "work" / "prefect.toml").write_text('[api]\nurl = "http://127.0.0.1:9/from-toml"\n')
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path / "home"),
        "TMPDIR": str(tmp_path / "tmp"),
        "PYTHONPATH": os.pathsep.join(sys.path),
        "PREFECT_API_URL": "http://127.0.0.1:9/api",
        "PREFECT_API_KEY": "pnu_of-the-user",
        "EACHLABS_API_KEY": "key-of-the-user",
        "EACHLABS_BASE_URL": "http://127.0.0.1:9",
        "EACHLABS_MAX_IN_FLIGHT": "0",
        "AWS_PROFILE": "no-such-profile",
        "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9",
        "HTTP_PROXY": "http://127.0.0.1:9",
        "HTTPS_PROXY": "http://127.0.0.1:9",
    }


BEGUN = """\
import sqlite3, sys
if "prefect.server.api.server:create_app" in sys.orig_argv:
    begun = sqlite3.connect("file::memory:?cache=shared", uri=True)
    sqlite3.connect({kept!r}).backup(begun)
"""
"""What Python runs when it starts: in the server's process its database in memory is there, and migrated."""


@pytest.fixture
def migrated(tmp_path: Path, hostile: Mapping[str, str], kept_database: Path) -> Mapping[str, str]:
    """The same, for a demo that need not show that its server migrates: 10 s of CPU."""
    if not (kept_database / "prefect.db").exists():
        return hostile
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "sitecustomize.py").write_text(BEGUN.format(kept=str(kept_database / "prefect.db")))
    return {**hostile, "PYTHONPATH": os.pathsep.join([str(tmp_path / "begun"), *sys.path])}


@contextlib.contextmanager
def running_demo(folder: Path, environ: Mapping[str, str], *words: str) -> Iterator[subprocess.Popen[str]]:
    """The demo in a process group of its own, ended with all its processes if it did not end by itself."""
    (folder / "tmp").mkdir(exist_ok=True)
    command = [sys.executable, "-m", "prefect_eachlabs", "demo", *words]
    running = subprocess.Popen(
        command,
        cwd=folder / "work",
        env=dict(environ),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield running
    finally:
        if running.poll() is None:  # a test has failed: what is in sessions of its own is ended by the demo alone
            running.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                running.communicate(timeout=30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
        with running:
            pass


def line_with(running: subprocess.Popen[str], text: str) -> str:
    """The next line that has it."""
    assert running.stdout is not None
    lines = []
    for line in running.stdout:
        lines.append(line)
        if text in line:
            return line
    raise AssertionError(f"it has not said {text!r}: {''.join(lines)}")


def of_the_same_folder(folder: Path) -> list[str]:
    """The processes whose home it is: the demo, and all that it has started, in whatever session."""
    home = f"HOME={folder / 'home'}".encode()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if home in (process / "environ").read_bytes().split(b"\0"):
                found.append(f"{process.name} {(process / 'cmdline').read_bytes()!r}")
    return found


def is_there(group: subprocess.Popen[str]) -> bool:
    """Whether a process of its group is alive."""
    try:
        os.killpg(group.pid, 0)
    except ProcessLookupError:
        return False
    return True


def assert_nothing_is_left(running: subprocess.Popen[str], folder: Path) -> None:
    give_up_at = time.monotonic() + 10  # what has ended is there until init has asked for its status
    while (is_there(running) or of_the_same_folder(folder)) and time.monotonic() < give_up_at:
        time.sleep(0.05)
    assert not is_there(running)
    assert of_the_same_folder(folder) == []
    assert [path.name for path in (folder / "tmp").iterdir() if "prefect-eachlabs" in path.name] == []
    assert not (folder / "home" / ".prefect").exists()


@pytest.mark.slow
def test_the_demo_ends_with_pictures_whatever_the_user_has_set_up_and_an_earlier_demo_has_left(
    tmp_path: Path, hostile: Mapping[str, str]
) -> None:
    output = tmp_path / "work" / "demo-output"
    output.mkdir()
    names = [f"{number:02d}-{name}" for number, name in enumerate(demo.PROMPTS, 1)]
    for name in ("of-the-user", *names):
        (output / f"{name}.png").write_bytes(b"kept")
    with running_demo(tmp_path, hostile, "--pictures", "2", "--service-seconds", "1") as running:
        said = running.communicate(timeout=300)[0]
    assert running.returncode == 0, said
    assert "Traceback" not in said
    assert "drawn by the emulator" in said
    assert 'prefect-eachlabs generate "' in said
    assert str(output) in said
    assert "\n2 of 2 pictures, $0.0780, and a page of them: " in said
    rows = sorted(re.findall(r"\d s  (\S+) +stored\n", said))
    assert rows == names[:2]
    pngs = {f"{row}.png" for row in rows} | {"contact-sheet.png"}
    report = {"index.html", "report.json", "report.jsonl"}
    assert {path.name for path in output.iterdir()} == pngs | report | {"of-the-user.png"}
    linked = set(re.findall(r'(?:href|src)="(?!data:)([^"]+)"', (output / "index.html").read_text()))
    assert linked == pngs | report - {"index.html"}
    for name in pngs:
        with Image.open(output / name) as picture:
            picture.load()
    assert_nothing_is_left(running, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("interrupt", "at"), [(os.kill, "starting"), (os.killpg, "on their way")])
def test_an_interrupted_demo_leaves_nothing_behind(
    interrupt: Callable[[int, int], None], at: str, tmp_path: Path, migrated: Mapping[str, str]
) -> None:
    """By its parent, and from a terminal with predictions in flight."""
    with running_demo(tmp_path, migrated, "--service-seconds", "60") as running:
        assert at in line_with(running, at)
        for _ in range(2):
            interrupt(running.pid, signal.SIGINT)
        said = running.communicate(timeout=120)[0]
    assert running.returncode == 130, said
    assert "Interrupted." in said
    assert "Traceback" not in said
    assert_nothing_is_left(running, tmp_path)


@pytest.mark.slow
def test_the_demo_with_prefects_pages_has_runs_to_look_at_until_ctrl_c(
    tmp_path: Path, migrated: Mapping[str, str]
) -> None:
    """From a terminal, while a run that somebody has started is at work."""
    with running_demo(tmp_path, migrated, "--ui", "--service-seconds", "1") as running:
        api = line_with(running, "Look at it: ").split()[-1] + "/api"
        runs = httpx.post(f"{api}/flow_runs/filter", json={}).json()
        assert {run["name"]: run["state"]["type"] for run in runs} == {
            "01-lighthouse": "COMPLETED",
            "batch ten": "COMPLETED",
        }
        artifacts = httpx.post(f"{api}/artifacts/latest/filter", json={}).json()
        (report,) = [one for one in artifacts if one["key"] == "eachlabs-batch-ten"]
        assert report["data"].count('src="data:image/') == 10
        form = httpx.get(f"{api}/deployments/name/generate-batch/generate-batch").json()
        assert form["parameters"]["source"] == demo_ui.TABLE
        started = httpx.post(f"{api}/deployments/{form['id']}/create_flow_run", json={"state": {"type": "SCHEDULED"}})
        run = f"{api}/flow_runs/{started.json()['id']}"
        until(lambda: httpx.get(run).json()["state"]["type"] not in ("SCHEDULED", "PENDING"), 240, "it runs")
        os.killpg(running.pid, signal.SIGINT)
        said = running.communicate(timeout=120)[0]
    assert running.returncode == 0, said
    assert said.endswith("All of it has ended.\n")
    assert "Traceback" not in said
    assert_nothing_is_left(running, tmp_path)


# --------------------------------------------------------------------------------------------- in its parts


def test_every_prompt_of_the_demo_is_good_input() -> None:
    for name, prompt in demo.PROMPTS.items():
        assert Item.wanted(prompt, item_id=f"01-{name}").input == {"prompt": prompt}


def test_the_demo_refuses_a_process_that_has_read_prefects_settings(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "prefect", sys)
    assert main(["demo", "--output", str(tmp_path / "out")]) == 2
    assert "needs a process of its own" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_a_folder_is_refused_before_anything_starts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delitem(sys.modules, "prefect", raising=False)
    (tmp_path / "file").write_text("")
    assert main(["demo", "--output", str(tmp_path / "file")]) == 2
    assert "Choose another folder." in capsys.readouterr().err


def test_the_environment_of_the_demo_holds_nothing_of_the_users(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, hostile: Mapping[str, str]
) -> None:
    monkeypatch.setattr(os, "environ", dict(hostile))
    demo_stage.replace_environment(tmp_path)
    of_the_user = {value for value in hostile.values() if "127.0.0.1:9" in value or "of-the-user" in value}
    assert len(of_the_user) > 2
    assert not set(os.environ.values()) & of_the_user
    assert os.environ["PREFECT_HOME"] == str(tmp_path)
    assert os.environ["PATH"] == hostile["PATH"]


def test_a_second_interrupt_does_not_disturb_the_cleaning_up() -> None:
    with demo_stage.Interrupts() as interrupts, interrupts.held_back():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)


def test_an_interrupt_during_the_cleaning_up_is_not_raised_and_the_folder_goes(tmp_path: Path) -> None:
    with demo_stage.Interrupts() as interrupts:
        with contextlib.suppress(KeyboardInterrupt), demo_stage.folder_of_its_own(interrupts) as folder:
            try:
                signal.raise_signal(signal.SIGINT)
            finally:
                signal.raise_signal(signal.SIGINT)
        assert not folder.exists()
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--ui", "--output", "x"], "--output and --pictures are for the demo without it"),
        (["--ui", "--pictures", "3"], "--output and --pictures are for the demo without it"),
        (["--port", "4200"], "give --ui, too"),
        (["--ui", "--port", "80000"], "A port is 0 to 65535."),
    ],
)
def test_flags_that_do_not_go_together_are_refused(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "prefect", raising=False)
    assert main(["demo", *words]) == 2
    assert said in capsys.readouterr().err


def test_a_port_that_is_taken_is_refused_in_one_sentence() -> None:
    said = r"^Port \d+ is taken: choose another with --port\.$"
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SetupError, match=said):
        demo_ui.free_port(taken.getsockname()[1])
    assert demo_ui.free_port(0) > 0


def test_a_missing_extra_is_said_at_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "moto" else sys)
    assert main(["demo", "--output", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "prefect-eachlabs: The demo needs moto: pip install 'prefect-eachlabs[demo]'."
    ]


def told(progress: Progress, task_run_name: str, message: str) -> None:
    progress.handle(logging.makeLogRecord({"task_run_name": task_run_name, "levelno": logging.INFO, "msg": message}))


def test_progress_follows_the_task_runs_of_rows_line_by_line(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(["01-lighthouse", "02-fox"], demo_stage.Clock())
    told(progress, "rows 2 to 2", "Created task run")
    told(progress, "rows 2 to 2", "1 stored")
    told(progress, "rows 2 to 2", "Finished in state Completed('1 stored')")
    told(progress, "generate-rows", "1 stored")
    told(progress, "rows 1 to 1", "1 failed")
    steps = [line.split(" s  ")[1].split() for line in capsys.readouterr().out.splitlines()]
    assert steps == [["02-fox", "stored"], ["01-lighthouse", "failed"]]
