"""What hostile, broken and future senders write: strategies that begin with something valid and spoil it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import strategies as st

DEPTHS = (8, 60, 197, 260, 900, 960, 975, 985, 990, 10_000)
"""Around the limits of pydantic (200 to read, 255 to write) and of the interpreter (1,000)."""

TEXTS: tuple[str, ...] = (
    *("", " ", "\0", "a\0b", "\ud800", "x\udcff", "\ufeff", "\u202eevil", "\x1b[31m", "NaN", "null", "none", "true"),
    *("0", "-1", "1e999", "9" * 25, "9" * 5_000, "..", "../../etc/passwd", "%s%n%d", "{}", "{0.__class__}", "["),
    *("[" * 3_000, '{"url": "https://files.invalid/a.png"}', '"\\ud800"', "<script>alert(1)</script>"),
    *("=cmd|' /C calc'!A0", "a" * 70_000, "https://files.invalid/a.png", "https://", "http://[::1"),
    *("https://files.invalid/\ud800.png", "https://x:99999/", "https://\u2100.invalid/", "https://a@b:c@d/"),
    *("file:///etc/passwd", "s3://bucket/key", "s3://b/../x", "2026-11-22T10:00:00Z", "0001-01-01T00:00:00+23:59"),
    *("9999-12-31T23:59:59-23:59", "success", "error", "SUCCEEDED"),
)

NUMBERS: tuple[Any, ...] = (
    0,
    -1,
    1,
    True,
    2**31,
    2**63,
    2**64,
    10**30,
    10**400,
    0.1,
    -0.0,
    1e308,
    5e-324,
    float("inf"),
    float("-inf"),
    float("nan"),
)

texts = st.sampled_from(TEXTS) | st.text(max_size=20)
scalars = st.none() | st.booleans() | st.sampled_from(NUMBERS) | texts | st.floats() | st.integers()

_DEEP = "\ue000deep:{}:{}\ue000"
"""Stands for nesting that is written into the text itself: Python could not build it, or not write it."""
deep = st.builds(_DEEP.format, st.sampled_from("[{"), st.sampled_from(DEPTHS))


def values(names: Sequence[str] = ()) -> st.SearchStrategy[Any]:
    """JSON values (and what Python takes for some), with some of these names in them."""
    name = st.sampled_from(names) | texts if names else texts
    return st.recursive(
        scalars | deep,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(name, inner, max_size=4),
        max_leaves=10,
    )


def _places(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [here, *(place for name, one in inner for place in _places(one, (*here, name)))]


def spoilt(value: Any, draw: Callable[[st.SearchStrategy[Any]], Any]) -> Any:
    """The value with one to four things in it dropped, doubled, retyped, wrapped or renamed."""
    whole = {"": copy.deepcopy(value)}
    for _ in range(draw(st.integers(1, 4))):
        *path, last = draw(st.sampled_from(_places(whole)[1:] or [("",)]))
        holder: Any = whole
        for step in path:
            holder = holder[step]
        if last not in (holder if isinstance(holder, dict) else range(len(holder))):
            continue
        how = draw(st.sampled_from(("retype", "retype", "drop", "wrap", "quote", "rename", "add", "double")))
        if how == "retype":
            holder[last] = draw(scalars | deep)
        elif how == "drop" and path:
            del holder[last]
        elif how == "wrap":
            holder[last] = draw(st.sampled_from(([holder[last]], {"url": holder[last]}, [[holder[last]]])))
        elif how == "quote":
            holder[last] = json.dumps(holder[last])
        elif how == "rename" and path and isinstance(holder, dict):
            holder[draw(texts)] = holder.pop(last)
        elif how == "add" and isinstance(holder[last], dict):
            holder[last][draw(texts)] = draw(scalars | deep)
        elif how == "double" and isinstance(holder, list):
            holder.append(holder[last])
    return whole.get("")


def written(value: Any, draw: Callable[[st.SearchStrategy[Any]], Any]) -> bytes:
    """The value as JSON, more or less: deeper than anybody writes, in some encoding, with names twice."""
    text = json.dumps(value, ensure_ascii=draw(st.booleans()))
    for kind, end in (("[", "]"), ("{", "}")):
        for depth in DEPTHS:
            opening = "[" * depth if kind == "[" else '{"a":' * depth
            mark = _DEEP.format(kind, depth)
            text = text.replace(json.dumps(mark), f"{opening}1{end * depth}")
            text = text.replace(f'"{mark}"', f"{opening}1{end * depth}")
    if text.startswith("{") and draw(st.integers(0, 9)) == 0:
        again = json.dumps(draw(st.sampled_from([*value] or ["a"])))
        text = f"{{{again}: {draw(st.sampled_from(['null', '1', '[]', json.dumps('x')]))}, {text[1:]}"
    encoding = draw(st.sampled_from(("utf-8",) * 9 + ("utf-8-sig", "utf-16", "utf-32-le", "latin-1")))
    if encoding == "latin-1":
        return text.encode(encoding, "replace")
    return text.encode(encoding, "surrogatepass")


def damaged(data: bytes, draw: Callable[[st.SearchStrategy[Any]], Any]) -> bytes:
    """The bytes cut, with bits turned, pieces doubled, moved or put in."""
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(data)))
        how = draw(st.sampled_from(("cut", "flip", "put", "double", "drop")))
        if how == "cut":
            data = data[:at]
        elif how == "flip" and at < len(data):
            data = data[:at] + bytes([data[at] ^ draw(st.integers(1, 255))]) + data[at + 1 :]
        elif how == "put":
            piece = draw(
                st.sampled_from((b"\0", b"\xff", b'"', b"\r", b"\n", b"\r\n", b"\xed\xa0\x80")) | st.binary(max_size=9)
            )
            data = data[:at] + piece + data[at:]
        elif how == "double":
            data = data[:at] + data[max(0, at - 40) :]
        else:
            data = data[:at] + data[at + draw(st.integers(1, 40)) :]
    return data


@st.composite
def objects_of(draw: Any, *valid: Any) -> Any:
    """One of these JSON objects, spoilt, as Python has it; never deeper than Python can build."""
    return spoilt(draw(st.sampled_from(valid)), draw)


@st.composite
def bytes_of(draw: Any, *valid: Any, names: Sequence[str] = ()) -> bytes:
    """One of these JSON values, spoilt, written and damaged; now and then quite another one."""
    kind = draw(st.integers(0, 9))
    value = draw(values(names)) if kind == 0 else spoilt(draw(st.sampled_from(valid)), draw)
    data = written(value, draw)
    return damaged(data, draw) if kind < 4 else data


@st.composite
def noise_of(draw: Any, *valid: bytes) -> bytes:
    """One of these files, damaged."""
    return damaged(draw(st.sampled_from(valid)), draw)


@st.composite
def pieces_of(draw: Any, data: bytes) -> list[bytes]:
    """The bytes in pieces of any size, empty ones too."""
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=6)))
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
