"""Leases without a server: a small file counts the slots of an account for all processes of a user on one machine.

The file (`~/.local/state/prefect-eachlabs/limits-ACCOUNT-....json`, see `state_folders`) holds the leases: which limit,
how many slots, when each ends, whose it is. It is read and written whole under its lock (`flock`), in some 0.1 ms.
Times are the machine's own since it started, which all its processes share; after a reboot the file has another name.

- A process that ends leaves its leases to end by themselves. What a process has leased it puts back into a file that
  somebody damaged or removed, the next time it looks.
- **A file that cannot be used** stops nobody: the process counts alone and says so, once.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import math
import os
import secrets
import stat
import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import httpx

from prefect_eachlabs.limits.shared import LEASE_SECONDS, Count, Denied, Granted, LeaseGone, SharedSlots, clock
from prefect_eachlabs.limits.window import Kind, LocalSlots, SlotSource
from prefect_eachlabs.settings import AccountSettings

try:
    import fcntl
except ImportError:  # Windows
    HAS_FILE_LOCKS = False
else:
    HAS_FILE_LOCKS = True

logger = logging.getLogger(__name__)

LOCK_AGAIN_SECONDS = 0.005
LOCK_GIVEN_UP_SECONDS = 5.0
"""The lock is held for a millisecond; a process that was stopped just then holds it for longer than anybody waits."""
LARGEST_FILE_BYTES = 1_000_000
KEPT_SECONDS = 86_400.0
"""A file that nobody has written for a day is of no use: whatever it says has passed."""


def machine_source(settings: AccountSettings) -> SlotSource:
    """The account's limits, shared with the other processes of this user on this machine."""
    if settings.requests_per_minute is None and settings.max_in_flight is None:
        return LocalSlots(requests_per_minute=None, max_in_flight=None)
    if not HAS_FILE_LOCKS:
        logger.warning(
            "On this system processes cannot share the account's limits through a file: run one at a time for account "
            "%s, or share them through a Prefect server (PREFECT_API_URL).",
            settings.account,
        )
        return LocalSlots(requests_per_minute=settings.requests_per_minute, max_in_flight=settings.max_in_flight)
    return SharedSlots(settings, FileLeases(settings))


def state_folders(environ: Mapping[str, str] | None = None) -> tuple[Path, Path]:
    """Where the file may be: `$XDG_STATE_HOME/prefect-eachlabs` (`~/.local/state/...`), else the temporary folder's."""
    environ = os.environ if environ is None else environ
    state = Path(environ.get("XDG_STATE_HOME", ""))
    if not state.is_absolute():
        state = Path("~/.local/state").expanduser()
    user = os.getuid() if hasattr(os, "getuid") else "user"
    return state / "prefect-eachlabs", Path(tempfile.gettempdir()) / f"prefect-eachlabs-{user}"


class Unreadable(Exception):
    """The file is not one of ours, or a damaged one."""


class Row(NamedTuple):
    """A lease, as it stands in the file."""

    kind: str
    slots: int
    ends_at: float
    pid: int


Rows = dict[str, Row]


class FileLeases:
    """`Leases` in a file.

    Args:
        settings: The account; its key is in no name and no file. Where processes have different numbers for a limit,
            each keeps to its own.
        folder: Where the file is; the first of `state_folders` that can be used when None.
    """

    lots = 100
    """A lease costs next to nothing here, so that slots are leased one by one: 60 of them are 2 KB."""
    spread = 0.0
    """A process is mostly alone on its machine: 53 pictures a minute in place of 46."""
    loses_slots = False

    def __init__(self, settings: AccountSettings, folder: Path | None = None) -> None:
        self._account = settings.account
        # httpx writes one API in one way, whatever the case of its host and with its port or without.
        where = hashlib.sha256(f"{httpx.URL(settings.base_url)}\n{_boot_id()}".encode()).hexdigest()[:16]
        self._name = f"limits-{settings.account}-{where}.json"
        self._limits: dict[Kind, int] = {}
        self._own: Rows = {}
        self._seen: Rows = {}
        """All leases when this process looked last."""
        self._path: Path | None = None
        """None: this process counts alone."""
        try:
            self._path = (_first_usable(state_folders()) if folder is None else _usable(folder)) / self._name
            self._remove_old_ones()
        except OSError as error:
            self._count_alone(error)

    def __repr__(self) -> str:
        return f"<FileLeases {self._account}, {self.where}: {len(self._own)} of {len(self._seen)} leases>"

    @property
    def where(self) -> str:
        """The file."""
        return "(no file)" if self._path is None else str(self._path)

    async def ensure(self, kind: Kind, limit: int) -> int:
        """The process's own number is the one that counts."""
        self._limits[kind] = limit
        return limit

    async def lease(self, kind: Kind, slots: int) -> Granted:
        limit = self._limits[kind]
        async with self._rows() as rows:
            if _taken(rows, kind) + slots > limit:
                pids = {row.pid for row in rows.values() if row.kind == kind.value} - {os.getpid()}
                raise Denied(f"other processes on this machine (pid {', '.join(map(str, sorted(pids)))})")
            lease_id = secrets.token_hex(4)
            rows[lease_id] = self._own[lease_id] = Row(kind.value, slots, _end(), os.getpid())
        return Granted(lease_id, limit)

    async def renew(self, lease_id: str) -> None:
        async with self._rows() as rows:
            if lease_id not in rows:
                raise LeaseGone("this process stood still for a minute, and its slots have gone to others meanwhile.")
            rows[lease_id] = self._own[lease_id] = rows[lease_id]._replace(ends_at=_end())

    async def release(self, lease_id: str) -> None:
        async with self._rows() as rows:
            rows.pop(lease_id, None)
            self._own.pop(lease_id, None)

    async def count(self, kind: Kind) -> Count | None:
        async with self._rows() as rows:
            return Count(self._limits[kind], _taken(rows, kind))

    async def close(self) -> None:
        """Nothing is held open."""

    @asynccontextmanager
    async def _rows(self) -> AsyncIterator[Rows]:
        """The leases that have not ended, to be changed; nothing is awaited meanwhile."""
        descriptor = await self._lock()
        try:
            rows = self._seen if descriptor is None or self._path is None else self._read(self._path, descriptor)
            now = clock()
            self._own = {name: row for name, row in self._own.items() if row.ends_at > now}
            self._seen = {name: row for name, row in {**rows, **self._own}.items() if row.ends_at > now}
            yield self._seen
            if descriptor is not None:
                try:
                    _write(descriptor, self._seen)
                except OSError as error:
                    self._count_alone(error)
        finally:
            if descriptor is not None:
                os.close(descriptor)

    async def _lock(self) -> int | None:
        """The descriptor of the locked file; None: this process counts alone."""
        until = clock() + LOCK_GIVEN_UP_SECONDS
        try:
            while self._path is not None:
                if (descriptor := _try_lock(self._path)) is not None:
                    return descriptor
                if clock() >= until:
                    raise OSError("another process holds its lock and does not go on")
                await asyncio.sleep(LOCK_AGAIN_SECONDS)
        except OSError as error:
            self._count_alone(error)
        return None

    def _read(self, path: Path, descriptor: int) -> Rows:
        body = os.pread(descriptor, LARGEST_FILE_BYTES, 0).partition(b"\n")[0]  # up to its end mark
        try:
            if body:
                return _parsed(body, clock() + LEASE_SECONDS + 1.0)
            if not self._own:
                return {}
            raise Unreadable("somebody has removed or emptied it")
        except Unreadable as error:
            logger.warning(
                "%s could not be read (%s) and is written anew: what other processes on this machine have sent in the "
                "last minute may be missing from it, and the account's limits be passed.",
                path,
                error,
            )
            return {}

    def _count_alone(self, error: OSError) -> None:
        self._path = None
        logger.warning(
            "The account's limits are counted in this process alone, since the file that shares them on this "
            "machine cannot be used (%s). Run no other process for account %s meanwhile.",
            error,
            self._account,
        )

    def _remove_old_ones(self) -> None:
        """Those of emulators on other ports and of earlier boots. Best effort."""
        assert self._path is not None
        with suppress(OSError):
            for path in self._path.parent.glob("limits-*"):
                if time.time() - path.stat().st_mtime > KEPT_SECONDS:
                    descriptor = _try_lock(path)
                    if descriptor is not None:
                        path.unlink(missing_ok=True)
                        os.close(descriptor)


def _end() -> float:
    return math.ceil((clock() + LEASE_SECONDS) * 10) / 10


def _taken(rows: Rows, kind: Kind) -> int:
    return sum(row.slots for row in rows.values() if row.kind == kind.value)


def _parsed(body: bytes, latest: float) -> Rows:
    """Raises `Unreadable`."""
    try:
        said = json.loads(body)
        if said["version"] != 2:
            raise Unreadable("it is of another version")
        rows = {
            str(name): Row(Kind(kind).value, int(slots), float(ends_at), int(pid))
            for name, (kind, slots, ends_at, pid) in said["leases"].items()
        }
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise Unreadable(f"{type(error).__name__}: {error}") from error
    if not all(row.slots > 0 and row.ends_at <= latest for row in rows.values()):
        raise Unreadable("a lease of nothing, or of another time")
    return rows


def _write(descriptor: int, rows: Rows) -> None:
    """In place: a process that is killed meanwhile has written all of it, or, beyond 4 KiB, leaves a damaged file.

    Replacing it by a renamed one would be safe at any size, and takes 2 ms on ext4, which writes it to the disk.
    """
    body = json.dumps({"version": 2, "leases": rows}, separators=(",", ":")).encode()
    os.pwrite(descriptor, body + b"\n", 0)
    os.ftruncate(descriptor, len(body) + 1)


def _try_lock(path: Path) -> int | None:
    """The descriptor of the locked file; None: somebody else has it at this moment."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        found = os.fstat(descriptor)
        _check_owner(found, path)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.stat(path).st_ino == found.st_ino:  # not removed between opening and locking
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _boot_id() -> str:
    """Differs after each reboot, and between machines with one home; empty where nobody says it."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _first_usable(folders: tuple[Path, ...]) -> Path:
    for folder in folders[:-1]:
        try:
            return _usable(folder)
        except OSError as error:
            logger.info("The limits of the account are not kept in %s: %s", folder, error)
    return _usable(folders[-1])


def _usable(folder: Path) -> Path:
    """The folder, made and for this user alone. Raises `OSError`."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise OSError(f"{folder} is not a folder")
    _check_owner(found, folder)
    if stat.S_IMODE(found.st_mode) & 0o077:
        folder.chmod(0o700)
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        raise OSError(f"{folder} cannot be written")
    return folder


def _check_owner(found: os.stat_result, path: Path) -> None:
    if found.st_uid != os.geteuid():
        raise OSError(f"{path} belongs to another user")
