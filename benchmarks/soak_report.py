"""The soak's table, for a terminal and as docs/soak.md."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone

import report
from soak_faults import (
    API_FAULTS,
    BUDGET_PICTURES,
    CLAIM_SECONDS,
    FILE_FAULTS,
    MAX_IN_FLIGHT,
    REQUESTS_PER_MINUTE,
    SERVICE_SECONDS,
    SETTLING_SECONDS,
)
from soak_judge import Verdict
from soak_s3 import KINDS

from prefect_eachlabs.testing.emulator.faults import Fault, kinds_of

Row = tuple[str, str]

WHERE = {
    "create": "API, POST",
    "get": "API, GET",
    "executions": "API, executions",
    "cancel": "API, cancel",
    "prediction": "API, predictions",
    "picture": "file host",
}


@dataclass(frozen=True)
class Soaked:
    """What a run was, beside its verdict."""

    minutes: float
    seed: int
    whole_minutes: float
    last_run_seconds: float
    exit_statuses: Mapping[int, int]
    full_disk_ends: str
    memory_mb: tuple[float, float]
    """Of the buyer that is never killed: after its first minute (or quarter), and at the end."""
    memory_after_batches_mb: Sequence[float]
    """Of the same, after each of its batches."""
    load: tuple[str, str]


@dataclass(frozen=True)
class Injected:
    """How often each kind of fault happened, counted where it was injected."""

    emulator: Mapping[str, int]
    s3: Mapping[str, int]
    processes: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(sum(one.values()) for one in (self.emulator, self.s3, self.processes))

    def rows(self) -> list[Row]:
        """Where and what, and how often."""
        rows: list[Row] = []
        given = {fault.name: fault for fault in reversed([*map(Fault.parse, (*API_FAULTS, *FILE_FAULTS))])}
        for endpoint, where in WHERE.items():
            for kind, told in kinds_of(endpoint).items():
                if count := self.emulator.get(f"{endpoint}:{kind}"):
                    rows.append((f"{where}: {_described(told, given[f'{endpoint}:{kind}'])}", f"{count:,}"))
        rows += [(f"S3: {KINDS[kind]}", f"{count:,}") for kind, count in sorted(self.s3.items())]
        return rows + [(kind, f"{count:,}") for kind, count in self.processes.items()]

    def sums(self) -> list[Row]:
        """By where it was."""
        api = sum(count for name, count in self.emulator.items() if not name.startswith("picture:"))
        rows = [("API", api), ("file host", sum(self.emulator.values()) - api), ("S3", sum(self.s3.values()))]
        rows += self.processes.items()
        return [(f"faults injected: {name}", f"{count:,}") for name, count in rows]


def _described(told: str, fault: Fault) -> str:
    """What the emulator says of a kind, with the numbers that were asked for."""
    told = told.replace("(`status`, ", "(")
    for word, given in (("seconds", fault.seconds and f"{fault.seconds:g} s"), ("value", fault.value)):
        if given:
            told = re.sub(rf"`{word}`( \([^)]*\))?", str(given), told)
    return told.replace("`", "")


def results(verdict: Verdict, soaked: Soaked) -> list[Row]:
    """What came of it; those that must be 0 say so."""
    first, last = soaked.memory_mb
    after = ", ".join(f"{one:.0f}" for one in soaked.memory_after_batches_mb)
    ends = ", ".join(f"{count} with {status}" for status, count in sorted(soaked.exit_statuses.items()))
    return [
        ("pictures wanted", f"{verdict.wanted:,}"),
        ("pictures stored, read back and verified", f"{verdict.stored:,}"),
        (
            "left to a person: two lost orders left no trace, or a list later than settling shows one",
            f"{verdict.left_open:,}",
        ),
        ("orders that the API accepted", f"{verdict.accepted:,}"),
        ("of them billed (the others failed or were cancelled)", f"{verdict.billed:,}"),
        ("of them replaced by another text, as was asked", f"{verdict.replaced:,}"),
        ("of them one too many, under a list that is later than settling", f"{verdict.once_too_many:,}"),
        *((f"{name} (must be 0)", f"{count:,}") for name, count in verdict.must_be_zero.items()),
        (f"most requests in any 60 s (limit {REQUESTS_PER_MINUTE})", f"{verdict.worst_window:,}"),
        (f"most predictions in flight (limit {MAX_IN_FLIGHT})", f"{verdict.worst_in_flight:,}"),
        ("memory of the buyer that is never killed, at the start", f"{first:.0f} MB"),
        ("the same at the end", f"{last:.0f} MB"),
        ("the same after each of its batches", f"{after or 'none'} MB"),
        ("batches that came to an end, by exit status", ends or "none"),
        ("lives on a full disk ended with", soaked.full_disk_ends),
        ("the last calm run", f"{soaked.last_run_seconds:.0f} s"),
    ]


def as_text(rows: Sequence[Row]) -> str:
    """Aligned, for a terminal."""
    name_width = max(len(name) for name, _ in rows)
    value_width = max(len(value) for _, value in rows)
    return "\n".join(f"  {name:<{name_width}}  {value:>{value_width}}" for name, value in rows)


def document(verdict: Verdict, injected: Injected, soaked: Soaked) -> str:
    """The whole page."""
    now, took = datetime.now(timezone.utc), f"{soaked.whole_minutes:.0f} minutes in all"
    facts = (
        f"- Machine: {report.machine()}.",
        f"- Command: `make soak`, seed {soaked.seed}: {soaked.minutes:g} minutes of faults, {took}.",
        f"- Load average (1, 5, 15 min) at the beginning: {soaked.load[0]}; at the end: {soaked.load[1]}.",
    )
    page = report.paragraphs(
        "# Soak: faults in numbers",
        f"Measured on {now:%d %B %Y} in one run, and written by it.",
        "\n".join(facts),
        "Two buyers go through the same batches at the same time and are killed with SIGKILL in turn; a third one is "
        "never killed; a fourth one lives on a full disk: no file of its may grow beyond 64 KiB. Each runs "
        "`prefect-eachlabs batch SOURCE --to s3://...` for one source after another. All share the account's limits "
        f"through a Prefect server on SQLite ({REQUESTS_PER_MINUTE} requests a minute, {MAX_IN_FLIGHT} in flight), "
        "which is restarted and crashes; buyers freeze, and their wall clocks jump. The emulator of the API, whose own "
        "clock is an hour and a half off, its file host and the local S3 server fail at rates. "
        f"A prediction takes {SERVICE_SECONDS:g} s on average; claims live {CLAIM_SECONDS} s, settling takes "
        f"{SETTLING_SECONDS} s. Every twentieth row wants the same input as the row before it. Then faults stop, and "
        "one last run of all rows must find or buy what is missing.",
        "Beside them two scenes at a time are played: a batch gets Ctrl-C at any moment of its life, is run again, and "
        "gets it again; two batches with other texts for the same items run with `--replace` over each other; a batch "
        f"has a budget of {BUDGET_PICTURES} pictures, is killed twice and is run again as the same run; a batch has "
        "rows whose orders are answered 500 for ever, and rows whose orders are listed 45 s late (much later than "
        "settling, which the promise excludes: such an item may be ordered once more, and never twice more).",
        "Money is counted on the API's side alone: what the emulator billed, prompt by prompt, against the pictures "
        "in the bucket, byte for byte as they were sold. A report's cost must be that bill (what it says it does not "
        "know yet apart), and `prefect-eachlabs audit` must come to the same sums and names. "
        "Exit statuses, and memory after a batch, are what a buyer says of itself.",
        "## What came of it",
        report.table(("", ""), results(verdict, soaked)),
        f"## What was injected: {injected.total:,} faults",
        "Counted where they were injected.",
        report.table(("fault", "times"), injected.rows()),
    )
    return page + "\n"
