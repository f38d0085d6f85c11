"""Writes constraints.txt anew: the newest versions that fit together, on every Python that is supported.

    python tools/make_constraints.py [PYTHON ...]

Without arguments it looks for python3.10 to python3.13 on the PATH and under ~/.pyenv/versions. Each interpreter
resolves `.[dev,aws]` by itself with pip (nothing is installed, a minute or two each); where they differ, a line gets an
environment marker. The file holds names and versions alone: where packages come from is each machine's own setting.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MINORS = (10, 11, 12, 13)
WORKERS = 2

# Decided first. Its botocore is the tightest bound of all; met last, pip walks back through hundreds of boto3 releases.
FIRST = ("aiobotocore",)

HEADER = """\
# The versions that tests run with, for Python 3.10 to 3.13. Names and versions alone.
# Written by tools/make_constraints.py; do not edit by hand.
"""


def find_interpreters() -> list[str]:
    found = []
    for minor in MINORS:
        pyenv = sorted(Path.home().glob(f".pyenv/versions/3.{minor}.*/bin/python3"))
        path = str(pyenv[-1]) if pyenv else shutil.which(f"python3.{minor}")
        if path is None:
            sys.exit(f"python3.{minor} is not here: name an interpreter of each version as arguments")
        found.append(path)
    return found


def resolve(interpreter: str) -> tuple[int, dict[str, str]]:
    """The minor version of an interpreter, and what pip would install there for everything."""
    with tempfile.TemporaryDirectory() as scratch:
        venv = Path(scratch) / "venv"
        report = Path(scratch) / "report.json"
        subprocess.run([interpreter, "-m", "venv", str(venv)], check=True)
        pip = [str(venv / "bin" / "python"), "-m", "pip", "install", "-qq", "--dry-run", "--ignore-installed"]
        subprocess.run([*pip, "--report", str(report), *FIRST, f"{ROOT}[dev,aws]"], check=True)
        answer = json.loads(report.read_text(encoding="utf-8"))
    minor = int(answer["environment"]["python_version"].partition(".")[2])
    versions = {}
    for package in answer["install"]:
        name = re.sub(r"[-_.]+", "-", package["metadata"]["name"]).lower()
        versions[name] = package["metadata"]["version"]
    del versions["prefect-eachlabs"]
    print(f"3.{minor}: {len(versions)} packages", file=sys.stderr)
    return minor, versions


def lines_for(name: str, by_minor: dict[int, str]) -> list[str]:
    """One line where all agree, else one for each run of equal versions; the first and the last run are open."""
    runs: list[tuple[int, str]] = []  # the minor a run begins with, its version
    for minor, version in sorted(by_minor.items()):
        if not runs or runs[-1][1] != version:
            runs.append((minor, version))
    lines = []
    for index, (begin, version) in enumerate(runs):
        bounds = []
        if index > 0:
            bounds.append(f'python_version >= "3.{begin}"')
        if index + 1 < len(runs):
            bounds.append(f'python_version < "3.{runs[index + 1][0]}"')
        lines.append(f"{name}=={version}" + (f" ; {' and '.join(bounds)}" if bounds else ""))
    return lines


def main() -> None:
    with ThreadPoolExecutor(WORKERS) as pool:
        resolved = dict(pool.map(resolve, sys.argv[1:] or find_interpreters()))
    names = sorted({name for versions in resolved.values() for name in versions})
    lines = []
    for name in names:
        lines += lines_for(name, {minor: versions[name] for minor, versions in resolved.items() if name in versions})
    (ROOT / "constraints.txt").write_text(HEADER + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
