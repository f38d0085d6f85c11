"""Whatever is logged, and however: no secret in it, and no exception."""

from __future__ import annotations

import logging
from typing import Any
from urllib.parse import quote

from hypothesis import strategies as st

from prefect_eachlabs.errors import EachlabsError
from prefect_eachlabs.net import redaction
from tests.fuzz import hostile
from tests.fuzz.kit import fuzzed


class Awkward:
    """What others log: its text is a surprise."""

    def __init__(self, text: str, error: type[Exception] | None) -> None:
        self.text, self.error = text, error

    def __str__(self) -> str:
        if self.error:
            raise self.error(self.text)
        return self.text

    __repr__ = __str__


SECRET = "sk-Live_0123/456+789=,;&x"
around = (
    st.sampled_from(
        (
            *("https://a.invalid/?token=", "?x-amz-signature=", "X-API-Key: ", "'authorization', 'Bearer "),
            *('{"secret_key": "', "b'", "\\", "%", "&", " ", "\n", "", "***", "https://", "?", "=", ",", "%s", "%d"),
            *("{}", "<SecretAccessKey>", SECRET[:9], "signature: "),
        )
    )
    | hostile.texts
)


@fuzzed(
    st.lists(around | st.sampled_from((SECRET, quote(SECRET, safe=""))), max_size=6).map("".join),
    st.sampled_from(("httpx", "httpcore.http11", "botocore.auth", "prefect_eachlabs.api.client", "others")),
    st.sampled_from(("message", "argument", "too many", "object", "raises", "traceback", "mapping", "stack")),
)
def test_no_logged_text_holds_a_secret(text: str, logger: str, how: str) -> None:
    redaction.install()
    redaction.hide(SECRET)
    make = logging.getLogRecordFactory()
    exc_info: Any = None
    msg: Any = text
    args: Any = ()
    if how == "argument":
        msg, args = "it says %s", (text,)
    elif how == "too many":
        args = (text, SECRET)
    elif how in ("object", "raises"):
        msg = Awkward(text, ValueError if how == "raises" else None)
    elif how == "mapping":
        msg, args = "%(a)s %(b)d", ({"a": text, "b": SECRET},)
    elif how == "traceback":
        try:
            raise EachlabsError(text) from ValueError(SECRET)
        except EachlabsError as error:
            exc_info = (type(error), error, error.__traceback__)
    record = make(logger, logging.INFO, "f.py", 1, msg, args, exc_info, "f", text if how == "stack" else None)
    shown = [str(record.msg), str(record.args)]
    try:
        shown.append(logging.Formatter().format(record))
    except Exception as error:  # logging prints it, and what it was about
        shown.append(f"{error!r}")
    for one in shown:
        assert SECRET not in one
        assert quote(SECRET, safe="") not in one
    assert SECRET not in redaction.redacted(text)
