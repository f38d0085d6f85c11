"""How fast three ways of buying are under an account's limits: each against an emulator of its own, in real time."""

from __future__ import annotations

import contextlib
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from processes import Emulator, Process, Trouble, clean_environment, free_port, python
from servers import postgres, prefect_server

WAYS = {
    "vendor": "the vendor's loop: a thread for each in flight, asking once a second",
    "plain": "plain asyncio: a semaphore, asking every 2 s",
    "ours": "prefect-eachlabs",
}
CALLED_WAYS = {
    "called": "the same with webhooks: one process receives for itself, several through `webhooks serve` and a server",
    "uncalled": "with webhooks, and no call ever comes",
    "badly called": "with webhooks, of whose calls a tenth is lost, a fifth comes twice, and a fifth after forged ones",
}
BADLY = ("webhook:lost=0.1", "webhook:twice=0.2", "webhook:forged=0.2")
WEBHOOK_SECRET = "the benchmark's secret of orders' secrets"
HEAD_START_SECONDS = 60.0
SERVICE_SECONDS = 5.0


@dataclass(frozen=True)
class Scenario:
    """An account and its limits.

    Attributes:
        ceiling: Pictures a minute that nobody can exceed.
        because: Why not.
        wanted: What ours is to reach, pictures a minute.
    """

    name: str
    title: str
    ceiling: float
    because: str
    wanted: float
    requests_per_minute: int | None = 60
    in_flight: int = 10
    has_executions: bool = True
    processes: int = 1
    minutes: float = 3.0

    def emulator_flags(self) -> list[str]:
        limit = "none" if self.requests_per_minute is None else str(self.requests_per_minute)
        flags = ["--requests-per-minute", limit, "--max-in-flight", str(self.in_flight), "--pictures", "plain"]
        flags += ["--service-seconds", f"{SERVICE_SECONDS:g}"]
        return flags if self.has_executions else [*flags, "--fault", "executions:missing"]


ONE_SWEEP_FOR_TEN = 60 * 10 / 11
SCENARIOS = {
    "a": Scenario(
        "a",
        "60 requests a minute, 10 in flight",
        ONE_SWEEP_FOR_TEN,
        "one request for the executions tells of ten ends at most: 60 × 10/11",
        53.0,
    ),
    "b": Scenario(
        "b",
        "60 requests a minute, 10 in flight, without executions",
        30.0,
        "a create and a question each: 60 / 2",
        29.0,
        has_executions=False,
    ),
    "c": Scenario(
        "c",
        "no request limit, 10 in flight",
        10 * 60 / SERVICE_SECONDS,
        "ten in flight for 5 s each: 10 × 60/5",
        114.0,
        requests_per_minute=None,
    ),
    "d": Scenario(
        "d",
        "600 requests a minute, 100 in flight",
        600 * 100 / 101,
        "one request for the executions tells of a hundred ends at most: 600 × 100/101",
        0.9 * 600 * 100 / 101,
        requests_per_minute=600,
        in_flight=100,
    ),
    "e2": Scenario(
        "e2",
        "60 requests a minute, 10 in flight, two processes",
        ONE_SWEEP_FOR_TEN,
        "as for (a)",
        45.0,
        processes=2,
    ),
    "e4": Scenario(
        "e4",
        "60 requests a minute, 10 in flight, four processes",
        ONE_SWEEP_FOR_TEN,
        "as for (a)",
        40.0,
        processes=4,
    ),
    "f1": Scenario(
        "f1",
        "60 requests a minute, 10 in flight, with webhooks",
        60.0,
        "every request buys",
        57.0,
    ),
    "f2": Scenario(
        "f2",
        "the same, two processes over one server and one receiver",
        60.0,
        "every request buys",
        54.0,
        processes=2,
    ),
    "f4": Scenario(
        "f4",
        "the same, four processes",
        60.0,
        "every request buys",
        54.0,
        processes=4,
    ),
    "fn": Scenario(
        "fn",
        "no request limit, 10 in flight, with webhooks",
        10 * 60 / SERVICE_SECONDS,
        "ten in flight for 5 s each: 10 × 60/5",
        114.0,
        requests_per_minute=None,
    ),
}


@dataclass(frozen=True)
class Figures:
    """What became of one way in one scenario; rates are those after the head start."""

    scenario: Scenario
    way: str
    place: str
    per_minute: float
    requests_a_picture: float
    worst_window: int
    worst_in_flight: int
    throttled: int
    known_after_median: float
    known_after_95: float
    pictures: int
    minutes: float

    @property
    def share(self) -> float:
        return self.per_minute / self.scenario.ceiling

    @property
    def over_the_limit(self) -> bool:
        limit = self.scenario.requests_per_minute
        over = limit is not None and self.worst_window > limit
        return over or self.worst_in_flight > self.scenario.in_flight or self.throttled > 0


@dataclass
class Entrant:
    """One way in one scenario: its emulator and its processes."""

    scenario: Scenario
    way: str
    place: str
    emulator: Emulator
    buyers: list[Process]

    def judge(self, began: float, seconds: float) -> Figures:
        """Waits for its processes, then asks the emulator what it saw.

        Raises:
            Trouble: A process failed.
        """
        known: dict[str, float] = {}
        for buyer in self.buyers:
            known.update(buyer.read_json()["known"])
        tallies, journal = self.emulator.tallies(), self.emulator.journal()
        ends = _ends(journal, self.emulator.executions())
        head_start = min(HEAD_START_SECONDS, seconds / 2)
        first, last = began + head_start, began + seconds
        in_time = [prediction_id for prediction_id, at in known.items() if first <= at < last]
        requests = sum(first <= entry["at"] < last for entry in journal)
        late = sorted(known[prediction_id] - ends[prediction_id] for prediction_id in in_time)
        minutes = (last - first) / 60
        return Figures(
            scenario=self.scenario,
            way=self.way,
            place=self.place,
            per_minute=len(in_time) / minutes,
            requests_a_picture=requests / len(in_time) if in_time else math.nan,
            worst_window=tallies["worst_window"],
            worst_in_flight=tallies["worst_in_flight"],
            throttled=tallies["rejected_429"],
            known_after_median=statistics.median(late) if late else math.nan,
            known_after_95=late[math.ceil(0.95 * len(late)) - 1] if late else math.nan,
            pictures=len(in_time),
            minutes=minutes,
        )


def _ends(journal: Sequence[dict[str, Any]], executions: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Prediction id -> when it ended, by the clock that all processes share; the listing has dates, to the ms."""
    if not journal:
        return {}
    offset = journal[0]["at"] - _timestamp(journal[0]["wall"])
    return {row["id"]: _timestamp(row["completed_at"]) + offset for row in executions if row["completed_at"]}


def _timestamp(date: str) -> float:
    return datetime.fromisoformat(date.replace("Z", "+00:00")).timestamp()


@dataclass(frozen=True)
class Entry:
    """A way to be run in a scenario; with the URL of a Prefect server, its processes share the limits there."""

    scenario: Scenario
    way: str
    place: str = ""
    prefect_api_url: str | None = None


def run_side_by_side(entries: Sequence[Entry], folder: Path, seconds: float) -> list[Figures]:
    """Runs all of them at the same time, each against an emulator of its own.

    Raises:
        Trouble: A process failed; says what it wrote.
    """
    with contextlib.ExitStack() as open_:
        entrants = [_enter(entry, folder, open_, number) for number, entry in enumerate(entries)]
        buyers = [buyer for entrant in entrants for buyer in entrant.buyers]
        for buyer in buyers:
            if (word := buyer.read_line()) != "ready":
                raise Trouble(f"{buyer.name} said {word!r}")
        began = time.monotonic()
        for buyer in buyers:
            buyer.tell(f"go {seconds}")
        return [entrant.judge(began, seconds) for entrant in entrants]


def _enter(entry: Entry, folder: Path, open_: contextlib.ExitStack, number: int) -> Entrant:
    scenario = entry.scenario
    name = f"{number}-{scenario.name}-{entry.way.replace(' ', '-')}"
    faults = {"uncalled": ("webhook:lost",), "badly called": BADLY}.get(entry.way, ())
    flags = [*scenario.emulator_flags(), *(word for fault in faults for word in ("--fault", fault))]
    emulator = open_.enter_context(Emulator(folder, name, *flags))
    command = python(
        "buyer.py",
        "ours" if entry.way in CALLED_WAYS else entry.way,
        *("--url", emulator.url),
        *("--requests-per-minute", str(scenario.requests_per_minute or 0)),
        *("--in-flight", str(scenario.in_flight)),
        # Limits of their own on the server that is shared by several scenarios.
        *("--account", f"benchmark-{number}-{scenario.name}"),
    )
    environment = clean_environment(PREFECT_HOME=str(folder))
    if entry.prefect_api_url is not None:
        environment["PREFECT_API_URL"] = entry.prefect_api_url
    if entry.way in CALLED_WAYS:
        environment |= _called(environment, folder, open_, name, by_events=scenario.processes > 1)
    buyers = [
        open_.enter_context(Process(command, folder, f"buyer-{name}-{index}", environment=environment))
        for index in range(scenario.processes)
    ]
    return Entrant(scenario, entry.way, entry.place, emulator, buyers)


def _called(
    environment: dict[str, str], folder: Path, open_: contextlib.ExitStack, name: str, *, by_events: bool
) -> dict[str, str]:
    """What a buyer is told of webhooks: a port of its own, or that of a receiver that emits events."""
    port = free_port()
    told = {"EACHLABS_WEBHOOK_URL": f"http://127.0.0.1:{port}", "EACHLABS_WEBHOOK_SECRET": WEBHOOK_SECRET}
    if not by_events:
        return {**told, "EACHLABS_WEBHOOK_LISTEN": f"127.0.0.1:{port}"}
    command = [sys.executable, "-m", "prefect_eachlabs", "webhooks", "serve", "--port", str(port)]
    receiver = Process(command, folder, f"receiver-{name}", environment={**environment, **told})
    open_.enter_context(receiver).first_line()
    return told


@contextlib.contextmanager
def prefect_servers(folder: Path) -> Iterator[dict[str, str]]:
    """A Prefect server on each database there is: name -> URL."""
    with contextlib.ExitStack() as open_:
        urls = {"SQLite": open_.enter_context(prefect_server(folder, "sqlite"))}
        try:
            database_url = open_.enter_context(postgres())
        except Trouble as trouble:
            print(f"Without PostgreSQL: {trouble}", flush=True)
        else:
            urls["PostgreSQL"] = open_.enter_context(prefect_server(folder, "postgresql", database_url=database_url))
        yield urls
