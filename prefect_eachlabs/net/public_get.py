"""Asks hosts that strangers name: no key and no cookie goes along, and redirects are followed within bounds."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from http.cookiejar import CookieJar

import httpx

from prefect_eachlabs.net import redaction
from prefect_eachlabs.net.public_only import GuardedTransport, HostGuard

MAX_REDIRECTS = 5


class NoCookies(CookieJar):
    """Takes no cookie from anybody and sends none: an answer may set thousands, to be read and sent ever after."""

    def extract_cookies(self, response: object, request: object) -> None:
        """Nothing."""

    def add_cookie_header(self, request: object) -> None:
        """Nothing."""


class LeadsNowhere(Exception):
    """A URL that leads to no answer of http(s); `reason` completes a sentence about it, `url` is where it led."""

    def __init__(self, reason: str, url: httpx.URL) -> None:
        super().__init__(reason)
        self.reason = reason
        self.url = str(url)


class PublicWeb:
    """HTTP without key, cookies and trust; connections are opened at first use and kept.

    Args:
        transport: Sends the requests (tests); the network, with the environment's proxies, when None.
        hosts: Which hosts may be asked, redirects too. When None: public ones, and any by a given `transport`.
        timeout: Of a connection, and of each wait for bytes.
        accept: What is asked for.
    """

    def __init__(
        self,
        transport: httpx.AsyncBaseTransport | None,
        hosts: HostGuard | None,
        *,
        timeout: httpx.Timeout,
        accept: str,
    ) -> None:
        redaction.install()
        if hosts is not None or transport is None:
            transport = GuardedTransport(hosts or HostGuard(), transport)
        self._transport = transport
        self._timeout = timeout
        self._accept = accept
        self._client: httpx.AsyncClient | None = None

    @property
    def client(self) -> httpx.AsyncClient:
        """For requests that must not be redirected."""
        if self._client is None:
            self._client = httpx.AsyncClient(
                transport=self._transport,
                timeout=self._timeout,
                follow_redirects=False,
                headers={"Accept": self._accept, "Accept-Encoding": "identity", "User-Agent": "prefect-eachlabs"},
                cookies=NoCookies(),
            )
        return self._client

    @asynccontextmanager
    async def ask(
        self, method: str, url: str, headers: Mapping[str, str] | None = None
    ) -> AsyncIterator[httpx.Response]:
        """The answer at the end of the redirects, of any status, not read yet.

        Raises:
            LeadsNowhere: To another scheme, or through more redirects than 5.
            HostRefused: To a host that must not be asked.
            httpx.HTTPError, httpx.InvalidURL, OSError, UnicodeError: There is no answer.
        """
        target = httpx.URL(url)
        for _ in range(MAX_REDIRECTS + 1):
            if target.scheme not in ("http", "https") or not target.host:
                raise LeadsNowhere("leads to a URL that is not http(s)", target)
            request = self.client.build_request(method, target, headers=headers)
            response = await self.client.send(request, stream=True)
            try:
                if not response.has_redirect_location:
                    yield response
                    return
                target = target.join(response.headers["Location"])
            finally:
                await response.aclose()
        raise LeadsNowhere(f"is behind more than {MAX_REDIRECTS} redirects", target)

    async def aclose(self) -> None:
        """Closes its connections; a later request opens new ones."""
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()
