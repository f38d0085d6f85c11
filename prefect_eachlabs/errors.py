"""Everything that can go wrong, as one tree; whether to repeat is a fact of the class.

EachlabsError
├── BadInput               refused before anything was bought (also a ValueError)
│   └── ItemConflict       this item id already stands for another input
├── SetupError             key, bucket, limit or server is missing or refused: fix the set-up
├── NotSent                no request reached the API: repeat freely
├── Unanswered             a question (GET) came back without a readable answer: ask again
├── Throttled              429: nothing created, nothing billed; the account pauses
│   └── InsufficientBalance   402: the same, until somebody tops up the balance
├── OutcomeUnknown         a POST went out and no readable answer came: never repeat, find out
├── Rejected               the request is wrong (400, 403, 404, 422 ...): fix it
│   └── KeyRefused         401 or 403: the key is not accepted (also a SetupError)
├── PredictionFailed       the model ran and failed; keeps the API's code, message, `retryable`
│   ├── ContentRefused     content moderation said no
│   └── OutputMissing      it "succeeded" without a picture
├── PredictionCancelled    it was cancelled; nothing was billed
├── PredictionTimedOut     its deadline passed (also a TimeoutError); it may still end, and is stored then
├── NotYetSafe             paid for, not yet in the bucket: repeat the storing, never the buying
│   ├── NotAPng            the bytes are not a whole PNG
│   │   └── FormatNotAllowed   they are a picture of another format: allow it, and run again
│   ├── DownloadFailed     the picture could not be fetched
│   │   └── HostNotAllowed     it is at a host of this network: allow it, and run again
│   └── StoreFailed        the bucket did not take it, or did not answer
├── PictureMissing         it was stored, and is gone from the bucket: bought again only when asked
├── Skipped                left out on purpose (a budget, a setting); nothing was bought
└── BatchIncomplete        more rows than allowed have no picture; holds the batch's result
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import urlsplit, urlunsplit

from prefect_eachlabs.net.redaction import shown
from prefect_eachlabs.net.urls import has_odd_host

if TYPE_CHECKING:
    from prefect_eachlabs.batch.outcomes import BatchResult

BODY_LIMIT_CHARACTERS = 500
"""Bodies that the API sent are cut here before they get into a message."""


def without_query(url: str) -> str:
    """The URL as it may be shown: its query (signatures live there) and any user info cut off."""
    if has_odd_host(url):
        return "(unreadable URL)"
    try:
        parts = urlsplit(url)
        host = parts.netloc.rpartition("@")[2]
    except ValueError:
        return "(unreadable URL)"
    shown = urlunsplit((parts.scheme, host, parts.path, "", ""))
    return shown.encode("utf-8", "replace").decode()  # half characters could be neither logged nor written down


class EachlabsError(Exception):
    """The root: says what happened and what to do next, and carries the ids a person needs.

    Whatever others had a part in (the API's words, a table's cells, ids) is on one line here, its control characters
    escaped and the secrets in use taken out: errors end in terminals, logs, states, records and reports.

    Args:
        message: What happened and what to do next; never holds a secret.
        item_id: The item it is about, when known.
        prediction_id: The prediction it is about, when known. Where set, money may have been spent.
        status_code: HTTP status of the API's answer, when there was one.
        url: The URL in question; kept without its query.
        details: What the API said, or the head of a table; at most 500 characters, and no part of the message.
        retry_after_seconds: How long the API asked us to wait, when it did.
        code: The API's own error code, when it sent one.
        kind: A short word that reports count failures by.
    """

    retryable: ClassVar[bool] = False
    """Whether the same task may simply run again."""
    says_all: ClassVar[bool] = True
    """Whether the message is all that a person needs: Prefect's log has it in place of a traceback."""
    default_kind: ClassVar[str] = "error"

    def __init_subclass__(cls, *, kind: str | None = None, retryable: bool | None = None) -> None:
        cls.default_kind = kind or cls.default_kind
        cls.retryable = cls.retryable if retryable is None else retryable

    def __init__(
        self,
        message: str,
        *,
        item_id: str | None = None,
        prediction_id: str | None = None,
        status_code: int | None = None,
        url: str | None = None,
        details: str | None = None,
        retry_after_seconds: float | None = None,
        code: str | None = None,
        kind: str | None = None,
    ) -> None:
        message = shown(message)
        super().__init__(message)
        self.message = message
        self.item_id = shown(item_id) if item_id else item_id
        self.prediction_id = shown(prediction_id) if prediction_id else prediction_id
        self.status_code = status_code
        self.url = shown(without_query(url)) if url else None
        self.details = shown(details)[:BODY_LIMIT_CHARACTERS] if details else None
        self.retry_after_seconds = retry_after_seconds
        self.code = shown(code) if code else code
        self.kind = shown(kind) if kind else self.default_kind

    def __str__(self) -> str:
        named = {"item": self.item_id, "prediction": self.prediction_id, "at": self.url}
        ids = [f"{name} {value}" for name, value in named.items() if value and value not in self.message]
        return f"{self.message} ({', '.join(ids)})" if ids else self.message

    def __reduce__(self) -> tuple[Any, ...]:
        """Keyword-only facts survive pickling: Prefect stores exceptions of failed runs that way."""
        facts = {name: value for name, value in vars(self).items() if name != "message"}
        return partial(type(self), **facts), (self.message,)


class BadInput(EachlabsError, ValueError, kind="bad input"):
    """The input is refused before anything is bought: fix it as the message says."""


class ItemConflict(BadInput, kind="item conflict"):
    """The item id already stands for another input: choose another id, or replace it on purpose."""


class SetupError(EachlabsError, kind="set-up"):
    """Something that every item needs is missing or refused: the key, the bucket, a setting."""


class NotSent(EachlabsError, kind="not sent", retryable=True):
    """No request reached the API: nothing was created, repeat freely."""


class Unanswered(EachlabsError, kind="unanswered", retryable=True):
    """A question (GET) got no readable answer: nothing changed, ask again."""


class Throttled(EachlabsError, kind="throttled", retryable=True):
    """429: the account is at its limit; nothing was created or billed, the account pauses."""


class InsufficientBalance(Throttled, kind="insufficient balance", retryable=False):
    """402: the balance does not cover what is in flight; nothing was created. Top up, then run again."""


class OutcomeUnknown(EachlabsError, kind="outcome unknown"):
    """A POST went out and no readable answer came: it may have been billed. Never repeat it, find out."""


class Rejected(EachlabsError, kind="rejected"):
    """The API refused the request as wrong: fix it; nothing was created."""


class KeyRefused(Rejected, SetupError, kind="key refused"):
    """401 or 403: the API does not accept the key. Check EACHLABS_API_KEY or the credentials block."""


class PredictionFailed(EachlabsError, kind="prediction failed"):
    """The model ran and failed: the API's code and message are kept; a failed prediction costs nothing."""


class ContentRefused(PredictionFailed, kind="content refused"):
    """Content moderation refused the prompt or the picture: change the input; not repeated."""


class OutputMissing(PredictionFailed, kind="output missing"):
    """The prediction succeeded and holds no picture's URL: look at it in the vendor's dashboard."""


class PredictionCancelled(EachlabsError, kind="cancelled"):
    """The prediction was cancelled: nothing was billed, it may be bought again."""


class PredictionTimedOut(EachlabsError, TimeoutError, kind="timed out"):
    """The deadline passed before the end was seen: run again later, what was bought is stored then."""


class NotYetSafe(EachlabsError, kind="not yet safe", retryable=True):
    """The picture is paid for and not yet in the bucket: keeps the prediction id and the URL."""


class NotAPng(NotYetSafe, kind="not a PNG"):
    """The bytes that came are not a whole PNG: kept out of the bucket; the prediction is paid for."""


class FormatNotAllowed(NotAPng, kind="format not allowed", retryable=False):
    """What came is a picture of another format than was promised: allow it with `formats`, and run again."""


class DownloadFailed(NotYetSafe, kind="download failed"):
    """The picture could not be downloaded: run again within 24 h, after that the vendor may delete it."""


class HostNotAllowed(DownloadFailed, kind="host not allowed", retryable=False):
    """The picture is said to be at a host of this network: allow it with EACHLABS_PRIVATE_HOSTS, and run again."""


class StoreFailed(NotYetSafe, kind="store failed"):
    """The bucket did not take an object or did not answer: nothing is lost, run again."""


class PictureMissing(EachlabsError, kind="picture missing"):
    """The record says stored and the picture is gone from the bucket: bought again only when asked."""


class Skipped(EachlabsError, kind="skipped"):
    """Left out on purpose, by a budget or a setting; nothing was bought."""


class BatchIncomplete(EachlabsError, kind="batch incomplete"):
    """A batch came to its end, and more of its rows than `fail_above` allows have no picture. Run the same again.

    Attributes:
        result: What the batch came to, its rows included; None where Prefect has read the error back from JSON.
    """

    def __init__(self, message: str, *, result: BatchResult | None = None, **facts: Any) -> None:
        super().__init__(message, **facts)
        self.result = result
