"""`docs/benchmarks.md`: what was measured, where, and how."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

from batches import (
    WANTED_APART_MB,
    WANTED_REQUESTS_AGAIN,
    WANTED_SHARE,
    Run,
    requests_beyond_the_report,
)
from pace import CALLED_WAYS, SERVICE_SECONDS, WAYS, Figures

_PACKAGES = ("prefect", "httpx", "boto3", "starlette", "uvicorn", "moto")


def paragraphs(*texts: str) -> str:
    return "\n\n".join(texts)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *("---:" for _ in head[1:])], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine() -> str:
    """One line about where this ran."""
    model = platform.processor() or platform.machine()
    memory_gb = 0.0
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
        memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (OSError, ValueError):
        pass
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in _PACKAGES)
    return (
        f"{os.cpu_count()} cores of {model}, {memory_gb:.0f} GB, {platform.system()} {platform.release()}, "
        f"Python {platform.python_version()}; {versions}"
    )


def load_average() -> str:
    return "{:.1f}, {:.1f}, {:.1f}".format(*os.getloadavg())


# ---- a section that another script writes

HUNDRED_THOUSAND = "## A hundred thousand"


def section_in(page: str, heading: str) -> str:
    """What stands under a heading, with it; empty when it does not stand there."""
    _, found, rest = f"\n{page}".partition(f"\n{heading}\n")
    return f"{heading}\n{rest.partition(f'{chr(10)}## ')[0].rstrip()}" if found else ""


def put_section(path: Path, heading: str, text: str) -> None:
    """Writes a section in the place of the one that has its heading, or at the end."""
    page = path.read_text(encoding="utf-8")
    was = section_in(page, heading)
    page = page.replace(was, text.rstrip()) if was else f"{page.rstrip()}\n\n{text.rstrip()}\n"
    path.write_text(page, encoding="utf-8")


# ---- the pace


def pace_section(figures: Sequence[Figures]) -> str:
    """A table a scenario, ours last."""
    scenarios = {one.scenario.name: one.scenario for one in figures}
    tables = [
        paragraphs(
            f"### ({scenario.name[0]}) {scenario.title}",
            f"Ceiling: {scenario.ceiling:.1f} pictures a minute ({scenario.because}). Wanted of ours: "
            f"{scenario.wanted:.0f} or more, and never over a limit.",
            table(_PACE_HEAD, [_pace_row(one) for one in figures if one.scenario is scenario]),
        )
        for scenario in scenarios.values()
    ]
    return paragraphs(
        "## As fast as the account allows",
        "Each way buys from an emulator of its own, all of a scenario at the same time, in real time; a prediction "
        f"takes {SERVICE_SECONDS:g} s on average (standard deviation a fifth of that). Rates and times are those after "
        "the first minute, in which the window is still empty. Nothing is downloaded. Several processes share what "
        "they know only in ours, through a Prefect server; of the others each is on its own.",
        "\n".join(f"- **{name}**: {text}." for name, text in {**WAYS, **CALLED_WAYS}.items()),
        "*Worst window* is the most requests that the API saw in any 60 s, those that it refused (*429*) included; "
        "*after its end* is how long after a prediction's end its buyer knew of it (median, 95 %): under a request "
        "limit that is mostly the wait for a request. Two minutes are counted, so a few pictures are chance.",
        *tables,
    )


_PACE_HEAD = (
    "way",
    "pictures a minute",
    "of the ceiling",
    "requests a picture",
    "worst window",
    "worst in flight",
    "429",
    "after its end",
    "reached",
)


def _pace_row(one: Figures) -> list[str]:
    name = f"{one.way}, {one.place}" if one.place else one.way
    limit = one.scenario.requests_per_minute
    reached = ""
    if one.way == ("called" if one.scenario.name[0] == "f" else "ours"):
        reached = "yes" if one.per_minute >= one.scenario.wanted and not one.over_the_limit else "**no**"
        name = f"**{name}**"
    return [
        name,
        f"{one.per_minute:.1f}",
        f"{one.share:.0%}",
        f"{one.requests_a_picture:.2f}",
        f"{one.worst_window}" + (f" of {limit}" if limit is not None else ""),
        f"{one.worst_in_flight} of {one.scenario.in_flight}",
        str(one.throttled),
        f"{one.known_after_median:.2f} s, {one.known_after_95:.2f} s",
        reached,
    ]


# ---- batches


def speed_section(runs: Sequence[Run]) -> str:
    ours, bare, copied = runs
    return paragraphs(
        "## Pictures a second, without limits",
        f"{ours.items:,} pictures, both limits off, 0.05 s a prediction; the emulator and the local S3 are processes "
        "of their own on the same machine. **ours** is a batch with its ledger, verified pictures, report and contact "
        "sheet; **bare** is a script of asyncio, httpx and boto3 that creates, polls, downloads and uploads, and "
        "writes nothing down; **copy** only downloads and uploads the same pictures, which are there already.",
        f"Wanted: ours at {WANTED_SHARE} of bare or more. Measured: **{ours.per_second / bare.per_second:.2f}** "
        f"({ours.per_second / copied.per_second:.2f} of copy).",
        table(
            ("way", "pictures a second", "CPU of its process", "of the emulator", "of S3"),
            [[run.way, f"{run.per_second:.1f}", *_cpu_of_a_picture(run)] for run in runs],
        ),
        "Requests a picture: " + "; ".join(f"**{run.way}** {_requests_of_a_picture(run)}" for run in runs) + ".",
        _where_the_rest_goes(ours, bare),
    )


def _cpu_of_a_picture(run: Run) -> list[str]:
    return [f"{seconds * 1000 / run.items:.1f} ms" for seconds in run.cpu_seconds.values()]


def _requests_of_a_picture(run: Run) -> str:
    counts = {**run.api, "download": run.downloads, **{f"S3 {name}": count for name, count in run.s3.items()}}
    return ", ".join(f"{name} {count / run.items:.2f}" for name, count in counts.items() if count >= 0.01 * run.items)


def _where_the_rest_goes(ours: Run, bare: Run) -> str:
    def more(name: str) -> str:
        return f"{(ours.cpu_seconds[name] / ours.items - bare.cpu_seconds[name] / bare.items) * 1000:+.1f} ms"

    writes = sum(count for name, count in ours.s3.items() if name.startswith("PUT")) / ours.items
    return (
        f"Where the rest goes, a picture: {writes:.1f} writes to S3 in place of one (the record before the POST, after "
        f"it, and when the picture is stored) and the look at the picture's place before it is bought are {more('S3')} "
        "of CPU in the local S3; those four more signed requests, the check of every chunk and scan line of the PNG, "
        "its SHA-256, the thumbnail, the row of the report and more connections at a time are "
        f"{more('this process')} in the process itself; the emulator: {more('emulator')}."
    )


def memory_section(runs: dict[str, Run]) -> str:
    few, many, again = runs["few"], runs["many"], runs["again"]
    named = ((f"{few.items:,} items", few), (f"{many.items:,} items", many), (f"{many.items:,} items, again", again))
    return paragraphs(
        "## Memory, and running it again",
        table(
            ("batch", "stored", "reused", "not there", "seconds", "peak memory"),
            [
                [
                    name,
                    str(run.pictures),
                    str(run.reused),
                    str(run.others),
                    f"{run.seconds:.1f}",
                    f"{run.peak_mb:.0f} MB",
                ]
                for name, run in named
            ],
        ),
        f"Peak memory: **{abs(many.peak_mb - few.peak_mb):.0f} MB** apart (wanted: less than {WANTED_APART_MB:.0f}).",
        f"Running the finished batch again: {again.seconds:.1f} s, **{sum(again.api.values())}** requests to the API "
        f"(wanted: none) and **{requests_beyond_the_report(again)}** to S3 beyond reading the last report (wanted: at "
        f"most {WANTED_REQUESTS_AGAIN}). With it: {', '.join(f'{name} {count}' for name, count in again.s3.items())}.",
    )


def document(sections: Sequence[str], *, command: str, load: Sequence[str], seconds: float) -> str:
    """The whole page."""
    now = datetime.now(timezone.utc)
    facts = (
        f"- Machine: {machine()}.",
        f"- Command: `{command}`, {seconds / 60:.0f} minutes in all.",
        f"- Load average (1, 5, 15 min) at the beginning: {load[0]}; at the end: {load[1]}.",
    )
    page = paragraphs(
        "# Benchmarks",
        f"Measured on {now:%d %B %Y} in one run, and written by it.",
        "\n".join(facts),
        "Everything runs on one machine over loopback: nothing here says how fast Eachlabs or Amazon S3 is, but what "
        "each way makes of the same service.",
        *sections,
    )
    return page + "\n"
