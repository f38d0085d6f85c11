"""Tables that people, spreadsheets and enemies write: every row is an item or says why not, or the file is refused."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from typing import Any

import pyarrow
from hypothesis import strategies as st
from pyarrow import parquet

from prefect_eachlabs.batch.outcomes import Outcome, refused
from prefect_eachlabs.batch.parquet import READER
from prefect_eachlabs.batch.source import Source, Wanted
from prefect_eachlabs.batch.state import Scratch
from prefect_eachlabs.batch.tables import BadRow, CsvTable, JsonLinesTable, Lines, Table, TsvTable, TypedTable
from prefect_eachlabs.confined import ConfinedProcess
from prefect_eachlabs.errors import EachlabsError
from prefect_eachlabs.ledger.records import Record, new_record
from tests.fuzz import hostile
from tests.fuzz.kit import fuzzed

TEXT: dict[str, Callable[[str, Lines], Table]] = {"csv": CsvTable, "tsv": TsvTable, "jsonl": JsonLinesTable}
COLUMNS = (
    *("prompt", "id", "image_url", "model", "version", "input.seed", "input.", "input", "label", "", " prompt "),
    "Prompt",
)
ROW = {
    "id": "a1",
    "prompt": "a fox",
    "image_url": "https://files.invalid/a.png",
    "input.seed": 1,
    "input": {"n": [1.5]},
    "label": None,
}


def rows_of(table: Table) -> None:
    """Reads all of it; anything but rows and errors of the tree is a finding."""
    at = 0
    with closing(Source(table, "x")) as source, closing(Scratch()) as scratch:
        for row in source.rows():
            assert at <= row.line
            at = row.line
            assert 0 <= source.fraction_read() <= 1
            if isinstance(row, BadRow):
                outcome = refused(row)
            else:
                assert isinstance(row, Wanted)
                scratch.take_id(row.item.item_id)
                body = new_record(row.item, run_id="r").to_bytes()
                assert Record.model_validate_json(body).input == row.item.input
                outcome = refused(BadRow(row.line, "x", row.item.item_id, row.item.input.get("prompt")))
                outcome = replace(outcome, labels=row.item.labels)
            found = Outcome.from_line(outcome.to_line())
            assert found is not None
            assert replace(found, error=None) == replace(outcome, error=None)


def read(open_table: Callable[[], Table]) -> None:
    try:
        rows_of(open_table())
    except EachlabsError as error:
        str(error).encode()


@st.composite
def texts(draw: Any) -> tuple[str, bytes]:
    """A CSV, TSV or JSON Lines file in some encoding, with some line ends, damaged."""
    kind = draw(st.sampled_from(sorted(TEXT)))
    if kind == "jsonl":
        lines = draw(st.lists(hostile.bytes_of(ROW, {"prompt": "x"}, names=COLUMNS), max_size=5))
        return kind, draw(st.sampled_from((b"\n", b"\n", b"\r\n", b"\n\n"))).join([b'{"prompt": "a"}', *lines])
    border = "," if kind == "csv" else "\t"
    cell = hostile.texts | st.sampled_from(
        ('"a ""b"" c"', '"', '""', '"a\nb"', '"x"y', "a fox", "42", "[1", "1e5", "NaN", " ")
    )
    names = draw(st.lists(st.sampled_from(COLUMNS) | hostile.texts, max_size=5))
    rows = [
        ["prompt", *names],
        *draw(st.lists(st.lists(cell, min_size=len(names) + 1, max_size=len(names) + 1), max_size=5)),
    ]
    end = draw(st.sampled_from(("\n", "\n", "\r\n", "\r", "\n\r")))
    encoding = draw(st.sampled_from(("utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-7")))
    data = end.join(border.join(row) for row in rows).encode(
        encoding, "surrogatepass" if encoding != "utf-7" else "replace"
    )
    return kind, hostile.damaged(data, draw)


@fuzzed(texts())
def test_a_text_table_is_read_row_by_row_or_refused(table: tuple[str, bytes]) -> None:
    kind, data = table
    read(lambda: TEXT[kind](f"x.{kind}", Lines(io.BytesIO(data))))


NUMBERS = st.integers(-(2**31), 2**31 - 1)
KINDS: dict[str, tuple[pyarrow.DataType, st.SearchStrategy[Any]]] = {
    "text": (pyarrow.string(), st.text(st.characters(exclude_categories=["Cs"]), max_size=8)),
    "bytes": (pyarrow.binary(), st.binary(max_size=8)),
    "whole": (pyarrow.int64(), st.integers(-(2**63), 2**63 - 1)),
    "broken": (pyarrow.float64(), st.floats()),
    "truth": (pyarrow.bool_(), st.booleans()),
    "day": (pyarrow.date32(), NUMBERS),
    "moment": (pyarrow.timestamp("ns"), st.integers(-(2**62), 2**62)),
    "far moment": (pyarrow.timestamp("s"), st.integers(-(2**52), 2**52)),
    "moment there": (pyarrow.timestamp("us", tz="Europe/Berlin"), st.integers(-(2**62), 2**62)),
    "moment nowhere": (pyarrow.timestamp("us", tz="Mars/Olympus"), st.integers(0, 2**40)),
    "span": (pyarrow.duration("ns"), st.integers(-(2**62), 2**62)),
    "hour": (pyarrow.time64("ns"), st.integers(0, 86_399_999_999_999)),
    "list": (pyarrow.list_(pyarrow.int32()), st.lists(NUMBERS, max_size=3)),
    "map": (
        pyarrow.map_(pyarrow.string(), pyarrow.float32()),
        st.lists(st.tuples(st.text("ab", max_size=2), st.floats(width=32)), max_size=3),
    ),
    "struct": (
        pyarrow.struct([("a", pyarrow.int8()), ("a b", pyarrow.float64())]),
        st.fixed_dictionaries({"a": st.integers(-99, 99)}),
    ),
    "none": (pyarrow.null(), st.none()),
}


@st.composite
def parquets(draw: Any) -> bytes:
    """A Parquet file of any types under any names, perhaps damaged."""
    count = draw(st.integers(0, 4))
    columns: dict[str, pyarrow.Array] = {}
    for name in draw(st.lists(st.sampled_from([name for name in COLUMNS if name]), unique=True, max_size=4)):
        kind, strategy = KINDS[draw(st.sampled_from(sorted(KINDS)))]
        columns[name] = pyarrow.array(draw(st.lists(st.none() | strategy, min_size=count, max_size=count)), type=kind)
    columns.setdefault("prompt", pyarrow.array(["a fox"] * count, type=pyarrow.string()))
    file = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), file, compression=draw(st.sampled_from(("none", "snappy", "gzip"))))
    data = file.getvalue()
    return hostile.damaged(data, draw) if draw(st.booleans()) else data


READER_OF_ALL = ConfinedProcess(READER)
"""A process for each table would take half a second."""


@fuzzed(parquets(), share=0.3)
def test_a_parquet_table_is_read_row_by_row_or_refused(data: bytes) -> None:
    read(lambda: TypedTable("x.parquet", io.BytesIO(data), READER_OF_ALL))
