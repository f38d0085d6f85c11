"""What an attack on answers has found beside `test_attacked`: what a server, a block or a bucket says is bounded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import httpx
import pytest
from prefect.blocks.system import Secret

from flows.illustrate_products import url_of
from prefect_eachlabs.api import client as api_client
from prefect_eachlabs.blocks import load_block
from prefect_eachlabs.errors import SetupError, without_query
from prefect_eachlabs.events import asset_key
from prefect_eachlabs.images.formats import format_by_name
from prefect_eachlabs.models import parse_prediction
from prefect_eachlabs.net import redaction
from prefect_eachlabs.net.endpoints import checked_endpoint
from prefect_eachlabs.net.urls import has_odd_host
from prefect_eachlabs.settings import check_base_url
from prefect_eachlabs.webhooks.calls import PARAMETER, write_id_in

KEY = "sk-attacked-answers-0123456789-abcdefghijk"
SIGNATURE = "5f1d0c3ab77e9e2b" * 4
MARKS = "http://a" + "̀̕" * 300 + "/x.png"


@pytest.mark.parametrize("url", [MARKS, MARKS.replace("//", "/\t/"), MARKS.replace("//", "/\r\n/")])
def test_a_host_of_marks_is_never_normalised_however_it_is_spelled(url: str) -> None:
    assert has_odd_host(url)
    assert without_query(url) == "(unreadable URL)"
    assert format_by_name(url) is None
    assert asset_key(url) is None
    assert write_id_in(f"{url}?{PARAMETER}=x") is None
    for check in (lambda: check_base_url(url), lambda: checked_endpoint(url, has_keys=True)):
        with pytest.raises(ValueError, match="its host is longer than any"):
            check()


@pytest.mark.parametrize("error", [OSError, ValueError, KeyError, RuntimeError, httpx.ConnectError])
def test_no_error_of_loading_a_block_shows_what_it_says(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **__: object) -> None:
        raise error("the password")

    monkeypatch.setattr(Secret, "load", load)
    with pytest.raises(SetupError) as caught:
        load_block("broken", Secret)
    assert "password" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_no_error_of_loading_a_secret_shows_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    async def aload(*_: object, **__: object) -> None:
        raise RuntimeError("postgresql://me:the-password@db")

    monkeypatch.setattr(Secret, "aload", aload)
    with pytest.raises(SetupError) as caught:
        asyncio.run(url_of("products"))
    assert "the-password" not in str(caught.value)
    assert caught.value.__suppress_context__


def test_what_a_failure_says_is_cleaned_before_it_is_cut() -> None:
    redaction.hide(KEY)
    for secret in (KEY, f"https://b.example/x?X-Amz-Signature={SIGNATURE}"):
        said = "y" * (500 - len(secret) + 20) + secret
        envelope = {"error_code": "x", "error_message": said}
        failure = parse_prediction({"status": "error", "output": envelope}, prediction_id="p-1").failure
        assert failure is not None
        assert len(failure.message) <= 500
        assert KEY[:8] not in failure.message
        assert SIGNATURE[:8] not in failure.message


def test_an_answer_of_many_pieces_leaves_the_loop_its_turns() -> None:
    class Pieces(httpx.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            for _ in range(10 * api_client.PIECES_A_TURN):
                yield b"x"

    async def read() -> int:
        turns = 0

        async def count() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        counting = asyncio.create_task(count())
        body, whole = await api_client._read(httpx.Response(200, stream=Pieces()))
        counting.cancel()
        assert whole
        assert len(body) == 10 * api_client.PIECES_A_TURN
        return turns

    assert asyncio.run(read()) >= 10
