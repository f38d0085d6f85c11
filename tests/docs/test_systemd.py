"""The units for machines that run servers and workers are ones that systemd takes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT

FOLDER = ROOT / "deployments" / "systemd"
UNITS = sorted(FOLDER.glob("*.service"))
PROGRAM = re.compile(r"(?<=^ExecStart=)/opt/prefect-eachlabs/\.venv/bin/prefect(-eachlabs)?(?= )", re.MULTILINE)


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_systemd_takes_the_unit(unit: Path, require_tool: Callable[[str], Path], tmp_path: Path) -> None:
    text = unit.read_text(encoding="utf-8")
    assert PROGRAM.search(text)
    copy = tmp_path / unit.name
    copy.write_text(PROGRAM.sub(sys.executable, text), encoding="utf-8")
    command = [str(require_tool("systemd-analyze")), "verify", "--man=no", str(copy)]
    seen = subprocess.run(command, capture_output=True, text=True, check=False)
    said = [line for line in seen.stderr.splitlines() if unit.name.partition("@")[0] in line]
    assert not said, said
    assert "PREFECT_HOME=/var/lib/" in text


def test_settling_is_started_every_six_hours(require_tool: Callable[[str], Path]) -> None:
    (when,) = re.findall(r"^OnCalendar=(.*)$", (FOLDER / "eachlabs-settle.timer").read_text(), re.MULTILINE)
    command = [str(require_tool("systemd-analyze")), "calendar", "--iterations=5", when]
    seen = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "TZ": "UTC"})
    times = re.findall(r"\d{4}-\d\d-\d\d (\d\d:\d\d:\d\d) UTC", seen.stdout)
    assert {"00:30:00", "06:30:00", "12:30:00", "18:30:00"} == set(times)


def test_a_mistake_in_a_unit_would_be_seen(require_tool: Callable[[str], Path], tmp_path: Path) -> None:
    unit = tmp_path / "wrong.service"
    unit.write_text("[Service]\nExecStart=/no/such/program\nRestart=perhaps\n")
    command = [str(require_tool("systemd-analyze")), "verify", "--man=no", str(unit)]
    seen = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "perhaps" in seen.stderr
