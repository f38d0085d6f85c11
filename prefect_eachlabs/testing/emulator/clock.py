"""Time as the emulator knows it: that of the loop it runs on, and the vendor's dates, which may be off."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Callable
from datetime import datetime, timedelta, timezone


class Clock:
    """The running loop's clock, real or virtual. Outside of a loop it stands where it was last looked at.

    Args:
        now: Where seconds that only grow come from instead, for a test that moves time by assignment.
        skew_seconds: The vendor's dates are off by so much.
    """

    def __init__(self, now: Callable[[], float] | None = None, *, skew_seconds: float = 0.0) -> None:
        self._given = now
        self._seen = 0.0
        self._origin: tuple[datetime, float] | None = None
        self._sleepers: set[asyncio.Future[None]] = set()
        self._is_stopped = False
        self.skew_seconds = skew_seconds

    def now(self) -> float:
        """Seconds that only grow."""
        if self._given is not None:
            return self._given()
        with contextlib.suppress(RuntimeError):
            self._seen = asyncio.get_running_loop().time()
        return self._seen

    async def sleep(self, seconds: float) -> None:
        """Comes back when so many seconds of the loop have passed, or when the clock is stopped."""
        if self._is_stopped or seconds <= 0:
            return
        loop = asyncio.get_running_loop()
        woken: asyncio.Future[None] = loop.create_future()
        timer = loop.call_later(seconds, self._wake, woken)
        self._sleepers.add(woken)
        try:
            await woken
        finally:
            timer.cancel()
            self._sleepers.discard(woken)

    @staticmethod
    def _wake(sleeper: asyncio.Future[None]) -> None:
        if not sleeper.done():
            sleeper.set_result(None)

    def stop(self) -> None:
        """Ends every sleep at once, those to come too: the server goes down and holds nobody back."""
        self._is_stopped = True
        for sleeper in list(self._sleepers):
            self._wake(sleeper)

    def start(self) -> None:
        """Lets sleeps be sleeps again, after a stop."""
        self._is_stopped = False

    def _began(self) -> tuple[datetime, float]:
        if self._origin is None:
            self._origin = datetime.now(timezone.utc), self.now()
        return self._origin

    def true_date(self, at: float) -> datetime:
        """The date of a moment: the wall time when it was first asked for, plus what has passed since."""
        date, zero = self._began()
        return date + timedelta(seconds=at - zero)

    def date(self, at: float) -> datetime:
        """The vendor's date of a moment, its skew included."""
        return self.true_date(at) + timedelta(seconds=self.skew_seconds)

    def moment(self, date: datetime) -> float:
        """The moment that the vendor would date so."""
        began, zero = self._began()
        return zero + (date - began).total_seconds() - self.skew_seconds


def rfc3339(date: datetime) -> str:
    """`2026-01-01T00:00:00.123Z`, as the vendor writes dates."""
    return date.astimezone(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def parse_date(text: str) -> datetime | None:
    """An RFC 3339 date; None when it is not one."""
    # Python 3.10 reads neither Z nor a fraction of other than three or six digits.
    six_digits = re.sub(r"\.(\d+)", lambda fraction: f".{fraction[1][:6]:0<6}", text.strip().replace(" ", "+"))
    try:
        date = datetime.fromisoformat(re.sub(r"[zZ]$", "+00:00", six_digits))
    except ValueError:
        return None
    return date if date.tzinfo is not None else None
