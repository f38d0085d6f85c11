"""Tables as streams of rows: CSV, TSV, JSON Lines and Parquet; a broken line is a row of its own, never the end.

TSV has no quoting of its own: a line is a row, and quotes are text, except around a whole cell in which every other
quote is doubled (so spreadsheets write them). A quote that is never closed in CSV ends the table at its line: nobody
can tell what the lines after it belong to.
"""

from __future__ import annotations

import csv
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO, NoReturn, Protocol

from prefect_eachlabs.batch.files import open_file
from prefect_eachlabs.batch.parquet import ParquetFile
from prefect_eachlabs.confined import ConfinedError, ConfinedProcess, NotInstalled, TooCostly
from prefect_eachlabs.errors import BadInput, SetupError
from prefect_eachlabs.reference_images import Roots
from prefect_eachlabs.storage.s3_client import S3Access

MAX_ROW_BYTES = 128 * 1024
"""Beyond this a line is broken: records must stay small, and a file that is not a table must not fill the memory."""
MAX_LINES_OF_A_ROW = 200
SUFFIXES = {".csv": "csv", ".tsv": "tsv", ".tab": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}


@dataclass(frozen=True)
class Cells:
    """A row as it stands in the table: its line (the first is 1) and its values by column."""

    line: int
    values: dict[str, Any]


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used, and why; `number` is the table's row, where it is known."""

    line: int
    reason: str
    item_id: str | None = None
    prompt: str | None = None
    number: int | None = None


class Table(Protocol):
    """An opened table. `typed` says whether values have types, or are all text."""

    columns: tuple[str, ...]
    typed: bool

    def rows(self) -> Iterator[Cells | BadRow]: ...

    def fraction_read(self) -> float:
        """How much of it has been read, 0 to 1."""
        ...

    def close(self) -> None: ...


def open_table(source: str, access: S3Access | None = None, within: Roots | None = None) -> Table:
    """Opens a source and reads its head. Blocks.

    Args:
        source: A path or `s3://bucket/key` that ends in .csv, .tsv, .jsonl or .parquet.
        access: How to reach a bucket; boto3's own chain when None.
        within: Where a file of this machine must be; None: anywhere.

    Raises:
        BadInput: It is not there, or not a table.
        SetupError: It may not be read, or pyarrow is missing.
    """
    kind = kind_of(source)
    stream = open_file(source, access, within)
    try:
        if kind == "parquet":
            return ParquetTable(source, stream)
        readers: dict[str, Callable[[str, Lines], Table]] = {"csv": CsvTable, "tsv": TsvTable, "jsonl": JsonLinesTable}
        return readers[kind](source, Lines(stream))
    except BaseException:
        stream.close()
        raise


def kind_of(source: str) -> str:
    """The format that a source's name tells. Raises BadInput for other names."""
    kind = SUFFIXES.get(PurePosixPath(source).suffix.lower())
    if kind is None:
        raise BadInput(
            f"{source}: a source is CSV, TSV, JSON Lines or Parquet, told by its name: .csv, .tsv, .jsonl or .parquet."
        )
    return kind


def base_name(source: str) -> str:
    """The source's file name without the ending that tells its format."""
    kind_of(source)
    return PurePosixPath(source).stem


def no_table(source: str, reason: str) -> NoReturn:
    raise BadInput(f"{source} is not a table that can be read: {reason}.")


@dataclass(frozen=True)
class Line:
    """A line with its end, or what is wrong with it."""

    number: int
    text: str
    fault: str | None = None


class Lines:
    """The numbered lines of a file in UTF-8, each decoded by itself, so that what is wrong with one costs it alone."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._size_bytes = stream.seek(0, os.SEEK_END)
        stream.seek(0)
        self._number = 0
        self._read_bytes = 0

    def __iter__(self) -> Lines:
        return self

    def __next__(self) -> Line:
        raw = self._readline(MAX_ROW_BYTES + 1)
        if not raw:
            raise StopIteration
        self._number += 1
        if len(raw) > MAX_ROW_BYTES and not raw.endswith(b"\n"):
            while (more := self._readline(MAX_ROW_BYTES)) and not more.endswith(b"\n"):
                pass
            return Line(self._number, "", f"it is longer than {MAX_ROW_BYTES // 1024} KiB")
        if self._number == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            return Line(self._number, "", f"it is not UTF-8 (byte {error.start + 1}): save the file as UTF-8")
        if "\0" in text:
            return Line(self._number, "", "it holds a zero byte")
        return Line(self._number, text)

    def _readline(self, most_bytes: int) -> bytes:
        raw = self._stream.readline(most_bytes)
        self._read_bytes += len(raw)
        return raw

    def fraction_read(self) -> float:
        return min(1.0, self._read_bytes / self._size_bytes) if self._size_bytes else 1.0

    def close(self) -> None:
        self._stream.close()


def _columns(source: str, names: list[str]) -> tuple[str, ...]:
    names = [name.strip() for name in names]
    twice = sorted(name for name, count in Counter(names).items() if name and count > 1)
    if twice:
        raise BadInput(
            f"{source} has columns of the same name: rename one of them.", details=f"They are: {', '.join(twice)}."
        )
    return tuple(names)


def _by_column(columns: tuple[str, ...], cells: list[str], line: int) -> Cells | BadRow:
    if len(cells) != len(columns):
        return BadRow(line, f"broken line: cells: {len(cells)}, in the header: {len(columns)}")
    # A column without a name (an index that a data frame wrote) means nothing.
    return Cells(line, {name: cell for name, cell in zip(columns, cells, strict=True) if name})


class _TableOfLines:
    """A table in a file of text."""

    def __init__(self, source: str, lines: Lines) -> None:
        self._source, self._lines = source, lines

    def fraction_read(self) -> float:
        return self._lines.fraction_read()

    def close(self) -> None:
        self._lines.close()


class CsvTable(_TableOfLines):
    """RFC 4180. A broken line costs itself; a quote that is not closed ends the table, at the line that opens it."""

    typed = False

    def __init__(self, source: str, lines: Lines) -> None:
        super().__init__(source, lines)
        self._records = self._read()
        head = next(self._records, None)
        if head is None:
            no_table(source, "it is empty")
        if isinstance(head, BadRow):
            no_table(source, f"line {head.line}: {head.reason}")
        self.columns = _columns(source, head[1])

    def rows(self) -> Iterator[Cells | BadRow]:
        for record in self._records:
            yield record if isinstance(record, BadRow) else _by_column(self.columns, record[1], record[0])

    def _read(self) -> Iterator[tuple[int, list[str]] | BadRow]:
        for line in self._lines:
            if line.fault is not None:
                yield BadRow(line.number, f"broken line: {line.fault}")
                continue
            taken: list[Line] = [line]
            try:
                # It takes as many lines as the row has.
                cells = next(csv.reader(self._row(taken), strict=True))
            except csv.Error as error:
                if len(taken) > 1 or "unexpected end" in str(error):
                    self._refuse(line)
                yield BadRow(line.number, f"broken line: {error}")
            else:
                if cells:
                    yield line.number, cells

    def _row(self, taken: list[Line]) -> Iterator[str]:
        yield taken[0].text
        for line in itertools.islice(self._lines, MAX_LINES_OF_A_ROW - 1):
            taken.append(line)
            if line.fault is not None or sum(len(one.text) for one in taken) > MAX_ROW_BYTES:
                break
            yield line.text

    def _refuse(self, line: Line) -> NoReturn:
        raise BadInput(
            f"{self._source} is damaged at line {line.number}: a quote is opened there and not closed properly. Close "
            "it, or double it where it is part of the text, and run again: the rows before it are kept."
        )


class TsvTable(_TableOfLines):
    """A line is a row, a tab a border."""

    typed = False

    def __init__(self, source: str, lines: Lines) -> None:
        super().__init__(source, lines)
        head = next(lines, None)
        if head is None:
            no_table(source, "it is empty")
        if head.fault is not None:
            no_table(source, f"line 1: {head.fault}")
        self.columns = _columns(source, _tab_separated(head.text))

    def rows(self) -> Iterator[Cells | BadRow]:
        for line in self._lines:
            if line.fault is not None:
                yield BadRow(line.number, f"broken line: {line.fault}")
            elif line.text.strip():
                yield _by_column(self.columns, _tab_separated(line.text), line.number)


def _tab_separated(text: str) -> list[str]:
    return [_unquoted(cell) for cell in text.rstrip("\r\n").split("\t")]


def _unquoted(cell: str) -> str:
    """What a spreadsheet quoted is unquoted; a quote that merely begins a text stays."""
    if len(cell) < 2 or cell[0] != '"' or cell[-1] != '"':
        return cell
    inner = cell[1:-1]
    return inner.replace('""', '"') if '"' not in inner.replace('""', "") else cell


class JsonLinesTable(_TableOfLines):
    """A JSON object a line. Its columns are those of its first lines, since it has no header."""

    typed = True
    LOOK_AHEAD = 100

    def __init__(self, source: str, lines: Lines) -> None:
        super().__init__(source, lines)
        ahead = list(itertools.islice(lines, self.LOOK_AHEAD))
        if not ahead:
            no_table(source, "it is empty")
        if ahead[0].fault is not None:
            no_table(source, f"line 1: {ahead[0].fault}")
        if ahead[0].text.lstrip().startswith("["):
            no_table(source, "it is a JSON array; write one JSON object a line (jq -c '.[]' does)")
        rows = [self._row(line) for line in ahead if line.text.strip() or line.fault]
        if rows and all(isinstance(row, BadRow) for row in rows):
            no_table(source, f"none of its first {len(rows)} lines is a JSON object")
        names = (name for row in rows if isinstance(row, Cells) for name in row.values)
        self.columns = tuple(dict.fromkeys(names))
        self._ahead = ahead

    def rows(self) -> Iterator[Cells | BadRow]:
        for line in itertools.chain(self._ahead, self._lines):
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


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")


class ParquetTable:
    """A Parquet file, some rows at a time; lines are counted from 1."""

    typed = True

    def __init__(self, source: str, stream: BinaryIO, process: ConfinedProcess | None = None) -> None:
        self._source = source
        try:
            self._file = ParquetFile(stream, most_row_bytes=2 * MAX_ROW_BYTES, process=process)
        except NotInstalled as error:
            raise SetupError("Parquet needs pyarrow: pip install 'prefect-eachlabs[parquet]'.") from error
        except ConfinedError as error:
            no_table(source, f"it is no Parquet file ({error})")
        self.columns = _columns(source, self._file.columns)
        self._line = 0

    def rows(self) -> Iterator[Cells | BadRow]:
        try:
            for values in self._file.rows():
                self._line += 1
                if isinstance(values, str):
                    yield BadRow(self._line, f"broken row: {values}")
                else:
                    yield Cells(self._line, values)
        except TooCostly as error:
            raise BadInput(
                f"{self._source} cannot be read after row {self._line}: {error}. Write it anew with smaller cells, or "
                "leave out what is not needed."
            ) from error
        except ConfinedError as error:
            raise BadInput(f"{self._source} is damaged after row {self._line} ({error}).") from error

    def fraction_read(self) -> float:
        return min(1.0, self._line / self._file.count) if self._file.count > 0 else 1.0

    def close(self) -> None:
        self._file.close()
