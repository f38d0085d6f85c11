"""Leases without a server: a small file counts the slots of an account for all processes of a user on one machine.

The file (`~/.local/state/prefect-eachlabs/limits-ACCOUNT-....json`, see `state_folders`) holds the leases: which limit,
how many slots, when each ends, whose it is. It is read and written whole under its lock (`flock`), in some 0.1 ms.
Times are the machine's own since it started, which all its processes share; after a reboot the file has another name.

- A process that ends leaves its leases to end by themselves. What a process has leased it puts back into a file that
  somebody damaged or removed, the next time it looks.
- **A file that cannot be used** stops nobody: the process counts alone until it can, and says so.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import os
import secrets
import stat
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import httpx
from pydantic import BaseModel, PositiveInt

from prefect_eachlabs.limits.leases import LEASE_SECONDS, Denied, Granted, Kind, LeaseGone, clock
from prefect_eachlabs.limits.limiter import RateLimiter
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


def machine_limiter(settings: AccountSettings) -> RateLimiter:
    """The account's limits, shared with the other processes of this user on this machine."""
    return RateLimiter(settings, FileLeases(settings))


def state_folders() -> tuple[Path, Path]:
    """Where the file may be: `$XDG_STATE_HOME/prefect-eachlabs` (`~/.local/state/...`), else the temporary folder's."""
    state = Path(os.environ.get("XDG_STATE_HOME", ""))
    if not state.is_absolute():
        state = Path("~/.local/state").expanduser()
    return state / "prefect-eachlabs", Path(tempfile.gettempdir()) / f"prefect-eachlabs-{os.geteuid()}"


class Row(NamedTuple):
    """A lease, as it stands in the file."""

    kind: Kind
    slots: PositiveInt
    ends_at: float
    pid: int


Rows = dict[str, Row]


class _Contents(BaseModel):
    version: Literal[2]
    leases: Rows


class FileLeases:
    """`Leases` in a file.

    Args:
        settings: The account; its key is in no name and no file. Where processes have different numbers for a limit,
            each keeps to its own.
        folder: Where the file is; the first of `state_folders` that can be used when None.
    """

    parts = 100
    """A lease costs next to nothing here, so that slots are leased one by one: 60 of them are 2 KB."""
    turn_seconds = 0.5
    spread = 0.0
    """A process is mostly alone on its machine: 53 pictures a minute in place of 46."""
    loses_slots = False

    def __init__(self, settings: AccountSettings, folder: Path | None = None) -> None:
        self._account = settings.account
        # httpx writes one API in one way, whatever the case of its host and with its port or without.
        where = hashlib.sha256(f"{httpx.URL(settings.base_url)}\n{_boot_id()}".encode()).hexdigest()[:16]
        self._name = f"limits-{settings.account}-{where}.json"
        self._folder = folder
        self._own: Rows = {}
        self._seen: Rows = {}
        """All leases when this process looked last."""
        self._is_alone = False
        self._is_written = True
        """Whether `_seen` stands in the file, as far as this process could read it."""

    def __repr__(self) -> str:
        return f"<FileLeases {self.where}: {len(self._own)} of {len(self._seen)} leases>"

    @cached_property
    def _path(self) -> Path | None:
        """The file; None: this process counts alone."""
        try:
            if not HAS_FILE_LOCKS:
                raise OSError("this system has no file locks")
            path = (_first_usable(state_folders()) if self._folder is None else _usable(self._folder)) / self._name
        except OSError as error:
            self._count_alone(error)
            self.turn_seconds = 0.0
            return None
        _remove_old_ones(path.parent)
        return path

    @property
    def where(self) -> str:
        """The file."""
        return "(no file)" if self._path is None else str(self._path)

    async def lease(self, kind: Kind, slots: int, limit: int) -> Granted:
        """As `Leases` says; the process's own number is the one that counts."""
        async with self._rows() as rows:
            if _taken(rows, kind) + slots > limit:
                pids = {row.pid for row in rows.values() if row.kind is kind} - {os.getpid()}
                raise Denied(f"other processes on this machine (pid {', '.join(map(str, sorted(pids)))})")
            lease_id = secrets.token_hex(4)
            rows[lease_id] = self._own[lease_id] = Row(kind, slots, _end(), os.getpid())
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

    async def taken(self, kind: Kind) -> int:
        async with self._rows() as rows:
            return _taken(rows, kind)

    async def close(self) -> None:
        """Nothing is held open."""

    @asynccontextmanager
    async def _rows(self) -> AsyncIterator[Rows]:
        """The leases that have not ended, to be changed; nothing is awaited meanwhile."""
        descriptor = await self._lock()
        try:
            rows = self._seen if descriptor is None or not self._is_written else self._read(descriptor)
            now = clock()
            self._seen = {name: row for name, row in {**rows, **self._own}.items() if row.ends_at > now}
            self._own = {name: row for name, row in self._seen.items() if name in self._own}
            yield self._seen
            if descriptor is not None:
                try:
                    _write(descriptor, self._seen)
                    self._is_written, self._is_alone = True, False
                except OSError as error:
                    self._is_written = False
                    self._count_alone(error)
        finally:
            if descriptor is not None:
                os.close(descriptor)

    async def _lock(self) -> int | None:
        """The descriptor of the locked file; None: this process counts alone, and waits for nobody meanwhile."""
        loop = asyncio.get_running_loop()
        until = loop.time() + LOCK_GIVEN_UP_SECONDS
        try:
            while self._path is not None:
                _usable(self._path.parent)
                if (descriptor := _try_lock(self._path)) is not None:
                    return descriptor
                if self._is_alone or loop.time() >= until:
                    raise OSError("another process holds its lock and does not go on")
                await asyncio.sleep(LOCK_AGAIN_SECONDS)
        except OSError as error:
            self._count_alone(error)
        return None

    def _read(self, descriptor: int) -> Rows:
        body = os.pread(descriptor, LARGEST_FILE_BYTES, 0).partition(b"\n")[0]  # up to its end mark
        if not body and not self._own:
            return {}
        try:
            rows = _Contents.model_validate_json(body).leases
            if any(row.ends_at > clock() + LEASE_SECONDS + 1.0 for row in rows.values()):
                raise ValueError("a lease of another time")
        except ValueError as error:
            logger.warning(
                "%s could not be read (%s) and is written anew: what other processes on this machine have sent in the "
                "last minute may be missing from it, and the account's limits be passed.",
                self._path,
                str(error).partition("\n")[0] if body else "somebody has removed or emptied it",
            )
            return {}
        return rows

    def _count_alone(self, error: OSError) -> None:
        if self._is_alone:
            return
        self._is_alone = True
        logger.warning(
            "The account's limits are counted in this process alone, since the file that shares them on this machine "
            "cannot be used (%s). Run no other process for account %s meanwhile, or share them through a Prefect "
            "server (PREFECT_API_URL).",
            error,
            self._account,
        )


def _end() -> float:
    return math.ceil((clock() + LEASE_SECONDS) * 10) / 10


def _taken(rows: Rows, kind: Kind) -> int:
    return sum(row.slots for row in rows.values() if row.kind is kind)


def _write(descriptor: int, rows: Rows) -> None:
    """In place: a process that is killed meanwhile has written all of it, or, beyond 4 KiB, leaves a damaged file.

    Replacing it by a renamed one would be safe at any size, and takes 2 ms on ext4, which writes it to the disk.
    """
    body = _Contents(version=2, leases=rows).model_dump_json().encode()
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


def _remove_old_ones(folder: Path) -> None:
    """Those of emulators on other ports and of earlier boots. Best effort."""
    with suppress(OSError):
        for path in folder.glob("limits-*"):
            if time.time() - path.stat().st_mtime > KEPT_SECONDS and (descriptor := _try_lock(path)) is not None:
                path.unlink(missing_ok=True)
                os.close(descriptor)


def _boot_id() -> str:
    """Differs after each reboot, and between machines with one home; empty where nobody says it."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _first_usable(folders: tuple[Path, Path]) -> Path:
    try:
        return _usable(folders[0])
    except OSError as error:
        logger.info("The limits of the account are not kept in %s: %s", folders[0], error)
    return _usable(folders[1])


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
