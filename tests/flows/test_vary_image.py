"""The flow `vary_image`: one reference picture, several prompts, several samples of each."""

from __future__ import annotations

import asyncio
import re
from contextlib import closing
from pathlib import Path
from typing import Any

import boto3
import pytest

from prefect_eachlabs import BadInput, ContentRefused, StoredImage, vary_image
from tests.api.reference_kit import picture_bytes
from tests.conftest import ROOT
from tests.flows.flow_fixtures import BUCKET, Studio

EXAMPLES = re.findall(
    r"```python\n(.*?)```", (ROOT / "docs" / "references-and-models.md").read_text(encoding="utf-8"), re.DOTALL
)

pytestmark = pytest.mark.usefixtures("prefect_server")


@pytest.fixture
def reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file in a folder that the worker allows."""
    (tmp_path / "fox.jpg").write_bytes(picture_bytes(7, "JPEG"))
    monkeypatch.setenv("EACHLABS_REFERENCE_ROOTS", str(tmp_path))
    return "fox.jpg"


def vary(reference: str, studio: Studio, prompts: list[str], **given: Any) -> list[StoredImage]:
    return asyncio.run(vary_image(reference, prompts, studio.destination, **given))


def test_four_samples_are_four_items_of_one_input_and_one_upload(studio: Studio, reference: str) -> None:
    images = vary(reference, studio, ["as an oil painting"], samples=4)
    assert len({image.uri for image in images}) == 4
    assert len({image.sha256 for image in images}) == 4
    tallies = studio.api.tallies()
    assert (tallies["billed"], tallies["distinct_inputs"], tallies["uploads"]) == (4, 1, 1)
    assert tallies["violations"] == {}

    again = vary(reference, studio, ["as an oil painting"], samples=4)
    assert [(image.uri, image.reused) for image in again] == [(image.uri, True) for image in images]
    more = vary(reference, studio, ["as an oil painting", "in snow"], samples=5)
    assert sum(image.reused for image in more) == 4
    tallies = studio.api.tallies()
    assert (tallies["billed"], tallies["distinct_inputs"], tallies["uploads"]) == (10, 2, 1)


def test_named_variations_are_named_for_prompt_and_sample(studio: Studio, reference: str) -> None:
    images = vary(reference, studio, ["in snow", "in rain"], samples=2, name="fox", model="nano-banana-pro-edit")
    assert [image.item_id for image in images] == ["fox-1-1", "fox-1-2", "fox-2-1", "fox-2-2"]
    assert {tuple(sorted(one["input"])) for one in studio.api.predictions()} == {("image_urls", "prompt")}
    assert sorted(studio.keys()) == ["fox-1-1.png", "fox-1-2.png", "fox-2-1.png", "fox-2-2.png"]


def test_a_sample_whose_answer_was_lost_is_not_bought_twice(
    studio: Studio, reference: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their inputs are equal: what one of them bought is adopted by one of them, once."""
    monkeypatch.setenv("EACHLABS_CLAIM_SECONDS", "2")
    monkeypatch.setenv("EACHLABS_SETTLING_SECONDS", "2")
    studio.api.set_faults("create:lost_answer,at=2")
    images = vary(reference, studio, ["in snow"], samples=3)
    assert len({image.prediction_id for image in images}) == 3
    assert studio.billed == 3


def test_one_refusal_does_not_keep_the_others_from_being_stored(studio: Studio, reference: str) -> None:
    studio.api.set_faults("prediction:fail_moderation,matching=naked")
    with pytest.raises(ContentRefused, match="safety system"):
        vary(reference, studio, ["in snow", "naked", "in rain"])
    assert len(studio.keys()) == 2


@pytest.mark.parametrize(
    ("prompts", "samples", "said"),
    [
        ([], 1, "prompts: none"),
        (["x"], 0, "samples: 0 must be at least 1"),
        (["x"] * 2, 1, "prompts: 'x' stands there twice. For several pictures of one prompt set samples"),
        (["x", "y", "z"], 67, "are 201 pictures, and 200 is the most here: .* run it as a batch"),
        ([" "], 1, "prompt: empty or blank"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    studio: Studio, reference: str, prompts: list[str], samples: int, said: str
) -> None:
    with pytest.raises(BadInput, match=said):
        vary(reference, studio, prompts, samples=samples)
    assert studio.api.tallies()["requests"] == 0


@pytest.mark.parametrize("name", ["/etc/passwd", "../secret.png", "s3://other-bucket/secret.png", "secret.txt"])
def test_whoever_fills_in_the_form_does_not_publish_the_workers_disk(
    studio: Studio, reference: str, tmp_path: Path, name: str
) -> None:
    (tmp_path / "secret.txt").write_text("the worker's")
    with pytest.raises(BadInput, match=r"image_url: .*(EACHLABS_REFERENCE_ROOTS|no picture)"):
        vary(name, studio, ["in snow"])
    assert studio.api.tallies()["requests"] == 0


# ------------------------------------------------------------------------------------ as the documents show it


def test_the_examples_of_the_documents_run(studio: Studio, tmp_path: Path) -> None:
    photo, variations, typed = EXAMPLES
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(photo, "references-and-models-1.py", "exec", dont_inherit=True), names)
    (tmp_path / "fox.png").write_bytes(picture_bytes(1))
    assert names["in_snow"](str(tmp_path / "fox.png"), studio.destination).startswith(studio.destination)

    with closing(boto3.client("s3")) as s3:
        s3.put_object(Bucket=BUCKET, Key="refs/fox.png", Body=picture_bytes(1))
    exec(
        compile(
            variations.replace("s3://acme/", f"s3://{BUCKET}/"), "references-and-models-2.py", "exec", dont_inherit=True
        ),
        names,
    )
    assert len({image.uri for image in names["images"]}) == 8

    exec(compile(typed, "references-and-models-3.py", "exec", dont_inherit=True), names)
    assert names["FluxProInput"](prompt="a red fox", seed=7).eachlabs_model == "flux-1-1-pro"
    assert studio.billed == 9
