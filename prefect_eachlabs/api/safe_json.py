"""JSON of others, read so that whatever was in it can be logged, written down and sent on. Pure."""

from __future__ import annotations

import json
from typing import Any


def loads(text: bytes | str) -> Any:
    """As `json.loads`; half characters (`"\\ud800"`) become question marks, for no file and no log takes them.

    Raises:
        ValueError, RecursionError: It is no JSON, or nested too deeply.
    """
    value = json.loads(text)
    whole = json.dumps(value, ensure_ascii=False)
    try:
        whole.encode()
    except UnicodeEncodeError:
        return json.loads(whole.encode("utf-8", "replace"))
    return value
