"""Real processes of one machine, without a Prefect server, killed and started again; the emulator counts."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefect_eachlabs.testing.emulator import EmulatorOptions, EmulatorServer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent.parent


@contextlib.contextmanager
def children() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    try:
        yield started
    finally:
        for child in started:
            child.kill()
            child.wait()
            assert child.stdout is not None
            child.stdout.close()


def start(url: str, state: Path, callers: int) -> subprocess.Popen[str]:
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.limits.machine_child", url, str(callers)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "XDG_STATE_HOME": str(state)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "buying\n"
    return child


def test_processes_killed_stopped_and_started_again_are_never_over(tmp_path: Path) -> None:
    """Longer than a window: SIGKILL, SIGINT, SIGSTOP and SIGCONT, with one or two beside each other all the time."""
    rng = random.Random(20261122)
    with EmulatorServer(EmulatorOptions(pictures="plain")) as emulator, children() as started:
        until = time.monotonic() + 75
        steps = [signal.SIGKILL, signal.SIGINT, signal.SIGSTOP, signal.SIGKILL, signal.SIGKILL, signal.SIGINT]
        step = 0
        while time.monotonic() < until:
            started += [start(emulator.url, tmp_path, callers) for callers in (40, 3)]
            time.sleep(rng.uniform(8, 14))
            for child in started[-2:]:
                sent = steps[step % len(steps)]
                step += 1
                child.send_signal(sent)
                if sent is signal.SIGSTOP:
                    time.sleep(15)
                    child.send_signal(signal.SIGCONT)
                    child.send_signal(signal.SIGINT)
                child.wait(20)
        tallies = emulator.tallies()
    assert tallies["rejected_429"] == 0
    assert tallies["worst_window"] <= 60
    assert tallies["worst_in_flight"] <= 10
    assert tallies["succeeded"] >= 12
