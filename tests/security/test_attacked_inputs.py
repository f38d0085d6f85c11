"""Inputs that were tried under attack: tables of long prompts, answers of S3, forms, pictures, links that come late."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from botocore.awsrequest import AWSResponse
from botocore.exceptions import ClientError

from prefect_eachlabs import reference_images
from prefect_eachlabs.batch.outcomes import Outcome, RowState
from prefect_eachlabs.batch.pages import LONGEST_CHARACTERS, index_page
from prefect_eachlabs.batch.report import PART_BYTES, BatchFolder, ReportWriter
from prefect_eachlabs.batch.sheet import frame
from prefect_eachlabs.batch.source import MOST_BYTES_AHEAD, Rows, Source, open_source
from prefect_eachlabs.batch.state import Scratch
from prefect_eachlabs.batch.tables import Cells
from prefect_eachlabs.errors import BadInput, EachlabsError, StoreFailed
from prefect_eachlabs.ledger import records
from prefect_eachlabs.ledger.records import INDENTED_BYTES, MAX_CLAIM_BYTES, Record, new_record
from prefect_eachlabs.models import Destination, Item
from prefect_eachlabs.reference_images import Roots
from prefect_eachlabs.storage import s3_client
from prefect_eachlabs.storage.s3_client import S3Access
from tests import virtual_time
from tests.batch.batch_kit import MemoryFiles, inline
from tests.images.test_png import IEND, header, idat, png
from tests.memory_store import MemoryStore
from tests.net.real_time import in_real_time

PROMPT = "a fox " * 20_000
"""120,000 characters."""


# Tables of long prompts.


def test_a_page_of_long_prompts_is_cut_and_says_so() -> None:
    rows = [Outcome(n, RowState.FAILED, prompt=PROMPT, error={"kind": "x", "message": PROMPT}) for n in range(1_000)]
    page = "".join(index_page({"failed": 1_000}, pictures=[], not_there=rows))
    assert len(page) < 1_000 * (2 * LONGEST_CHARACTERS)
    assert page.count("… (all of it is in report.jsonl)") == 1_000


def test_no_part_holds_much_more_than_4_mb_also_after_the_bucket_was_away() -> None:
    async def story() -> None:
        store, scratch = MemoryStore(), Scratch()
        folder = BatchFolder(store, MemoryFiles(store), Destination.parse("s3://bucket/p"), "spring", inline)
        writer = ReportWriter(folder, "RUN", scratch, dict)
        for number in range(100):
            writer.add(
                Outcome(number, RowState.STORED, prompt=PROMPT), is_news=True
            )  # the loop gets no turn: all of it waits
        await writer.write_rest()
        parts = [store.objects[key].body for key in store.keys("p/") if "part-" in key]
        assert sum(part.count(b"\n") for part in parts) == 100
        assert max(map(len, parts)) <= PART_BYTES + 2 * len(PROMPT)
        scratch.close()

    virtual_time.run(story())


class LongRows:
    columns, typed = ("prompt",), True

    def __init__(self) -> None:
        self.read = 0

    def rows(self) -> Iterator[Cells]:
        for number in range(1, 40):
            self.read += 1
            yield Cells(number, {"prompt": f"{number} {PROMPT}"})

    def fraction_read(self) -> float:
        return 1.0

    def close(self) -> None: ...


@in_real_time
async def test_long_rows_are_read_ahead_to_a_megabyte_and_none_is_lost() -> None:
    table, scratch = LongRows(), Scratch()
    rows = Rows(Source(table, "rows"), scratch, inline)
    assert await rows.next() is not None
    assert table.read <= MOST_BYTES_AHEAD // len(PROMPT) + 1
    count = 1
    while await rows.next() is not None:
        count += 1
    assert count == table.read == 39
    scratch.close()


# Answers of S3.


def answered(monkeypatch: pytest.MonkeyPatch, body: bytes, status: int = 200) -> Exception:
    """What a listing comes to that is answered so."""
    access = S3Access("http://127.0.0.1:9", "eu-west-1", "AKIDEXAMPLE", "secret-0123456789-abcdefgh")
    client = s3_client._make_client(access)

    class Raw(io.BytesIO):
        def stream(self, **_: Any) -> Iterator[bytes]:
            yield self.read()

    answer = AWSResponse("http://127.0.0.1:9", status, {}, Raw(body))
    client.meta.events.register("before-send.s3", lambda **_: answer)
    monkeypatch.setattr(s3_client, "client_of", lambda _: client)
    with pytest.raises(EachlabsError) as caught:
        s3_client._explained(lambda: client.list_objects_v2(Bucket="b"), access, "s3://b")
    return caught.value


BOMB = b'<!DOCTYPE x [<!ENTITY a "' + b"b" * 1_000 + b'">]><ListBucketResult><Name>&a;&a;</Name></ListBucketResult>'
HUGE = b"<ListBucketResult><Name>" + b"b" * s3_client.MOST_XML_BYTES + b"</Name></ListBucketResult>"


@pytest.mark.parametrize("body", [BOMB, HUGE], ids=["entities", "huge"])
def test_an_answer_with_entities_or_of_more_than_8_mb_is_not_parsed(
    body: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = answered(monkeypatch, body)
    assert isinstance(error, StoreFailed)
    assert "not understood" in str(error)


def test_a_refusal_with_entities_is_told_by_its_status(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "403" in str(answered(monkeypatch, BOMB, status=403))


def test_what_s3_says_of_a_refusal_is_cut_before_it_is_cleaned(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    shown = s3_client.redaction.shown
    monkeypatch.setattr(s3_client.redaction, "shown", lambda text: seen.append(len(text)) or shown(text))  # type: ignore[func-returns-value]
    long = "x" * 1_000_000
    answer: Any = {"Error": {"Code": long, "Message": long}, "ResponseMetadata": {"HTTPStatusCode": 400}}
    error = s3_client.explain(ClientError(answer, "PutObject"), uri="s3://b/k", endpoint="http://127.0.0.1")
    assert max(seen) <= s3_client.MOST_WORDS
    assert len(str(error)) < 1_000


# Forms.


def test_an_input_that_is_too_large_is_not_made_into_a_record(monkeypatch: pytest.MonkeyPatch) -> None:
    def to_bytes(_: Record) -> bytes:
        raise AssertionError("it was encoded once more")

    item = Item.wanted("a fox", input={"n": [0] * MAX_CLAIM_BYTES})
    monkeypatch.setattr(records.Record, "to_bytes", to_bytes)
    with pytest.raises(BadInput, match="nothing was bought"):
        new_record(item, run_id="r")


def test_a_record_is_indented_where_a_person_may_read_it_and_reads_back_either_way() -> None:
    for count in (10, INDENTED_BYTES):
        record = new_record(Item.wanted("a fox", input={"n": [0] * count}), run_id="r")
        body = record.to_bytes()
        assert (b"\n" in body) == (count == 10)
        assert Record.model_validate_json(body) == record
        assert json.loads(body)["input"]["n"] == [0] * count


# Pictures.


def test_a_picture_of_900_megapixels_is_on_the_sheet_as_none() -> None:
    pytest.importorskip("PIL")
    assert frame(png(header(30_000, 30_000), idat(bytes(1_000_000)), IEND), "a fox", "fox", "").picture is None


# Links that come after a path was looked at.


@pytest.fixture
def late_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """A root whose folder becomes a link to the one outside of it just before so many files in it are opened."""
    before, has_proc = request.param
    root, outside = tmp_path / "root", tmp_path / "outside"
    for folder in (root / "in", outside):
        folder.mkdir(parents=True)
        (folder / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + folder.name.encode())
        (folder / "a.csv").write_text(f"prompt\n{folder.name}\n")
    opened, count, really_read = os.open, 0, os.readlink

    def swapped(path: Any, *args: Any, **more: Any) -> int:
        nonlocal count
        if str(path).startswith(f"{root}/in/"):
            count += 1
            if count == before:
                (root / "in").rename(root / "was")
                (root / "in").symlink_to(outside)
        return opened(path, *args, **more)

    def without_proc(path: Any, *args: Any, **more: Any) -> str:
        if str(path).startswith("/proc/"):
            raise FileNotFoundError(path)
        return str(really_read(path, *args, **more))

    monkeypatch.setattr(reference_images.os, "open", swapped)
    if not has_proc:
        monkeypatch.setattr(reference_images.os, "readlink", without_proc)
    return root


@pytest.mark.parametrize("late_link", [(1, True), (1, False), (2, True), (2, False)], ids=str, indirect=True)
def test_a_picture_behind_a_link_that_comes_late_is_not_taken(late_link: Path) -> None:
    with pytest.raises(BadInput, match="not an http"):
        Roots((late_link,)).open("in/a.png")


@pytest.mark.parametrize("late_link", [(1, True), (1, False)], ids=str, indirect=True)
def test_a_table_behind_a_link_that_comes_late_is_not_read(late_link: Path) -> None:
    roots = Roots((late_link,))
    source = roots.source("in/a.csv")
    with pytest.raises(EachlabsError, match="lies elsewhere"):
        open_source(source, within=roots)


@pytest.mark.parametrize("late_link", [(9, True), (9, False)], ids=str, indirect=True)
def test_what_stays_where_it_is_is_read(late_link: Path) -> None:
    roots = Roots((late_link,))
    assert roots.open("in/a.png").read().endswith(b"in")
    source = open_source(roots.source("in/a.csv"), within=roots)
    assert len(list(source.rows())) == 1
    source.close()


def test_a_pipe_in_a_pictures_place_holds_nobody(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n")
    picture = Roots(anywhere=True).open(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(BadInput, match="cannot be read any more"):
        picture.read()
