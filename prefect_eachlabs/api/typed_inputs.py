"""Typed inputs: a model's fields as a class, so that an editor completes them and a typo is found where it is made.

One of your own takes ten lines:

    class FluxProInput(TypedInput):
        eachlabs_model: ClassVar[str] = "flux-1-1-pro"

        prompt: str = Field(min_length=1)
        aspect_ratio: Literal["1:1", "16:9", "9:16"] = "1:1"
        seed: int | None = Field(default=None, ge=0)

    generate_and_store(input=FluxProInput(prompt="a red fox", seed=7), destination="s3://acme/daily")
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError

from prefect_eachlabs.models import DEFAULT_MODEL, DEFAULT_VERSION


class TypedInput(BaseModel):
    """A model's input. Fields that are None are not sent.

    Attributes:
        eachlabs_model: The model's slug.
        eachlabs_version: Its version; None: none is sent.
    """

    model_config = ConfigDict(extra="forbid")

    eachlabs_model: ClassVar[str]
    eachlabs_version: ClassVar[str | None] = None


class GeminiImageInput(TypedInput):
    """The input of the first model, `gemini`, as its page describes it.

    Attributes:
        prompt: What the picture shows: subject, action, surroundings, style.
        image_url: A reference picture: an http(s) URL or `s3://bucket/key`.
    """

    # The page may know less than the model: what it does not name is sent as it is.
    model_config = ConfigDict(extra="allow")

    eachlabs_model: ClassVar[str] = DEFAULT_MODEL
    eachlabs_version: ClassVar[str | None] = DEFAULT_VERSION

    prompt: str
    image_url: str | None = None


BUILT_IN: dict[str, type[TypedInput]] = {GeminiImageInput.eachlabs_model: GeminiImageInput}
"""Models whose input is known without asking the catalogue."""


def faults_of(typed: type[TypedInput], input: Mapping[str, Any]) -> list[str]:
    """What a typed input has against an input, field by field."""
    try:
        typed.model_validate(dict(input))
    except ValidationError as error:
        return [
            f"input.{'.'.join(map(str, fault['loc']))}: {fault['msg']}"
            for fault in error.errors(include_input=False, include_url=False)
        ]
    return []
