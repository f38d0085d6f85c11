"""What a person sees of a batch in the Prefect UI: its progress, its chunks, its report."""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Sequence
from contextlib import suppress
from typing import TypeVar
from uuid import UUID

from prefect.artifacts import (
    acreate_progress_artifact,
    aupdate_progress_artifact,
    create_progress_artifact,
    update_progress_artifact,
)

from prefect_eachlabs.artifacts import escaped, plain, quietly, show_markdown, table
from prefect_eachlabs.batch.outcomes import BatchResult, Outcome
from prefect_eachlabs.batch.progress import Progress
from prefect_eachlabs.batch.run import Batch
from prefect_eachlabs.engine.doors import Plan, beside_the_loop, either, on_the_loop
from prefect_eachlabs.engine.runtime import Gateway
from prefect_eachlabs.errors import EachlabsError
from prefect_eachlabs.tasks import log

logger = logging.getLogger(__name__)
T = TypeVar("T")

LOG_EVERY = 6
"""Every sixth look at the progress is a line in the log."""
SHEET_WIDTH_PX = 900
SHEET_PX = 1_400
JPEG_QUALITY = 75


class ProgressShown:
    """The progress artifact, and a line in the run's log every now and then."""

    def __init__(self) -> None:
        self._artifact: UUID | None = None
        self._times = 0

    def show(self, progress: Progress, *, at_the_end: bool = False) -> Plan[None]:
        """The artifact is made the first time, and renewed each further one."""
        percent, line = round(100 * progress.share, 1), progress.line()
        artifact = self._artifact
        if artifact is None:
            made = either(
                lambda: create_progress_artifact(percent, description=line),
                lambda: acreate_progress_artifact(percent, description=line),
            )
            found = yield from quietly(made)
            self._artifact = found if isinstance(found, UUID) else None
        else:
            yield from quietly(
                either(
                    lambda: update_progress_artifact(artifact, percent, description=line),
                    lambda: aupdate_progress_artifact(artifact, percent, description=line),
                )
            )
        if self._times % LOG_EVERY == 0 or at_the_end:
            log(line)
        self._times += 1


def show_report(gateway: Gateway, batch: Batch, result: BatchResult) -> Plan[None]:
    """The artifact of the whole batch, with the contact sheet out of the bucket."""
    sheet = None
    with suppress(EachlabsError):
        found = yield from on_the_loop(gateway, batch.folder.store.get(batch.folder.key("contact-sheet.png")))
        sheet = found.body if found is not None else None
    markdown = yield from beside_the_loop(lambda: report_markdown(result, batch.first_not_there, sheet))
    key = f"eachlabs-batch-{''.join(c if c.isalnum() else '-' for c in result.batch_id.lower() if c.isascii())}"
    yield from show_markdown(markdown, key=key, description=plain(f"Batch {result.batch_id}"))


def chunk_markdown(outcomes: Sequence[Outcome]) -> str:
    """A chunk's rows, each with its picture's name, or why it has none."""
    rows = [
        (
            one.place,
            one.state.value,
            escaped(one.prompt, 120),
            escaped(one.file_name if one.uri else one.why, 200),
            "" if one.cost_usd is None else f"{one.cost_usd:.4f}",
        )
        for one in outcomes
    ]
    return table(rows, head=("row", "state", "prompt", "picture, or why not", "USD"))


def report_markdown(result: BatchResult, not_there: Sequence[Outcome], sheet: bytes | None) -> str:
    """The totals, the first rows without a picture, and the contact sheet.

    Args:
        result: What the batch came to.
        not_there: Rows without a picture.
        sheet: The contact sheet as a PNG.
    """
    counts = (result.items, result.stored, result.reused, result.failed, result.ambiguous, result.skipped)
    cells = [*map(str, counts), result.money, f"{result.pictures_cost_usd:.4f}"]
    head = ("items", "stored", "reused", "failed", "ambiguous", "skipped", "spent in this run", "USD of all pictures")
    blocks = [
        f"<h1>Batch {escaped(result.batch_id)}</h1>",
        table([cells], head=head),
        f"<p>Report: <code>{escaped(result.index_uri or result.report_uri)}</code></p>",
    ]
    if result.stopped_by:
        blocks.append(f"<p><b>Stopped:</b> {escaped(result.stopped_by, 500)}</p>")
    if not_there:
        shown = f", the first {len(not_there)}" if len(not_there) < result.not_there else ""
        blocks.append(f"<h2>Not there: {escaped(result.why, 400)}{shown}</h2>")
        rows = [(one.place, one.state.value, escaped(one.why, 300), escaped(one.prompt, 120)) for one in not_there]
        blocks.append(table(rows, head=("row", "state", "why", "prompt")))
    if sheet is not None and (url := _sheet_url(sheet)) is not None:
        blocks.append(f'<p><img width="{SHEET_WIDTH_PX}" alt="contact sheet" src="{url}"></p>')
    return "\n".join(blocks)


def _sheet_url(sheet: bytes) -> str | None:
    """The sheet as a small JPEG in a `data:` URL: an artifact travels with every look at the run's page."""
    try:
        from PIL import Image  # noqa: PLC0415 - an extra

        with Image.open(io.BytesIO(sheet)) as opened:
            picture = opened.convert("RGB")
    except (ImportError, OSError, ValueError, SyntaxError):
        return None
    picture.thumbnail((SHEET_PX, 2 * SHEET_PX))
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}"
