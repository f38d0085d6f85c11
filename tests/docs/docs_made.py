"""Parts of the documentation that the code knows better: `python -m tests.docs.docs_made` writes them, a test compares.

A page marks such a part by two comments, which readers do not see: `<!-- made: NAME -->` and `<!-- /made -->`.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from prefect_eachlabs import errors
from prefect_eachlabs.cli import main as cli
from prefect_eachlabs.settings import ENVIRONMENT, AccountSettings
from prefect_eachlabs.testing.emulator import EmulatorOptions, faults

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PART = re.compile(r"(<!-- made: ([a-z ]+) -->\n).*?(<!-- /made -->)", re.DOTALL)
HELP_COLUMNS = 100


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def described(kind: type[Any]) -> dict[str, str]:
    """Attribute → its words in the Google-style docstring."""
    listed = inspect.cleandoc(str(kind.__doc__)).partition("Attributes:\n")[2]  # from 3.13 on it is clean already
    words = {}
    for entry in re.split(r"\n {4}(?=\w)", "\n" + listed):
        names, _, text = entry.partition(": ")
        for name in names.split(","):
            words[name.strip()] = " ".join(text.split())
    return words


def settings() -> str:
    words = described(AccountSettings)
    rows = []
    for field, variable in ENVIRONMENT.items():
        default = "" if field == "api_key" else AccountSettings.model_fields[field].default
        shown = f"{default:g}" if isinstance(default, float) else str(default)
        rows.append([f"`{variable}`", f"`{shown}`" if shown else "", words[field].replace("None: no", "`none`: no")])
    return table(["variable", "default", ""], rows)


def emulator_options() -> str:
    words = described(EmulatorOptions)
    rows = []
    for name, field in EmulatorOptions.model_fields.items():
        shown = f"{field.default:g}" if isinstance(field.default, float) else repr(field.default)
        rows.append([f"`{name}`", f"`{shown}`", words.get(name, "See `service_seconds`.")])
    return table(["option", "default", ""], rows)


def block_fields() -> str:
    from prefect_eachlabs.blocks import EachlabsCredentials, S3Destination

    parts = []
    for block in (EachlabsCredentials, S3Destination):
        rows = [[f"`{name}`", str(field.title), str(field.description)] for name, field in block.model_fields.items()]
        parts.append(f"`{block.get_block_type_slug()}`:\n\n" + table(["field", "in the UI", ""], rows))
    return "\n\n".join(parts)


def record_fields() -> str:
    schema = json.loads((DOCS / "record.schema.json").read_text(encoding="utf-8"))
    rows = []
    for name, field in schema["properties"].items():
        shape = field.get("$ref", "") or next((o["$ref"] for o in field.get("anyOf", []) if "$ref" in o), "")
        target = schema["$defs"].get(shape.rpartition("/")[2], {})
        words = field.get("description") or target.get("description", "")
        values = ", ".join(f"`{value}`" for value in target.get("enum", []))
        rows.append([f"`{name}`", f"{words} {values}".strip()])
    return table(["field", ""], rows)


def error_tree() -> str:
    return "```text\n" + str(errors.__doc__).partition("\n\n")[2].strip() + "\n```"


def fault_kinds(kinds: dict[str, str]) -> str:
    return table(["kind", "what happens"], [[f"`{kind}`", words] for kind, words in kinds.items()])


def special_faults() -> str:
    of = {"prediction": "Predictions, drawn once for each order that was taken", "picture": "Downloads of a picture"}
    parts = []
    for endpoint, kinds in faults.SPECIAL.items():
        parts.append(f"{of.get(endpoint, f'Only `{endpoint}`')} (`{endpoint}:...`):\n\n{fault_kinds(kinds)}")
    return "\n\n".join(parts)


def help_of(command: str) -> str:
    """What `prefect-eachlabs COMMAND --help` prints, 100 columns wide."""
    before, said = os.environ.get("COLUMNS"), io.StringIO()
    os.environ["COLUMNS"] = str(HELP_COLUMNS)
    try:
        with contextlib.redirect_stdout(said):
            assert cli.main([*command.split(), "--help"]) == 0
    finally:
        os.environ.pop("COLUMNS")
        if before is not None:
            os.environ["COLUMNS"] = before
    return said.getvalue().rstrip()


def help_texts() -> str:
    parts = [f"## prefect-eachlabs\n\n```text\n{help_of('')}\n```"]
    for command in cli.COMMANDS:
        parts.append(f"## prefect-eachlabs {command}\n\n```text\n{help_of(command)}\n```")
    return "\n\n".join(parts)


MADE: dict[str, Callable[[], str]] = {
    "settings": settings,
    "emulator options": emulator_options,
    "block fields": block_fields,
    "record fields": record_fields,
    "error tree": error_tree,
    "faults before": lambda: fault_kinds(faults.BEFORE),
    "faults after": lambda: fault_kinds(faults.AFTER),
    "faults special": special_faults,
    "help": help_texts,
}


def parts_of(page: Path) -> Iterator[tuple[str, str]]:
    """Each part's name and what stands in the page."""
    for found in PART.finditer(page.read_text(encoding="utf-8")):
        yield found[2], found[0].removeprefix(found[1]).removesuffix(found[3]).strip()


def main() -> None:
    for page in sorted(DOCS.rglob("*.md")):
        text = page.read_text(encoding="utf-8")
        made = PART.sub(lambda found: f"{found[1]}\n{MADE[found[2]]()}\n\n{found[3]}", text)
        if made != text:
            page.write_text(made, encoding="utf-8")
            sys.stdout.write(f"{page.relative_to(ROOT)}\n")


if __name__ == "__main__":
    main()
