"""A Prefect server, PostgreSQL and workers, each a process that is ended by its own handle."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pwd
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import httpx

from tests.conftest import ROOT

T = TypeVar("T")

START_WITHIN_SECONDS = 150.0
BEAT_SECONDS = 30
"""Of runs; Prefect takes no less."""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def until(look: Callable[[], T | None], within_seconds: float, what: str, *, every_seconds: float = 0.25) -> T:
    """What `look` returns once there is something."""
    deadline = time.monotonic() + within_seconds
    while True:
        found = look()
        if found:
            return found
        assert time.monotonic() < deadline, f"not within {within_seconds:.0f} s: {what}"
        time.sleep(every_seconds)


class Process:
    """A program in a session of its own, with a log; it ends with all that it started."""

    def __init__(self, command: list[str], environment: Mapping[str, str], log: Path, *, folder: Path = ROOT) -> None:
        self.log = log
        with log.open("ab") as out:
            self.popen = subprocess.Popen(
                command,
                env=dict(environment),
                cwd=folder,
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    @property
    def is_running(self) -> bool:
        return self.popen.poll() is None

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-4_000:]

    def kill(self) -> None:
        """SIGKILL to it and to all that it started: what a machine that loses its power does to them."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()

    def stop(self, within_seconds: float = 20) -> None:
        """SIGTERM, and what is left of it afterwards is killed."""
        if self.is_running:
            self.popen.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.popen.wait(within_seconds)
        self.kill()


def answers(url: str, server: Process) -> bool:
    """Whether the Prefect server's API does; fails the test when the server has ended."""
    assert server.is_running, server.tail()
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{url}/health", timeout=2).status_code == 200
    return False


SERVER = ("-m", "uvicorn", "--factory", "prefect.server.api.server:create_app", "--host", "127.0.0.1", "--port")
"""What `prefect server start` ends in, without the three seconds that its command line takes to load."""


def environment_of_server(folder: Path) -> dict[str, str]:
    """For a server whose SQLite database is there."""
    return {
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{folder / 'prefect.db'}",
        "PREFECT_SERVER_MEMO_STORE_PATH": str(folder / "memo_store.toml"),  # which blocks it has registered
    }


def is_begun_from(kept: Path, folder: Path) -> bool:
    """Copies the database of a server that another has migrated, if there is one."""
    names = ("memo_store.toml", "prefect.db")
    if is_there := all((kept / name).exists() for name in names):
        for name in names:
            shutil.copy(kept / name, folder / name)
    return is_there


@contextlib.contextmanager
def migrated(folder: Path, kept: Path) -> Iterator[None]:
    """Around the first start of a server on SQLite, with what is kept.

    Migrations and blocks take 10 s of CPU. The first server's are kept; who comes meanwhile waits for it.
    """
    with (kept / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if is_begun_from(kept, folder):
            fcntl.flock(lock, fcntl.LOCK_UN)
            yield
            return
        yield
        half = kept / "half.db"
        half.unlink(missing_ok=True)
        with contextlib.ExitStack() as both:
            made, copy = (
                both.enter_context(contextlib.closing(sqlite3.connect(one))) for one in (folder / "prefect.db", half)
            )
            made.backup(copy)
        shutil.copy(folder / "memo_store.toml", kept / "memo_store.toml")
        half.replace(kept / "prefect.db")


class PostgreSQL:
    """A cluster in a folder of its own; as root it runs as the user postgres, as it insists on."""

    def __init__(self, programs: Path) -> None:
        self._programs = programs
        # Not under pytest's folder, which the user postgres may not enter.
        self._folder = Path(tempfile.mkdtemp(prefix="pg-"))
        self._port = free_port()
        self._as: dict[str, Any] = {}
        if os.getuid() == 0:
            user = pwd.getpwnam("postgres")
            os.chown(self._folder, user.pw_uid, user.pw_gid)
            self._as = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        self._popen: subprocess.Popen[bytes] | None = None
        self.url = f"postgresql+asyncpg://prefect@127.0.0.1:{self._port}/postgres"

    def start(self) -> None:
        environment = {"PATH": os.defpath, "LANG": "C.UTF-8", "HOME": str(self._folder)}
        subprocess.run(
            [
                *(str(self._programs / "initdb"), "-D", str(self._folder / "data"), "-U", "prefect"),
                *("-A", "trust", "-E", "UTF8", "--no-sync", "--no-instructions"),
            ],
            check=True,
            env=environment,
            cwd=self._folder,
            stdout=subprocess.DEVNULL,
            **self._as,
        )
        with (self._folder / "log").open("ab") as log:
            self._popen = subprocess.Popen(
                [
                    *(str(self._programs / "postgres"), "-D", str(self._folder / "data"), "-p", str(self._port)),
                    *("-h", "127.0.0.1", "-k", str(self._folder), "-c", "fsync=off", "-c", "max_connections=200"),
                ],
                env=environment,
                cwd=self._folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                **self._as,
            )

        def listens() -> bool:
            assert self._popen is not None
            assert self._popen.poll() is None, (self._folder / "log").read_text()[-2_000:]
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._port), timeout=1):
                return True
            return False

        until(listens, START_WITHIN_SECONDS, "PostgreSQL listens")

    def stop(self) -> None:
        if self._popen is not None:
            self._popen.send_signal(signal.SIGINT)  # "fast": whoever is still connected is cut
            try:
                self._popen.wait(20)
            except subprocess.TimeoutExpired:
                self._popen.kill()
                self._popen.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


class Stage:
    """Server, workers and commands, all with homes of their own."""

    def __init__(self, folder: Path, database: str | Path, given: Mapping[str, str]) -> None:
        self.folder = folder
        self.given = dict(given)
        self._database = database
        self._port = free_port()
        self.ui = f"http://127.0.0.1:{self._port}"
        self.url = f"{self.ui}/api"
        self._server: Process | None = None
        self.workers: list[Process] = []
        self.empty_folder = folder / "empty"
        self.empty_folder.mkdir()

    def environment(self, home: str, **more: str) -> dict[str, str]:
        """The test's own, where the API and the bucket are, a Prefect home, and this server."""
        (self.folder / home).mkdir(exist_ok=True)
        return {
            **os.environ,
            **self.given,
            "PREFECT_HOME": str(self.folder / home),
            "PREFECT_API_URL": self.url,
            "PREFECT_LOGGING_LEVEL": "INFO",
            "PYTHONUNBUFFERED": "1",
            **more,
        }

    def start_server(self) -> None:
        environment = self.environment(
            "server",
            PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS="5",  # new schedules are looked at every 60 s otherwise
            PREFECT_SERVER_UI_API_URL=self.url,  # else the page looks for its API on port 4200
            PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT="false",
        )
        del environment["PREFECT_API_URL"]
        begun: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if isinstance(self._database, Path):
            home = self.folder / "server"
            environment.update(environment_of_server(home))
            if not (home / "prefect.db").exists():
                begun = migrated(home, self._database)
        else:
            environment["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = self._database
        with begun:
            server = self._server = Process(
                [sys.executable, *SERVER, str(self._port)], environment, self.folder / "server.log"
            )
            until(lambda: answers(self.url, server), START_WITHIN_SECONDS, "the server answers")

    def stop_server(self) -> None:
        if self._server is not None:
            self._server.stop()
            self._server = None

    def start_worker(self) -> Process:
        """In an empty folder: it has the package, and no clone of the repository."""
        number = len(self.workers) + 1
        worker = Process(
            [sys.executable, "-m", "prefect", "worker", "start", "--pool", "eachlabs", "--name", f"worker-{number}"],
            self.environment(
                f"worker-{number}",
                PREFECT_WORKER_QUERY_SECONDS="2",
                PREFECT_RUNNER_POLL_FREQUENCY="2",
                PREFECT_FLOWS_HEARTBEAT_FREQUENCY=str(BEAT_SECONDS),
            ),
            self.folder / f"worker-{number}.log",
            folder=self.empty_folder,
        )
        self.workers.append(worker)
        return worker

    def close(self) -> None:
        for worker in self.workers:
            worker.stop()
        self.stop_server()

    def command(self, *words: str, status: int | None = 0) -> subprocess.CompletedProcess[str]:
        """`prefect ...` or `prefect-eachlabs ...`, from an empty folder."""
        module = {"prefect": "prefect", "prefect-eachlabs": "prefect_eachlabs"}[words[0]]
        done = subprocess.run(
            [sys.executable, "-m", module, *words[1:]],
            env=self.environment("commands", PREFECT_LOGGING_LEVEL="WARNING"),
            cwd=self.empty_folder,
            capture_output=True,
            text=True,
            check=False,
            timeout=400,
        )
        assert status is None or done.returncode == status, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    # ------------------------------------------------------------------ the API

    def ask(self, method: str, path: str, body: object = None) -> Any:
        for _ in range(10):  # with SQLite the server answers 503 while another writes
            answer = httpx.request(method, f"{self.url}{path}", json=body, timeout=30)
            if answer.status_code != 503:
                break
        assert answer.is_success, f"{method} {path}: {answer.status_code} {answer.text[:500]}"
        return answer.json() if answer.content else None

    def deployment(self, name: str) -> dict[str, Any]:
        """By `FLOW/NAME`."""
        found: dict[str, Any] = self.ask("GET", f"/deployments/name/{name}")
        return found

    def run(self, deployment: str, **parameters: Any) -> str:
        """Starts a run as the UI does; its id."""
        body = {"parameters": parameters, "state": {"type": "SCHEDULED"}}
        made = self.ask("POST", f"/deployments/{self.deployment(deployment)['id']}/create_flow_run", body)
        return str(made["id"])

    def flow_run(self, run_id: str) -> dict[str, Any]:
        found: dict[str, Any] = self.ask("GET", f"/flow_runs/{run_id}")
        return found

    def state(self, run_id: str) -> str:
        return str(self.flow_run(run_id)["state"]["type"])

    def ended(self, run_id: str, within_seconds: float = 240) -> dict[str, Any]:
        """The run once it has ended."""

        def look() -> dict[str, Any] | None:
            run = self.flow_run(run_id)
            over = run["state"]["type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
            return run if over else None

        return until(look, within_seconds, f"the run {run_id} ends; {self.tails()}", every_seconds=0.5)

    def cancel(self, run_id: str) -> None:
        """As the UI does."""
        self.ask("POST", f"/flow_runs/{run_id}/set_state", {"state": {"type": "CANCELLING"}, "force": False})

    def process_of(self, run_id: str) -> int | None:
        """The process in which a worker runs a flow run."""
        wanted = f"PREFECT__FLOW_RUN_ID={run_id}".encode()
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if wanted in (folder / "environ").read_bytes().split(b"\0"):
                    return int(folder.name)
        return None

    def kill_run(self, run_id: str) -> None:
        """SIGKILL to a flow run's process: what the kernel does when memory is short."""
        os.kill(until(lambda: self.process_of(run_id), 90, "the run has a process"), signal.SIGKILL)

    def artifacts(self, run_id: str) -> list[dict[str, Any]]:
        body = {"artifacts": {"flow_run_id": {"any_": [run_id]}}}
        found: list[dict[str, Any]] = self.ask("POST", "/artifacts/filter", body)
        return found

    def tails(self) -> str:
        return "\n".join(f"--- {worker.log.name}\n{worker.tail()}" for worker in self.workers)


@contextlib.contextmanager
def opened(folder: Path, database: str | Path, given: Mapping[str, str]) -> Iterator[Stage]:
    """On PostgreSQL at a URL, or on SQLite, as databases of it are kept in a folder."""
    stage = Stage(folder, database, given)
    try:
        stage.start_server()
        yield stage
    finally:
        stage.close()
