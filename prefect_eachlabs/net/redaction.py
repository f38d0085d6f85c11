"""What others wrote is made safe to show: secrets are replaced by `***`, control characters are written as escapes.

Answers of the API are cleaned where their JSON is decoded, errors where they are made, and log records, at every level,
as follows.

Where it is done: at the making of each log record (`logging.setLogRecordFactory`). Filters of a logger do not see the
records of its children (`httpcore.http11`, `botocore.auth`), filters of handlers are lost when Prefect (or anybody)
configures logging anew, and handlers that are added later (`PREFECT_LOGGING_EXTRA_LOGGERS=botocore` sends its records
to the Prefect server) would have none. A record's making comes before all handlers, and no configuration resets it.
It happens only where the logger's level is on, so that what is not logged costs nothing.

What is replaced: secret values that are in use, in everybody's logs (`hide`, and those of the environment), as they
are, and as URLs, JSON, HTML and base64 spell them; what signs a URL; in the logs of the libraries at work here also
headers and fields that carry secrets, by their names, and the whole query of any URL, for what a signature is called
there is anybody's guess. In the logs of this package and of those libraries, control characters are escaped.

What is not: fields that a caller adds to a record (`extra=`), and what is printed instead of logged.

And where Prefect logs an error of this package, its traceback gives way to the sentence that it is.
"""

from __future__ import annotations

import base64
import html
import io
import json
import logging
import os
import re
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import quote

SHORTEST_SECRET_CHARACTERS = 8
"""What is shorter ("demo", "testing") is a word of many texts, and nobody's secret."""
MOST_SECRETS = 1_000
FROM_THE_ENVIRONMENT = (
    "EACHLABS_API_KEY",
    "EACHLABS_WEBHOOK_SECRET",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_SECURITY_TOKEN",
)
ORDER_SECRET = re.compile(r"whs_[0-9a-f]{8,64}")
"""The secret that an order's webhook is called with (`webhooks.calls`): one an order, so known by its form, and cut."""
HIDDEN = "***"

LONGEST_CHARACTERS = 200_000
"""botocore's debug log shows bodies whole; more of a library's message than this is not kept."""

_WITH_QUERIES = ("httpx", "httpcore")
_OURS = "prefect_eachlabs"
_LIBRARIES = (
    *_WITH_QUERIES,
    _OURS,
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
    r"(?i)(?P<header>\b(?:x-api-key|(?:x-)?webhook[-_]secret|(?:proxy-)?authorization|x-amz-security-token|(?:set-)?cookie"
    r"|secret_?(?:access_?)?key|(?:access|session|security|refresh|id)_?token|(?<=['\"])token)\\?['\"]?\s*[:=,]\s*b?\\?['\"]?"
    r"(?:(?:bearer|basic|aws4-hmac-sha256)\s+)?)[^'\"\r\n\\]+"
    # botocore's own words about a signature, and S3's answer to a wrong one.
    r"|(?P<made>\bsignature[:=]\s*|<(?:secretaccesskey|sessiontoken|signatureprovided)>)[^\s<,'\"]+"
)
"""What libraries log of requests, answers and credentials; in other people's logs these are everyday words."""
_URL = re.compile(r"(?i)(https?://[^\s'\"<>?]+)(\?[^\s'\"<>]+)?")
"""With its query or without one: what begins a URL is gone through once, however often it begins."""
_QUERY = re.compile(r"(?<=[^\s'\"<>?])\?[^\s'\"<>]+")


_MOVES_TERMINALS = (
    # C0 and C1; what ends a line; what turns the direction of the text; half characters, which no file takes.
    *(range(0x20), range(0x7F, 0xA0), range(0x2028, 0x202F), range(0x61C, 0x61D)),
    *(range(0x200E, 0x2010), range(0x2066, 0x206A), range(0xD800, 0xE000)),
)


def visible(text: str, *, keeping: str = "") -> str:
    """Text that others wrote, on one line: control and direction characters as Python writes them, all else as it is.

    >>> visible("fine \x1b[2J\nforged")
    'fine \\x1b[2J\\nforged'

    Args:
        keeping: Characters that stay as they are.
    """
    return text.translate(_escapes(keeping))


@lru_cache(maxsize=8)
def _escapes(keeping: str) -> dict[int, str]:
    codes = (code for codes in _MOVES_TERMINALS for code in codes if chr(code) not in keeping)
    return {code: chr(code).encode("unicode_escape").decode() for code in codes}


def _spellings(secret: str) -> Iterator[str]:
    """A secret as texts quote it: as it is, and as URLs, JSON, HTML and base64 spell it."""
    yield secret
    data = secret.encode("utf-8", "surrogatepass")  # an environment may hold bytes that are not text
    for quoted in (quote(data, safe=""), quote(data)):
        yield quoted
        yield re.sub("%..", lambda code: code[0].lower(), quoted)
    in_json = json.dumps(secret)[1:-1]
    yield in_json
    yield in_json.replace("/", "\\/")
    yield html.escape(secret)
    for before in range(3):
        # Three bytes become four characters: wherever it stands among them, these are its own.
        encoded = base64.b64encode(bytes(before) + data).decode()
        own = encoded[(0, 2, 3)[before] : 8 * (before + len(data)) // 6]
        yield own
        yield own.translate(str.maketrans("+/", "-_"))


class _Secrets:
    """The values that are in use, and all their spellings."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._given: dict[str, None] = {}
        self._changes = 0
        self._made_of: tuple[object, ...] = ()
        self._spellings: tuple[str, ...] = ()

    def add(self, secret: str) -> None:
        with self._lock:
            self._given[secret] = None
            self._changes += 1
            while len(self._given) > MOST_SECRETS:
                del self._given[next(iter(self._given))]

    def are_in(self, text: str) -> bool:
        return any(spelling in text for spelling in self._current()) or ORDER_SECRET.search(text) is not None

    def hidden_in(self, text: str) -> str:
        for spelling in self._current():
            text = text.replace(spelling, HIDDEN)
        return ORDER_SECRET.sub(HIDDEN, text) if "whs_" in text else text

    def _current(self) -> tuple[str, ...]:
        """The longest first, lest a shorter one leave the rest of it."""
        now = (self._changes, *map(os.environ.get, FROM_THE_ENVIRONMENT))
        if now != self._made_of:
            with self._lock:
                values = {*self._given, *(os.environ.get(name, "").strip() for name in FROM_THE_ENVIRONMENT)}
            values = {value for value in values if len(value) >= SHORTEST_SECRET_CHARACTERS}
            spellings = {spelling for value in values for spelling in _spellings(value)}
            self._spellings, self._made_of = tuple(sorted(spellings, key=len, reverse=True)), now
        return self._spellings


_secrets = _Secrets()


def hide(*secrets: str | None) -> None:
    """From now on these values are replaced wherever they would be logged; too short ones and None are left out."""
    for secret in secrets:
        if secret and len(secret) >= SHORTEST_SECRET_CHARACTERS:
            _secrets.add(secret)


def holds_secret(text: str) -> bool:
    """Whether a secret value that is in use stands in a text."""
    return _secrets.are_in(text)


def without_secrets(text: str) -> str:
    """Any text without the secret values that are in use."""
    return _secrets.hidden_in(text)


def shown(text: str) -> str:
    """Text that others had a part in, as it may be shown: `visible`, without secret values in use and signatures."""
    return visible(_PARAMETER.sub(rf"\1{HIDDEN}", without_secrets(text)))


def cleaned(value: Any) -> Any:
    """Decoded JSON of others, every string in it without the secret values that are in use; the names too.

    Raises:
        RecursionError: It is nested too deeply.
    """
    if isinstance(value, str):
        return without_secrets(value)
    if isinstance(value, Mapping):
        return {without_secrets(name): cleaned(inner) for name, inner in value.items()}
    return [cleaned(inner) for inner in value] if isinstance(value, list) else value


def redacted(text: str) -> str:
    """A library's text (a message, a traceback) without secrets and signatures; URLs in it lose their queries."""
    # Values first: a pattern that ends within one would leave the rest of it, which nobody knows any more.
    text = _URL.sub(_without_query, _secrets.hidden_in(text))
    return _FIELD.sub(_without_value, _PARAMETER.sub(rf"\1{HIDDEN}", text))


def _without_query(found: re.Match[str]) -> str:
    return f"{found[1]}?{HIDDEN}" if found[2] else found[0]


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
        if package == _OURS:
            text = visible(text)  # each message of this package is one line: what would end it came from others
        elif package != "prefect":  # which users log with, too
            text = visible(text, keeping="\n\t")
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
    if (record.name or "").startswith("prefect.") and record.exc_info and _says_all(record.exc_info[1]):
        # Prefect logs the calls of its own engine, up to four times, for an error that says what to do in a sentence.
        said = clean(str(record.exc_info[1]))
        record.exc_info = record.exc_text = None
        if said not in cleaned:
            record.msg, record.args = f"{cleaned}: {said}", ()
    if record.exc_info and record.exc_info[0] is not None:
        text = _traceback(record.exc_info)
        cleaned = visible(redacted(text), keeping="\n\t")
        if cleaned != text:
            # Formatters print `exc_text` where it is set, and would make it anew of `exc_info`.
            record.exc_info, record.exc_text = None, cleaned


def _says_all(error: BaseException | None) -> bool:
    """An error of this package; with its own log at debug level its tracebacks stay."""
    return bool(getattr(error, "says_all", False)) and not logging.getLogger(_OURS).isEnabledFor(logging.DEBUG)


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
