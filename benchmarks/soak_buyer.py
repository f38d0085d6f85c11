"""A process that runs batches one after the other while its wall clock jumps and, perhaps, its disk is full.

    python benchmarks/soak_buyer.py '{"sources": "FOLDER/pair-{:03}.csv", "to": "s3://...", "state": FILE, ...}'

Each batch is what a person types, `prefect-eachlabs batch SOURCE --to s3://... --json`. The number of the source that
it is at stands in the file `state`, so that the next life goes on there; what became of each batch goes into the file
`results`; it ends after a batch when the file `stop` exists.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib
import io
import json
import mmap
import os
import resource
import signal
import struct
import sys
import time
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx
from processes import memory_mb

OFFSET = struct.Struct("d")
"""How far the wall clock is off, in seconds: eight bytes of a file that whoever makes it jump writes to."""

IMPORTED_BEFORE = (
    "boto3.session",
    "botocore.auth",
    "botocore.signers",
    "prefect_eachlabs.batch.plan",
    "prefect_eachlabs.cli.batch",
    "prefect_eachlabs.batch.sheet",
    "prefect_eachlabs.engine.runtime",
    "prefect_eachlabs.limits",
)

_REAL = datetime.datetime


class _AnyDatetime(type):
    """Every datetime is one of ours, too: C code goes on making the real ones."""

    def __instancecheck__(cls, thing: object) -> bool:
        return isinstance(thing, _REAL)

    def __subclasscheck__(cls, other: type) -> bool:
        return issubclass(other, _REAL)


def jump_with(clock: Path) -> None:
    """From now on this process's wall clock is off by what the file says; monotonic clocks are not.

    `time` is changed for all; `datetime` in the modules of this package and of boto3 that are imported by now, so they
    are: pydantic and Prefect make types of the real one.
    """
    for name in IMPORTED_BEFORE:
        importlib.import_module(name)
    with clock.open("r+b") as file:
        shared = mmap.mmap(file.fileno(), OFFSET.size)
    real_time, real_gmtime, real_localtime = time.time, time.gmtime, time.localtime

    def now() -> float:
        return float(real_time() + OFFSET.unpack_from(shared)[0])

    def of_now(real: Callable[[float], time.struct_time]) -> Callable[..., time.struct_time]:
        return lambda seconds=None: real(now() if seconds is None else seconds)

    class JumpingDatetime(_REAL, metaclass=_AnyDatetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> JumpingDatetime:
            return cls.fromtimestamp(now(), tz)

        @classmethod
        def utcnow(cls) -> JumpingDatetime:
            return cls.fromtimestamp(now(), datetime.timezone.utc).replace(tzinfo=None)

        @classmethod
        def today(cls) -> JumpingDatetime:
            return cls.fromtimestamp(now())

    dates = types.ModuleType("datetime")
    vars(dates).update(vars(datetime), datetime=JumpingDatetime)
    clocks: Any = time
    clocks.time, clocks.time_ns = now, lambda: int(now() * 1e9)
    clocks.gmtime, clocks.localtime = of_now(real_gmtime), of_now(real_localtime)
    for name, module in list(sys.modules.items()):
        if name.startswith(("prefect_eachlabs.", "botocore.", "boto3.")):
            if vars(module).get("datetime") is _REAL:
                vars(module)["datetime"] = JumpingDatetime
            elif vars(module).get("datetime") is datetime:
                vars(module)["datetime"] = dates


def fill_the_disk(largest_bytes: int) -> None:
    """No file of this process grows beyond so many bytes: a write says "File too large", as a full disk "No space"."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_bytes, largest_bytes))


class Batch:
    """One of its batches, as the file `results` tells it: a line at its beginning, and one at its end."""

    def __init__(self, told: dict[str, Any], source: int) -> None:
        self.run_id = told["run_id"] or uuid4().hex
        self._results = Path(told["results"])
        self._name = uuid4().hex
        tallies = httpx.get(f"{told['emulator']}/_emulator/tallies", timeout=60).json()
        self._note(
            buyer=told["name"], source=source, run_id=self.run_id, accepted=tallies["billed"], began=time.monotonic()
        )

    def ended(self, status: int, printed: str) -> None:
        try:
            answer = json.loads(printed)
        except ValueError:
            answer = None
        self._note(status=status, answer=answer, memory_mb=memory_mb(os.getpid()))

    def _note(self, **said: Any) -> None:
        with self._results.open("a") as file:
            file.write(json.dumps({"batch": self._name, **said}) + "\n")


def run(told: dict[str, Any]) -> int:
    """Batch after batch; what becomes of each goes into the file `results`."""
    cli = importlib.import_module("prefect_eachlabs.cli.main")  # after the clock
    command: Any = importlib.import_module("prefect_eachlabs.cli.batch")
    state, stop = Path(told["state"]), Path(told["stop"])
    while True:
        at = int(state.read_text()) if state.exists() else 1
        batch, printed = Batch(told, at), io.StringIO()
        command.uuid4 = partial(UUID, batch.run_id)
        with contextlib.redirect_stdout(printed):
            status = cli.main(["batch", told["sources"].format(at), "--to", told["to"], "--json", *told["flags"]])
        batch.ended(status, printed.getvalue())
        if told["once"] or stop.exists():
            return status
        aside = state.with_suffix(".new")
        aside.write_text(str(at + 1))
        os.replace(aside, state)


def main() -> int:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # started in the background it would hear no Ctrl-C
    try:
        told = json.loads(sys.argv[1])
        jump_with(Path(told["clock"]))
        if told["largest_file_bytes"] is not None:
            fill_the_disk(told["largest_file_bytes"])
        return run(told)
    except KeyboardInterrupt:  # outside of a command: while modules are imported
        return 130


if __name__ == "__main__":
    sys.exit(main())
