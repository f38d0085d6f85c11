"""Code in README and docs runs: Python against the emulator and a local S3, commands with what they print.

The tutorial, and the tests that the page about testing shows, take servers and processes: test_docs_tutorial.py.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import boto3
import pytest

from prefect_eachlabs.cli import main as cli
from prefect_eachlabs.settings import ENVIRONMENT
from tests.conftest import ROOT
from tests.docs.docs_kit import ALL, Block, is_shown
from tests.flows.flow_fixtures import Studio

ELSEWHERE = {"README.md": "test_readme.py", "docs/tutorial.md": "test_docs_tutorial.py"}
"""Pages whose Python is run by tests of their own."""

NOT_RUN = {
    "docs/fuzzing.md": 1,
    "docs/how-to/from-the-sample-loop.md": 1,
    "docs/how-to/private-buckets.md": 1,
    "docs/how-to/resuming.md": 1,
    "docs/how-to/webhooks.md": 1,
    "docs/how-to/several-workers.md": 2,
    "docs/how-to/testing-flows.md": 1,
    "docs/how-to/triggered-by-events.md": 1,
    "docs/operations.md": 2,
    "docs/tutorial.md": 1,
}
"""How many blocks of a page are not run; each says why in a comment. Fewer is better."""

STARTED_ELSEWHERE = ("demo", "emulator")
"""Servers or processes of their own: tests/cli/test_demo.py, tests/testing/test_emulator_server.py."""

SAVE_BLOCKS = ("docs/how-to/limits-and-accounts.md", "docs/how-to/private-buckets.md")
"""Pages that save blocks on the server and use them: half of the time that all pages take."""

SHOWS_LIMITS = "docs/how-to/limits-and-accounts.md"
"""Its commands need an account that no other test has touched, with the limits of the model's page."""


def given_files(studio: Studio, folder: Path) -> None:
    """What the pages' readers have: tables, pictures, and two buckets with what is named in them."""
    picture = (ROOT / "docs" / "demo.png").read_bytes()
    (folder / "fox.jpg").write_bytes(picture)
    (folder / "fox.png").write_bytes(picture)
    (folder / "prompts.csv").write_text('id,prompt\nmug,"a blue mug"\n')
    studio.s3.create_bucket("acme")
    with closing(boto3.client("s3")) as s3:
        for bucket in ("acme", "acme-pictures"):
            for row in s3.list_objects_v2(Bucket=bucket).get("Contents", []):
                s3.delete_object(Bucket=bucket, Key=row["Key"])
        s3.put_object(Bucket="acme", Key="in/prompts.csv", Body=b"prompt\na red fox\n")
        s3.put_object(Bucket="acme", Key="refs/fox.png", Body=picture)


def here(*languages: str, on: str = "") -> list[Block]:
    return [
        block
        for block in ALL
        if block.language in languages and block.page == (on or block.page) and block.why_not_run is None
    ]


def pages_with(*languages: str) -> list[str]:
    return sorted({block.page for block in here(*languages)} - set(ELSEWHERE))


def run_python(block: Block, names: dict[str, Any]) -> None:
    """Runs a block between its `given` and its `then`, with the names of the page's blocks before it."""
    for part, text in (("given", block.notes.get("given")), ("", block.text), ("then", block.notes.get("then"))):
        if text:
            exec(compile(text, f"{block} {part}".strip(), "exec"), names)


@pytest.fixture
def _environment_is_put_back() -> Iterator[None]:
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.usefixtures("_environment_is_put_back")
@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=pytest.mark.slow if page in SAVE_BLOCKS else ()) for page in pages_with("python")]
)
def test_the_python_of_a_page_runs(
    page: str, request: pytest.FixtureRequest, studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request.getfixturevalue("at_server_process" if page in SAVE_BLOCKS else "prefect_server")
    given_files(studio, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("EACHLABS_MAX_IN_FLIGHT", "none")  # leases of a server are another test's
    monkeypatch.setenv("EACHLABS_REFERENCE_ROOTS", f"{tmp_path}:s3://acme")
    names: dict[str, Any] = {"__name__": page, "api": studio.api, "studio": studio}
    for block in here("python", on=page):
        if block.title:
            continue  # files: of the tutorial and of the page about tests, run where they are files
        run_python(block, names)


def test_python_that_defines_without_doing_is_called_too() -> None:
    """A block of nothing but definitions proves little: a hidden `then` calls them."""
    for page in pages_with("python"):
        for block in here("python", on=page):
            if not block.title and re.search(r"^@(flow|task)", block.text, re.MULTILINE):
                called = re.search(r"^\w+\(", block.text, re.MULTILINE)
                assert "then" in block.notes or called, f"{block} is defined and never called"


def words_of(typed: str) -> list[str] | None:
    """The arguments of a `prefect-eachlabs` command; None for another program's."""
    words = shlex.split(typed.replace("\\\n", " "), comments=True)
    while words and re.fullmatch(r"[A-Z_0-9]+=.*", words[0]):
        words.pop(0)
    return words[1:] if words[:1] == ["prefect-eachlabs"] else None


CONSOLES = [block for block in ALL if block.language == "console"]


@pytest.mark.parametrize("block", CONSOLES, ids=str)
def test_every_command_that_is_shown_is_one(block: Block) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    others = []
    for command in block.commands():
        words = words_of(command.typed)
        if words is not None:
            if "--help" not in words:
                cli.parse(words)
        elif command.typed.startswith("make "):
            assert shlex.split(command.typed, comments=True)[1] in targets, f"{block}: {command.typed}"
        else:
            others.append(command.typed)
    if block.page not in ELSEWHERE and not is_a_file_of_tests(block):
        assert not others or block.why_not_run, f"{block}: nobody runs {others}; say why: <!-- not run: ... -->"


def is_a_file_of_tests(block: Block) -> bool:
    return block.page == "docs/how-to/testing-flows.md" and block.text.startswith("$ pytest")


def with_output(page: str) -> list[Block]:
    blocks = [block for block in here("console", on=page) if not is_a_file_of_tests(block)]
    return [block for block in blocks if any(command.shown for command in block.commands())]


@pytest.mark.usefixtures("prefect_server")
@pytest.mark.parametrize("page", [page for page in pages_with("console") if with_output(page)])
def test_commands_print_what_a_page_shows(
    page: str, studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_files(studio, tmp_path)
    monkeypatch.chdir(tmp_path)
    if page == SHOWS_LIMITS:
        monkeypatch.setenv("EACHLABS_ACCOUNT", "docs")
        monkeypatch.delenv("EACHLABS_REQUESTS_PER_MINUTE")
    for block in here("console", "text", on=page):
        if block.title:
            Path(block.title).write_text(block.text, encoding="utf-8")
        elif block in with_output(page):
            for command in block.commands():
                words = words_of(command.typed)
                assert words is not None, f"{block}: {command.typed}"
                assert words[0] not in STARTED_ELSEWHERE, f"{block}: say why it is not run"
                printed = io.StringIO()
                with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
                    cli.main(words)
                if command.shown is not None:
                    assert is_shown(command.shown, printed.getvalue().replace("-docs:", "-default:")), (
                        f"{block}: it prints\n{printed.getvalue()}"
                    )


@pytest.mark.parametrize("block", [block for block in ALL if block.language == "sh"], ids=str)
def test_shell_lines_set_variables_that_exist(block: Block) -> None:
    for line in block.text.splitlines():
        assert re.match(r"(export )?[A-Z_0-9]+=\S", line), f"{block}: {line!r} is no setting of a variable"
        for variable in re.findall(r"\b(EACHLABS_[A-Z_]+)=", line):
            assert variable in ENVIRONMENT.values(), f"{block}: {variable}"


def test_what_is_not_run_says_why_and_is_counted() -> None:
    reasons = [block for block in ALL if block.why_not_run is not None]
    assert all(len(str(block.why_not_run)) > 10 for block in reasons)
    assert Counter(block.page for block in reasons) == NOT_RUN
    assert all((ROOT / "tests" / "docs" / name).is_file() for name in ELSEWHERE.values())


def test_a_language_of_every_block_is_one_that_is_checked() -> None:
    """Nothing slips through as a block of an unknown kind: what runs is python, console or sh."""
    known = {"python", "console", "sh", "text", "json", "yaml", "sql", ""}
    assert not [str(block) for block in ALL if block.language not in known and block.why_not_run is None]


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ("one\n...\nthree", "one\ntwo\ntwo\nthree\n", True),
        ("one\n...", "one\n", True),
        ("took 1.5 s, 512 px", "took 12 s, 512 px", True),
        ("took 1.5 s, 512 px", "took 12 s, 64 px", False),
        ("at http://127.0.0.1:8700", "at http://127.0.0.1:41234", True),
        ("id ... is stored", "id 2026-11-22 is stored", True),
        ("one", "one\ntwo", False),
        ("one\ntwo", "one", False),
    ],
)
def test_an_output_with_gaps_is_compared_where_it_has_none(shown: str, printed: str, same: bool) -> None:
    assert is_shown(shown, printed) is same
