"""Keys, secrets and signatures are replaced by `***` in whatever is logged, at every level.

Where it is done: at the making of each log record (`logging.setLogRecordFactory`). Filters of a logger do not see the
records of its children (`httpcore.http11`, `botocore.auth`), filters of handlers are lost when Prefect (or anybody)
configures logging anew, and handlers that are added later (`PREFECT_LOGGING_EXTRA_LOGGERS=botocore` sends its records
to the Prefect server) would have none. A record's making comes before all handlers, and no configuration resets it.
It happens only where the logger's level is on, so that what is not logged costs nothing.

What is replaced: secret values that are in use, in everybody's logs (`hide`, and those of the environment); what
signs a URL; in the logs of the libraries at work here also headers and fields that carry secrets, by their names, and
the whole query of any URL, for what a signature is called there is anybody's guess.

What is not: fields that a caller adds to a record (`extra=`), and what is printed instead of logged.
"""

from __future__ import annotations

import io
import logging
import os
import re
import threading
import traceback
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

SHORTEST_SECRET_CHARACTERS = 8
"""What is shorter ("demo", "testing") is a word of many texts, and nobody's secret."""
MOST_SECRETS = 1_000
FROM_THE_ENVIRONMENT = ("EACHLABS_API_KEY", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_SECURITY_TOKEN")
HIDDEN = "***"

LONGEST_CHARACTERS = 200_000
"""botocore's debug log shows bodies whole; more of a library's message than this is not kept."""

_WITH_QUERIES = ("httpx", "httpcore")
_LIBRARIES = (
    *_WITH_QUERIES,
    "prefect_eachlabs",
    "prefect",
    "boto3",
    "botocore",
    "s3transfer",
    "urllib3",
    "aiobotocore",
)
_PARAMETER = re.compile(
    r"(?i)((?:\bx-amz-(?:signature|credential|security-token)|\bx-goog-(?:signature|credential)"
    r"|[?&](?:signature|sig|token|access_token|api_?key|key-pair-id|policy|awsaccesskeyid|googleaccessid))=)"
    r"[^\s&;,'\"<>\\)\]}]+"
)
"""A URL's parameter that signs or opens, wherever it is logged."""
_FIELD = re.compile(
    # A header or a field: as text, in a dict or a list of pairs, in bytes or not; the scheme of an authorization stays.
    r"(?i)(?P<header>\b(?:x-api-key|(?:proxy-)?authorization|x-amz-security-token|(?:set-)?cookie"
    r"|secret_?(?:access_?)?key|(?:access|session|security|refresh|id)_?token|(?<=['\"])token)\\?['\"]?\s*[:=,]\s*b?\\?['\"]?"
    r"(?:(?:bearer|basic|aws4-hmac-sha256)\s+)?)[^'\"\r\n\\]+"
    # botocore's own words about a signature, and S3's answer to a wrong one.
    r"|(?P<made>\bsignature[:=]\s*|<(?:secretaccesskey|sessiontoken|signatureprovided)>)[^\s<,'\"]+"
)
"""What libraries log of requests, answers and credentials; in other people's logs these are everyday words."""
_URL_QUERY = re.compile(r"(?i)(https?://[^\s'\"<>?]{1,2048})\?[^\s'\"<>]+")
_QUERY = re.compile(r"(?<=[^\s'\"<>?])\?[^\s'\"<>]+")


class _Secrets:
    """The values that are in use, and one pattern of them all."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._given: dict[str, None] = {}
        self._changes = 0
        self._made_of: tuple[object, ...] = ()
        self._pattern: re.Pattern[str] | None = None

    def add(self, secret: str) -> None:
        with self._lock:
            self._given[secret] = None
            self._changes += 1
            while len(self._given) > MOST_SECRETS:
                del self._given[next(iter(self._given))]

    def hidden_in(self, text: str) -> str:
        pattern = self._current_pattern()
        return text if pattern is None else pattern.sub(HIDDEN, text)

    def _current_pattern(self) -> re.Pattern[str] | None:
        now = (self._changes, *map(os.environ.get, FROM_THE_ENVIRONMENT))
        if now != self._made_of:
            with self._lock:
                values = {*self._given, *(os.environ.get(name, "").strip() for name in FROM_THE_ENVIRONMENT)}
            values = {value for value in values if len(value) >= SHORTEST_SECRET_CHARACTERS}
            spellings = {spelling for value in values for spelling in (value, quote(value, safe=""))}
            longest_first = sorted(map(re.escape, spellings), key=len, reverse=True)
            self._pattern, self._made_of = re.compile("|".join(longest_first)) if longest_first else None, now
        return self._pattern


_secrets = _Secrets()


def hide(*secrets: str | None) -> None:
    """From now on these values are replaced wherever they would be logged; too short ones and None are left out."""
    for secret in secrets:
        if secret and len(secret) >= SHORTEST_SECRET_CHARACTERS:
            _secrets.add(secret)


def redacted(text: str) -> str:
    """A library's text (a message, a traceback) without secrets and signatures; URLs in it lose their queries."""
    # Values first: a pattern that ends within one would leave the rest of it, which nobody knows any more.
    text = _URL_QUERY.sub(rf"\1?{HIDDEN}", _secrets.hidden_in(text))
    return _FIELD.sub(_without_value, _PARAMETER.sub(rf"\1{HIDDEN}", text))


def _without_value(found: re.Match[str]) -> str:
    return f"{found['header'] or found['made']}{HIDDEN}"


def _cleaner(logger: str) -> Callable[[str], str]:
    """What cleans the messages of a logger."""
    package = logger.partition(".")[0]
    if package not in _LIBRARIES:
        return lambda text: _PARAMETER.sub(rf"\1{HIDDEN}", _secrets.hidden_in(text))

    def clean(text: str) -> str:
        cut = len(text) > LONGEST_CHARACTERS
        text = redacted(text[:LONGEST_CHARACTERS])
        if package in _WITH_QUERIES:
            text = _QUERY.sub(f"?{HIDDEN}", text)
        # A secret that was cut in two is not known any more.
        return f"{text[: LONGEST_CHARACTERS // 2]} ... (cut)" if cut else text

    return clean


def _clean(record: logging.LogRecord) -> None:
    clean = _cleaner(record.name or "")  # `logging.makeLogRecord` fills in a nameless one afterwards
    try:
        message = record.getMessage()
    except Exception:
        # Its arguments do not fit; logging prints both, so both are cleaned.
        record.msg = clean(str(record.msg))
        if isinstance(record.args, tuple):
            record.args = tuple(clean(str(argument)) for argument in record.args)
        elif record.args:
            record.args = (clean(str(record.args)),)
        return
    cleaned = clean(message)
    if cleaned != message:
        record.msg, record.args = cleaned, ()
    if record.stack_info:
        record.stack_info = redacted(record.stack_info)
    if record.exc_info and record.exc_info[0] is not None:
        text = _traceback(record.exc_info)
        cleaned = redacted(text)
        if cleaned != text:
            # Formatters print `exc_text` where it is set, and would make it anew of `exc_info`.
            record.exc_info, record.exc_text = None, cleaned


def _traceback(exc_info: Any) -> str:
    with io.StringIO() as lines:
        traceback.print_exception(*exc_info, file=lines)
        return lines.getvalue().rstrip("\n")


_installing = threading.Lock()


def install() -> None:
    """Cleans every record of this process from now on; again and again is as good as once. Costs nothing.

    A factory that another library has set stays in use, and so does this one beneath a later one.
    """
    with _installing:
        make = logging.getLogRecordFactory()
        if getattr(make, "redacts_secrets", False):
            return

        def make_clean(*args: Any, **kwargs: Any) -> logging.LogRecord:
            record = make(*args, **kwargs)
            try:
                _clean(record)
            except Exception as error:  # it must end no program, nor let anything through
                record.msg, record.args = "(a message that could not be cleaned: %s)", (type(error).__name__,)
                record.exc_info = record.exc_text = record.stack_info = None
            return record

        make_clean.redacts_secrets = True  # type: ignore[attr-defined]  # a mark by which it is known
        logging.setLogRecordFactory(make_clean)
