"""Pictures come from the internet: no URL that others wrote makes this machine knock within its own network.

What decides is the address at the moment of connecting, and the connection goes to that very address: a name that
leads elsewhere a second later (DNS rebinding) gains nothing. Each redirect is a request of its own, and so checked
again. TLS goes on by the host's name.

Through a proxy of the environment (`HTTPS_PROXY`) it is the proxy that looks the name up and connects. Then a host is
refused when its own spelling or any address that it has from here is of this network; a name that cannot be looked up
from here is left to the proxy. The proxy's own address may be any: the operator set it.
"""

from __future__ import annotations

import asyncio
import socket
import urllib.request
from collections.abc import Awaitable, Callable, Iterable, Sequence

import httpcore
import httpx

from prefect_eachlabs.net.addresses import (
    LOOPBACK,
    METADATA,
    PRIVATE,
    SHARED,
    PrivateHosts,
    address_in,
    host_as_written,
    is_loopback,
    kind_of,
    meant,
)

SETTING = "EACHLABS_PRIVATE_HOSTS"
PATIENCE_SECONDS = 2.0
"""An address that does not answer so long is given up for the host's next one."""

_PRIVATE_ENDINGS = (".local", ".internal", ".localhost", ".lan", ".home.arpa")

Resolve = Callable[[str], Awaitable[Sequence[str]]]


class HostRefused(httpx.TransportError):
    """A request was not sent, for its host is of this network; the message says which host and why."""


async def addresses_of(host: str) -> list[str]:
    """The addresses of a host, each once, in the system's order. Raises OSError when it has none."""
    rows = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(row[4][0]) for row in rows))


class HostGuard:
    """Which hosts may be asked for pictures.

    Args:
        private_hosts: Those of this network that may be.
        api_host: The API's own host. Where it is of this network (a gateway, an emulator), so may the pictures be:
            on loopback only if it is itself, and at link-local addresses never.
        resolve: Finds a host's addresses; None: nobody does, and names alone decide.
    """

    def __init__(
        self,
        private_hosts: PrivateHosts | None = None,
        api_host: str = "",
        *,
        resolve: Resolve | None = addresses_of,
    ) -> None:
        self._private_hosts = private_hosts or PrivateHosts()
        self._api_host = host_as_written(api_host)
        self._resolve = resolve

    @classmethod
    def of(cls, base_url: str, private_hosts: str, *, resolve: Resolve | None = addresses_of) -> HostGuard:
        """The guard of an account, by two of its settings."""
        return cls(PrivateHosts.parse(private_hosts), httpx.URL(base_url).host, resolve=resolve)

    async def addresses(self, host: str) -> list[str]:
        """Those addresses of a host that may be connected to.

        Raises:
            HostRefused: It has addresses, and none of them may be.
            OSError: It has no address at all.
        """
        name = host_as_written(host)
        good, refused = await self._sorted(name, await self._found(name))
        if refused and not good:
            raise HostRefused(refused)
        if not good:
            raise OSError("it has no address")
        return good

    async def check(self, host: str) -> None:
        """For requests that others connect: every address that is known of the host may be connected to.

        Raises:
            HostRefused: One may not.
        """
        name = host_as_written(host)
        try:
            found = await self._found(name)
        except (OSError, UnicodeError):
            if (name == "localhost" or name.endswith(_PRIVATE_ENDINGS)) and not await self._allow_name(name):
                raise HostRefused(f"{name}, a name of this network alone") from None
            return  # who connects may know it
        _, refused = await self._sorted(name, found)
        if refused:
            raise HostRefused(refused)

    async def _found(self, name: str) -> Sequence[str]:
        literal = address_in(name)
        if literal is not None:
            return [str(literal)]
        if self._resolve is None:
            raise OSError("nobody looks names up")
        return await self._resolve(name)

    async def _sorted(self, name: str, found: Iterable[str]) -> tuple[list[str], str]:
        """The addresses that may be connected to, and why the first of the others may not."""
        good: list[str] = []
        refused = ""
        for address in found:
            kind = await self._kind_refused(name, address)
            if kind is None:
                good.append(address)
            elif not refused:
                at = "" if address == name else f" at {address}"
                refused = f"{name}{at}, an address of this network alone ({kind})"
        return good, refused

    async def _kind_refused(self, name: str, address: str) -> str | None:
        parsed = address_in(address)
        if parsed is None:
            return "unreadable"
        for one in meant(parsed):
            kind = kind_of(one)
            if kind is None or self._private_hosts.allow_address(one):
                continue
            if kind == METADATA:
                return kind
            if not self._private_hosts.allow_name(name) and kind not in await self._kinds_beside_the_api():
                return kind
        return None

    async def _allow_name(self, name: str) -> bool:
        return self._private_hosts.allow_name(name) or bool(await self._kinds_beside_the_api())

    async def _kinds_beside_the_api(self) -> set[str]:
        """The kinds of addresses that are open because the API is at such a one."""
        if self._api_host == "localhost":
            return {LOOPBACK, PRIVATE, SHARED}
        try:
            found = await self._found(self._api_host) if self._api_host else []
        except (OSError, UnicodeError):
            return set()
        kinds = {kind_of(one) for text in found if (address := address_in(text)) for one in meant(address)}
        private = {kind for kind in kinds if kind is not None}
        return private | {PRIVATE, SHARED} if private and private == kinds and METADATA not in private else set()


class GuardedTransport(httpx.AsyncBaseTransport):
    """Sends requests to those hosts alone that its guard lets through.

    Args:
        guard: Says which.
        way_out: Sends what was let through (tests); httpx's own, with the environment's proxies, when None.
    """

    def __init__(self, guard: HostGuard, way_out: httpx.AsyncBaseTransport | None = None) -> None:
        self._guard = guard
        self._way_out = way_out
        self._direct: _Direct | None = None
        self._proxies: dict[str, httpx.AsyncHTTPTransport] = {}

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Sends it.

        Raises:
            HostRefused: It was not sent.
        """
        if "%" in request.url.host and ":" not in request.url.host:
            # A proxy may decode what was checked as it stands; only the zone of an IPv6 address is written so.
            raise HostRefused(f"{request.url.host}, a host that is written in an odd way")
        others = self._way_out or self._proxy_for(request.url)
        if others is not None:
            await self._guard.check(request.url.host)
            return await others.handle_async_request(request)
        if self._direct is None:
            self._direct = _Direct(self._guard)
        return await self._direct.handle_async_request(request)

    def _proxy_for(self, url: httpx.URL) -> httpx.AsyncHTTPTransport | None:
        # A proxy must not see what goes to an emulator on this machine, nor be asked for its own loopback.
        if is_loopback(host_as_written(url.host)) or urllib.request.proxy_bypass(url.host):
            return None
        proxies = urllib.request.getproxies()
        proxy = proxies.get(url.scheme) or proxies.get("all")
        if not proxy:
            return None
        if proxy not in self._proxies:
            try:
                self._proxies[proxy] = httpx.AsyncHTTPTransport(proxy=proxy if "://" in proxy else f"http://{proxy}")
            except (ImportError, ValueError, httpx.InvalidURL) as error:
                # Its text may hold the proxy's password.
                raise httpx.ProxyError(f"the environment's proxy cannot be used ({type(error).__name__})") from None
        return self._proxies[proxy]

    async def aclose(self) -> None:
        """Closes all connections; a later request opens new ones."""
        opened = (self._way_out, self._direct, *self._proxies.values())
        self._direct, self._proxies = None, {}
        for transport in opened:
            if transport is not None:
                await transport.aclose()


class _Direct(httpx.AsyncHTTPTransport):
    """httpx's transport, whose connections go to addresses that the guard has seen."""

    def __init__(self, guard: HostGuard) -> None:
        context = httpx.create_ssl_context()
        super().__init__(verify=context)
        if not isinstance(getattr(self, "_pool", None), httpcore.AsyncConnectionPool):
            # Better no picture than an unguarded one.
            raise RuntimeError(f"httpx {httpx.__version__} keeps its connections elsewhere than this was written for")
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=context,
            max_connections=100,
            max_keepalive_connections=20,
            keepalive_expiry=5.0,
            network_backend=_GuardedNetwork(guard),
        )


class _GuardedNetwork(httpcore.AnyIOBackend):
    """Looks a name up, lets the guard choose, and connects to what it chose."""

    def __init__(self, guard: HostGuard) -> None:
        self._guard = guard

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        try:
            addresses = await asyncio.wait_for(self._guard.addresses(host), timeout)
        except asyncio.TimeoutError:
            raise httpcore.ConnectTimeout("its name was not found in time") from None
        except (OSError, UnicodeError) as error:
            raise httpcore.ConnectError(f"its name was not found ({type(error).__name__})") from error
        *others, last = addresses
        for address in others:
            patience = PATIENCE_SECONDS if timeout is None else min(timeout, PATIENCE_SECONDS)
            try:
                return await super().connect_tcp(address, port, patience, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                continue
        return await super().connect_tcp(last, port, timeout, local_address, socket_options)

    async def connect_unix_socket(
        self,
        path: str,
        timeout: float | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        raise httpcore.ConnectError("pictures do not come from sockets of this machine")
