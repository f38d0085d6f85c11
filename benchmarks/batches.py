"""What a batch takes: pictures a second, memory, and what running it again costs."""

from __future__ import annotations

import contextlib
import csv
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from processes import S3, Emulator, Process, clean_environment, python

SPEED_ITEMS = 2_000
FEW_ITEMS, MANY_ITEMS = 1_000, 10_000
WANTED_SHARE = 0.53
WANTED_APART_MB = 50.0
WANTED_REQUESTS_AGAIN = 25


@dataclass(frozen=True)
class Run:
    """One way over one source.

    Attributes:
        cpu_seconds: By process: the one that buys, the emulator, S3.
        api: Requests to the API, by endpoint; downloads apart.
        s3: Requests to S3, by what they are about.
    """

    way: str
    items: int
    seconds: float
    pictures: int
    reused: int
    others: int
    peak_mb: float
    cpu_seconds: dict[str, float]
    api: dict[str, int]
    downloads: int
    s3: dict[str, int]
    urls: tuple[str, ...] = ()

    @property
    def per_second(self) -> float:
        return self.pictures / self.seconds


class Bench:
    """An emulator without limits and an S3, each a process of its own, for the runs of one table."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._number = 0
        flags = ["--requests-per-minute", "none", "--max-in-flight", "none", "--service-seconds", "0.05"]
        with contextlib.ExitStack() as open_:
            self.emulator = open_.enter_context(Emulator(folder, "batches", *flags, "--pictures", "plain"))
            self.s3 = open_.enter_context(S3(folder))
            self._open = open_.pop_all()

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def run(self, way: str, source: Path, items: int, prefix: str) -> Run:
        """Runs it to its end.

        Raises:
            Trouble: It failed.
        """
        self._number += 1
        before, s3_before = self.emulator.tallies(), self.s3.counts()
        cpu_before = self._servers_cpu()
        to = f"s3://{self.s3.BUCKET}/{prefix}"
        command = python("batcher.py", way, str(source), "--url", self.emulator.url, "--to", to)
        environment = clean_environment(PREFECT_HOME=str(self._folder), **self.s3.environment())
        with Process(command, self._folder, f"batcher-{self._number}-{way}", environment=environment) as process:
            answer = process.read_json()
        cpu = {name: seconds - cpu_before[name] for name, seconds in self._servers_cpu().items()}
        after = self.emulator.tallies()
        return Run(
            way=way,
            items=items,
            seconds=answer["seconds"],
            pictures=answer["pictures"],
            reused=answer.get("reused", 0),
            others=answer.get("others", 0),
            peak_mb=answer["peak_mb"],
            cpu_seconds={"this process": answer["cpu_seconds"], **cpu},
            api=_more(before["requests_by_endpoint"], after["requests_by_endpoint"], leave_out="picture"),
            downloads=after["downloads"] - before["downloads"],
            s3=_about(_more(s3_before, self.s3.counts()), f"{self.s3.BUCKET}/{prefix}/"),
            urls=tuple(answer.get("urls", ())),
        )

    def _servers_cpu(self) -> dict[str, float]:
        return {"emulator": self.emulator.process.cpu_seconds(), "S3": self.s3.process.cpu_seconds()}


def _more(before: dict[str, int], after: dict[str, int], *, leave_out: str = "") -> dict[str, int]:
    more = {name: count - before.get(name, 0) for name, count in after.items() if name != leave_out}
    return {name: count for name, count in more.items() if count}


def _about(counts: dict[str, int], prefix: str) -> dict[str, int]:
    """`PUT bucket/prefix/records` becomes `PUT records`; reading the last report is `GET report`."""
    about: Counter[str] = Counter()
    for name, count in counts.items():
        method, _, folder = name.partition(" ")
        inner = f"{folder}/".removeprefix(prefix).strip("/") or "root"
        top = inner.split("/")[0]
        about[f"{method} {top}"] += count
    return dict(sorted(about.items()))


def write_source(path: Path, items: int) -> Path:
    """A CSV of so many different prompts."""
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["id", "prompt", "shelf"])
        rows.writerows((f"item-{number:06d}", f"a still life, number {number}", number % 7) for number in range(items))
    return path


def speed(folder: Path, items: int = SPEED_ITEMS) -> list[Run]:
    """Ours, the bare script, and a mere copy of the same pictures; one after the other."""
    source = write_source(folder / "speed.csv", items)
    with Bench(folder) as bench:
        script = bench.run("bare", source, items, "bare")
        urls = folder / "urls.txt"
        urls.write_text("\n".join(script.urls))
        return [bench.run("ours", source, items, "ours"), script, bench.run("copy", urls, items, "copy")]


def memory_and_again(folder: Path, few: int = FEW_ITEMS, many: int = MANY_ITEMS) -> dict[str, Run]:
    """A small batch, a large one, and the large one again."""
    runs: dict[str, Run] = {}
    for name, items in (("few", few), ("many", many)):
        source = write_source(folder / f"{name}.csv", items)
        with Bench(folder) as bench:
            runs[name] = bench.run("ours", source, items, name)
            if name == "many":
                runs["again"] = bench.run("ours", source, items, name)
    return runs


def requests_beyond_the_report(again: Run) -> int:
    """What running it again asked of S3, but for reading the last report."""
    return sum(count for name, count in again.s3.items() if name != "GET batches")
