"""Texts of others that may be URLs, looked at before they are taken apart."""

from __future__ import annotations

_LEFT_OUT = str.maketrans("", "", "\t\r\n")
"""`urlsplit` leaves these out before it looks for the host."""


def has_odd_host(url: str) -> bool:
    """Whether a URL's host is longer than any and not of ASCII: `urlsplit` would take seconds to normalise it."""
    host = url.translate(_LEFT_OUT).partition("//")[2].partition("/")[0]
    return len(host) > 255 and not host.isascii()
