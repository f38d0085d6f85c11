"""Flags that several commands have, and how their words become values."""

from __future__ import annotations

import argparse
import json
import math
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefect_eachlabs.settings import AccountSettings


def add_purchase_flags(parser: argparse.ArgumentParser) -> None:
    """What may be done about an item beyond the first purchase, and for how long."""
    parser.add_argument(
        "--to", metavar="s3://BUCKET/PREFIX", help="where pictures and records go (EACHLABS_DESTINATION)"
    )
    parser.add_argument("--model", metavar="SLUG", help="the model's slug (gemini)")
    parser.add_argument("--version", metavar="V", help="the model's version (the default model has its own)")
    parser.add_argument(
        "--formats",
        metavar="F,F",
        help="what may be stored: png (the default), jpeg, webp, gif; the key's ending follows",
    )
    parser.add_argument("--replace", action="store_true", help="buy although the item id stands for another input")
    parser.add_argument(
        "--rebuy-missing", action="store_true", help="buy again when a stored picture is gone from the bucket"
    )
    parser.add_argument("--retry-failed", action="store_true", help="buy again what failed for good")
    parser.add_argument(
        "--on-ambiguous",
        choices=("settle", "fail"),
        default="settle",
        help="after a lost answer: find out what it bought (settle, the default), or report it (fail)",
    )
    parser.add_argument(
        "--retry-ambiguous",
        action="store_true",
        help="you have looked in the vendor's dashboard: what stands as ambiguous was not bought; buy it once",
    )
    parser.add_argument(
        "--deadline-seconds",
        type=positive_number,
        metavar="S",
        help="from the POST until an unfinished prediction counts as timed out (EACHLABS_DEADLINE_SECONDS, 300)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else on stdout")


def named_value(text: str) -> tuple[str, Any]:
    """NAME=JSON; what is no JSON is text, so that `aspect_ratio=16:9` needs no quotes."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise argparse.ArgumentTypeError(f"{text!r} must be NAME=JSON, such as seed=7 or aspect_ratio=16:9")
    try:
        return name.strip(), json.loads(value, parse_constant=_no_json)
    except (ValueError, RecursionError):
        return name.strip(), value


def _no_json(word: str) -> Any:
    """Python's parser takes NaN and Infinity, which are none."""
    raise ValueError(word)


def positive_number(text: str) -> float:
    """A number greater than 0."""
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number") from None
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} must be greater than 0")
    return number


def count_or_none(text: str) -> int | None:
    """A count of at least 1; `none` means without limit."""
    if text.lower() == "none":
        return None
    try:
        count = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number or 'none'") from None
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1, or 'none'")
    return count


def account_for_the_server() -> AccountSettings:
    """The account of the environment, for work on the Prefect server alone, which needs no key.

    Raises:
        SetupError: A setting is out of bounds.
    """
    from prefect_eachlabs.settings import ENVIRONMENT, settings_from_environment  # noqa: PLC0415 - pydantic is heavy

    if os.environ.get(ENVIRONMENT["api_key"], "").strip():
        return settings_from_environment()
    return settings_from_environment(api_key="none")
