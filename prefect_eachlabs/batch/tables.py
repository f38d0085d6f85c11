"""Tables as streams of rows: CSV, TSV, JSON Lines, Parquet and Excel; a broken line is a row of its own, never the end.

TSV has no quoting of its own: a line is a row, and quotes are text, except around a whole cell in which every other
quote is doubled (so spreadsheets write them). A quote that is never closed in CSV ends the table at its line: nobody
can tell what the lines after it belong to. CSV is read as Excel saves it in Europe, too: its separator is the one under
which the header has the column of prompts (or the most columns), its encoding Windows-1252 where it cannot be UTF-8.
"""

from __future__ import annotations

import csv
import itertools
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO, NoReturn, Protocol

from prefect_eachlabs.batch.files import open_file
from prefect_eachlabs.batch.parquet import READER as PARQUET
from prefect_eachlabs.batch.parquet import opened
from prefect_eachlabs.batch.xlsx import READER as XLSX
from prefect_eachlabs.confined import Answer, ConfinedError, ConfinedProcess, NotInstalled, TooCostly
from prefect_eachlabs.errors import BadInput, SetupError
from prefect_eachlabs.net import safe_json
from prefect_eachlabs.reference_images import Roots
from prefect_eachlabs.storage.s3_client import S3Access

MAX_ROW_BYTES = 128 * 1024
"""Beyond this a line is broken: records must stay small, and a file that is not a table must not fill the memory."""
MAX_LINES_OF_A_ROW = 200
SUFFIXES = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".xlsx": "xlsx",
}
PROMPTS = ("prompt", "Prompt")
DELIMITERS = (",", ";", "\t", "|")
READ_WITHIN_SECONDS = 60.0
"""For opening a Parquet or Excel file, and for each 200 rows."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Columns:
    """Which columns of a table are meant, and what separates them in a CSV; None: found out.

    Raises:
        BadInput: The delimiter is not one character.
    """

    prompt: str | None = None
    id: str | None = None
    delimiter: str | None = None

    def __post_init__(self) -> None:
        if self.delimiter == r"\t":  # a shell and a form have no tab
            object.__setattr__(self, "delimiter", "\t")
        if self.delimiter is not None and (len(self.delimiter) != 1 or self.delimiter in '"\r\n\0'):
            raise BadInput(f"delimiter: {self.delimiter[:20]!r} must be one character, such as ; or \\t for a tab.")


AS_USUAL = Columns()


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


def open_table(
    source: str, access: S3Access | None = None, columns: Columns = AS_USUAL, within: Roots | None = None
) -> Table:
    """Opens a source and reads its head; arguments and errors are those of `open_source`. Blocks."""
    kind = kind_of(source)
    if columns.delimiter is not None and kind != "csv":
        raise BadInput(f"delimiter: only CSV has one, and {source} is not CSV by its name.")
    stream = open_file(source, access, within)
    try:
        if kind in ("parquet", "xlsx"):
            return TypedTable(source, stream)
        if kind == "jsonl":
            return JsonLinesTable(source, Lines(stream))
        lines = Lines(stream, may_be_ansi=True)
        return CsvTable(source, lines, columns) if kind == "csv" else TsvTable(source, lines)
    except BaseException:
        stream.close()
        raise


def kind_of(source: str) -> str:
    """The format that a source's name tells. Raises BadInput for other names."""
    kind = SUFFIXES.get(PurePosixPath(source).suffix.lower())
    if kind is None:
        raise BadInput(
            f"{source}: a table is CSV, TSV, JSON Lines, Parquet or Excel, told by its name: .csv, .tsv, .jsonl, "
            ".parquet or .xlsx. Name one, or save it as one of these."
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
    """The numbered lines of a file in UTF-8, each decoded by itself, so that what is wrong with one costs it alone.

    Args:
        stream: The file.
        may_be_ansi: The first line that is not ASCII decides: where it is not UTF-8, the file is Windows-1252.
    """

    def __init__(self, stream: BinaryIO, *, may_be_ansi: bool = False) -> None:
        self._stream = stream
        self._encoding: str | None = None if may_be_ansi else "utf-8"
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
            if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
                return Line(1, "", "it is UTF-16: save the file as UTF-8")
            if raw.startswith(b"\xef\xbb\xbf"):
                raw, self._encoding = raw[3:], "utf-8"
        try:
            text = self._decoded(raw)
        except UnicodeDecodeError as error:
            return Line(self._number, "", f"it is not UTF-8 (byte {error.start + 1}): save the file as UTF-8")
        if "\0" in text:
            return Line(self._number, "", "it holds a zero byte")
        return Line(self._number, text)

    def _decoded(self, raw: bytes) -> str:
        if raw.isascii():
            return raw.decode("ascii")
        if self._encoding == "cp1252":
            try:
                raw.decode("utf-8")
            except UnicodeDecodeError:
                return raw.decode("cp1252")
            # Some lines are UTF-8 and some are not: nobody can tell what the others are.
            raise UnicodeDecodeError("utf-8", raw, 0, 1, "it is mixed")
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            if self._encoding is not None:
                raise
            text = raw.decode("cp1252")
            self._encoding = "cp1252"
            logger.warning("Line %d is not UTF-8: the table is read as Windows-1252, as Excel saves it.", self._number)
            return text
        self._encoding = "utf-8"
        return text

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

    def _head(self) -> Line:
        head = next(self._lines, None)
        if head is None:
            no_table(self._source, "it is empty")
        if head.fault is not None:
            no_table(self._source, f"line 1: {head.fault}")
        return head

    def fraction_read(self) -> float:
        return self._lines.fraction_read()

    def close(self) -> None:
        self._lines.close()


class CsvTable(_TableOfLines):
    """RFC 4180. A broken line costs itself; a quote that is not closed ends the table, at the line that opens it."""

    typed = False

    def __init__(self, source: str, lines: Lines, columns: Columns = AS_USUAL) -> None:
        super().__init__(source, lines)
        self._delimiter = columns.delimiter
        self._wanted = (columns.prompt,) if columns.prompt else PROMPTS
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
        is_head = True
        for line in self._lines:
            if line.fault is not None:
                yield BadRow(line.number, f"broken line: {line.fault}")
                continue
            if is_head and line.text.strip():
                said = line.text.rstrip("\r\n").lower()  # Excel's own first line, `sep=;`
                if line.number == 1 and self._delimiter is None and said in [f"sep={one}" for one in DELIMITERS]:
                    self._delimiter = said[4]
                    continue
                is_head = False
                self._delimiter = self._delimiter or self._separator(line.text)
            taken: list[Line] = [line]
            try:
                # It takes as many lines as the row has.
                cells = next(csv.reader(self._row(taken), delimiter=self._delimiter or ",", strict=True))
            except csv.Error as error:
                if len(taken) > 1 or "unexpected end" in str(error):
                    self._refuse(line)
                yield BadRow(line.number, f"broken line: {error}")
            else:
                if cells:
                    yield line.number, cells

    def _separator(self, head: str) -> str:
        """The one under which the header has the column of prompts, or the most columns; else the comma."""

        def fit(delimiter: str) -> tuple[bool, int]:
            try:
                names = next(csv.reader([head], delimiter=delimiter, strict=True))
            except csv.Error:
                return False, 0
            return any(name.strip() in self._wanted for name in names), len(names)

        return max(DELIMITERS, key=fit)

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
        self.columns = _columns(source, _tab_separated(self._head().text))

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
        ahead = [self._head(), *itertools.islice(lines, self.LOOK_AHEAD - 1)]
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
            values = safe_json.strict(line.text)
        except (ValueError, RecursionError) as error:
            return BadRow(line.number, f"broken line: it is no JSON ({str(error)[:100]})")
        if not isinstance(values, dict):
            return BadRow(line.number, "broken line: it is no JSON object")
        return Cells(line.number, values)


_READERS = {"xlsx": ("Excel", XLSX, "openpyxl", "excel"), "parquet": ("Parquet", PARQUET, "pyarrow", "parquet")}


class TypedTable:
    """A Parquet or Excel file, some rows at a time; lines are counted from 1, in Excel as Excel does.

    Args:
        source: What it is called.
        stream: The file; read here, piece by piece, as the child asks for it.
        process: Reads no other file meanwhile; one of its own when left out.
    """

    typed = True

    def __init__(self, source: str, stream: BinaryIO, process: ConfinedProcess | None = None) -> None:
        self._source, self._stream = source, stream
        name, reader, library, extra = _READERS[kind_of(source)]
        self._process = process or ConfinedProcess(reader, idle_seconds=None)
        try:
            said, _ = self._asked({"open": stream.seek(0, os.SEEK_END), "most_row_bytes": 2 * MAX_ROW_BYTES})
            self.columns = _columns(source, said["columns"])
        except BaseException as error:
            if process is None:
                self._process.close()
            if isinstance(error, NotInstalled):
                raise SetupError(f"{name} needs {library}: pip install 'prefect-eachlabs[{extra}]'.") from error
            if isinstance(error, ConfinedError):
                no_table(source, f"it is no {name} file ({error})")
            raise
        self._count, self._line = said["count"], said["head_line"]

    def _asked(self, arguments: dict[str, Any]) -> Answer:
        return self._process.call(arguments, seconds=READ_WITHIN_SECONDS, read=self._read)

    def _read(self, offset: int, size: int) -> bytes:
        self._stream.seek(offset)
        return self._stream.read(size)

    def rows(self) -> Iterator[Cells | BadRow]:
        try:
            while (answer := self._asked({}))[0]["rows"]:
                for values in json.loads(answer[1], object_hook=opened):
                    self._line += 1
                    if isinstance(values, str):
                        yield BadRow(self._line, f"broken row: {values}")
                    elif values is not None:
                        yield Cells(self._line, values)
        except TooCostly as error:
            raise BadInput(
                f"{self._source} cannot be read after row {self._line}: {error}. Write it anew with smaller cells, or "
                "leave out what is not needed."
            ) from error
        except ConfinedError as error:
            raise BadInput(f"{self._source} is damaged after row {self._line} ({error}).") from error

    def fraction_read(self) -> float:
        return min(1.0, self._line / self._count) if self._count > 0 else 1.0

    def close(self) -> None:
        self._process.close()
        self._stream.close()
