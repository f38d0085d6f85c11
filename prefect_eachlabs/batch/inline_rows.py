"""Rows that a caller holds, as a table: mappings, data frames, Arrow tables.

They are read at once, where the caller is, and kept in a temporary file: a database's cursor may not be read in another
thread, and must not stay open for the hours that a batch may take.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from pathlib import PurePath
from typing import IO, Any
from uuid import UUID

from prefect_eachlabs.batch.parquet import opened, said
from prefect_eachlabs.batch.tables import MAX_ROW_BYTES, BadRow, Cells
from prefect_eachlabs.batch.worker import on_disk
from prefect_eachlabs.errors import BadInput, SetupError

MISSING_BY_NAME = ("NAType", "NaTType")
"""What pandas puts where a value is missing, besides NaN; known by name, for pandas is not needed here."""


class InlineRows:
    """A table of rows that were handed over; a row's line is its number, from 1 on.

    Args:
        rows: Mappings (named tuples and rows of databases will do), a data frame of pandas or polars, or whatever has
            the Arrow interface `__arrow_c_stream__`. Read here, once, to the end.

    Raises:
        BadInput: They are no rows.
        SetupError: An Arrow table needs pyarrow, which is missing; or the disk does not take them.
    """

    typed = True

    def __init__(self, rows: Any) -> None:
        self._count = self._read = 0
        columns: dict[str, None] = {}
        with on_disk():
            self._file: IO[str] = tempfile.TemporaryFile("w+", encoding="utf-8", prefix="eachlabs-rows-")  # noqa: SIM115 - closed with the batch
        try:
            for row in each(rows):
                line, names = _written(row)
                columns.update(dict.fromkeys(names))
                self._count += 1
                with on_disk():
                    self._file.write(f"{line}\n")
            with on_disk():
                self._file.seek(0)
        except BaseException:
            self.close()
            raise
        self.columns = tuple(columns)

    def rows(self) -> Iterator[Cells | BadRow]:
        for number, line in enumerate(self._file, 1):
            self._read = number
            row = json.loads(line, object_hook=opened)
            yield BadRow(number, row) if isinstance(row, str) else Cells(number, row)

    def fraction_read(self) -> float:
        return self._read / self._count if self._count else 1.0

    def close(self) -> None:
        self._file.close()


def each(rows: Any) -> Iterator[Any]:
    """Each row of what was handed over."""
    if hasattr(rows, "itertuples") and hasattr(rows, "columns"):  # pandas, whose Arrow interface adds its index
        names = [str(name) for name in rows.columns]
        yield from (dict(zip(names, values, strict=True)) for values in rows.itertuples(index=False, name=None))
    elif hasattr(rows, "iter_rows"):  # polars
        yield from rows.iter_rows(named=True)
    elif hasattr(rows, "collect") and not isinstance(rows, Iterable):  # polars, not computed yet
        yield from each(rows.collect())
    elif hasattr(rows, "__arrow_c_stream__"):
        try:
            import pyarrow  # type: ignore[import-untyped]  # noqa: PLC0415 - an extra, without types, slow to import
        except ImportError:
            raise SetupError(
                f"rows: {type(rows).__name__} is read with pyarrow: pip install 'prefect-eachlabs[parquet]', or give "
                "its rows as dicts."
            ) from None
        for batch in pyarrow.RecordBatchReader.from_stream(rows):
            yield from batch.to_pylist()
    elif isinstance(rows, (Mapping, str, bytes, PurePath)) or not isinstance(rows, Iterable):
        hint = " A table in a file is what the flow generate_batch takes." if isinstance(rows, (str, PurePath)) else ""
        raise BadInput(f"rows: {type(rows).__name__} is not rows. Give a list of dicts, or a data frame.{hint}")
    else:
        yield from rows


def _written(row: Any) -> tuple[str, Iterable[str]]:
    """A row as a line of JSON, and its columns; what is wrong with it, as a text, where it cannot be one."""
    try:
        if not isinstance(row, Mapping):  # a named tuple, a row of SQLAlchemy; a row of sqlite3
            if not hasattr(row, "_asdict") and not hasattr(row, "keys"):
                raise TypeError(f"it is {type(row).__name__}, and must be a mapping from column to value")
            row = row._asdict() if hasattr(row, "_asdict") else dict(row)
        values = {
            str(name): value
            for name, value in row.items()
            if value is not None and type(value).__name__ not in MISSING_BY_NAME
        }
        line = json.dumps(values, ensure_ascii=False, default=_said)
        line.encode()
        if len(line) > 2 * MAX_ROW_BYTES:
            return json.dumps(f"The row is larger than {MAX_ROW_BYTES // 1024} KiB."), ()
        return line, values
    except (TypeError, ValueError, RecursionError) as error:
        return json.dumps(f"The row cannot be read: {str(error)[:200]}"), ()


def _said(value: Any) -> Any:
    """A value that JSON has no words for: numpy's as Python's, a key or a number as one; the rest as Parquet's are."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, (UUID, PurePath)):
        return str(value)
    if isinstance(value, Decimal) and value.is_finite():
        return int(value) if value == value.to_integral_value() else float(value)
    return said(value)
