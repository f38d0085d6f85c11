"""Commands under a pseudo-terminal: what a person's terminal would be sent."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from prefect_eachlabs.net.redaction import visible
from tests.conftest import ROOT
from tests.security.hostile import FORGED


def typed(words: list[str], environment: Mapping[str, str], folder: Path) -> tuple[int, str]:
    """A command of the command line, typed at a terminal; its exit status, and all that the terminal was sent."""
    return _sent(["-m", "prefect_eachlabs", *words], environment, folder)


EACH = """
import json, sys
from prefect_eachlabs.cli.main import main
for words in json.loads(sys.argv[1]):
    print(f"{NEXT}{main(words)}", flush=True)
"""
NEXT = "it ended with "


def typed_in_turn(commands: list[list[str]], environment: Mapping[str, str], folder: Path) -> list[tuple[int, str]]:
    """Several of them, in one process: the exit status of each, and what the terminal was sent by each."""
    program = EACH.replace("{NEXT}", NEXT)
    _, sent = _sent(["-c", program, json.dumps(commands)], environment, folder)
    *pieces, rest = re.split(rf"^{NEXT}(\d+)\n", sent, flags=re.MULTILINE)
    assert rest == "", sent
    assert len(pieces) == 2 * len(commands), sent
    return [(int(status), said) for said, status in zip(pieces[::2], pieces[1::2], strict=True)]


def _sent(words: list[str], environment: Mapping[str, str], folder: Path) -> tuple[int, str]:
    """What a process of Python's sends to a terminal."""
    ours, theirs = pty.openpty()
    try:
        process = subprocess.Popen(
            [sys.executable, *words],
            env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "COLUMNS": "200", **environment},
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
    finally:
        os.close(theirs)
    sent = bytearray()
    try:
        with suppress(OSError):  # EIO: nobody holds the other side any more
            while piece := os.read(ours, 65_536):
                sent += piece
    finally:
        os.close(ours)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        status = process.wait()
    return status, sent.decode().replace("\r\n", "\n")


def assert_unmoved(sent: str) -> None:
    """No sign that moves a terminal got there, and no line is a forged one."""
    assert visible(sent, keeping="\n\t") == sent
    assert not [line for line in sent.splitlines() if line.startswith(FORGED.strip()[:10])]
