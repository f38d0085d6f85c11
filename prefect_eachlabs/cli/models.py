"""`prefect-eachlabs models [SLUG]`: the catalogue, or what one model takes. Free, and public: no key is needed."""

# ruff: noqa: PLC0415 - what is heavy is imported when the command runs, so that help and refusals answer at once

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from prefect_eachlabs.cli.account import account_for_the_server
from prefect_eachlabs.cli.options import InJson, flag
from prefect_eachlabs.errors import BadInput
from prefect_eachlabs.retry import retry_while_retryable

if TYPE_CHECKING:
    from prefect_eachlabs.api.catalogue import Catalogue, Model

T = TypeVar("T")

_SAID_ELSEWHERE = {"type", "title", "description", "items", "anyOf", "oneOf"}


def models(
    slug: Annotated[str, flag("one model; without it, all are listed")] = "", /, *, in_json: InJson = False
) -> int:
    """The catalogue: which models there are, or what one takes.

    examples:
      prefect-eachlabs models            # all of them
      prefect-eachlabs models imagen-4   # its fields; --json for its schema
      prefect-eachlabs generate "a fox" --model imagen-4 --input num_images=2
    """
    logging.basicConfig(level=logging.ERROR, stream=sys.stderr, format="%(message)s")
    from prefect_eachlabs.models import check_model_name

    if not slug:
        found = ask_catalogue(lambda catalogue: catalogue.find())
        if in_json:
            print(json.dumps({"models": [as_json(model) for model in found]}), flush=True)
        else:
            print("\n".join(map(_line, found)) or "The catalogue is empty.")
        return 0
    slug = check_model_name(slug)
    model = ask_catalogue(lambda catalogue: catalogue.model(slug))
    if model is None:
        from prefect_eachlabs.api.catalogue import nearest

        near = nearest(slug, [model.slug for model in ask_catalogue(lambda catalogue: catalogue.find())])
        said = f"The nearest: {', '.join(near)}." if near else "`prefect-eachlabs models` lists what there is."
        raise BadInput(f"model: the catalogue has no {slug!r}. {said}")
    print(json.dumps(as_json(model)) if in_json else "\n".join(_described(model)), flush=True)
    return 0


def ask_catalogue(question: Callable[[Catalogue], Awaitable[T]]) -> T:
    """The catalogue's answer. No key goes with the question, so that it takes none of the account's slots."""
    from prefect_eachlabs.api.catalogue import Catalogue
    from prefect_eachlabs.api.client import EachlabsClient

    async def ask() -> T:
        client = EachlabsClient(account_for_the_server(), anonymous=True)
        try:
            await client.check_api()
            return await retry_while_retryable(lambda: question(Catalogue(client, None)))
        finally:
            await client.aclose()

    return asyncio.run(ask())


def as_json(model: Model) -> dict[str, object]:
    """What `--json` says of a model."""
    field = model.reference_field
    return {
        "slug": model.slug,
        "title": model.title,
        "output_type": model.output_type,
        "reference_field": field.name if field else None,
        "request_schema": model.request_schema,
    }


def _line(model: Model) -> str:
    """A model in the list."""
    field = model.reference_field
    needs = ", ".join(model.required) or ("no schema" if model.request_schema is None else "nothing")
    picture = f"; reference picture: {field.name}{' (several)' if field.takes_list else ''}" if field else ""
    return _plain(f"{model.slug:24} {model.title}; needs {needs}{picture}")


def _described(model: Model) -> list[str]:
    """A model and its fields, a line each."""
    puts_out = {"string": "one picture", "array": "a list of pictures"}.get(model.output_type, model.output_type)
    lines = [_plain(f"{model.title} ({model.slug}) puts out {puts_out or 'what nobody says'}.")]
    if model.request_schema is None:
        return [*lines, "The catalogue has no schema of it: its inputs go unchecked."]
    field = model.reference_field
    for name, schema in model.properties.items():
        facts = ["needed"] if name in model.required else []
        facts += ["the reference picture (image_url, --image-url)"] if field and name == field.name else []
        facts += [f"{word} {_value(value)}" for word, value in schema.items() if word not in _SAID_ELSEWHERE]
        facts += [str(schema[word]) for word in ("description",) if word in schema]
        lines.append(_plain(f"  {name}: {_kind(schema)}; {'; '.join(facts)}").rstrip("; "))
    return [*lines, "It takes no other field."] if model.request_schema.get("additionalProperties") is False else lines


def _kind(schema: Mapping[str, Any]) -> str:
    """A field's type in a word or two."""
    kind, items = schema.get("type"), schema.get("items")
    if kind == "array":
        return f"list of {_kind(items)}" if isinstance(items, Mapping) else "list"
    choices = schema.get("anyOf") or schema.get("oneOf") if kind is None else kind
    if isinstance(choices, list):
        return " or ".join(_kind(choice) if isinstance(choice, Mapping) else str(choice) for choice in choices)
    return str(kind or "any")


def _value(value: Any) -> str:
    listed = value if isinstance(value, list) else [value]
    return ", ".join(one if isinstance(one, str) else json.dumps(one, ensure_ascii=False) for one in listed)


def _plain(text: str) -> str:
    """One line of at most 300 characters that does nothing to a terminal: the catalogue's words are another's."""
    return "".join(sign if sign.isprintable() else " " for sign in text[:300])
