"""Which store's endpoint a block may choose: none that this machine's own keys would sign for, no metadata service."""

from __future__ import annotations

import os
import socket
from urllib.parse import urlsplit

from prefect_eachlabs.net.addresses import (
    METADATA,
    Address,
    PrivateHosts,
    address_in,
    host_as_written,
    is_loopback,
    kind_of,
    meant,
)

PRIVATE_HOSTS_VARIABLE = "EACHLABS_PRIVATE_HOSTS"
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
    parts = urlsplit(url)
    host, _ = host_as_written(parts.hostname or ""), parts.port
    if not host or parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError("it must be http(s)://HOST, without user, query and fragment")
    if not has_keys:
        raise ValueError(
            "it needs an access key of its own, for this machine's keys are for the endpoint that this machine's "
            "AWS_ENDPOINT_URL_S3 names"
        )
    private_hosts = PrivateHosts.parse(os.environ.get(PRIVATE_HOSTS_VARIABLE, ""))
    addresses = [address for one in _addresses(host) for address in meant(one)]
    if any(kind_of(one) == METADATA and not private_hosts.allow_address(one) for one in addresses):
        raise ValueError(f"that is {METADATA}")
    named = private_hosts.allow_name(host) or (addresses and all(map(private_hosts.allow_address, addresses)))
    if parts.scheme == "http" and not is_loopback(host) and not named:
        raise ValueError(f"over http it must be on this machine, or in {PRIVATE_HOSTS_VARIABLE}; otherwise use https")
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
