"""Who is believed, and what a call says: the check is pure, and nothing of a body is read before it."""

from __future__ import annotations

import json
import logging

import pytest

from prefect_eachlabs.errors import SetupError
from prefect_eachlabs.models import PredictionStatus
from prefect_eachlabs.net import redaction
from prefect_eachlabs.settings import settings_from_environment
from prefect_eachlabs.webhooks.calls import (
    MAX_BODY_BYTES,
    MAX_HANDED_ON_BYTES,
    Call,
    callback_of,
    event_payload,
    parse_call,
    parse_end,
    secret_of,
    signature_of,
    write_id_in,
)

MASTER = "the secret of all orders' secrets"
ORDER, OTHER = "0" * 32, "1" * 32
BODY = json.dumps({"exec_id": "p-1", "flow_id": None, "status": "succeeded", "output": "https://x.test/1.png"}).encode()


def call(body: bytes = BODY, *, query: str = f"write_id={ORDER}", **headers: str) -> Call:
    return Call.received(query, {name.replace("_", "-"): value for name, value in headers.items()}, body)


def test_each_order_has_a_secret_of_its_own() -> None:
    assert secret_of(MASTER, ORDER) != secret_of(MASTER, OTHER)
    assert secret_of(MASTER, ORDER) != secret_of(MASTER + " ", ORDER)
    callback = callback_of("https://hooks.test/in", MASTER, ORDER)
    assert callback.url == f"https://hooks.test/in?write_id={ORDER}"
    assert write_id_in(callback.url) == ORDER
    assert callback.secret not in repr(callback)


def test_a_call_is_believed_by_its_orders_secret_alone() -> None:
    secret = secret_of(MASTER, ORDER)
    assert call(x_webhook_secret=secret).is_proven_by(secret)
    assert not call(x_webhook_secret=secret_of(MASTER, OTHER)).is_proven_by(secret)
    for wrong in ("", "x", secret[:-1], secret + "0", secret.upper(), MASTER, "é" * 68, "\udc80", "x" * 100_000):
        assert not call(x_webhook_secret=wrong).is_proven_by(secret), wrong[:80]
    assert not call().is_proven_by(secret)


@pytest.mark.parametrize("header", ["x_webhook_signature", "x_webhook_signature_256", "x_signature"])
def test_the_older_texts_signature_of_the_body_is_a_proof_as_well(header: str) -> None:
    secret = secret_of(MASTER, ORDER)
    signature = signature_of(secret, BODY)
    for text in (signature, f"sha256={signature}", signature.upper()):
        assert call(**{header: text}).is_proven_by(secret)
    assert not call(BODY + b" ", **{header: signature}).is_proven_by(secret), "another body"
    assert not call(**{header: signature_of(MASTER, BODY)}).is_proven_by(secret)


@pytest.mark.parametrize("query", ["", "write_id=", f"write_id={ORDER}&write_id={OTHER}", "write_id=%00", "a=1&" * 30])
def test_a_url_that_names_no_order_names_none(query: str) -> None:
    assert call(query=query).write_id is None


@pytest.mark.parametrize("name", ["exec_id", "id", "prediction_id", "predictionID"])
@pytest.mark.parametrize("word", ["succeeded", "success", "COMPLETED"])
def test_both_forms_and_three_vocabularies_tell_a_success(name: str, word: str) -> None:
    end = parse_end(json.dumps({name: "p-1", "status": word, "output": ["https://x.test/1.png"]}).encode())
    assert end is not None
    assert (end.id, end.status, end.output_urls) == ("p-1", PredictionStatus.SUCCEEDED, ("https://x.test/1.png",))


@pytest.mark.parametrize("word", ["failed", "error"])
def test_a_failures_reason_stands_in_the_first_output(word: str) -> None:
    said = {"exec_id": "p-1", "status": word, "output": [{"error": "out of memory\x1b[2J"}], "error": ""}
    end = parse_end(json.dumps(said).encode())
    assert end is not None
    assert end.failure is not None
    assert end.failure.message == "out of memory\\x1b[2J"
    assert end.output_urls == ()


def test_what_a_call_says_of_cost_time_and_input_is_not_taken() -> None:
    said = {"id": "p-1", "status": "success", "output": "https://x.test/1.png", "input": {"prompt": "x"}}
    end = parse_end(json.dumps({**said, "metrics": {"cost": 9.0, "predict_time": 9.0}}).encode())
    assert end is not None
    assert (end.cost_usd, end.predict_time_seconds, end.input) == (None, None, None)


@pytest.mark.parametrize(
    "body",
    [b"", b"\xff", b"null", b"[]", b"{}", b'{"exec_id": ""}', b'{"exec_id": "a b"}', b'{"exec_id": {}}', b"[" * 50_000],
)
def test_what_cannot_be_read_says_nothing(body: bytes) -> None:
    assert parse_end(body) is None


def test_an_event_carries_a_proof_of_what_it_says_and_not_the_secret() -> None:
    secret = secret_of(MASTER, ORDER)
    payload = event_payload(call(x_webhook_secret=secret), secret)
    assert payload is not None
    assert secret not in json.dumps(payload)
    again = parse_call(payload)
    assert again is not None
    assert again.write_id == ORDER
    assert again.is_proven_by(secret)
    forged = parse_call({**payload, "body": payload["body"].replace("x.test", "y.test")})
    assert forged is not None
    assert not forged.is_proven_by(secret)


def test_an_event_stays_small() -> None:
    secret = secret_of(MASTER, ORDER)
    body = json.dumps(
        {"exec_id": "p-1", "status": "succeeded", "output": "x" * 200_000, "input": "y" * 10_000}
    ).encode()
    assert len(body) < MAX_BODY_BYTES
    payload = event_payload(call(body, x_webhook_secret=secret), secret)
    assert payload is not None
    assert len(payload["body"]) <= MAX_HANDED_ON_BYTES
    end = parse_end(payload["body"].encode())
    assert end is not None
    assert end.id == "p-1"


def test_a_template_in_prefect_cloud_gives_the_secret_and_the_body_as_an_object() -> None:
    secret = secret_of(MASTER, ORDER)
    found = parse_call({"secret": secret, "body": json.loads(BODY)})
    assert found is not None
    assert found.write_id is None
    assert found.is_proven_by(secret)
    assert parse_end(found.body) == parse_end(BODY)


@pytest.mark.parametrize("payload", [None, [], {}, {"body": 1}, {"body": "x" * (MAX_BODY_BYTES + 1)}])
def test_another_event_is_no_call(payload: object) -> None:
    assert parse_call(payload) is None


def test_no_secret_shows_in_a_log_an_answer_or_a_repr(caplog: pytest.LogCaptureFixture) -> None:
    redaction.install()
    secret = secret_of(MASTER, ORDER)
    one = call(x_webhook_secret=secret, x_webhook_signature="abc")
    assert secret not in repr(one)
    assert "succeeded" not in repr(one)
    with caplog.at_level(logging.DEBUG):
        logging.getLogger("httpx").debug("headers %s", {"X-Webhook-Secret": "verbatim-and-unknown"})
        logging.getLogger("anybody").debug("the vendor quoted %s", secret)
    assert secret not in caplog.text
    assert "verbatim-and-unknown" not in caplog.text
    assert redaction.without_secrets(f"the vendor quoted {secret}") == "the vendor quoted ***"


def test_a_url_without_a_secret_is_refused_and_a_short_one_too() -> None:
    environ = {"EACHLABS_API_KEY": "a-key", "EACHLABS_WEBHOOK_URL": "https://hooks.test/in"}
    with pytest.raises(SetupError, match="needs EACHLABS_WEBHOOK_SECRET"):
        settings_from_environment(environ)
    with pytest.raises(SetupError, match="at least 16") as caught:
        settings_from_environment({**environ, "EACHLABS_WEBHOOK_SECRET": "too-short"})
    assert "too-short" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["http://hooks.test", "ftp://hooks.test", "https://u:p@hooks.test", "https://h.test?a=1"]
)
def test_calls_go_over_https_or_stay_on_loopback(url: str) -> None:
    environ = {"EACHLABS_API_KEY": "a-key", "EACHLABS_WEBHOOK_SECRET": MASTER}
    with pytest.raises(SetupError, match=r"EACHLABS_WEBHOOK_URL: .*webhook URL"):
        settings_from_environment({**environ, "EACHLABS_WEBHOOK_URL": url})
    assert settings_from_environment({**environ, "EACHLABS_WEBHOOK_URL": "http://127.0.0.1:1/x"}).webhook_url


@pytest.mark.parametrize("place", ["8800", "host:", ":8800", "host:0", "host:99999", "host:x"])
def test_where_to_listen_is_a_host_and_a_port(place: str) -> None:
    with pytest.raises(SetupError, match="EACHLABS_WEBHOOK_LISTEN"):
        settings_from_environment({"EACHLABS_API_KEY": "a-key", "EACHLABS_WEBHOOK_LISTEN": place})
