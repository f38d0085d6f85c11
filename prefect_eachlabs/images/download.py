"""Fetches an output by its URL and verifies it while it comes; no API key and no cookie goes with the request.

Nothing is repeated here: a picture that did not come whole is an error that keeps the prediction's id and the URL,
and the task that wanted it runs again.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from typing import Any

import httpx

from prefect_eachlabs.errors import DownloadFailed, FormatNotAllowed, HostNotAllowed, NotAPng, without_query
from prefect_eachlabs.images.formats import PNG_ALONE, FormatRefused, MediaReader, wanted_words
from prefect_eachlabs.images.png import MAX_BYTES, MediaError
from prefect_eachlabs.models import Media
from prefect_eachlabs.net.bodies import ENCODINGS, byte_count, decoded, encoding_of
from prefect_eachlabs.net.public_get import LeadsNowhere, PublicWeb
from prefect_eachlabs.net.public_only import SETTING, HostGuard, HostRefused

TOTAL_SECONDS = 1800.0
"""No host holds a slot for longer; the largest picture needs 150 kB a second for that."""
WINDOW_SECONDS = 60.0
SILENCE_SECONDS = 20.0
CONNECT_SECONDS = 10.0
SLOWEST_BYTES_PER_SECOND = 8192
"""Of a picture that takes longer than a window: what comes more slowly than that does not come."""
LARGE_BYTES = 64 * 1024 * 1024
"""Larger ones are in memory one at a time."""
MOST_INFLATED = 20
"""A picture is compressed already, and text comes to a tenth: what inflates to more than so many times what was sent,
and 1 MiB, is a bomb."""
WALKS_AT_A_TIME = 2
"""Formats that are not verified while they come; more threads would leave less of the processor to the loop."""
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
        window_seconds: For the answer's head; and in each of these 8 kB a second must come.
        hosts: Which hosts may be asked, redirects too. When left out: public ones, and any by a given `transport`.
    """

    def __init__(
        self,
        transport: httpx.AsyncBaseTransport | None = None,
        *,
        max_bytes: int = MAX_BYTES,
        total_seconds: float = TOTAL_SECONDS,
        window_seconds: float = WINDOW_SECONDS,
        hosts: HostGuard | None = None,
    ) -> None:
        self._web = PublicWeb(
            transport,
            hosts,
            timeout=httpx.Timeout(SILENCE_SECONDS, connect=CONNECT_SECONDS, pool=None),
            accept="image/png, image/*;q=0.9, */*;q=0.1",
        )
        self._max_bytes = max_bytes
        self._total_seconds = total_seconds
        self._window_seconds = window_seconds
        self._large = asyncio.Lock()
        self._walks = asyncio.Semaphore(WALKS_AT_A_TIME)
        self._refused: dict[str, tuple[int, str]] = {}

    async def fetch(
        self,
        url: str,
        *,
        formats: Sequence[str] | None = PNG_ALONE,
        prediction_id: str | None = None,
        item_id: str | None = None,
    ) -> Media:
        """The whole file, verified where it is a picture. Costs no request of the account's limit.

        Args:
            url: Where it is.
            formats: What it may be; None: whatever it is.
            prediction_id, item_id: For messages.

        Raises:
            FormatNotAllowed: What came is of another format.
            NotAPng: What came is not whole, or larger than `max_bytes`.
            DownloadFailed: It did not come, or not whole.
            HostNotAllowed: It is at a host of this network; nothing was asked there.
        """
        about: dict[str, Any] = {"prediction_id": prediction_id, "item_id": item_id, "url": url}

        def failed(message: str, **more: Any) -> DownloadFailed:
            return DownloadFailed(message, **about, **more)

        what = f"The picture of prediction {prediction_id}" if prediction_id else "The picture"
        reader = MediaReader(formats, max_bytes=self._max_bytes)
        try:
            count, reason = self._refused.get(without_query(url), (0, ""))
            if count >= COSTLY_ATTEMPTS:
                raise MediaError(f"{reason} (seen {count} times; this process does not take it apart again)")
            return await asyncio.wait_for(self._fetch(url, reader, what, failed), self._total_seconds)
        except FormatRefused as error:
            raise FormatNotAllowed(
                f"{what} is paid for and not stored: {error}. Allow it and run the same again, which buys nothing: "
                f"--formats {','.join((*(formats or ()), error.format))}, "
                f"formats=({', '.join(repr(name) for name in (*(formats or ()), error.format))}).",
                **about,
            ) from error
        except MediaError as error:
            if reader.is_costly:
                place = without_query(url)
                self._refused[place] = (self._refused.pop(place, (0, ""))[0] + 1, str(error))
                while len(self._refused) > REMEMBERED_REFUSALS:
                    del self._refused[next(iter(self._refused))]
            raise NotAPng(
                f"{what} is paid for, but what came is not a whole {wanted_words(formats)}: {error}. Nothing was "
                "stored; run again to fetch it anew, and if it stays so, show the vendor the prediction's id.",
                **about,
            ) from error
        except LeadsNowhere as error:
            raise failed(f"{what} {error.reason} ({without_query(error.url)}).") from error
        except (asyncio.TimeoutError, httpx.TimeoutException) as error:
            raise failed(f"{what} did not come in time ({reader.size_bytes} bytes came): run again.") from error
        except HostRefused as error:
            raise HostNotAllowed(
                f"{what} is said to be at {error}: nothing was asked there. The picture is paid for and its "
                f"prediction is kept. If the host is yours, name it in {SETTING} on the machine that runs this "
                "(a name, an address, a network) and run the same again, which buys nothing; if not, show the "
                "vendor the prediction's id.",
                **about,
            ) from error
        except (httpx.HTTPError, httpx.InvalidURL, OSError, UnicodeError) as error:
            raise failed(
                f"{what} could not be fetched after {reader.size_bytes} bytes ({type(error).__name__}: "
                f"{str(error)[:200]}): run again within {RETENTION_HOURS} h."
            ) from error

    async def _fetch(self, url: str, reader: MediaReader, what: str, failed: Callable[..., DownloadFailed]) -> Media:
        async with AsyncExitStack() as open_:
            answer = open_.enter_async_context(self._web.ask("GET", url))
            response = await asyncio.wait_for(answer, self._window_seconds)
            self._check_answer(response, what, failed)
            reader.expect(url, str(response.headers.get("Content-Type", "")))
            pace = _Pace(self._window_seconds)
            is_large = False
            async for piece in _pieces(response):
                pace.came(len(piece))
                await reader.feed_in_turns(piece)
                if reader.size_bytes > LARGE_BYTES and not is_large:
                    is_large = True
                    await open_.enter_async_context(self._large)
                    pace.begin()
            announced, is_encoded = _announced_bytes(response), encoding_of(response) != "identity"
            if not is_encoded and announced not in (None, reader.size_bytes):
                raise failed(f"{what} came with {reader.size_bytes} bytes instead of {announced}: run again.")
            if not reader.takes_long:
                media = reader.finish()
            else:
                async with self._walks:
                    media = await asyncio.to_thread(reader.finish)
            # Whether a body that was cut off would be known by how it came.
            chunked = "chunked" in response.headers.get("Transfer-Encoding", "").lower()
            if not (media.verified or chunked or is_encoded or announced is not None):
                raise failed(f"{what} came from a host that does not say how long it is: run again.")
            return media

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
        encoding = encoding_of(response)
        if encoding not in ENCODINGS:
            raise failed(f"{what} came encoded ({encoding[:12]}), which was not asked for: run again.")
        if (_announced_bytes(response) or 0) > self._max_bytes:
            raise MediaError(f"it is larger than {self._max_bytes} bytes")

    async def aclose(self) -> None:
        """Closes its connections; a later fetch opens new ones."""
        await self._web.aclose()


class _Pace:
    """Whether a download makes progress."""

    def __init__(self, window_seconds: float) -> None:
        self._window_seconds = window_seconds
        self.begin()

    def begin(self) -> None:
        self._began, self._bytes = asyncio.get_running_loop().time(), 0

    def came(self, count: int) -> None:
        """So many bytes.

        Raises:
            asyncio.TimeoutError: Too few within a window.
        """
        self._bytes += count
        if asyncio.get_running_loop().time() - self._began >= self._window_seconds:
            if self._bytes < SLOWEST_BYTES_PER_SECOND * self._window_seconds:
                raise asyncio.TimeoutError
            self.begin()


async def _pieces(response: httpx.Response) -> AsyncIterator[bytes]:
    """The picture's bytes."""
    is_encoded, came_bytes = encoding_of(response) != "identity", 0
    async for piece in decoded(response):
        came_bytes += len(piece)
        if is_encoded and came_bytes > MOST_INFLATED * response.num_bytes_downloaded + 1024 * 1024:
            raise MediaError("it inflates to far more than a picture does")
        yield piece


def _announced_bytes(response: httpx.Response) -> int | None:
    return byte_count(response.headers.get("Content-Length", ""))
