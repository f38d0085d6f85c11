"""A few models of the catalogue, each with a schema of another kind. The schemas are the emulator's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jsonschema import Draft202012Validator  # type: ignore[import-untyped]  # it ships no types

_PROMPT = {"type": "string", "minLength": 1, "maxLength": 10_000, "description": "What the picture shows"}
_RATIO = {"type": "string", "enum": ["1:1", "16:9", "9:16", "4:3", "3:4"], "default": "1:1"}
_SEED = {"type": "integer", "minimum": 0}
_URL = {"type": "string", "format": "uri"}


@dataclass(frozen=True)
class Model:
    """A model: what it takes (`request_schema`) and whether it puts out one URL (`string`) or a list (`array`)."""

    slug: str
    title: str
    output_type: str
    request_schema: Mapping[str, Any] | None

    @property
    def defaults(self) -> dict[str, Any]:
        properties = (self.request_schema or {}).get("properties", {})
        return {name: schema["default"] for name, schema in properties.items() if "default" in schema}

    def view(self) -> dict[str, Any]:
        """As GET /v1/models and /v1/model show it; `version` is what the vendor always says."""
        view: dict[str, Any] = {
            "title": self.title,
            "slug": self.slug,
            "version": "0.0.1",
            "output_type": self.output_type,
        }
        return view if self.request_schema is None else {**view, "request_schema": dict(self.request_schema)}

    def faults_of(self, input: Mapping[str, Any]) -> list[dict[str, str]]:
        """What the schema has against an input, field by field."""
        if self.request_schema is None:
            return []
        return [
            {"field": ".".join(["input", *map(str, fault.absolute_path)]), "message": fault.message[:200]}
            for fault in Draft202012Validator(dict(self.request_schema)).iter_errors(dict(input))
        ]

    def pictures_in(self, input: Mapping[str, Any]) -> int:
        """How many pictures an input asks for."""
        wanted = input.get("num_images", self.defaults.get("num_images", 1))
        return wanted if isinstance(wanted, int) and not isinstance(wanted, bool) and 1 <= wanted <= 16 else 1


def _schema(required: list[str], *, closed: bool = False, **properties: Mapping[str, Any]) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object", "required": required, "properties": properties}
    return {**schema, "additionalProperties": False} if closed else schema


CATALOGUE: dict[str, Model] = {
    model.slug: model
    for model in (
        Model("gemini", "Gemini 2.0 Flash Image", "string", _schema(["prompt"], prompt=_PROMPT, image_url=_URL)),
        Model(
            "flux-1-1-pro",
            "FLUX 1.1 pro",
            "string",
            _schema(
                ["prompt"],
                closed=True,
                prompt=_PROMPT,
                aspect_ratio=_RATIO,
                seed=_SEED,
                output_format={"type": "string", "enum": ["png", "jpeg", "webp", "gif"], "default": "png"},
            ),
        ),
        Model(
            "flux-kontext-pro",
            "FLUX.1 Kontext pro",
            "string",
            _schema(["prompt", "input_image"], prompt=_PROMPT, input_image=_URL, aspect_ratio=_RATIO),
        ),
        Model(
            "nano-banana-pro-edit",
            "Nano Banana Pro Edit",
            "array",
            _schema(
                ["prompt", "image_urls"],
                prompt=_PROMPT,
                image_urls={"type": "array", "items": _URL, "minItems": 1, "maxItems": 8},
                num_images={"type": "integer", "minimum": 1, "maximum": 4, "default": 1},
            ),
        ),
        Model(
            "imagen-4",
            "Imagen 4",
            "array",
            _schema(
                ["prompt"],
                closed=True,
                prompt=_PROMPT,
                num_images={"type": "integer", "minimum": 1, "maximum": 4, "default": 2},
            ),
        ),
        Model(
            "photon-restyle",
            "Photon Restyle",
            "string",
            _schema(["prompt"], prompt=_PROMPT, images={"type": "array", "items": _URL, "maxItems": 4}),
        ),
        Model(
            "upscaler",
            "Upscaler",
            "string",
            _schema(
                ["image"],
                image=_URL,
                scale={"type": "integer", "enum": [2, 4], "default": 2},
            ),
        ),
        Model("schemaless", "A model without a schema", "string", None),
    )
}
