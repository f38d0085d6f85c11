"""Measures, in real time and side by side with simpler ways, and writes docs/benchmarks.md. `make bench` runs it.

    python benchmarks/run.py                              everything, some 20 minutes
    python benchmarks/run.py --only a,c --minutes 2       some of it, printed, written nowhere

A machine that is busy with other things shows in the figures; the load average is written down with them.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import report
from batches import MANY_ITEMS, SPEED_ITEMS, memory_and_again, speed
from pace import CALLED_WAYS, SCENARIOS, WAYS, Entry, Figures, Scenario, prefect_servers, run_side_by_side
from processes import HERE, Trouble
from servers import prefect_server

OUTPUT = HERE.parent / "docs" / "benchmarks.md"
GROUPS = {
    "a": "60/min, 10 in flight",
    "b": "the same without executions",
    "c": "no request limit, 10 in flight",
    "d": "600/min, 100 in flight",
    "e": "two and four processes sharing (a) through a Prefect server, on SQLite and on PostgreSQL",
    "f": "with webhooks, beside without: one, two and four processes at 60/min, and no request limit",
    "speed": "pictures a second without limits, beside a bare script",
    "memory": "peak memory at 1,000 and 10,000 items, and a finished batch again",
}


def say(text: str) -> None:
    print(text, flush=True)


def seconds_of(scenario: Scenario, minutes: float | None) -> float:
    return 60.0 * (scenario.minutes if minutes is None else minutes)


def shown(figures: Sequence[Figures]) -> list[Figures]:
    for one in figures:
        say(
            f"  {one.scenario.name:>2} {one.way:<12} {one.place:<10} {one.per_minute:6.1f} a minute "
            f"({one.share:4.0%} of the ceiling), {one.requests_a_picture:5.2f} requests a picture, "
            f"window {one.worst_window}, in flight {one.worst_in_flight}, 429: {one.throttled}, "
            f"known after {one.known_after_median:.2f} s ({one.known_after_95:.2f} s)"
        )
    return list(figures)


def single_processes(chosen: Sequence[str], folder: Path, minutes: float | None) -> list[Figures]:
    """All of them at the same time: they wait for the API nearly all the time."""
    scenarios = [SCENARIOS[name] for name in chosen if name in SCENARIOS]
    if not scenarios:
        return []
    seconds = max(seconds_of(scenario, minutes) for scenario in scenarios)
    say(f"{', '.join(scenario.name for scenario in scenarios)}: {seconds:.0f} s")
    entries = [Entry(scenario, way) for scenario in scenarios for way in WAYS]
    return shown(run_side_by_side(entries, folder, seconds))


def several_processes(folder: Path, minutes: float | None) -> list[Figures]:
    figures: list[Figures] = []
    with prefect_servers(folder) as urls:
        for name in ("e2", "e4"):
            scenario = SCENARIOS[name]
            seconds = seconds_of(scenario, minutes)
            say(f"{name}: {seconds:.0f} s on {' and '.join(urls)} at the same time")
            entries = [Entry(scenario, way) for way in WAYS if way != "ours"]
            entries += [Entry(scenario, "ours", place, url) for place, url in urls.items()]
            figures += shown(run_side_by_side(entries, folder, seconds))
    return figures


def with_webhooks(folder: Path, minutes: float | None) -> list[Figures]:
    """All at the same time, each against an emulator of its own; one server is everybody's."""
    seconds = seconds_of(SCENARIOS["f1"], minutes)
    with contextlib.ExitStack() as open_:
        url = open_.enter_context(prefect_server(folder, "webhooks"))
        say(f"f: {seconds:.0f} s, several processes on {url}")
        one, unlimited = SCENARIOS["f1"], SCENARIOS["fn"]
        entries = [Entry(one, "ours"), *(Entry(one, way) for way in CALLED_WAYS)]
        entries += [Entry(unlimited, "ours"), Entry(unlimited, "called")]
        for several in (SCENARIOS["f2"], SCENARIOS["f4"]):
            entries += [Entry(several, way, "SQLite", url) for way in ("ours", "called")]
        return shown(run_side_by_side(entries, folder, seconds))


def speed_and_memory(chosen: Sequence[str], folder: Path, items: int | None) -> list[str]:
    sections: list[str] = []
    if "speed" in chosen:
        count = min(SPEED_ITEMS, items or SPEED_ITEMS)
        say(f"speed: {count:,} pictures, three times")
        sections.append(report.speed_section(speed(folder, count)))
        say(sections[-1])
    if "memory" in chosen:
        many = items or MANY_ITEMS
        say(f"memory: {many // 10:,} and {many:,} items, and those again")
        sections.append(report.memory_section(memory_and_again(folder, many // 10, many)))
        say(sections[-1])
    return sections


def measure(chosen: Sequence[str], folder: Path, minutes: float | None, items: int | None) -> list[str]:
    """The sections of the page."""
    figures = single_processes(chosen, folder, minutes)
    if "e" in chosen:
        figures += several_processes(folder, minutes)
    if "f" in chosen:
        figures += with_webhooks(folder, minutes)
    sections = [report.pace_section(figures)] if figures else []
    return sections + speed_and_memory(chosen, folder, items)


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    groups = "\n".join(f"  {name:<8}{text}" for name, text in GROUPS.items())
    parser.epilog = f"scenarios:\n{groups}"
    parser.add_argument("--only", default=",".join(GROUPS), help="some of the scenarios, with commas between them")
    parser.add_argument(
        "--minutes",
        type=float,
        help="how long each of (a) to (f) runs (3): whole minutes, of which the first is left out",
    )
    parser.add_argument("--items", type=int, help="how many items the large batch has")
    parser.add_argument("--output", type=Path, help="where the page goes; a full run writes docs/benchmarks.md")
    arguments = parser.parse_args(words)
    arguments.only = [name for name in arguments.only.split(",") if name]
    if unknown := set(arguments.only) - set(GROUPS):
        parser.error(f"no such scenario: {', '.join(sorted(unknown))}; there are {', '.join(GROUPS)}")
    in_full = set(arguments.only) == set(GROUPS) and arguments.minutes is None and arguments.items is None
    arguments.output = arguments.output or (OUTPUT if in_full else None)
    return arguments


def main(words: Sequence[str] | None = None) -> int:
    arguments = parse(words)
    logging.basicConfig(level=logging.WARNING)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that every process is ended on the way out
    began, load = time.monotonic(), report.load_average()
    say(f"{report.machine()}\nload average {load}")
    with tempfile.TemporaryDirectory(prefix="eachlabs-benchmark-") as folder:
        try:
            sections = measure(arguments.only, Path(folder), arguments.minutes, arguments.items)
        except Trouble as trouble:
            say(f"Failed: {trouble}")
            return 1
    command = shlex.join(["python", "benchmarks/run.py", *(sys.argv[1:] if words is None else words)])
    page = report.document(
        sections,
        command="make bench" if arguments.output == OUTPUT else command,
        load=(load, report.load_average()),
        seconds=time.monotonic() - began,
    )
    if arguments.output is None:
        say(page)
    else:
        if arguments.output.exists():  # hundred_thousand.py writes its own
            kept = report.section_in(arguments.output.read_text(encoding="utf-8"), report.HUNDRED_THOUSAND)
            page += f"\n{kept}\n" if kept else ""
        arguments.output.write_text(page, encoding="utf-8")
        say(f"Written to {arguments.output}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
