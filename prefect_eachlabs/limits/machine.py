"""The limits of an account without a server: shared by the processes of a user on one machine, through a small file.

The file (`~/.local/state/prefect-eachlabs/limits-ACCOUNT-....json`, see `state_folders`) holds what each process says
of itself: slots taken, slots that cool, since when it waits. It is read and written whole under its lock (`flock`), in
some 0.1 ms. All times in it are the machine's monotonic clock, which its processes share; after a reboot the file has
another name.

- **Alive or dead** is told by a second lock, which each process holds on a file of its own for as long as it lives: the
  operating system drops it, whatever ended the process. What a living process has taken counts until it gives it back,
  even while it is stopped (Ctrl-Z).
- **What a dead process had taken** counts from when it was last seen: a request for a window, since it may have been
  sent just then; a prediction in flight, which goes on at the vendor, for as long as predictions can be expected to
  take (`_left_in_flight_seconds`).
- **Turns**: who holds fewer slots takes the next one, among equals who has waited longest.
- **A file that cannot be used** stops nobody: the process counts alone and says so, once.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import math
import os
import random
import secrets
import stat
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefect_eachlabs.limits.window import SAFETY_SECONDS, WINDOW_SECONDS, Kind, LocalSlots, Slot, SlotSource
from prefect_eachlabs.settings import AccountSettings

try:
    import fcntl
except ImportError:  # Windows
    HAS_FILE_LOCKS = False
else:
    HAS_FILE_LOCKS = True

logger = logging.getLogger(__name__)

BEAT_SECONDS = 5.0
"""A process that holds or waits for something writes at least so often."""
UNSEEN_SECONDS = 2 * BEAT_SECONDS
"""Who was not seen for longer is dead or stopped; it was alive until this at most, if it is dead."""
LOOK_AGAIN_SECONDS = 0.5
"""Who waits for slots that others hold looks so often, or when the next one comes back."""
DENIED_SECONDS = 0.1
"""What the file said is believed for so long by who would only ask again, unless a slot of its own came back."""
RIVAL_SECONDS = 4 * LOOK_AGAIN_SECONDS
"""Who waits and was not seen for longer is not given way to."""
IN_FLIGHT_SECONDS = 60.0
"""What a dead process left in flight counts at least so long."""
REMEMBERED_HOLDS = 20
LOCK_WITHIN_SECONDS = 0.005
LOCKED_AGAIN_SECONDS = 0.02
LOCK_GIVEN_UP_SECONDS = 5.0
"""The lock is held for a millisecond; a process that was stopped just then holds it for longer than anybody waits."""
TICKS = 10
"""A second in the file: so a window of a large account is 600 numbers at most."""
LARGEST_FILE_BYTES = 1_000_000
KEPT_SECONDS = 86_400.0
"""A file that nobody has written for a day is of no use: whatever it says has passed."""

_live_locks: set[int] = set()


def _let_go_in_a_child() -> None:
    """A forked child holds its parent's lock open: it would keep the parent alive for the others."""
    for descriptor in _live_locks:
        with suppress(OSError):
            os.close(descriptor)
    _live_locks.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_a_child)


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
    return MachineSlots(settings)


def state_folders(environ: Mapping[str, str] | None = None) -> tuple[Path, Path]:
    """Where the file may be: `$XDG_STATE_HOME/prefect-eachlabs` (`~/.local/state/...`), else the temporary folder's."""
    environ = os.environ if environ is None else environ
    state = Path(environ.get("XDG_STATE_HOME", ""))
    if not state.is_absolute():
        state = Path("~/.local/state").expanduser()
    user = os.getuid() if hasattr(os, "getuid") else "user"
    return state / "prefect-eachlabs", Path(tempfile.gettempdir()) / f"prefect-eachlabs-{user}"


# ------------------------------------------------------------------ what the file says


class Unreadable(Exception):
    """The file is not one of ours, or a damaged one."""


class Cooling:
    """Slots that come back by the passing of time: how many, in which tenth of a second."""

    def __init__(self, rows: Mapping[int, int] | None = None) -> None:
        self.rows = dict(rows or {})

    def add(self, until: float, count: int = 1) -> None:
        tick = math.ceil(until * TICKS)
        self.rows[tick] = self.rows.get(tick, 0) + count

    def merge(self, other: Cooling) -> None:
        for tick, count in other.rows.items():
            self.rows[tick] = self.rows.get(tick, 0) + count

    def count(self, now: float) -> int:
        """How many have not come back yet."""
        for tick in [tick for tick in self.rows if tick <= now * TICKS]:
            del self.rows[tick]
        return sum(self.rows.values())

    def next_at(self, now: float) -> float | None:
        return min(self.rows) / TICKS if self.count(now) else None

    def last_at(self, now: float) -> float | None:
        return max(self.rows) / TICKS if self.count(now) else None

    def as_json(self) -> list[list[int]]:
        return [[tick, count] for tick, count in self.rows.items()]

    @staticmethod
    def of(rows: Any, latest: float) -> Cooling:
        read: dict[int, int] = {}
        for tick, count in rows:
            if not (isinstance(tick, int) and isinstance(count, int) and tick <= latest * TICKS and count > 0):
                raise Unreadable("a slot that comes back at no time")
            read[tick] = count
        return Cooling(read)


@dataclass
class Holding:
    """What one process has, as it says itself."""

    pid: int
    seen_at: float
    taken: dict[Kind, int] = field(default_factory=lambda: dict.fromkeys(Kind, 0))
    cooling: Cooling = field(default_factory=Cooling)
    waiting_since: dict[Kind, float] = field(default_factory=dict)

    def held(self, kind: Kind, now: float) -> int:
        """Slots of it that count now."""
        return self.taken[kind] + (self.cooling.count(now) if kind is Kind.REQUESTS else 0)

    def is_empty(self, now: float) -> bool:
        return not (any(self.taken.values()) or self.cooling.count(now) or self.waiting_since)

    def as_json(self) -> dict[str, Any]:
        return {
            "pid": self.pid,
            "seen_at": self.seen_at,
            "taken": {kind.value: count for kind, count in self.taken.items()},
            "cooling": self.cooling.as_json(),
            "waiting_since": {kind.value: at for kind, at in self.waiting_since.items()},
        }

    @staticmethod
    def of(said: Any, now: float) -> Holding:
        seen_at = float(said["seen_at"])
        taken = {kind: int(said["taken"][kind.value]) for kind in Kind}
        if not seen_at <= now + 1.0 or min(taken.values()) < 0:
            raise Unreadable("it is of another time, or holds less than nothing")
        waiting = {Kind(kind): float(at) for kind, at in said["waiting_since"].items()}
        return Holding(int(said["pid"]), seen_at, taken, Cooling.of(said["cooling"], now + KEPT_SECONDS), waiting)


@dataclass
class State:
    """The file: each process's holding by its name, what ended ones left, and how long slots in flight were held."""

    holdings: dict[str, Holding] = field(default_factory=dict)
    left: dict[Kind, Cooling] = field(default_factory=lambda: {kind: Cooling() for kind in Kind})
    held_seconds: list[float] = field(default_factory=list)

    def held(self, kind: Kind, now: float) -> int:
        """Slots that are taken, by whomever."""
        return self.left[kind].count(now) + sum(holding.held(kind, now) for holding in self.holdings.values())

    def to_bytes(self) -> bytes:
        answer = {
            "version": 1,
            "holdings": {name: holding.as_json() for name, holding in self.holdings.items()},
            "left": {kind.value: cooling.as_json() for kind, cooling in self.left.items()},
            "held_seconds": self.held_seconds,
        }
        return json.dumps(answer, separators=(",", ":")).encode()

    @staticmethod
    def of(body: bytes, now: float) -> State:
        """Raises `Unreadable`."""
        try:
            said = json.loads(body)
            if said["version"] != 1:
                raise Unreadable("it is of another version")
            return State(
                {str(name): Holding.of(holding, now) for name, holding in said["holdings"].items()},
                {kind: Cooling.of(said["left"][kind.value], now + KEPT_SECONDS) for kind in Kind},
                [float(seconds) for seconds in said["held_seconds"]][-REMEMBERED_HOLDS:],
            )
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise Unreadable(f"{type(error).__name__}: {error}") from error


# ------------------------------------------------------------------ the files


class Busy(Exception):
    """Somebody else has the lock at this moment."""


class Files:
    """The account's file, its lock, and the lock that says that a process lives.

    Args:
        settings: The account; its key is in no name and no file.
        folder: Where they are; the first of `state_folders` that can be used when None.
    """

    def __init__(self, settings: AccountSettings, folder: Path | None = None) -> None:
        self.folder = _first_usable(state_folders()) if folder is None else _usable(folder)
        where = hashlib.sha256(f"{settings.base_url}\n{_boot_id()}".encode()).hexdigest()[:16]
        self._base = f"limits-{settings.account}-{where}"
        self.path = self.folder / f"{self._base}.json"
        self._alive: tuple[Path, int] | None = None
        self._remove_old_ones()

    @contextmanager
    def locked(self) -> Iterator[int]:
        """The descriptor of the file, locked. Raises `Busy` after 5 ms, `OSError`."""
        until = time.monotonic() + LOCK_WITHIN_SECONDS
        while (descriptor := self._try_lock(self.path)) is None:
            if time.monotonic() >= until:
                raise Busy
            time.sleep(LOCK_WITHIN_SECONDS / 20)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def read(self, descriptor: int) -> bytes:
        """Up to its end mark; empty in a new file."""
        return os.pread(descriptor, LARGEST_FILE_BYTES, 0).partition(b"\n")[0]

    def write(self, descriptor: int, body: bytes) -> None:
        """In place: a process that is killed meanwhile has written all of it, or, beyond 4 KiB, leaves a damaged one.

        Replacing it by a renamed one would be safe at any size, and takes 2 ms on ext4, which writes it to the disk.
        """
        os.pwrite(descriptor, body + b"\n", 0)
        os.ftruncate(descriptor, len(body) + 1)

    def say_alive(self, name: str) -> None:
        """This process lives, for the others, until it ends or calls `say_gone`."""
        path = self._alive_path(name)
        if self._alive is not None and not path.exists():  # somebody cleared the folder
            self.say_gone()
        if self._alive is None:
            descriptor = self._try_lock(path)
            if descriptor is None:
                raise OSError(f"{path} is locked by somebody else")
            _live_locks.add(descriptor)
            self._alive = path, descriptor

    def say_gone(self) -> None:
        if self._alive is not None:
            path, descriptor = self._alive
            self._alive = None
            path.unlink(missing_ok=True)
            if descriptor in _live_locks:  # in a forked child it is closed already
                _live_locks.discard(descriptor)
                os.close(descriptor)

    def is_alive(self, name: str) -> bool:
        path = self._alive_path(name)
        if not path.exists():
            return False
        descriptor = self._try_lock(path)
        if descriptor is None:
            return True
        path.unlink(missing_ok=True)
        os.close(descriptor)
        return False

    def _alive_path(self, name: str) -> Path:
        return self.folder / f"{self._base}.{name}.alive"

    def _try_lock(self, path: Path) -> int | None:
        """The descriptor of the locked file; None: somebody else has it."""
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

    def _remove_old_ones(self) -> None:
        """Those of emulators on other ports, of earlier boots and of killed processes. Best effort."""
        with suppress(OSError):
            for path in self.folder.glob("limits-*"):
                if time.time() - path.stat().st_mtime > KEPT_SECONDS:
                    descriptor = self._try_lock(path)  # a process that lives for days has its own locked
                    if descriptor is not None:
                        path.unlink(missing_ok=True)
                        os.close(descriptor)


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


# ------------------------------------------------------------------ the source


class _MachineSlot:
    def __init__(self, source: MachineSlots, kind: Kind) -> None:
        self._source: MachineSlots | None = source
        self._kind = kind
        self._taken_at = source.now()

    def done(self) -> None:
        if (source := self._source) is not None:
            self._source = None
            source.slot_done(self._kind, self._taken_at)

    def unused(self) -> None:
        if (source := self._source) is not None:
            self._source = None
            source.slot_unused(self._kind)


class MachineSlots:
    """The slots of an account, shared by the processes of this user on this machine; a `SlotSource`.

    Args:
        settings: The account and its two limits; where processes have different numbers, each keeps to its own.
        folder: Where the file is; the first of `state_folders` that can be used when None.
    """

    def __init__(self, settings: AccountSettings, folder: Path | None = None) -> None:
        self._account = settings.account
        self._longest_seconds = settings.deadline_seconds
        self._limits = {Kind.REQUESTS: settings.requests_per_minute, Kind.IN_FLIGHT: settings.max_in_flight}
        self._unlimited = LocalSlots(requests_per_minute=None, max_in_flight=None)
        self._listeners: list[Callable[[], None]] = []
        self._name = secrets.token_hex(8)
        self._mine = Holding(os.getpid(), 0.0)
        self._seen = State()
        """What all held when this process looked last, itself included."""
        self._denied_until: dict[Kind, float] = {}
        self._held_seconds: deque[float] = deque(maxlen=REMEMBERED_HOLDS)
        self._timer: asyncio.TimerHandle | None = None
        self._busy_since: float | None = None
        self._warned = self._closed = False
        self._files: Files | None = None
        try:
            self._files = Files(settings, folder)
        except OSError as error:
            self._count_alone(error)

    def __repr__(self) -> str:
        where = "alone" if self._files is None else self._files.path.name
        return f"<MachineSlots {self._account}, {where}: {self._mine.taken}, {len(self._seen.holdings)} processes>"

    def now(self) -> float:
        return asyncio.get_running_loop().time()

    # ---- a source of slots

    def try_take(self, kind: Kind) -> Slot | None:
        """A slot, when one is free and it is this process's turn."""
        if self._limits[kind] is None:
            return self._unlimited.try_take(kind)
        now = self.now()
        if self._closed or now < self._denied_until.get(kind, now):
            return None
        if self._exchange(kind):
            return _MachineSlot(self, kind)
        self._denied_until[kind] = min(now + DENIED_SECONDS, self.next_change_at(kind) or now)
        return None

    def wanted(self, kind: Kind, count: int) -> None:
        """Whether this process waits, for the others to see."""
        if count == 0 and self._mine.waiting_since.pop(kind, None) is not None and not self._closed:
            self._exchange()

    def next_change_at(self, kind: Kind) -> float | None:
        """When the next slot comes back; half a second from now where others may give one back."""
        if self._limits[kind] is None or self._closed:
            return None
        now = self.now()
        coolings = [self._seen.left[kind]]
        if kind is Kind.REQUESTS:
            coolings += [holding.cooling for holding in self._holdings()]
        times = [at for cooling in coolings if (at := cooling.next_at(now)) is not None]
        if self._busy_since is not None or len(self._holdings()) > 1:
            times.append(now + LOOK_AGAIN_SECONDS)
        return min(times, default=None)

    def pressure(self, kind: Kind) -> float:
        """How much of the limit is in use on this machine, as this process saw it last: 0.0 to 1.0."""
        limit, now = self._limits[kind], self.now()
        if limit is None:
            return 0.0
        held = self._seen.left[kind].count(now) + sum(holding.held(kind, now) for holding in self._holdings())
        return min(1.0, held / limit)

    def limit(self, kind: Kind) -> int | None:
        """The account's limit; None: there is none."""
        return self._limits[kind]

    def held_by_others(self, kind: Kind) -> str | None:
        """Which slots other processes of this machine hold, or left when they ended, and when they come back."""
        now = self.now()
        others = [holding for name, holding in self._seen.holdings.items() if name != self._name]
        holding_some = [holding for holding in others if holding.held(kind, now)]
        left = self._seen.left[kind].count(now)
        held = left + sum(holding.held(kind, now) for holding in holding_some)
        if not held:
            return None
        limit = self._limits[kind]
        assert limit is not None
        if self._mine.held(kind, now) * (len(holding_some) + bool(left) + 1) >= limit:
            return None  # it has its share of them, and waits for its own
        what = f"{held} of {limit} {'requests a minute' if kind is Kind.REQUESTS else 'slots in flight'}"
        said = []
        if holding_some:
            pids = ", ".join(
                f"{holding.pid}{' (stopped?)' if now - holding.seen_at > UNSEEN_SECONDS else ''}"
                for holding in holding_some
            )
            said.append(f"other processes on this machine hold (pid {pids})")
        if left:
            seconds = (self._seen.left[kind].last_at(now) or now) - now
            said.append(f"ended processes have left: those come back within {math.ceil(seconds)} s")
        return f"{what} of account {self._account!r} that {'; and some that '.join(said)}"

    def on_change(self, listener: Callable[[], None]) -> None:
        self._listeners.append(listener)

    async def close(self) -> None:
        """Leaves what is in use to count down by itself; nothing of this process is needed after that."""
        if self._closed:
            return
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        if self._mine.is_empty(self.now()) and self._name not in self._seen.holdings:
            self._say_gone()
            return
        until = self.now() + LOCK_GIVEN_UP_SECONDS / 2
        self._exchange(leave=True)
        while self._busy_since is not None and self.now() < until:
            await asyncio.sleep(LOCKED_AGAIN_SECONDS)
            self._exchange(leave=True)
        self._say_gone()

    # ---- a slot's end

    def slot_done(self, kind: Kind, taken_at: float) -> None:
        if self._closed:
            return
        now = self.now()
        self._mine.taken[kind] -= 1
        if kind is Kind.REQUESTS:
            self._mine.cooling.add(now + WINDOW_SECONDS + SAFETY_SECONDS)
        else:
            self._held_seconds.append(round(now - taken_at, 1))
        self._denied_until.pop(kind, None)
        self._exchange()

    def slot_unused(self, kind: Kind) -> None:
        if not self._closed:
            self._mine.taken[kind] -= 1
            self._denied_until.pop(kind, None)
            self._exchange()

    # ---- with the others

    def _tell(self) -> None:
        for listener in self._listeners:
            listener()

    def _holdings(self) -> list[Holding]:
        return [*(holding for name, holding in self._seen.holdings.items() if name != self._name), self._mine]

    def _exchange(self, take: Kind | None = None, *, leave: bool = False) -> bool:
        """Reads the others' holdings, takes a slot when there is one, and writes down this process's own."""
        now, taken = self.now(), False
        self._mine.seen_at = now
        try:
            if self._files is None:
                return self._take(take, State(), now)
            with self._files.locked() as descriptor:
                state = self._read(self._files, descriptor, now)
                state.holdings.pop(self._name, None)
                self._bury_the_dead(self._files, state, now)
                taken = self._take(take, state, now)
                if leave:
                    _leave(self._mine, state, now, self._left_in_flight_seconds(state))
                elif not self._mine.is_empty(now):
                    self._files.say_alive(self._name)
                    state.holdings[self._name] = self._mine
                state.held_seconds = [*state.held_seconds, *self._held_seconds][-REMEMBERED_HOLDS:]
                self._files.write(descriptor, state.to_bytes())
                self._held_seconds.clear()
                self._busy_since = None
                self._seen = state
                return taken
        except Busy:
            self._busy_since = now if self._busy_since is None else self._busy_since
            if now - self._busy_since < LOCK_GIVEN_UP_SECONDS:
                self._beat_at(now + random.uniform(0.5, 1.5) * LOCKED_AGAIN_SECONDS)
                return False
            return self._take_alone(OSError("another process holds its lock and does not go on"), take, now)
        except OSError as error:
            return taken or self._take_alone(error, take, now)
        finally:
            if self._busy_since is None:
                self._beat_at(None if self._closed or self._mine.is_empty(now) else now + BEAT_SECONDS)

    def _take(self, kind: Kind | None, state: State, now: float) -> bool:
        """Whether a slot was taken, into `_mine`, which is not in `state`."""
        if kind is None:
            return False
        limit, held = self._limits[kind], self._mine.held(kind, now)
        assert limit is not None
        free = limit - held - state.held(kind, now)
        since = self._mine.waiting_since.get(kind, now)
        rivals = [
            other
            for other in state.holdings.values()
            if kind in other.waiting_since
            and now - other.seen_at < RIVAL_SECONDS
            and (other.held(kind, now), other.waiting_since[kind]) < (held, since)
        ]
        if free <= len(rivals):
            self._mine.waiting_since[kind] = since
            return False
        self._mine.waiting_since.pop(kind, None)  # if it waits for more, then after the others
        self._mine.taken[kind] += 1
        return True

    def _take_alone(self, error: OSError, kind: Kind | None, now: float) -> bool:
        self._count_alone(error)
        self._seen = State(left=self._seen.left)
        return self._take(kind, State(left=self._seen.left), now)

    def _read(self, files: Files, descriptor: int, now: float) -> State:
        body = files.read(descriptor)
        try:
            if body:
                return State.of(body, now)
            if self._name not in self._seen.holdings:
                return State()
            raise Unreadable("somebody has removed or emptied it")
        except Unreadable as error:
            logger.warning(
                "%s could not be read (%s) and is written anew: what other processes on this machine have sent in the "
                "last minute may be missing from it, and the account's limits be passed.",
                files.path,
                error,
            )
            return State()

    def _bury_the_dead(self, files: Files, state: State, now: float) -> None:
        for name, holding in list(state.holdings.items()):
            if now - holding.seen_at > UNSEEN_SECONDS and not files.is_alive(name):
                del state.holdings[name]
                _leave(holding, state, holding.seen_at + UNSEEN_SECONDS, self._left_in_flight_seconds(state))

    def _left_in_flight_seconds(self, state: State) -> float:
        """How long a prediction that nobody waits for any more may go on: twice what the longest of the last 20 took.

        At least 60 s, since the next may be of a slower model, and at most the account's deadline, when it has timed
        out. One that takes longer still is counted by the API alone, whose 429 creates and bills nothing.
        """
        longest = max(state.held_seconds, default=0.0)
        return min(max(IN_FLIGHT_SECONDS, 2 * longest), max(IN_FLIGHT_SECONDS, self._longest_seconds))

    def _count_alone(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "The account's limits are counted in this process alone, since the file that shares them on this "
                "machine cannot be used (%s). Run no other process for account %s meanwhile.",
                error,
                self._account,
            )

    def _beat_at(self, at: float | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if at is None else asyncio.get_running_loop().call_at(at, self._beat)

    def _beat(self) -> None:
        self._timer = None
        was_busy = self._busy_since is not None
        self._exchange()
        if was_busy and self._busy_since is None:
            self._tell()

    def _say_gone(self) -> None:
        if self._files is not None:
            with suppress(OSError):
                self._files.say_gone()


def _leave(holding: Holding, state: State, last_used_at: float, in_flight_seconds: float) -> None:
    """What a process held goes on counting without it."""
    left = state.left
    left[Kind.REQUESTS].merge(holding.cooling)
    if requests := holding.taken[Kind.REQUESTS]:
        left[Kind.REQUESTS].add(last_used_at + WINDOW_SECONDS + SAFETY_SECONDS, requests)
    if in_flight := holding.taken[Kind.IN_FLIGHT]:
        left[Kind.IN_FLIGHT].add(last_used_at + in_flight_seconds, in_flight)
