"""What a person sees of a batch in the Prefect UI: its progress, its chunks, its report."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from prefect.artifacts import (
    acreate_progress_artifact,
    aupdate_progress_artifact,
    create_progress_artifact,
    update_progress_artifact,
)

from prefect_eachlabs.artifacts import UNSEEN, escaped, plain, quietly, show_markdown, table
from prefect_eachlabs.batch.outcomes import BatchResult, Outcome
from prefect_eachlabs.batch.progress import Progress
from prefect_eachlabs.batch.run import Batch
from prefect_eachlabs.engine.sync_async import Plan, either
from prefect_eachlabs.tasks import log

LOG_EVERY = 6
"""Every sixth look at the progress is a line in the log."""
GALLERY_COLUMNS = 3
GALLERY_PX = 170
"""Three of them are as wide as Prefect's narrower page on a laptop."""


class ProgressShown:
    """The progress artifact, and a line in the run's log every now and then."""

    def __init__(self) -> None:
        self._artifact: UUID | None = None
        self._times = 0

    def show(self, progress: Progress, *, at_the_end: bool = False) -> Plan[None]:
        """The artifact is made the first time, and renewed each further one."""
        percent, line = round(100 * progress.share, 1), progress.line()
        if self._artifact is None:
            made = either(create_progress_artifact, acreate_progress_artifact, progress=percent, description=line)
            found = yield from quietly(made)
            self._artifact = found if isinstance(found, UUID) else None
        else:
            renewed = either(
                update_progress_artifact,
                aupdate_progress_artifact,
                artifact_id=self._artifact,
                progress=percent,
                description=line,
            )
            yield from quietly(renewed)
        if self._times % LOG_EVERY == 0 or at_the_end:
            log(line)
        self._times += 1


def show_report(batch: Batch, result: BatchResult) -> Plan[None]:
    """The artifact of the whole batch, with pictures from all over it."""
    markdown = report_markdown(result, batch.first_not_there, batch.gallery)
    key = f"eachlabs-batch-{''.join(c if c.isalnum() else '-' for c in result.batch_id.lower() if c.isascii())}"
    counts = f"{result.stored + result.reused:,} of {result.items:,} pictures"
    yield from show_markdown(
        markdown,
        key=key,
        description=f"{plain(f'Batch {result.batch_id}')} · {counts} · ${result.pictures_cost_usd:.2f}",
    )


def chunk_markdown(outcomes: Sequence[Outcome]) -> str:
    """A chunk's rows, each with its picture's name, or why it has none."""
    rows = [
        (
            escaped(one.item_id or one.place, 60),
            one.state.value,
            escaped(one.prompt, 120, breaks=UNSEEN),
            escaped(one.file_name) if one.uri else escaped(one.why, 200, breaks=UNSEEN),
            "" if one.cost_usd is None else f"{one.cost_usd:.4f}",
        )
        for one in outcomes
    ]
    return table(rows, head=("item", "state", "prompt", "picture, or why not", "USD"))


def report_markdown(
    result: BatchResult, not_there: Sequence[Outcome], gallery: Sequence[tuple[Outcome, str]] = ()
) -> str:
    """The totals, the first rows without a picture, and some of the pictures, each with its thumbnail's data URL."""
    names = ("stored", "reused", "failed", "ambiguous", "skipped")
    counts = [(name, f"{count:,}") for name in names if (count := getattr(result, name))]
    facts = [
        ("items", f"{result.items:,}"),
        *counts,
        ("spent in this run", escaped(result.money)),
        ("all its pictures", f"${result.pictures_cost_usd:,.4f}"),
        ("report", escaped(result.index_uri or result.report_uri)),
    ]
    blocks = [f"<h1>Batch {escaped(result.batch_id)}</h1>", table(facts)]
    if result.stopped_by:
        blocks.append(f"<p><b>Stopped:</b> {escaped(result.stopped_by, 500)}</p>")
    if not_there:
        shown = f", the first {len(not_there)}" if len(not_there) < result.not_there else ""
        blocks.append(f"<h2>Not there: {escaped(result.why, 400)}{shown}</h2>")
        rows = [
            (
                escaped(one.item_id or one.place, 60),
                one.state.value,
                escaped(one.why, 300, breaks=UNSEEN),
                escaped(one.prompt, 120, breaks=UNSEEN),
            )
            for one in not_there
        ]
        blocks.append(table(rows, head=("item", "state", "why", "prompt")))
    if gallery:
        there = result.stored + result.reused
        blocks.append(f"<h2>{'Pictures' if len(gallery) == there else f'{len(gallery)} of {there:,} pictures'}</h2>")
        cells = []
        for outcome, url in gallery:
            cost = "" if outcome.cost_usd is None else f" · ${outcome.cost_usd:.4f}"
            picture = f'<img width="{GALLERY_PX}" alt="{escaped(outcome.item_id, breaks="")}" src="{url}">'
            prompt, name = escaped(outcome.prompt, 80, breaks=UNSEEN), escaped(outcome.item_id, 16)
            cells.append(f"{picture}<br>{prompt}<br><small>{name}{cost}</small>")
        shown = table(cells[at : at + GALLERY_COLUMNS] for at in range(0, len(cells), GALLERY_COLUMNS))
        blocks.append(shown.replace("<td>", f'<td valign="top" width="{100 // GALLERY_COLUMNS}%">'))
    return "\n".join(blocks)
