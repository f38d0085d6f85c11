"""What the fuzzers have found, each as small as it got; all of it is mended, and stays so."""

from __future__ import annotations

import gzip
import io
import json
import logging
import zlib
from contextlib import closing
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import httpx
import pyarrow
import pytest
from pyarrow import parquet

from prefect_eachlabs.batch.outcomes import Outcome
from prefect_eachlabs.batch.source import Source, Wanted, open_source
from prefect_eachlabs.batch.tables import BadRow, CsvTable, JsonLinesTable, Lines
from prefect_eachlabs.errors import (
    BadInput,
    DownloadFailed,
    HostNotAllowed,
    OutcomeUnknown,
    PredictionFailed,
    Rejected,
    SetupError,
    StoreFailed,
    Unanswered,
)
from prefect_eachlabs.flows.schedule import filled
from prefect_eachlabs.images.download import Downloader
from prefect_eachlabs.ledger.adoption import lock_prediction
from prefect_eachlabs.ledger.evidence import fit
from prefect_eachlabs.ledger.records import MAX_CLAIM_BYTES, Ledger, Record, RecordState, amended, new_record
from prefect_eachlabs.models import MAX_INPUT_NESTING, Destination, Item, parse_executions
from prefect_eachlabs.net import redaction
from prefect_eachlabs.net.public_only import GuardedTransport, HostGuard
from prefect_eachlabs.settings import settings_from_environment
from tests.api.client_answers import answered, create, get
from tests.fuzz.kit import Wire, asked
from tests.memory_store import MemoryStore
from tests.virtual_time import run

DESTINATION = Destination.parse("s3://bucket/daily")


# ------------------------------------------------------------------------- the client


@pytest.mark.parametrize("location", ["https://xn--/", "http://[::1", "http://a:b/"])
def test_an_order_answered_by_a_redirect_to_no_host_may_have_been_billed(location: str) -> None:
    """httpx reads the Location of a redirect that it does not follow, and raised idna's own error."""
    with pytest.raises((OutcomeUnknown, Rejected)):
        answered(httpx.Response(301, headers={"Location": location}), create)


def test_a_question_answered_by_a_redirect_to_no_host_is_asked_again() -> None:
    with pytest.raises(Unanswered):
        answered(httpx.Response(301, headers={"Location": "https://xn--/"}), get)


def test_half_characters_in_an_answer_can_be_logged_and_written_down() -> None:
    body = json.dumps({"status": "error", "output": json.dumps({"error_message": "\ud800", "error_code": "\udfff"})})
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n"
    prediction = asked(Wire([head.encode() + body.encode()]).transport(), lambda client: client.get("p-1"))
    prediction.model_dump_json()
    with pytest.raises(PredictionFailed) as caught:
        prediction.raise_for_end()
    assert "?" in str(caught.value)
    str(caught.value).encode()


@pytest.mark.parametrize("encoding", ["deflate", "gzip", "identity", "GZIP"])
def test_what_is_encoded_as_it_says_is_read(encoding: str) -> None:
    body = json.dumps({"status": "created"}).encode()
    packed = {"deflate": zlib.compress(body), "gzip": gzip.compress(body), "identity": body}[encoding.lower()]
    head = f"HTTP/1.1 200 OK\r\nContent-Encoding: {encoding}\r\nContent-Length: {len(packed)}\r\n\r\n".encode()
    for pieces in ([head + packed], [head, *(packed[at : at + 1] for at in range(len(packed)))]):
        assert asked(Wire(pieces).transport(), lambda client: client.get("p-1")).status_word == "created"


# ------------------------------------------------------------------ items and records


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


def test_an_input_that_nobody_could_read_back_is_refused_before_it_is_bought() -> None:
    """From 196 levels on the record was written, the picture bought, and the record could never be read again."""
    item = Item.wanted("a fox", input={"a": nested(MAX_INPUT_NESTING)})
    assert Record.model_validate_json(new_record(item, run_id="r").to_bytes()).input == item.input
    for levels in (MAX_INPUT_NESTING + 1, 197, 260, 900):
        with pytest.raises(BadInput, match="levels deep"):
            Item.wanted("a fox", input={"a": nested(levels)})


def test_an_input_that_no_record_could_hold_is_refused_before_it_is_bought() -> None:
    """The record was written, and was then refused for its size by whoever read it."""
    assert new_record(Item.wanted("a" * (MAX_CLAIM_BYTES - 2_000)), run_id="r").to_bytes()
    with pytest.raises(BadInput, match="nothing was bought"):
        new_record(Item.wanted("a" * MAX_CLAIM_BYTES, item_id="fox"), run_id="r")


async def test_a_copied_record_is_not_taken_for_the_items_own() -> None:
    """A change of it would have gone to the other item's key."""

    store = MemoryStore()
    ledger = Ledger(store, DESTINATION)
    body = new_record(Item.wanted("a fox", item_id="fox"), run_id="r").to_bytes()
    await store.put(DESTINATION.record_key("hare"), body, content_type="application/json")
    with pytest.raises(StoreFailed, match=r"hare\.json .*another item, 'fox'.*nothing is bought"):
        await ledger.read("hare")


@pytest.mark.parametrize("prediction_id", [None, "", "..", "a b", "a\n"])
async def test_a_record_of_a_purchase_without_its_prediction_is_named(prediction_id: str | None) -> None:
    """It was asked about under an empty id."""

    store = MemoryStore()
    record = new_record(Item.wanted("a fox", item_id="fox"), run_id="r")
    body = amended(record, state=RecordState.CREATED, intent=None, prediction_id=prediction_id).to_bytes()
    await store.put(DESTINATION.record_key("fox"), body, content_type="application/json")
    with pytest.raises(StoreFailed, match=r"fox\.json .*no prediction's id.*nothing is bought"):
        await Ledger(store, DESTINATION).read("fox")


@pytest.mark.parametrize("body", [b'{"item_id": null}', b'{"item_id": ["cat"]}', b"[" * 10_000, b"\xff"])
async def test_a_marker_that_names_nobody_is_not_taken_over(body: bytes) -> None:
    """`null` was read as an item called None, which has no record, so that the prediction was there for the taking."""

    store = MemoryStore()
    await store.put(DESTINATION.key("adopted/p-1"), body, content_type="application/json")
    holder = await lock_prediction(Ledger(store, DESTINATION), "p-1", "cat")
    assert holder == "(an unreadable marker)"
    assert store.objects[DESTINATION.key("adopted/p-1")].body == body


def test_a_number_without_end_in_an_echo_is_compared_like_any_other() -> None:
    assert fit({"seed": 10**400, "prompt": "x"}, {"seed": 10**400}) == 1
    assert fit({"seed": 10**400}, {"seed": 10**400 + 1}) is None


@pytest.mark.parametrize("text", ["0001-01-01T00:00:00+00:00", "9999-12-31T23:59:59-23:59"])
def test_a_date_that_cannot_be_reckoned_with_counts_as_not_sent(text: str) -> None:
    (row,) = parse_executions([{"id": "p-1", "status": "success", "created_at": text}])
    assert row.created_at is None


# --------------------------------------------------------------------- tables and reports


def only_row(line: str) -> Wanted | BadRow:
    data = line.encode() + b"\n"
    table = JsonLinesTable("x.jsonl", Lines(io.BytesIO(data)))
    (row,) = Source(table, "x.jsonl").rows()
    return row


def test_a_label_whose_name_is_half_a_character_costs_nothing() -> None:
    row = only_row('{"prompt": "a fox", "\\ud800": "v"}')
    assert isinstance(row, Wanted)
    assert row.item.labels == {"?": "v"}


@pytest.mark.parametrize("data", [b"\xef\xbb\xbf", b"\n", b"\r\n\r\n"])
def test_a_csv_without_a_cell_is_no_table(data: bytes) -> None:
    with pytest.raises(BadInput, match="is not a table"):
        CsvTable("x.csv", Lines(io.BytesIO(data)))


def test_times_in_nanoseconds_are_labels_as_any_others(tmp_path: Path) -> None:
    """So data frames write them; without pandas pyarrow refuses them, and with them the whole table was refused."""
    moments = pyarrow.array([1_763_800_000_123_456_789, None], type=pyarrow.timestamp("ns", tz="UTC"))
    path = tmp_path / "x.parquet"
    parquet.write_table(pyarrow.table({"prompt": ["a fox", "a hare"], "made": moments}), path)
    with closing(open_source(str(path))) as source:
        rows = list(source.rows())
    assert all(isinstance(row, Wanted) for row in rows)
    assert rows[0].item.labels == {"made": '"2025-11-22 08:26:40.123456+00:00"'}  # type: ignore[union-attr]


def test_a_value_that_python_has_no_words_for_costs_its_row_alone(tmp_path: Path) -> None:
    days = pyarrow.array([0, 2**31 - 1, 1], type=pyarrow.date32())
    path = tmp_path / "x.parquet"
    parquet.write_table(pyarrow.table({"prompt": ["a", "b", "c"], "day": days}), path)
    with closing(open_source(str(path))) as source:
        rows = list(source.rows())
    assert [isinstance(row, Wanted) for row in rows] == [True, False, True]
    assert [row.line for row in rows] == [1, 2, 3]
    assert "a value cannot be read" in rows[1].reason  # type: ignore[union-attr]


def test_a_parquet_file_whose_names_are_no_text_is_no_table(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    parquet.write_table(pyarrow.table({"prompt": ["a"]}), path)
    path.write_bytes(path.read_bytes().replace(b"\x06prompt%", b"\x06\xf0rompt%"))
    with pytest.raises(BadInput, match="no Parquet file"):
        open_source(str(path))


LINE = {"row": 2, "state": "stored", "item_id": "fox"}


@pytest.mark.parametrize("cost", [float("nan"), float("inf"), -5.0, 10**400, True, "1"])
def test_a_cost_in_a_report_that_is_no_cost_does_not_reach_the_budget(cost: Any) -> None:
    """A report is in the bucket, and a cost of -5 or NaN in it would have lifted the budget of the next run."""
    outcome = Outcome.from_line(json.dumps({**LINE, "cost_usd": cost}))
    assert outcome is not None
    assert outcome.cost_usd is None


def test_half_characters_in_a_report_can_be_written_again() -> None:
    line = json.dumps({**LINE, "prompt": "\ud800", "labels": {"\ud800": "a", "b": "\udfff", "c": "d"}})
    outcome = Outcome.from_line(line)
    assert outcome is not None
    assert (outcome.prompt, outcome.labels) == (None, {"c": "d"})
    outcome.to_line()


# ------------------------------------------------------- words of people, hosts, logs


@pytest.mark.parametrize(("template", "text"), [("{date:%Y\0%m}", "2026\x0011"), ("{date:\ud800%d}", "\ud80022")])
def test_what_stands_between_the_codes_of_a_date_stays(template: str, text: str) -> None:
    assert filled(template, datetime(2026, 11, 22, tzinfo=timezone.utc), name="prompt") == text


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("EACHLABS_BASE_URL", "https://①②⑦.⓪.⓪.①"),
        ("EACHLABS_BASE_URL", "https://xn--"),
        ("EACHLABS_REFERENCE_ROOTS", "~0"),
        ("EACHLABS_REFERENCE_ROOTS", "~nobody-of-that-name/x"),
    ],
)
def test_a_setting_that_only_others_could_read_is_refused_by_name(variable: str, value: str) -> None:
    with pytest.raises(SetupError, match=variable):
        settings_from_environment({"EACHLABS_API_KEY": "sk-0123456789", variable: value})


def fetched(url: str) -> DownloadFailed:
    async def nobody(host: str) -> list[str]:
        raise OSError("no such name")

    async def story() -> DownloadFailed:
        way_out = httpx.MockTransport(lambda _: pytest.fail("it was asked for"))
        downloader = Downloader(GuardedTransport(HostGuard(resolve=nobody), way_out))
        with pytest.raises(DownloadFailed) as caught:
            await downloader.fetch(url, prediction_id="p-1")
        await downloader.aclose()
        return caught.value

    return run(story())


def test_a_host_that_a_proxy_may_decode_to_another_is_not_asked() -> None:
    assert isinstance(fetched("http://l%6fcalhost/a.png"), HostNotAllowed)


def test_a_url_with_half_a_character_is_shown_without_it() -> None:
    str(fetched("http://files.invalid/\ud800.png")).encode()


def test_arguments_by_name_that_do_not_fit_are_cleaned_before_logging_complains() -> None:
    redaction.install()
    redaction.hide("sk-a-secret-0123456789")
    made = logging.getLogRecordFactory()("others", 20, "f", 1, "%(a)d", ({"a": "sk-a-secret-0123456789"},), None)
    assert "sk-a-secret" not in f"{made.msg} {made.args}"


@pytest.mark.parametrize("secret", ["one,two-three-four", "one;two-three-four", "one&two-three-four"])
def test_a_secret_in_which_a_pattern_would_end_goes_as_a_whole(secret: str) -> None:
    redaction.hide(secret)
    assert "two-three" not in redaction.redacted(f"https://a.invalid/x?token={secret}")
    assert "two-three" not in redaction.redacted(f"token={secret}")
