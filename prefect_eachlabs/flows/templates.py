"""Prompts and item ids with a date (`{date:%A}`) or a row's columns (`{name}`) in them, and nothing else.

Not `str.format`: whoever fills in a form must not reach into Python's objects (`{date.__class__}`), nor ask for a
gigabyte of blanks (`{date:>1000000000}`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import datetime
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from prefect_eachlabs.errors import BadInput

MOST_CHARACTERS = 20_000
_PART = re.compile(r"\{\{|\}\}|\{(?P<field>[^{}]*)\}|[{}]")
_CODE = re.compile(r"%[aAbBdHIjmMpSUwWyYGuVZ%]")
_CODES = re.compile(rf"(?:{_CODE.pattern}|[^%])*", re.DOTALL)
"""The codes of strftime that mean the same on every platform."""


def filled(template: str, date: datetime, *, name: str) -> str:
    """The template with the date in its places.

    Args:
        template: Text with `{date:%A}` (any code of strftime that every platform knows), `{date}` (2026-11-22), and
            `{{` and `}}` for the braces themselves.
        date: With the time zone that counts.
        name: Of the parameter, for the message.

    Raises:
        BadInput: Something else stands in braces.

    >>> filled("{date:%A} in {{braces}}", datetime(2026, 11, 22), name="prompt")
    'Sunday in {braces}'
    """

    def told(field: str) -> str:
        word, _, spec = field.partition(":")
        if word.strip() != "date" or not _CODES.fullmatch(spec):
            raise BadInput(
                f"{name}: {'{' + field[:78] + '}'!r} is not known: write {{date}}, or {{date:%A}} with codes of "
                "strftime such as %A %d %B %Y %H %M %j %V."
            )
        # Code by code: what stands between them is no business of strftime's, which ends at a zero byte.
        return _CODE.sub(lambda code: date.strftime(code.group()), spec or "%Y-%m-%d")

    return _filled(template, told, name=name)


def columns_of(template: str, *, name: str) -> list[str]:
    """The columns that a template names, each once, in their order.

    Args:
        template: Text with `{column}`, and `{{` and `}}` for the braces themselves.
        name: Of the parameter, for the message.

    Raises:
        BadInput: A brace that stands alone, or a template that is too long.

    >>> columns_of("a {colour} {thing}, {colour}", name="prompt")
    ['colour', 'thing']
    """
    found: list[str] = []

    def noted(field: str) -> str:
        found.append(field.strip())
        return ""

    _filled(template, noted, name=name)
    return list(dict.fromkeys(found))


def filled_from(template: str, row: dict[str, str], *, name: str) -> str:
    """The template with a row's values in the places of its columns; a value is put in as it is, once.

    Args:
        template: As `columns_of` takes it.
        row: Column → value.
        name: Of the parameter, for the message.

    Raises:
        BadInput: It names another column.

    >>> filled_from("a {colour} fox", {"colour": "{red}"}, name="prompt")
    'a {red} fox'
    """

    def told(field: str) -> str:
        if field.strip() not in row:
            raise BadInput(f"{name}: {'{' + field[:78] + '}'!r} is no column: there are {', '.join(sorted(row))}.")
        return row[field.strip()]

    return _filled(template, told, name=name)


def _filled(template: str, told: Callable[[str], str], *, name: str) -> str:
    if len(template) > MOST_CHARACTERS:
        raise BadInput(f"{name}: {len(template)} characters, and {MOST_CHARACTERS} are the most. Make it shorter.")

    def put(part: re.Match[str]) -> str:
        text = part.group()
        if text in ("{{", "}}"):
            return text[0]
        field = part.group("field")
        if field is None:
            raise BadInput(
                f"{name}: a single {text!r} at position {part.start()}: write {text * 2!r} for the sign itself."
            )
        return told(field)

    return _PART.sub(put, template)


def zone(name: str) -> ZoneInfo:
    """The time zone of that name.

    Raises:
        BadInput: There is none.
    """
    try:
        return ZoneInfo(name.strip())
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise BadInput(f"time_zone: {name[:80]!r} is no time zone: write one such as Europe/Berlin or UTC.") from None
