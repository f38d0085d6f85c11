"""Who asked what and when: the record that makes the emulator a judge. Bounded in memory."""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from dataclasses import dataclass
from typing import Any

WINDOW_SECONDS = 60.0


def key_hash(key: str) -> str:
    """How a key is called in journal and tallies: never by itself."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:12]


@dataclass
class Entry:
    """One request. `status` is None while it is under way, and for ever when its connection was cut.

    Attributes:
        at: Monotonic seconds of its arrival; `wall` is the date, without the emulator's skew.
        key: Hash of the API key, None when it carried none.
        fault: What was injected, as `create:lost_answer`.
        seconds: From arrival to the end of the answer.
    """

    number: int
    at: float
    wall: str
    method: str
    path: str
    endpoint: str = "other"
    key: str | None = None
    status: int | None = None
    prediction_id: str | None = None
    fault: str | None = None
    request_id: str | None = None
    seconds: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))  # asdict would copy deeply: seconds for a full journal


class Window:
    """Moments of the last 60 s: a moment exactly 60 s old has left."""

    def __init__(self) -> None:
        self._moments: deque[float] = deque()

    def count(self, now: float) -> int:
        while self._moments and self._moments[0] + WINDOW_SECONDS <= now:
            self._moments.popleft()
        return len(self._moments)

    def add(self, now: float) -> int:
        self._moments.append(now)
        return self.count(now)

    def free_in(self, now: float, limit: int) -> float:
        """Seconds until fewer than `limit` are left."""
        over = self.count(now) - limit
        return 0.0 if over < 0 else self._moments[over] + WINDOW_SECONDS - now


class Journal:
    """All requests, the newest `keep` of them one by one."""

    def __init__(self, keep: int) -> None:
        self.entries: deque[Entry] = deque(maxlen=keep)
        self.total = 0
        self.by_endpoint: Counter[str] = Counter()
        self.by_status: Counter[str] = Counter()
        self.violations: Counter[str] = Counter()
        self.worst_window = 0
        self.rejected_429 = 0
        self._arrived: dict[str, Window] = {}
        self._admitted: dict[str, Window] = {}

    def open(self, *, at: float, wall: str, method: str, path: str) -> Entry:
        self.total += 1
        entry = Entry(number=self.total, at=at, wall=wall, method=method, path=path)
        self.entries.append(entry)
        return entry

    def close(self, entry: Entry, *, at: float) -> None:
        entry.seconds = at - entry.at
        self.by_endpoint[entry.endpoint] += 1
        self.by_status["cut" if entry.status is None else str(entry.status)] += 1
        self.rejected_429 += entry.status == 429 and entry.key is not None

    def admit(self, key: str, now: float, limit: int | None, *, count_rejected: bool) -> float | None:
        """Counts a request of a key. None: it is let in; else seconds until one would be."""
        self.worst_window = max(self.worst_window, self._arrived.setdefault(key, Window()).add(now))
        if limit is None:
            return None
        admitted = self._admitted.setdefault(key, Window())
        if admitted.count(now) < limit:
            admitted.add(now)
            return None
        self.violations["over_requests_per_minute"] += 1
        wait_seconds = admitted.free_in(now, limit)
        if count_rejected:
            admitted.add(now)
        return wait_seconds
