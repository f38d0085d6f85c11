"""Variations of one picture: several prompts, several samples of each, in the account's limits together.

    EACHLABS_REFERENCE_ROOTS=s3://acme/refs \\
        python flows/variations.py s3://acme/refs/fox.png s3://acme/foxes "in snow" "as an oil painting"

Run it again with more samples, and only those are bought.
"""

from __future__ import annotations

import sys
from itertools import product

from prefect import flow

from prefect_eachlabs import generate_and_store


@flow
def variations(reference: str, destination: str, prompts: list[str], samples: int = 2) -> list[str]:
    """Each prompt, each of them `samples` times. **Costs money** once for each.

    Args:
        reference: The picture: its public https URL; or s3://bucket/key or a file, in EACHLABS_REFERENCE_ROOTS.
        destination: Where the pictures go: s3://bucket/prefix.
        prompts: What to make of it.
        samples: How many of each.
    """
    pictures = [
        generate_and_store.submit(prompt, sample=number, image_url=reference, destination=destination)
        for prompt, number in product(prompts, range(1, samples + 1))
    ]
    return [picture.result().uri for picture in pictures]


if __name__ == "__main__":
    print(*variations(sys.argv[1], sys.argv[2], sys.argv[3:]), sep="\n")
