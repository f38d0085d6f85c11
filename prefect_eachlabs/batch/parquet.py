"""Parquet tables, read by pyarrow in a confined process.

A file of 1 kB may hold 200 cells of 20 MB (a dictionary names them once), a page that inflates to gigabytes, or a list
of a thousand million nothings; and pyarrow has no bound to set.
"""

from __future__ import annotations

import io
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

from prefect_eachlabs.confined import Answer, JobFailed, Read

ROWS_AT_A_TIME = 200
UNPACKED_AT_A_TIME = 10
"""As Python's values a row may be a hundred times as large as in Arrow."""
MOST_BYTES_AT_A_TIME = 1024 * 1024
"""Of JSON, which may be twenty times as large in memory."""
BUFFER_BYTES = 1024 * 1024
"""A column is read in pieces of this size, instead of as a whole."""
READER = "prefect_eachlabs.batch.parquet:ParquetReader"


class NotJson:
    """A value of a row that JSON has no words for (a time, a decimal): what it reads as, and nothing an input takes."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __str__(self) -> str:
        return self._text


def opened(value: dict[str, Any]) -> Any:
    match value:
        case {"\0bytes": str(text)}:
            return text.encode("latin-1")
        case {"\0text": str(text)}:
            return NotJson(text)
    return value


# ------------------------------------------------------------------------------------------------ in the child


class Reader(ABC):
    """A job: opens a file, and gives its rows, each as JSON: its values, what is wrong with it, or null."""

    _most_row_bytes = 0
    _rows: Iterator[str] | None = None

    def __call__(self, arguments: dict[str, Any], data: bytes, read: Read) -> Answer:
        if "open" in arguments:
            self._most_row_bytes = arguments["most_row_bytes"]
            return self._opened(Remote(arguments["open"], read)), b""
        return self._next()

    @abstractmethod
    def _opened(self, file: Remote) -> dict[str, Any]:
        """Makes `_rows`; returns the `columns`, the `count` of the rows (0: not known) and the `head_line`."""

    def _next(self) -> Answer:
        if self._rows is None:
            raise JobFailed("its reader has ended")
        rows: list[str] = []
        size = 0
        for row in self._rows:
            rows.append(row)
            size += len(row)
            if len(rows) >= ROWS_AT_A_TIME or size > MOST_BYTES_AT_A_TIME:
                break
        return {"rows": len(rows)}, f"[{','.join(rows)}]".encode()

    def _as_json(self, values: dict[str, Any]) -> str:
        faulty = json.dumps(f"it is larger than {self._most_row_bytes // 1024} KiB")
        # A file may name a cell of 5 MB once, and have it in every row.
        if any(isinstance(value, (str, bytes)) and len(value) > self._most_row_bytes for value in values.values()):
            return faulty
        row = json.dumps(values, ensure_ascii=False, default=said)
        row.encode()
        return faulty if len(row) > self._most_row_bytes else row


class ParquetReader(Reader):
    """Reads Parquet."""

    def __init__(self) -> None:
        import pyarrow  # type: ignore[import-untyped]  # noqa: PLC0415 - an extra, without types, and slow to import
        from pyarrow import parquet  # noqa: PLC0415 - as above

        pyarrow.set_cpu_count(1)
        pyarrow.set_io_thread_count(1)
        self._arrow, self._parquet = pyarrow, parquet

    def _opened(self, file: Remote) -> dict[str, Any]:
        table = self._parquet.ParquetFile(file, pre_buffer=False, buffer_size=BUFFER_BYTES)
        batches = table.iter_batches(batch_size=ROWS_AT_A_TIME, use_threads=False)
        self._rows = (row for batch in batches for row in self._written(batch))
        return {"columns": list(table.schema_arrow.names), "count": table.metadata.num_rows, "head_line": 0}

    def _written(self, batch: Any) -> list[str]:
        """Each row as JSON: its values, or what is wrong with them."""
        for number, column in enumerate(batch.columns):
            # Data frames write times in nanoseconds, which Python's own have no place for.
            if self._arrow.types.is_timestamp(column.type) and column.type.unit == "ns":
                in_microseconds = column.cast(self._arrow.timestamp("us", column.type.tz), safe=False)
                batch = batch.set_column(number, batch.schema.names[number], in_microseconds)
        try:
            some = (batch.slice(start, UNPACKED_AT_A_TIME) for start in range(0, batch.num_rows, UNPACKED_AT_A_TIME))
            rows = [self._as_json(values) for rows in some for values in rows.to_pylist()]
        except MemoryError:
            raise
        except Exception:  # dates beyond the year 9999, time zones nobody knows, text that is not UTF-8
            rows = [self._one(batch.slice(number, 1)) for number in range(batch.num_rows)]
        return rows

    def _one(self, batch: Any) -> str:
        try:
            return self._as_json(batch.to_pylist()[0])
        except MemoryError:
            raise
        except Exception as error:
            return json.dumps(f"a value cannot be read ({type(error).__name__}: {str(error)[:100]})")


def said(value: Any) -> dict[str, str]:
    return {"\0bytes": value.decode("latin-1")} if isinstance(value, bytes) else {"\0text": str(value)}


class Remote(io.RawIOBase):
    """The parent's file."""

    def __init__(self, size_bytes: int, read: Read) -> None:
        super().__init__()
        self._size_bytes, self._read = size_bytes, read
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = max(0, {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size_bytes}[whence] + offset)
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any) -> int:
        piece = self._read(self._place, len(buffer))
        buffer[: len(piece)] = piece
        self._place += len(piece)
        return len(piece)
