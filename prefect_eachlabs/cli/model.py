"""`prefect-eachlabs model SLUG`: what one model takes, as a table. Free, and public: it works without a key."""

# ruff: noqa: PLC0415 - what is heavy is imported when the command runs, so that help and refusals answer at once

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from prefect_eachlabs.cli.models import as_json, ask_catalogue
from prefect_eachlabs.errors import BadInput

if TYPE_CHECKING:
    from prefect_eachlabs.api.catalogue import Model

EPILOG = """\
example:
  prefect-eachlabs model imagen-4
  prefect-eachlabs generate "a red fox" --to s3://acme/daily --model imagen-4 --input num_images=2
"""
_BOUNDS = {
    "minimum": "at least {}",
    "maximum": "at most {}",
    "exclusiveMinimum": "more than {}",
    "exclusiveMaximum": "less than {}",
    "minLength": "{} characters or more",
    "maxLength": "{} characters at most",
    "minItems": "{} items or more",
    "maxItems": "{} items at most",
    "multipleOf": "a multiple of {}",
    "pattern": "like {}",
    "format": "a {}",
}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("slug", metavar="SLUG", help="the model's slug, as `models` lists it")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else on stdout")


def run(arguments: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.ERROR, stream=sys.stderr, format="%(message)s")
    from prefect_eachlabs.models import check_model_name

    slug = check_model_name(arguments.slug)
    model = ask_catalogue(lambda catalogue: catalogue.model(slug))
    if model is None:
        raise BadInput(f"model: the catalogue has no {slug!r}. `prefect-eachlabs models` lists what there is.")
    if arguments.json:
        print(json.dumps(as_json(model)), flush=True)
    else:
        _show(model)
    return 0


def _show(model: Model) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # Where it goes into a file there is no width to keep to.
    console = Console(width=None if sys.stdout.isatty() else 160)
    puts_out = {"string": "one picture", "array": "a list of pictures"}.get(model.output_type, model.output_type)
    console.print(Text(f"{model.title} ({model.slug}) puts out {puts_out or 'what nobody says'}."))
    if model.request_schema is None:
        console.print("The catalogue has no schema of it: its inputs go unchecked.")
        return
    field = model.reference_field
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("field", no_wrap=True)  # to be copied
    for name in ("type", "needed", "default", "may be", "about"):
        table.add_column(name, overflow="fold")
    for name, schema in model.properties.items():
        about = str(schema.get("description") or schema.get("title") or "")
        if field is not None and name == field.name:
            about = f"the reference picture (image_url, --image-url){'; ' if about else ''}{about}"
        cells = (
            name,
            kind_of(schema),
            "yes" if name in model.required else "",
            json.dumps(schema["default"], ensure_ascii=False) if "default" in schema else "",
            bounds_of(schema),
            about,
        )
        table.add_row(*(Text(cell[:300]) for cell in cells))
    console.print(table)
    if model.request_schema.get("additionalProperties") is False:
        console.print("It takes no other field.")


def kind_of(schema: Mapping[str, Any]) -> str:
    """A field's type in a word or two."""
    kind = schema.get("type")
    if isinstance(kind, list):
        return " or ".join(map(str, kind))
    if kind == "array":
        items = schema.get("items")
        return f"list of {kind_of(items)}" if isinstance(items, Mapping) and items else "list"
    if kind is None:
        choices = schema.get("anyOf") or schema.get("oneOf")
        listed = [kind_of(choice) for choice in choices if isinstance(choice, Mapping)] if choices else []
        return " or ".join(dict.fromkeys(listed))
    return str(kind)


def bounds_of(schema: Mapping[str, Any]) -> str:
    """What a field's value may be, in words."""
    if isinstance(schema.get("enum"), list):
        return ", ".join(json.dumps(value, ensure_ascii=False).strip('"') for value in schema["enum"])
    return ", ".join(words.format(schema[name]) for name, words in _BOUNDS.items() if name in schema)
