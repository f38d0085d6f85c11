"""Reads the documentation as its tests do: fenced blocks with what is said about them, and outputs with gaps.

Comments right before a block, which readers do not see, say how it is run:

    <!-- not run: WHY -->      it is not; counted
    <!-- given: CODE -->       Python that runs before it
    <!-- then: CODE -->        Python that runs after it, with its names
    <!-- background -->        its last command goes on running (the tutorial's further terminals)
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])

_BLOCK = re.compile(
    r"(?P<notes>(?:^<!--.*?-->\n+)*)^(?P<fence>```+)(?P<language>\w*)(?P<info>[^\n]*)\n(?P<text>.*?)^(?P=fence)$",
    re.DOTALL | re.MULTILINE,
)
_NOTE = re.compile(
    r"<!-- (?P<kind>not run|given|then|background)(?P<output> output)?(?:: ?(?P<text>.*?))?\s*-->", re.DOTALL
)

_CHANGING = (
    (re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"), "UUID"),
    (re.compile(r"\b[0-9a-f]{32,64}\b"), "HEX"),
    (re.compile(r"\d{4}-\d\d-\d\d(T[\d:.]+(Z|\+00:00)?)?"), "DATE"),
    (re.compile(r"\b\d\d:\d\d:\d\d(\.\d+)?"), "CLOCK"),
    (re.compile(r"\b\d+(\.\d+)? s\b"), "N s"),
    (re.compile(r"127\.0\.0\.1:\d+"), "127.0.0.1:PORT"),
)


class Command(NamedTuple):
    """What a person types, and what they see then; None where the page shows nothing."""

    typed: str
    shown: str | None


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    title: str
    text: str
    notes: dict[str, str]

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def why_not_run(self) -> str | None:
        return self.notes.get("not run")

    def commands(self) -> list[Command]:
        """The commands of a console block; a comment after two spaces is not part of one."""
        commands: list[Command] = []
        shown: list[str] = []
        going_on = False

        def flush() -> None:
            if commands and shown:
                commands[-1] = commands[-1]._replace(shown="\n".join(shown))
            shown.clear()

        for line in self.text.splitlines():
            if going_on:
                commands[-1] = commands[-1]._replace(typed=f"{commands[-1].typed}\n{line}")
            elif line.startswith(("$ ", "# ")):
                flush()
                commands.append(Command(re.sub(r"\s{2,}#\s.*", "", line[2:]), None))
            else:
                shown.append(line)
                continue
            going_on = line.endswith("\\")
        flush()
        return commands


def blocks_of(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for found in _BLOCK.finditer(text):
        notes = {
            note["kind"] + (note["output"] or ""): (note["text"] or "").strip()
            for note in _NOTE.finditer(found["notes"])
        }
        title = re.search(r'title="([^"]+)"', found["info"])
        line = text.count("\n", 0, found.start("fence")) + 1
        name = page.relative_to(ROOT).as_posix()
        yield Block(name, line, found["language"], title[1] if title else "", found["text"], notes)


ALL = [block for page in PAGES for block in blocks_of(page)]


def without_what_changes(text: str) -> str:
    """Ids, dates, times and ports as words."""
    for pattern, word in _CHANGING:
        text = pattern.sub(word, text)
    return text


def is_shown(shown: str, printed: str) -> bool:
    """Whether a page shows what was printed: `...` on a line of its own stands for any lines, else for any text."""
    lines = [without_what_changes(line.rstrip()) for line in shown.strip().splitlines()]
    pattern = "".join(
        r"(?:[^\n]*\n)*?" if line == "..." else ".*?".join(map(re.escape, line.split("..."))) + r"\n" for line in lines
    )
    said = "".join(f"{without_what_changes(line.rstrip())}\n" for line in printed.strip().splitlines())
    return re.fullmatch(pattern, said) is not None
