"""Numbered lines of text, decoded one by one, so that what is wrong with a line costs that line alone."""

from __future__ import annotations

import gzip
import zlib
from collections import deque
from dataclasses import dataclass
from typing import BinaryIO, NoReturn, cast

from prefect_eachlabs.errors import BadInput

MAX_ROW_BYTES = 128 * 1024
"""Beyond this a line is broken: records must stay small, and a file that is no table must not fill the memory."""
BROKEN_GZIP = (gzip.BadGzipFile, EOFError, zlib.error)


def no_table(source: str, reason: str) -> NoReturn:
    raise BadInput(f"{source} is no table that can be read: {reason}.")


@dataclass(frozen=True)
class Line:
    """A line with its end, or what is wrong with it."""

    number: int
    text: str
    fault: str | None = None


class Lines:
    """The numbered lines of a file in UTF-8, each decoded by itself; some may be put back."""

    def __init__(self, source: str, stream: BinaryIO, size_bytes: int, *, zipped: bool) -> None:
        self._source, self._file, self._size_bytes = source, stream, size_bytes
        self._stream = cast(BinaryIO, gzip.GzipFile(fileobj=stream)) if zipped else stream
        self._back: deque[Line] = deque()
        self._number = 0
        self._read_bytes = 0
        self._zipped = zipped

    def __iter__(self) -> Lines:
        return self

    def __next__(self) -> Line:
        if self._back:
            return self._back.popleft()
        raw = self._readline(MAX_ROW_BYTES + 1)
        if not raw:
            raise StopIteration
        self._number += 1
        if len(raw) > MAX_ROW_BYTES and not raw.endswith(b"\n"):
            while (more := self._readline(MAX_ROW_BYTES)) and not more.endswith(b"\n"):
                pass
            return Line(self._number, "", f"it is longer than {MAX_ROW_BYTES // 1024} KiB")
        if self._number == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            return Line(self._number, "", f"it is not UTF-8 (byte {error.start + 1}): save the file as UTF-8")
        if "\0" in text:
            return Line(self._number, "", "it holds a zero byte")
        return Line(self._number, text)

    def put_back(self, lines: list[Line]) -> None:
        self._back.extendleft(reversed(lines))

    def head(self) -> Line | None:
        """The first line, which stays unread; None of an empty file. Raises BadInput when it is no text."""
        first = next(self, None)
        if first is None:
            return None
        if first.fault is not None:
            no_table(self._source, f"line 1: {first.fault}")
        self.put_back([first])
        return first

    def fraction_read(self) -> float:
        done = self._file.tell() if self._zipped and not self._file.closed else self._read_bytes
        return min(1.0, done / self._size_bytes) if self._size_bytes else 1.0

    def close(self) -> None:
        self._stream.close()
        self._file.close()

    def _readline(self, most_bytes: int) -> bytes:
        try:
            raw = self._stream.readline(most_bytes)
        except BROKEN_GZIP as error:
            raise BadInput(f"{self._source} is damaged after line {self._number} ({error}): make it anew.") from None
        self._read_bytes += len(raw)
        return raw
