"""What a person sees of a batch in the Prefect UI: its progress, its chunks, its report."""

from __future__ import annotations

import asyncio
import base64
import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.logging import get_run_logger

from prefect_eachlabs.batches.outcomes import BatchResult, Outcome
from prefect_eachlabs.batches.run import Batch
from prefect_eachlabs.gateway import Gateway

logger = logging.getLogger(__name__)
T = TypeVar("T")

PROGRESS_SECONDS = 5.0
LOG_EVERY = 6
"""Every sixth look at the progress is a line in the log."""
SHEET_WIDTH_PX = 900
MOST_SHEET_BYTES = 2_000_000
"""A sheet within a markdown artifact travels with every look at the run's page."""


class ProgressShown:
    """The progress artifact, and a line in the run's log every now and then."""

    def __init__(self, batch: Batch, gateway: Gateway) -> None:
        self._batch = batch
        self._gateway = gateway
        self._artifact: UUID | None = None
        self._at: float | None = None
        self._times = 0

    def show(self, *, at_the_end: bool = False) -> None:
        """Now and then, however often it is called; for certain at the end."""
        async def look() -> tuple[float, Any]:
            return asyncio.get_running_loop().time(), self._batch.progress()

        now, progress = self._gateway.call(look())
        if self._at is not None and now - self._at < PROGRESS_SECONDS and not at_the_end:
            return
        self._at = now
        percent, line = round(100 * progress.share, 1), progress.line()
        if self._artifact is None:
            self._artifact = quietly(lambda: _made(create_progress_artifact(percent, description=line)))
        else:
            artifact = self._artifact
            quietly(lambda: update_progress_artifact(artifact, percent, description=line))
        if self._times % LOG_EVERY == 0 or at_the_end:
            get_run_logger().info(line)
        self._times += 1


def _made(artifact: object) -> UUID:
    """Prefect types its artifacts for sync and async callers at once."""
    assert isinstance(artifact, UUID), "made from sync code"
    return artifact


def quietly(show: Callable[[], T]) -> T | None:
    """An artifact that cannot be made is no reason to stop buying, or to call pictures lost."""
    try:
        return show()
    except Exception as error:
        logger.warning("An artifact could not be made: %s: %s", type(error).__name__, str(error)[:200])
        return None


_ENTITIES = {ord(character): f"&#{ord(character)};" for character in "\\`*_{}[]()<>#+!|~&$:@"}


def _cell(text: object, most: int = 120) -> str:
    """Text that stays within its cell of a markdown table and is no markup."""
    line = " ".join(str(text if text is not None else "").split())
    line = line if len(line) <= most else line[: most - 1] + "…"
    return line.translate(_ENTITIES)


def chunk_markdown(outcomes: Sequence[Outcome]) -> str:
    rows = [
        f"| {one.row} | {one.state.value} | {_cell(one.prompt, 80)} | {_cell(one.uri or one.kind)} "
        f"| {'' if one.cost_usd is None else f'{one.cost_usd:.4f}'} |"
        for one in outcomes
    ]
    return "\n".join(["| row | state | prompt | picture, or why not | USD |", "| --- | --- | --- | --- | --- |", *rows])


def report_markdown(result: BatchResult, failures: Sequence[Outcome], sheet: bytes | None) -> str:
    counts = (result.items, result.stored, result.reused, result.failed, result.ambiguous, result.skipped)
    lines = [
        f"# Batch {_cell(result.batch_id)}",
        "",
        "| items | stored | reused | failed | ambiguous | skipped | USD in this run | USD of all pictures |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        f"| {' | '.join(map(str, counts))} | {result.cost_usd:.4f} | {result.pictures_cost_usd:.4f} |",
        "",
        f"Report: `{result.index_uri or result.report_uri}`",
        "",
    ]
    if result.stopped_by:
        lines += [f"**Stopped:** {_cell(result.stopped_by, 500)}", ""]
    if failures:
        lines += [
            f"## Not there: {_cell(result.why, 400)}",
            "",
            "| row | state | why | prompt |",
            "| --- | --- | --- | --- |",
        ]
        lines += [
            f"| {one.row} | {one.state.value} | {_cell((one.error or {}).get('message') or one.kind)} "
            f"| {_cell(one.prompt, 80)} |"
            for one in failures
        ]
        lines.append("")
    if sheet is not None and len(sheet) <= MOST_SHEET_BYTES:
        data = base64.b64encode(sheet).decode()
        lines += [f'<img width="{SHEET_WIDTH_PX}" src="data:image/png;base64,{data}">', ""]
    return "\n".join(lines)
