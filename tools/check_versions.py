"""Installs and tests the package on every Python that is found here, with the newest and the lowest dependencies.

    python tools/check_versions.py [--only 3.10,3.13] [--lowest] [-- PYTEST ARGUMENTS]

Each Python gets fresh environments: first the wheel with run-time dependencies alone (tools/try_wheel.py), then
everything that the tests need, and the fast tests. `--lowest` takes each direct dependency at its lower bound in
pyproject.toml instead of the versions of constraints.txt (what resolvers call lowest-direct): the bounds are promises
too. A line for each says what came of it; exit status 1 if one failed.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MINORS = (10, 11, 12, 13)
REQUIREMENT = re.compile(r'"([a-zA-Z0-9_.-]+)(?:\[[a-z0-9,]+\])?>=([0-9.]+)')
TEST_TOOLS = ("build", "hypothesis", "openapi-core", "playwright", "pytest", "pytest-xdist")


def interpreters() -> dict[str, str]:
    """Version → path, of those that are here."""
    found = {}
    for minor in MINORS:
        pyenv = sorted(Path.home().glob(f".pyenv/versions/3.{minor}.*/bin/python3"))
        path = str(pyenv[-1]) if pyenv else shutil.which(f"python3.{minor}")
        if path is not None:
            found[f"3.{minor}"] = path
    return found


def lower_bounds(pyproject: str) -> str:
    """Each direct dependency at its lower bound, as constraints.

    >>> lower_bounds('\\ndependencies = [\\n    "httpx>=0.27",\\n    "moto[s3]>=5.1,<6",\\n]')
    'httpx==0.27\\nmoto==5.1\\n'
    """
    promised = re.split(r"^(?:docs|dev) = ", pyproject.partition("\ndependencies = ")[2], flags=re.MULTILINE)[0]
    return "".join(f"{name}=={version}\n" for name, version in REQUIREMENT.findall(promised))


class Failed(Exception):
    """A step did not succeed; its log says why."""


def run(command: list[str], log: Path) -> None:
    with log.open("ab") as out:
        out.write(f"$ {' '.join(command)}\n".encode())
        out.flush()
        done = subprocess.run(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-25:])
        raise Failed(f"{' '.join(command[:6])} ...: exit status {done.returncode}\n{tail}")


def check(python: str, constraints: Path, extras: str, wheel: Path, scratch: Path, pytest: list[str]) -> None:
    log = scratch / "log"
    trial = [sys.executable, str(ROOT / "tools" / "try_wheel.py"), str(wheel)]
    run([*trial, "--python", python, "--constraints", str(constraints)], log)
    pip = ["-m", "pip", "--disable-pip-version-check", "-qq"]
    full = scratch / "full"
    run([python, "-m", "venv", str(full)], log)
    run([f"{full}/bin/python", *pip, "install", "-c", str(constraints), "hatchling", "editables"], log)
    editable = ["install", "--no-build-isolation", "-c", str(constraints), "-e", f"{ROOT}[{extras}]"]
    run([f"{full}/bin/python", *pip, *editable, *TEST_TOOLS], log)
    run([f"{full}/bin/python", "-m", "pytest", "-q", "-m", "not slow", "-n", "2", "--dist", "loadfile", *pytest], log)
    print(f"    {log.read_text(errors='replace').splitlines()[-1]}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="versions, such as 3.10,3.13")
    parser.add_argument("--lowest", action="store_true", help="direct dependencies at their lower bounds")
    given, pytest = parser.parse_known_args()
    wanted = [version for version in given.only.split(",") if version]
    found = {version: path for version, path in interpreters().items() if not wanted or version in wanted}
    if not found:
        sys.exit("None of these Pythons is here.")
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        build = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", folder]
        run(build, scratch / "log")
        (wheel,) = scratch.glob("*.whl")
        constraints, extras = ROOT / "constraints.txt", "dev"
        if given.lowest:
            constraints = scratch / "lowest.txt"
            constraints.write_text(lower_bounds((ROOT / "pyproject.toml").read_text(encoding="utf-8")))
            extras = "demo,parquet,models"  # prefect-aws binds boto3 by itself
        for version, python in found.items():
            began = time.monotonic()
            (scratch / version).mkdir()
            try:
                check(python, constraints, extras, wheel, scratch / version, [one for one in pytest if one != "--"])
                outcome = "ok"
            except Failed as error:
                failed, outcome = True, f"FAILED: {error}"
            kind = "lowest" if given.lowest else "constraints.txt"
            print(f"Python {version}, {kind}: {outcome} ({time.monotonic() - began:.0f} s)", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
