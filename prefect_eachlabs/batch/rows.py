"""A source's rows, each under its id, read ahead a little beside the loop."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

from prefect_eachlabs.batch.source import SHOWN_CHARACTERS, Source, Wanted
from prefect_eachlabs.batch.state import Earlier, Scratch
from prefect_eachlabs.batch.tables import BadRow
from prefect_eachlabs.batch.worker import Worker

ROWS_AT_A_TIME = 100


@dataclass(frozen=True)
class Row:
    """A row under its id, and what an earlier report says about that id."""

    row: Wanted | BadRow
    earlier: Earlier | None = None


class Rows:
    """The rows of a source in order, once.

    Args:
        source: Where they come from.
        scratch: Remembers which ids are taken.
        worker: Reads beside the loop.
    """

    def __init__(self, source: Source, scratch: Scratch, worker: Worker) -> None:
        self._source = source
        self._scratch = scratch
        self._worker = worker
        self._stream = self._read()
        self._read_ahead = 0
        self.all_read = False

    async def next(self) -> Row | None:
        """The next row; None at the end.

        Raises:
            EachlabsError: The source cannot be read on.
        """
        async for row in self._stream:
            return row
        return None

    @property
    def total(self) -> int | None:
        """How many there are: estimated by how much of the source was read, until all is."""
        if self.all_read:
            return self._read_ahead
        fraction = self._source.fraction_read()
        return round(self._read_ahead / fraction) if fraction else None

    async def _read(self) -> AsyncIterator[Row]:
        rows = self._source.rows()

        def some() -> list[Row]:
            self._scratch.flush()
            return [self._known(row) for row in itertools.islice(rows, ROWS_AT_A_TIME)]

        while several := await self._worker(some):
            self._read_ahead += len(several)
            for row in several:
                yield row
            # Rows that the last report settles come by the thousand; the loop has other work, too.
            await asyncio.sleep(0)
        self.all_read = True

    def _known(self, row: Wanted | BadRow) -> Row:
        if isinstance(row, Wanted):
            row = self._under_its_id(row)
        return Row(row, self._scratch.earlier(row.item.item_id) if isinstance(row, Wanted) else None)

    def _under_its_id(self, wanted: Wanted) -> Wanted | BadRow:
        item = wanted.item
        if wanted.named:
            if self._scratch.take_id(item.item_id):
                return wanted
            reason = f"id: {item.item_id!r} stands in an earlier row, too. Give each row an id of its own."
            prompt = item.input.get("prompt")
            shown = prompt[:SHOWN_CHARACTERS] if isinstance(prompt, str) else None
            return BadRow(wanted.line, reason, item.item_id, shown)
        item_id = self._scratch.take_fingerprint(item.fingerprint)
        if item_id == item.item_id:
            return wanted
        return replace(wanted, item=item.model_copy(update={"item_id": item_id}))
