"""Looks at a picture's URL as the vendor will: is it there, small enough and a picture? No API key goes along."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import httpx

from prefect_eachlabs.errors import BadInput, without_query
from prefect_eachlabs.net.bodies import byte_count, encoding_of
from prefect_eachlabs.net.public_get import LeadsNowhere, PublicWeb
from prefect_eachlabs.net.public_only import SETTING, HostGuard, HostRefused
from prefect_eachlabs.reference_images import MAX_PICTURE_BYTES, SNIFFED_BYTES, content_type_of

ATTEMPTS = 3
FIRST_PAUSE_SECONDS = 0.5
TOTAL_SECONDS = 30.0
_OF_OBJECTS = {403: "it is not there, or these credentials may not read it", 404: "there is no such object"}


@dataclass(frozen=True)
class Seen:
    """What one answer says about a picture."""

    content_type: str
    size_bytes: int | None


class _Refused(Exception):
    """The host answered, and it is no picture that could be had; `status_code` 0: it is no matter of status."""

    def __init__(self, reason: str, status_code: int = 0) -> None:
        super().__init__(reason)
        self.status_code = status_code


class Prober:
    """Asks for the head of pictures.

    Args:
        transport: Sends the requests (tests); the network, with the environment's proxies, when left out.
        hosts: Which hosts may be asked. When left out: public ones, and any by a given `transport`. A host of this
            network is refused for two reasons: the vendor cannot reach it, and a form must not make a worker knock
            there.
    """

    def __init__(self, transport: httpx.AsyncBaseTransport | None = None, *, hosts: HostGuard | None = None) -> None:
        self._web = PublicWeb(transport, hosts, timeout=httpx.Timeout(15.0, connect=10.0, write=60.0), accept="image/*")

    @property
    def client(self) -> httpx.AsyncClient:
        """Connections without key, cookies and redirects."""
        return self._web.client

    async def check(self, url: str, *, shown: str | None = None, signed: bool = False) -> Seen:
        """What is at the URL, once it is known to be a picture that the vendor can have.

        Args:
            url: Where it is.
            shown: What messages call it; the URL without its query when None.
            signed: It is presigned for GET alone: HEAD would be refused.

        Raises:
            BadInput: It cannot be had, is too large, or is no picture; says which. Nothing was bought.
        """
        shown = shown or without_query(url)
        pause_seconds, reason = FIRST_PAUSE_SECONDS, ""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return await asyncio.wait_for(self._look(url, signed=signed), TOTAL_SECONDS)
            except _Refused as refused:
                reason = str(refused)
                if signed and refused.status_code in _OF_OBJECTS:
                    reason = f"{_OF_OBJECTS[refused.status_code]} (HTTP {refused.status_code})"
                if refused.status_code != 429 and refused.status_code < 500:
                    break
            except HostRefused as refused:
                reason = f"its host is {refused}, and the vendor could not fetch it ({SETTING} names hosts that it can)"
                break
            except (asyncio.TimeoutError, httpx.TimeoutException):
                reason = "it did not answer in time"
            except (httpx.HTTPError, httpx.InvalidURL, OSError, UnicodeError) as error:
                reason = f"it could not be reached ({type(error).__name__})"
            if attempt < ATTEMPTS:
                await asyncio.sleep(pause_seconds)
                pause_seconds *= 2
        raise BadInput(
            f"image_url: {shown}: {reason}. Give {'the name' if signed else 'the public URL'} of a picture of at most "
            "100 MB; nothing was bought."
        )

    async def _look(self, url: str, *, signed: bool) -> Seen:
        seen = None
        if not signed:
            try:
                seen = await self._ask("HEAD", url)
            except HostRefused:
                raise
            except (_Refused, httpx.HTTPError):
                seen = None  # many hosts refuse HEAD and serve GET
        if seen is None or seen.size_bytes is None or not _is_picture(seen.content_type):
            seen = await self._ask("GET", url)
        if not _is_picture(seen.content_type):
            raise _Refused(f"it is no picture ({seen.content_type[:60] or 'of an unknown type'})")
        if seen.size_bytes is not None and seen.size_bytes > MAX_PICTURE_BYTES:
            raise _Refused(f"it has {seen.size_bytes} bytes, and at most 100 MB are taken")
        return seen

    async def _ask(self, method: str, url: str) -> Seen:
        headers = {"Range": f"bytes=0-{SNIFFED_BYTES - 1}"} if method == "GET" else {}
        try:
            async with self._web.ask(method, url, headers) as response:
                if response.status_code not in (200, 206):
                    raise _Refused(f"its host answers HTTP {response.status_code}", response.status_code)
                content_type = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
                if method == "GET":
                    content_type = await _sniffed(response, content_type)
                return Seen(content_type, _total_bytes(response))
        except LeadsNowhere as error:
            raise _Refused(f"it {error.reason}") from error

    async def aclose(self) -> None:
        await self._web.aclose()


def _is_picture(content_type: str) -> bool:
    return content_type.startswith("image/") and content_type != "image/svg+xml"


async def _sniffed(response: httpx.Response, said: str) -> str:
    """What the first bytes show; a host that ignores the range is cut off after them."""
    if encoding_of(response) != "identity":
        return said  # which was not asked for, and may inflate to any size
    head = b""
    async for piece in response.aiter_bytes(SNIFFED_BYTES):
        head += piece
        if len(head) >= SNIFFED_BYTES:
            break
    shown = content_type_of(head)
    if shown is not None:
        return shown
    # A format that is not known here may be one that the model knows; an error page is none.
    return "text/html" if not head or head.lstrip()[:1] in (b"<", b"{") else said


def _total_bytes(response: httpx.Response) -> int | None:
    if response.status_code == 206:
        total = response.headers.get("Content-Range", "").rpartition("/")[2]
    else:
        total = response.headers.get("Content-Length", "")
    return byte_count(total)
