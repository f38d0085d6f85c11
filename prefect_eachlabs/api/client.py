"""Speaks the API's endpoints: one coroutine each, one request each; no retries, no sleeping, no limits.

What an answer means for money is decided here, once: `NotSent` (repeat freely), `OutcomeUnknown` (never repeat),
`Throttled` (nothing was created), `Rejected` (fix it), `Unanswered` (a question, ask again).
"""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from collections.abc import Container, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from functools import lru_cache
from importlib import metadata
from typing import Any
from urllib.parse import quote, urlsplit

import httpx

from prefect_eachlabs.api.single_flight import SingleFlight
from prefect_eachlabs.api.suspension import within_running_seconds
from prefect_eachlabs.errors import (
    BODY_LIMIT_CHARACTERS,
    EachlabsError,
    InsufficientBalance,
    KeyRefused,
    NotSent,
    OutcomeUnknown,
    Rejected,
    SetupError,
    Throttled,
    Unanswered,
)
from prefect_eachlabs.limits.limiter import RateLimiter
from prefect_eachlabs.models import (
    Callback,
    Execution,
    Item,
    ListedWebhook,
    Prediction,
    UploadSlot,
    created_id,
    parse_executions,
    parse_prediction,
    parse_webhooks,
)
from prefect_eachlabs.net import redaction, safe_json
from prefect_eachlabs.net.bodies import ENCODINGS, decoded, encoding_of
from prefect_eachlabs.net.pools import pools
from prefect_eachlabs.net.public_get import NoCookies
from prefect_eachlabs.net.public_only import is_loopback
from prefect_eachlabs.settings import DEFAULT_BASE_URL, AccountSettings

logger = logging.getLogger(__name__)

MAX_ANSWER_BYTES = 8 * 1024 * 1024
"""A page of 100 executions is some 50 kB; more than this is not read."""
MAX_INFLATED_BYTES = 1024 * 1024
"""Of an answer that comes encoded, though none was asked for: 1 kB of it may stand for all that is taken."""
PIECES_A_TURN = 100
"""Of an answer, before the event loop has its turn."""
MAX_ROWS = 1_000
"""Of a page; 100 are asked for."""

CONNECT_TIMEOUT_SECONDS = 10.0
READ_TIMEOUT_SECONDS = 75.0
"""Long enough for a GET that the API holds open until the end ("long-polling")."""
POOL_TIMEOUT_SECONDS = 30.0
_LOST = (asyncio.TimeoutError, httpx.HTTPError, httpx.InvalidURL, UnicodeError)
"""What a request that was sent may end in: httpx reads the Location of redirects that it does not follow, too."""


@lru_cache(maxsize=1)
def user_agent() -> str:
    """`prefect-eachlabs/VERSION`, from the installed package."""
    try:
        return f"prefect-eachlabs/{metadata.version('prefect-eachlabs')}"
    except metadata.PackageNotFoundError:
        return "prefect-eachlabs"


def parse_retry_after(value: str | None, *, now: datetime | None = None) -> float | None:
    """Seconds to wait, from a `Retry-After` of seconds or an HTTP date (RFC 9110, 10.2.3); None when unreadable."""
    text = (value or "").strip()
    if not text:
        return None
    if text.replace(".", "", 1).isdigit() and text.isascii():
        return float(text) if len(text) < 12 else None
    try:
        until = parsedate_to_datetime(text)
    except (TypeError, ValueError, IndexError, OverflowError):
        return None
    if until.tzinfo is None:
        until = until.replace(tzinfo=timezone.utc)
    return max(0.0, (until - (now or datetime.now(timezone.utc))).total_seconds())


class Answer:
    """One HTTP answer, read within bounds, without the secrets that it may quote."""

    def __init__(self, response: httpx.Response, body: bytes, *, whole: bool) -> None:
        self.status_code = response.status_code
        self.headers = response.headers
        self._body = body
        self.json: object = None
        self.is_json = False
        if whole:
            try:
                self.json = safe_json.loads(body)
                self.is_json = True
            except (ValueError, RecursionError):
                pass

    @property
    def ok(self) -> bool:
        return 200 <= self.status_code < 300

    def details(self) -> str:
        """What the API says went wrong, in its own words; of a body that is not JSON, its start."""
        if isinstance(self.json, Mapping):
            words = [self.json.get(name) for name in ("error", "message", "details")]
            said = "; ".join(w if isinstance(w, str) else json.dumps(w, ensure_ascii=False) for w in words if w)
        else:
            # Cut after it was cleaned: half a secret is not known any more.
            said = redaction.without_secrets(self._body.decode("utf-8", "replace")).strip()
            head = said[: 4 * BODY_LIMIT_CHARACTERS].lower()
            if "<html" in head or "<!doctype" in head:
                return "an HTML page"
        return redaction.visible(said[:BODY_LIMIT_CHARACTERS])[:BODY_LIMIT_CHARACTERS]

    def rows(self, name: str) -> list[Any]:
        """The rows of a page, under this name or bare. Raises Unanswered when there are none that can be read."""
        rows = self.json.get(name) if isinstance(self.json, Mapping) else self.json
        if not isinstance(rows, list):
            raise Unanswered(f"The API's list of {name} is unreadable; ask again.")
        return rows[:MAX_ROWS]

    def date(self) -> datetime | None:
        """When the API answered, by its own clock (`Date`)."""
        try:
            sent_at = parsedate_to_datetime(self.headers["date"])
        except (KeyError, TypeError, ValueError, IndexError, OverflowError):
            return None
        if not 1970 <= sent_at.year < 9000:
            return None  # it is reckoned with, which ends in an OverflowError
        return sent_at.replace(tzinfo=timezone.utc) if sent_at.tzinfo is None else sent_at

    def retry_after_seconds(self) -> float | None:
        """Counted from the answer's own `Date`, so that our clock's error does not matter."""
        return parse_retry_after(self.headers.get("retry-after"), now=self.date())


@dataclass(frozen=True)
class ExecutionsPage:
    """One page of executions.

    Attributes:
        rows: Those with a usable id.
        row_count: How many rows the answer had.
        date: When the API answered, by its own clock.
        limit: The most rows that its pages have, by its own word.
        total_count: How many rows there are, by its own word.
    """

    rows: tuple[Execution, ...]
    row_count: int
    date: datetime | None = None
    limit: int | None = None
    total_count: int | None = None

    def is_last(self, offset: int) -> bool:
        """Whether the list ends with this page, the rows before `offset` having been read with it."""
        if self.row_count == 0:
            return True
        if self.total_count is not None:
            return offset >= self.total_count
        return self.limit is not None and self.row_count < self.limit


class EachlabsClient:
    """The API of one account, asynchronously, over connections that are kept.

    Args:
        settings: The account; its key goes to the host of `base_url` alone, redirects are never followed.
        transport: Replaces the network (tests, recording); also gets the key, so hand in only what you trust.
        anonymous: Send no key: the catalogue of models is public.
    """

    def __init__(
        self,
        settings: AccountSettings,
        *,
        transport: httpx.AsyncBaseTransport | None = None,
        anonymous: bool = False,
    ) -> None:
        key = settings.api_key.get_secret_value()
        redaction.install()
        redaction.hide(key)
        auth = {"X-API-Key": key} if settings.auth_scheme == "x-api-key" else {"Authorization": f"Bearer {key}"}
        if anonymous:
            auth = {}
        self._post_seconds = settings.post_given_up_after_seconds
        self._host = urlsplit(settings.base_url).hostname or ""
        self._where = f"{urlsplit(settings.base_url).netloc} (EACHLABS_BASE_URL)"
        self._hint = " Is `prefect-eachlabs emulator` running?" if is_loopback(self._host) else ""
        self._auth_headers = tuple(auth)
        self.orders_sent = 0
        """While it is 0, nothing can have been bought."""
        # Whoever hands in a transport knows what is at its end.
        self._checked: SingleFlight[str, None] = SingleFlight()
        self._is_known = settings.base_url == DEFAULT_BASE_URL or transport is not None
        connections = 100 if settings.max_in_flight is None else min(settings.max_in_flight + 20, 200)
        # A proxy from the environment must not see what goes to an emulator on this machine.
        trust_env = not is_loopback(self._host)
        self._http = httpx.AsyncClient(
            base_url=settings.base_url,
            headers={
                **auth,
                "User-Agent": user_agent(),
                "Accept": "application/json",
                "Accept-Encoding": "identity",
            },
            timeout=httpx.Timeout(
                READ_TIMEOUT_SECONDS, connect=CONNECT_TIMEOUT_SECONDS, write=30.0, pool=POOL_TIMEOUT_SECONDS
            ),
            limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
            follow_redirects=False,
            cookies=NoCookies(),
            transport=transport or pools(connections, trust_env=trust_env),
            trust_env=trust_env,
        )

    def __repr__(self) -> str:
        return f"EachlabsClient({str(self._http.base_url)!r})"

    async def aclose(self) -> None:
        """Closes the connections."""
        await self._checked.aclose()
        await self._http.aclose()

    async def check_api(self, limiter: RateLimiter | None = None) -> None:
        """Whether the Eachlabs API is at the base URL: asks for the catalogue, without the key. Free; a request.

        Before the first order alone it can tell: what answered an order strangely may have passed it on all the same.

        Args:
            limiter: Counts the request; None: whoever has no key has no limit.

        Raises:
            SetupError: Something else is there for sure: it answers with a page, or with what is no catalogue.
            NotSent: Nothing is there.
        """
        if not self._is_known:
            await self._checked.get("", lambda: self._look(limiter))

    async def _look(self, limiter: RateLimiter | None) -> None:
        async def asked() -> Answer:
            sent = self._send("GET", "/v1/models", params={"limit": 1}, with_key=False)
            return await asyncio.wait_for(sent, READ_TIMEOUT_SECONDS)

        try:
            answer = await (asked() if limiter is None else limiter.asked(asked))
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
            raise NotSent(
                f"The API at {self._where} could not be reached ({_reason(error)}); nothing was created.{self._hint}"
            ) from error
        except _LOST:
            return  # it proves nothing
        said = answer.json.get("models") if isinstance(answer.json, Mapping) else answer.json
        is_another = not isinstance(said, list) if answer.ok else 400 <= answer.status_code < 500 and not answer.is_json
        if is_another:
            what = "an XML document" if answer.details().startswith("<?xml") else answer.details()[:80] or "nothing"
            raise SetupError(
                f"This is not the Eachlabs API: {self._where} answered HTTP {answer.status_code} with {what}. Set "
                "EACHLABS_BASE_URL to where the API is. Nothing was bought.",
                status_code=answer.status_code,
            )

    async def create(self, item: Item, callback: Callback | None = None) -> Prediction:
        """POST /v1/prediction/: buys one prediction. **Costs money** and is not idempotent.

        Args:
            item: What is wanted.
            callback: Whom the vendor calls at its end; None: nobody.

        Raises:
            NotSent: No connection came about; nothing was created.
            Throttled, InsufficientBalance: 429, 402; nothing was created.
            Rejected, KeyRefused: Another 3xx or 4xx; nothing was created.
            SetupError: A 404 or 405 that is not the API's own (a page of another server); nothing was created.
            OutcomeUnknown: Sent, and then a cut, a time-out, a 5xx, or a 2xx without an id. Never repeat it.
        """
        self.orders_sent += 1
        try:
            webhook = {"webhook_url": callback.url, "webhook_secret": callback.secret} if callback is not None else {}
            order = self._send("POST", "/v1/prediction/", json_body={**item.request_body(), **webhook})
            answer = await within_running_seconds(order, self._post_seconds)
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.UnsupportedProtocol) as error:
            raise NotSent(
                f"The API at {self._where} could not be reached ({_reason(error)}); nothing was created.{self._hint}",
                item_id=item.item_id,
            ) from error
        except _LOST as error:
            raise OutcomeUnknown(
                f"The order went out and its answer was lost ({_reason(error)}): it may have been billed. "
                "It is not repeated before the account's executions have been searched.",
                item_id=item.item_id,
            ) from error
        if answer.ok and (prediction_id := created_id(answer.json)) is not None:
            return Prediction(
                id=prediction_id,
                status_word="created",
                model=item.model,
                version=item.version,
                input=item.input,
                created_at=datetime.now(timezone.utc),
                item_id=item.item_id,
            )
        error_now = self._refusal(answer, to_an_order=True)
        if error_now is None:
            raise OutcomeUnknown(
                f"The order was answered with HTTP {answer.status_code} and no id: it may have been billed. "
                "It is not repeated before the account's executions have been searched.",
                item_id=item.item_id,
                status_code=answer.status_code,
                details=answer.details(),
            )
        error_now.item_id = item.item_id
        raise error_now

    async def get(self, prediction_id: str) -> Prediction:
        """GET /v1/prediction/{id}: what has become of it. Free; the API may hold the answer back until the end.

        Raises:
            Unanswered: No readable answer: ask again.
            Throttled: 429: ask later.
            Rejected, KeyRefused: Another 4xx; 404: the API does not know the id (yet).
        """
        answer = await self._ask(f"/v1/prediction/{quote(prediction_id, safe='')}", prediction_id=prediction_id)
        if not isinstance(answer.json, Mapping):
            raise Unanswered("The API's answer is not a JSON object.", prediction_id=prediction_id)
        return parse_prediction(answer.json, prediction_id=prediction_id)

    async def cancel(self, prediction_id: str) -> None:
        """POST /v1/prediction/{id}/cancel: asks for a stop, best effort; only GET tells how it ended. Free.

        Raises:
            Unanswered: No readable answer; asking again is safe.
            Throttled, Rejected, KeyRefused: As for `get`.
        """
        path = f"/v1/prediction/{quote(prediction_id, safe='')}/cancel"
        await self._ask(path, prediction_id=prediction_id, method="POST", needs_json=False)

    async def executions(
        self, *, limit: int = 100, offset: int = 0, model: str | None = None, of: Container[str] | None = None
    ) -> tuple[Execution, ...]:
        """The rows of `executions_page`; with `of` they do not tell how many rows the page had."""
        return (await self.executions_page(limit=limit, offset=offset, model=model, of=of)).rows

    async def executions_page(
        self,
        *,
        limit: int = 100,
        offset: int = 0,
        model: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        of: Container[str] | None = None,
    ) -> ExecutionsPage:
        """GET /v1/executions: one page, newest first, of all keys of the organization. Free.

        Args:
            limit: Rows wanted, 1 to 100; the API may give fewer.
            offset: Rows to pass over.
            model: Only of this model; None: of all.
            since: Only what was created from then on; None: as far back as the vendor lists (90 days).
            until: Only what was created up to then; None: up to now.
            of: Only the rows of these ids are read; `row_count` counts all. None: all are read.

        Raises:
            Unanswered, Throttled, Rejected, KeyRefused: As for `get`; 404: this API has no such endpoint.
        """
        only = {"model": model, "from": _rfc3339(since), "to": _rfc3339(until)}
        params: dict[str, int | str] = {"limit": limit, "offset": offset}
        params |= {name: value for name, value in only.items() if value is not None}
        answer = await self._ask("/v1/executions", params=params)
        rows, said = answer.rows("executions"), answer.json if isinstance(answer.json, Mapping) else {}
        total = None if said.get("total_capped") is True else _count(said.get("total_count"))
        return ExecutionsPage(parse_executions(rows, of), len(rows), answer.date(), _count(said.get("limit")), total)

    async def webhooks(self, *, limit: int = 100, offset: int = 0) -> tuple[tuple[ListedWebhook, ...], int]:
        """GET /v1/webhooks: one page of the webhooks of the organization, newest first, and its row count. Free.

        Raises:
            Unanswered, Throttled, Rejected, KeyRefused: As for `get`; 404: this API has no such endpoint.
        """
        answer = await self._ask("/v1/webhooks", params={"limit": limit, "offset": offset})
        rows = answer.rows("webhooks")
        return parse_webhooks(rows), len(rows)

    async def model(self, slug: str) -> Mapping[str, Any]:
        """GET /v1/model: one model of the catalogue, as the API describes it. Free; public.

        Raises:
            Unanswered, Throttled, Rejected, KeyRefused: As for `get`; 404: there is no such model.
        """
        answer = await self._ask("/v1/model", params={"slug": slug})
        if not isinstance(answer.json, Mapping):
            raise Unanswered(f"The API's description of model {slug!r} is unreadable; ask again.")
        return answer.json

    async def models(self, name: str = "", *, limit: int = 100, offset: int = 0) -> list[Any]:
        """GET /v1/models: one page of the catalogue, of models whose name contains `name`. Free; public.

        Raises:
            Unanswered, Throttled, Rejected, KeyRefused: As for `get`.
        """
        params: dict[str, int | str] = {"limit": limit, "offset": offset}
        return (await self._ask("/v1/models", params={**params, "name": name} if name else params)).rows("models")

    async def presign(self, *, content_type: str, expires_in_seconds: int) -> UploadSlot:
        """POST /v1/upload/presign: where a picture may be put, and where it is public then. Free.

        Args:
            content_type: The picture's media type.
            expires_in_seconds: How long the vendor keeps it: 60 s to 365 days.

        Raises:
            Unanswered, Throttled, Rejected, KeyRefused: As for `get`; asking again is safe.
        """
        body = {"content_type": content_type, "file_type": "image", "expires_in_seconds": expires_in_seconds}
        answer = await self._ask("/v1/upload/presign", method="POST", json_body=body)
        slot = UploadSlot.parse(answer.json, may_be_http=is_loopback(self._host))
        if slot is None:
            raise Unanswered("The API's answer to an upload's request names no URL to put the picture; ask again.")
        return slot

    async def _ask(
        self,
        path: str,
        *,
        prediction_id: str | None = None,
        method: str = "GET",
        params: Mapping[str, int | str] | None = None,
        json_body: Mapping[str, Any] | None = None,
        needs_json: bool = True,
    ) -> Answer:
        try:
            answer = await asyncio.wait_for(
                self._send(method, path, params=params, json_body=json_body),
                timeout=READ_TIMEOUT_SECONDS + CONNECT_TIMEOUT_SECONDS,
            )
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
            raise NotSent(
                f"The API at {self._where} could not be reached ({_reason(error)}).{self._hint}",
                prediction_id=prediction_id,
            ) from error
        except _LOST as error:
            raise Unanswered(
                f"The API's answer was lost ({_reason(error)}); ask again.", prediction_id=prediction_id
            ) from error
        # The API's own 404 is JSON: a page says nothing about a prediction, but that something else answered.
        elsewhere = prediction_id is not None and answer.status_code == 404 and not isinstance(answer.json, Mapping)
        refusal = None if answer.ok or elsewhere else self._refusal(answer)
        if refusal is not None:
            refusal.prediction_id = prediction_id
            raise refusal
        if not answer.ok or (needs_json and not answer.is_json):
            raise Unanswered(
                f"The API answered HTTP {answer.status_code} without a readable result; ask again.",
                prediction_id=prediction_id,
                status_code=answer.status_code,
                details=answer.details(),
            )
        return answer

    def _refusal(self, answer: Answer, *, to_an_order: bool = False) -> EachlabsError | None:
        """The error of an answer that says for sure that nothing was done; None when it does not say so."""
        status, details = answer.status_code, answer.details()
        said = f": {details}" if details else ""
        nothing = " Nothing was created or billed." if to_an_order else ""
        kind: type[EachlabsError] = Rejected
        retry_after_seconds = None
        if status == 429:
            kind = Throttled
            message = f"The account is at its limit (HTTP 429){said}."
        elif status == 402:
            kind = InsufficientBalance
            message = (
                f"The balance does not cover what is in flight (HTTP 402){said}. Top it up at the vendor's dashboard, "
                "then run again."
            )
        elif status in (401, 403):
            kind = KeyRefused
            message = (
                f"The API at {self._where} does not accept the key (HTTP {status}){said}. Check EACHLABS_API_KEY "
                "(or the credentials block) and EACHLABS_AUTH_SCHEME."
            )
        elif 300 <= status < 400:
            details = ""
            message = (
                f"The API at {self._where} answers with a redirect (HTTP {status}), which is never followed with a "
                "key in hand. Set EACHLABS_BASE_URL to where the API really is."
            )
        elif to_an_order and status in (404, 405) and not isinstance(answer.json, Mapping):
            # The API's own refusals are JSON: this is some other server's page, and no fault of the item.
            kind = SetupError
            message = (
                f"{self._where} does not take orders (HTTP {status}, {details or 'an empty page'}). Set "
                "EACHLABS_BASE_URL to where the API is; if it is right, the API is being repaired: run again later."
            )
        elif 400 <= status < 500 and status != 408:
            advice = "Fix it." if to_an_order else "Check what was asked for."
            message = f"The API refused the request (HTTP {status}){said}. {advice}"
        else:
            return None
        if issubclass(kind, Throttled):
            retry_after_seconds = answer.retry_after_seconds()
        return kind(message + nothing, status_code=status, details=details, retry_after_seconds=retry_after_seconds)

    async def _send(
        self,
        method: str,
        path: str,
        *,
        json_body: Mapping[str, Any] | None = None,
        params: Mapping[str, int | str] | None = None,
        with_key: bool = True,
    ) -> Answer:
        request_id = str(uuid.uuid4())
        content = None if json_body is None else json.dumps(json_body, ensure_ascii=False, allow_nan=False).encode()
        headers = {"X-Request-Id": request_id}
        if content is not None:
            headers["Content-Type"] = "application/json"
        request = self._http.build_request(method, path, content=content, params=params, headers=headers)
        for name in () if with_key else self._auth_headers:
            del request.headers[name]
        response = await self._http.send(request, stream=True)
        try:
            body, whole = await _read(response)
        finally:
            await response.aclose()
        answer = Answer(response, body, whole=whole)
        logger.debug("%s %s: HTTP %s, request id %s", method, path, answer.status_code, request_id)
        return answer


def _rfc3339(moment: datetime | None) -> str | None:
    return None if moment is None else moment.astimezone(timezone.utc).isoformat().replace("+00:00", "Z")


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


async def _read(response: httpx.Response) -> tuple[bytes, bool]:
    """What an answer holds, and whether that is all of it and could be decoded."""
    encoding = encoding_of(response)
    if encoding not in ENCODINGS and not response.is_stream_consumed:
        # So few characters that no key is among them.
        return f"the answer is encoded ({encoding[:12]}), which was not asked for".encode(), False
    most_bytes = MAX_ANSWER_BYTES if encoding == "identity" else MAX_INFLATED_BYTES
    body, pieces = bytearray(), 0
    async for piece in decoded(response):
        pieces += 1
        if not pieces % PIECES_A_TURN:
            await asyncio.sleep(0)  # those that have come already are read without a pause, one byte each perhaps
        body += piece
        if len(body) > most_bytes:
            return bytes(body) if encoding == "identity" else b"the answer is encoded, and too large", False
    return bytes(body), True


def _reason(error: BaseException) -> str:
    """A short reason that holds no URL."""
    if isinstance(error, (asyncio.TimeoutError, httpx.TimeoutException)):
        return "time-out"
    # Cleaned before it is cut: of a key that is cut in two nothing would be found.
    return redaction.without_secrets(str(error).split("http", 1)[0].strip() or type(error).__name__)[:200]
