"""Runs every property of tests/fuzz on fresh examples for an equal share of the time; `make fuzz`.

    .venv/bin/python tools/fuzz.py --minutes 10

Prints a table in Markdown: target, executions, seconds, findings; with `--output docs/fuzzing.md` it takes the place of
the table in that page. A target that finds something ends with it: the
smallest example goes to stderr, and the exit status is 1. `--only WORD` runs the targets whose names hold the word.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import os
import re
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROUND_EXAMPLES = 250
"""Each round begins anew: what hypothesis learns within one is worth little in the next."""


@dataclass
class Target:
    """One property, and what it has seen."""

    name: str
    test: Callable[[], None]
    executions: int = 0
    seconds: float = 0.0
    finding: str = ""


def targets(only: str) -> list[Target]:
    """Every property of the folder, counted."""
    os.environ["FUZZ_EXAMPLES"] = str(ROUND_EXAMPLES)
    for name in [name for name in os.environ if name.startswith(("EACHLABS_", "AWS_", "PREFECT_"))]:
        del os.environ[name]
    sys.path.insert(0, str(ROOT))
    for path in sorted((ROOT / "tests" / "fuzz").glob("test_*.py")):
        importlib.import_module(f"tests.fuzz.{path.stem}")
    kit = importlib.import_module("tests.fuzz.kit")
    found = []
    for test in kit.TARGETS:
        name = f"{test.__module__.rpartition('.')[2].removeprefix('test_')}: {test.__name__.removeprefix('test_')}"
        if only in name:
            target = Target(name, test)
            _count(target, test)
            found.append(target)
    return found


def _count(target: Target, test: Callable[[], None]) -> None:
    inner = test.hypothesis.inner_test  # type: ignore[attr-defined]

    @functools.wraps(inner)
    def counted(*args: object, **kwargs: object) -> None:
        target.executions += 1
        inner(*args, **kwargs)

    test.hypothesis.inner_test = counted  # type: ignore[attr-defined]


def run(target: Target, seconds: float) -> None:
    """Rounds of examples until the time is over, or something is found."""
    began_at = time.monotonic()
    while (spent := time.monotonic() - began_at) < seconds:
        try:
            target.test()
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            target.finding = f"{type(error).__name__}: {str(error)[:120]}"
            print(f"\n{target.name}", file=sys.stderr)
            traceback.print_exception(error, limit=-8, file=sys.stderr)
            break
    target.seconds = max(spent, time.monotonic() - began_at)


def table(found: list[Target]) -> str:
    """What `docs/fuzzing.md` shows."""
    lines = ["| target | executions | seconds | findings |", "| --- | ---: | ---: | --- |"]
    for target in found:
        name = target.name.replace("_", " ")
        lines.append(f"| {name} | {target.executions:,} | {target.seconds:.0f} | {target.finding or 'none'} |")
    executions, seconds = sum(one.executions for one in found), sum(one.seconds for one in found)
    lines.append(f"| **all** | **{executions:,}** | **{seconds:.0f}** | {sum(bool(one.finding) for one in found)} |")
    return "\n".join(lines)


def write_into(page: Path, minutes: float, new: str) -> None:
    """Puts the table, and how it was made, in the place of the page's old ones."""
    text = page.read_text(encoding="utf-8")
    made = f"`python tools/fuzz.py --minutes {minutes:g}`, Python {sys.version.split()[0]}, {os.cpu_count()} cores:"
    text, count = re.subn(
        r"`python tools/fuzz\.py --minutes [^`]*`, Python [^\n]*:\n\n(\|[^\n]*\n)+", f"{made}\n\n{new}\n", text
    )
    if count != 1:
        raise SystemExit(f"{page} holds no table to put this one in the place of.")
    page.write_text(text, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description="Runs every property of tests/fuzz on fresh examples.")
    parser.add_argument("--minutes", type=float, default=10.0, help="in all; each target has an equal share")
    parser.add_argument("--only", default="", help="the targets whose names hold this word")
    parser.add_argument("--output", type=Path, help="a page whose table is replaced")
    given = parser.parse_args()
    found = targets(given.only)
    if not found:
        parser.error(f"no target's name holds {given.only!r}")
    for target in found:
        run(target, given.minutes * 60 / len(found))
        print(".", end="", file=sys.stderr, flush=True)
    print(f"\n{table(found)}")
    if given.output:
        write_into(given.output, given.minutes, table(found))
    return any(target.finding for target in found)


if __name__ == "__main__":
    sys.exit(main())
