"""From a table's rows to items: what the columns mean, why a row is refused, and under which id it goes; nothing is
bought here.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import re
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NoReturn

from prefect_eachlabs.batch.tables import (
    AS_USUAL,
    MAX_ROW_BYTES,
    PROMPTS,
    BadRow,
    Cells,
    Columns,
    Table,
    TypedTable,
    open_table,
)
from prefect_eachlabs.errors import BadInput
from prefect_eachlabs.models import DEFAULT_MODEL, Item, canonical_json
from prefect_eachlabs.net import safe_json
from prefect_eachlabs.reference_images import Roots, opened
from prefect_eachlabs.storage.s3_client import S3Access

if TYPE_CHECKING:  # the state imports this module
    from prefect_eachlabs.batch.state import Earlier, Scratch
    from prefect_eachlabs.batch.worker import Worker

KNOWN_COLUMNS = ("image_url", "model", "version")
INPUT_PREFIX = "input."
ROWS_AT_A_TIME = 100
MOST_BYTES_AHEAD = 1_000_000
"""Of rows that are read and not begun yet."""
SHOWN_CHARACTERS = 400
"""Of a refused row's prompt, in the report."""

_JSON_NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,17})(\.[0-9]+)?([eE][+-]?[0-9]{1,3})?")


@dataclass(frozen=True)
class Wanted:
    """A row that is an item.

    Attributes:
        line: Where it stands in the source: the file's line.
        item: Named by the row, or by its fingerprint when `named` is False.
        named: Whether the row has an id.
        number: The table's row, from 1 on; None: it has no other than its line.
        size_bytes: Of its input and labels, as JSON.
    """

    line: int
    item: Item
    named: bool
    number: int | None = None
    size_bytes: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Defaults:
    """The model of rows that name none."""

    model: str = DEFAULT_MODEL
    version: str | None = None


class Source:
    """An opened source: its items, and the rows that are none. What its parts mean says `open_source`.

    Raises:
        BadInput: It has no prompt column; says which columns it has.
    """

    def __init__(
        self,
        table: Table,
        name: str,
        defaults: Defaults | None = None,
        roots: Roots | None = None,
        columns: Columns = AS_USUAL,
    ) -> None:
        self.table = table
        self._roots = roots or Roots()
        self.name = name
        self._defaults = defaults or Defaults()
        wanted = (columns.prompt,) if columns.prompt else PROMPTS
        prompt = next((column for column in wanted if column in table.columns), None)
        if prompt is None and (table.columns or not table.typed):
            self._refuse(wanted[0], "" if columns.prompt else " (or 'Prompt'); --prompt-column names another")
        if columns.id is not None and columns.id not in table.columns and table.columns:
            self._refuse(columns.id)
        self._prompt = prompt or wanted[0]
        self._id = columns.id or "id"

    def _refuse(self, column: str, or_so: str = "") -> NoReturn:
        seen = ", ".join(repr(name) for name in self.table.columns if name)[:500] or "none"
        hint = " Is it separated by something else than its name says?" if len(self.table.columns) == 1 else ""
        # In the details, which a command shows and a run's state does not: it may be the first line of anything.
        raise BadInput(f"{self.name} has no column {column!r}{or_so}.", details=f"Its columns are: {seen}.{hint}")

    def rows(self) -> Iterator[Wanted | BadRow]:
        """Every row, in order; reads as it goes, and blocks."""
        for number, row in enumerate(self.table.rows(), start=1):
            # Excel shows its rows' numbers, so nobody counts without them.
            counted = row.line if isinstance(self.table, TypedTable) else number
            yield replace(row, number=counted) if isinstance(row, BadRow) else self._wanted(row, counted)

    def fraction_read(self) -> float:
        return self.table.fraction_read()

    def close(self) -> None:
        self.table.close()

    def _wanted(self, row: Cells, number: int) -> Wanted | BadRow:
        values = {name: value for name, value in row.values.items() if not _is_missing(value)}
        prompt = values.pop(self._prompt, None)
        item_id, image_url, model, version = (_plain(values.pop(name, None)) for name in (self._id, *KNOWN_COLUMNS))
        try:
            if model is None:
                model, version = self._defaults.model, version or self._defaults.version
            item = Item.wanted(
                prompt,
                image_url=self._reference(image_url),
                model=model,
                version=version,
                item_id=item_id,
                input=self._input(values),
                labels={
                    _showable(name): _label(value)
                    for name, value in values.items()
                    if not name.startswith(INPUT_PREFIX)
                },
            )
            # Rows of text were measured when they were read.
            size_bytes = _size_bytes(item)
            if self.table.typed and size_bytes > MAX_ROW_BYTES:
                raise BadInput(f"The row is larger than {MAX_ROW_BYTES // 1024} KiB.")
        except BadInput as error:
            shown = _showable(prompt)[:SHOWN_CHARACTERS] if isinstance(prompt, str) else None
            field, of, why = error.message.partition(":")
            column = {"prompt": self._prompt, "item_id": self._id}.get(field, field)
            given_id = _showable(str(item_id))[:140] if item_id else None
            return BadRow(row.line, column + of + why, given_id, shown, number)
        except RecursionError:
            return BadRow(row.line, "a value is nested too deeply", number=number)
        return Wanted(row.line, item, item_id is not None, number, size_bytes)

    def _reference(self, image_url: Any) -> object:
        if isinstance(image_url, bytes):
            # Rows are read ahead: pictures of 100 MB each would fill the memory.
            raise BadInput("image_url: bytes. Name the picture's file, object or URL instead.")
        return opened(image_url, self._roots)

    def _input(self, values: dict[str, Any]) -> dict[str, Any]:
        given: dict[str, Any] = {}
        if self.table.typed and isinstance(values.get("input"), Mapping):
            given.update(values.pop("input"))
        for name, value in values.items():
            if name.startswith(INPUT_PREFIX) and name != INPUT_PREFIX:
                given[name.removeprefix(INPUT_PREFIX)] = value if self.table.typed else _typed(value)
        return given


Row = tuple[Wanted | BadRow, "Earlier | None"]
"""A row under its id, and what an earlier report says about that id."""


class Rows:
    """The rows of a source in order, once; read beside the loop, by the worker."""

    def __init__(self, source: Source, scratch: Scratch, worker: Worker) -> None:
        self._source = source
        self._scratch = scratch
        self._worker = worker
        self._stream = self._read()
        self._read_ahead = 0
        self._fraction_read = 0.0
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
        return round(self._read_ahead / self._fraction_read) if self._fraction_read else None

    async def _read(self) -> AsyncIterator[Row]:
        rows = self._source.rows()

        def some() -> list[Row]:
            self._scratch.flush()
            several: list[Row] = []
            size_bytes = 0
            for row in itertools.islice(rows, ROWS_AT_A_TIME):
                known = self._under_its_id(row) if isinstance(row, Wanted) else row
                said = self._scratch.earlier(known.item.item_id) if isinstance(known, Wanted) else None
                several.append((known, said))
                size_bytes += row.size_bytes if isinstance(row, Wanted) else 0
                if size_bytes > MOST_BYTES_AHEAD:
                    break
            return several

        while several := await self._worker(some):
            # Both at once: the worker may be reading on whenever somebody asks for the total.
            self._read_ahead, self._fraction_read = self._read_ahead + len(several), self._source.fraction_read()
            for row in several:
                yield row
            # Rows that the last report settles come by the thousand; the loop has other work, too.
            await asyncio.sleep(0)
        self.all_read = True

    def _under_its_id(self, wanted: Wanted) -> Wanted | BadRow:
        item = wanted.item
        if wanted.named:
            if self._scratch.take_id(item.item_id):
                return wanted
            reason = f"id: {item.item_id!r} stands in an earlier row, too. Give each row an id of its own."
            prompt = item.input.get("prompt")
            shown = prompt[:SHOWN_CHARACTERS] if isinstance(prompt, str) else None
            return BadRow(wanted.line, reason, item.item_id, shown, wanted.number)
        item_id = self._scratch.take_fingerprint(item.fingerprint)
        if item_id == item.item_id:
            return wanted
        return replace(wanted, item=item.model_copy(update={"item_id": item_id}))


def open_source(
    source: str,
    access: S3Access | None = None,
    defaults: Defaults | None = None,
    roots: Roots | None = None,
    columns: Columns = AS_USUAL,
    *,
    within: Roots | None = None,
) -> Source:
    """Opens a source of prompts and reads its head. Blocks.

    Args:
        source: A path or `s3://bucket/key`: CSV, TSV, JSON Lines, Parquet or Excel.
        access: How to reach a bucket; boto3's own chain when None.
        defaults: The model of rows that name none.
        roots: Where the reference pictures may be that rows name by their files; None: nowhere.
        columns: Which hold the prompts and ids, where they are not called so.
        within: Where a file of this machine must be; None: anywhere.

    Raises:
        BadInput: It is not there, no table, or has no prompt column.
        SetupError: It may not be read, or what reads it is missing.

    Example:
        >>> source = open_source("prompts.csv")             # doctest: +SKIP
        >>> for row in source.rows(): print(row.line)       # doctest: +SKIP
    """
    table = open_table(source, access, columns, within)
    try:
        return Source(table, source, defaults, roots, columns)
    except BaseException:
        table.close()
        raise


def _is_missing(value: object) -> bool:
    """An empty cell; data frames write missing text as NaN."""
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _plain(value: Any) -> Any:
    """An id, a URL, a model or a version: without the blanks around it; a number as people write it."""
    if isinstance(value, str):
        return value.strip() or None
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _typed(text: str) -> Any:
    """A text cell of the input as JSON has it: numbers, true, false, lists, objects, text in quotes; else as it is.

    Models refuse the text "42" where they want the number 42.
    """
    word = text.strip()
    if word in ("true", "false"):
        return word == "true"
    if _JSON_NUMBER.fullmatch(word) or word[:1] in ("[", "{", '"'):
        try:
            value = safe_json.strict(word)
        except (ValueError, RecursionError):
            return text
        return text if isinstance(value, float) and math.isinf(value) else value
    return text


def _label(value: object) -> str:
    if isinstance(value, str):
        return _showable(value)
    try:
        return _showable(json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str))
    except (ValueError, RecursionError):
        return "(unreadable)"


def _size_bytes(item: Item) -> int:
    return len(canonical_json([item.input, item.labels]))


def _showable(text: str) -> str:
    """Text that every file can hold: half a character becomes a question mark."""
    return text.encode("utf-8", "replace").decode("utf-8")
