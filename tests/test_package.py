"""The package as a stranger gets it: what is in it, what it needs, what importing it costs."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

import prefect_eachlabs
from prefect_eachlabs import flows, testing

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
CONSTRAINTS = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
VERSION = metadata.version("prefect-eachlabs")

EXTRAS = {"PIL", "moto", "flask", "flask_cors", "pyarrow", "prefect_aws", "aiobotocore"}
"""Import names that only the extras bring (jsonschema comes with Prefect too)."""


def modules_after(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter has loaded once `code` ran."""
    script = f"{code}\nimport json, sys; print(json.dumps(sorted({{name.partition('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_the_version_is_written_in_one_place() -> None:
    written = re.search(r'^version = "(.+)"$', PYPROJECT, re.MULTILINE)
    assert written is not None
    assert written.group(1) == VERSION, "the installed version is another: run make install"


@pytest.mark.parametrize("package", [prefect_eachlabs, flows, testing], ids=lambda package: package.__name__)
def test_what_is_public_is_sorted_and_there_and_documented(package: Any) -> None:
    public = package.__all__
    assert list(public) == sorted(public)
    assert set(public) <= set(dir(package))
    for name in public:
        thing: Any = getattr(package, name)
        assert callable(thing), f"{name} is {thing}"
        assert (getattr(thing, "__doc__", None) or "").strip(), f"{name} has no docstring"
    with pytest.raises(AttributeError, match="has no attribute 'none_such'"):
        package.none_such  # noqa: B018


def test_eighteen_names_are_public() -> None:
    assert len(prefect_eachlabs.__all__) == 18
    assert prefect_eachlabs.__version__ == VERSION


def test_every_public_name_is_used_in_the_file_that_the_type_checker_reads() -> None:
    tree = ast.parse((ROOT / "tests" / "typed_api.py").read_text(encoding="utf-8"))
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert {*prefect_eachlabs.__all__, *flows.__all__, *testing.__all__} <= used
    assert '"tests/typed_api.py"' in PYPROJECT, "mypy is not told of it"


def test_prefect_finds_the_collection_and_a_shell_the_command() -> None:
    installed = metadata.distribution("prefect-eachlabs").entry_points
    points = {(point.group, point.name): point.value for point in installed}
    assert points["prefect.collections", "prefect_eachlabs"] == "prefect_eachlabs"
    module, _, function = points["console_scripts", "prefect-eachlabs"].partition(":")
    assert callable(getattr(import_module(module), function))


@pytest.mark.slow
def test_all_that_is_public_works_without_any_extra() -> None:
    assert modules_after("from prefect_eachlabs import *").isdisjoint(EXTRAS)


# -------------------------------------------------------------------- wheel and sdist


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        facts = archive.read(f"prefect_eachlabs-{VERSION}.dist-info/METADATA").decode()
    assert {name.partition("/")[0] for name in names} == {"prefect_eachlabs", f"prefect_eachlabs-{VERSION}.dist-info"}
    assert {"prefect_eachlabs/py.typed", "prefect_eachlabs/batch/report.html.j2"} <= set(names)
    assert f"prefect_eachlabs-{VERSION}.dist-info/licenses/LICENSE" in names
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "prefect_eachlabs").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == sources
    assert "License-Expression: Apache-2.0" in facts


@pytest.mark.slow
def test_the_sdist_holds_what_building_and_testing_need(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    for path in ("pyproject.toml", "constraints.txt", "Makefile", "README.md", "LICENSE", "tests/conftest.py"):
        assert path in inside
    folders = [name for name in ("flows", "deployments", "docs") if any((ROOT / name).rglob("*.*"))]
    assert {name.partition("/")[0] for name in inside} >= {"prefect_eachlabs", "tests", *folders}


# ------------------------------------------------------------------------- constraints


def test_constraints_are_names_and_versions_alone() -> None:
    for line in CONSTRAINTS:
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            assert requirement.url is None
            assert [specifier.operator for specifier in requirement.specifier] == ["=="], line


def test_what_is_installed_here_is_what_the_constraints_say() -> None:
    pinned = [Requirement(line) for line in CONSTRAINTS if line and not line.startswith("#")]
    here = {str(pin.name): pin for pin in pinned if pin.marker is None or pin.marker.evaluate()}
    for text in metadata.requires("prefect-eachlabs") or ():
        name = Requirement(text).name
        if name != "prefect-eachlabs":  # an extra that is made of other extras
            assert name in here, f"{name} is not in constraints.txt: run tools/make_constraints.py"
            assert metadata.version(name) in here[name].specifier, f"{name}: run make install"
