"""`prefect-eachlabs ...`: which commands there are, and what every one of them has in common.

Nothing heavy is imported before a command runs (Prefect alone takes two seconds): help is to answer at once.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from prefect_eachlabs.errors import BadInput, EachlabsError, ItemConflict, OutcomeUnknown, SetupError
from prefect_eachlabs.net import redaction

ITEM_FAILED, SET_UP_WRONG, INTERRUPTED = 1, 2, 130

COMMANDS = {
    "demo": "pictures from the emulator into a local S3, through a real flow; nothing to set up",
    "generate": "one prompt becomes one PNG in your bucket, bought once",
    "batch": "a table of prompts becomes pictures in your bucket and a report, bought once each",
    "models": "the catalogue: which models there are, or what one takes",
    "settle": "what runs left behind in a bucket: find out, store what was paid for, buy nothing",
    "audit": "the account's bill, joined with the records: did I pay for anything I do not have?",
    "limits": "the account's limits on the Prefect server: create, show, reset",
    "webhooks": "receives the vendor's calls and hands them on as events of the Prefect server",
    "doctor": "what is set up and what is wrong: each line ok, or what to do; costs nothing",
    "setup": "makes work pool, limits and blocks on the Prefect server, as often as you like",
    "emulator": "a stand-in for the Eachlabs API that keeps its rules, on this machine",
    "s3": "a local S3 for demos and tests, on this machine",
}
"""Name → summary. Each is a function of that name in a module of that name, imported when it is called."""

# Written here, not made by cyclopts: importing that takes as long as all the rest of this answer.
HELP = """\
Usage: prefect-eachlabs COMMAND [OPTIONS]

Buys pictures from the Eachlabs prediction API and leaves them safe in your S3 bucket.

commands (each has its own --help):
{commands}

  --version   print the version and exit

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
    in_json = "--json" in words
    try:
        return parse(words)() or 0
    except EachlabsError as error:
        return _report(error, in_json=in_json)
    except KeyboardInterrupt as interrupt:
        return _report_interrupt(interrupt, in_json=in_json)


def parse(words: Sequence[str]) -> Callable[[], int | None]:
    """The command that the words name, ready to run; its module has been imported, and no other.

    Raises:
        BadInput: They are not a command line; says what was meant, perhaps, and whose `--help` says more.
    """
    name = words[0] if words else ""
    if name in ("--help", "-h"):
        listed = "\n".join(f"  {name:<10}  {summary}" for name, summary in COMMANDS.items())
        return partial(print, HELP.format(commands=listed), end="")
    if name == "--version":
        from importlib.metadata import version  # noqa: PLC0415 - slow, and looked up only when it is asked for

        return partial(print, f"prefect-eachlabs {version('prefect-eachlabs')}")
    if name not in COMMANDS:
        from difflib import get_close_matches  # noqa: PLC0415 - for those who mistype

        what = f"Unknown command {name!r}." if name else "Which command?"
        meant = f" Did you mean {', '.join(near)}?" if (near := get_close_matches(name, COMMANDS)) else ""
        raise BadInput(f"{what}{meant} See `prefect-eachlabs --help`.")
    from cyclopts import App, CycloptsError, Parameter  # noqa: PLC0415 - takes longer than to print the help

    # A flag is said as it is declared (`--json` has no `--no-json`); said twice, the last one counts.
    plain = Parameter(negative=(), allow_repeating=True, show_default=False)
    app = App(name="prefect-eachlabs", version_flags=(), help_format="plaintext", default_parameter=plain)
    app.command(f"prefect_eachlabs.cli.{name}:{name}", name=name)
    try:
        command, given, _ = app.parse_args(words, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        what = " ".join(str(error).split())
        raise BadInput(f"{what}{'' if what[-1:] in '.?' else '.'} See `prefect-eachlabs {name} --help`.") from None
    return partial(command, *given.args, **given.kwargs)


def exit_status(error: EachlabsError) -> int:
    """2 for what a person must set right before anything can work, 1 for what befell an item."""
    set_up_wrong = isinstance(error, (BadInput, SetupError)) and not isinstance(error, ItemConflict)
    return SET_UP_WRONG if set_up_wrong else ITEM_FAILED


def _report(error: EachlabsError, *, in_json: bool) -> int:
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
    # Where nothing can have been bought, an item's fingerprint tells nobody anything.
    may_cost = error.prediction_id or isinstance(error, OutcomeUnknown)
    print(f"prefect-eachlabs: {error if may_cost else error.message}", file=sys.stderr)
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
