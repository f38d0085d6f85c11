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


def _rebuild(cls: type[EachlabsError], message: str, facts: dict[str, Any]) -> EachlabsError:
    return cls(message, **facts)


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
    says_all: ClassVar[bool] = True
    """Whether the message is all that a person needs: Prefect's log has it in place of a traceback."""
    """Whether the same task may simply run again."""
    default_kind: ClassVar[str] = "error"

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
        ids = [
            f"{name} {value}"
            for name, value in (("item", self.item_id), ("prediction", self.prediction_id), ("at", self.url))
            if value and str(value) not in self.message
        ]
        return f"{self.message} ({', '.join(ids)})" if ids else self.message

    def __reduce__(self) -> tuple[Any, ...]:
        """Keyword-only facts survive pickling: Prefect stores exceptions of failed runs that way."""
        facts = {name: value for name, value in vars(self).items() if name != "message"}
        return _rebuild, (type(self), self.message, facts)


class BadInput(EachlabsError, ValueError):
    """The input is refused before anything is bought: fix it as the message says."""

    default_kind = "bad input"


class ItemConflict(BadInput):
    """The item id already stands for another input: choose another id, or replace it on purpose."""

    default_kind = "item conflict"


class SetupError(EachlabsError):
    """Something that every item needs is missing or refused: the key, the bucket, a setting."""

    default_kind = "set-up"


class NotSent(EachlabsError):
    """No request reached the API: nothing was created, repeat freely."""

    retryable = True
    default_kind = "not sent"


class Unanswered(EachlabsError):
    """A question (GET) got no readable answer: nothing changed, ask again."""

    retryable = True
    default_kind = "unanswered"


class Throttled(EachlabsError):
    """429: the account is at its limit; nothing was created or billed, the account pauses."""

    retryable = True
    default_kind = "throttled"


class InsufficientBalance(Throttled):
    """402: the balance does not cover what is in flight; nothing was created. Top up, then run again."""

    retryable = False
    default_kind = "insufficient balance"


class OutcomeUnknown(EachlabsError):
    """A POST went out and no readable answer came: it may have been billed. Never repeat it, find out."""

    default_kind = "outcome unknown"


class Rejected(EachlabsError):
    """The API refused the request as wrong: fix it; nothing was created."""

    default_kind = "rejected"


class KeyRefused(Rejected, SetupError):
    """401 or 403: the API does not accept the key. Check EACHLABS_API_KEY or the credentials block."""

    default_kind = "key refused"


class PredictionFailed(EachlabsError):
    """The model ran and failed: the API's code and message are kept; a failed prediction costs nothing."""

    default_kind = "prediction failed"


class ContentRefused(PredictionFailed):
    """Content moderation refused the prompt or the picture: change the input; not repeated."""

    default_kind = "content refused"


class OutputMissing(PredictionFailed):
    """The prediction succeeded and holds no picture's URL: look at it in the vendor's dashboard."""

    default_kind = "output missing"


class PredictionCancelled(EachlabsError):
    """The prediction was cancelled: nothing was billed, it may be bought again."""

    default_kind = "cancelled"


class PredictionTimedOut(EachlabsError, TimeoutError):
    """The deadline passed before the end was seen: run again later, what was bought is stored then."""

    default_kind = "timed out"


class NotYetSafe(EachlabsError):
    """The picture is paid for and not yet in the bucket: keeps the prediction id and the URL."""

    retryable = True
    default_kind = "not yet safe"


class NotAPng(NotYetSafe):
    """The bytes that came are not a whole PNG: kept out of the bucket; the prediction is paid for."""

    default_kind = "not a PNG"


class FormatNotAllowed(NotAPng):
    """What came is a picture of another format than was promised: allow it with `formats`, and run again."""

    retryable = False
    default_kind = "format not allowed"


class DownloadFailed(NotYetSafe):
    """The picture could not be downloaded: run again within 24 h, after that the vendor may delete it."""

    default_kind = "download failed"


class HostNotAllowed(DownloadFailed):
    """The picture is said to be at a host of this network: allow it with EACHLABS_PRIVATE_HOSTS, and run again."""

    retryable = False
    default_kind = "host not allowed"


class StoreFailed(NotYetSafe):
    """The bucket did not take an object or did not answer: nothing is lost, run again."""

    default_kind = "store failed"


class PictureMissing(EachlabsError):
    """The record says stored and the picture is gone from the bucket: bought again only when asked."""

    default_kind = "picture missing"


class Skipped(EachlabsError):
    """Left out on purpose, by a budget or a setting; nothing was bought."""

    default_kind = "skipped"


class BatchIncomplete(EachlabsError):
    """A batch came to its end, and more of its rows than `fail_above` allows have no picture. Run the same again.

    Attributes:
        result: What the batch came to, its rows included; None where Prefect has read the error back from JSON.
    """

    default_kind = "batch incomplete"

    def __init__(self, message: str, *, result: BatchResult | None = None, **facts: Any) -> None:
        super().__init__(message, **facts)
        self.result = result
