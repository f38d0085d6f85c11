"""The deployed entry points: flat parameters, and the same as the flows of the package."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from prefect import Flow
from prefect.utilities.callables import parameter_schema

from prefect_eachlabs.errors import BadInput
from prefect_eachlabs.flows.image import json_fields
from tests.conftest import ROOT
from tests.flows.flow_fixtures import Studio

FILES = sorted((ROOT / "flows").glob("*.py"))


def flows_of(path: Path) -> list[Flow[..., Any]]:
    """The flows that an entry point's file holds, found as Prefect finds them: by its attributes."""
    spec = importlib.util.spec_from_file_location(f"entry_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = {thing.name: thing for name, thing in vars(module).items() if isinstance(thing, Flow) and name != "body"}
    return list(found.values())


def entry(name: str) -> Flow[..., Any]:
    (found,) = flows_of(ROOT / "flows" / f"{name}.py")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_form_is_flat_and_each_field_described(path: Path) -> None:
    flows = flows_of(path)
    assert flows
    for one in flows:
        for field, facts in parameter_schema(one).properties.items():
            kinds = {facts.get("type"), *(each.get("type") for each in facts.get("anyOf", ()))} - {None, "null"}
            assert kinds <= {"string", "integer", "number", "boolean"}, f"{one.name}: {field}: {facts}"
            assert facts["description"], f"{one.name}: {field}"


@pytest.mark.usefixtures("prefect_server")
def test_the_form_of_a_picture_takes_further_fields_as_json(studio: Studio) -> None:
    image = entry("generate_image")(
        "a fox", studio.destination, model="flux-1-1-pro", version="", input_json='{"aspect_ratio": "16:9"}'
    )
    (bought,) = studio.api.predictions()
    assert bought["input"] == {"prompt": "a fox", "aspect_ratio": "16:9"}
    assert image.uri.startswith(studio.destination)


@pytest.mark.parametrize("text", ["{", "[1]", "7", '"text"', "[" * 100_000])
def test_what_is_no_json_object_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match="input_json"):
        json_fields(text)


def test_an_empty_field_is_none() -> None:
    assert json_fields("  ") is None
