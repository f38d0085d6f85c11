"""The forms of the deployments: what their pages show, what they refuse, and that flows and tasks take the same."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
from prefect.exceptions import ParameterTypeError
from prefect.utilities.callables import parameter_schema
from prefect.utilities.importtools import import_object
from prefect.utilities.schema_tools import validate

from prefect_eachlabs import EachlabsCredentials, S3Destination, create_prediction, generate_rows
from prefect_eachlabs.errors import BadInput
from prefect_eachlabs.flows import generate_batch, generate_image, scheduled_image, settle_leftovers
from prefect_eachlabs.flows.form import name_of
from tests.flows.flow_fixtures import Studio
from tests.flows.test_entry_points import ENTRY_POINTS

FORMS = {entry: parameter_schema(import_object(entry)).model_dump() for entry in ENTRY_POINTS}
FIELDS = ("string", "integer", "number", "boolean", "array")


def refusals(flow: Any, **parameters: Any) -> list[str]:
    """What the server has against a run's parameters, before it makes the run."""
    schema = parameter_schema(flow).model_dump()
    needed = {"prompt": "a fox", "source": "s3://acme-pictures/t.csv", "prompt_template": "a fox"}
    given = {name: value for name, value in needed.items() if name in schema["properties"]} | parameters
    return [error.message for error in validate(given, schema)]


@pytest.mark.parametrize("entry", ENTRY_POINTS)
def test_each_field_has_a_label_in_words_a_description_and_a_control_and_none_is_of_type_none(entry: str) -> None:
    for name, facts in FORMS[entry]["properties"].items():
        assert re.match("[A-Z]", facts["title"]), name
        assert "_" not in facts["title"], name
        assert facts["description"], name
        assert facts.get("default", "") is not None, name
        kinds = facts.get("anyOf", [facts])
        assert all(kind.get("type") in FIELDS or "$ref" in kind for kind in kinds), f"{name}: {facts}"


@pytest.mark.parametrize("entry", ENTRY_POINTS)
def test_what_few_need_comes_last_and_a_blocks_are_chosen(entry: str) -> None:
    fields = sorted(FORMS[entry]["properties"].values(), key=lambda facts: facts["position"])
    is_advanced = [facts["title"].startswith("Advanced: ") for facts in fields]
    assert is_advanced == sorted(is_advanced)
    assert is_advanced.count(False) <= 10
    for name, block in (("destination", "S3Destination"), ("credentials", "EachlabsCredentials")):
        if name not in FORMS[entry]["properties"]:
            continue  # the audit's are several
        first, *_ = FORMS[entry]["properties"][name]["anyOf"]
        assert first == {"$ref": f"#/definitions/{block}"}
        assert FORMS[entry]["definitions"][block]["block_type_slug"]


@pytest.mark.parametrize(
    ("flow", "given"),
    [
        (generate_image, {"prompt": " "}),
        (generate_image, {"destination": "acme-pictures/daily"}),
        (generate_image, {"item_id": "AB/12"}),
        (generate_image, {"model": "gemini flash"}),
        (generate_image, {"formats": ["pgn"]}),
        (generate_batch, {"source": ""}),
        (generate_batch, {"budget_usd": 0}),
        (generate_batch, {"budget_usd": "five"}),
        (generate_batch, {"fail_above": -1}),
        (generate_batch, {"chunk_size": 101}),
        (generate_batch, {"shards": 65}),
        (generate_batch, {"shard": "two of four"}),
        (generate_batch, {"presigned_days": 8}),
        (generate_batch, {"on_ambiguous": "buy"}),
        (generate_batch, {"batch_id": "a/b"}),
        (scheduled_image, {"prompt_template": ""}),
    ],
)
def test_what_is_wrong_is_refused_before_a_run_begins(flow: Any, given: dict[str, Any]) -> None:
    assert refusals(flow, **given)


@pytest.mark.parametrize(
    ("flow", "given"),
    [
        (generate_image, {}),
        (generate_image, {"item_id": None, "formats": None, "version": None, "image_url": None}),
        (generate_image, {"destination": "", "item_id": "", "model": "flux-1.1/pro", "formats": []}),
        (generate_image, {"destination": " s3://acme-pictures ", "formats": ["png", "any"]}),
        (generate_image, {"destination": "eachlabs-s3-destination/default", "credentials": "studio"}),
        (generate_image, {"credentials": {"$ref": {"block_document_id": "6f9d1f3c-31b1-4d8b-a9e4-a05c7f6a1f7e"}}}),
        (generate_batch, {"budget_usd": 5, "presigned_days": None, "batch_id": "", "shard": "2/4"}),
    ],
)
def test_what_is_right_passes(flow: Any, given: dict[str, Any]) -> None:
    assert not refusals(flow, **given)


def test_the_flows_take_what_the_tasks_take_with_the_same_defaults() -> None:
    tasks = inspect.signature(create_prediction.fn).parameters | inspect.signature(generate_rows.fn).parameters
    for flow in (generate_image, generate_batch, scheduled_image, settle_leftovers):
        for name, parameter in inspect.signature(flow.fn).parameters.items():
            if name in tasks and name not in ("prompt", "fail_above"):
                assert parameter.default == tasks[name].default, f"{flow.name}: {name}"


@pytest.mark.usefixtures("prefect_server")
def test_a_flow_takes_saved_blocks_as_the_form_names_them_and_by_name(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket, _, prefix = studio.destination.removeprefix("s3://").partition("/")
    keys = {"region": "us-east-1", "access_key_id": "testing", "secret_access_key": "testing"}
    S3Destination(bucket=bucket, prefix=prefix, endpoint_url=studio.s3.url, **keys).save("of-a-form", overwrite=True)  # type: ignore[arg-type]
    EachlabsCredentials(api_key="a-key-of-tests", base_url=studio.api.url).save("of-a-form", overwrite=True)
    chosen = {"$ref": {"block_document_slug": "eachlabs-s3-destination/of-a-form"}}
    account = {"$ref": {"block_document_slug": "eachlabs-credentials/of-a-form"}}
    for name in ("EACHLABS_API_KEY", "EACHLABS_BASE_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name)
    image = generate_image("a fox", chosen, item_id="fox", credentials=account)  # type: ignore[arg-type]
    assert image.uri == f"{studio.destination}/images/fox.png"
    by_name = "eachlabs-s3-destination/of-a-form"
    assert generate_image("a fox", by_name, item_id="fox", credentials="of-a-form").reused
    found: Any = S3Destination.load("of-a-form")
    assert (name_of(found), name_of("a"), name_of(None)) == (by_name, "a", None)
    with pytest.raises(BadInput, match="saved"):
        name_of(S3Destination(bucket="acme-pictures"))


@pytest.mark.usefixtures("prefect_server")
def test_a_block_given_field_by_field_is_refused(studio: Studio) -> None:
    for given in ({"destination": {"bucket": "acme-pictures"}}, {"credentials": {"api_key": "k"}}):
        with pytest.raises(ParameterTypeError, match="saved block"):
            generate_image("a fox", **given)  # type: ignore[arg-type]
    assert studio.billed == 0
