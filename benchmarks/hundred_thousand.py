"""One batch of 100,000 rows over two workers on PostgreSQL, one machine of which dies half-way; and what it took.

    python benchmarks/hundred_thousand.py --rows 10000 --figures few.json       a tenth of it, for the memory beside
    python benchmarks/hundred_thousand.py --beside few.json --output docs/benchmarks.md

Everything is a process of its own: PostgreSQL, Prefect's server, the workers and their runs, the emulator without
limits, and SeaweedFS for S3, which costs less CPU than the local S3. `--output` writes the section into that page, in
the place of the one that stands there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import report
from batches import write_source
from processes import HERE, Emulator, Process, Trouble, clean_environment, free_port
from servers import PrefectServer, postgres, postgres_folder

sys.path.insert(0, str(HERE.parent))
from prefect_eachlabs.storage.s3_client import client_of
from tests.seaweed import SeaweedFS

COMMAND = ["python", "benchmarks/hundred_thousand.py"]
ROWS = 100_000
CHUNK_SIZE = 100
SERVICE_SECONDS = 0.05
BUCKET = "benchmarks"
BATCH = "hundred"
DESTINATION = f"s3://{BUCKET}/{BATCH}"
SOURCE = f"s3://{BUCKET}/tables/{BATCH}.csv"
DEPLOYMENT = "generate-batch/generate-batch"
LOOK_SECONDS = 5.0
SHOWN_EVERY_SECONDS = 60.0
OURS = ("the first run", "the share's run", "worker 1", "worker 2")
ENDS = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
DATABASE_SIZE = "select pg_database_size('postgres')"
LARGEST_TABLES = (
    "select relname, pg_total_relation_size(oid) from pg_class where relkind = 'r' and relnamespace = "
    "'public'::regnamespace order by 2 desc limit 4"
)


@dataclass
class Command:
    """What a command of the terminal took.

    Attributes:
        api, s3: Requests, by what they are.
    """

    seconds: float
    peak_mb: float
    answer: dict[str, Any]
    api: dict[str, int]
    s3: dict[str, int]


@dataclass
class Figures:
    """Of one run of this script."""

    rows: int
    command: str
    seconds: float = 0.0
    killed_at: int = 0
    state: str = ""
    report: dict[str, Any] = field(default_factory=dict)
    report_bytes: int = 0
    billed: int = 0
    billed_too_often: int = 0
    billed_usd: float = 0.0
    peak_mb: dict[str, float] = field(default_factory=dict)
    cpu_seconds: dict[str, float] = field(default_factory=dict)
    api: dict[str, int] = field(default_factory=dict)
    s3: dict[str, int] = field(default_factory=dict)
    task_runs: int = 0
    artifacts: int = 0
    database_mb: list[float] = field(default_factory=list)
    tables_mb: dict[str, float] = field(default_factory=dict)
    page_mb: float = 0.0
    page_seconds: dict[str, float] = field(default_factory=dict)
    dry_run: Command | None = None
    again: Command | None = None
    audit: Command | None = None
    load: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What happened besides, told below the figures."""

    @property
    def commands(self) -> dict[str, Command]:
        named = {"dry run": self.dry_run, "run again": self.again, "audit": self.audit}
        return {name: one for name, one in named.items() if one is not None}

    @property
    def peaks_mb(self) -> dict[str, float]:
        return {**self.peak_mb, **{name: one.peak_mb for name, one in self.commands.items()}}


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


# ---- S3


class Seaweed:
    """SeaweedFS with its metrics, which count its requests."""

    def __init__(self, folder: Path) -> None:
        found = shutil.which("weed") or Path(sys.executable).parent / "weed"
        self._metrics = free_port()
        flags = (f"-metricsPort={self._metrics}",)
        self.store = SeaweedFS(Path(found), folder, bucket=BUCKET, flags=flags)

    def __enter__(self) -> Seaweed:
        self.store.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.store.stop()

    @property
    def client(self) -> Any:
        return client_of(self.store.access)

    def counts(self) -> dict[str, int]:
        """Requests so far, by kind: `PUT`, `HEAD`, `LIST`."""
        counts: Counter[str] = Counter()
        said = httpx.get(f"http://127.0.0.1:{self._metrics}/metrics", timeout=30).text
        for line in said.splitlines():
            if line.startswith("SeaweedFS_s3_request_total{"):
                facts, _, count = line.partition("{")[2].partition("} ")
                kind = facts.partition('type="')[2].partition('"')[0]
                counts[kind] += round(float(count))
        return dict(counts)

    def body(self, key: str) -> bytes:
        body: bytes = self.client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
        return body


# ---- processes


def parent_of(pid: int) -> int:
    """0 when there is no such process."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def with_descendants(pid: int) -> set[int]:
    parents = {int(one.name): parent_of(int(one.name)) for one in Path("/proc").glob("[0-9]*")}
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


class Watch:
    """Peak memory and CPU of processes, by what they are called."""

    def __init__(self) -> None:
        self.peak_mb: dict[str, float] = {}
        self._cpu: dict[str, dict[int, float]] = {}
        self._names: dict[int, str] = {}
        self._trees: dict[str, int] = {}

    @property
    def cpu_seconds(self) -> dict[str, float]:
        return {name: sum(seconds.values()) for name, seconds in self._cpu.items()}

    def add(self, name: str, pid: int) -> None:
        """One process: its own peak, as the kernel notes it; of several of that name the highest."""
        self._names[pid] = name

    def add_tree(self, name: str, pid: int) -> None:
        """A process and all that it starts: the most that they had at once, shared memory shared out."""
        self._trees[name] = pid

    def look(self) -> None:
        for pid, name in self._names.items():
            self._see(name, pid, self._field(pid, "status", "VmHWM:"))
        for name, first in self._trees.items():
            pids = with_descendants(first)
            self.peak_mb[name] = max(
                self.peak_mb.get(name, 0.0), sum(self._field(pid, "smaps_rollup", "Pss:") for pid in pids)
            )
            for pid in pids:
                self._see(name, pid, 0.0)

    def _see(self, name: str, pid: int, peak_mb: float) -> None:
        self.peak_mb[name] = max(self.peak_mb.get(name, 0.0), peak_mb)
        with contextlib.suppress(OSError):
            ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
            self._cpu.setdefault(name, {})[pid] = sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")

    @staticmethod
    def _field(pid: int, file: str, name: str) -> float:
        try:
            lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
        except OSError:
            return 0.0
        return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(name)), 0.0)


class Stage:
    """The servers of a run, and what is asked of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.watch = Watch()
        self.workers: list[Process] = []
        (folder / "s3").mkdir()
        (folder / "home").mkdir()
        flags = ["--requests-per-minute", "none", "--max-in-flight", "none", "--pictures", "plain"]
        with contextlib.ExitStack() as open_:
            self.s3 = open_.enter_context(Seaweed(folder / "s3"))
            self.database_url = open_.enter_context(postgres())
            self.emulator = open_.enter_context(
                Emulator(folder, "hundred", *flags, "--service-seconds", str(SERVICE_SECONDS))
            )
            self.server = open_.enter_context(PrefectServer(folder, "hundred", database_url=self.database_url))
            self.server.wait()
            self._open = open_.pop_all()
        self.watch.add("emulator", self.emulator.process.pid)
        self.watch.add("SeaweedFS", self.s3.store.pid)
        self.watch.add_tree("Prefect server", self.server.process.pid)
        self.watch.add_tree("PostgreSQL", self._postmaster())

    def _postmaster(self) -> int:
        port = self.database_url.rpartition(":")[2].partition("/")[0].encode()
        for one in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (one / "cmdline").read_bytes().split(b"\0")
                if words[0].endswith(b"/postgres") and port in words:
                    return int(one.name)
        raise Trouble("PostgreSQL is not to be found")

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers:
            if worker.is_running():
                worker.send(signal.SIGTERM, to_all=True)
            worker.end()
        self._open.close()

    def environment(self, **more: str) -> dict[str, str]:
        return clean_environment(
            **self.s3.store.environment(),
            EACHLABS_API_KEY="a-benchmark-key",
            EACHLABS_BASE_URL=self.emulator.url,
            EACHLABS_REQUESTS_PER_MINUTE="none",
            EACHLABS_MAX_IN_FLIGHT="none",
            EACHLABS_REFERENCE_ROOTS=f"s3://{BUCKET}/tables",
            PREFECT_HOME=str(self.folder / "home"),
            PREFECT_API_URL=self.server.url,
            PREFECT_LOGGING_LEVEL="INFO",
            PYTHONPATH=str(HERE.parent),
            **more,
        )

    def start_worker(self) -> Process:
        name = f"worker {len(self.workers) + 1}"
        words = ["-m", "prefect", "worker", "start", "--pool", "eachlabs", "--limit", "1", "--name", name]
        worker = Process(
            [sys.executable, *words],
            self.folder,
            name.replace(" ", "-"),
            environment=self.environment(PREFECT_WORKER_QUERY_SECONDS="2"),
            is_read=False,
        )
        self.workers.append(worker)
        self.watch.add(name, worker.pid)
        return worker

    def command(self, *words: str) -> Command:
        """`prefect-eachlabs ...`: how long it took, its memory, and what it asked for.

        Raises:
            Trouble: It failed.
        """
        api, s3, began = self.api(), self.s3.counts(), time.monotonic()
        said = self.folder / "said.txt"
        with said.open("wb") as out, (self.folder / "errors.txt").open("wb") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", "prefect_eachlabs", *words],
                cwd=self.folder,
                env=self.environment(),
                stdout=out,
                stderr=errors,
            )
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.monotonic() - began
        if process.returncode not in (0, 1):  # 1: it says itself what is missing
            raise Trouble(
                f"{shlex.join(words)} ended with {process.returncode}: {said.read_text()[-2_000:]}\n"
                f"{(self.folder / 'errors.txt').read_text()[-2_000:]}"
            )
        text = said.read_text()
        answer = json.loads(text) if text.startswith("{") else {}
        return Command(seconds, used.ru_maxrss / 1024, answer, more(api, self.api()), more(s3, self.s3.counts()))

    def api(self) -> dict[str, int]:
        counts: dict[str, int] = self.emulator.tallies()["requests_by_endpoint"]
        return counts

    def ask(self, method: str, path: str, body: object = None) -> Any:
        answer = httpx.request(method, f"{self.server.url}{path}", json=body, timeout=60)
        answer.raise_for_status()
        return answer.json()

    def query(self, query: str) -> list[list[str]]:
        programs, url = postgres_folder(), self.database_url.replace("+asyncpg", "")
        assert programs is not None, "it runs"
        command = [str(programs / "psql"), "-AtX", "-F", " ", url, "-c", query]
        answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return [line.split() for line in answer.splitlines()]

    def database_mb(self) -> float:
        return int(self.query(DATABASE_SIZE)[0][0]) / 2**20

    def processes_of(self, run_id: str) -> list[int]:
        """The processes in which a worker runs a flow run: one that looks after it, and the one that does the work."""
        wanted = f"PREFECT__FLOW_RUN_ID={run_id}".encode()
        found: list[int] = []
        for one in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if wanted in (one / "environ").read_bytes().split(b"\0"):
                    found.append(int(one.name))
        return found

    def cut_power(self, run_id: str) -> str:
        """SIGKILL to the worker that has this run, and to all that it has started."""
        processes = set(self.processes_of(run_id))
        for number, worker in enumerate(self.workers, start=1):
            pids = with_descendants(worker.pid)
            if processes & pids:
                for pid in pids:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                return f"worker {number}"
        raise Trouble(f"no worker has the run {run_id}")


def more(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    counts = {name: count - before.get(name, 0) for name, count in sorted(after.items())}
    return {name: count for name, count in counts.items() if count}


# ---- the run


def measure(figures: Figures, folder: Path) -> None:
    figures.load.append(report.load_average())
    with Stage(folder) as stage:
        table = write_source(folder / "table.csv", figures.rows)
        stage.s3.client.upload_file(str(table), BUCKET, "tables/hundred.csv")
        stage.command("setup", "--destination", DESTINATION, "--deploy")
        figures.database_mb.append(stage.database_mb())
        figures.dry_run = stage.command("batch", SOURCE, "--to", DESTINATION, "--dry-run", "--json")
        say(f"dry run: {figures.dry_run.seconds:.1f} s, {figures.dry_run.peak_mb:.0f} MB")
        buy(stage, figures)
        look_at_the_server(stage, figures)
        look_at_the_report(stage, figures)
        for name, words in (
            ("again", ("batch", SOURCE, "--to", DESTINATION, "--json")),
            ("audit", ("audit", DESTINATION, "--json")),
        ):
            command = stage.command(*words)
            setattr(figures, name, command)
            say(f"{name}: {command.seconds:.1f} s, {command.peak_mb:.0f} MB, {command.api}, {command.s3}")
    figures.load.append(report.load_average())


def buy(stage: Stage, figures: Figures) -> None:
    """Both workers, the death of the second one's machine half-way, and the end."""
    for _ in range(2):
        stage.start_worker()
    api, s3, began = stage.api(), stage.s3.counts(), time.monotonic()
    deployment = stage.ask("GET", f"/deployments/name/{DEPLOYMENT}")
    parameters = {"source": SOURCE, "destination": DESTINATION, "shards": 2, "chunk_size": CHUNK_SIZE}
    body = {"parameters": parameters, "state": {"type": "SCHEDULED"}}
    run_id = str(stage.ask("POST", f"/deployments/{deployment['id']}/create_flow_run", body)["id"])
    runs = {run_id: "the first run"}
    shown_at = began
    while True:
        time.sleep(LOOK_SECONDS)
        now = time.monotonic()
        for one in shares(stage):
            runs.setdefault(one, "the share's run")
        for one, name in runs.items():
            for process in stage.processes_of(one):
                stage.watch.add(name, process)
        stage.watch.look()
        billed = stage.emulator.tallies()["billed"]
        if now - shown_at >= SHOWN_EVERY_SECONDS:
            shown_at = now
            memory = ", ".join(f"{name} {mb:.0f} MB" for name, mb in stage.watch.peak_mb.items())
            say(f"{billed:,} bought in {now - began:.0f} s; {memory}")
        if not figures.killed_at and billed >= figures.rows // 2 and len(runs) == 2:
            share = next(one for one, name in runs.items() if one != run_id)
            say(f"{stage.cut_power(share)} loses its power at {billed:,} pictures")
            figures.killed_at = billed
        run = stage.ask("GET", f"/flow_runs/{run_id}")
        if run["state"]["type"] in ENDS:
            break
    figures.seconds, figures.state = time.monotonic() - began, run["state"]["type"]
    say(f"{figures.state} after {figures.seconds:.0f} s: {run['state']['message']}")
    if figures.state not in ("COMPLETED", "FAILED"):  # Failed: rows without a picture, which the report names
        raise Trouble(f"the batch ended as {figures.state}: {run['state']['message']}")
    figures.api, figures.s3 = more(api, stage.api()), more(s3, stage.s3.counts())
    figures.peak_mb, figures.cpu_seconds = stage.watch.peak_mb, stage.watch.cpu_seconds
    tallies = stage.emulator.tallies()
    figures.billed, figures.billed_usd = tallies["billed"], tallies["cost_usd"]
    figures.billed_too_often = tallies["billed_too_often"]


def shares(stage: Stage) -> list[str]:
    wanted = {"flow_runs": {"name": {"like_": "share 2/2"}}}
    return [str(run["id"]) for run in stage.ask("POST", "/flow_runs/filter", wanted)]


def look_at_the_server(stage: Stage, figures: Figures) -> None:
    figures.task_runs = stage.ask("POST", "/task_runs/count", {})
    figures.artifacts = stage.ask("POST", "/artifacts/count", {})
    figures.database_mb.append(stage.database_mb())
    figures.tables_mb = {name: int(size) / 2**20 for name, size in stage.query(LARGEST_TABLES)}


def look_at_the_report(stage: Stage, figures: Figures) -> None:
    """The report has every row, and its page opens."""
    place = f"{BATCH}/batches/{BATCH}"
    figures.report = json.loads(stage.s3.body(f"{place}/report.json"))
    lines = stage.s3.body(f"{place}/report.jsonl")
    figures.report_bytes = len(lines)
    page = stage.folder / "index.html"
    page.write_bytes(stage.s3.body(f"{place}/index.html"))
    figures.page_mb = page.stat().st_size / 2**20
    figures.page_seconds = opened(page, Path(os.environ.get("BENCHMARK_SCREENSHOT", stage.folder / "page.png")))
    say(f"report {figures.report_bytes / 2**20:.1f} MB, page {figures.page_mb:.1f} MB: {figures.page_seconds}")


def opened(page: Path, screenshot: Path) -> dict[str, float]:
    """Seconds until a browser shows something of a page, and until it has all of it."""
    from playwright.sync_api import sync_playwright  # noqa: PLC0415 - of the tests' extra

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        try:
            tab = browser.new_page(viewport={"width": 1280, "height": 900})
            began = time.monotonic()
            tab.goto(page.as_uri(), wait_until="load")
            loaded = time.monotonic() - began
            painted = tab.evaluate("performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? 0") / 1000
            tab.screenshot(path=str(screenshot))
            return {"first paint": painted, "loaded": loaded}
        finally:
            browser.close()


# ---- the page


def section(figures: Figures, beside: Figures | None) -> str:
    told = figures.report
    there = told["stored"] + told["reused"]
    rows = figures.rows
    requests = sum(figures.s3.values())
    heads, measured = ["process", f"peak at {rows:,} rows", "CPU a row"], figures.cpu_seconds
    lines = [
        [name, f"{peak_mb:.0f} MB", f"{figures.cpu_seconds[name] * 1_000 / rows:.1f} ms" if name in measured else ""]
        for name, peak_mb in figures.peak_mb.items()
    ]
    lines += [[name, f"{one.peak_mb:.0f} MB", ""] for name, one in figures.commands.items()]
    if beside is not None:
        heads[2:2] = [f"at {beside.rows:,}", "more"]
        for line in lines:
            line[2:2] = [f"{beside.peaks_mb[line[0]]:.0f} MB", f"{more_mb(figures, beside, line[0]):+.0f} MB"]
    by_kind = ", ".join(
        f"{name} {count / rows:.2f}" for name, count in sorted(figures.s3.items(), key=lambda one: -one[1])[:6]
    )
    tables = ", ".join(f"`{name}` {size:.0f} MB" for name, size in figures.tables_mb.items())
    facts = {
        "time": (f"{duration(figures.seconds)}, {rows / figures.seconds:.1f} pictures a second", ""),
        "rows with their picture": (f"{there:,} of {told['items']:,}", "all"),
        "predictions billed": (f"{figures.billed:,}, {figures.billed_too_often:,} of them twice", f"{rows:,}, 0"),
        "S3 requests a picture": (f"{requests / rows:.2f} ({by_kind})", ""),
        "task runs": (f"{figures.task_runs:,}, with {figures.artifacts:,} artifacts", "one a chunk"),
        "database": (f"{figures.database_mb[0]:.0f} MB before, {figures.database_mb[1]:.0f} MB after ({tables})", ""),
        "report": (f"report.jsonl {figures.report_bytes / 2**20:.1f} MB, index.html {figures.page_mb:.1f} MB", ""),
        "its page in Chromium": (
            (
                f"first paint after {figures.page_seconds['first paint']:.2f} s, loaded after "
                f"{figures.page_seconds['loaded']:.2f} s"
            ),
            "",
        ),
    }
    if there < rows:
        kinds = {kind: count for state in told["failures_by_kind"].values() for kind, count in state.items()}
        facts["without one"] = (", ".join(f"{count} {kind}" for kind, count in kinds.items()), "")
    if (one := figures.dry_run) is not None:
        facts["dry run"] = (f"{duration(one.seconds)} for {one.answer['items']:,} rows", "")
    if (one := figures.again) is not None:
        asked = f"{sum(one.api.values())} requests to the API, {sum(one.s3.values())} to S3"
        facts["run again"] = (f"{duration(one.seconds)}; {asked}", "60 s, 0 to the API")
    if (one := figures.audit) is not None:
        billed_usd, recorded_usd = one.answer["billed_usd"], one.answer["recorded_usd"]
        apart_usd = abs(billed_usd - figures.billed_usd) + abs(billed_usd - recorded_usd)
        said = f"{duration(one.seconds)}, {one.answer['requests']:,} requests to the API: billed ${billed_usd:,.4f}, "
        said += f"recorded ${recorded_usd:,.4f}, ${apart_usd:.4f} apart"
        facts["audit"] = (said, "$0.0000 apart")
    return report.paragraphs(
        report.HUNDRED_THOUSAND,
        f"One batch of **{rows:,}** rows, `shards=2` and `chunk_size={CHUNK_SIZE}`, over two workers, with Prefect's "
        f"server on PostgreSQL, SeaweedFS for S3 and the emulator without limits ({SERVICE_SECONDS:g} s a prediction), "
        f"all on one machine. When {figures.killed_at:,} pictures were bought, the machine of the second share lost "
        "its power: worker and run were killed with SIGKILL. The first run went through the whole table in the end "
        "and finished that share, by itself.",
        f"- Command: `{figures.command}`.\n- Load average (1, 5, 15 min) at the beginning: {figures.load[0]}; at the "
        f"end: {figures.load[-1]}. The machine had other work, too: of the times the CPU says more.",
        report.table(("what", "measured", "wanted"), [(name, *said) for name, said in facts.items()]),
        report.table(heads, lines),
        f"Of Prefect's server and of PostgreSQL it is all their processes together{_compared(figures, beside)}",
        *figures.notes,
    )


def _compared(figures: Figures, beside: Figures | None) -> str:
    if beside is None:
        return "."
    most_mb = max(more_mb(figures, beside, name) for name in (*OURS, *figures.commands))
    return f"; of ours one has **{most_mb:.0f} MB** more than at {beside.rows:,} rows at most (wanted: 60)."


def more_mb(figures: Figures, beside: Figures, name: str) -> float:
    return figures.peaks_mb[name] - beside.peaks_mb[name]


def duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds // 60:.0f} min {seconds % 60:.0f} s"


def loaded(path: Path) -> Figures:
    body = json.loads(path.read_text(encoding="utf-8"))
    for name in ("dry_run", "again", "audit"):
        body[name] = body[name] and Command(**body[name])
    return Figures(**body)


@contextlib.contextmanager
def kept_folder(path: Path | None) -> Iterator[Path]:
    if path is None:
        with tempfile.TemporaryDirectory(prefix="eachlabs-hundred-") as folder:
            yield Path(folder)
    else:
        path.mkdir(parents=True)
        yield path


def main(words: Sequence[str] | None = None) -> int:
    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--figures", type=Path, help="write what was measured into this file, too")
    parser.add_argument("--beside", type=Path, help="such a file of a smaller run: its memory stands beside this one's")
    parser.add_argument("--render", type=Path, help="measure nothing: write the section of such a file")
    parser.add_argument("--output", type=Path, help="the page whose section is written anew")
    parser.add_argument("--folder", type=Path, help="where everything is kept, logs included; a temporary one")
    arguments = parser.parse_args(words)
    logging.basicConfig(level=logging.WARNING)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that every process is ended on the way out
    if arguments.render is not None:
        figures = loaded(arguments.render)
    else:
        figures = Figures(arguments.rows, shlex.join(COMMAND + (sys.argv[1:] if words is None else list(words))))
        say(f"{arguments.rows:,} rows; {report.machine()}; load average {report.load_average()}")
        with kept_folder(arguments.folder) as folder:
            try:
                measure(figures, folder)
            except Trouble as trouble:
                say(f"Failed: {trouble}")
                return 1
            finally:
                if arguments.figures is not None:
                    arguments.figures.write_text(json.dumps(asdict(figures)), encoding="utf-8")
    beside = loaded(arguments.beside) if arguments.beside is not None else None
    text = section(figures, beside)
    say(f"\n{text}")
    if arguments.output is not None:
        report.put_section(arguments.output, report.HUNDRED_THOUSAND, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
