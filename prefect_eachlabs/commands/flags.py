"""Flags that several commands have, and how their words become values."""

from __future__ import annotations

import argparse
import math


def add_purchase_flags(parser: argparse.ArgumentParser) -> None:
    """What may be done about an item beyond the first purchase, and for how long."""
    parser.add_argument("--to", required=True, metavar="s3://BUCKET/PREFIX", help="where pictures and records go")
    parser.add_argument("--model", metavar="SLUG", help="the model's slug (gemini)")
    parser.add_argument("--version", metavar="V", help="the model's version (the default model has its own)")
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
        "--deadline-seconds",
        type=positive_number,
        metavar="S",
        help="from the POST until an unfinished prediction counts as timed out (EACHLABS_DEADLINE_SECONDS, 300)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else on stdout")


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
