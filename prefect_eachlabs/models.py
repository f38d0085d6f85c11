"""The nouns: items, predictions, pictures; and the tolerant reading of what the API says.

No remote word is trusted: it is parsed once, here; a word that is not known means "not finished", a field that
is not known is ignored. The rows of the API that each reader follows are in the docs, "Where sources differ".
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import re
import unicodedata
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, InstanceOf

from prefect_eachlabs.errors import (
    BadInput,
    ContentRefused,
    EachlabsError,
    OutputMissing,
    PredictionCancelled,
    PredictionFailed,
)
from prefect_eachlabs.net import safe_json
from prefect_eachlabs.net.redaction import shown, visible
from prefect_eachlabs.net.urls import has_odd_host
from prefect_eachlabs.reference_images import BUCKET_PATTERN, REFERENCE_FIELDS, Picture, parse_s3_name

logger = logging.getLogger(__name__)

DEFAULT_MODEL = "gemini"
DEFAULT_VERSION = "2.0-flash-exp-image-generation"

ITEM_ID_PATTERN = re.compile(r"[A-Za-z0-9_-]{1,128}")
MODEL_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:-]{0,199}")
_PREDICTION_ID_PATTERN = re.compile(r"[!-~]{1,256}")
MAX_INPUT_NESTING = 64
"""pydantic reads JSON of less than 200 levels: a record that holds more could not be read any more."""
MAX_URL_CHARACTERS = 65_536
"""httpx takes none that is longer."""
MOST_WORD_CHARACTERS = 40
_MAX_NESTING = 8
_MAX_URLS = 64
_MAX_VALUES = 10_000
"""An answer of a megabyte may hold hundreds of thousands; its outputs have not so many, a page's together neither."""


class PredictionStatus(str, Enum):
    """What a prediction's status word means to us."""

    PENDING = "pending"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        return self is not PredictionStatus.PENDING


_WORDS = {
    "success": PredictionStatus.SUCCEEDED,
    "succeeded": PredictionStatus.SUCCEEDED,
    "completed": PredictionStatus.SUCCEEDED,
    "error": PredictionStatus.FAILED,
    "failed": PredictionStatus.FAILED,
    "cancelled": PredictionStatus.CANCELLED,
    "canceled": PredictionStatus.CANCELLED,
}
PENDING_WORDS = frozenset({"", "created", "starting", "queued", "pending", "processing", "running", "in_progress"})
"""Words for "not finished" that are known."""


def parse_status(word: object) -> PredictionStatus:
    """Three vocabularies in any case; whatever is not known is not finished, and said once."""
    said = str(word or "").strip().lower()
    if said not in _WORDS and said not in PENDING_WORDS:
        _warn_of(shown(said[:MOST_WORD_CHARACTERS]))
    return _WORDS.get(said, PredictionStatus.PENDING)


@functools.lru_cache(maxsize=64)
def _warn_of(word: str) -> None:
    logger.warning(
        'The API says "%s" of a prediction, which is not known here: it is taken as not finished, and asked for until '
        "its deadline.",
        word,
    )


def parse_prediction_id(value: object) -> str | None:
    """An id that is safe in a path, a key and a header; None for anything else."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not _PREDICTION_ID_PATTERN.fullmatch(value) or not value.strip("."):
        return None
    return value


def created_id(answer: object) -> str | None:
    """The id in the answer to a POST: the first of predictionID, prediction_id, id, exec_id that is one."""
    if isinstance(answer, Mapping):
        for name in ("predictionID", "prediction_id", "id", "exec_id"):
            if (found := parse_prediction_id(answer.get(name))) is not None:
                return found
    return None


class Failure(BaseModel):
    """What the API says about a failed prediction (its error envelope, or its logs)."""

    model_config = ConfigDict(frozen=True)

    code: str | None = None
    message: str = ""
    retryable: bool | None = None
    step: str | None = None
    category: str | None = None

    @property
    def is_content_refusal(self) -> bool:
        """Whether content moderation said no (the vendor's classification `content_moderation`)."""
        words = f"{self.code or ''} {self.category or ''}".lower()
        return any(word in words for word in ("content_moderation", "content_policy", "moderation", "safety", "nsfw"))

    @property
    def may_be_resubmitted(self) -> bool:
        """`retryable: true`, or a PROVIDER_FAILED (once); a refusal by moderation never."""
        if self.is_content_refusal:
            return False
        return self.retryable is True or (self.retryable is None and (self.code or "").upper() == "PROVIDER_FAILED")


def _unwrap_json(value: object) -> object:
    """JSON in a string is opened; any other string stays."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "[", '"'):
        try:
            return safe_json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _text(value: object) -> str | None:
    """A word or a sentence of the API, fit for logs, records and reports; None for anything else."""
    # Cleaned before it is cut: of a key that is cut in two nothing would be found.
    return shown(str(value))[:500] if isinstance(value, (str, int, float)) and not isinstance(value, bool) else None


def _failure_in(*places: object) -> Failure | None:
    """The error envelope in the first of these opened texts that holds one."""
    for opened in places:
        if not isinstance(opened, Mapping):
            continue
        if "error_code" in opened or "error_message" in opened:
            classification = opened.get("classification")
            category = classification.get("category") if isinstance(classification, Mapping) else None
            retryable = opened.get("retryable")
            return Failure(
                code=_text(opened.get("error_code")),
                message=_text(opened.get("error_message")) or "",
                retryable=retryable if isinstance(retryable, bool) else None,
                step=_text(opened.get("error_step")),
                category=_text(category),
            )
    return None


def _urls_in(opened: object, turns: Iterator[int]) -> tuple[str, ...]:
    """The http(s) URLs in an opened output of any documented shape, in order, each once, at most 64.

    Each value that is looked at takes one of the `turns` that are left.
    """
    found: dict[str, None] = {}

    def walk(value: object, depth: int) -> None:
        if depth > _MAX_NESTING or len(found) >= _MAX_URLS or next(turns, None) is None:
            return
        value = _unwrap_json(value) if depth else value
        if isinstance(value, str):
            text = value.strip()
            if is_http_url(text):
                found.setdefault(text)
        elif isinstance(value, Mapping):
            first = [value[name] for name in ("url", "image_url", "images") if name in value]
            rest = [inner for name, inner in value.items() if name not in ("url", "image_url", "images")]
            for inner in (first + rest)[:_MAX_VALUES]:
                walk(inner, depth + 1)
        elif isinstance(value, list):
            for inner in value[:_MAX_VALUES]:
                walk(inner, depth + 1)

    walk(opened, 0)
    return tuple(found)


_BLANK = re.compile(r"[\s\x00-\x1f]")


def is_http_url(text: str) -> bool:
    """Whether the text is an absolute http(s) URL with a host and no white space."""
    if len(text) > MAX_URL_CHARACTERS or not text.lower().startswith(("http://", "https://")):
        return False
    if _BLANK.search(text) or has_odd_host(text):
        return False
    try:
        parts = urlsplit(text)
        return bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        return False


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if 0 <= number < float("inf") else None


class Prediction(BaseModel):
    """One job at Eachlabs, as far as it is known.

    Attributes:
        id: The API's id.
        status: What its status word means.
        status_word: The word itself.
        model: What was asked for.
        version: What was asked for.
        input: What was asked for; of an answer the API's echo, None when it sent none.
        output_urls: The pictures' URLs, public by link and kept at least 24 h.
        may_have_several: Its output came as a list or an object, not as one URL.
        failure: What the API says went wrong.
        predict_time_seconds: The model's own time, when told.
        cost_usd: 0 until the vendor has settled it (unknown, that is), None when not told.
        created_at: When our POST was answered, by this machine's clock; deadlines count from here.
        item_id: The item it was bought for, when it was bought for one.
        destination: Where the item's record is, when it was bought under one.
    """

    model_config = ConfigDict(frozen=True)

    id: str
    status: PredictionStatus = PredictionStatus.PENDING
    status_word: str = ""
    model: str | None = None
    version: str | None = None
    input: dict[str, Any] | None = None
    output_urls: tuple[str, ...] = ()
    may_have_several: bool = False
    failure: Failure | None = None
    predict_time_seconds: float | None = None
    cost_usd: float | None = None
    created_at: datetime | None = None
    item_id: str | None = None
    destination: str | None = None

    def raise_for_end(self) -> Prediction:
        """Itself when it succeeded with a picture (or has not ended).

        Raises:
            PredictionFailed: It failed; `ContentRefused` when moderation refused it, `OutputMissing` when it
                "succeeded" without a picture.
            PredictionCancelled: It was cancelled.
        """
        if self.status is PredictionStatus.CANCELLED:
            raise PredictionCancelled(
                "The prediction was cancelled; nothing was billed, it may be bought again.",
                item_id=self.item_id,
                prediction_id=self.id,
            )
        if self.status is PredictionStatus.FAILED or (self.status.ended and self.failure and not self.output_urls):
            failure = self.failure or Failure()
            kind: type[EachlabsError] = ContentRefused if failure.is_content_refusal else PredictionFailed
            said = failure.message or "the API gave no reason"
            advice = (
                "Change the prompt or the picture."
                if failure.is_content_refusal
                else "It may be resubmitted."
                if failure.may_be_resubmitted
                else "Failed predictions cost nothing; fix the input, or buy it again on purpose."
            )
            raise kind(
                f"The prediction failed: {failure.code + ': ' if failure.code else ''}{said} {advice}",
                item_id=self.item_id,
                prediction_id=self.id,
                code=failure.code,
                details=failure.message or None,
            )
        if self.status is PredictionStatus.SUCCEEDED and not self.output_urls:
            raise OutputMissing(
                f"The prediction ended as {self.status_word!r} and its output holds no picture's URL; "
                "look at it in the vendor's dashboard.",
                item_id=self.item_id,
                prediction_id=self.id,
            )
        return self


def parse_prediction(answer: Mapping[str, Any], *, prediction_id: str) -> Prediction:
    """The answer to GET /v1/prediction/{id}; a field of the wrong shape counts as not sent."""
    word = answer.get("status")
    status = parse_status(word)
    output = answer.get("output")
    metrics = answer.get("metrics")
    metrics = metrics if isinstance(metrics, Mapping) else {}
    opened = _unwrap_json(output)  # once: it may be a megabyte
    failure = _failure_in(opened, _unwrap_json(answer.get("logs")))
    if status is PredictionStatus.FAILED and failure is None:
        said = next((t for n in ("error", "error_message", "logs", "message") if (t := _text(answer.get(n)))), None)
        failure = Failure(message=said or (_text(output) or ""))
    echo = _unwrap_json(answer.get("input"))
    return Prediction(
        id=prediction_id,
        status=status,
        status_word=visible(str(word)[:80]) if word is not None else "",
        model=_text(answer.get("model")),
        version=_text(answer.get("version")),
        input=dict(echo) if isinstance(echo, Mapping) else None,
        output_urls=() if failure is not None and status.ended else _urls_in(opened, iter(range(_MAX_VALUES))),
        may_have_several=isinstance(opened, (list, Mapping)),
        failure=failure if status.ended else None,
        predict_time_seconds=_number(metrics.get("predict_time")),
        cost_usd=_number(metrics.get("cost")),
    )


@dataclass(frozen=True)
class Callback:
    """Where the vendor calls when an order has ended, and the secret of that one order."""

    url: str
    secret: str = field(repr=False)


@dataclass(frozen=True)
class ListedWebhook:
    """A row of GET /v1/webhooks: which execution calls which URL, and since when it is listed."""

    execution_id: str
    url: str
    created_at: datetime | None = None


def parse_webhooks(rows: Iterable[object]) -> tuple[ListedWebhook, ...]:
    """The rows of a page, newest first as sent; rows without a usable id or URL are left out."""
    listed = []
    for row in rows:
        if isinstance(row, Mapping) and isinstance(url := row.get("url"), str) and len(url) <= MAX_URL_CHARACTERS:
            found = parse_prediction_id(row.get("execution_id"))
            if found is not None:
                listed.append(ListedWebhook(found, url, parse_date(row.get("created_at"))))
    return tuple(listed)


def parse_date(text: object) -> datetime | None:
    """An RFC 3339 date of another's; None when it is none. Beyond these years reckoning ends in an OverflowError."""
    try:
        # Python 3.10 reads neither Z nor a fraction of other than three or six digits.
        six_digits = re.sub(r"\.(\d+)", lambda fraction: f".{fraction[1][:6]:0<6}", str(text).strip()[:64])
        date = datetime.fromisoformat(re.sub("[zZ]$", "+00:00", six_digits))
    except ValueError:
        return None
    return date if date.tzinfo is not None and 1970 <= date.year < 9000 else None


@dataclass(frozen=True)
class UploadSlot:
    """Where the API lets a picture be put.

    Attributes:
        presigned_url: Takes one PUT within 15 minutes; it is a secret.
        public_url: Where the picture is afterwards, for everybody who has the link.
        required_headers: Sent with the PUT exactly as they are, and no others that matter.
        expires_at: When the vendor deletes the picture; None: not told.
    """

    presigned_url: str = field(repr=False)
    public_url: str
    required_headers: dict[str, str]
    expires_at: datetime | None = None

    @classmethod
    def parse(cls, answer: object, *, may_be_http: bool) -> UploadSlot | None:
        """The API's answer; None when it lacks what is needed. `may_be_http`: the API is an emulator here."""
        if not isinstance(answer, Mapping):
            return None
        urls = [answer.get("presigned_url"), answer.get("public_url")]
        schemes = ("https://", "http://") if may_be_http else ("https://",)
        headers = answer.get("required_headers") or {}
        if not isinstance(headers, Mapping) or not all(isinstance(u, str) and u.startswith(schemes) for u in urls):
            return None
        fine = {str(name): str(value) for name, value in headers.items() if value is not None}
        return cls(str(urls[0]), str(urls[1]), fine, parse_date(answer.get("expires_at")))


@dataclass(frozen=True, slots=True)
class Execution:
    """One row of GET /v1/executions: every key of the organization, no input, one output at most.

    A walk keeps a hundred thousand of them, so they are small.
    """

    id: str
    status: PredictionStatus
    model: str | None = None
    status_word: str = ""
    cost_usd: float | None = None
    run_time_seconds: float | None = None
    created_at: datetime | None = None
    output_urls: tuple[str, ...] = ()


@functools.lru_cache(maxsize=64)
def _shared(text: str) -> str:
    """The one of several equal texts; not `sys.intern`, which Python 3.12 never frees: these words are others'."""
    return text


def parse_executions(rows: Iterable[object], of: Container[str] | None = None) -> tuple[Execution, ...]:
    """The rows of a page, newest first as sent, without those that have no usable id.

    `of`: only those of these ids are read.
    """
    executions = []
    turns = iter(range(_MAX_VALUES))
    # A page has a hundred rows and few different words: each is cleaned once, and kept once by whoever keeps pages.
    text = functools.cache(lambda said: _shared(_text(said) or ""))
    for row in rows:
        if not isinstance(row, Mapping) or (found := parse_prediction_id(row.get("id"))) is None:
            continue
        if of is None or found in of:
            output = _unwrap_json(row.get("output"))
            word = row.get("status")
            executions.append(
                Execution(
                    id=found,
                    model=text(model) if isinstance(model := row.get("model"), str) else _text(model),
                    status=parse_status(word),
                    status_word=_shared(visible(str(word)[:80])) if word is not None else "",
                    cost_usd=_number(row.get("execution_cost")),
                    run_time_seconds=_number(row.get("run_time")),
                    created_at=parse_date(row.get("created_at")),
                    output_urls=_urls_in(output, turns) if _failure_in(output) is None else (),
                )
            )
    return tuple(executions)


_SIGNED = re.compile(r"(?i)(^|&)(x-amz-signature|x-goog-signature|signature|sig)=")
_SIGNING = re.compile(
    "(?i)(x-amz-[^=]*|x-goog-[^=]*|awsaccesskeyid|googleaccessid|signature|expires|policy|key-pair-id"
    "|sig|se|sp|sr|ss|srt|st|sv|sip|spr|ske|skoid|sks|skt|sktid|skv)=.*"
)
"""What S3, Google, CloudFront and Azure write into a presigned URL."""


def without_signature(text: str) -> str:
    """A URL without what presigning wrote into its query, which changes each time; any other text as it is."""
    base, mark, query = text.partition("?")
    if not mark or not _SIGNED.search(query) or not is_http_url(text):
        return text
    kept = "&".join(part for part in query.split("&") if not _SIGNING.fullmatch(part))
    return f"{base}?{kept}" if kept else base


def canonical_json(value: object) -> bytes:
    """Sorted, compact, UTF-8: the one spelling that fingerprints are made of."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def fingerprint_of(model: str, version: str | None, input: Mapping[str, Any], *, sample: int = 1) -> str:
    """The first 32 hex digits of the SHA-256 of the canonical JSON of `{model, version, input}`.

    From the second sample of an input on, `sample` stands in that JSON as well.
    """
    body: dict[str, Any] = {"model": model, "version": version, "input": dict(input)}
    if sample != 1:
        body["sample"] = sample
    return hashlib.sha256(canonical_json(body)).hexdigest()[:32]


def _leaves(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield str(name)
            yield from _leaves(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _leaves(inner)


class Item(BaseModel):
    """One picture that is wanted. Make it with `Item.wanted`, which checks it.

    Attributes:
        item_id: The caller's, or the fingerprint.
        model: Sent to the API, unchanged.
        version: Sent to the API, unchanged.
        input: Sent to the API, unchanged, but for reference pictures: they stand here under a name that stays the
            same (`s3://bucket/key`, `sha256:DIGEST`, a URL without its signature).
        fingerprint: Stands for model, version, input and sample together.
        labels: The caller's own words about it; kept in record and report, never sent.
        sample: The number of this one among several of the same input, from 2 on; never sent.
        sources: Where the pictures are that `input` names: a file, bytes, or the signed URL. Never written down.
        sent_input: What the POST sends in place of `input`, once the pictures have URLs. Never written down.
    """

    model_config = ConfigDict(frozen=True)

    item_id: str
    model: str
    version: str | None
    input: dict[str, Any]
    fingerprint: str
    labels: dict[str, str] = Field(default_factory=dict)
    sample: int | None = None
    sources: dict[str, InstanceOf[Picture] | str] = Field(default_factory=dict, exclude=True, repr=False)
    sent_input: dict[str, Any] | None = Field(default=None, exclude=True, repr=False)

    @classmethod
    def wanted(
        cls,
        prompt: str | None = None,
        *,
        image_url: object = None,
        model: str = DEFAULT_MODEL,
        version: str | None = None,
        item_id: str | None = None,
        input: Mapping[str, Any] | None = None,
        labels: Mapping[str, str] | None = None,
        sample: int | None = None,
    ) -> Item:
        """An item whose input has been checked; costs nothing.

        Args:
            prompt: What the picture shows; the field `prompt` of the input.
            image_url: A reference picture: an http(s) URL, `s3://bucket/key`, a `Picture` or its bytes. The field
                `image_url` of the input; models that call it otherwise get it under their name.
            model: The model's slug; without a `version` the first model gets its own, others none.
            version: The model's version; left out of the request when None.
            item_id: 1 to 128 of `A-Z a-z 0-9 _ -`; the fingerprint when None.
            input: Further fields of the input, as the model wants them.
            labels: Words about the item that record and report keep.
            sample: The number of this one among several of the same input: 1 (as None), 2, ...

        Raises:
            BadInput: A blank prompt, a prompt that is no text, an image URL that is not http(s), an item id of
                another form, an input that is no JSON; says what, where and how to fix it.
        """
        fields: dict[str, Any] = dict(input or {})
        if prompt is not None:
            fields["prompt"] = prompt
        if image_url is not None:
            fields["image_url"] = image_url
        sources: dict[str, Picture | str] = {}
        for name in REFERENCE_FIELDS:
            if name in fields:
                fields[name] = _named(fields[name], sources)
        check_model_name(model)
        if version is None and model == DEFAULT_MODEL:
            version = DEFAULT_VERSION
        check_version(version)
        if "prompt" in fields or model == DEFAULT_MODEL:
            check_prompt(fields.get("prompt"))
        picture = fields.get("image_url")
        if "image_url" in fields and not (isinstance(picture, str) and picture in sources):
            check_image_url(picture)
        is_number = isinstance(sample, int) and not isinstance(sample, bool)
        if sample is not None and not (is_number and 1 <= sample <= 10_000):
            raise BadInput("sample: must be a number from 1 to 10,000, or left out.")
        try:
            _check_nesting(fields)
            for text in _leaves(fields):
                text.encode()
            fingerprint = fingerprint_of(model, version, fields, sample=sample or 1)
        except UnicodeEncodeError:
            raise BadInput("The input holds a lone surrogate (half a character): write it as valid Unicode.") from None
        except (TypeError, ValueError, RecursionError) as error:
            raise BadInput(f"The input is no JSON: {error}. Use text, numbers, lists and objects.") from None
        return cls(
            item_id=fingerprint if item_id is None else check_item_id(item_id),
            model=model,
            version=version,
            input=json.loads(canonical_json(fields)),
            fingerprint=fingerprint,
            labels=dict(labels or {}),
            sample=None if sample == 1 else sample,
            sources=sources,
        )

    def request_body(self) -> dict[str, Any]:
        """The body of the POST; `version` only when set."""
        sent = self.input if self.sent_input is None else self.sent_input
        body: dict[str, Any] = {"model": self.model, "input": sent}
        return body if self.version is None else {**body, "version": self.version}


def _check_nesting(value: object, depth: int = 0) -> None:
    """Raises BadInput for an input that a record could hold and nobody could read back."""
    if depth > MAX_INPUT_NESTING:
        raise BadInput(f"The input is nested more than {MAX_INPUT_NESTING} levels deep. Make it flatter.")
    for inner in value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ():
        if isinstance(inner, (Mapping, list, tuple)):
            _check_nesting(inner, depth + 1)


def _named(value: object, sources: dict[str, Picture | str]) -> object:
    """A reference picture's name that stays the same; `sources` remembers what it stands for."""
    if isinstance(value, bytes):
        value = Picture.of_bytes(value)
    if isinstance(value, Picture):
        sources[value.name] = value
        return value.name
    if isinstance(value, str) and (name := without_signature(value)) != value:
        sources[name] = value
        return name
    return [_named(inner, sources) for inner in value] if isinstance(value, (list, tuple)) else value


def check_prompt(prompt: object) -> str:
    """The prompt itself. Raises BadInput when it is missing, no text, or blank."""
    if prompt is None:
        raise BadInput("prompt: missing. Write what the picture shows.")
    if not isinstance(prompt, str):
        raise BadInput(f"prompt: must be text, not {type(prompt).__name__}.")
    if not any(unicodedata.category(character)[0] not in "ZC" for character in prompt):
        raise BadInput("prompt: empty or blank. Write what the picture shows.")
    return prompt


def check_image_url(url: object) -> str:
    """The URL itself. Raises BadInput when it is neither an absolute http(s) URL nor `s3://bucket/key`."""
    if not isinstance(url, str) or not (is_http_url(url) or parse_s3_name(url)):
        shown = f" {url[:80]!r}" if isinstance(url, str) and "@" not in url else ""
        raise BadInput(
            f"image_url:{shown} is not an http(s) URL or s3://bucket/key. Give the public https URL of a reference "
            "picture, its name in a bucket, or (in Python) its bytes."
        )
    return url


def check_item_id(item_id: object) -> str:
    """The item id itself. Raises BadInput when it is of another form."""
    if not isinstance(item_id, str) or not ITEM_ID_PATTERN.fullmatch(item_id):
        raise BadInput(
            f"item_id: {str(item_id)[:140]!r} must be 1 to 128 of A-Z a-z 0-9 _ - (it names files), such as "
            f"{item_id_of(item_id)!r}, which `prefect_eachlabs.models.item_id_of` makes of it."
        )
    return item_id


def item_id_of(name: object) -> str:
    """An item id for what has another name elsewhere: an SKU such as `AB/12.3`, a path, a number.

    The same name has the same id, always, and other names have others. What is an id already stays as it is.

    >>> item_id_of("p-1"), item_id_of("AB/12.3")
    ('p-1', 'AB-12-3-298059af54')
    """
    text = str(name)
    if ITEM_ID_PATTERN.fullmatch(text):
        return text
    readable = re.sub("[^A-Za-z0-9_]+", "-", text).strip("-")[:80]
    return f"{readable}-{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:10]}".lstrip("-")


def check_model_name(model: object) -> str:
    """The model's slug itself. Raises BadInput when it is blank or no plain name."""
    if not isinstance(model, str) or not MODEL_PATTERN.fullmatch(model):
        raise BadInput("model: must be a model's slug, such as 'gemini'.")
    return model


def check_version(version: object) -> None:
    """Raises BadInput when a version is given that is no text."""
    if version is not None and (not isinstance(version, str) or not version.strip()):
        raise BadInput("version: must be text such as '2.0-flash-exp-image-generation', or left out.")


class Destination(BaseModel):
    """`s3://bucket/prefix`: where pictures, records and reports go.

    >>> Destination.parse("s3://acme/daily").image_key("a1")
    'daily/images/a1.png'
    """

    model_config = ConfigDict(frozen=True)

    bucket: str
    prefix: str = ""

    @classmethod
    def parse(cls, text: object) -> Destination:
        """Reads `s3://bucket` or `s3://bucket/prefix`.

        Raises:
            BadInput: It is something else.
        """
        if isinstance(text, Destination):
            return text
        scheme, _, rest = text.partition("://") if isinstance(text, str) else ("", "", "")
        bucket, _, prefix = rest.partition("/")
        prefix = prefix.strip("/")
        fine = scheme == "s3" and BUCKET_PATTERN.fullmatch(bucket) is not None
        # It names objects and is shown in logs: characters that move terminals have no place in it.
        fine = fine and visible(prefix) == prefix and not set("?#") & set(prefix) and len(prefix.encode()) <= 700
        # Some stores resolve dots, and would end elsewhere than where it seems to lead.
        if not fine or {".", ".."} & set(prefix.split("/")):
            raise BadInput(f"destination: {str(text)[:120]!r} must be s3://BUCKET or s3://BUCKET/PREFIX.")
        return cls(bucket=bucket, prefix=prefix)

    def key(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name

    def uri(self, key: str) -> str:
        return f"s3://{self.bucket}/{key}"

    def image_key(self, item_id: str, number: int = 1, suffix: str = "png") -> str:
        return self.key(f"images/{item_id}{'' if number == 1 else f'.{number}'}.{suffix}")

    def stored_key(self, uri: str) -> str:
        """The key of a stored picture, by its URI or its file's name; the same after it was copied here."""
        return self.key(f"images/{uri.rpartition('/')[2]}")

    def record_key(self, item_id: str) -> str:
        return self.key(f"records/{item_id}.json")

    def __str__(self) -> str:
        return self.uri(self.prefix) if self.prefix else f"s3://{self.bucket}"


class Media(BaseModel):
    """A whole file: verified to be one picture of its format, or as it came, without a size in pixels."""

    model_config = ConfigDict(frozen=True)

    data: bytes = Field(repr=False)
    sha256: str
    width_px: int | None = None
    height_px: int | None = None
    format: str = "png"
    verified: bool = True


class StoredImage(BaseModel):
    """A picture, or what else a prediction put out, that is safe in the bucket.

    Attributes:
        item_id: The item, or the prediction's id where no item was named.
        uri: `s3://bucket/key` of the picture; `more_uris` of further outputs of the same prediction.
        format: `png`, or what else the model gave: `jpeg`, `mp4`, `wav`, `glb`, ...
        verified: Its bytes were seen to be a whole picture; False: stored as it came, with its length checked.
        sha256: Hex digest of the stored bytes, which are the downloaded bytes unchanged.
        cost_usd: What the API says it cost; None while it has not told.
        predict_time_seconds: The model's own time, when told.
        reused: True when it was bought earlier: nothing was bought by this call.
        bought_by: The id of the run that was billed for it, where its record says so.
    """

    model_config = ConfigDict(frozen=True)

    item_id: str
    prediction_id: str
    uri: str
    sha256: str
    size_bytes: int
    width_px: int | None = None
    height_px: int | None = None
    cost_usd: float | None = None
    predict_time_seconds: float | None = None
    model: str | None = None
    prompt: str | None = None
    more_uris: tuple[str, ...] = ()
    format: str = "png"
    verified: bool = True
    reused: bool = False
    bought_by: str | None = None

    @property
    def size(self) -> str:
        """`512 x 512 px`; of what is not a picture `1.2 MB of MP4`."""
        if self.width_px:
            return f"{self.width_px} x {self.height_px} px"
        return f"{self.size_bytes / 1e6:.1f} MB of {self.format.upper()}"
