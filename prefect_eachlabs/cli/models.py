"""`prefect-eachlabs models`: the catalogue. Free, and public: it works without a key."""

# ruff: noqa: PLC0415 - what is heavy is imported when the command runs, so that help and refusals answer at once

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import sys
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

from prefect_eachlabs.cli.generate import source_of_places
from prefect_eachlabs.cli.options import account_for_the_server
from prefect_eachlabs.retry import retry_while_retryable

if TYPE_CHECKING:
    from prefect_eachlabs.api.catalogue import Catalogue, Model

T = TypeVar("T")

EPILOG = """\
examples:
  prefect-eachlabs models            # all of them
  prefect-eachlabs models banana     # those whose name contains it
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("name", metavar="NAME", nargs="?", default="", help="a part of the name; case does not matter")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else on stdout")


def run(arguments: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.ERROR, stream=sys.stderr, format="%(message)s")
    models = ask_catalogue(lambda catalogue: catalogue.find(arguments.name))
    if arguments.json:
        print(json.dumps({"models": [as_json(model) for model in models]}), flush=True)
        return 0
    if not models:
        print(f"No model's name contains {arguments.name!r}.")
        return 0
    _show(models)
    return 0


def ask_catalogue(question: Callable[[Catalogue], Awaitable[T]]) -> T:
    """The catalogue's answer; in the account's places where there is a key, without one otherwise."""
    from prefect_eachlabs.api.catalogue import Catalogue
    from prefect_eachlabs.api.client import EachlabsClient
    from prefect_eachlabs.engine.runtime import close_gateways, gateway_for
    from prefect_eachlabs.settings import ENVIRONMENT

    if os.environ.get(ENVIRONMENT["api_key"], "").strip():
        try:
            gateway = gateway_for(make_source=source_of_places())
            return gateway.call(retry_while_retryable(lambda: question(gateway.engine.account.catalogue)))
        finally:
            close_gateways()

    async def ask() -> T:
        client = EachlabsClient(account_for_the_server(), anonymous=True)
        try:
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


def _show(models: list[Model]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("model", no_wrap=True)  # to be copied
    for name in ("title", "puts out", "needs", "reference picture"):
        table.add_column(name, overflow="fold")
    for model in models:
        field = model.reference_field
        several = " (several)" if field and field.takes_list else ""
        cells = (
            model.slug,
            model.title,
            {"string": "one picture", "array": "a list"}.get(model.output_type, model.output_type),
            ", ".join(model.required) or ("no schema" if model.request_schema is None else ""),
            f"{field.name}{several}" if field else "",
        )
        table.add_row(*map(Text, cells))
    # Where it goes into a file there is no width to keep to.
    Console(width=None if sys.stdout.isatty() else 160).print(table)
