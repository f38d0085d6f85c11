"""Which addresses are of this network alone, in whatever spelling; and which of them a setting allows. Pure."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

LOOPBACK, PRIVATE, SHARED = "loopback", "private", "carrier-grade NAT"
METADATA = "link-local, or a cloud's metadata service"

_NOT_PUBLIC = {
    # IANA's registries of special-purpose addresses; the metadata services that are outside of link-local first.
    METADATA: "169.254.0.0/16 fe80::/10 fd00:ec2::/32 fd20:ce::/64 100.100.100.200/32 192.0.0.192/32 168.63.129.16/32",
    LOOPBACK: "127.0.0.0/8 ::1/128",
    "unspecified": "0.0.0.0/8 ::/128",
    PRIVATE: "10.0.0.0/8 172.16.0.0/12 192.168.0.0/16 fc00::/7 fec0::/10 64:ff9b:1::/48",
    SHARED: "100.64.0.0/10",
    "multicast": "224.0.0.0/4 ff00::/8",
    "reserved": "192.0.0.0/24 192.0.2.0/24 192.88.99.0/24 198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 240.0.0.0/4 "
    "2001::/23 2001:db8::/32 3fff::/20",
}
_KINDS: tuple[tuple[Network, str], ...] = tuple(
    (ipaddress.ip_network(network), kind) for kind, networks in _NOT_PUBLIC.items() for network in networks.split()
)
_GLOBAL_V6 = ipaddress.IPv6Network("2000::/3")
"""All that IANA has given out for the internet; what lies outside is reserved."""
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_COMPATIBLE = ipaddress.IPv6Network("::/96")

_NUMERIC = re.compile(r"(0x[0-9a-f]*|[0-9]+)(\.(0x[0-9a-f]*|[0-9]+))*", re.IGNORECASE)
_NAME = re.compile(r"(\*\.)?[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?)*")


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine itself."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def host_as_written(host: str) -> str:
    """A host in one spelling: lower case, without brackets, zone and the dot at the end."""
    return host.strip().strip("[]").partition("%")[0].rstrip(".").lower()


def address_in(host: str) -> Address | None:
    """The address that a host's name is, in any spelling that the system's resolver takes (2130706433, 0x7f.1)."""
    text = host_as_written(host)
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        pass
    if not _NUMERIC.fullmatch(text):
        return None
    try:
        return ipaddress.IPv4Address(socket.inet_aton(text))
    except OSError:
        return None


def meant(address: Address) -> Iterator[Address]:
    """The addresses that packets to this one end at: those inside of a mapped, 6to4, NAT64 or Teredo address."""
    if isinstance(address, ipaddress.IPv4Address):
        yield address
        return
    if address.ipv4_mapped is not None:
        yield address.ipv4_mapped
    elif address.sixtofour is not None:
        yield address.sixtofour
    elif address.teredo is not None:
        yield from address.teredo
    elif address in _NAT64 or (address in _COMPATIBLE and int(address) > 1):
        yield ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    else:
        yield address


def kind_of(address: Address) -> str | None:
    """What is special about an address that `meant` gave; None: it is public."""
    for network, kind in _KINDS:
        if address in network:
            return kind
    return "reserved" if isinstance(address, ipaddress.IPv6Address) and address not in _GLOBAL_V6 else None


@dataclass(frozen=True)
class PrivateHosts:
    """Hosts of this network from which pictures may be fetched all the same.

    Attributes:
        everything: Any host at any address.
        names: Host names; `*.suffix` stands for every name that ends so. They do not open link-local addresses,
            where the metadata services of clouds give out credentials.
        networks: Addresses, link-local ones too.
    """

    everything: bool = False
    names: tuple[str, ...] = ()
    networks: tuple[Network, ...] = ()

    @classmethod
    def parse(cls, text: str) -> PrivateHosts:
        """Reads host names, `*.suffix`, addresses and networks, separated by commas, or `all`; empty: none.

        Raises:
            ValueError: One is none of these.
        """
        names: list[str] = []
        networks: list[Network] = []
        everything = False
        for part in filter(None, (part.strip().lower() for part in text.split(","))):
            if part == "all":
                everything = True
                continue
            try:
                networks.append(ipaddress.ip_network(part.strip("[]"), strict=False))
                continue
            except ValueError:
                pass
            name = part.rstrip(".")
            if not _NAME.fullmatch(name) or _NUMERIC.fullmatch(name.rpartition(".")[2]):
                raise ValueError(
                    f"{part!r} must be a host name, *.SUFFIX, an IP address or a network such as 10.0.0.0/8 "
                    "(without scheme and port), or the whole setting `all`"
                )
            names.append(name)
        return cls(everything, tuple(names), tuple(networks))

    def allow_name(self, host: str) -> bool:
        """Whether a host may be private by its name."""
        return self.everything or any(
            host.endswith(name[1:]) if name.startswith("*.") else host == name for name in self.names
        )

    def allow_address(self, address: Address) -> bool:
        """Whether an address that `meant` gave is named."""
        return self.everything or any(address in network for network in self.networks)
