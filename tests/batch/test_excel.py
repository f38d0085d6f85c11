"""Tables as people save them from Excel: semicolons, Windows-1252, a BOM, workbooks; bounded when they are hostile."""

from __future__ import annotations

from contextlib import closing, suppress
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from prefect_eachlabs.batch.source import Wanted, open_source
from prefect_eachlabs.batch.tables import BadRow, Columns
from prefect_eachlabs.errors import BadInput, SetupError
from tests.batch.workbooks import FOX, workbook

USUAL = Columns()


def read(path: Path, columns: Columns = USUAL) -> list[Wanted | BadRow]:
    with closing(open_source(str(path), columns=columns)) as source:
        return list(source.rows())


def shown(rows: list[Wanted | BadRow]) -> list[Any]:
    """Line, id and prompt of each row, or why there is none."""
    return [
        (one.line, one.item.item_id if one.named else None, one.item.input["prompt"])
        if isinstance(one, Wanted)
        else (one.line, one.reason)
        for one in rows
    ]


TEXT = 'id;prompt;price\nmug;a café, blue;3,50\nlamp;"brass; art déco";4\n'


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1252"])
@pytest.mark.parametrize("head", ["", "sep=;\r\n"])
def test_a_csv_as_excel_saves_it_in_europe_is_read_as_it_is(tmp_path: Path, encoding: str, head: str) -> None:
    path = tmp_path / "shop.csv"
    path.write_bytes((head + TEXT.replace("\n", "\r\n")).encode(encoding))
    first = 3 if head else 2
    assert shown(read(path)) == [(first, "mug", "a café, blue"), (first + 1, "lamp", "brass; art déco")]


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_the_separator_is_the_one_under_which_there_is_a_prompt(tmp_path: Path, separator: str) -> None:
    path = tmp_path / "shop.csv"
    path.write_text(separator.join(("sku", "'Text", "prompt")) + "\n", encoding="utf-8")
    with closing(open_source(str(path))) as source:
        assert source.table.columns == ("sku", "'Text", "prompt")


def test_a_separator_that_is_named_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "shop.csv"
    path.write_text("id~prompt\nmug~a mug\n", encoding="utf-8")
    assert shown(read(path, Columns(delimiter="~"))) == [(2, "mug", "a mug")]
    path.write_text("id\tprompt\nmug\ta mug\n", encoding="utf-8")
    assert shown(read(path, Columns(delimiter=r"\t"))) == [(2, "mug", "a mug")]
    for wrong in (";;", "tab", '"', "\n", ""):
        with pytest.raises(BadInput, match="must be one character, such as ; or"):
            Columns(delimiter=wrong)
    path = tmp_path / "shop.tsv"
    path.write_text("prompt\n", encoding="utf-8")
    with pytest.raises(BadInput, match="only CSV has one"):
        read(path, Columns(delimiter=";"))


def test_columns_may_have_other_names(tmp_path: Path) -> None:
    path = tmp_path / "shop.csv"
    path.write_text("Artikel;Beschreibung;id\nA1;ein Becher;7\n", encoding="utf-8")
    (row,) = read(path, Columns(prompt="Beschreibung", id="Artikel"))
    assert isinstance(row, Wanted)
    assert (row.item.item_id, row.item.input["prompt"], dict(row.item.labels)) == ("A1", "ein Becher", {"id": "7"})
    for wrong in (Columns(prompt="Text"), Columns(prompt="Beschreibung", id="Nummer")):
        with pytest.raises(BadInput, match=r"has no column '(Text|Nummer)'\.") as refused:
            read(path, wrong)
        assert "Beschreibung" in str(refused.value.details)


def test_a_file_that_mixes_encodings_keeps_what_is_sure(tmp_path: Path) -> None:
    """The first line that is not ASCII decides; prompts of guessed letters are not bought."""
    path = tmp_path / "shop.csv"
    path.write_bytes(b"prompt\ncaf\xe9\ncaf\xc3\xa9\n\x81\nth\xe9\n")
    assert [row[-1][:15] for row in shown(read(path))] == ["café", "broken line: it", "broken line: it", "thé"]
    path.write_bytes(b"prompt\ncaf\xc3\xa9\ncaf\xe9\n")
    assert [row[-1][:15] for row in shown(read(path))] == ["café", "broken line: it"]


def test_utf_16_is_refused_in_words(tmp_path: Path) -> None:
    path = tmp_path / "shop.csv"
    path.write_bytes("prompt\n".encode("utf-16"))
    with pytest.raises(BadInput, match="it is UTF-16: save the file as UTF-8"):
        read(path)


# --------------------------------------------------------------------------------------------- workbooks


def book(path: Path, rows: list[list[Any]]) -> Path:
    openpyxl = pytest.importorskip("openpyxl")
    workbook = openpyxl.Workbook()
    for number, row in enumerate(rows, 1):
        for column, value in enumerate(row, 1):
            workbook.active.cell(number, column, value)
    workbook.save(path)
    return path


def test_a_workbook_is_read_from_its_first_row_and_counted_as_excel_does(tmp_path: Path) -> None:
    rows: list[list[Any]] = [
        [],
        ["id", "prompt", "input.seed", None, "since"],
        ["mug", "a café", 7, None, date(2026, 1, 2)],
        [],
        [1001, "a lamp", None, None, True],
        ["bad", None],
        ["worse", "#REF!"],
        ["wide", "a chair", None, None, None, "more"],
    ]
    found = read(book(tmp_path / "shop.xlsx", rows))
    assert shown(found) == [
        (3, "mug", "a café"),
        (5, "1001", "a lamp"),
        (6, "prompt: missing. Write what the picture shows."),
        (7, "broken row: a cell holds #REF!"),
        (8, "broken row: cells: more than the header's 5"),
    ]
    assert [row.number for row in found] == [3, 5, 6, 7, 8]
    assert isinstance(found[0], Wanted)
    assert found[0].item.input == {"prompt": "a café", "seed": 7}
    assert "2026-01-02" in dict(found[0].item.labels)["since"]


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04"])
def test_what_is_no_workbook_is_refused(tmp_path: Path, data: bytes) -> None:
    pytest.importorskip("openpyxl")
    path = tmp_path / "x.xlsx"
    path.write_bytes(data)
    with pytest.raises(BadInput, match="it is no Excel file"):
        read(path)


@pytest.mark.parametrize(
    ("said", "instead"),
    [
        pytest.param(b'r="2"', b'r="999999999999"', marks=pytest.mark.slow),  # a million rows of nothing
        (b'r="2"', b'r="-3"'),
        (b'r="B2"', b'r="ZZZZZZ2"'),
        (b"<v>2</v>", b"<v>999999999</v>"),
        (b"<v>1</v>", b"<v>1e999</v>"),
        (b't="s"', b't="d"'),
    ],
)
def test_a_workbook_that_says_what_is_not_so_is_refused_or_costs_a_row(
    tmp_path: Path, said: bytes, instead: bytes
) -> None:
    path = tmp_path / "shop.xlsx"
    path.write_bytes(workbook(FOX.replace(said, instead)))
    rows: list[Wanted | BadRow] = []
    with suppress(BadInput):
        rows = read(path)
    assert len(rows) <= 1


def test_shared_texts_are_read(tmp_path: Path) -> None:
    path = tmp_path / "shop.xlsx"
    path.write_bytes(workbook())
    assert shown(read(path)) == [(2, "1", "a fox")]


def test_without_openpyxl_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "openpyxl.py").write_text("raise ImportError('No module named openpyxl')", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    path = tmp_path / "shop.xlsx"
    path.write_bytes(b"")
    with pytest.raises(SetupError, match=r"Excel needs openpyxl: pip install 'prefect-eachlabs\[excel\]'"):
        read(path)
