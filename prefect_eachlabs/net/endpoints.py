"""Which store's endpoint a block may choose: none that this machine's own keys would sign for, no metadata service."""

from __future__ import annotations

import os
import socket
from urllib.parse import urlsplit

from prefect_eachlabs.net.public_only import (
    METADATA,
    SETTING,
    Address,
    address_in,
    host_as_written,
    is_loopback,
    is_named,
    meant,
    not_public,
    parse_private_hosts,
)
from prefect_eachlabs.net.urls import has_odd_host

OWN_ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")


def checked_endpoint(url: str, *, has_keys: bool) -> str | None:
    """A block's endpoint, when it may be used from here; None when it names none. Looks its host up.

    A block is filled in by people who need not have this machine's keys. So for an endpoint that a block chooses this
    machine's own keys (its environment, profile or role) sign nothing, unless its environment names the same endpoint;
    no block leads to the metadata services where roles get their keys; and keys do not go over http to just anybody.

    Raises:
        ValueError: It may not be used; says what would let it.
    """
    url = url.rstrip("/")
    if not url or url in (os.environ.get(name, "").rstrip("/") for name in OWN_ENDPOINT_VARIABLES):
        return url or None
    if has_odd_host(url):
        raise ValueError("its host is longer than any")
    parts = urlsplit(url)
    host, _ = host_as_written(parts.hostname or ""), parts.port
    if not host or parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError("it must be http(s)://HOST, without user, query and fragment")
    if not has_keys:
        raise ValueError(
            "it needs an access key of its own, for this machine's keys are for the endpoint that this machine's "
            "AWS_ENDPOINT_URL_S3 names"
        )
    names, networks = parse_private_hosts(os.environ.get(SETTING, ""))
    addresses = _addresses(host)

    def allowed(address: Address) -> bool:
        return any(address in network for network in networks)

    special = [found for address in addresses for found in not_public(address)]
    if any(kind == METADATA and not allowed(address) for address, kind in special):
        raise ValueError(f"that is {METADATA}")
    ends = [end for address in addresses for end in meant(address)]
    named = is_named(host, names) or (ends and all(map(allowed, ends)))
    if parts.scheme == "http" and not is_loopback(host) and not named:
        raise ValueError(f"over http it must be on this machine, or in {SETTING}; otherwise use https")
    return url


def _addresses(host: str) -> list[Address]:
    """Those of a host; none when it has none, which the first request will say."""
    literal = address_in(host)
    if literal is not None:
        return [literal]
    try:
        rows = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    return [found for row in rows if (found := address_in(str(row[4][0]))) is not None]
