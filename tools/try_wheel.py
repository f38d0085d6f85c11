"""Tries a wheel as a stranger installs it: a fresh environment, run-time dependencies alone, the versions of a file.

    python tools/try_wheel.py WHEEL [--python PYTHON] [--constraints FILE]

Needs a package index. Exit status 1 where something does not work; what, is printed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SMOKE = """\
import importlib.util
from importlib.metadata import version

from prefect.plugins import load_prefect_collections

import prefect_eachlabs
from prefect_eachlabs.cli import deployments

public = [getattr(prefect_eachlabs, name) for name in prefect_eachlabs.__all__]
extras = [name for name in ("PIL", "moto", "flask", "pyarrow", "prefect_aws") if importlib.util.find_spec(name)]
assert not extras, f"run-time dependencies bring {extras}: is an extra a dependency?"
found = load_prefect_collections()
assert getattr(found.get("prefect_eachlabs"), "__file__", None), f"Prefect does not find the blocks: {found}"
assert deployments.IN_A_WHEEL.is_file(), "setup --deploy has nothing to deploy"
print(f"prefect-eachlabs {version('prefect-eachlabs')}: {len(public)} public names work without extras")
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--python", default=sys.executable, help="makes the environment (default: this one)")
    parser.add_argument("--constraints", type=Path, default=ROOT / "constraints.txt")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:  # and from there, so that the checkout is not what is imported
        programs = Path(folder) / "venv" / "bin"
        environment = {
            **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
            "PREFECT_HOME": str(Path(folder) / "prefect"),
        }
        pip = [sys.executable, "-m", "pip", "--python", programs / "python", "--disable-pip-version-check", "-qq"]
        for command in (
            [given.python, "-m", "venv", "--without-pip", programs.parent],
            [*pip, "install", "--no-compile", "-c", given.constraints.resolve(), given.wheel.resolve()],
            [*pip, "check"],
            [programs / "python", "-c", SMOKE],
            [programs / "prefect-eachlabs", "--help"],
        ):
            words = [str(word) for word in command]
            done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                print(f"$ {' '.join(words)}\n{done.stdout}{done.stderr}exit status {done.returncode}")
                return 1
            if SMOKE in words:
                print(done.stdout, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
