"""JSON of others, read so that whatever was in it can be logged, written down and sent on."""

from __future__ import annotations

import json
from typing import Any

from prefect_eachlabs.net import redaction

MAX_NESTING = 100
"""Of an answer; an input of ours has 64. What is deeper could be decoded, but neither written down nor compared."""
MAX_BRACKETS = 100_000
"""`[` and `{` of an answer, also in its strings, which may be JSON themselves: more would stop the loop for long."""


def loads(text: bytes | str) -> Any:
    """As `json.loads`, without half characters and without secrets.

    Half characters (`"\\ud800"`) become question marks, for no file and no log takes them. A secret value that is in
    use (an answer may quote the request's headers) becomes `***` in every string, here, before anybody writes it down.

    Raises:
        ValueError, RecursionError: It is not JSON, nested too deeply, or of too many parts.
    """
    said = text if isinstance(text, str) else text.decode(json.detect_encoding(text), "surrogatepass")
    if said.count("[") + said.count("{") > MAX_BRACKETS:
        raise ValueError(f"it has more than {MAX_BRACKETS:,} lists and objects")
    value = json.loads(said)
    if _is_deeper(value, MAX_NESTING):
        raise ValueError(f"it is nested more than {MAX_NESTING} levels deep")
    # Without escapes its strings stand in it as they are.
    whole = json.dumps(value, ensure_ascii=False) if "\\" in said else said
    try:
        whole.encode()
    except UnicodeEncodeError:
        value = json.loads(whole.encode("utf-8", "replace"))
    return redaction.cleaned(value) if redaction.holds_secret(whole) else value


def strict(text: str) -> Any:
    """As `json.loads`, but for NaN and Infinity, which JSON has not. Raises ValueError and RecursionError as that."""

    def refuse(word: str) -> Any:
        raise ValueError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


def _is_deeper(value: Any, most: int) -> bool:
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(most):
        within = (outer.values() if isinstance(outer, dict) else outer for outer in level)
        level = [inner for values in within for inner in values if isinstance(inner, (dict, list))]
        if not level:
            return False
    return bool(level)
