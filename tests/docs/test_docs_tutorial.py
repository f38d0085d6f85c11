"""The tutorial is walked as a new user walks it, command by command; the tests that a page shows are run."""

from __future__ import annotations

import os
import re
import secrets
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.docs.docs_kit import Block, blocks_of, is_shown
from tests.ui.stage import Process, free_port, is_begun_from, until

pytestmark = pytest.mark.slow

TUTORIAL = list(blocks_of(ROOT / "docs" / "tutorial.md"))
TESTING = list(blocks_of(ROOT / "docs" / "how-to" / "testing-flows.md"))
COMMAND_ENDS_WITHIN_SECONDS = 180.0
IS_SHOWN_WITHIN_SECONDS = 300.0  # a schedule fires within two minutes, on a machine that has nothing else to do


def a_users_environment(home: Path, **more: str) -> dict[str, str]:
    """A shell that has the package on its PATH and nothing of this machine's settings."""
    return {
        "HOME": str(home),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "LANG": "C.UTF-8",
        "COLUMNS": "80",
        "DO_NOT_TRACK": "1",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "AWS_EC2_METADATA_DISABLED": "true",
        "PYTHONUNBUFFERED": "1",
        **more,
    }


class Terminal:
    """A bash that goes on from one command to the next, as a person's does."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self._bash = subprocess.Popen(
            ["bash", "--noprofile", "--norc"],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def type(self, command: str) -> str:
        """What it prints."""
        assert self._bash.stdin is not None
        assert self._bash.stdout is not None
        end = secrets.token_hex(8)
        # From /dev/null: a program would read the commands that follow.
        self._bash.stdin.write(f"{command} </dev/null\nprintf '\\n{end}\\n'\n")
        self._bash.stdin.flush()
        guard = threading.Timer(COMMAND_ENDS_WITHIN_SECONDS, self._bash.kill)
        guard.start()
        try:
            printed = []
            for line in self._bash.stdout:
                if line.strip() == end:
                    return "".join(printed)
                printed.append(line)
        finally:
            guard.cancel()
        raise AssertionError(f"{command} did not end:\n{''.join(printed)}")

    def close(self) -> None:
        self._bash.kill()
        self._bash.communicate()


def answers(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


@contextmanager
def another_terminal(block: Block, number: int, folder: Path, environment: dict[str, str]) -> Iterator[Path]:
    """Runs a block whose last command goes on; once what the page shows is there, gives its log."""
    typed = [command.typed for command in block.commands() if ".venv/bin/activate" not in command.typed]
    before = [". ./stand-ins.sh"] if "stand-ins.sh" in block.text else []
    script = " && ".join([*before, *typed[:-1], f"exec {typed[-1]}"])
    process = Process(["bash", "-c", script], environment, folder / f"terminal-{number}.log", folder=folder)
    try:
        shown = block.commands()[-1].shown
        assert shown is not None, f"{block}: it must show how one knows that it is ready"
        until(
            lambda: is_shown(f"...\n{shown}\n...", process.log.read_text()),
            IS_SHOWN_WITHIN_SECONDS,
            f"{block}: {shown}",
        )
        for port in re.findall(r"http://127\.0\.0\.1:(\d+)", shown):  # Prefect's server says so some seconds before
            until(lambda port=port: answers(int(port)), IS_SHOWN_WITHIN_SECONDS, f"{block}: port {port}")
        yield process.log
    finally:
        process.stop()


@pytest.fixture
def ports() -> dict[str, str]:
    """The page's ports, and free ones in their place: another test may be at work here."""
    return {port: str(free_port()) for port in ("8700", "9000", "4200")}


def test_the_tutorial_can_be_walked(
    tmp_path: Path, ports: dict[str, str], require_tool: Callable[[str], Path], kept_database: Path
) -> None:
    require_tool("curl")
    require_tool("bash")

    def moved(text: str) -> str:
        return re.sub(r"\b(8700|9000|4200)\b", lambda port: ports[port[0]], text)

    folder = tmp_path / "pictures"
    (folder / "prefect-home").mkdir(parents=True)
    is_begun_from(kept_database, folder / "prefect-home")  # else two servers would migrate: 20 s of CPU
    environment = a_users_environment(
        tmp_path,
        PREFECT_SERVER_API_PORT=ports["4200"],
        PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS="5",  # new schedules are looked at every 60 s otherwise
        PREFECT_WORKER_QUERY_SECONDS="2",
    )
    logs: list[Path] = []
    with ExitStack() as stack:
        terminal = Terminal(folder, environment)
        stack.callback(terminal.close)
        for block in TUTORIAL:
            if block.why_not_run is not None:
                continue
            here = replace(block, text=moved(block.text))
            if block.title:
                (folder / block.title).write_text(here.text, encoding="utf-8")
            elif "background" in block.notes:
                logs.append(stack.enter_context(another_terminal(here, len(logs) + 2, folder, environment)))
            elif "background output" in block.notes:
                log = logs[-1]
                until(
                    lambda here=here, log=log: is_shown(f"...\n{here.text.strip()}\n...", log.read_text()),
                    IS_SHOWN_WITHIN_SECONDS,
                    f"{block}: {here.text}",
                )
            elif block.language == "console":
                for command in here.commands():
                    printed = terminal.type(command.typed)
                    if command.shown is not None:
                        assert is_shown(command.shown, printed), f"{block}: {command.typed} prints\n{printed}"
            else:
                raise AssertionError(f"{block}: neither a file, nor commands, nor what they print")


BEGUN = """\
from prefect.testing import utilities

utilities.mkdtemp = lambda: {folder!r}
"""
"""A plugin: the harness's database is where it would be, and migrated."""


def test_the_tests_of_the_page_about_testing_run(tmp_path: Path, kept_database: Path) -> None:
    home = tmp_path / "prefect"
    home.mkdir()
    if is_begun_from(kept_database, home):
        (home / "prefect.db").rename(home / "prefect-test.db")
    (tmp_path / "begun.py").write_text(BEGUN.format(folder=str(home)), encoding="utf-8")
    for block in TESTING:
        if block.title:
            (tmp_path / block.title).write_text(block.text, encoding="utf-8")
    shown = next(block for block in TESTING if block.text.startswith("$ pytest")).commands()[0]
    done = subprocess.run(
        [sys.executable, "-m", *shown.typed.split(), "-p", "no:cacheprovider", "-p", "begun"],
        cwd=tmp_path,
        env=a_users_environment(tmp_path, PREFECT_HOME=str(home)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert is_shown(str(shown.shown), done.stdout), done.stdout


def test_the_page_about_testing_shows_only_files_that_it_uses() -> None:
    assert {block.title for block in TESTING if block.title} == {"conftest.py", "shop.py", "test_shop.py"}
