"""Rows that are handed over: what counts as rows, what their values become, and what is wrong with one alone."""

from __future__ import annotations

import datetime
from collections import namedtuple
from collections.abc import Iterator
from contextlib import closing
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from prefect_eachlabs.batch.inline_rows import InlineRows
from prefect_eachlabs.batch.source import Source, Wanted
from prefect_eachlabs.batch.tables import BadRow

KEY = UUID("6f1c2f4e-3b1e-4b43-9a52-8b7a4cf0c1d2")


def rows_of(rows: Any) -> list[Wanted | BadRow]:
    with closing(Source(InlineRows(rows), "rows")) as source:
        return list(source.rows())


def item_of(row: dict[str, Any]) -> Any:
    (wanted,) = rows_of([row])
    assert isinstance(wanted, Wanted), wanted
    return wanted.item


class Pandas:
    """What is used of a pandas DataFrame, whose plain iteration gives its columns' names."""

    columns = ("id", "prompt", 3)

    def itertuples(self, *, index: bool, name: str | None) -> Iterator[tuple[Any, ...]]:
        assert (index, name) == (False, None)
        yield 1, "a fox", float("nan")
        yield 2, type("NAType", (), {})(), 4.5

    def __iter__(self) -> Iterator[Any]:
        return iter(self.columns)


class Polars:
    """What is used of a polars DataFrame, whose plain iteration gives its columns."""

    columns = ("id", "prompt")

    def iter_rows(self, *, named: bool) -> Iterator[dict[str, Any]]:
        assert named
        yield {"id": "a", "prompt": "a fox"}


class NumPy:
    """A scalar of numpy."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def tolist(self) -> Any:
        return self._value


def test_data_frames_are_read_by_rows_and_missing_values_are_none() -> None:
    first, second = rows_of(Pandas())
    assert isinstance(first, Wanted)
    assert (first.item.item_id, first.item.input["prompt"], first.item.labels) == ("1", "a fox", {})
    assert isinstance(second, BadRow)
    (only,) = rows_of(Polars())
    assert isinstance(only, Wanted)
    assert only.item.item_id == "a"


def test_rows_of_databases_are_rows() -> None:
    row = namedtuple("row", "id prompt")("a", "a fox")
    (wanted,) = rows_of([row])
    assert isinstance(wanted, Wanted)
    assert wanted.item.item_id == "a"


def test_values_become_what_json_has_and_keys_and_numbers_stay_what_they_are() -> None:
    item = item_of(
        {
            "id": KEY,
            "prompt": "a fox",
            "image_url": None,
            "input.seed": NumPy(7),
            "input.scale": Decimal("1.5"),
            "input.steps": Decimal(20),
            "added": datetime.date(2026, 11, 22),
            "place": Path("a/b"),
        }
    )
    assert item.item_id == str(KEY)
    assert {name: item.input[name] for name in ("seed", "scale", "steps")} == {"seed": 7, "scale": 1.5, "steps": 20}
    assert "image_url" not in item.input
    assert item.labels["place"] == "a/b"
    assert "2026-11-22" in item.labels["added"]


@pytest.mark.parametrize(
    "row",
    [
        ("a", "a fox"),
        None,
        {"prompt": "half \ud800 a character"},
        {"prompt": "large", "more": "x" * 300_000},
        {"prompt": b"bytes"},
        {"prompt": "a fox", "input.seed": datetime.date(2026, 11, 22)},
        {"prompt": "a fox", "input.list": {("a", 1): 2}},
    ],
    ids=["a tuple", "nothing", "surrogate", "large", "bytes", "a date as input", "a key that is no text"],
)
def test_a_bad_row_costs_itself_alone_and_keeps_its_number(row: Any) -> None:
    before, bad, after = rows_of([{"prompt": "before"}, row, {"prompt": "after"}])
    assert isinstance(bad, BadRow), bad
    assert (bad.line, bad.reason != "") == (2, True)
    assert isinstance(before, Wanted)
    assert isinstance(after, Wanted)
    assert after.line == 3


def test_the_number_of_rows_is_known_from_the_start() -> None:
    table = InlineRows({"prompt": f"fox {number}"} for number in range(4))
    with closing(table):
        seen = [table.fraction_read() for _ in table.rows()]
    assert seen == [0.25, 0.5, 0.75, 1.0]
