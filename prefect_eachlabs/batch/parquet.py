"""Parquet tables, read by pyarrow in a confined process.

A file of 1 kB may hold 200 cells of 20 MB (a dictionary names them once), a page that inflates to gigabytes, or a list
of a thousand million nothings; and pyarrow has no bound to set.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from typing import Any, BinaryIO

from prefect_eachlabs.confined import Answer, ConfinedProcess, JobFailed, Read

ROWS_AT_A_TIME = 200
UNPACKED_AT_A_TIME = 10
"""As Python's values a row may be a hundred times as large as in Arrow."""
MOST_BYTES_AT_A_TIME = 1024 * 1024
"""Of JSON, which may be twenty times as large in memory."""
BUFFER_BYTES = 1024 * 1024
"""A column is read in pieces of this size, instead of as a whole."""
SECONDS = 60.0
"""For opening the file, and for each 200 rows."""
SHOWN_CHARACTERS = 200
READER = "prefect_eachlabs.batch.parquet:ParquetReader"

Row = dict[str, Any] | str | None
"""A row's values by column, or what is wrong with it; None: it is empty."""


class NotJson:
    """A value of a row that JSON has no words for (a time, a decimal): what it reads as, and nothing an input takes."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __str__(self) -> str:
        return self._text


class TypedFile:
    """A file of typed rows: its columns, the number of its rows, and the rows as Python values.

    Args:
        stream: The file; read here, piece by piece, as the child asks for it.
        reader: The job that reads it.
        most_row_bytes: A row that is more than this as JSON is faulty.
        process: Reads no other file meanwhile; one of its own when left out.

    Raises:
        JobFailed: It is not such a file; says why.
        TooCostly: It needs too much memory or time.
        NotInstalled: The reader's library is missing.
    """

    def __init__(
        self, stream: BinaryIO, reader: str, *, most_row_bytes: int, process: ConfinedProcess | None = None
    ) -> None:
        self._stream = stream
        self._process = process or ConfinedProcess(reader, idle_seconds=None)
        size_bytes = stream.seek(0, os.SEEK_END)
        try:
            opened, _ = self._asked({"open": size_bytes, "most_row_bytes": most_row_bytes})
        except BaseException:
            if process is None:
                self._process.close()
            raise
        self.columns: list[str] = opened["columns"]
        self.count: int = opened["count"]
        self.head_line: int = opened.get("head_line", 0)

    def rows(self) -> Iterator[Row]:
        """Every row, once. Raises as the constructor does."""
        while (answer := self._asked({}))[0]["rows"]:
            yield from json.loads(answer[1], object_hook=opened)

    def _asked(self, arguments: dict[str, Any]) -> Answer:
        return self._process.call(arguments, seconds=SECONDS, read=self._read)

    def _read(self, offset: int, size: int) -> bytes:
        self._stream.seek(offset)
        return self._stream.read(size)

    def close(self) -> None:
        self._process.close()
        self._stream.close()


def opened(value: dict[str, Any]) -> Any:
    match value:
        case {"\0bytes": str(text)}:
            return text.encode("latin-1")
        case {"\0text": str(text)}:
            return NotJson(text)
    return value


# ------------------------------------------------------------------------------------------------ in the child


class Reader:
    """A job: opens a file, and gives its rows."""

    def __init__(self) -> None:
        self._most_row_bytes = 0
        self._rows: Iterator[str] | None = None

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
        super().__init__()
        import pyarrow  # type: ignore[import-untyped]  # noqa: PLC0415 - an extra, without types, and slow to import
        from pyarrow import parquet  # noqa: PLC0415 - as above

        pyarrow.set_cpu_count(1)
        pyarrow.set_io_thread_count(1)
        self._arrow, self._parquet = pyarrow, parquet

    def __call__(self, arguments: dict[str, Any], data: bytes, read: Read) -> Answer:
        try:
            return self._opened(arguments, read) if "open" in arguments else self._next()
        except MemoryError:
            raise
        except (self._arrow.ArrowException, OSError, ValueError) as error:
            raise JobFailed(str(error)[:SHOWN_CHARACTERS]) from error

    def _opened(self, arguments: dict[str, Any], read: Read) -> Answer:
        stream = Remote(arguments["open"], read)
        file = self._parquet.ParquetFile(stream, pre_buffer=False, buffer_size=BUFFER_BYTES)
        self._most_row_bytes = arguments["most_row_bytes"]
        batches = file.iter_batches(batch_size=ROWS_AT_A_TIME, use_threads=False)
        self._rows = (row for batch in batches for row in self._written(batch))
        return {"columns": list(file.schema_arrow.names), "count": file.metadata.num_rows}, b""

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
