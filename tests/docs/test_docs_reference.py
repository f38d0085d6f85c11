"""The reference names what is public, and what pages say about commands, settings and tests is what there is."""

from __future__ import annotations

import re
import sys

import pytest

import prefect_eachlabs
from prefect_eachlabs import errors, flows, testing
from tests.docs.docs_kit import PAGES, ROOT
from tests.docs.docs_made import DOCS, MADE, parts_of

REFERENCE = "\n".join(page.read_text(encoding="utf-8") for page in sorted((DOCS / "reference").glob("*.md")))
PARTS = [(page, name, text) for page in sorted(DOCS.rglob("*.md")) for name, text in parts_of(page)]


def module_of(thing: object) -> str:
    """Where something is defined; of a task or a flow, where its function is."""
    return str(getattr(getattr(thing, "fn", thing), "__module__", ""))


@pytest.mark.parametrize("package", [prefect_eachlabs, flows, testing], ids=lambda package: package.__name__)
def test_every_public_name_is_in_the_reference(package: object) -> None:
    for name in package.__all__:  # type: ignore[attr-defined]
        wanted = f"::: {module_of(getattr(package, name))}.{name}\n"
        assert wanted in REFERENCE, f"docs/reference lacks {wanted}"


@pytest.mark.parametrize(
    "error", [e for e in vars(errors).values() if isinstance(e, type) and e.__module__ == errors.__name__]
)
def test_every_error_is_in_the_reference(error: type[BaseException]) -> None:
    assert f"::: prefect_eachlabs.errors.{error.__name__}\n" in REFERENCE


@pytest.mark.parametrize(("page", "name", "text"), PARTS, ids=[name for _, name, _ in PARTS])
def test_what_the_code_knows_better_is_written_by_it(page: object, name: str, text: str) -> None:
    made = MADE[name]()
    if name == "help" and sys.version_info < (3, 11):
        pytest.skip("its cyclopts does not say what a flag takes")
    assert text == made, f"{page} is old: {sys.executable} -m tests.docs.docs_made"


def test_every_part_that_can_be_made_is_in_a_page() -> None:
    assert {name for _, name, _ in PARTS} == set(MADE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_files_of_the_repository_that_a_page_names_are_there(page: object) -> None:
    text = page.read_text(encoding="utf-8")  # type: ignore[attr-defined]
    there = {path.name for path in (ROOT / "tests").rglob("*.py")}
    for name in re.findall(r"`[^`\n]*?\b(test_\w+\.py)", text):
        # The page about testing shows a user's own.
        assert name in there | {"test_shop.py"}, name
    for path in re.findall(r"`((?:tests|benchmarks|flows|deployments)/[\w./@-]+)`", text):
        assert (ROOT / path).exists(), path


def test_the_commands_that_the_guarantees_are_tested_by_are_there() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z-]+)`", (DOCS / "guarantees.md").read_text(encoding="utf-8"))) <= targets
