"""The units for machines that run servers and workers are ones that systemd takes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT

UNITS = sorted((ROOT / "deployments" / "systemd").glob("*.service"))


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_systemd_takes_the_unit(unit: Path, require_tool: Callable[[str], Path], tmp_path: Path) -> None:
    text = unit.read_text(encoding="utf-8")
    program = "/opt/prefect-eachlabs/.venv/bin/prefect"
    assert f"ExecStart={program} " in text
    copy = tmp_path / unit.name
    copy.write_text(text.replace(program, sys.executable), encoding="utf-8")
    command = [str(require_tool("systemd-analyze")), "verify", "--man=no", str(copy)]
    seen = subprocess.run(command, capture_output=True, text=True, check=False)
    said = [line for line in seen.stderr.splitlines() if unit.name.partition("@")[0] in line]
    assert not said, said
    assert "PREFECT_HOME=/var/lib/" in text


def test_a_mistake_in_a_unit_would_be_seen(require_tool: Callable[[str], Path], tmp_path: Path) -> None:
    unit = tmp_path / "wrong.service"
    unit.write_text("[Service]\nExecStart=/no/such/program\nRestart=perhaps\n")
    command = [str(require_tool("systemd-analyze")), "verify", "--man=no", str(unit)]
    seen = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "perhaps" in seen.stderr
