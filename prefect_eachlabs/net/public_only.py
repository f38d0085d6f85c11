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
import ipaddress
import re
import socket
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import httpcore
import httpx

SETTING = "EACHLABS_PRIVATE_HOSTS"
PATIENCE_SECONDS = 2.0
"""An address that does not answer so long is given up for the host's next one."""

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Resolve = Callable[[str], Awaitable[Sequence[str]]]

LOOPBACK, PRIVATE, METADATA = "loopback", "private", "link-local, or a cloud's metadata service"


def _networks(text: str) -> tuple[Network, ...]:
    return tuple(map(ipaddress.ip_network, text.split()))


_METADATA = _networks(
    "169.254.0.0/16 fe80::/10 fd00:ec2::/32 fd20:ce::/64 100.100.100.200/32 192.0.0.192/32 168.63.129.16/32"
)
_PRIVATE = _networks("10.0.0.0/8 172.16.0.0/12 192.168.0.0/16 100.64.0.0/10 fc00::/7")
_INTERNET = _networks("0.0.0.0/0 2000::/3")
_IPV4_WITHIN = _networks("64:ff9b::/96 ::/96")
"""NAT64, and the old "IPv4-compatible" addresses: the last four bytes are what is reached."""
_NUMERIC = re.compile(r"(0x[0-9a-f]*|[0-9]+)(\.(0x[0-9a-f]*|[0-9]+))*")
_NAME = re.compile(r"(\*\.)?[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?)*")
_PRIVATE_ENDINGS = (".local", ".internal", ".localhost", ".lan", ".home.arpa")


class HostRefused(httpx.TransportError):
    """A request was not sent, for its host is of this network; the message says which host and why."""


# ------------------------------------------------------------------------------------------- which addresses


def host_as_written(host: str) -> str:
    """A host in one spelling: lower case, without brackets, zone and the dot at the end."""
    return host.strip().strip("[]").partition("%")[0].rstrip(".").lower()


def address_in(host: str) -> Address | None:
    """The address that a host's name is, in any spelling that the system's resolver takes (2130706433, 0x7f.1)."""
    text = host_as_written(host)
    try:
        return ipaddress.ip_address(socket.inet_aton(text) if _NUMERIC.fullmatch(text) else text)
    except (OSError, ValueError):
        return None


def is_loopback(host: str) -> bool:
    """Whether a host name or address, plainly written, is this machine itself."""
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def meant(address: Address) -> tuple[Address, ...]:
    """The addresses that packets to this one end at: those within a mapped, 6to4, Teredo or NAT64 address."""
    if isinstance(address, ipaddress.IPv6Address):
        if (inner := address.ipv4_mapped or address.sixtofour) is not None:
            return (inner,)
        if address.teredo is not None:
            return address.teredo
        if int(address) > 1 and any(address in network for network in _IPV4_WITHIN):
            return (ipaddress.IPv4Address(int(address) & 0xFFFFFFFF),)
    return (address,)


def not_public(address: Address) -> Iterator[tuple[Address, str]]:
    """What an address means that is not of the internet, and why it is not; nothing: all is."""
    for one in meant(address):
        if any(one in network for network in _METADATA):
            yield one, METADATA
        elif one.is_loopback:
            yield one, LOOPBACK
        elif any(one in network for network in _PRIVATE):
            yield one, PRIVATE
        elif one.is_multicast or not one.is_global or not any(one in network for network in _INTERNET):
            yield one, "reserved"


def parse_private_hosts(text: str) -> tuple[tuple[str, ...], tuple[Network, ...]]:
    """Reads host names, `*.suffix`, addresses and networks, separated by commas, or `all`; empty: none.

    Raises:
        ValueError: One is none of these.
    """
    names: list[str] = []
    networks: list[Network] = []
    for part in filter(None, (part.strip().lower() for part in text.split(","))):
        if part == "all":
            names.append("*")
            networks += _networks("0.0.0.0/0 ::/0")
            continue
        try:
            networks.append(ipaddress.ip_network(part.strip("[]"), strict=False))
        except ValueError:
            name = part.rstrip(".")
            if not _NAME.fullmatch(name) or _NUMERIC.fullmatch(name.rpartition(".")[2]):
                raise ValueError(
                    f"{part!r} must be a host name, *.SUFFIX, an IP address or a network such as 10.0.0.0/8 "
                    "(without scheme and port), or the whole setting `all`"
                ) from None
            names.append(name)
    return tuple(names), tuple(networks)


def is_named(host: str, names: Iterable[str]) -> bool:
    """Whether a host is one of the names that were parsed, or ends as one with a `*` does."""
    return any(host.endswith(name[1:]) if name.startswith("*") else host == name for name in names)


# ----------------------------------------------------------------------------------------------- which hosts


async def addresses_of(host: str) -> list[str]:
    """The addresses of a host, each once, in the system's order. Raises OSError when it has none."""
    rows = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(row[4][0]) for row in rows))


class HostGuard:
    """Which hosts may be asked for pictures.

    Args:
        private_hosts: Those of this network that may be, as the setting has them. A name does not open link-local
            addresses, where the metadata services of clouds give out credentials; an address or a network does.
        api_host: The API's own host. Where it is of this network (a gateway, an emulator), so may the pictures be:
            on loopback only if it is itself, and at link-local addresses never.
        resolve: Finds a host's addresses; None: nobody does, and names alone decide.

    Raises:
        ValueError: The setting cannot be read.
    """

    def __init__(self, private_hosts: str = "", api_host: str = "", *, resolve: Resolve | None = addresses_of) -> None:
        self._names, self._networks = parse_private_hosts(private_hosts)
        self._api_host = host_as_written(api_host)
        self._resolve = resolve

    async def addresses(self, host: str) -> list[str]:
        """Those addresses of a host that may be connected to.

        Raises:
            HostRefused: It has addresses, and none of them may be.
            OSError: It has no address at all.
        """
        good: list[str] = []
        refused = ""
        for address in await self._found(host_as_written(host)):
            why = await self._why_not(host, address)
            refused = refused or why
            good += [] if why else [address]
        if good:
            return good
        raise HostRefused(refused) if refused else OSError("it has no address")

    async def check(self, host: str) -> None:
        """For requests that others connect: every address that is known of the host may be connected to.

        Raises:
            HostRefused: One may not.
        """
        name = host_as_written(host)
        try:
            found = await self._found(name)
        except (OSError, UnicodeError):
            is_private = name == "localhost" or name.endswith(_PRIVATE_ENDINGS)
            if is_private and not is_named(name, self._names) and not await self._kinds_beside_the_api():
                raise HostRefused(f"{name}, a name of this network alone") from None
            return  # who connects may know it
        for address in found:
            if why := await self._why_not(host, address):
                raise HostRefused(why)

    async def _found(self, name: str) -> Sequence[str]:
        literal = address_in(name)
        if literal is not None:
            return [str(literal)]
        if self._resolve is None:
            raise OSError("nobody looks names up")
        return await self._resolve(name)

    async def _why_not(self, host: str, address: str) -> str:
        name = host_as_written(host)
        parsed = address_in(address)
        for one, kind in not_public(parsed) if parsed is not None else [(None, "unreadable")]:
            if one is not None and any(one in network for network in self._networks):
                continue
            if kind == METADATA or not (is_named(name, self._names) or kind in await self._kinds_beside_the_api()):
                at = "" if address == name else f" at {address}"
                return f"{name}{at}, an address of this network alone ({kind})"
        return ""

    async def _kinds_beside_the_api(self) -> set[str]:
        """The kinds of addresses that are open because all of the API's are of one."""
        if self._api_host == "localhost":
            return {LOOPBACK, PRIVATE}
        try:
            found = await self._found(self._api_host) if self._api_host else []
        except (OSError, UnicodeError):
            return set()
        kinds: set[str] = set()
        for text in found:
            address = address_in(text)
            if address is not None:
                kinds |= {kind for _, kind in not_public(address)} or {"public"}
        return kinds | {PRIVATE} if kinds and kinds <= {LOOPBACK, PRIVATE} else set()


# ----------------------------------------------------------------------------------------- the requests' way


class GuardedTransport(httpx.AsyncBaseTransport):
    """Sends requests to those hosts alone that its guard lets through.

    Args:
        guard: Says which.
        way_out: Sends what was let through (tests); a pool of connections of its own, or the environment's proxies,
            when None.
    """

    def __init__(self, guard: HostGuard, way_out: httpx.AsyncBaseTransport | None = None) -> None:
        self._guard = guard
        self._way_out = way_out
        self._direct: httpcore.AsyncConnectionPool | None = None
        self._proxies: dict[str, httpx.AsyncHTTPTransport] = {}

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Sends it.

        Raises:
            HostRefused: It was not sent.
        """
        # As it is sent: `host` may be spelled as another name than the one that a proxy gets (faß.de, xn--fa-hia.de).
        host = request.url.raw_host.decode("ascii")
        if "%" in host and ":" not in host:
            # A proxy may decode what was checked as it stands; only the zone of an IPv6 address is written so.
            raise HostRefused(f"{host}, a host that is written in an odd way")
        if (request.url.port or 0) > 65_535:
            raise httpx.ConnectError("there is no such port")
        others = self._way_out or self._proxy_for(request.url.scheme, host)
        if others is None:
            return await self._sent(request)
        await self._guard.check(host)
        return await others.handle_async_request(request)

    async def _sent(self, request: httpx.Request) -> httpx.Response:
        assert isinstance(request.stream, httpx.AsyncByteStream), "the client is asynchronous"
        if self._direct is None:
            self._direct = httpcore.AsyncConnectionPool(
                ssl_context=httpx.create_ssl_context(),
                max_connections=100,
                max_keepalive_connections=20,
                keepalive_expiry=5.0,
                network_backend=_GuardedNetwork(self._guard),
            )
        url = request.url
        target = httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
        with _errors_of_httpx():
            answer = await self._direct.handle_async_request(
                httpcore.Request(
                    request.method,
                    target,
                    headers=request.headers.raw,
                    content=request.stream,
                    extensions=request.extensions,
                )
            )
        return httpx.Response(answer.status, headers=answer.headers, stream=_Body(answer), extensions=answer.extensions)

    def _proxy_for(self, scheme: str, host: str) -> httpx.AsyncHTTPTransport | None:
        # A proxy must not see what goes to an emulator on this machine, nor be asked for its own loopback.
        if is_loopback(host_as_written(host)) or urllib.request.proxy_bypass(host):
            return None
        proxies = urllib.request.getproxies()
        proxy = proxies.get(scheme) or proxies.get("all")
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
        direct, proxies = self._direct, list(self._proxies.values())
        self._direct, self._proxies = None, {}
        if direct is not None:
            await direct.aclose()
        for transport in (*proxies, self._way_out):
            if transport is not None:
                await transport.aclose()


class _Body(httpx.AsyncByteStream):
    def __init__(self, answer: httpcore.Response) -> None:
        self._answer = answer

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with _errors_of_httpx():
            async for piece in self._answer.aiter_stream():
                yield piece

    async def aclose(self) -> None:
        await self._answer.aclose()


@contextmanager
def _errors_of_httpx() -> Iterator[None]:
    """httpcore's errors, each as the one of httpx that has its name."""
    try:
        yield
    except (
        httpcore.TimeoutException,
        httpcore.NetworkError,
        httpcore.ProtocolError,
        httpcore.UnsupportedProtocol,
    ) as error:
        raise getattr(httpx, type(error).__name__, httpx.TransportError)(str(error)) from error


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
