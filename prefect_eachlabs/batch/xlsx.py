"""Excel tables (.xlsx), read by openpyxl in a confined process: the first sheet, from its first row that is not empty.

A workbook is a zip of XML: 1 MB of it may inflate to gigabytes, name a cell in row 10^12, or hold a text of 1 GB that
every cell refers to. Nothing is taken from it but values: formulas count as what they last came to.
"""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterable
from typing import Any

from prefect_eachlabs.batch.parquet import Reader, Remote
from prefect_eachlabs.confined import JobFailed

MOST_ROWS = 1_048_576
"""Of a sheet, by Excel's own bound."""
SHOWN_CHARACTERS = 200
"""Of a column's name."""
ERRORS = frozenset({"#NULL!", "#DIV/0!", "#VALUE!", "#REF!", "#NAME?", "#NUM!", "#N/A", "#GETTING_DATA"})
READER = "prefect_eachlabs.batch.xlsx:XlsxReader"


class XlsxReader(Reader):
    """Reads Excel; in the child alone."""

    def __init__(self) -> None:
        import openpyxl  # type: ignore[import-untyped]  # noqa: PLC0415 - an extra, without types

        self._load = openpyxl.load_workbook

    def _opened(self, file: Remote) -> dict[str, Any]:
        book = self._load(io.BufferedReader(file, 64 * 1024), read_only=True, data_only=True, keep_links=False)
        if not book.worksheets:
            raise JobFailed("it has no sheet of cells")
        sheet = book.worksheets[0]
        sheet.reset_dimensions()  # what it says of its size need not be so
        numbered = enumerate(itertools.islice(sheet.iter_rows(values_only=True), MOST_ROWS), 1)
        head_line, head = next(((line, cells) for line, cells in numbered if not _is_empty(cells)), (0, ()))
        columns = ["" if cell is None else str(cell)[:SHOWN_CHARACTERS] for cell in head]
        while columns and not columns[-1]:
            columns.pop()
        self._rows = (self._row(columns, cells) for _, cells in numbered)
        return {"columns": columns, "count": 0, "head_line": head_line}

    def _row(self, columns: list[str], cells: tuple[Any, ...]) -> str:
        if _is_empty(cells):
            return "null"
        wrong = next((cell for cell in cells if isinstance(cell, str) and cell in ERRORS), None)
        if wrong is not None:
            return json.dumps(f"a cell holds {wrong}")
        if not _is_empty(cells[len(columns) :]):
            return json.dumps(f"cells: more than the header's {len(columns)}")
        # A column without a name means nothing.
        named = zip((name.strip() for name in columns), cells, strict=False)
        return self._as_json({name: cell for name, cell in named if name})


def _is_empty(cells: Iterable[Any]) -> bool:
    return all(cell is None or cell == "" for cell in cells)
