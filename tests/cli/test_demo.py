"""The demo: whole, in a process of its own (slow); and its parts."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from PIL import Image

from prefect_eachlabs.cli import demo, demo_stage
from prefect_eachlabs.cli.demo import Progress
from prefect_eachlabs.cli.main import main
from prefect_eachlabs.models import Item, StoredImage

PROMPTS = {"01-lighthouse": "A lighthouse", "02-fox": "A fox"}

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
        with running:
            yield running
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)


def is_there(group: subprocess.Popen[str]) -> bool:
    """Whether a process of its group is alive."""
    try:
        os.killpg(group.pid, 0)
    except ProcessLookupError:
        return False
    return True


def assert_nothing_is_left(running: subprocess.Popen[str], folder: Path) -> None:
    give_up_at = time.monotonic() + 10  # what has ended is there until init has asked for its status
    while is_there(running) and time.monotonic() < give_up_at:
        time.sleep(0.05)
    assert not is_there(running)
    assert [path.name for path in (folder / "tmp").iterdir() if "prefect-eachlabs" in path.name] == []
    assert not (folder / "home" / ".prefect").exists()


@pytest.mark.slow
def test_the_demo_ends_with_pictures_whatever_the_user_has_set_up_and_can_be_run_again(
    tmp_path: Path, hostile: Mapping[str, str]
) -> None:
    output = tmp_path / "work" / "demo-output"
    output.mkdir()
    (output / "of-the-user.png").write_bytes(b"kept")
    for pictures in (3, 1):
        words = ("--pictures", str(pictures), "--service-seconds", "1")
        with running_demo(tmp_path, hostile, *words) as running:
            said = running.communicate(timeout=300)[0]
        assert running.returncode == 0, said
        assert "Traceback" not in said
        assert "drawn by the emulator" in said
        assert 'prefect-eachlabs generate "' in said
        assert str(output) in said
        rows = re.findall(r"s3://demo/images/(\S+)\.png +512 x 512 +\d\.\d s +\$0\.039", said)
        assert rows == [f"{number:02d}-{name}" for number, name in enumerate(list(demo.PROMPTS)[:pictures], 1)]
        pngs = {f"{row}.png" for row in rows} | {"contact-sheet.png"}
        assert {path.name for path in output.iterdir()} == pngs | {"of-the-user.png"}
        for name in pngs:
            with Image.open(output / name) as picture:
                picture.load()
        assert_nothing_is_left(running, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("interrupt", "at"),
    [(os.kill, "Starting"), (os.killpg, "being made")],
    ids=["while it starts", "from a terminal, with pictures in flight"],
)
def test_an_interrupted_demo_leaves_nothing_behind(
    interrupt: Callable[[int, int], None], at: str, tmp_path: Path, hostile: Mapping[str, str]
) -> None:
    with running_demo(tmp_path, hostile, "--service-seconds", "60") as running:
        assert running.stdout is not None
        for line in running.stdout:
            if at in line:
                break
        interrupt(running.pid, signal.SIGINT)
        said = running.communicate(timeout=120)[0]
    assert running.returncode == 130, said
    assert "Interrupted." in said
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


def test_an_interrupt_that_a_library_swallowed_is_not_forgotten() -> None:
    with demo_stage.Interrupts() as interrupts:
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()


def test_a_second_interrupt_does_not_disturb_the_cleaning_up() -> None:
    with demo_stage.Interrupts() as interrupts, interrupts.held_back():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)


def told(progress: Progress, task_run_name: str, message: str) -> None:
    progress.handle(logging.makeLogRecord({"task_run_name": task_run_name, "levelno": logging.INFO, "msg": message}))


def test_progress_follows_prefects_task_runs_line_by_line(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress()
    told(progress, "create 01-lighthouse", "Created task run")
    told(progress, "create 01-lighthouse", "Finished in state Completed()")
    told(progress, "create 02-fox", "Finished in state Failed()")
    told(progress, "await 01-lighthouse", "Finished in state Completed()")
    progress.moved("01-lighthouse", "stored")
    steps = [line.split(" s  ")[1].split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert steps == [["01-lighthouse", stage] for stage in ("being made", "being stored", "stored")]


def test_what_failed_is_said_in_one_line_and_stays_empty_on_the_sheet() -> None:
    image = StoredImage(
        item_id="01-lighthouse",
        prediction_id="p1",
        uri="s3://demo/images/01-lighthouse.png",
        sha256="0" * 64,
        size_bytes=1,
        width_px=512,
        height_px=512,
        cost_usd=0.039,
        predict_time_seconds=5.04,
    )
    played = demo.Played(images={"01-lighthouse": image}, errors={"02-fox": RuntimeError("[bold] the model said no")})
    table = demo._table(played, PROMPTS)
    assert "s3://demo/images/01-lighthouse.png  512 x 512  5.0 s  $0.039" in table
    assert "02-fox failed: [bold] the model said no" in table
    assert demo._sheet(played, PROMPTS).startswith(b"\x89PNG")
