"""Where each picture of the demo stands, while it runs: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

WAITING, ORDERED, MADE, STORED, FAILED = "waiting", "being made", "being stored", "stored", "failed"

_AFTER = {"create": ORDERED, "await": MADE}
"""A task of the flow, by the first word of its run's name → where the picture stands once it has completed."""
_COLOURS = {WAITING: "dim", ORDERED: "cyan", MADE: "blue", STORED: "green", FAILED: "red"}


@dataclass
class _Row:
    stage: str = WAITING
    seconds: float | None = None


class Progress:
    """The stages of all pictures; may be told of a step by any thread.

    Args:
        prompts: Item id → prompt.
        console: Where it is shown.
    """

    def __init__(self, prompts: Mapping[str, str], console: Console) -> None:
        self._prompts = prompts
        self._console = console
        self._rows = {item_id: _Row() for item_id in prompts}
        self._lock = threading.Lock()
        self._begun_at = time.monotonic()
        self._spinner = Spinner("dots")

    def moved(self, item_id: str, stage: str) -> None:
        """A picture has come this far."""
        seconds = time.monotonic() - self._begun_at
        with self._lock:
            row = self._rows.get(item_id)
            if row is None or row.stage in (stage, STORED, FAILED):
                return
            row.stage = stage
            if stage in (STORED, FAILED):
                row.seconds = seconds
        if not is_live(self._console):
            self._console.print(f"{seconds:6.1f} s  {item_id:<16} {stage}", highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Shows it until the block ends; the steps come from the log lines of Prefect's task runs."""
        self._begun_at = time.monotonic()
        reader = _TaskRunReader(self)
        task_runs = logging.getLogger("prefect.task_runs")
        task_runs.addHandler(reader)
        try:
            if is_live(self._console):
                with Live(get_renderable=self._table, console=self._console, refresh_per_second=8):
                    yield
            else:
                yield
        finally:
            task_runs.removeHandler(reader)

    def _table(self) -> Table:
        table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
        widths = {"mark": 1, "item": max(map(len, self._prompts)), "stage": len(MADE), "seconds": 7}
        prompt_width = self._console.width - sum(widths.values()) - 2 * 5
        table.add_column(width=widths["mark"])
        table.add_column(width=widths["item"], no_wrap=True)
        table.add_column(width=max(prompt_width, 1), no_wrap=True, overflow="ellipsis")
        table.add_column(width=widths["stage"], no_wrap=True)
        table.add_column(width=widths["seconds"], no_wrap=True, justify="right")
        now = time.monotonic() - self._begun_at
        with self._lock:
            rows = {item_id: (row.stage, row.seconds) for item_id, row in self._rows.items()}
        for item_id, (stage, seconds) in rows.items():
            mark = {STORED: Text("✓", "green"), FAILED: Text("✗", "red")}.get(stage, self._spinner)
            shown = now if seconds is None else seconds
            table.add_row(
                mark, item_id, Text(self._prompts[item_id], "dim"), Text(stage, _COLOURS[stage]), f"{shown:.1f} s"
            )
        return table


class _TaskRunReader(logging.Handler):
    """Learns from Prefect's log lines which task run of which item has completed."""

    def __init__(self, progress: Progress) -> None:
        super().__init__(logging.INFO)
        self._progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        verb, _, item_id = str(getattr(record, "task_run_name", "")).partition(" ")
        if verb in _AFTER and record.getMessage().startswith("Finished in state Completed"):
            self._progress.moved(item_id, _AFTER[verb])


def is_live(console: Console) -> bool:
    """Whether lines can be written over: a real terminal."""
    return console.is_terminal and not console.is_dumb_terminal


@contextlib.contextmanager
def working(console: Console, what: str) -> Iterator[None]:
    """Says what is going on, with a spinner where that can be; and how long it took."""
    begun_at = time.monotonic()
    if is_live(console):
        with console.status(what):
            yield
    else:
        console.print(f"{what} ...", highlight=False, soft_wrap=True)
        yield
    console.print(f"{what}: {time.monotonic() - begun_at:.1f} s", style="dim", highlight=False, soft_wrap=True)
