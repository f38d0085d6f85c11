"""What the demo stands on: emulator, local S3 and Prefect's embedded server, on loopback and in a temporary folder."""

# ruff: noqa: PLC0415 - Prefect and boto3 read the environment when they are imported, so it is set before

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from prefect_eachlabs.errors import SetupError

if TYPE_CHECKING:
    from prefect_eachlabs.testing.emulator import EmulatorServer
    from prefect_eachlabs.testing.s3 import LocalS3

BUCKET = "demo"
SERVER_STARTS_WITHIN_SECONDS = 120

IN_MEMORY = "sqlite+aiosqlite:///file::memory:?cache=shared&uri=true&check_same_thread=false"
"""Prefect opens such a database once, so its requests wait for each other. On a file, flow runs that begin together
meet "database is locked", and Prefect's client waits 2, 4, 8 s (measured: the sixth run began 17 s late)."""

_FOREIGN = ("AWS_", "BOTO", "EACHLABS_", "PREFECT_")
_PROXIES = frozenset({"ALL_PROXY", "HTTP_PROXY", "HTTPS_PROXY"})


def refuse_what_cannot_work() -> None:
    """Raises SetupError when a library is missing, or Prefect has read its settings in this process already."""
    for library in ("PIL", "moto", "flask", "flask_cors"):
        if importlib.util.find_spec(library) is None:
            raise SetupError(f"The demo needs {library}: pip install 'prefect-eachlabs[demo]'.")
    if "prefect" in sys.modules:
        raise SetupError("The demo needs a process of its own: run `prefect-eachlabs demo` in a shell.")


def replace_environment(folder: Path) -> None:
    """Nothing of the user's set-up is seen or touched: no profile, no key, no bucket, no server, no proxy."""
    for name in list(os.environ):
        if name.startswith(_FOREIGN) or name.upper() in _PROXIES:
            del os.environ[name]
    os.environ.update(
        {
            "PREFECT_HOME": str(folder),
            "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "true",
            "PREFECT_SERVER_DATABASE_CONNECTION_URL": IN_MEMORY,
            "PREFECT_SERVER_MEMO_STORE_PATH": str(folder / "memo_store.toml"),
            "PREFECT_SERVER_REGISTER_BLOCKS_ON_START": "false",  # nobody looks at their kinds
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
            "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
            # Prefect's own log lines are read for the progress display, not shown; failures are shown by the demo.
            "PREFECT_LOGGING_LEVEL": "INFO",
            "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
            "PREFECT_LOGGING_TO_API_ENABLED": "false",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
        }
    )


FOLDER_REMOVALS = 5
"""A thread that the demo leaves behind may write into the folder while it is removed."""


@contextlib.contextmanager
def folder_of_its_own(interrupts: Interrupts) -> Iterator[Path]:
    """A temporary folder as the working directory: Prefect reads `.env` and `prefect.toml` of the one it is in."""
    before = Path.cwd()
    folder: Path | None = None
    try:
        with interrupts.held_back():
            folder = Path(tempfile.mkdtemp(prefix="prefect-eachlabs-demo-"))
            os.chdir(folder)
        yield folder
    finally:
        with interrupts.held_back():
            os.chdir(before)
            for _ in range(FOLDER_REMOVALS):
                if folder is not None and folder.exists():
                    shutil.rmtree(folder, ignore_errors=True)


def leave(status: int) -> NoReturn:
    """Ends the process, now that all it started is gone.

    Left to itself, Prefect's worker for events goes on for a minute to reach the server that was stopped, and what
    runs in daemon threads then can abort the interpreter (both seen after a Ctrl-C).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class Clock:
    """Says what happens, a line each, with the seconds since it began."""

    def __init__(self) -> None:
        self._begun_at = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._begun_at

    def say(self, text: str) -> None:
        print(f"{self.seconds:6.1f} s  {text}", flush=True)


class Interrupts:
    """Ctrl-C, SIGTERM and a closed terminal: each ends the demo as KeyboardInterrupt, with all that it started.

    Raising alone is not enough: raised while a library is imported, it can be swallowed there (seen with Prefect's).
    Only the first is raised, so that a second one does not disturb the cleaning up.
    """

    _NAMES = ("SIGINT", "SIGTERM", "SIGHUP")

    def __init__(self) -> None:
        self._seen = self._held = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        numbers = [getattr(signal, name) for name in self._NAMES if hasattr(signal, name)]
        self._before = {number: signal.signal(number, self._interrupt) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _interrupt(self, *_: Any) -> None:
        is_first, self._seen = not self._seen, True
        if is_first and not self._held:
            raise KeyboardInterrupt

    def check(self) -> None:
        """Raises KeyboardInterrupt if one has come."""
        if self._seen:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def held_back(self) -> Iterator[None]:
        """What comes meanwhile does not disturb: for cleaning up."""
        before, self._held = self._held, True
        try:
            yield
        finally:
            self._held = before


class Stage:
    """The three servers, for as long as the `with` block lasts; flow runs of this process find them.

    Args:
        interrupts: They end it at any moment.
        service_seconds: The emulator's time for a picture.
        prefect: Prefect's server, to be started and stopped; the embedded one when None.
    """

    emulator: EmulatorServer
    s3: LocalS3

    def __init__(self, interrupts: Interrupts, *, service_seconds: float, prefect: Any = None) -> None:
        self._interrupts = interrupts
        self._service_seconds = service_seconds
        self._prefect = prefect
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Stage:
        """Starts all three.

        Raises:
            SetupError: Prefect's server did not start.
        """
        if self._prefect is None:
            from prefect.server.api.server import SubprocessASGIServer

            self._prefect = SubprocessASGIServer()
        # Prefect's server is a process of its own, and takes its time: meanwhile this one loads what it needs.
        others = ThreadPoolExecutor(1, thread_name_prefix="demo-starts").submit(self._start_others)
        try:
            self._interrupts.check()
            self._prefect.start(timeout=SERVER_STARTS_WITHIN_SECONDS)
            others.result()
            self._interrupts.check()
        except BaseException as error:
            self.__exit__()
            if isinstance(error, RuntimeError):
                raise SetupError(f"Prefect's embedded server did not start: {error}") from error
            raise
        return self

    def _start_others(self) -> None:
        from prefect_eachlabs.testing.emulator import EmulatorOptions, EmulatorServer
        from prefect_eachlabs.testing.s3 import LocalS3

        self.emulator = self._open.enter_context(EmulatorServer(EmulatorOptions(service_seconds=self._service_seconds)))
        self.s3 = self._open.enter_context(LocalS3(buckets=[BUCKET]))
        os.environ.update(self.s3.environment(), EACHLABS_API_KEY="demo", EACHLABS_BASE_URL=self.emulator.url)
        import prefect_eachlabs.rows  # noqa: F401 - loaded, not used here

    def __exit__(self, *_: object) -> None:
        """Cancels what is in flight and ends the servers, in 15 s at most."""
        with self._interrupts.held_back():
            if "prefect_eachlabs.engine.runtime" in sys.modules:
                from prefect_eachlabs.engine.runtime import close_gateways

                close_gateways()
            self._prefect.stop()
            self._open.close()
