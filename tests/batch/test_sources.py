"""Tables of prompts: every row arrives, a broken one costs itself alone, and nothing is read as a whole."""

from __future__ import annotations

import csv
import io
import json
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import boto3
import pytest
from botocore.exceptions import IncompleteReadError
from botocore.response import StreamingBody
from hypothesis import given
from hypothesis import strategies as st

from prefect_eachlabs.batch import files
from prefect_eachlabs.batch.source import Defaults, Source, Wanted, open_source
from prefect_eachlabs.batch.tables import (
    MAX_ROW_BYTES,
    BadRow,
    Cells,
    CsvTable,
    JsonLinesTable,
    Lines,
    TsvTable,
    base_name,
)
from prefect_eachlabs.errors import BadInput, SetupError, StoreFailed
from prefect_eachlabs.testing.s3 import LocalS3

TABLES = {"csv": CsvTable, "tsv": TsvTable, "jsonl": JsonLinesTable}


def rows_of(data: bytes | str, kind: str = "csv", defaults: Defaults | None = None) -> list[Wanted | BadRow]:
    raw = data.encode() if isinstance(data, str) else data
    lines = Lines(io.BytesIO(raw))
    return list(Source(TABLES[kind](f"prompts.{kind}", lines), f"prompts.{kind}", defaults).rows())


def prompts_of(rows: list[Wanted | BadRow]) -> list[str | None]:
    """The prompts that arrived; None for each bad row."""
    return [row.item.input["prompt"] if isinstance(row, Wanted) else None for row in rows]


def only(rows: list[Wanted | BadRow]) -> Wanted:
    (row,) = rows
    assert isinstance(row, Wanted), row
    return row


def test_columns_become_what_the_contract_says() -> None:
    row = only(
        rows_of("prompt,id,image_url,model,version,input.seed,Shelf\na fox,f-1,https://a.invalid/f.png,flux,v2,7,B\n")
    )
    assert row.line == 2
    assert row.named
    assert (row.item.item_id, row.item.model, row.item.version) == ("f-1", "flux", "v2")
    assert row.item.input == {"prompt": "a fox", "image_url": "https://a.invalid/f.png", "seed": 7}
    assert row.item.labels == {"Shelf": "B"}


def test_a_row_without_an_id_is_named_by_its_fingerprint() -> None:
    row = only(rows_of("Prompt\na fox\n"))
    assert not row.named
    assert row.item.item_id == row.item.fingerprint


def test_empty_cells_are_not_there() -> None:
    row = only(rows_of("prompt,id,image_url,model,version,input.seed,Shelf\na fox,,,,,,\n"))
    assert row.item.input == {"prompt": "a fox"}
    assert row.item.labels == {}
    assert row.item.model == "gemini"


def test_rows_without_a_model_get_the_given_one_with_its_version() -> None:
    rows = rows_of("prompt,model\na fox,\na fox,gemini\n", defaults=Defaults("flux", "v2"))
    assert [(row.item.model, row.item.version) for row in rows if isinstance(row, Wanted)] == [
        ("flux", "v2"),
        ("gemini", "2.0-flash-exp-image-generation"),
    ]


@pytest.mark.parametrize(
    ("cell", "value"),
    [
        *(("42", 42), ("-0.5", -0.5), ("1e3", 1000.0), ("true", True), ('"42"', "42")),
        *(('["a", 1]', ["a", 1]), ('{"a": null}', {"a": None})),
        *((text, text) for text in ("007", "3d", "null", "NaN", "1e999", "[broken", " wide ")),
    ],
)
def test_input_cells_of_text_tables_have_the_types_that_models_want(cell: str, value: object) -> None:
    quoted = cell.replace('"', '""')
    assert only(rows_of(f'prompt,input.x\na fox,"{quoted}"\n')).item.input["x"] == value


def test_json_lines_keep_their_types() -> None:
    line = {"prompt": "a fox", "id": 17, "input.seed": "42", "input": {"steps": 4}, "tags": ["a", 1], "none": None}
    row = only(rows_of(json.dumps(line), "jsonl"))
    assert row.item.item_id == "17"
    assert row.item.input == {"prompt": "a fox", "seed": "42", "steps": 4}
    assert row.item.labels == {"tags": '["a",1]'}


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        (",i1,", "prompt: missing"),
        ("   ,i1,", "prompt: empty or blank"),
        ("a fox,i 1,", "item_id"),
        ("a fox,i1,ftp://a.invalid/x.png", "image_url"),
        ("a fox,i1", "cells: 2, in the header: 3"),
        ("a fox, in snow,i1,", "cells: 4, in the header: 3"),
    ],
)
def test_a_bad_row_says_why_and_costs_only_itself(cells: str, reason: str) -> None:
    rows = rows_of(f"prompt,id,image_url\nbefore,,\n{cells}\nafter,,\n")
    assert prompts_of(rows) == ["before", None, "after"]
    bad = rows[1]
    assert isinstance(bad, BadRow)
    assert bad.line == 3
    assert reason in bad.reason


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_a_line_in_another_encoding_costs_only_itself(kind: str) -> None:
    lines = {"jsonl": [b'{"prompt": "before"}', b'{"prompt": "caf\xe9"}', b'{"prompt": "after"}']}.get(
        kind, [b"prompt", b"before", b"caf\xe9", b"after"]
    )
    rows = rows_of(b"\n".join(lines), kind)
    assert prompts_of(rows) == ["before", None, "after"]
    assert "not UTF-8" in next(row.reason for row in rows if isinstance(row, BadRow))


@pytest.mark.parametrize("broken", ['"closed" and then more', "a zero \0 byte", "x" * (MAX_ROW_BYTES + 10)])
def test_a_broken_csv_line_costs_only_itself(broken: str) -> None:
    text = "prompt\nfirst\n" + broken + "\n" + "\n".join(f"after {n}" for n in range(400)) + "\n"
    rows = rows_of(text)
    assert prompts_of(rows) == ["first", None, *(f"after {n}" for n in range(400))]
    assert rows[1].line == 3
    assert rows[-1].line == 403


@pytest.mark.parametrize(
    "broken",
    [
        '"a quote that is not closed',
        '"a quote that is closed\nby that of" another row',
        '"two lines,\nthe second with a zero \0 byte"',
        '"' + ("x" * 100_000 + "\n") * 2 + '"',
        '"' + "\n" * 300 + '"',
    ],
)
@pytest.mark.parametrize("after", ["", "after\n" * 400])
def test_a_quote_that_is_not_closed_ends_the_table_at_its_line(broken: str, after: str) -> None:
    table = CsvTable("x.csv", Lines(io.BytesIO(f"prompt\nfirst\n{broken}\n{after}".encode())))
    rows = table.rows()
    assert next(rows) == Cells(2, {"prompt": "first"})
    with pytest.raises(BadInput, match=r"x\.csv is damaged at line 3: a quote is opened there and not closed properly"):
        next(rows)


def test_a_quoted_cell_may_span_lines_and_rows_keep_their_line_numbers() -> None:
    rows = rows_of('prompt\n"two\nlines"\nafter\n')
    assert [(row.line, prompt) for row, prompt in zip(rows, prompts_of(rows), strict=True)] == [
        (2, "two\nlines"),
        (4, "after"),
    ]


def test_a_broken_json_line_costs_only_itself() -> None:
    rows = rows_of(
        '{"prompt": "a"}\n{"prompt": \n[1]\n"text"\n{"prompt": NaN}\n' + "[" * 5000 + '\n{"prompt": "b"}\n', "jsonl"
    )
    assert prompts_of(rows) == ["a", None, None, None, None, None, "b"]
    assert [row.line for row in rows] == [1, 2, 3, 4, 5, 6, 7]


def test_quotes_in_tsv_are_text_except_around_a_whole_cell() -> None:
    rows = rows_of('prompt\tnote\n"Fox" on a wall\t"\n"a ""red"" fox"\tx\n"a" or "b"\ty\n', "tsv")
    assert prompts_of(rows) == ['"Fox" on a wall', 'a "red" fox', '"a" or "b"']


def test_every_one_of_the_real_prompts_arrives_unchanged(require_shared: Callable[[str], Path]) -> None:
    path = require_shared("PartiPrompts.tsv")
    with closing(open_source(str(path))) as source:
        rows = list(source.rows())
        assert source.fraction_read() == 1.0
    real = [line.split("\t")[0] for line in path.read_text(encoding="utf-8").splitlines()[1:]]
    assert len(real) == 1_632
    assert prompts_of(rows) == real
    assert [row.line for row in rows] == list(range(2, 1_634))


def test_a_byte_order_mark_is_no_part_of_the_first_column() -> None:
    assert prompts_of(rows_of(b"\xef\xbb\xbfprompt\r\na fox\r\n")) == ["a fox"]


def test_an_index_column_without_a_name_means_nothing() -> None:
    assert only(rows_of(",prompt,\n0,a fox,\n")).item.labels == {}


@pytest.mark.parametrize(
    ("data", "kind", "words"),
    [
        (b"", "csv", "empty"),
        (b"\x89PNG\r\n\x1a\n\0\0", "csv", "not a table"),
        ("prompt\n".encode("utf-16"), "tsv", "UTF-8"),
        (b"x" * (MAX_ROW_BYTES + 1), "csv", "longer than"),
        (b'[{"prompt": "a"}]', "jsonl", "one JSON object a line"),
        (b"no\njson\nat all\n", "jsonl", "none of its first 3 lines"),
        (b"", "jsonl", "empty"),
        (b"prompt,id,id\n", "csv", "same name: rename"),
    ],
)
def test_a_file_that_is_no_table_ends_at_once(data: bytes, kind: str, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        rows_of(data, kind)


@pytest.mark.parametrize("name", ["prompt", "id", "image_url", "model", "version", "input", "input.x", "label"])
@pytest.mark.parametrize("depth", [100, 600, 900, 970, 100_000])
def test_a_row_that_is_nested_deeply_costs_itself_alone(name: str, depth: int) -> None:
    deep = f'{{"{name}": {"[" * depth}{"]" * depth}}}\n'
    rows = rows_of(f'{{"prompt": "a fox"}}\n{deep}{{"prompt": "a hen"}}\n', "jsonl")
    assert prompts_of(rows) == ["a fox", None, "a hen"]


def test_a_head_of_20000_columns_is_read_once() -> None:
    """Quadratic, it took 13 seconds."""
    names = ["prompt", *(f"{number:x}" for number in range(20_000))]
    row = only(rows_of(",".join(names) + "\na fox" + "," * 20_000 + "\n"))
    assert row.item.input["prompt"] == "a fox"


@pytest.mark.parametrize(
    ("data", "kind", "columns"),
    [
        ("text,id\na fox,1\n", "csv", "'text', 'id'"),
        ("text\tid\na fox\t1\n", "tsv", "'text', 'id'"),
        ("text;id\na fox;1\n", "csv", "'text', 'id'"),
        ('{"text": "a"}\n{"id": 1}\n', "jsonl", "'text', 'id'"),
    ],
)
def test_a_table_without_prompts_ends_at_once_and_says_which_columns_it_has(data: str, kind: str, columns: str) -> None:
    with pytest.raises(BadInput, match="no column 'prompt'") as refused:
        rows_of(data, kind)
    assert columns in str(refused.value.details)


def test_a_table_with_a_header_alone_has_no_rows() -> None:
    assert rows_of("prompt\n") == []


@pytest.mark.parametrize("name", ["prompts", "prompts.txt", "prompts.parquet.gz", "prompts.csv.gz", "a.csv/prompts"])
def test_a_name_that_tells_no_format_is_refused(name: str) -> None:
    with pytest.raises(BadInput, match=r"\.csv, \.tsv, \.jsonl, \.parquet or \.xlsx"):
        open_source(name)


@pytest.mark.parametrize(
    ("source", "name"), [("s3://b/in/spring.csv", "spring"), ("/a/x.y.jsonl", "x.y"), ("p.TSV", "p")]
)
def test_the_base_name_is_the_file_without_its_format(source: str, name: str) -> None:
    assert base_name(source) == name


def test_a_missing_file_and_a_folder_say_so(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"none\.csv: there is no such file\."):
        open_source(str(tmp_path / "none.csv"))
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(BadInput, match="folder"):
        open_source(str(tmp_path / "folder.csv"))


def test_parquet_keeps_types_and_counts_rows(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table(
        {
            "prompt": ["a fox", None, "a dog"],
            "id": [1, 2, 3],
            "input.seed": [7, 8, None],
            "input.strength": [0.5, float("nan"), 1.0],
            "shelf": ["A", "B", None],
        }
    )
    path = tmp_path / "prompts.parquet"
    parquet.write_table(table, path)
    with closing(open_source(str(path))) as source:
        rows = list(source.rows())
        assert source.fraction_read() == 1.0
    assert prompts_of(rows) == ["a fox", None, "a dog"]
    first, _, last = rows
    assert isinstance(first, Wanted)
    assert isinstance(last, Wanted)
    assert first.item.input == {"prompt": "a fox", "seed": 7, "strength": 0.5}
    assert (first.item.item_id, first.item.labels, first.line) == ("1", {"shelf": "A"}, 1)
    assert last.item.input == {"prompt": "a dog", "strength": 1.0}
    (tmp_path / "none.parquet").write_bytes(b"no parquet at all")
    with pytest.raises(BadInput, match="no Parquet file"):
        open_source(str(tmp_path / "none.parquet"))


def test_a_row_that_would_not_fit_a_record_is_refused(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "large.parquet"
    parquet.write_table(pyarrow.table({"prompt": ["a", "b"], "label": ["x" * MAX_ROW_BYTES, "y"]}), path)
    with closing(open_source(str(path))) as source:
        rows = list(source.rows())
    assert prompts_of(rows) == [None, "b"]


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux alone")
@pytest.mark.parametrize("kind", ["a cell of 5 MB in 60 rows", "a list of 30 million nothings"])
def test_a_small_parquet_file_that_stands_for_gigabytes_is_refused(tmp_path: Path, kind: str) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    labels = {
        "a cell of 5 MB in 60 rows": pyarrow.repeat("x" * 5_000_000, 60),
        "a list of 30 million nothings": pyarrow.ListArray.from_arrays(
            [0, 30_000_000], pyarrow.nulls(30_000_000, pyarrow.int8())
        ),
    }[kind]
    path = tmp_path / "small.parquet"
    table = pyarrow.table({"prompt": ["a fox"] * len(labels), "label": labels})
    parquet.write_table(table, path, compression="zstd")
    assert path.stat().st_size < 50_000
    with (
        closing(open_source(str(path))) as source,
        pytest.raises(BadInput, match="cannot be read after row 0: it needs more than 192 MB"),
    ):
        list(source.rows())


def test_reading_takes_no_more_memory_for_a_long_table(tmp_path: Path) -> None:
    path = tmp_path / "long.csv"
    with path.open("w") as file:
        file.write("prompt\n")
        file.writelines(f"fox number {number} {'very ' * 200}\n" for number in range(1_200))
    with closing(open_source(str(path))) as source:
        rows: Iterator[Wanted | BadRow] = source.rows()
        next(rows)
        tracemalloc.start()
        try:
            assert sum(1 for _ in rows) == 1_199
            _, peak_bytes = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak_bytes < 400_000, "1,200 rows are some 1.2 MB; threads of other tests may still end meanwhile"


# The same from a bucket.


@pytest.fixture
def bucket(local_s3: LocalS3) -> LocalS3:
    local_s3.create_bucket("in-bucket")
    return local_s3


def _put(bucket: LocalS3, key: str, body: bytes) -> None:
    access = bucket.access
    with closing(
        boto3.client(
            "s3",
            endpoint_url=access.endpoint_url,
            region_name=access.region,
            aws_access_key_id=access.access_key_id,
            aws_secret_access_key=access.secret_access_key,
        )
    ) as client:
        client.put_object(Bucket="in-bucket", Key=key, Body=body)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_source_in_a_bucket_is_downloaded_once(bucket: LocalS3, kind: str) -> None:
    prompts = [f"fox {number}" for number in range(1_000)]
    body = "\n".join(["prompt", *prompts]).encode()
    if kind == "parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        buffer = io.BytesIO()
        parquet.write_table(pyarrow.table({"prompt": prompts}), buffer)
        body = buffer.getvalue()
    _put(bucket, f"in/foxes.{kind}", body)
    before = sum(bucket.counts().values())
    with closing(open_source(f"s3://in-bucket/in/foxes.{kind}", bucket.access)) as source:
        assert prompts_of(list(source.rows())) == prompts
        assert source.fraction_read() == 1.0
    assert sum(bucket.counts().values()) - before == 1


def test_a_download_that_is_cut_goes_on_where_it_was(bucket: LocalS3, monkeypatch: pytest.MonkeyPatch) -> None:
    _put(bucket, "in/foxes.csv", b"prompt\n" + b"a fox\n" * 1_000)
    whole, asked = StreamingBody.iter_chunks, list[int]()

    def cut(body: StreamingBody, size: int) -> Iterator[bytes]:
        asked.append(size)
        if len(asked) > 2:
            yield from whole(body, size)
            return
        yield body.read(1_000)
        raise IncompleteReadError(actual_bytes=1_000, expected_bytes=6_007)

    monkeypatch.setattr(StreamingBody, "iter_chunks", cut)
    with closing(open_source("s3://in-bucket/in/foxes.csv", bucket.access)) as source:
        assert prompts_of(list(source.rows())) == ["a fox"] * 1_000
    assert len(asked) == 3
    asked[:] = [0]
    _put(bucket, "in/foxes.csv", b"prompt\n")
    monkeypatch.setattr(files, "ATTEMPTS", 1)
    with pytest.raises(StoreFailed, match="gave no whole answer"):
        open_source("s3://in-bucket/in/foxes.csv", bucket.access)


def test_a_source_that_is_replaced_while_it_is_read_is_not_patched_together(
    bucket: LocalS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    _put(bucket, "in/foxes.csv", b"prompt\n" + b"a fox\n" * 1_000)

    def replaced(body: StreamingBody, size: int) -> Iterator[bytes]:
        yield body.read(1_000)
        _put(bucket, "in/foxes.csv", b"prompt\n" + b"a dog\n" * 1_000)
        raise IncompleteReadError(actual_bytes=1_000, expected_bytes=6_007)

    monkeypatch.setattr(StreamingBody, "iter_chunks", replaced)
    with pytest.raises(BadInput, match="was replaced while it was read"):
        open_source("s3://in-bucket/in/foxes.csv", bucket.access)


def test_a_source_that_would_fill_the_disk_is_refused(bucket: LocalS3, monkeypatch: pytest.MonkeyPatch) -> None:
    _put(bucket, "in/foxes.csv", b"prompt\na fox\n")
    monkeypatch.setattr(files, "MOST_BYTES", 12)
    with pytest.raises(BadInput, match="larger than 5 GiB"):
        open_source("s3://in-bucket/in/foxes.csv", bucket.access)


def test_a_source_that_is_missing_in_its_bucket_says_which(bucket: LocalS3) -> None:
    with pytest.raises(BadInput, match=r"s3://in-bucket/none\.csv: there is no such object"):
        open_source("s3://in-bucket/none.csv", bucket.access)
    with pytest.raises(SetupError, match="NoSuchBucket"):
        open_source("s3://no-such-bucket/none.csv", bucket.access)
    with pytest.raises(BadInput, match="no file in it"):
        open_source("s3://bucket.csv", bucket.access)


# Whatever a file holds.

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), max_size=30)


@given(st.lists(st.tuples(texts, texts), max_size=20))
def test_what_a_csv_writer_wrote_comes_back(rows: list[tuple[str, str]]) -> None:
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerows([("prompt", "label"), *rows])
    data = buffer.getvalue().encode()
    table = CsvTable("x.csv", Lines(io.BytesIO(data)))
    found = [row for row in table.rows() if not isinstance(row, BadRow)]
    assert [(row.values["prompt"], row.values["label"]) for row in found] == rows


@given(st.binary(max_size=300), st.sampled_from(["csv", "tsv"]))
def test_no_bytes_in_a_line_make_a_reader_fall_or_lose_the_lines_around_it(junk: bytes, kind: str) -> None:
    line = junk.replace(b"\n", b"").replace(b'"', b"")
    rows = rows_of(b"prompt\nbefore\n" + line + b"\nafter\n", kind)
    found = prompts_of(rows)
    assert found[0] == "before"
    assert found[-1] == "after"
    assert len(found) <= 3
