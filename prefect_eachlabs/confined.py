"""Work on what strangers wrote, done in a child process with limits of memory and time.

A picture of 250 kB may stand for 256 MB of pixels, a table of 1 kB for gigabytes of cells, and a pattern of ten
characters for years of matching. No decoder can be told to stop, and a thread cannot be ended; a process can. The
child starts without the parent's environment, grows by a stated amount at most, and is ended when its time is up.
It protects memory and time. It is not a wall: it runs as the same user.

A job is a class of a module that the parent need not import; it is made once a child, and called with what `call`
was given:

    class Thumbnail:
        def __call__(self, arguments: dict[str, Any], data: bytes, read: Read) -> tuple[dict[str, Any], bytes]: ...
"""

from __future__ import annotations

import atexit
import importlib
import json
import math
import os
import select
import signal
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import IO, Any

MAY_GROW_BYTES = 192 * 1024 * 1024
"""What a job may need beyond its libraries (60 MB with pyarrow): the worker and a child stay below 300 MB together."""
START_SECONDS = 60.0
"""Importing a library takes half a second; on a machine that is very busy, many times that."""
IDLE_SECONDS = 60.0
MOST_SHOWN_CHARACTERS = 300

_CHILD = "import sys; from prefect_eachlabs.confined import main; main(*sys.argv[1:])"
_HEAD = struct.Struct(">II")
_MOST_BYTES = 1 << 30
_PASSED_ON = ("PATH", "SYSTEMROOT", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "LANG", "LC_ALL", "TZDIR", "PYTHONHOME")

Read = Callable[[int, int], bytes]
"""Gives `size` bytes from an offset on, of a file that only the parent can read."""
Answer = tuple[dict[str, Any], bytes]


class ConfinedError(Exception):
    """The job was not done."""


class JobFailed(ConfinedError):
    """The job raised, or raises this itself to say no in its own words; the message says what."""


class TooCostly(ConfinedError):
    """It needed more memory or time than it may have; the child was ended."""


class NotInstalled(ConfinedError):
    """The job's library is not there; the message names it."""


class ConfinedProcess:
    """Runs one kind of job in a child process, one call at a time; started when needed, and again after its end.

    Args:
        job: `module:Class`.
        may_grow_bytes: How much memory the child may take beyond what it has once its libraries are loaded. Kept on
            Linux alone; elsewhere time is all that is limited.
        idle_seconds: A child that nobody calls for so long ends; None: not before it is closed, for it remembers.
    """

    def __init__(
        self, job: str, *, may_grow_bytes: int = MAY_GROW_BYTES, idle_seconds: float | None = IDLE_SECONDS
    ) -> None:
        self._job = job
        self._may_grow_bytes = may_grow_bytes
        self._idle_seconds = idle_seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._used_at = 0.0
        _all.add(self)

    def call(
        self, arguments: Mapping[str, Any], data: bytes = b"", *, seconds: float, read: Read | None = None
    ) -> Answer:
        """Has the job done. Blocks, while others' calls are done, too.

        Args:
            arguments: JSON for the job.
            data: Bytes for the job.
            seconds: The job's time, without what `read` takes.
            read: Answers the job's questions for bytes.

        Raises:
            TooCostly: It took more time, or needed more memory.
            JobFailed: The job raised.
            NotInstalled: The job's library is missing.
            OSError: No process can be started.
        """
        with self._lock:
            process = self._started()
            try:
                answer, body = self._asked(process, {**arguments, "seconds": seconds}, data, seconds, read)
            except BaseException:
                self._end()  # in the middle of a frame nothing more can be said
                raise
            self._used_at = time.monotonic()
        if "too_costly" in answer:
            self.close()
            raise TooCostly(f"it needs more than {self._may_grow_bytes >> 20} MB")
        if "error" in answer:
            raise JobFailed(answer["error"])
        return answer, body

    def _asked(
        self, process: subprocess.Popen[bytes], arguments: Mapping[str, Any], data: bytes, seconds: float, read: Any
    ) -> Answer:
        assert process.stdin is not None, "it was asked for"
        assert process.stdout is not None, "it was asked for"
        left_seconds, sent = seconds, (arguments, data)
        while True:
            began = time.monotonic()
            timer = threading.Timer(left_seconds, process.kill)
            timer.daemon = True
            timer.start()
            try:
                _write(process.stdin, *sent)
                answer, body = _read(process.stdout)
            except (OSError, EOFError) as error:
                late = time.monotonic() - began >= left_seconds
                much = f"took more than {seconds:g} s" if late else f"needs more than {self._may_grow_bytes >> 20} MB"
                raise TooCostly(f"it {much}, or made its reader fall") from error
            finally:
                timer.cancel()
            if "read" not in answer or read is None:
                return answer, body
            left_seconds = max(0.1, left_seconds - (time.monotonic() - began))
            sent = ({}, read(*answer["read"]))

    def _started(self) -> subprocess.Popen[bytes]:
        if self._idle_seconds is not None and time.monotonic() - self._used_at > self._idle_seconds / 2:
            self._end()  # it may be about to end by itself
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._end()
        environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        environment |= {
            "PYTHONPATH": os.pathsep.join(os.path.abspath(place) for place in sys.path),
            # More arenas and pools would take addresses, which are what is limited.
            "MALLOC_ARENA_MAX": "1",
            "ARROW_DEFAULT_MEMORY_POOL": "system",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        self._process = process = subprocess.Popen(
            [sys.executable, "-c", _CHILD, self._job, str(self._may_grow_bytes), str(self._idle_seconds or "")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=os.path.sep,
            env=environment,
        )
        try:
            ready, _ = self._asked(process, {}, b"", START_SECONDS, None)
        except BaseException:
            self._end()
            raise
        if "missing" in ready:
            self._end()
            raise NotInstalled(ready["missing"])
        self._used_at = time.monotonic()
        return process

    def close(self) -> None:
        """Ends the child; a later call starts another."""
        with self._lock:
            self._end()

    def __del__(self) -> None:
        self._end()

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            for pipe in (process.stdin, process.stdout):
                with suppress(OSError):
                    assert pipe is not None, "it was asked for"
                    pipe.close()
            process.wait()

    def _forget(self) -> None:
        """In a forked process: the child is the other's."""
        self._lock = threading.Lock()
        if self._process is not None:
            self._process.returncode = 0
            self._process = None


_all: weakref.WeakSet[ConfinedProcess] = weakref.WeakSet()


def _end_all() -> None:
    for one in list(_all):
        one._end()


def _forget_all() -> None:
    for one in list(_all):
        one._forget()


atexit.register(_end_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)


def _write(stream: IO[bytes], said: Mapping[str, Any], data: bytes) -> None:
    head = json.dumps(said).encode()
    stream.write(_HEAD.pack(len(head), len(data)) + head)
    stream.write(data)
    stream.flush()


def _read(stream: IO[bytes]) -> Answer:
    head_bytes, data_bytes = _HEAD.unpack(_exactly(stream, _HEAD.size))
    if head_bytes + data_bytes > _MOST_BYTES:
        raise EOFError("no frame is so long")
    head = json.loads(_exactly(stream, head_bytes))
    return head, _exactly(stream, data_bytes)


def _exactly(stream: IO[bytes], size: int) -> bytes:
    data = stream.read(size)
    if len(data) != size:
        raise EOFError("the other side is gone")
    return data


# ------------------------------------------------------------------------------------------------ in the child


def main(job: str, may_grow_bytes: str, idle_seconds: str) -> None:
    """Does jobs until the parent is gone, or asks no more."""
    patience = float(idle_seconds) if idle_seconds else None
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when this ends
    stdin, stdout = sys.stdin.buffer, os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what a library prints is no frame
    _read(stdin)
    module, _, name = job.partition(":")
    try:
        work = getattr(importlib.import_module(module), name)()
    except ImportError as error:
        _write(stdout, {"missing": str(error)[:MOST_SHOWN_CHARACTERS]}, b"")
        return
    _limit_memory(int(may_grow_bytes))
    _write(stdout, {}, b"")

    def read(offset: int, size: int) -> bytes:
        _write(stdout, {"read": [offset, size]}, b"")
        return _read(stdin)[1]

    while True:
        if os.name == "posix" and not select.select([stdin], [], [], patience)[0]:
            return
        try:
            arguments, data = _read(stdin)
        except EOFError:
            return
        _limit_time(arguments["seconds"])
        try:
            said, body = work(arguments, data, read)
        except MemoryError:
            said, body = {"too_costly": True}, b""
        except JobFailed as failed:
            said, body = {"error": str(failed)[:MOST_SHOWN_CHARACTERS]}, b""
        except Exception as error:
            said, body = {"error": f"{type(error).__name__}: {str(error)[:MOST_SHOWN_CHARACTERS]}"}, b""
        _write(stdout, said, body)


def _limit_memory(may_grow_bytes: int) -> None:
    try:
        import resource  # noqa: PLC0415 - not on Windows

        with open("/proc/self/statm") as file:
            now_bytes = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now_bytes + may_grow_bytes, resource.RLIM_INFINITY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, OSError, ValueError):
        return


def _limit_time(seconds: float) -> None:
    """The parent ends what takes too long; this is for the case that the parent is gone."""
    with suppress(ImportError, OSError, ValueError):
        import resource  # noqa: PLC0415 - not on Windows

        used = resource.getrusage(resource.RUSAGE_SELF)
        most = math.ceil(used.ru_utime + used.ru_stime + seconds) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (most, resource.RLIM_INFINITY))
