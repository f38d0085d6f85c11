"""Whether the input that the API echoes is the one that was sent."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from typing import Any

from prefect_eachlabs.models import without_signature
from prefect_eachlabs.net.redaction import without_secrets


def normalised(value: Any) -> Any:
    """A form in which an input equals its echo: white space, Unicode form, number type and signatures do not count."""
    if isinstance(value, str):
        # An echo comes without the secrets in use, so a prompt that happens to hold one is compared without it.
        return without_signature(" ".join(unicodedata.normalize("NFC", without_secrets(value)).split()))
    if value is None:
        return value
    if isinstance(value, bool):
        return f"\0{value}"  # to Python, True is 1
    if isinstance(value, (int, float)):
        try:
            return float(value)
        except OverflowError:  # JSON's numbers have no end
            return value
    if isinstance(value, Mapping):
        return {str(name): normalised(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [normalised(inner) for inner in value]
    return value


def fit(echo: Mapping[str, Any], sent: Mapping[str, Any]) -> int | None:
    """How many fields of an echo are what was sent; None when it is the echo of another input.

    The API may have added defaults, not left out or changed a field. So an echo can be that of several inputs, of
    which the one with the most fields fits best.
    """
    said, ours = normalised(echo), normalised(sent)
    return len(ours) if all(name in said and said[name] == value for name, value in ours.items()) else None


def may_share_an_echo(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether one echo, completed by defaults, could be that of both inputs: no field of both differs."""
    ours, theirs = normalised(one), normalised(other)
    return all(theirs[name] == value for name, value in ours.items() if name in theirs)
