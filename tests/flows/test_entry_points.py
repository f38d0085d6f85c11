"""What the deployments run, and the pipelines to copy: flat parameters, each described; and they do what they say."""

from __future__ import annotations

import importlib.util
from contextlib import closing
from datetime import datetime, timezone
from typing import Any

import boto3
import pytest
import yaml
from prefect import Flow
from prefect.utilities.callables import parameter_schema
from prefect.utilities.importtools import import_object

from prefect_eachlabs.errors import BadInput
from prefect_eachlabs.flows import generate_image
from prefect_eachlabs.flows.image import json_fields
from tests.api.reference_kit import picture_bytes
from tests.conftest import ROOT
from tests.flows.flow_fixtures import BUCKET, Studio

DEPLOYED = yaml.safe_load((ROOT / "deployments" / "prefect.yaml").read_text(encoding="utf-8"))
ENTRY_POINTS = sorted({one["entrypoint"] for one in DEPLOYED["deployments"]})


def pipeline(name: str) -> Flow[..., Any]:
    """A flow of the folder flows/, which is named as its file."""
    spec = importlib.util.spec_from_file_location(f"entry_{name}", ROOT / "flows" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: Flow[..., Any] = getattr(module, name)
    return found


def test_deployments_run_the_packages_flows_without_a_clone() -> None:
    assert DEPLOYED["pull"] == []
    assert all(entry.startswith("prefect_eachlabs.flows.") and ":" not in entry for entry in ENTRY_POINTS)


def test_what_a_deployment_gives_its_flow_is_a_field_of_its_form() -> None:
    for deployment in DEPLOYED["deployments"]:
        fields = parameter_schema(import_object(deployment["entrypoint"])).properties
        given = [
            deployment.get("parameters", {}),
            *(one.get("parameters", {}) for one in deployment.get("triggers", ())),
        ]
        assert {name for parameters in given for name in parameters} <= set(fields), deployment["name"]


@pytest.mark.usefixtures("prefect_server")
def test_a_wrong_event_has_a_run_that_says_so(studio: Studio) -> None:
    unchecked = [one["name"] for one in DEPLOYED["deployments"] if one.get("enforce_parameter_schema") is False]
    assert unchecked == ["requested-image"]
    with pytest.raises(BadInput, match="item_id"):
        generate_image("a fox", studio.destination, item_id="AB/12")


@pytest.mark.usefixtures("prefect_server")
def test_the_form_of_a_picture_takes_further_fields_as_json(studio: Studio) -> None:
    image = generate_image("a fox", studio.destination, model="flux-1-1-pro", input_json='{"aspect_ratio": "16:9"}')
    (bought,) = studio.api.predictions()
    assert bought["input"] == {"prompt": "a fox", "aspect_ratio": "16:9"}
    assert image.uri.startswith(studio.destination)


@pytest.mark.parametrize("text", ["{", "[1]", "7", '"text"', "[" * 100_000])
def test_what_is_not_a_json_object_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match="input_json"):
        json_fields(text)


def test_an_empty_field_is_none() -> None:
    assert json_fields("  ") is None


@pytest.mark.usefixtures("prefect_server")
def test_the_picture_of_the_day_is_bought_once_a_day(studio: Studio) -> None:
    flow = pipeline("picture_of_the_day")
    assert flow(studio.destination) == flow(studio.destination)
    assert studio.billed == 1
    assert studio.keys() == [f"{datetime.now(timezone.utc):%Y-%m-%d}.png"]


@pytest.mark.usefixtures("prefect_server")
def test_variations_are_bought_once_each_and_further_samples_later(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EACHLABS_REFERENCE_ROOTS", studio.destination)
    with closing(boto3.client("s3")) as s3:
        key = studio.destination.removeprefix(f"s3://{BUCKET}/") + "/fox.jpg"
        s3.put_object(Bucket=BUCKET, Key=key, Body=picture_bytes(7, "JPEG"))
    flow = pipeline("variations")
    first = flow(f"s3://{BUCKET}/{key}", studio.destination, ["in snow", "in rain"], samples=1)
    more = flow(f"s3://{BUCKET}/{key}", studio.destination, ["in snow", "in rain"], samples=2)
    assert len(set(first)) == 2
    assert set(first) < set(more)
    assert len(set(more)) == 4 == studio.billed
