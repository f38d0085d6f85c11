"""Who answers as the API or as S3 leaves no key in what we make of the answer, and moves no terminal with it."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import traceback
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from prefect_eachlabs.api.client import EachlabsClient
from prefect_eachlabs.errors import EachlabsError
from prefect_eachlabs.ledger.evidence import fit
from prefect_eachlabs.models import Item, Prediction
from prefect_eachlabs.net import safe_json
from prefect_eachlabs.net.redaction import hide, visible
from prefect_eachlabs.settings import AccountSettings
from prefect_eachlabs.storage.s3 import S3Store
from prefect_eachlabs.storage.s3_client import S3Access
from tests.security.hostile import ESCAPES, FORGED, escaped_json, hostile_api, hostile_s3, quoting

KEY = "sk-HOSTILE/key+7f3a9c1e5b=="
S3_SECRET = "HOSTILEsecret/Zz81+mPqT4vX"


@pytest.fixture(scope="module")
def api() -> Iterator[str]:
    with hostile_api() as url:
        yield url


def ask(url: str, work: Callable[[EachlabsClient], Awaitable[Any]]) -> Any:
    """What comes of it: a prediction, or the error."""

    async def run() -> Any:
        client = EachlabsClient(AccountSettings(api_key=KEY, base_url=url))
        try:
            return await work(client)
        except EachlabsError as error:
            return error
        finally:
            await client.aclose()

    return asyncio.run(run())


def spellings(secret: str) -> list[str]:
    """Pieces of the text that quotes it, by which it would be recognized."""
    return [word for word in re.split(r"[\s\"{}]+", quoting(secret).partition(ESCAPES)[2]) if len(word) > 15]


def assert_harmless(text: str, secret: str = KEY) -> None:
    for spelling in (secret, *spellings(secret)):
        assert spelling not in text
    assert visible(text) == text


@pytest.mark.parametrize("how", ["refused", "plain", "throttled", "lost"])
def test_an_answer_to_an_order_that_quotes_the_key_leaves_no_key_in_the_error(api: str, how: str) -> None:
    error = ask(api, lambda client: client.create(Item.wanted(f"{how} fox")))
    assert isinstance(error, EachlabsError)
    assert "upstream refused" in f"{error} {error.details}", "its words are not there at all"
    assert_harmless(str(error))
    assert_harmless(repr(error))
    assert_harmless(json.dumps(vars(error), ensure_ascii=False))


@pytest.mark.parametrize("how", ["error", "logs", "output", "url", "word", "message", "error_message"])
def test_a_prediction_that_quotes_the_key_holds_no_key(api: str, how: str) -> None:
    made: Prediction = ask(api, lambda client: client.create(Item.wanted(f"{how} fox")))
    found: Prediction = ask(api, lambda client: client.get(made.id))
    text = json.dumps(found.model_dump(mode="json"), ensure_ascii=False)
    assert KEY not in text
    for spelling in spellings(KEY):
        assert spelling not in text
    if how != "url":
        with pytest.raises(EachlabsError) as raised:
            found.raise_for_end()
        assert_harmless(str(raised.value))


def test_an_answer_without_an_id_or_json_leaves_no_key(api: str) -> None:
    assert_harmless(str(ask(api, lambda client: client.get("p-unknown"))))


def test_json_in_json_is_cleaned_however_it_is_escaped() -> None:
    hide(KEY)
    inner = escaped_json({"error_message": quoting(KEY)})
    assert KEY not in safe_json.loads(escaped_json(inner))
    assert KEY not in json.dumps(safe_json.loads(safe_json.loads(escaped_json(inner))))
    assert KEY not in json.dumps(safe_json.loads(escaped_json({f"a {KEY}": [{KEY: [KEY]}]})))


def test_an_echo_of_a_prompt_that_happens_to_hold_a_secret_is_still_its_echo() -> None:
    hide(KEY)
    sent = {"prompt": f"a poster that says {KEY}"}
    assert fit(safe_json.loads(json.dumps(sent)), sent) is not None
    assert fit({"prompt": "a poster that says something else"}, sent) is None


@pytest.mark.parametrize("operation", ["get", "put"])
def test_a_refusal_of_s3_that_quotes_the_secret_leaves_it_in_no_error_and_no_cause(operation: str) -> None:
    access = S3Access(region="us-east-1", access_key_id="AKIA", secret_access_key=S3_SECRET)

    async def use(store: S3Store) -> object:
        return await (store.get("k") if operation == "get" else store.put("k", b"x", content_type="text/plain"))

    with hostile_s3(S3_SECRET) as url:
        store = S3Store("acme", S3Access(**{**vars(access), "endpoint_url": url}))
        with pytest.raises(EachlabsError) as refused:
            asyncio.run(use(store))
    assert "upstream refused" in str(refused.value)
    assert_harmless(str(refused.value), S3_SECRET)
    printed = "".join(traceback.format_exception(refused.value))
    for spelling in (S3_SECRET, *spellings(S3_SECRET)):
        assert spelling not in printed
    assert visible(printed, keeping="\n\t") == printed
    assert FORGED.strip() not in printed.splitlines()


def test_an_error_of_ours_is_one_line_whatever_was_put_into_it() -> None:
    error = EachlabsError(
        f"It said {FORGED}{ESCAPES}", item_id=FORGED, details=ESCAPES, code=FORGED, url=f"s://{ESCAPES}"
    )
    assert_harmless(str(error))
    for fact in vars(error).values():
        assert not isinstance(fact, str) or visible(fact) == fact
    assert "\\x1b[2J" in str(error), "it is not shown at all"


def test_what_this_package_logs_is_one_line_and_what_libraries_log_moves_no_terminal(
    caplog: pytest.LogCaptureFixture,
) -> None:
    from prefect_eachlabs.net import redaction

    redaction.install()
    for name in ("prefect_eachlabs.of_tests", "botocore.parsers", "httpcore.http11"):
        logging.getLogger(name).warning("it said %s", FORGED + ESCAPES)
    ours, *theirs = (record.getMessage() for record in caplog.records)
    assert visible(ours) == ours
    assert len(theirs) == 2
    for message in theirs:
        assert visible(message, keeping="\n") == message


def test_what_users_log_stays_as_they_wrote_it(caplog: pytest.LogCaptureFixture) -> None:
    from prefect_eachlabs.net import redaction

    redaction.install()
    for name in ("prefect.flow_runs", "acme.pipelines"):
        logging.getLogger(name).warning("\x1b[32mall\nwell\x1b[0m")
    assert {record.getMessage() for record in caplog.records} == {"\x1b[32mall\nwell\x1b[0m"}


def test_a_key_that_is_no_text_is_hidden_and_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    key = b"sk-\xffHOSTILE-bytes".decode("utf-8", "surrogateescape")
    monkeypatch.setenv("EACHLABS_API_KEY", key)
    assert "HOSTILE" not in str(EachlabsError(f"It said {key}."))
