"""Reports: true at every moment, whole at the end, and nothing in them is trusted."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import logging
import sys
from contextlib import closing
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prefect_eachlabs.batch import report, sheet, thumbs
from prefect_eachlabs.batch import run as batch_run
from prefect_eachlabs.batch.files import S3Files
from prefect_eachlabs.batch.outcomes import Outcome, RowState, Totals
from prefect_eachlabs.batch.pages import MOST_PICTURES, index_page
from prefect_eachlabs.batch.report import BatchFolder, ReportWriter, run_name
from prefect_eachlabs.batch.sheet import MOST_FRAMES
from prefect_eachlabs.batch.state import Scratch
from prefect_eachlabs.batch.thumbs import Thumbs, edge_px
from prefect_eachlabs.batch.worker import on_disk
from prefect_eachlabs.errors import PredictionFailed, SetupError
from prefect_eachlabs.images.thumbnails import NoThumbnail
from prefect_eachlabs.models import Item
from prefect_eachlabs.net.redaction import visible
from prefect_eachlabs.storage.s3 import S3Store
from prefect_eachlabs.testing.s3 import LocalS3
from tests.batch.batch_kit import (
    DESTINATION,
    CountingShop,
    MemoryFiles,
    batch_of,
    inline,
    lines_of,
    prompts,
    run,
    source_of,
    tiny_png,
    totals_of,
)
from tests.html_seen import Seen
from tests.memory_store import MemoryStore

HOSTILE = [
    *("<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "' onmouseover='alert(1)"),
    *("</main></body><h1>free pictures</h1>", "javascript:alert(1)", "&lt;b&gt; &amp;", "\u202egnp.exe", "]]><!--"),
]


def outcome(row: int, state: RowState = RowState.STORED, **more: Any) -> Outcome:
    given: dict[str, Any] = {"item_id": f"i{row}", "fingerprint": "f", "model": "gemini", "prompt": f"fox {row}"}
    return Outcome(row, state, **{**given, **more})


# Lines.


def test_a_line_comes_back_as_it_was() -> None:
    whole = outcome(
        7,
        version="v",
        image_url="https://a.invalid",
        labels={"a": "\u2028é"},
        uri="s3://b/k",
        prediction_id="p",
        bought_by="r",
        sha256="0",
        size_bytes=1,
        width_px=2,
        height_px=3,
        cost_usd=0.04,
        seconds=1.5,
        predict_time_seconds=1,
    )
    assert Outcome.from_line(whole.to_line()) == whole
    failed = outcome(8, RowState.FAILED, error={"kind": "k", "message": "m"}, final=True)
    assert Outcome.from_line(failed.to_line()) == failed


@pytest.mark.parametrize(
    "line",
    [
        *(b"", b"{}", b"[]", b'{"row": 1}', b'{"row": 1, "state": "odd"}', b"\xff"),
        *(b'{"row": %s, "state": "stored"}' % row for row in (b'"x"', b"Infinity", b"-1", b"1.5", b"true", b"null")),
        b'{"row": 1%s, "state": "stored"}' % (b"0" * 400),
    ],
)
def test_a_line_that_is_none_of_a_report_is_none(line: bytes) -> None:
    assert Outcome.from_line(line) is None


def test_a_field_of_another_kind_counts_as_missing() -> None:
    read = Outcome.from_line(b'{"row": 1, "state": "stored", "cost_usd": "free", "labels": [1], "item_id": 4}')
    assert read == Outcome(1, RowState.STORED)
    read = Outcome.from_line(b'{"row": 1, "state": "failed", "error": {"kind": ["x"], "message": "m"}}')
    assert read is not None
    assert (read.kind, read.error) == ("failed", {"message": "m"})


# Parts.


def folder_in(store: MemoryStore) -> BatchFolder:
    return BatchFolder(store, MemoryFiles(store), DESTINATION, "spring", inline)


async def test_a_thousand_rows_make_a_part() -> None:
    store, scratch = MemoryStore(), Scratch()
    writer = ReportWriter(folder_in(store), "RUN", scratch, dict)
    for row in range(2_500):
        writer.add(outcome(row), is_news=True)
    await asyncio.sleep(0.1)
    parts = [key for key in store.keys("p/") if "part-" in key]
    assert [len(lines_of(store, part.removeprefix("p/batches/spring/"))) for part in parts] == [1_000, 1_000]
    await writer.write_rest()
    assert len(lines_of(store, "runs/RUN/part-00003.jsonl")) == 500
    scratch.close()


@pytest.mark.usefixtures("undrawn")
async def test_a_part_is_written_every_minute_however_few_rows_there_are() -> None:
    shop = CountingShop(MemoryStore(), service_seconds=20, max_in_flight=1)
    going = asyncio.ensure_future(run(shop, source_of(prompts(30))))
    await asyncio.sleep(61)
    (part,) = [key for key in shop.store.keys("p/") if "part-" in key]
    assert len(lines_of(shop.store, part.removeprefix("p/batches/spring/"))) == 2
    await going


async def test_a_part_that_the_bucket_does_not_take_comes_with_the_next_one() -> None:
    store, scratch = MemoryStore(), Scratch()
    writer = ReportWriter(folder_in(store), "RUN", scratch, dict)
    writer.add(outcome(1), is_news=True)
    store.fail_put()
    await writer.write_part()
    assert store.objects == {}
    writer.add(outcome(2), is_news=True)
    await writer.write_part()
    assert [row["row"] for row in lines_of(store, "runs/RUN/part-00001.jsonl")] == [1, 2]
    scratch.close()


async def test_rows_that_the_last_report_has_are_in_no_part_and_in_the_whole() -> None:
    shop = CountingShop(MemoryStore())
    await run(shop, source_of(prompts(5)))
    before = set(shop.store.keys())
    await run(shop, source_of(prompts(5)), run_id="run-2")
    new = set(shop.store.keys()) - before
    assert not [key for key in new if "part-" in key]
    assert len(lines_of(shop.store)) == 5


async def test_earlier_reports_are_kept() -> None:
    shop = CountingShop(MemoryStore())
    for number in range(3):
        await run(shop, source_of(prompts(number + 1)), run_id=f"run-{number}")
        await asyncio.sleep(5)
    kept = [key for key in shop.store.keys("p/batches/spring/runs/") if key.endswith("report.jsonl")]
    assert sorted(len(shop.store.objects[key].body.splitlines()) for key in kept) == [1, 2, 3]
    assert totals_of(shop.store)["run_id"] == "run-2"


def test_runs_are_named_so_that_they_sort_by_time() -> None:
    times = [datetime(2026, 1, 1, tzinfo=timezone.utc), datetime(2026, 1, 2, tzinfo=timezone.utc)]
    names = [run_name("0f" * 16, at) for at in times]
    assert names == ["20260101T000000Z-0f0f0f0f0f0f", "20260102T000000Z-0f0f0f0f0f0f"]


async def test_the_totals_tell_rates_costs_the_slowest_and_failures_by_kind() -> None:
    shop = CountingShop(
        MemoryStore(), ending=lambda item: PredictionFailed("no") if item.item_id == "item-00003" else None
    )
    await run(shop, source_of(prompts(30)))
    totals = totals_of(shop.store)
    assert totals["schema"] == "eachlabs-batch-report/1"
    assert totals["state"] == "completed"
    assert totals["items"] == 30
    assert totals["cost_by_model"]["gemini"]["pictures"] == 29
    assert totals["failures_by_kind"] == {"failed": {"prediction failed": 1}}
    assert len(totals["slowest"]) == 10
    assert totals["slowest"] == sorted(totals["slowest"], key=lambda one: -one["seconds"])
    assert totals["pictures_per_minute"] > 0
    assert totals["source"] == "prompts.csv"
    assert totals["report"] == "s3://bucket/p/batches/spring/report.jsonl"


@pytest.mark.parametrize("state", [RowState.STORED, RowState.REUSED])
def test_a_picture_whose_cost_nobody_told_is_counted_as_such_until_it_is_told(state: RowState) -> None:
    totals = Totals()
    totals.add(outcome(1, state, cost_usd=0.04))
    totals.add(outcome(2, state))
    said = totals.as_json()
    assert (said["pictures_cost_usd"], said["pictures_without_a_told_cost"]) == (0.04, 1)
    totals.cost_was_told(outcome(2, state, cost_usd=0.04))
    said = totals.as_json()
    assert (said["pictures_cost_usd"], said["pictures_without_a_told_cost"]) == (0.08, 0)


# The page.


ALLOWED = {
    *("html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "br", "a", "dl", "div", "dt", "dd"),
    *("main", "figure", "img", "figcaption", "small", "table", "tr", "th", "td", "b"),
    *("span", "details", "summary"),
}


def test_nothing_from_outside_becomes_markup_of_the_page() -> None:
    pictures = [
        outcome(row, prompt=text, labels={text: text}, item_id=f"i{row}") for row, text in enumerate(HOSTILE, start=1)
    ]
    failures = [
        outcome(row, RowState.FAILED, prompt=text, item_id=text, error={"kind": text, "message": text, "code": text})
        for row, text in enumerate(HOSTILE, start=50)
    ]
    counts = {"items": 16, "stored": 8, "failed": 8}
    texts = dict.fromkeys(("batch_id", "source", "destination", "run", "ended_at", "stopped_by"), HOSTILE[1])
    page = Seen("".join(index_page({**counts, **texts}, pictures=pictures, not_there=failures)))
    assert {tag for tag, _ in page.tags} <= ALLOWED
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    links = [attributes[name] for _, attributes in page.tags for name in ("href", "src") if name in attributes]
    assert all(str(link).startswith(("../../images/i", "report.")) for link in links)
    assert all(visible(text, keeping="\n\t") in page.text for text in HOSTILE)
    assert sum(tag == "figure" for tag, _ in page.tags) == len(HOSTILE)


def test_the_page_says_in_words_what_it_is_of_and_a_pace_only_where_something_was_stored() -> None:
    told = {"batch_id": "spring", "source": "rows", "destination": "s3://acme", "run": "a-1", "reused": 1}
    told |= {"ended_at": "2026-11-27T13:05:09+00:00", "pictures_per_minute": 0.0}
    words = " ".join(Seen("".join(index_page(told, pictures=[outcome(2)], not_there=[]))).text.split())
    assert "spring A flow's rows, stored in s3://acme. Run a-1, ended on 27 November 2026, 13:05 UTC." in words
    assert "a minute" not in words
    again = Seen("".join(index_page({**told, "stored": 1}, pictures=[outcome(2)], not_there=[])))
    assert "stored a minute" in again.text


def test_pictures_are_linked_beside_the_page_and_load_when_they_are_scrolled_to() -> None:
    page = Seen("".join(index_page({"stored": 1}, pictures=[outcome(2)], not_there=[])))
    (image,) = [attributes for tag, attributes in page.tags if tag == "img"]
    assert image["src"] == "../../images/i2.png"
    assert image["loading"] == "lazy"
    assert image["width"]


def thumbs_on(page: str) -> list[bytes]:
    urls = [attributes.get("src") or "" for tag, attributes in Seen(page).tags if tag == "img"]
    return [base64.b64decode(url.partition(",")[2]) for url in urls if url.startswith("data:image/webp;base64,")]


def pictures_read(shop: CountingShop, since: int = 0) -> list[str]:
    return [key for name, key in shop.store.operations[since:] if name == "get" and "images/" in key]


def page_of(shop: CountingShop) -> str:
    return shop.store.objects["p/batches/spring/index.html"].body.decode()


async def test_the_page_holds_its_pictures_itself_and_reads_those_alone_that_an_earlier_run_stored_once() -> None:
    image = pytest.importorskip("PIL.Image")

    shop = CountingShop(MemoryStore())
    await run(shop, source_of(prompts(3)), batch_id="another")
    reads = []
    for run_id, count in (("run-1", 3), ("run-2", 5), ("run-3", 5)):
        before = len(shop.store.operations)
        await run(shop, source_of(prompts(count)), run_id=run_id)
        small = thumbs_on(page_of(shop))
        assert len(small) == count
        with image.open(io.BytesIO(small[0])) as opened:
            assert max(opened.size) <= edge_px(count)
        reads.append(len(pictures_read(shop, before)))
    assert reads == [3, 0, 0]


@pytest.mark.parametrize(("rows", "failing", "window"), [(201, 1, 40), (201, 1, 300), (513, 15, 200)])
async def test_the_page_is_the_same_whether_its_pictures_were_seen_or_read(
    rows: int, failing: int, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where rows that fail make each picture larger, or have later ones shown in their place."""
    for module in (report, batch_run):
        monkeypatch.setattr(module, "MOST_PICTURES", 500)
    monkeypatch.setattr(thumbs, "EDGES_PX", ((200, 240), (400, 160)))
    monkeypatch.setattr(thumbs, "thumbnail", lambda body, **how: hashlib.sha256(body + repr(how).encode()).digest())
    monkeypatch.setattr(sheet, "thumbnail", lambda *_, **__: tiny_png())

    def ending(item: Item) -> PredictionFailed | None:
        fails = int(item.item_id[-5:]) >= rows - failing or item.item_id.endswith("050")
        return PredictionFailed("no") if fails else None

    seen_page, read_page = [
        CountingShop(MemoryStore(), ending=ending, max_in_flight=20, is_seen=is_seen) for is_seen in (True, False)
    ]
    for shop in (seen_page, read_page):
        await run(shop, source_of(prompts(rows)), window=window)
    shown = [attributes for tag, attributes in Seen(page_of(seen_page)).tags if tag == "img"]
    assert shown == [attributes for tag, attributes in Seen(page_of(read_page)).tags if tag == "img"]
    assert all(str(attributes["src"]).startswith("data:image/webp") for attributes in shown)
    assert len(pictures_read(read_page)) >= len(shown)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("rows", [199, 300])
async def test_no_picture_that_was_seen_is_read(rows: int) -> None:
    """How many there will be is known well enough from the first hundred rows on, while others are read ahead."""
    pytest.importorskip("PIL.Image")

    shop = CountingShop(MemoryStore(), max_in_flight=100)
    await run(shop, source_of(prompts(rows)), window=200)
    read = pictures_read(shop)
    assert len(thumbs_on(page_of(shop))) == rows
    assert len(read) == (0 if rows <= 200 else MOST_FRAMES), "the sheet's are larger"


async def test_pictures_that_are_made_to_be_slow_hold_a_batch_up_for_a_bounded_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken = [0.0]

    def slow(picture: bytes, **how: Any) -> bytes:
        taken[0] += 10.0
        raise NoThumbnail("it took too long")

    monkeypatch.setattr(thumbs, "thumbnail", slow)
    monkeypatch.setattr(thumbs, "time", SimpleNamespace(monotonic=lambda: taken[0]))
    monkeypatch.setattr(sheet, "thumbnail", lambda *_, **__: tiny_png())

    shop = CountingShop(MemoryStore())
    told = await run(shop, source_of(prompts(100)))
    assert told.stored == 100
    assert taken[0] <= 2 * thumbs.MOST_SECONDS + 10.0 * thumbs.AT_A_TIME


async def test_a_stored_picture_is_stored_whatever_its_thumbnail_comes_to(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(picture: bytes, **how: Any) -> bytes:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(thumbs, "thumbnail", broken)

    shop = CountingShop(MemoryStore())
    assert (await run(shop, source_of(prompts(3)))).stored == 3
    assert page_of(shop).count("<img") == 3
    assert thumbs_on(page_of(shop)) == []
    assert len(pictures_read(shop)) == 3, "for the sheet: one that has no thumbnail is not read for the page"


async def test_the_pace_is_that_of_what_this_attempt_of_the_run_has_stored() -> None:
    shop = CountingShop(MemoryStore())
    for count, stored_now in ((3, 3), (5, 2)):
        await run(shop, source_of(prompts(count)), run_id="the-run")
        told = shop.store.json("p/batches/spring/report.json")
        assert told["stored"] == count, "its budget is one, over all attempts"
        assert told["pictures_per_minute"] == pytest.approx(stored_now * 60 / told["seconds"], rel=0.01)


async def test_all_thumbnails_together_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("PIL.Image")
    monkeypatch.setattr(thumbs, "MOST_CHARACTERS", 1_000)

    shop = CountingShop(MemoryStore())
    await run(shop, source_of(prompts(30)))
    page = page_of(shop)
    assert 0 < len(thumbs_on(page)) < 30
    assert page.count("<img") == 30, "the rest shows where the page lies beside its pictures"
    before = len(shop.store.operations)
    await run(shop, source_of(prompts(30)), run_id="run-2")
    assert not pictures_read(shop, before), "nothing is new: no picture is read for the page"


@pytest.mark.parametrize("picture", [b"", b"<svg onload=alert(1)>", b"\x89PNG\r\n\x1a\n"])
async def test_what_an_earlier_page_claims_to_show_is_a_picture_or_nothing(picture: bytes) -> None:
    store = MemoryStore()
    sha256 = "0f" * 32
    url = f"data:image/svg+xml;base64,{base64.b64encode(picture).decode()}"
    page = f'<img data-of="{sha256}" data-px="240" src="{url}"> <img data-of="{sha256}" data-px="240" src="x">'
    await store.put("page", page.encode(), content_type="text/html")
    known = Thumbs(store, DESTINATION, inline)
    known.resize(240)
    await known.learn("page", [outcome(1, sha256=sha256)])
    assert known.urls == {}


def test_a_long_prompt_is_cut_and_whole_on_demand_and_a_card_names_its_item() -> None:
    prompt = "a fox, 雪の中の赤い狐 🦊 " + "very " * 100
    rows = [outcome(7, prompt=prompt, item_id="SKU-1"), outcome(8, prompt="w" * 20_000, item_id="SKU-2")]
    failed = outcome(9, RowState.FAILED, prompt=prompt, item_id="SKU-3", error={"kind": "k", "message": "m"})
    page = "".join(index_page({"stored": 2, "failed": 1}, pictures=rows, not_there=[failed]))
    assert page.count("<summary>") == 3
    assert prompt in page
    assert len(page) < 20_000
    assert page.index("SKU-3") < page.index("<main>") < page.index("<b>SKU-1</b>")
    assert "<small>row" not in page


def test_a_page_of_thousands_shows_the_first_and_says_so() -> None:
    pictures = (outcome(row) for row in range(5_000))
    page = "".join(index_page({"stored": 5_000}, pictures=pictures, not_there=[]))
    assert page.count("<figure>") == MOST_PICTURES
    assert "the first 2,000 of 5,000" in page


async def test_presigned_links_come_only_when_asked_for_and_say_when_they_end() -> None:
    shop = CountingShop(MemoryStore())
    await run(shop, source_of(prompts(2)))
    page = shop.store.objects["p/batches/spring/index.html"].body.decode()
    assert "signature" not in page
    assert "links to the pictures end" not in page
    await run(shop, source_of(prompts(2)), run_id="run-2", presigned_seconds=3_600)
    page = shop.store.objects["p/batches/spring/index.html"].body.decode()
    assert page.count("expires=3600&amp;signature") == 2
    assert "The links to the pictures end on " in page
    for name in ("report.json", "report.jsonl"):
        assert b"signature" not in shop.store.objects[f"p/batches/spring/{name}"].body


# The contact sheet.


async def test_a_contact_sheet_shows_some_pictures_from_all_over_the_batch() -> None:
    image = pytest.importorskip("PIL.Image")

    shop = CountingShop(MemoryStore())
    await run(shop, source_of(prompts(MOST_FRAMES + 10)))
    assert not pictures_read(shop), "it is drawn from the page's thumbnails"
    with image.open(io.BytesIO(shop.store.objects["p/batches/spring/contact-sheet.png"].body)) as sheet:
        assert sheet.width > 1_000
    assert totals_of(shop.store)["contact_sheet"].endswith("/contact-sheet.png")


async def test_without_pillow_there_is_no_sheet_and_the_log_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)

    caplog.set_level(logging.INFO, logger="prefect_eachlabs.batch")
    shop = CountingShop(MemoryStore())
    result = await run(shop, source_of(prompts(2)))
    assert result.stored == 2
    assert "p/batches/spring/contact-sheet.png" not in shop.store.objects
    assert totals_of(shop.store)["contact_sheet"] is None
    assert "No contact sheet" in caplog.text


async def test_a_batch_without_pictures_has_a_report_and_no_sheet() -> None:
    shop = CountingShop(MemoryStore())
    result = await run(shop, source_of("prompt\n"))
    assert result.items == 0
    assert lines_of(shop.store) == []
    assert "p/batches/spring/index.html" in shop.store.objects
    assert "p/batches/spring/contact-sheet.png" not in shop.store.objects


# The real bucket.


def test_the_report_goes_through_boto3_and_comes_back_as_a_stream(local_s3: LocalS3, tmp_path: Path) -> None:
    local_s3.create_bucket("reports")
    files, store = S3Files("reports", local_s3.access), S3Store("reports", local_s3.access)
    path = tmp_path / "report.jsonl"
    path.write_bytes(b"".join(outcome(row).to_line() for row in range(300)))
    files.upload("p/report.jsonl", path, content_type="application/x-ndjson")
    with files.open("p/report.jsonl") as stream:
        assert [Outcome.from_line(line) for line in stream] == [outcome(row) for row in range(300)]

    async def listed() -> list[str]:
        return [row.key async for row in store.list("p/")]

    assert asyncio.run(listed()) == ["p/report.jsonl"]


async def test_a_part_with_strange_lines_is_read_as_far_as_it_goes(caplog: pytest.LogCaptureFixture) -> None:
    store, scratch = MemoryStore(), Scratch()
    key = "p/batches/spring/runs/20260101T000000Z-a/part-00001.jsonl"
    await store.put(key, outcome(1).to_line() + b"half a li", content_type="x")
    earlier = await folder_in(store).load_earlier(scratch, "run")
    assert earlier.rows == 1
    assert scratch.earlier("i1") is not None
    scratch.close()
    assert "1 lines are none of a report" in caplog.text


async def test_a_batch_that_never_began_leaves_nothing() -> None:
    shop = CountingShop(MemoryStore())
    await batch_of(shop, source_of(prompts(1))).close()
    assert shop.store.objects == {}


def test_a_database_that_a_full_disk_has_broken_names_the_disk() -> None:
    """First SQLite says "disk I/O error"; from then on, "database disk image is malformed"."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, before[1]))
    try:
        with closing(Scratch()) as scratch:
            for _ in range(2):
                with pytest.raises(SetupError, match="TMPDIR"), on_disk():
                    scratch.have_records(f"{number:01000}" for number in range(10_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
