"""`prefect-eachlabs demo --ui`: a Prefect server with a worker, deployments and two runs to look at, until Ctrl-C."""

# ruff: noqa: PLC0415 - Prefect and boto3 read the environment when they are imported, so it is set before

from __future__ import annotations

import asyncio
import contextlib
import csv
import io
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefect_eachlabs.cli import demo_stage
from prefect_eachlabs.cli.options import cannot_listen
from prefect_eachlabs.errors import SetupError

ENDS_WITHIN_SECONDS = 10.0
PICTURES = f"s3://{demo_stage.BUCKET}/pictures"
TABLES = f"s3://{demo_stage.BUCKET}/tables"
TABLE = f"{TABLES}/ten.csv"


def show(
    picture: tuple[str, str],
    rows: Mapping[str, str],
    *,
    port: int,
    service_seconds: float,
    interrupts: demo_stage.Interrupts,
    clock: demo_stage.Clock,
) -> None:
    """Starts all of it, runs one picture and a batch, and comes back when somebody has seen enough: by Ctrl-C.

    Args:
        picture: Name and prompt of the one picture.
        rows: The batch's, by name.
        port: Of the Prefect UI; 0 takes a free one.
        service_seconds: The emulator's time a picture.
        interrupts: They end it at any moment.
        clock: Says how far it is.

    Raises:
        KeyboardInterrupt: An earlier one; all that was started has ended.
        SetupError: So it has; a part of it did not start, or ended by itself.
    """
    with demo_stage.folder_of_its_own(interrupts) as folder, contextlib.ExitStack() as stack:
        port = free_port(port)
        ui = f"http://127.0.0.1:{port}"
        demo_stage.replace_environment(folder)
        (folder / "tmp").mkdir()
        os.environ.update(
            {
                "TMPDIR": str(folder / "tmp"),
                "PREFECT_API_URL": f"{ui}/api",
                "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",
                "PREFECT_SERVER_REGISTER_BLOCKS_ON_START": "true",
                "PREFECT_SERVER_UI_API_URL": f"{ui}/api",
                "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
                "PREFECT_LOGGING_TO_API_ENABLED": "true",
                "PREFECT_WORKER_QUERY_SECONDS": "1",
                "EACHLABS_REFERENCE_ROOTS": TABLES,
            }
        )
        server = Child(
            "Prefect's server", [*SERVER, str(port)], folder / "server.log", interrupts, health=f"{ui}/api/health"
        )
        stage = stack.enter_context(demo_stage.Stage(interrupts, service_seconds=service_seconds, prefect=server))
        clock.say("Prefect's server, the emulator and the local S3 are there")
        from prefect_eachlabs.cli.setup import WORK_POOL, make_work_pool

        asyncio.run(_put_table(stage.s3.access, rows))
        make_work_pool()
        worker = Child("The worker", ["-c", WORKER, WORK_POOL], folder / "worker.log", interrupts)
        stack.callback(worker.stop)  # before the server that it talks to
        worker.start()
        interrupts.check()
        _set_up()
        interrupts.check()
        clock.say("the worker, the blocks and the deployments are there; a picture and a batch are on their way")
        name, prompt = picture
        runs = {
            "the picture": _run("generate-image/generate-image", prompt=prompt, item_id=name),
            f"the batch of {len(rows)}": _run("generate-batch/generate-batch"),
        }
        _follow(runs, [server, worker], interrupts, clock)
        print(CLOSING.format(ui=ui), flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                _wait(0.5, [server, worker], interrupts)


# What `prefect server start` and `prefect worker start` end in, without the seconds that their command line takes.
SERVER = ("-m", "uvicorn", "--factory", "prefect.server.api.server:create_app", "--host", "127.0.0.1", "--port")
WORKER = (
    "import asyncio, sys; from prefect.workers.process import ProcessWorker; "
    "asyncio.run(ProcessWorker(sys.argv[1], name='demo').start())"
)

CLOSING = """
Look at it: {ui}
  Runs → one of the two → Artifacts → a card: its pictures. Deployments → generate-image → Run: one more.
The emulator draws the pictures: no model is asked, nothing is bought. Ctrl-C ends all of it."""


class Child:
    """A part of Prefect's in a process group of its own: Ctrl-C is for this process, which ends the others.

    Args:
        words: What follows Python's path.
        log: What it says.
        health: A URL that answers once it has started.
    """

    def __init__(
        self, name: str, words: list[str], log: Path, interrupts: demo_stage.Interrupts, *, health: str = ""
    ) -> None:
        self._name, self._words, self._log, self._interrupts, self._health = name, words, log, interrupts, health
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *, timeout: float = 0.0) -> None:
        """Raises SetupError when it does not answer within so many seconds."""
        with self._interrupts.held_back(), self._log.open("wb") as out:
            self._process = subprocess.Popen(
                [sys.executable, *self._words],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        until = time.monotonic() + timeout
        while self._health and not self._answers():
            if time.monotonic() > until:
                raise SetupError(f"{self._name} did not answer within {timeout:g} s.")
            _wait(0.2, [self], self._interrupts)

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(self._health, timeout=2) as answer:
            return bool(answer.status == 200)
        return False

    def check(self) -> None:
        """Raises SetupError when it has ended."""
        if self._process is not None and self._process.poll() is not None:
            said = " ".join(self._log.read_text(errors="replace")[-600:].split())
            raise SetupError(f"{self._name} ended by itself: {said}")

    def stop(self) -> None:
        """With all that it started."""
        if self._process is None:
            return
        with self._interrupts.held_back():
            groups = _groups(self._process.pid)
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(ENDS_WITHIN_SECONDS)
            for group in groups:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(group, signal.SIGKILL)
            self._process.wait()


def _groups(process: int) -> set[int]:
    """The process groups of one and of all that it has started: a worker's runs have groups of their own."""
    groups, family = {process}, {process}
    with contextlib.suppress(OSError):  # no ps
        told = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,pgid="], capture_output=True, text=True, check=False)
        listed = [[int(word) for word in line.split()] for line in told.stdout.splitlines()]
        while children := {one for one, parent, _ in listed if parent in family} - family:
            family |= children
        groups |= {group for one, _, group in listed if one in family}
    return groups


def _wait(seconds: float, children: list[Child], interrupts: demo_stage.Interrupts) -> None:
    interrupts.check()
    for child in children:
        child.check()
    time.sleep(seconds)


def free_port(port: int) -> int:
    """The port itself, or a free one for 0. Raises SetupError when it is taken."""
    try:
        with socket.create_server(("127.0.0.1", port)) as free:
            return int(free.getsockname()[1])
    except OSError as error:
        raise cannot_listen(error, port) from None


async def _put_table(access: Any, rows: Mapping[str, str]) -> None:
    from prefect_eachlabs.storage.s3 import S3Store

    text = io.StringIO()
    csv.writer(text).writerows([("id", "prompt"), *rows.items()])
    key = TABLE.removeprefix(f"s3://{demo_stage.BUCKET}/")
    await S3Store(demo_stage.BUCKET, access).put(key, text.getvalue().encode(), content_type="text/csv")


def _set_up() -> None:
    """What `prefect-eachlabs setup --deploy` makes, paused; and the form of a batch names a table that is there."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import DeploymentUpdate

    from prefect_eachlabs.cli.setup import setup

    with contextlib.redirect_stdout(io.StringIO()):
        setup(destination=PICTURES, deploy=True)
    with get_client(sync_client=True) as client:
        for one in client.read_deployments():
            given = {"source": TABLE} if one.name == "generate-batch" else {}
            # The runs of tomorrow would stand above those that there are to look at.
            client.update_deployment(one.id, DeploymentUpdate(paused=True, parameters={**one.parameters, **given}))


def _run(deployment: str, **parameters: Any) -> Any:
    """The id of a run that the worker takes."""
    from prefect.deployments import run_deployment

    run: Any = run_deployment(deployment, parameters=parameters, timeout=0)
    return run.id


def _follow(
    runs: Mapping[str, Any], children: list[Child], interrupts: demo_stage.Interrupts, clock: demo_stage.Clock
) -> None:
    """Says what state each is in, until all have ended."""
    from prefect.client.orchestration import get_client

    shown: dict[str, str] = {}
    left = dict(runs)
    with get_client(sync_client=True) as client:
        while left:
            _wait(0.5, children, interrupts)
            for name, run in list(left.items()):
                state = client.read_flow_run(run).state
                if state is None:
                    continue
                if shown.get(name) != state.type.value:
                    shown[name] = state.type.value
                    clock.say(f"{name:<16} {state.type.value.lower()}")
                if state.is_final():
                    del left[name]
