"""What is logged holds no secret, whoever logs it, at whatever level, however logging is configured later."""

from __future__ import annotations

import io
import json
import logging
import logging.config
from collections.abc import Iterator

import pytest

from prefect_eachlabs.net import redaction
from prefect_eachlabs.net.redaction import LONGEST_CHARACTERS, hide, install, redacted
from prefect_eachlabs.storage.s3_client import S3Access, client_of

SECRET = "sk-redaction-0123456789/+="
HEX = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"


@pytest.fixture(autouse=True)
def _own_factory() -> Iterator[None]:
    before = logging.getLogRecordFactory()
    logging.setLogRecordFactory(logging.LogRecord)
    install()
    hide(SECRET)
    yield
    logging.setLogRecordFactory(before)


@pytest.fixture
def printed() -> Iterator[io.StringIO]:
    """What a handler prints that was added to the root logger after everything else."""
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    handler.setFormatter(logging.Formatter("%(name)s %(message)s"))
    logging.getLogger().addHandler(handler)
    yield text
    logging.getLogger().removeHandler(handler)


LEAKS = {
    "a value": f"the key is {SECRET} here",
    "a value in a URL": f"https://h.invalid/?x={SECRET.replace('/', '%2F').replace('+', '%2B').replace('=', '%3D')}",
    "httpx's URL": f'HTTP Request: GET https://h.invalid/a.png?hdnts=exp~{HEX} "HTTP/1.1 200 OK"',
    "httpcore's Location": f"return_value=(b'HTTP/1.1', 302, [(b'Location', b'/a?who-knows={HEX}'), (b'X', b'y')])",
    "a header in a dict": f"headers={{'X-API-Key': '{HEX}', 'Accept': '*/*'}}",
    "a header in bytes": f"{{'Authorization': b'AWS4-HMAC-SHA256 Credential=AKIA/eu, Signature={HEX}', 'Host': 'h'}}",
    "a header in pairs": f"[(b'x-api-key', b'{HEX}'), (b'Accept', b'*/*')]",
    "a header as text": f"GET / HTTP/1.1\r\nAuthorization: Bearer {HEX}\r\nAccept: */*",
    "a header in JSON": json.dumps({"x-amz-security-token": HEX, "accept": "*/*"}),
    "JSON in a string": json.dumps(json.dumps({"SecretAccessKey": HEX, "Expiration": "x"})),
    "a canonical request": f"GET\n/\n\nhost:h\nx-amz-security-token:{HEX}\n\nhost;x-amz-date",
    "a query that is signed": f"/b/k?X-Amz-Credential={HEX}%2Feu&X-Amz-Signature={HEX}&X-Amz-Security-Token={HEX}",
    "urllib3's line": f'http://h.invalid:80 "GET /k?X-Amz-Expires=9&X-Amz-Signature={HEX} HTTP/1.1" 200 0',
    "botocore's signature": f"Signature:\n{HEX}",
    "S3's refusal": f"<Code>SignatureDoesNotMatch</Code><SignatureProvided>{HEX}</SignatureProvided>",
    "a role's keys": f"<SecretAccessKey>{HEX}</SecretAccessKey><SessionToken>{HEX}</SessionToken>",
    "a metadata answer": f'{{"AccessKeyId" : "ASIA", "SecretAccessKey" : "{HEX}", "Token" : "{HEX}"}}',
    "a cookie": f"Set-Cookie: session={HEX}; Path=/",
    "other clouds": f"https://h.invalid/a?X-Goog-Signature={HEX}&sig={HEX}&Signature={HEX}",
}


@pytest.mark.parametrize("text", LEAKS.values(), ids=LEAKS)
@pytest.mark.parametrize("logger", ["httpx", "httpcore.http11", "botocore.auth", "prefect_eachlabs.api.client"])
def test_a_librarys_message_loses_its_secrets(text: str, logger: str, printed: io.StringIO) -> None:
    if "hdnts" in text or "Location" in text:  # whose name nobody knows: only of a URL, and of its clients
        logger = "httpcore.http11"
    logging.getLogger(logger).warning("%s", text)
    logging.getLogger(logger).warning(text)
    assert printed.getvalue().count("***") >= 2
    assert HEX not in printed.getvalue()
    assert SECRET not in printed.getvalue()
    assert "sk-redaction" not in printed.getvalue()


def test_what_is_no_secret_stays() -> None:
    for text in (
        "S3 refused s3://b/k (AccessDenied, HTTP 403)",
        "SignedHeaders=host;x-amz-date",
        "Calculating signature using v4 auth.",
        "https://api.invalid/v1/prediction/p-1",
        "Item fox: the account is at its limit (HTTP 429).",
    ):
        assert redacted(text) == text


@pytest.mark.parametrize(
    "part", ["http://", "https://a", "cookie: ", "signature:", "?a", "x-amz-", "Authorization: Bearer "]
)
def test_a_hostile_text_is_cleaned_without_going_over_it_again_and_again(part: str) -> None:
    """Quadratic, each would take minutes."""
    assert len(redacted(part * 100_000)) > 10


def test_other_peoples_logs_lose_values_in_use_and_signatures_alone(printed: io.StringIO) -> None:
    words = "cookie: chocolate, token: 5, authorization: granted, why? https://h.invalid/a?page=2"
    logging.getLogger("a_user").warning("%s; %s; https://h.invalid/a?page=2&X-Amz-Signature=%s", words, SECRET, HEX)
    assert printed.getvalue() == f"a_user {words}; ***; https://h.invalid/a?page=2&X-Amz-Signature=***\n"


@pytest.mark.parametrize("logger", ["prefect.flow_runs", "a_user"])
def test_a_traceback_loses_its_secrets_with_its_causes(logger: str, printed: io.StringIO) -> None:
    try:
        try:
            raise KeyError(f"https://h.invalid/a?X-Amz-Signature={HEX}")
        except KeyError as error:
            raise ValueError(f"with {SECRET}") from error
    except ValueError:
        logging.getLogger(logger).exception("it failed")
    assert "Traceback" in printed.getvalue()
    assert "ValueError: with ***" in printed.getvalue()
    assert HEX not in printed.getvalue()


def test_a_record_without_a_secret_is_left_as_it_is() -> None:
    kept: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = kept.append  # type: ignore[method-assign]
    logger = logging.getLogger("prefect_eachlabs.kept")
    logger.addHandler(handler)
    try:
        raise ValueError("nothing secret")
    except ValueError:
        logger.exception("item %s", "fox", stack_info=True)
    logger.removeHandler(handler)
    assert (kept[0].msg, kept[0].args) == ("item %s", ("fox",))
    assert kept[0].exc_info is not None


def test_arguments_that_do_not_fit_are_cleaned_before_logging_complains(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logger = logging.getLogger("httpx.apart")
    logger.propagate = False  # pytest's own handler does not complain, it raises
    logger.addHandler(logging.StreamHandler())
    logger.warning("%d and %d", SECRET, f"x-api-key: {HEX}")
    complaint = capsys.readouterr().err
    assert "Logging error" in complaint
    assert "***" in complaint
    assert SECRET not in complaint
    assert HEX not in complaint


def test_what_cannot_be_cleaned_is_not_let_through(printed: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redaction, "_cleaner", lambda _: lambda text: text / 0)
    logging.getLogger("httpx").warning("with %s", SECRET)
    assert printed.getvalue() == "httpx (a message that could not be cleaned: TypeError)\n"


def test_what_is_not_logged_costs_nothing() -> None:
    class Dear:
        def __str__(self) -> str:
            raise AssertionError("nobody asked for it")

    logger = logging.getLogger("botocore.dear")
    logger.setLevel(logging.INFO)
    logger.debug("%s", Dear())


def test_a_body_in_botocores_log_is_cut(printed: io.StringIO) -> None:
    logging.getLogger("botocore.endpoint").warning("with body %s%s", "x" * (LONGEST_CHARACTERS - 40), SECRET * 10)
    assert len(printed.getvalue()) < LONGEST_CHARACTERS
    assert "sk-redaction" not in printed.getvalue()


def test_it_outlives_every_configuration_of_logging(printed: io.StringIO) -> None:
    from prefect.logging.configuration import setup_logging

    setup_logging(incremental=False)
    logging.config.dictConfig({"version": 1, "disable_existing_loggers": False})
    logger = logging.getLogger("httpcore.added.later")
    logger.propagate = False
    text = io.StringIO()
    logger.addHandler(logging.StreamHandler(text))
    logger.warning("x-api-key: %s", HEX)
    assert text.getvalue() == "x-api-key: ***\n"


def test_it_is_installed_once_and_above_what_others_have_installed() -> None:
    theirs: list[str] = []

    def factory(*args: object, **kwargs: object) -> logging.LogRecord:
        record = logging.LogRecord(*args, **kwargs)  # type: ignore[arg-type]
        theirs.append(record.getMessage())
        return record

    logging.setLogRecordFactory(factory)
    install()
    installed = logging.getLogRecordFactory()
    install()
    assert logging.getLogRecordFactory() is installed
    logging.getLogger("a_user").warning("theirs too")
    assert theirs == ["theirs too"]


def test_secrets_of_the_environment_are_known_and_words_are_left(
    monkeypatch: pytest.MonkeyPatch, printed: io.StringIO
) -> None:
    monkeypatch.setenv("EACHLABS_API_KEY", "demo")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI")
    hide("testing", None, "")
    logging.getLogger("a_user").warning("a demo of testing wJalrXUtnFEMI")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another-secret")
    logging.getLogger("a_user").warning("another-secret")
    assert printed.getvalue() == "a_user a demo of testing ***\na_user ***\n"


def test_botocores_own_debug_log_of_real_requests_holds_no_secret(
    printed: io.StringIO, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests that reach nobody are signed and logged all the same."""
    from botocore.auth import SigV4Auth
    from botocore.exceptions import EndpointConnectionError

    caplog.set_level(logging.DEBUG)
    made: list[str] = []
    sign = SigV4Auth.signature
    monkeypatch.setattr(SigV4Auth, "signature", lambda *given: made.append(sign(*given)) or made[-1])
    monkeypatch.setattr("prefect_eachlabs.storage.s3_client.ATTEMPTS", 1)
    access = S3Access("http://127.0.0.1:9", "us-east-1", "AKIAEXAMPLE", "secret-of-redaction", "token-of-redaction/+")
    s3 = client_of(access)
    with pytest.raises(EndpointConnectionError):
        s3.put_object(Bucket="pictures", Key="a.png", Body=b"x")
    url = s3.generate_presigned_url("get_object", Params={"Bucket": "pictures", "Key": "a.png"})
    logging.getLogger("a_user").warning("signed: %s", url)
    text = printed.getvalue()
    assert "botocore.auth" in text
    assert "CanonicalRequest" in text
    assert len(made) == 2
    for secret in (*made, "secret-of-redaction", "token-of-redaction"):
        assert secret not in text


def test_a_record_that_is_filled_in_afterwards_is_left_as_it_is() -> None:
    """So are those that came from another process, as `logging.makeLogRecord` makes them."""
    install()
    record = logging.makeLogRecord({"name": "other", "msg": "%d pictures", "args": (7,)})
    assert record.getMessage() == "7 pictures"
    assert logging.makeLogRecord({"msg": "none"}).getMessage() == "none"
