"""Deployed entry point: one prompt becomes one PNG in S3. Flat parameters, which become the UI's form."""

from prefect import flow

from prefect_eachlabs import StoredImage
from prefect_eachlabs.flows import generate_image as body
from prefect_eachlabs.flows.image import json_fields, named_for_its_item
from prefect_eachlabs.models import DEFAULT_MODEL, DEFAULT_VERSION


@flow(name=body.name, description=body.description, flow_run_name=named_for_its_item)
def generate_image(  # noqa: PLR0917 - the UI's form has no keywords
    prompt: str,
    destination: str,
    image_url: str = "",
    model: str = DEFAULT_MODEL,
    version: str = DEFAULT_VERSION,
    item_id: str = "",
    credentials_block: str = "",
    input_json: str = "",
    formats: str = "",
) -> StoredImage:
    """One prompt becomes one PNG in S3: create, await and store as three visible task runs. **Costs money** once.

    Args:
        prompt: What the picture shows: subject, action, surroundings, style.
        destination: Where the picture goes: s3://bucket/prefix, or eachlabs-s3-destination/NAME of a saved block.
        image_url: A reference picture: its public https URL, s3://bucket/key, or a file in a folder that the worker's
            setting EACHLABS_REFERENCE_ROOTS names. Optional.
        model: The model's slug.
        version: The model's version; empty for models that have none.
        item_id: Names the item, so that running it again buys nothing: 1 to 128 of A-Z a-z 0-9 _ -. Empty: one name
            for each different input.
        credentials_block: The name of an Eachlabs Credentials block. Empty: the worker's environment.
        input_json: Further fields of the model's input, as JSON such as {"aspect_ratio": "16:9"}.
            `prefect-eachlabs models SLUG` shows what it takes. Optional.
        formats: What may be stored, separated by commas: png, jpeg, webp, gif, mp4. Empty: PNG alone.
    """
    fields = json_fields(input_json)
    return body.fn(prompt, destination, image_url, model, version, item_id, credentials_block, fields, formats)


if __name__ == "__main__":
    generate_image.serve(name="generate-image")
