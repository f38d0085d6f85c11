"""The processes that a benchmark needs: each is started here and ended by its own handle."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

HERE = Path(__file__).resolve().parent
ENDS_WITHIN_SECONDS = 20.0
_STATE = tempfile.TemporaryDirectory(prefix="eachlabs-benchmark-")
_FOREIGN = ("AWS_", "BOTO", "EACHLABS_", "PREFECT_", "PG")
_PROXIES = frozenset({"ALL_PROXY", "HTTP_PROXY", "HTTPS_PROXY"})


class Trouble(Exception):
    """A process did not start or did not do its work; says what it wrote."""


def clean_environment(**more: str) -> dict[str, str]:
    """This one's without anybody's accounts, buckets, servers and proxies."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(_FOREIGN) and name.upper() not in _PROXIES
    }
    return {
        **kept,
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
        "PYTHONUNBUFFERED": "1",
        # The limits that processes without a Prefect server share are of one benchmark alone.
        "XDG_STATE_HOME": _STATE.name,
        **more,
    }


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def memory_mb(pid: int) -> float:
    """What a process has in memory now (Linux; elsewhere, and when it has ended, 0)."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS:")), 0.0)


class Process:
    """A process with a pipe each way; what it writes to stderr is kept in a file and shown when it fails.

    Args:
        command: What to run, in `folder`.
        folder: Where its log goes, too.
        name: What it is called.
        environment: The clean one when None.
        user: Who runs it, for a parent that is root; the same when None.
        end_by: The signal that ends it in an orderly way.
        is_read: Whether anybody reads its stdout; if not, that goes to the log (a full pipe would stop it).
    """

    def __init__(
        self,
        command: Sequence[str],
        folder: Path,
        name: str,
        *,
        environment: Mapping[str, str] | None = None,
        user: str | None = None,
        end_by: signal.Signals = signal.SIGTERM,
        is_read: bool = True,
    ) -> None:
        self.name = name
        self._end_by = end_by
        self._log = folder / f"{name}.log"
        as_user: dict[str, Any] = {}
        if user is not None:
            account = pwd.getpwnam(user)
            as_user = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": [account.pw_gid]}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                cwd=folder,
                env=dict(environment or clean_environment()),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE if is_read else log,
                stderr=log,
                text=True,
                start_new_session=True,
                **as_user,
            )

    def read_line(self) -> str:
        """Its next line on stdout; waits for it."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(5)
            raise Trouble(f"{self.name} ended with status {self._process.poll()}:\n{self.said()}")
        return line.rstrip("\n")

    def first_line(self) -> str:
        """Its first line; it is ended when that does not come."""
        try:
            return self.read_line()
        except BaseException:
            self.end()
            raise

    def read_json(self) -> dict[str, Any]:
        answer = json.loads(self.read_line())
        assert isinstance(answer, dict)
        return answer

    def tell(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()

    def said(self) -> str:
        """The end of what it wrote to stderr."""
        return self._log.read_text(errors="replace")[-3_000:]

    def is_running(self) -> bool:
        return self._process.poll() is None

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_status(self) -> int | None:
        """None while it runs; below 0: the signal that ended it."""
        return self._process.poll()

    def send(self, number: signal.Signals, *, to_all: bool = False) -> None:
        """A signal to it, or to all that it has started, too; nothing when it has ended."""
        if self.is_running():
            if to_all:
                os.killpg(self._process.pid, number)  # a group of its own: start_new_session
            else:
                self._process.send_signal(number)

    def memory_mb(self) -> float:
        """What it has in memory now (Linux; elsewhere, and when it has ended, 0)."""
        return memory_mb(self._process.pid)

    def cpu_seconds(self) -> float:
        """What it has used so far, its threads included (Linux; elsewhere 0)."""
        try:
            fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def end(self) -> None:
        """Asks it to end, and insists after a while."""
        if self._process.poll() is None:
            self._process.send_signal(self._end_by)
            try:
                self._process.wait(ENDS_WITHIN_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)  # a group of its own: start_new_session
                self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


def python(script: str, *arguments: str) -> list[str]:
    """The command that runs one of the scripts beside this file."""
    return [sys.executable, str(HERE / script), *arguments]


class Emulator:
    """The API's stand-in as a process of its own, and what it says about those who asked it.

    Args:
        folder: Where its log goes.
        name: What it is called.
        arguments: Flags of `prefect-eachlabs emulator`.
    """

    def __init__(self, folder: Path, name: str, *arguments: str) -> None:
        command = [sys.executable, "-m", "prefect_eachlabs", "emulator", "--port", "0", *arguments]
        self.process = Process(command, folder, f"emulator-{name}")
        self.url = self.process.first_line().rpartition(" ")[2]

    def tallies(self) -> dict[str, Any]:
        answer: dict[str, Any] = self._get("/_emulator/tallies")
        return answer

    def journal(self) -> list[dict[str, Any]]:
        requests: list[dict[str, Any]] = self._get("/_emulator/journal")["requests"]
        return requests

    def executions(self) -> list[dict[str, Any]]:
        """All that were made, asked for with a key of our own, whose requests count for nobody else."""
        httpx.post(f"{self.url}/_emulator/faults", json={"faults": []}).raise_for_status()
        rows: list[dict[str, Any]] = []
        while True:
            found = self._get(f"/v1/executions?limit=100&offset={len(rows)}")["executions"]
            rows += found
            if len(found) < 100:
                return rows

    def _get(self, path: str) -> Any:
        answer = httpx.get(f"{self.url}{path}", headers={"X-API-Key": "the-judge"}, timeout=60)
        answer.raise_for_status()
        return answer.json()

    def __enter__(self) -> Emulator:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.end()


class S3:
    """The local S3 server as a process of its own."""

    BUCKET = "benchmarks"

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-m", "prefect_eachlabs", "s3", "--port", "0", "--bucket", self.BUCKET]
        self.process = Process(command, folder, "s3")
        self.url = self.process.first_line().rpartition(" ")[2]

    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL_S3": self.url,
            "AWS_ACCESS_KEY_ID": "local",
            "AWS_SECRET_ACCESS_KEY": "local",
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def counts(self) -> dict[str, int]:
        """Requests so far by method and folder."""
        counts: dict[str, int] = httpx.get(f"{self.url}/_local_s3/counts", timeout=60).json()
        return counts

    def __enter__(self) -> S3:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.end()
