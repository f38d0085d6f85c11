"""How far a batch is: one line for logs, a bar for terminals; all of it on stderr."""

from __future__ import annotations

import logging
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TextIO

logger = logging.getLogger(__name__)

RATE_WINDOW_SECONDS = 120.0
BAR_WIDTH = 20


@dataclass(frozen=True)
class Progress:
    """A batch at one moment.

    Attributes:
        done: Rows that have come to their end.
        total: Rows there are: estimated from what of the source was read, until `total_is_known`.
        per_minute: Pictures stored a minute, over the last two minutes.
        left_seconds: Until the end at this pace; None while that cannot be told.
        past_deadline: Slots in flight that are held by predictions past their deadlines.
    """

    done: int
    total: int | None
    total_is_known: bool
    stored: int
    reused: int
    not_there: int
    cost_usd: float
    per_minute: float
    left_seconds: float | None
    past_deadline: int = 0

    @property
    def share(self) -> float:
        """Done, 0 to 1."""
        return min(1.0, self.done / self.total) if self.total else 0.0

    def line(self) -> str:
        """`412 of ~1,632 (25%): 400 stored, 10 reused, 2 not there; 52.1 a minute, $15.60, 23 min left`."""
        share = f" ({self.share:.0%})" if self.total else ""
        counts = f"{self.stored:,} stored, {self.reused:,} reused, {self.not_there:,} not there"
        return f"{self._done_of_total()}{share}: {counts}; {self._pace(f'{self.per_minute:.1f}')}"

    def short_line(self) -> str:
        """`412 of ~1,632, 2 not there, 52 a minute, $15.60, 23 min left`: beside a bar there is room for that."""
        not_there = f", {self.not_there:,} not there" if self.not_there else ""
        return f"{self._done_of_total()}{not_there}, {self._pace(f'{self.per_minute:.0f}')}"

    def _pace(self, per_minute: str) -> str:
        said = f"{per_minute} a minute, ${self.cost_usd:,.2f}"
        if self.left_seconds is not None:
            said += f", {duration(self.left_seconds)} left"
        return said + (f", {self.past_deadline} slots held past the deadline" if self.past_deadline else "")

    def _done_of_total(self) -> str:
        if self.total is None:
            return f"{self.done:,}"
        return f"{self.done:,} of {'' if self.total_is_known else '~'}{self.total:,}"


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7_200 else f"{seconds / 3_600:.1f} h"


class Pace:
    """How many a minute, over a short while."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def see(self, now: float, count: int) -> None:
        self._seen.append((now, count))
        while len(self._seen) > 2 and now - self._seen[1][0] >= RATE_WINDOW_SECONDS:
            self._seen.popleft()

    def per_minute(self, now: float, count: int) -> float:
        if not self._seen or now - self._seen[0][0] < 1:
            return 0.0
        since, before = self._seen[0]
        return (count - before) * 60 / (now - since)


Show = Callable[[Progress], None]


def log_lines(progress: Progress) -> None:
    """A line in the log."""
    logger.info("%s", progress.line())


@contextmanager
def terminal_bar(stream: TextIO | None = None) -> Iterator[Show]:
    """A bar by rich, which redraws itself with each new state.

    Args:
        stream: Where it is drawn; stderr when None.
    """
    from rich.console import Console  # noqa: PLC0415 - a tenth of a second, which a batch without a bar saves
    from rich.progress import BarColumn, TextColumn  # noqa: PLC0415 - as above
    from rich.progress import Progress as RichProgress  # noqa: PLC0415 - as above

    bar = BarColumn(bar_width=BAR_WIDTH)
    columns: tuple[Any, ...] = (bar, TextColumn("{task.description}", markup=False))
    with RichProgress(*columns, console=Console(file=stream or sys.stderr), redirect_stdout=False) as drawn:
        task = drawn.add_task("reading the last report", total=None)

        def show(progress: Progress) -> None:
            drawn.update(task, completed=progress.done, total=progress.total, description=progress.short_line())

        yield show
