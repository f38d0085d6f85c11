"""Who may import whom: data goes one way, and Prefect stays below the line."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "prefect_eachlabs"

_ABOVE_THE_LINE = """
    errors redaction consoles pictures addresses settings safe_json models png media typed_inputs
    object_store s3_access storage
    lots gate pacing
    waking bodies client once catalogue
    durations sweeping watched listing timing schedule answers watching
    hosts download probing
    records decisions references orders echoes markers sight looking settling finishing purchasing
    shop steps janitor engine
    gateway
    retrying database_table contact_sheet batches
"""

_BELOW_THE_LINE = """
    limits limits_admin credentials keys artifacts events tasks batch_artifacts shards batch_flow flows
    templates scheduled_flow settle_flow vary_flow table_flow requests
    emulator local_s3 commands cli
"""

WITHOUT_PREFECT = _ABOVE_THE_LINE.split()

ROOMS = [*WITHOUT_PREFECT, *_BELOW_THE_LINE.split()]
"""Top to bottom: a room imports only from rooms before it. A folder (emulator, limits ...) is one room."""

DOORS = ("__init__", "__main__")
"""The package's doors may import every room, and no room goes through them."""


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(path: Path) -> Iterator[tuple[str, int]]:
    """Every module that a file imports, anywhere in it, with its line."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: write the import with the package's name"
            if node.module == PACKAGE.name:
                yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)
            else:
                yield str(node.module), node.lineno


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_from_rooms_above_it(path: Path) -> None:
    room = room_of(path)
    if room in DOORS:
        return
    assert room in ROOMS, f"{room} is a new room: give it its place in ROOMS, below all that it imports"
    above = ROOMS[: ROOMS.index(room)]
    for module, line in imported(path):
        package, _, rest = module.partition(".")
        if package == PACKAGE.name:
            other = rest.partition(".")[0]
            assert other in above or other == room, f"{path.name}:{line} imports {module}, which is not above {room}"


@pytest.mark.parametrize("room", WITHOUT_PREFECT)
def test_a_room_above_the_line_does_not_know_prefect(room: str) -> None:
    for path in FILES:
        if room_of(path) == room:
            for module, line in imported(path):
                assert module.partition(".")[0] != "prefect", f"{path.name}:{line} imports {module}"
