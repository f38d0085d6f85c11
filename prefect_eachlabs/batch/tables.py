"""Tables as streams of rows: CSV, TSV, JSON Lines and Parquet; a broken line is a row of its own, never the end.

TSV has no quoting of its own: a line is a row, and quotes are text, except around a whole cell in which every other
quote is doubled (so spreadsheets write them). A quote that is never closed in CSV breaks its line alone: the lines
after it are read anew.
"""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO, NoReturn, Protocol

from prefect_eachlabs.batch.byte_streams import open_bytes
from prefect_eachlabs.batch.text_lines import MAX_ROW_BYTES, Line, Lines, no_table
from prefect_eachlabs.errors import BadInput, SetupError
from prefect_eachlabs.storage.s3_client import S3Access

MAX_LINES_OF_A_ROW = 200
PARQUET_ROWS_AT_A_TIME = 200
SUFFIXES = {".csv": "csv", ".tsv": "tsv", ".tab": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}


@dataclass(frozen=True)
class Cells:
    """A row as it stands in the table: its line (the first is 1) and its values by column."""

    line: int
    values: dict[str, Any]


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used, and why."""

    line: int
    reason: str
    item_id: str | None = None
    prompt: str | None = None


class Table(Protocol):
    """An opened table. `typed` says whether values have types, or are all text."""

    columns: tuple[str, ...]
    typed: bool

    def rows(self) -> Iterator[Cells | BadRow]: ...

    def fraction_read(self) -> float:
        """How much of it has been read, 0 to 1."""
        ...

    def close(self) -> None: ...


def open_table(source: str, access: S3Access | None = None) -> Table:
    """Opens a source and reads its head. Blocks.

    Args:
        source: A path or `s3://bucket/key` that ends in .csv, .tsv, .jsonl or .parquet (text may be gzipped: .gz).
        access: How to reach a bucket; boto3's own chain when None.

    Raises:
        BadInput: It is not there, or no table.
        SetupError: It may not be read, or pyarrow is missing.
    """
    kind, zipped = kind_of(source)
    stream, size_bytes = open_bytes(source, access)
    try:
        if kind == "parquet":
            return ParquetTable(source, stream)
        lines = Lines(source, stream, size_bytes, zipped=zipped)
        readers: dict[str, Callable[[str, Lines], Table]] = {"csv": CsvTable, "tsv": TsvTable, "jsonl": JsonLinesTable}
        return readers[kind](source, lines)
    except BaseException:
        stream.close()
        raise


def kind_of(source: str) -> tuple[str, bool]:
    """The format that a source's name tells, and whether it is gzipped. Raises BadInput for other names."""
    suffixes = [suffix.lower() for suffix in PurePosixPath(source).suffixes]
    zipped = bool(suffixes) and suffixes[-1] == ".gz"
    kind = SUFFIXES.get(suffixes[-2 if zipped else -1] if len(suffixes) > zipped else "")
    if kind is None or (zipped and kind == "parquet"):
        raise BadInput(
            f"{source}: a source is CSV, TSV, JSON Lines or Parquet, told by its name: .csv, .tsv, .jsonl or .parquet."
        )
    return kind, zipped


def base_name(source: str) -> str:
    """The source's file name without the ending that tells its format."""
    name = PurePosixPath(source).name
    for _ in kind_of(source)[1] * (".gz",):
        name = name[: -len(".gz")]
    return name[: name.rindex(".")]


def _columns(source: str, names: list[str]) -> tuple[str, ...]:
    names = [name.strip() for name in names]
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        raise BadInput(f"{source} has columns of the same name: {', '.join(twice)[:200]}. Rename one of them.")
    return tuple(names)


def _by_column(columns: tuple[str, ...], cells: list[str], line: int) -> Cells | BadRow:
    if len(cells) != len(columns):
        return BadRow(line, f"broken line: cells: {len(cells)}, in the header: {len(columns)}")
    # A column without a name (an index that a data frame wrote) means nothing.
    return Cells(line, {name: cell for name, cell in zip(columns, cells, strict=True) if name})


class CsvTable:
    """RFC 4180, read line by line, so that a broken quote costs its own line and no other."""

    typed = False

    def __init__(self, source: str, lines: Lines) -> None:
        self._lines = lines
        if lines.head() is None:
            no_table(source, "it is empty")
        first = next(self._records(), None)
        if first is None:
            no_table(source, "it has no line with a cell in it")
        if isinstance(first, BadRow):
            no_table(source, f"line 1: {first.reason}")
        self.columns = _columns(source, first[1])

    def rows(self) -> Iterator[Cells | BadRow]:
        for record in self._records():
            yield record if isinstance(record, BadRow) else _by_column(self.columns, record[1], record[0])

    def _records(self) -> Iterator[tuple[int, list[str]] | BadRow]:
        while True:
            taken: list[Line] = []
            try:
                for cells in csv.reader(self._feed(taken), strict=True):
                    first = taken[0].number
                    taken.clear()
                    if cells:
                        yield first, cells
                return
            except (csv.Error, _BrokenLine) as error:
                self._lines.put_back(taken[1:])
                open_quote = len(taken) > 1 or "unexpected end" in str(error)
                reason = "a quote is opened and not closed properly" if open_quote else str(error)
                yield BadRow(taken[0].number, f"broken line: {taken[0].fault or reason}")

    def _feed(self, taken: list[Line]) -> Iterator[str]:
        for line in self._lines:
            taken.append(line)
            if line.fault is not None:
                raise _BrokenLine(line.fault)
            if len(taken) > MAX_LINES_OF_A_ROW or sum(len(one.text) for one in taken) > MAX_ROW_BYTES:
                raise _BrokenLine("a quote is opened and not closed")
            yield line.text

    def fraction_read(self) -> float:
        return self._lines.fraction_read()

    def close(self) -> None:
        self._lines.close()


class _BrokenLine(Exception):
    pass


class TsvTable:
    """A line is a row, a tab a border."""

    typed = False

    def __init__(self, source: str, lines: Lines) -> None:
        self._lines = lines
        if lines.head() is None:
            no_table(source, "it is empty")
        self.columns = _columns(source, _tab_separated(next(lines).text))

    def rows(self) -> Iterator[Cells | BadRow]:
        for line in self._lines:
            if line.fault is not None:
                yield BadRow(line.number, f"broken line: {line.fault}")
            elif line.text.strip():
                yield _by_column(self.columns, _tab_separated(line.text), line.number)

    def fraction_read(self) -> float:
        return self._lines.fraction_read()

    def close(self) -> None:
        self._lines.close()


def _tab_separated(text: str) -> list[str]:
    return [_unquoted(cell) for cell in text.rstrip("\r\n").split("\t")]


def _unquoted(cell: str) -> str:
    """What a spreadsheet quoted is unquoted; a quote that merely begins a text stays."""
    if len(cell) < 2 or cell[0] != '"' or cell[-1] != '"':
        return cell
    inner = cell[1:-1]
    return inner.replace('""', '"') if '"' not in inner.replace('""', "") else cell


class JsonLinesTable:
    """A JSON object a line. Its columns are those of its first lines, since it has no header."""

    typed = True
    LOOK_AHEAD = 100

    def __init__(self, source: str, lines: Lines) -> None:
        self._lines = lines
        first = lines.head()
        if first is None:
            no_table(source, "it is empty")
        if first.text.lstrip().startswith("["):
            no_table(source, "it is a JSON array; write one JSON object a line (jq -c '.[]' does)")
        ahead = list(itertools.islice(lines, self.LOOK_AHEAD))
        rows = [self._row(line) for line in ahead if line.text.strip() or line.fault]
        if rows and all(isinstance(row, BadRow) for row in rows):
            no_table(source, f"none of its first {len(rows)} lines is a JSON object")
        names = (name for row in rows if isinstance(row, Cells) for name in row.values)
        self.columns = tuple(dict.fromkeys(names))
        lines.put_back(ahead)

    def rows(self) -> Iterator[Cells | BadRow]:
        for line in self._lines:
            if line.text.strip() or line.fault:
                yield self._row(line)

    def _row(self, line: Line) -> Cells | BadRow:
        if line.fault is not None:
            return BadRow(line.number, f"broken line: {line.fault}")
        try:
            values = json.loads(line.text, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            return BadRow(line.number, f"broken line: it is no JSON ({str(error)[:100]})")
        if not isinstance(values, dict):
            return BadRow(line.number, "broken line: it is no JSON object")
        return Cells(line.number, values)

    def fraction_read(self) -> float:
        return self._lines.fraction_read()

    def close(self) -> None:
        self._lines.close()


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")


class ParquetTable:
    """A Parquet file, some rows at a time; lines are counted from 1."""

    typed = True

    def __init__(self, source: str, stream: BinaryIO) -> None:
        try:
            # An extra, without types, and slow to import.
            import pyarrow as arrow  # type: ignore[import-untyped]  # noqa: PLC0415
            from pyarrow import parquet  # noqa: PLC0415
        except ImportError as error:
            raise SetupError("Parquet needs pyarrow: pip install 'prefect-eachlabs[parquet]'.") from error
        self._source, self._stream, self._broken = source, stream, arrow.ArrowException
        self._is_time, self._time = arrow.types.is_timestamp, arrow.timestamp
        try:
            self._file = parquet.ParquetFile(stream, pre_buffer=False)
        except (arrow.ArrowException, OSError, ValueError) as error:
            no_table(source, f"it is no Parquet file ({str(error)[:200]})")
        self.columns = _columns(source, list(self._file.schema_arrow.names))
        self._line = 0

    def rows(self) -> Iterator[Cells | BadRow]:
        try:
            for batch in self._file.iter_batches(batch_size=PARQUET_ROWS_AT_A_TIME, use_threads=False):
                for values in self._values(batch):
                    self._line += 1
                    broken = isinstance(values, str)
                    yield BadRow(self._line, f"broken row: {values}") if broken else Cells(self._line, values)
        except (self._broken, OSError, ValueError) as error:
            raise BadInput(f"{self._source} is damaged after row {self._line} ({str(error)[:200]}).") from error

    def _values(self, batch: Any) -> Iterator[Any]:
        """Each row's values; of a row whose values Python has no words for, what is wrong with them."""
        for number, column in enumerate(batch.columns):
            # Data frames write times in nanoseconds, which Python's own have no place for.
            if self._is_time(column.type) and column.type.unit == "ns":
                in_microseconds = column.cast(self._time("us", column.type.tz), safe=False)
                batch = batch.set_column(number, batch.schema.names[number], in_microseconds)
        try:
            yield from batch.to_pylist()
        except Exception:  # dates beyond the year 9999, time zones nobody knows, text that is no UTF-8
            for number in range(batch.num_rows):
                try:
                    (values,) = batch.slice(number, 1).to_pylist()
                except Exception as error:
                    values = f"a value cannot be read ({type(error).__name__}: {str(error)[:100]})"
                yield values

    def fraction_read(self) -> float:
        count = self._file.metadata.num_rows
        return self._line / count if count else 1.0

    def close(self) -> None:
        self._file.close()
        self._stream.close()
