"""`prefect-eachlabs ...`: which commands there are, and what every one of them has in common.

Nothing heavy is imported before a command runs (Prefect alone takes two seconds): help is to answer at once.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

from prefect_eachlabs.errors import BadInput, EachlabsError, ItemConflict, OutcomeUnknown, SetupError
from prefect_eachlabs.net import redaction

ITEM_FAILED, SET_UP_WRONG, INTERRUPTED = 1, 2, 130


class Command(NamedTuple):
    """A command: a module `prefect_eachlabs.cli.NAME` with `configure(parser)` and `run(arguments) -> int`."""

    name: str
    summary: str


COMMANDS = (
    Command("demo", "pictures from the emulator into a local S3, through a real flow; nothing to set up"),
    Command("generate", "one prompt becomes one PNG in your bucket, bought once"),
    Command("batch", "a table of prompts becomes pictures in your bucket and a report, bought once each"),
    Command("models", "the catalogue: which models there are, or what one takes"),
    Command("settle", "what runs left behind in a bucket: find out, store what was paid for, buy nothing"),
    Command("limits", "the account's limits on the Prefect server: create, show, give leaked places back"),
    Command("doctor", "what is set up and what is wrong: each line ok, or what to do; costs nothing"),
    Command("setup", "makes work pool, limits and blocks on the Prefect server, as often as you like"),
    Command("emulator", "a stand-in for the Eachlabs API that keeps its rules, on this machine"),
)

EPILOG = """\
environment:
  EACHLABS_API_KEY      your key from eachlabs.ai; where the API is: EACHLABS_BASE_URL (https://api.eachlabs.ai)
  EACHLABS_DESTINATION  s3://bucket/prefix, where a command names none
  AWS_...               how to reach the bucket: boto3's own chain; AWS_ENDPOINT_URL_S3 for other stores
  PREFECT_API_URL       with one, the account's limits are shared by all processes of that Prefect server

exit status: 0 all there, 1 an item failed, 2 usage or set-up wrong, 130 interrupted
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status; errors are one line on stderr.

    Args:
        argv: The words after the program's name; those of this process when None.
    """
    redaction.install()
    words = sys.argv[1:] if argv is None else list(argv)
    parser = _parser_for(words)
    try:
        arguments = parser.parse_args(words)
    except UsageError as error:
        print(f"{error.usage}prefect-eachlabs: {error}", file=sys.stderr)
        return _report(BadInput(str(error)), in_json="--json" in words, told=True)
    except SystemExit as end:  # --help and --version have been printed
        return int(end.code or 0)
    in_json = bool(getattr(arguments, "json", False))
    try:
        status: int = arguments.run(arguments)
    except EachlabsError as error:
        return _report(error, in_json=in_json)
    except KeyboardInterrupt as interrupt:
        return _report_interrupt(interrupt, in_json=in_json)
    return status


def exit_status(error: EachlabsError) -> int:
    """2 for what a person must set right before anything can work, 1 for what befell an item."""
    set_up_wrong = isinstance(error, (BadInput, SetupError)) and not isinstance(error, ItemConflict)
    return SET_UP_WRONG if set_up_wrong else ITEM_FAILED


def _report(error: EachlabsError, *, in_json: bool, told: bool = False) -> int:
    # A run's state does not show a table's head; a person may see it.
    of_a_table = error.details if isinstance(error, BadInput) else None
    if in_json:
        _print_json(
            {
                "status": "ambiguous" if isinstance(error, OutcomeUnknown) else "failed",
                "error": f"{error} {of_a_table}" if of_a_table else str(error),
                "item_id": error.item_id,
                "prediction_id": error.prediction_id,
            }
        )
    if not told:
        print(f"prefect-eachlabs: {error}", file=sys.stderr)
        if error.details and error.details not in str(error):
            print(of_a_table or f"The API said: {error.details}", file=sys.stderr)
    return exit_status(error)


def _report_interrupt(interrupt: KeyboardInterrupt, *, in_json: bool) -> int:
    """What a Ctrl-C has come to; a second one ends the process here, whatever still waits for an answer."""
    message = getattr(interrupt, "message", "Interrupted.")
    if in_json:
        answer = {"item_id": None, "prediction_id": None, **getattr(interrupt, "answer", {})}
        _print_json({**answer, "status": "failed", "error": message})
    print(message, file=sys.stderr, flush=True)
    if getattr(interrupt, "at_once", False):
        os._exit(INTERRUPTED)
    return INTERRUPTED


def _print_json(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


class UsageError(Exception):
    """Words that are no command line; `usage` is how one looks."""

    def __init__(self, message: str, usage: str) -> None:
        super().__init__(message)
        self.usage = usage


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}. See `{self.prog} --help`.", self.format_usage())


class _PrintVersion(argparse.Action):
    """Looks the version up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        metadata = importlib.import_module("importlib.metadata")
        print(f"prefect-eachlabs {metadata.version('prefect-eachlabs')}")
        parser.exit()


def _parser_for(words: Sequence[str]) -> argparse.ArgumentParser:
    """The parser; only the command that is called learns its flags, the others are not even imported."""
    parser = _Parser(
        prog="prefect-eachlabs",
        description="Buys pictures from the Eachlabs prediction API and leaves them safe in your S3 bucket.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_PrintVersion, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    called = next((word for word in words if not word.startswith("-")), None)
    for command in COMMANDS:
        own = commands.add_parser(
            command.name,
            help=command.summary,
            description=f"{command.summary[0].upper()}{command.summary[1:]}.",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        if command.name == called:
            module = importlib.import_module(f"prefect_eachlabs.cli.{command.name}")
            module.configure(own)
            own.set_defaults(run=module.run)
    return parser
