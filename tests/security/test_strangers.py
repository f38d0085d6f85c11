"""What strangers tried in turn: each test is named for who tried what, and counts what it could make us do."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from prefect_eachlabs.api.catalogue import MOST_SCHEMA_BYTES, Model
from prefect_eachlabs.api.client import Answer, EachlabsClient
from prefect_eachlabs.api.references import References
from prefect_eachlabs.batch import run as batch_run
from prefect_eachlabs.blocks import EachlabsCredentials
from prefect_eachlabs.errors import DownloadFailed, StoreFailed
from prefect_eachlabs.events import asset_key
from prefect_eachlabs.images.download import Downloader
from prefect_eachlabs.ledger.evidence import is_near
from prefect_eachlabs.ledger.records import Ledger, RecordState, amended, new_record
from prefect_eachlabs.models import (
    Destination,
    Item,
    Prediction,
    PredictionStatus,
    UploadSlot,
    parse_executions,
    parse_prediction,
)
from prefect_eachlabs.net import safe_json
from prefect_eachlabs.net.public_get import PublicWeb
from prefect_eachlabs.net.public_only import HostGuard
from prefect_eachlabs.polling.execution_list import names_several
from prefect_eachlabs.reference_images import Picture
from prefect_eachlabs.settings import AccountSettings, settings_from_environment
from prefect_eachlabs.webhooks import receiver
from prefect_eachlabs.webhooks.calls import Call
from prefect_eachlabs.webhooks.receiver import listen_at
from prefect_eachlabs.webhooks.webhooks import MOST_HASHED_BYTES, MOST_TRIED, Verdict
from tests.batch.batch_kit import CountingShop, batch_of, source_of
from tests.memory_store import MemoryStore
from tests.net.real_time import in_real_time
from tests.net.test_public_only import finding, why_not
from tests.polling.model_api import Shop, a_shop
from tests.virtual_time import run
from tests.webhooks.test_webhooks import call, of_an_account, ordered

DIGITS = "&#" + "1" * 5_000 + ";"
"""More than Python takes for a number."""


# ---- who answers as the API


@pytest.fixture
def unfolded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How long each text was that was read as JSON."""
    lengths: list[int] = []
    loads = safe_json.loads

    def counted(text: bytes | str) -> Any:
        lengths.append(len(text))
        return loads(text)

    monkeypatch.setattr(safe_json, "loads", counted)
    return lengths


def test_the_api_cannot_have_more_texts_unfolded_by_a_page_than_by_one_prediction(unfolded: list[int]) -> None:
    parse_executions([{"id": f"p{number}", "output": ["{"] * 240} for number in range(1_000)])
    assert len(unfolded) <= 10_000
    good = {"id": "p", "output": json.dumps(["https://files.invalid/1.png"])}
    assert [row.output_urls for row in parse_executions([good] * 100)] == [("https://files.invalid/1.png",)] * 100


def test_the_api_has_an_output_of_a_megabyte_unfolded_once(unfolded: list[int]) -> None:
    parse_prediction({"status": "success", "output": "[" + "[]," * 300_000 + "[]]"}, prediction_id="p")
    parse_prediction({"status": "success", "output": "[" * 900_000}, prediction_id="p")
    assert len([length for length in unfolded if length > 1_000]) == 2


async def test_the_api_cannot_have_its_cookies_kept_and_sent_back() -> None:
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, json=[], headers=[("Set-Cookie", f"{number}=1") for number in range(5_000)])

    host = httpx.MockTransport(answer)
    client = EachlabsClient(AccountSettings(api_key=SecretStr("a-key")), transport=host)
    web = PublicWeb(host, None, timeout=httpx.Timeout(1.0), accept="image/*")
    for _ in range(2):
        await client.executions()
        async with web.ask("GET", "https://p.invalid"):
            pass
    assert not [*client._http.cookies.jar, *web.client.cookies.jar]
    await client.aclose()
    await web.aclose()
    assert len(seen) == 4
    assert not any("cookie" in request.headers for request in seen)


@pytest.mark.parametrize("year", ["9999", "0100"])
def test_the_api_cannot_end_an_audit_by_a_date_that_cannot_be_reckoned_with(year: str) -> None:
    sent = {"Date": f"Fri, 31 Dec {year} 23:59:59 GMT", "Retry-After": f"Fri, 31 Dec {year} 23:59:59 -2359"}
    answer = Answer(httpx.Response(429, headers=sent), b"{}", whole=True)
    assert answer.date() is None
    assert (answer.retry_after_seconds() or 0) >= 0


def test_the_api_cannot_keep_a_lost_order_from_being_settled_by_a_number_of_5000_digits() -> None:
    assert not is_near({"prompt": DIGITS}, {"prompt": "a fox"})
    assert is_near({"prompt": "a &amp;#39;fox&amp;#39;"}, {"prompt": "a 'fox'"})


@a_shop()
async def test_neither_api_nor_row_can_keep_an_end_from_being_seen_by_a_number_without_end(shop: Shop) -> None:
    assert not names_several({"n": 10**400, "prompt": "a fox"})

    assert (await shop.buy("flux", {"n": 10**400})).status is PredictionStatus.SUCCEEDED


@pytest.mark.parametrize("headers", [{"X": "é"}, {"é": "x"}, {"X": "a\r\nEvil: 1"}, {"Content-Length": "-1"}])
@pytest.mark.parametrize("port", [9, 99_999])
def test_the_api_cannot_break_an_upload_otherwise_than_by_failing(headers: dict[str, str], port: int) -> None:
    slot = UploadSlot(f"http://127.0.0.1:{port}/x", "https://p.invalid/x.png", headers)
    picture = Picture.of_bytes(b"\x89PNG\r\n\x1a\n" + bytes(64))

    async def story() -> tuple[str, bool]:
        settings = AccountSettings(api_key=SecretStr("a-key"), base_url="http://127.0.0.1:9")
        references = References(None, None, settings, lambda *_: MemoryStore())  # type: ignore[arg-type]  # neither is asked
        try:
            return await references._put_once(slot, picture.read())
        finally:
            await references.aclose()

    reason, _ = asyncio.run(story())
    assert reason in ("ConnectError", "UnicodeEncodeError", "LocalProtocolError")


def test_the_api_cannot_have_a_schema_of_a_megabyte_gone_through_for_each_row() -> None:
    fields: dict[str, Any] = {f"{number:x}": {} for number in range(95_000)}
    model = Model.parse({"request_schema": {"properties": {**fields, "image": {}}}}, "m")
    assert model.placed({"image_url": "https://p.invalid"}) == {"image": "https://p.invalid"}
    assert model.properties is model.properties
    assert model.reference_field is model.reference_field


def test_the_api_cannot_write_a_field_of_200_kb_into_each_rows_error() -> None:
    schema = {"properties": {"prompt": {}}, "required": ["A" * (MOST_SCHEMA_BYTES // 2)]}
    ((fault,),) = Model.parse({"request_schema": schema}, "m").faults_of({"prompt": "a fox"})
    assert fault == f"input.{'A' * 60}: missing"


# ---- who owns the name of an API that somebody else has named


@pytest.mark.parametrize("address", ["127.0.0.1", "10.0.0.7", "fd12::1"])
def test_whoever_answers_for_the_apis_name_opens_no_address_of_this_network(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The vendor's DNS, and that of a host in a block, say one address to the client and another to the guard."""

    def refusal(account: AccountSettings) -> str:
        guard = HostGuard(account.private_hosts, account.api_host, resolve=finding(address))
        return why_not(guard, "pictures.example")

    monkeypatch.delenv("EACHLABS_BASE_URL", raising=False)
    assert "of this network alone" in refusal(settings_from_environment(api_key="a-key"))
    block = EachlabsCredentials(api_key=SecretStr("a-key"), base_url="https://gateway.example")
    assert "of this network alone" in refusal(block.account_settings())
    monkeypatch.setenv("EACHLABS_BASE_URL", "https://gateway.example/")
    assert refusal(block.account_settings()) == "", "whoever set the worker's environment has named it"
    monkeypatch.setenv("EACHLABS_BASE_URL", "https://api.eachlabs.ai")
    assert "of this network alone" in refusal(settings_from_environment(api_key="a-key"))


# ---- who answers as a picture's host


def test_a_pictures_host_leaves_the_loop_its_turns_also_by_pieces_that_come_to_nothing() -> None:
    named = gzip.compress(b"x").replace(b"\x1f\x8b\x08\0", b"\x1f\x8b\x08\x08")  # with a name, which goes on and on

    class Pieces(httpx.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            yield named[:10]
            for _ in range(1_000):
                yield b"a"

    def answer(_: httpx.Request) -> httpx.Response:
        return httpx.Response(200, stream=Pieces(), headers={"Content-Encoding": "gzip"})

    async def turns() -> int:
        count = 0

        async def counting() -> None:
            nonlocal count
            while True:
                count += 1
                await asyncio.sleep(0)

        counter = asyncio.create_task(counting())
        with suppress(DownloadFailed):
            await Downloader(httpx.MockTransport(answer)).fetch("https://p.invalid/1.png")
        counter.cancel()
        return count

    assert run(turns()) >= 1_000


@in_real_time
async def test_a_pictures_host_that_leads_to_no_port_fails_as_a_download() -> None:
    downloader = Downloader(hosts=HostGuard("127.0.0.1"))
    with pytest.raises(DownloadFailed, match="ConnectError"):
        await downloader.fetch("http://127.0.0.1:99999/1.png")
    await downloader.aclose()


# ---- who writes a row


@pytest.mark.parametrize("name", ["//[x", "http://[x/", "http://a\u2100b/x.png"])
def test_a_row_cannot_make_a_batch_that_has_bought_fail_by_a_name_that_is_no_url(name: str) -> None:
    assert asset_key(name) is None


async def test_rows_of_large_inputs_are_in_progress_to_a_bound_and_none_is_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(batch_run, "MOST_BYTES_IN_PROGRESS", 40_000)
    large = "x" * 3_000
    rows = [{"id": f"item-{number}", "prompt": large if number % 2 else "a fox"} for number in range(100)]

    shop = CountingShop(MemoryStore(), max_in_flight=200)
    result = await batch_of(shop, source_of(rows)).run(window=200)
    stored, worst = (result.stored, shop.worst_in_the_air)
    assert stored == 100
    assert worst <= 2 * (batch_run.MOST_BYTES_IN_PROGRESS // len(large) + 1)


@a_shop()
async def test_large_inputs_of_predictions_that_have_ended_are_not_kept(shop: Shop) -> None:
    bought = await shop.buy("flux", {"prompt": "a fox", "points": [[]] * 1_000})
    assert bought.input is not None
    assert (remembered := shop.poller.end_of(bought.id)) is not None
    assert remembered.input is None
    again = await shop.poller.watch(Prediction(id=bought.id, input=bought.input), slot=None)
    assert (again.input, again.output_urls) == (bought.input, bought.output_urls)
    assert (small := shop.poller.end_of((await shop.buy("flux", {"prompt": "a fox"})).id)) is not None
    assert small.input == {"prompt": "a fox"}


# ---- who reaches the webhooks' receiver


async def test_a_stranger_cannot_have_a_large_body_hashed_for_every_order(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[int] = []
    monkeypatch.setattr(Call, "is_proven_by", lambda call, _: hashed.append(len(call.body)))
    webhooks = of_an_account()
    for _ in range(MOST_TRIED + 10):
        webhooks.callback(webhooks.name())
    assert webhooks.take(Call(b"x" * 262_144, signature="0" * 64)) is Verdict.REFUSED
    assert sum(hashed) <= MOST_HASHED_BYTES
    hashed.clear()
    assert webhooks.take(Call(b"x" * 1_000, signature="0" * 64)) is Verdict.REFUSED
    assert len(hashed) == MOST_TRIED


async def test_a_large_body_that_names_no_order_is_still_known_among_the_last_ones() -> None:
    webhooks = of_an_account()
    for _ in range(MOST_TRIED):
        webhooks.callback(webhooks.name())
    name, future = ordered(webhooks, webhooks._poller)
    assert webhooks.take(call(None, by=name, echo="x" * 200_000)) is Verdict.TAKEN
    assert future.done()


async def _asked(port: int) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx")
    answer = await reader.read()  # to its end: the receiver closes
    writer.close()
    return answer


async def _silent(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A caller who begins a request and leaves it at that."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nX-Never-Ending: ")
    await writer.drain()
    return reader, writer


@pytest.mark.parametrize("how", ["too many", "too long"])
@in_real_time
async def test_strangers_who_open_connections_and_send_nothing_keep_nobody_out(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receiver, "CONNECTIONS_AT_A_TIME", 5 if how == "too many" else 100)
    monkeypatch.setattr(receiver, "CONNECTION_SECONDS", 60.0 if how == "too many" else 0.2)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    close = await listen_at(f"127.0.0.1:{port}")(lambda call: Verdict.TAKEN)
    strangers = [await _silent(port) for _ in range(20)]
    assert (await _asked(port)).startswith(b"HTTP/1.1 202 ")
    gone = strangers[:15] if how == "too many" else strangers
    ended = await asyncio.wait_for(asyncio.gather(*(one.read() for one, _ in gone), return_exceptions=True), 30)
    for _, writer in strangers:
        writer.close()
    assert all(said == b"" or isinstance(said, ConnectionError) for said in ended)
    await close()


# ---- who writes to the bucket


@pytest.mark.parametrize("field", ["uri", "more_uris"])
async def test_a_record_cannot_move_a_terminal_by_where_it_says_that_its_picture_is(field: str) -> None:
    uri = "s3://evil/\x1b[2Jforged\nline/fox.png"

    ledger = Ledger(MemoryStore(), Destination.parse("s3://bucket"))
    record = new_record(Item.wanted("a fox", item_id="fox"), run_id="run")
    said = {"state": RecordState.STORED, "prediction_id": "p", field: uri if field == "uri" else [uri]}
    await ledger.store.put("records/fox.json", amended(record, **said).to_bytes(), content_type="application/json")
    with pytest.raises(StoreFailed, match="signs that move terminals"):
        await ledger.read("fox")
