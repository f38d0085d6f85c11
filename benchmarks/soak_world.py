"""The soak's servers, sources and buyers: what they are, not what befalls them."""

from __future__ import annotations

import contextlib
import csv
import json
import signal
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from processes import Emulator, Process, clean_environment, python
from servers import PrefectServer
from soak_faults import ACCOUNT, BUDGET_PICTURES, EMULATOR_FLAGS, INTERRUPTED, LATE, POISON

BUCKET = "soak"
DESTINATION = f"s3://{BUCKET}/pictures"
SOURCES = 60
"""So many, who goes on by itself finds there."""
ROWS = {"pair": 150, "steady": 50}
WHOLE_BATCHES_FROM_SECONDS = 90.0
INTERRUPTED_ROWS, REPLACED_ROWS, BUDGETED_ROWS, HOPELESS_ROWS = 24, 12, BUDGET_PICTURES * 3, 18
POISONED_OF_HOPELESS, LATE_OF_HOPELESS = 4, 6
TWIN_EVERY = 20
"""So often a row wants the same picture as the row before it: two items with one input, which are two purchases."""
WIDE_ROWS, WIDE_CHARACTERS = 30, 120_000
"""A label of so many characters, and the rows of a batch do not fit into memory: they go to the disk."""
LARGEST_FILE_BYTES = 65_536
AUDIT_SECONDS = 300
RESULTS = "results.jsonl"
"""Of each life of a buyer: a file for each, because those on a full disk may not grow."""


class Wanted(NamedTuple):
    """A picture that a source asks for."""

    item_id: str
    prompt: str


class Group:
    """Sources of one kind, one after the other, and the buyers that go through them.

    Args:
        folder: Where the sources are written.
        name: Of sources, items and prompts.
        rows: Of each source.
        ids: How its items are called, when another group has the same items; its name.
        label_characters: The length of a label that each row has.
        words: Said at the end of the prompts of the first rows.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        rows: int,
        *,
        ids: str | None = None,
        label_characters: int = 0,
        words: Sequence[str] = (),
    ) -> None:
        self.name, self._folder, self._rows = name, folder, rows
        self._ids, self._words = ids or name, words
        self._label = ["x" * label_characters] if label_characters else []

    @property
    def sources(self) -> str:
        return str(self._folder / f"{self.name}-{{:03}}.csv")

    def write(self, number: int) -> None:
        """The source, if it is not there yet."""
        with contextlib.suppress(FileExistsError), Path(self.sources.format(number)).open("x", newline="") as file:
            write = csv.writer(file).writerow
            write(["id", "prompt", *["notes" for _ in self._label]])
            for wanted in self.wanted_of(number):
                write([*wanted, *self._label])

    def wanted_of(self, number: int) -> Iterator[Wanted]:
        for row in range(1, self._rows + 1):
            prompt_row = row - 1 if row % TWIN_EVERY == 0 else row
            word = f" {self._words[row - 1]}" if row <= len(self._words) else ""
            yield Wanted(f"{self._ids}-{number:03}-{row:03}", f"{self.name} {number}, picture {prompt_row}{word}")


class Buyer:
    """A process that runs batches, in one life after another.

    Args:
        world: Where it buys.
        name: What it is called.
        group: Its sources.
        disk_is_full: No file of its may grow beyond 64 KiB, and a life is one batch.
    """

    def __init__(self, world: World, name: str, group: Group, *, disk_is_full: bool = False) -> None:
        self.name, self.group, self.lives = name, group, 0
        self._world, self._disk_is_full = world, disk_is_full
        self._clock = world.folder / f"{name}.clock"
        self._state = world.folder / f"{name}.state"
        self.is_frozen = False
        self.process: Process | None = None
        self.clock_hours(0.0)

    def clock_hours(self, hours: float) -> None:
        """Its wall clock is off by so much from now on."""
        if not self._clock.exists():
            self._clock.write_bytes(bytes(8))
        with self._clock.open("r+b") as file:
            file.write(struct.pack("d", hours * 3_600))

    @property
    def at_source(self) -> int:
        """The number of the source that it is at."""
        return int(self._state.read_text()) if self._state.exists() else 1

    def begin_at(self, source: int) -> None:
        self._state.write_text(str(source))

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.is_running()

    @property
    def has_begun(self) -> bool:
        """Whether this life has come to its batch: importing takes seconds."""
        return (self._world.folder / f"{self.name}-{self.lives}" / RESULTS).exists()

    def start_at(self, number: int, *flags: str, run_id: str | None = None) -> None:
        """Its next life: one batch over one source."""
        self.begin_at(number)
        self.start(source=self.group.sources, flags=flags, run_id=run_id)

    def start(self, *, source: str | None = None, flags: tuple[str, ...] = (), run_id: str | None = None) -> None:
        """Its next life; with a source it is one batch."""
        self.reap()
        self.lives += 1
        folder = self._world.folder / f"{self.name}-{self.lives}"
        folder.mkdir()
        once = self._disk_is_full or source is not None
        for number in [self.at_source] if once else range(1, SOURCES + 1):
            self.group.write(number)
        told = {
            "name": self.name,
            "sources": self.group.sources if source is None else source,
            "to": DESTINATION,
            "state": str(self._state),
            "stop": str(self._world.stop),
            "results": str(folder / RESULTS),
            "clock": str(self._clock),
            "largest_file_bytes": LARGEST_FILE_BYTES if self._disk_is_full else None,
            "once": once,
            "flags": list(flags),
            "run_id": run_id,
            "emulator": self._world.emulator.url,
        }
        environment = clean_environment(**self._world.environment, PREFECT_HOME=str(folder), TMPDIR=str(folder))
        command = python("soak_buyer.py", json.dumps(told))
        self.process = Process(command, folder, "log", environment=environment, is_read=False)
        self.is_frozen = False

    def kill(self) -> None:
        """SIGKILL, in the middle of whatever it does."""
        if self.process is not None:
            self.process.send(signal.SIGKILL)
        self.reap()

    def interrupt(self) -> None:
        """Ctrl-C."""
        if self.process is not None:
            self.process.send(signal.SIGINT)

    def freeze(self, frozen: bool) -> None:
        if self.process is not None and frozen != self.is_frozen:
            self.process.send(signal.SIGSTOP if frozen else signal.SIGCONT)
            self.is_frozen = frozen

    def reap(self) -> None:
        if self.process is not None:
            self.freeze(False)
            self.process.end()

    def memory_mb(self) -> float:
        return 0.0 if self.process is None else self.process.memory_mb()

    def logs(self) -> Iterator[str]:
        """What each of its lives wrote."""
        for life in range(1, self.lives + 1):
            path = self._world.folder / f"{self.name}-{life}" / "log.log"
            yield path.read_text(errors="replace") if path.exists() else ""


class World:
    """Emulator, S3 server, Prefect server and buyers, each a process, all ended with the `with` block.

    Args:
        folder: For all they write.
        seed: Of all that is drawn.
        prefect_home: What the Prefect server's home begins as; empty when None.
        seconds: How long everything fails: a short soak has shorter batches.
    """

    def __init__(self, folder: Path, seed: int, prefect_home: Path | None, seconds: float) -> None:
        self.folder = folder
        self.stop = folder / "stop"
        self.accepted_before_the_last_run: int | None = None
        self.everything = ""
        sources = folder / "sources"
        sources.mkdir()
        self._ending = contextlib.ExitStack()
        with contextlib.ExitStack() as ending:
            self.emulator = ending.enter_context(Emulator(folder, "soak", "--seed", str(seed), *EMULATOR_FLAGS))
            self._s3 = ending.enter_context(
                Process(python("soak_s3.py", "--bucket", BUCKET, "--seed", str(seed)), folder, "s3")
            )
            self.s3_url = self._s3.first_line()
            self.prefect = ending.enter_context(PrefectServer(folder, "soak", home=prefect_home))
            self.prefect.wait()
            self.environment = {
                **ACCOUNT,
                "EACHLABS_BASE_URL": self.emulator.url,
                "PREFECT_API_URL": self.prefect.url,
                "AWS_ENDPOINT_URL_S3": self.s3_url,
                "AWS_ACCESS_KEY_ID": "local",
                "AWS_SECRET_ACCESS_KEY": "local",
                "AWS_REGION": "us-east-1",
                "AWS_DEFAULT_REGION": "us-east-1",
            }
            share = min(1.0, seconds / WHOLE_BATCHES_FROM_SECONDS)
            pair, steady = (Group(sources, name, round(rows * share)) for name, rows in ROWS.items())
            wide = Group(sources, "wide", WIDE_ROWS, label_characters=WIDE_CHARACTERS)
            self.pair = (Buyer(self, "A", pair), Buyer(self, "B", pair))
            self.steady = Buyer(self, "steady", steady)
            self.on_a_full_disk = Buyer(self, "full-disk", wide, disk_is_full=True)
            self.interrupted = Buyer(self, "Ctrl-C", Group(sources, INTERRUPTED, INTERRUPTED_ROWS))
            one, other, third = (
                Group(sources, f"replaced-by-{who}", REPLACED_ROWS, ids="replaced")
                for who in ("C", "D", "the-last-run")
            )
            self.replacing = (Buyer(self, "C", one), Buyer(self, "D", other))
            self.budgeted = Buyer(self, "budgeted", Group(sources, "budgeted", BUDGETED_ROWS))
            words = [POISON] * POISONED_OF_HOPELESS + [LATE] * LATE_OF_HOPELESS
            self.hopeless = Buyer(self, "hopeless", Group(sources, "hopeless", HOPELESS_ROWS, words=words))
            self.last, self._last_replacing = Buyer(self, "calm", steady), Buyer(self, "calm-replacing", third)
            for buyer in self.all_buyers:
                ending.callback(buyer.reap)
            self._ending = ending.pop_all()

    @property
    def buyers(self) -> tuple[Buyer, ...]:
        return (*self.pair, self.steady, self.on_a_full_disk)

    @property
    def scene_buyers(self) -> tuple[Buyer, ...]:
        return (self.interrupted, *self.replacing, self.budgeted, self.hopeless)

    @property
    def all_buyers(self) -> tuple[Buyer, ...]:
        return (*self.buyers, *self.scene_buyers, self.last, self._last_replacing)

    def set_faults(self, api: tuple[str, ...], *, s3: bool) -> None:
        httpx.post(f"{self.emulator.url}/_emulator/faults", json={"faults": api}, timeout=60).raise_for_status()
        httpx.post(f"{self.s3_url}/_soak", json={"on": s3}, timeout=60).raise_for_status()

    def s3_faults(self) -> dict[str, int]:
        injected: dict[str, int] = httpx.get(f"{self.s3_url}/_soak", timeout=60).json()
        return injected

    def predictions(self) -> list[dict[str, Any]]:
        """All that were ever accepted, whatever became of them."""
        answer = httpx.get(f"{self.emulator.url}/_emulator/predictions", timeout=60)
        found: list[dict[str, Any]] = answer.raise_for_status().json()
        return found

    def audit(self) -> dict[str, Any]:
        """What `prefect-eachlabs audit` says of the account and the bucket."""
        folder = self.folder / "audit"
        folder.mkdir()
        command = [sys.executable, "-m", "prefect_eachlabs", "audit", DESTINATION, "--json"]
        environment = clean_environment(**self.environment, PREFECT_HOME=str(folder), TMPDIR=str(folder))
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, timeout=AUDIT_SECONDS, check=False)
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def _begun(self, buyers: Iterable[Buyer]) -> Iterator[tuple[Group, int]]:
        """The groups that some of these buyers have begun, and the last source that they were at."""
        begun = Counter[Group]()
        for buyer in buyers:
            if buyer.lives:
                begun[buyer.group] = max(begun[buyer.group], buyer.at_source)
        yield from begun.items()

    def wanted(self) -> list[Wanted]:
        """The rows of every source that was begun, but for those that were replaced."""
        buyers = [buyer for buyer in (*self.buyers, *self.scene_buyers) if buyer not in self.replacing]
        return [row for group, last in self._begun(buyers) for n in range(1, last + 1) for row in group.wanted_of(n)]

    def replaced(self) -> tuple[list[Wanted], list[Wanted]]:
        """Rows that runs replaced against each other, as those runs wanted them; and as the last run wants them."""
        texts: list[Wanted] = []
        last = 0
        for group, number in self._begun(self.replacing):
            texts += [row for n in range(1, number + 1) for row in group.wanted_of(n)]
            last = max(last, number)
        return texts, [row for n in range(1, last + 1) for row in self._last_replacing.group.wanted_of(n)]

    def start_the_last_run(self, wanted: list[Wanted], replaced: list[Wanted]) -> tuple[Buyer, ...]:
        """One more run of everything at once, with what failed for good tried again; and one that replaces anew."""
        self.accepted_before_the_last_run = int(self.emulator.tallies()["billed"])
        self.everything = self._written("everything", wanted)
        self.last.start(source=self.everything, flags=("--retry-failed",))
        if not replaced:
            return (self.last,)
        self._last_replacing.start(source=self._written("replaced", replaced), flags=("--replace",))
        return (self.last, self._last_replacing)

    def _written(self, name: str, rows: list[Wanted]) -> str:
        source = self.folder / f"{name}.csv"
        with source.open("w", newline="") as file:
            csv.writer(file).writerows([("id", "prompt"), *rows])
        return str(source)

    def batches(self) -> list[dict[str, Any]]:
        """Batches in the order of their beginnings: buyer, source, run_id, and how many orders had been taken then.

        Those that came to an end have its exit status, what it printed, and the buyer's memory.
        """
        begun: dict[str, dict[str, Any]] = {}
        for path in self.folder.glob(f"*/{RESULTS}"):
            for line in map(json.loads, path.read_text().splitlines()):
                begun.setdefault(line["batch"], {}).update(line)
        return sorted(begun.values(), key=lambda one: (int(one["accepted"]), float(one["began"])))

    def tracebacks(self) -> list[str]:
        """What buyers wrote that looks like an error of ours: each with who wrote it."""
        found = []
        for buyer in self.all_buyers:
            for life, text in enumerate(buyer.logs(), start=1):
                _, *rest = text.split("Traceback (most recent call last)")
                found += [f"{buyer.name}, life {life}: {one[:4_000]}" for one in rest]
        return found

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.close()
