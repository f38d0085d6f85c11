"""The flow `vary_image`: one reference picture, several prompts or several samples of one."""

from __future__ import annotations

import asyncio
from typing import Any

from prefect import flow
from prefect.logging import get_run_logger

from prefect_eachlabs.errors import BadInput
from prefect_eachlabs.flows.generate_image import target
from prefect_eachlabs.models import DEFAULT_MODEL, StoredImage
from prefect_eachlabs.tasks import agenerate_and_store

__all__ = ["vary_image"]

MOST_VARIATIONS = 200
"""More are a batch: `generate_batch` makes one task run of many."""
AT_A_TIME = 20


@flow(name="vary-image", description="One reference picture, several prompts or samples; each bought once.")
async def vary_image(  # noqa: PLR0917 - the UI's form has no keywords
    image_url: str,
    prompts: list[str],
    destination: str,
    samples: int = 1,
    model: str = DEFAULT_MODEL,
    version: str = "",
    name: str = "",
    credentials_block: str = "",
    input: dict[str, Any] | None = None,
) -> list[StoredImage]:
    """Variations of a picture: each prompt, each of them `samples` times. **Costs money** once for each.

    Running it again buys nothing; with more prompts or more samples it buys those alone. It is an async flow: call it
    with `await`, or `asyncio.run`.

    Args:
        image_url: The reference picture: its public https URL, s3://bucket/key, or a file in a folder that the
            worker's setting EACHLABS_REFERENCE_ROOTS names.
        prompts: What to make of it; each is a variation.
        destination: Where the pictures go: s3://bucket/prefix, or eachlabs-s3-destination/NAME of a saved block.
        samples: How many pictures of each prompt: items of their own, with the same input.
        model: The model's slug. The picture goes into the field that it has for one.
        version: The model's version; empty: the first model's own, none for others.
        name: Names the items NAME-PROMPT-SAMPLE, such as fox-2-1; empty: by their inputs.
        credentials_block: The name of an Eachlabs Credentials block. Empty: the worker's environment.
        input: Further fields of the model's input. `prefect-eachlabs model SLUG` shows what it takes.

    Returns:
        The pictures, prompt by prompt, sample by sample.

    Raises:
        BadInput: Nothing to do, too much of it, or a prompt that stands there twice.
        EachlabsError: The first that went wrong, once all others are stored.
    """
    _check(prompts, samples)
    place = target(destination)
    turns = asyncio.Semaphore(AT_A_TIME)

    async def vary(number: int, prompt: str, sample: int) -> StoredImage:
        async with turns:
            return await agenerate_and_store(
                prompt,
                destination=place,
                image_url=image_url,
                model=model,
                version=version or None,
                input=input,
                sample=sample,
                item_id=f"{name}-{number}-{sample}" if name else None,
                credentials=credentials_block or None,
            )

    wanted = [(number, prompt, n) for number, prompt in enumerate(prompts, 1) for n in range(1, samples + 1)]
    ends = await asyncio.gather(*(vary(*each) for each in wanted), return_exceptions=True)
    failures = [end for end in ends if isinstance(end, BaseException)]
    if failures:
        get_run_logger().error("%d of %d variations are not there; the others are.", len(failures), len(ends))
        raise failures[0]
    return [end for end in ends if isinstance(end, StoredImage)]


def _check(prompts: list[str], samples: int) -> None:
    """Raises BadInput for what cannot be meant, before anything is bought."""
    if not prompts:
        raise BadInput("prompts: none. Say what to make of the picture.")
    if samples < 1:
        raise BadInput(f"samples: {samples} must be at least 1.")
    if len(prompts) * samples > MOST_VARIATIONS:
        raise BadInput(
            f"{len(prompts)} prompts in {samples} samples are {len(prompts) * samples} pictures, and {MOST_VARIATIONS} "
            "is the most here: make a table of them and run it as a batch."
        )
    twice = next((prompt for number, prompt in enumerate(prompts) if prompt in prompts[:number]), None)
    if twice is not None:
        raise BadInput(f"prompts: {twice[:80]!r} stands there twice. For several pictures of one prompt set samples.")
