"""Prefect servers and PostgreSQL clusters of our own, ended by their own handles."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
from processes import Process, Trouble, clean_environment, free_port

STARTS_WITHIN_SECONDS = 180.0


class PrefectServer:
    """A Prefect server of its own, which may be ended and started again at the same port with what it knew.

    Its leases are kept in files: those in memory, the default, are forgotten when it restarts.

    Args:
        folder: Where its home and its logs go.
        name: What it is called.
        database_url: SQLite in its home when None.
        home: What its home begins as, with a database that needs no migration; empty when None.
    """

    def __init__(self, folder: Path, name: str, *, database_url: str | None = None, home: Path | None = None) -> None:
        self._folder, self._name = folder, f"prefect-server-{name}"
        own = folder / f"prefect-{name}"
        if home is None:
            own.mkdir()
        else:
            shutil.copytree(home, own)
        self._environment = clean_environment(
            PREFECT_HOME=str(own),
            PREFECT_SERVER_ANALYTICS_ENABLED="false",
            DO_NOT_TRACK="1",
            PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE="prefect.server.concurrency.lease_storage.filesystem",
        )
        if database_url is not None:
            self._environment["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = database_url
        self._port, self._starts = free_port(), 0
        self.url = f"http://127.0.0.1:{self._port}/api"
        self.start()

    def start(self) -> None:
        """Begins to start; `wait` comes back when it answers."""
        # What `prefect server start` ends in, without the seconds in which its command line is loaded.
        command = [sys.executable, "-m", "uvicorn", "--factory", "prefect.server.api.server:create_app"]
        command += ["--host", "127.0.0.1", "--port", str(self._port), "--log-level", "warning"]
        self._starts += 1
        name = self._name if self._starts == 1 else f"{self._name}-{self._starts}"
        self.process = Process(command, self._folder, name, environment=self._environment, is_read=False)

    def wait(self) -> None:
        _wait_until_it_answers(self.process, f"{self.url}/health")

    def __enter__(self) -> PrefectServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.end()


@contextlib.contextmanager
def prefect_server(folder: Path, name: str, *, database_url: str | None = None) -> Iterator[str]:
    """A Prefect server of its own that answers; gives the URL of its API."""
    with PrefectServer(folder, name, database_url=database_url) as server:
        server.wait()
        yield server.url


def _wait_until_it_answers(server: Process, url: str) -> None:
    until = time.monotonic() + STARTS_WITHIN_SECONDS
    while True:
        if not server.is_running():
            raise Trouble(f"{server.name} did not start:\n{server.said()}")
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(url, timeout=5).status_code == 200:
                return
        if time.monotonic() > until:
            raise Trouble(f"{server.name} does not answer:\n{server.said()}")
        time.sleep(0.3)


def postgres_folder() -> Path | None:
    """Where PostgreSQL's programs are, on Debian or on the path; None: it is not installed."""
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parts[-3]))
    if versions:
        return versions[-1].parent
    found = shutil.which("initdb")
    return Path(found).resolve().parent if found else None


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """A PostgreSQL cluster of its own in a temporary folder; gives the URL that Prefect's server takes.

    PostgreSQL does not run as root: then the user `postgres` runs it.
    """
    programs = postgres_folder()
    if programs is None:
        raise Trouble("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    user = "postgres" if os.geteuid() == 0 else None
    folder = Path(tempfile.mkdtemp(prefix="eachlabs-benchmark-postgres-"))
    try:
        if user is not None:
            shutil.chown(folder, user, user)
        data, port = folder / "data", free_port()
        make = [str(programs / "initdb"), "-D", str(data), "-U", "benchmark", "-A", "trust", "-E", "UTF8", "--locale=C"]
        with Process(make, folder, "initdb", user=user) as making:
            with contextlib.suppress(Trouble):
                while True:
                    making.read_line()
            if not (data / "PG_VERSION").exists():
                raise Trouble(f"initdb failed:\n{making.said()}")
        command = [str(programs / "postgres"), "-D", str(data), "-p", str(port), "-k", str(folder)]
        # SIGINT is PostgreSQL's fast shutdown.
        with Process(command, folder, "postgres", user=user, end_by=signal.SIGINT, is_read=False) as server:
            until = time.monotonic() + STARTS_WITHIN_SECONDS
            while not _listens(port):
                if not server.is_running() or time.monotonic() > until:
                    raise Trouble(f"PostgreSQL did not start:\n{server.said()}")
                time.sleep(0.1)
            yield f"postgresql+asyncpg://benchmark@127.0.0.1:{port}/postgres"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0
