"""README says what is: its examples run, its commands exist, its settings are the settings."""

from __future__ import annotations

import re
from typing import Any

import pytest

from prefect_eachlabs.cli import main as cli
from tests.conftest import ROOT
from tests.flows.flow_fixtures import Studio

README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def names_of(example: str, file_name: str) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": file_name}
    exec(compile(example, file_name, "exec"), names)
    return names


@pytest.mark.usefixtures("prefect_server")
def test_the_first_flow_runs(studio: Studio) -> None:
    flow = names_of(EXAMPLES[0], "README-1.py")["picture_of_the_day"]
    assert flow("a red fox in the snow, watercolour", studio.destination).startswith(studio.destination)
    assert studio.billed == 1


@pytest.mark.usefixtures("prefect_server")
def test_the_flow_in_three_steps_runs(studio: Studio) -> None:
    flow = names_of(EXAMPLES[0] + EXAMPLES[1], "README-1.py")["sketch"]
    assert flow("a red fox in the snow, ink", studio.destination).startswith(studio.destination)
    assert studio.billed == 1


@pytest.mark.usefixtures("prefect_server")
def test_the_flow_over_rows_runs(studio: Studio) -> None:
    flow = names_of(EXAMPLES[2], "README-2.py")["product_pictures"]
    assert flow(studio.destination) == [f"{studio.destination}/images/{name}.png" for name in ("mug", "lamp")]


def test_it_takes_five_minutes_to_read() -> None:
    assert len(README.split()) <= 700


def test_every_command_that_is_shown_exists() -> None:
    shown = set(re.findall(r"^\$ prefect-eachlabs ([a-z]+)", README, re.MULTILINE))
    assert shown
    assert shown <= set(cli.COMMANDS)


def test_every_link_leads_somewhere() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if not target.startswith("http"):
            path, _, anchor = target.partition("#")
            assert (ROOT / path).exists(), target
            if anchor:
                headings = re.findall(r"^#+ (.+)$", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)
                assert anchor in {re.sub(r"[^a-z0-9 -]", "", line.lower()).replace(" ", "-") for line in headings}, (
                    target
                )
