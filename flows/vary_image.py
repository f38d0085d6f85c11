"""Deployed entry point: one reference picture, several prompts or samples. Flat parameters become the UI's form."""

from prefect import flow

from prefect_eachlabs import StoredImage
from prefect_eachlabs import vary_image as body
from prefect_eachlabs.flows.generate_image import json_fields
from prefect_eachlabs.models import DEFAULT_MODEL


@flow(name=body.name, description=body.description)
async def vary_image(  # noqa: PLR0917 - the UI's form has no keywords
    image_url: str,
    prompts: str,
    destination: str,
    samples: int = 1,
    model: str = DEFAULT_MODEL,
    version: str = "",
    name: str = "",
    credentials_block: str = "",
    input_json: str = "",
) -> list[StoredImage]:
    """Variations of a picture: each prompt, each of them `samples` times. **Costs money** once for each.

    Args:
        image_url: The reference picture: its public https URL, s3://bucket/key, or a file in a folder that the
            worker's setting EACHLABS_REFERENCE_ROOTS names.
        prompts: What to make of it, a prompt to a line; each is a variation.
        destination: Where the pictures go: s3://bucket/prefix, or eachlabs-s3-destination/NAME of a saved block.
        samples: How many pictures of each prompt: items of their own, with the same input.
        model: The model's slug. The picture goes into the field that it has for one.
        version: The model's version; empty: the first model's own, none for others.
        name: Names the items NAME-PROMPT-SAMPLE, such as fox-2-1; empty: by their inputs.
        credentials_block: The name of an Eachlabs Credentials block. Empty: the worker's environment.
        input_json: Further fields of the model's input, as JSON such as {"aspect_ratio": "16:9"}.
            `prefect-eachlabs model SLUG` shows what it takes. Optional.
    """
    wanted = [line.strip() for line in prompts.splitlines() if line.strip()]
    fields = json_fields(input_json)
    return await body.fn(image_url, wanted, destination, samples, model, version, name, credentials_block, fields)


if __name__ == "__main__":
    vary_image.serve(name="vary-image")
