"""Fetches a picture by its URL and verifies it while it comes; no API key and no cookie goes with the request.

Nothing is repeated here: a picture that did not come whole is an error that keeps the prediction's id and the URL,
and the task that wanted it runs again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from http.cookiejar import CookieJar, DefaultCookiePolicy

import httpx

from prefect_eachlabs.errors import DownloadFailed, FormatNotAllowed, HostNotAllowed, NotAPng, without_query
from prefect_eachlabs.images.formats import FORMATS, PNG_ALONE, FormatRefused, MediaError, MediaReader
from prefect_eachlabs.images.png import MAX_BYTES, PngError
from prefect_eachlabs.models import Media
from prefect_eachlabs.net import redaction
from prefect_eachlabs.net.public_only import SETTING, GuardedTransport, HostGuard, HostRefused

MAX_REDIRECTS = 5
COSTLY_ATTEMPTS = 2
"""So often a process verifies a large picture that turns out not to be whole; retries must not multiply its cost."""
REMEMBERED_REFUSALS = 1_000
RETENTION_HOURS = 24
"""The vendor's documentation: outputs are kept at least so long."""


class Downloader:
    """Fetches PNGs over http(s); made once a process.

    Args:
        transport: Sends the requests (tests); the network, with the environment's proxies, when left out.
        max_bytes: The largest picture that is taken.
        total_seconds: For one picture, redirects included, from its first request to its last byte.
        read_seconds: The longest silence.
        connect_seconds: For one connection.
        max_at_once: So many pictures are fetched (and held in memory) at a time; the others wait, without limit.
        hosts: Which hosts may be asked, redirects too. When left out: public ones, and any by a given `transport`.
    """

    def __init__(
        self,
        transport: httpx.AsyncBaseTransport | None = None,
        *,
        max_bytes: int = MAX_BYTES,
        total_seconds: float = 60.0,
        read_seconds: float = 20.0,
        connect_seconds: float = 10.0,
        max_at_once: int = 16,
        hosts: HostGuard | None = None,
    ) -> None:
        redaction.install()
        if hosts is not None or transport is None:
            transport = GuardedTransport(hosts or HostGuard(), transport)
        self._transport = transport
        self._max_bytes = max_bytes
        self._total_seconds = total_seconds
        self._timeout = httpx.Timeout(read_seconds, connect=connect_seconds, pool=None)
        self._turns = asyncio.Semaphore(max_at_once)
        self._client: httpx.AsyncClient | None = None
        self._refused: dict[str, tuple[int, str]] = {}

    async def fetch_png(self, url: str, *, prediction_id: str | None = None, item_id: str | None = None) -> Media:
        """The verified PNG; see `fetch`."""
        return await self.fetch(url, prediction_id=prediction_id, item_id=item_id)

    async def fetch(
        self,
        url: str,
        *,
        formats: Sequence[str] = PNG_ALONE,
        prediction_id: str | None = None,
        item_id: str | None = None,
    ) -> Media:
        """The verified picture. Costs no request of the account's limit.

        Args:
            url: Where it is.
            formats: What it may be.
            prediction_id, item_id: For messages.

        Raises:
            FormatNotAllowed: What came is of another format.
            NotAPng: What came is not whole, or larger than `max_bytes`.
            DownloadFailed: It did not come, or not whole.
            HostNotAllowed: It is at a host of this network; nothing was asked there.
        """
        failed = partial(DownloadFailed, prediction_id=prediction_id, item_id=item_id, url=url)
        what = f"The picture of prediction {prediction_id}" if prediction_id else "The picture"
        wanted = " or ".join(FORMATS[name].title for name in formats)
        reader = MediaReader(formats, max_bytes=self._max_bytes)
        async with self._turns:
            try:
                self._check_refusals(url)
                return await asyncio.wait_for(self._fetch(url, reader, what, failed), self._total_seconds)
            except FormatRefused as error:
                raise FormatNotAllowed(
                    f"{what} is paid for and not stored: {error}. Allow it and run the same again, which buys nothing: "
                    f"--formats {','.join((*formats, error.format))}, "
                    f"formats=({', '.join(repr(name) for name in (*formats, error.format))}).",
                    prediction_id=prediction_id,
                    item_id=item_id,
                    url=url,
                ) from error
            except (PngError, MediaError) as error:
                if reader.is_costly:
                    self._remember_refusal(url, str(error))
                raise NotAPng(
                    f"{what} is paid for, but what came is no whole {wanted}: {error}. Nothing was stored; run again "
                    "to fetch it anew, and if it stays so, show the vendor the prediction's id.",
                    prediction_id=prediction_id,
                    item_id=item_id,
                    url=url,
                ) from error
            except (asyncio.TimeoutError, httpx.TimeoutException) as error:
                limit = f"within {self._total_seconds:g} s" if not isinstance(error, httpx.HTTPError) else "in time"
                raise failed(f"{what} did not come {limit} ({reader.size_bytes} bytes came): run again.") from error
            except HostRefused as error:
                raise HostNotAllowed(
                    f"{what} is said to be at {error}: nothing was asked there. The picture is paid for and its "
                    f"prediction is kept. If the host is yours, name it in {SETTING} on the machine that runs this "
                    "(a name, an address, a network) and run the same again, which buys nothing; if not, show the "
                    "vendor the prediction's id.",
                    prediction_id=prediction_id,
                    item_id=item_id,
                    url=url,
                ) from error
            except (httpx.HTTPError, httpx.InvalidURL, OSError, UnicodeError) as error:
                raise failed(
                    f"{what} could not be fetched after {reader.size_bytes} bytes ({type(error).__name__}: "
                    f"{str(error)[:200]}): run again within {RETENTION_HOURS} h."
                ) from error

    def _remember_refusal(self, url: str, reason: str) -> None:
        place = without_query(url)
        count, _ = self._refused.pop(place, (0, ""))
        self._refused[place] = (count + 1, reason)
        while len(self._refused) > REMEMBERED_REFUSALS:
            del self._refused[next(iter(self._refused))]

    def _check_refusals(self, url: str) -> None:
        count, reason = self._refused.get(without_query(url), (0, ""))
        if count >= COSTLY_ATTEMPTS:
            raise PngError(f"{reason} (seen {count} times; this process does not take it apart again)")

    async def _fetch(self, url: str, reader: MediaReader, what: str, failed: Callable[..., DownloadFailed]) -> Media:
        target = httpx.URL(url)
        for _ in range(MAX_REDIRECTS + 1):
            if target.scheme not in ("http", "https") or not target.host:
                raise failed(f"{what} is said to be at a URL that is not http(s) ({without_query(str(target))}).")
            client = self._opened_client()
            response = await client.send(client.build_request("GET", target), stream=True)
            try:
                if response.has_redirect_location:
                    target = target.join(response.headers["Location"])
                    continue
                self._check_answer(response, what, failed)
                async for piece in response.aiter_bytes():
                    await reader.feed_in_turns(piece)
                announced = _announced_bytes(response)
                if announced not in (None, reader.size_bytes):
                    raise failed(f"{what} came with {reader.size_bytes} bytes instead of {announced}: run again.")
                # A PNG was verified while it came.
                return await asyncio.to_thread(reader.finish) if reader.takes_long else reader.finish()
            finally:
                await response.aclose()
        raise failed(
            f"{what} is behind more than {MAX_REDIRECTS} redirects (the last to {without_query(str(target))})."
        )

    def _check_answer(self, response: httpx.Response, what: str, failed: Callable[..., DownloadFailed]) -> None:
        status_code = response.status_code
        if status_code in (403, 404, 410):
            raise failed(
                f"{what} is not there any more, or not for us (HTTP {status_code}). The vendor keeps outputs for "
                f"{RETENTION_HOURS} h: if the prediction is younger, run again; if not, the picture is lost.",
                status_code=status_code,
            )
        if status_code != httpx.codes.OK:
            raise failed(
                f"{what} could not be fetched (HTTP {status_code}): run again within {RETENTION_HOURS} h.",
                status_code=status_code,
            )
        encoding = response.headers.get("Content-Encoding", "identity").lower()
        if encoding != "identity":
            raise failed(f"{what} came encoded ({encoding[:40]}), which was not asked for: run again.")
        if (_announced_bytes(response) or 0) > self._max_bytes:
            raise PngError(f"it is larger than {self._max_bytes} bytes")

    def _opened_client(self) -> httpx.AsyncClient:
        if self._client is None:
            self._client = httpx.AsyncClient(
                transport=self._transport,
                timeout=self._timeout,
                follow_redirects=False,
                headers={
                    "Accept": "image/png, image/*;q=0.9, */*;q=0.1",
                    "Accept-Encoding": "identity",
                    "User-Agent": "prefect-eachlabs",
                },
                # A jar that takes no cookie from anybody.
                cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
            )
        return self._client

    async def aclose(self) -> None:
        """Closes its connections; a later fetch opens new ones."""
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()


def _announced_bytes(response: httpx.Response) -> int | None:
    length = response.headers.get("Content-Length", "")
    return int(length) if len(length) < 20 and length.isascii() and length.isdigit() else None
