"""JSON of others, read so that whatever was in it can be logged, written down and sent on."""

from __future__ import annotations

import json
from typing import Any

from prefect_eachlabs.net import redaction


def loads(text: bytes | str) -> Any:
    """As `json.loads`, without half characters and without secrets.

    Half characters (`"\\ud800"`) become question marks, for no file and no log takes them. A secret value that is in
    use (an answer may quote the request's headers) becomes `***` in every string, here, before anybody writes it down.

    Raises:
        ValueError, RecursionError: It is not JSON, or nested too deeply.
    """
    said = text if isinstance(text, str) else text.decode(json.detect_encoding(text), "surrogatepass")
    value = json.loads(said)
    # Without escapes its strings stand in it as they are.
    whole = json.dumps(value, ensure_ascii=False) if "\\" in said else said
    try:
        whole.encode()
    except UnicodeEncodeError:
        value = json.loads(whole.encode("utf-8", "replace"))
    return redaction.cleaned(value) if redaction.holds_secret(whole) else value
