"""The flow for a form: one prompt becomes one picture in S3; and what the forms of all flows have in common."""

from __future__ import annotations

import json
from typing import Annotated, Any

from prefect.runtime import flow_run

from prefect_eachlabs import tasks
from prefect_eachlabs.engine.sync_async import Plan
from prefect_eachlabs.errors import BadInput
from prefect_eachlabs.flows import form
from prefect_eachlabs.flows.decorators import async_flow, both, sync_flow
from prefect_eachlabs.images.formats import check_formats
from prefect_eachlabs.models import DEFAULT_MODEL, StoredImage

__all__ = ["agenerate_image", "generate_image"]


def json_fields(text: str) -> dict[str, Any] | None:
    """What a form's `input_json` means; None where it is empty.

    Raises:
        BadInput: It is no JSON object. Nothing was bought.
    """
    if not text.strip():
        return None
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"input_json: it is no JSON ({str(error)[:200]}). Nothing was bought.") from None
    if not isinstance(fields, dict):
        raise BadInput('input_json: it is no JSON object, such as {"aspect_ratio": "16:9"}. Nothing was bought.')
    return fields


def named_for_its_item() -> str:
    """Names a flow run for what it makes, so that a person finds it in the UI."""
    parameters = flow_run.parameters
    return tasks.shortened(str(parameters.get("item_id") or parameters.get("prompt") or "picture"))


@sync_flow(
    "generate-image", description="One prompt becomes one PNG in S3, bought once.", flow_run_name=named_for_its_item
)
def generate_image(  # noqa: PLR0917 - the UI's form has no keywords
    prompt: form.Prompt,
    destination: form.Target = None,
    image_url: form.ReferencePicture = None,
    item_id: form.ItemId = None,
    model: form.Model = DEFAULT_MODEL,
    formats: form.Formats = None,
    credentials: form.Account = None,
    version: form.Version = None,
    input_json: Annotated[str, form.advanced("further input, as JSON")] = "",
) -> Plan[StoredImage]:
    """One prompt becomes one PNG in S3: create, await and store as three visible task runs. **Costs money** once.

    Args:
        prompt: What the picture shows: subject, action, surroundings, style.
        destination: Where the picture goes: a saved block, or s3://bucket/prefix, or eachlabs-s3-destination/NAME.
            Empty: the worker's setting EACHLABS_DESTINATION.
        image_url: Its public https URL, s3://bucket/key, or a file in a folder that the worker's setting
            EACHLABS_REFERENCE_ROOTS names.
        item_id: Names the picture, so that running it again buys nothing: 1 to 128 of A-Z a-z 0-9 _ -. Empty: one name
            for each different input.
        model: The model's slug; `prefect-eachlabs models` lists them.
        formats: What may be stored; what else comes is refused. Empty: whatever the model gives.
        credentials: An Eachlabs Credentials block. Empty: the worker's environment.
        version: Empty: the default model has its own, and others need none.
        input_json: Further fields of the model's input, such as {"aspect_ratio": "16:9"}. `prefect-eachlabs models
            SLUG` shows what it takes.

    Returns:
        Where the picture is.
    """
    account = credentials or None
    prediction = yield from both(
        tasks.create_prediction,
        tasks.acreate_prediction,
        prompt,
        image_url=image_url or None,
        model=model,
        version=version or None,
        input=json_fields(input_json),
        item_id=item_id or None,
        formats=check_formats(formats or None),
        destination=destination,
        credentials=account,
    )
    finished = yield from both(tasks.await_result, tasks.aawait_result, prediction, credentials=account)
    store, astore = tasks.store_image, tasks.astore_image
    return (yield from both(store, astore, finished, destination, credentials=account, with_artifact=True))


agenerate_image = async_flow(generate_image)
"""`generate_image` for async callers: awaited. **Costs money** once."""
