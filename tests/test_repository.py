"""What somebody who takes the repository over relies on: workflows that run the Makefile's commands, and no address."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
MADE_OR_FETCHED = {".git", ".venv", "site", "dist", "build", "demo-output"}
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def texts() -> Iterator[tuple[str, str]]:
    for top in sorted(ROOT.iterdir()):
        if top.name in MADE_OR_FETCHED or top.name.endswith("_cache") or top.name == ".hypothesis":
            continue
        for path in [top] if top.is_file() else sorted(top.rglob("*")):
            if path.is_file() and path.suffix not in (".pyc", ".png"):
                yield str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_types_commands_of_the_makefile(workflow: Path) -> None:
    jobs = yaml.safe_load(workflow.read_text(encoding="utf-8"))["jobs"]
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
    for name, job in jobs.items():
        assert {job["needs"]} <= set(jobs) if "needs" in job else True, name
        for step in job.get("steps", ()):
            for command in re.findall(r"^make ([a-z-]+)", step.get("run", ""), re.MULTILINE):
                assert command in targets, f"{workflow}: make {command}"
        assert set(job.get("strategy", {}).get("matrix", {}).get("command", ())) <= targets


def test_the_workflows_test_every_python_that_is_supported() -> None:
    supported = re.findall(r"Python :: (3\.\d+)", PYPROJECT)
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8"))["jobs"]
    assert jobs["fast"]["strategy"]["matrix"]["python"] == supported


def test_no_package_registry_is_named() -> None:
    host = re.compile(r"\b(pypi|pythonhosted|npmjs|ghcr|quay|docker|debian|ubuntu|golang|crates)\.(org|com|io)\b")
    assert [path for path, text in texts() if host.search(text)] == []


def test_the_repositorys_address_is_a_placeholder_in_one_place() -> None:
    placeholder = ".".join(("repository", "invalid"))
    assert [path for path, text in texts() if placeholder in text] == ["pyproject.toml"]
