"""The end of a run: costs that were told late, the merged report, the page and the sheet."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta, timezone
from typing import Any

from prefect_eachlabs.batch.budget import Budget
from prefect_eachlabs.batch.buying import EXECUTIONS_A_PAGE, Buyer
from prefect_eachlabs.batch.outcomes import Outcome, RowState, Totals
from prefect_eachlabs.batch.pages import MOST_FAILURES, MOST_PICTURES, index_page
from prefect_eachlabs.batch.report import BatchFolder, Worker
from prefect_eachlabs.batch.sheet import MOST_FRAMES, draw_sheet
from prefect_eachlabs.batch.state import Scratch
from prefect_eachlabs.errors import EachlabsError

logger = logging.getLogger(__name__)

LOOKS_FOR_COSTS = 2
COST_PAUSE_SECONDS = 15.0
PAGES_OF_OTHERS = 5
"""Executions of other keys and runs stand among ours: so many pages more than ours would fill are looked through."""


async def tell_late_costs(buyer: Buyer, scratch: Scratch, totals: Totals, budget: Budget, worker: Worker) -> None:
    """Looks up what was billed for rows that ended before the vendor had settled it: a request for each 100."""
    for look in range(LOOKS_FOR_COSTS):
        left = await worker(scratch.count_unsettled)
        if not left:
            return
        if look:
            await asyncio.sleep(COST_PAUSE_SECONDS)
        try:
            await _look_through_executions(buyer, scratch, totals, budget, worker, left)
        except EachlabsError as error:
            logger.info("What some pictures cost is not known yet: %s", error)
            return


async def _look_through_executions(
    buyer: Buyer, scratch: Scratch, totals: Totals, budget: Budget, worker: Worker, left: int
) -> None:
    for page in range(-(-left // EXECUTIONS_A_PAGE) + PAGES_OF_OTHERS):
        rows = await buyer.executions(page * EXECUTIONS_A_PAGE)
        costs = {row.id: row.cost_usd for row in rows if row.cost_usd}
        for settled in await worker(scratch.settle, costs):
            totals.cost_was_told(settled)
            budget.told(
                settled.item_id or "", settled.model or "", settled.prediction_id or "", settled.cost_usd or 0.0
            )
            left -= 1
        if not left or len(rows) < EXECUTIONS_A_PAGE:
            return


async def write_page(
    folder: BatchFolder, scratch: Scratch, totals: Mapping[str, Any], presigned_seconds: int | None, *, home: str = ""
) -> None:
    """Writes `index.html`, with paths relative to it, or with presigned URLs where they were asked for.

    `home` is the folder below the batch's own where it goes.
    """
    links: dict[str, str] = {}
    end_at: datetime | None = None
    if presigned_seconds is not None:
        end_at = datetime.now(timezone.utc) + timedelta(seconds=presigned_seconds)
        shown = _outcomes(scratch, RowState.STORED, RowState.REUSED, most=MOST_PICTURES)
        for item_id, name in await folder.worker(lambda: [(one.item_id or "", one.file_name) for one in shown]):
            key = folder.destination.key(f"images/{name}")
            links[item_id] = await folder.store.presigned_get(key, expires_seconds=presigned_seconds)
    page = await folder.worker(_page, scratch, totals, links, end_at, home)
    await folder.store.put(folder.key(f"{home}index.html"), page, content_type="text/html; charset=utf-8")


def _page(
    scratch: Scratch, totals: Mapping[str, Any], links: dict[str, str], end_at: datetime | None, home: str
) -> bytes:
    not_there = (RowState.FAILED, RowState.AMBIGUOUS, RowState.SKIPPED)
    pieces = index_page(
        totals,
        pictures=_outcomes(scratch, RowState.STORED, RowState.REUSED, most=MOST_PICTURES),
        not_there=_outcomes(scratch, *not_there, most=MOST_FAILURES),
        links=links,
        links_end_at=end_at,
        up="../" * (2 + home.count("/")),
    )
    return "".join(pieces).encode()


def _outcomes(scratch: Scratch, *states: RowState, most: int) -> Iterator[Outcome]:
    for line in scratch.lines(*states, most=most):
        if (outcome := Outcome.from_line(line)) is not None:
            yield outcome


async def write_sheet(folder: BatchFolder, scratch: Scratch, totals: Mapping[str, Any]) -> bool:
    """Writes `contact-sheet.png` of up to 60 pictures; False where there is none to draw, or no Pillow."""
    chosen = await folder.worker(scratch.pictures, MOST_FRAMES)
    try:
        sheet = await draw_sheet(folder.store, folder.destination, chosen, totals, folder.worker) if chosen else None
        if sheet is None:
            return False
        await folder.store.put(folder.key("contact-sheet.png"), sheet, content_type="image/png")
    except EachlabsError as error:
        logger.warning("The contact sheet could not be written: %s", error)
        return False
    return True
