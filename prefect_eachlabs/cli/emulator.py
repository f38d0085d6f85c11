"""`prefect-eachlabs emulator`: the stand-in for the API, in the foreground until Ctrl-C."""

# ruff: noqa: PLC0415 - what is heavy is imported when the command runs, so that help answers at once

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from prefect_eachlabs.cli.options import count_or_none
from prefect_eachlabs.errors import BadInput, SetupError

EPILOG = """\
Point a program at it:
  export EACHLABS_BASE_URL=http://127.0.0.1:8700 EACHLABS_API_KEY=any-key

It judges while it runs: GET /_emulator/tallies (billed, worst window, worst in flight), /_emulator/journal,
/_emulator (options and every kind of fault), POST /_emulator/faults and /_emulator/reset.

A fault is ENDPOINT:KIND[=RATE][,NAME=VALUE]..., for example
  --fault create:lost_answer=0.05              one POST in twenty is billed and not answered
  --fault create:error,status=500,matching=fox each POST with that word in its prompt is answered 500
  --fault picture:not_found,first=2            the first two downloads of each picture are answered 404
  --fault prediction:listed_late,seconds=90    executions show a prediction 90 s after its POST
Names: at=3+7 (the 3rd and 7th call), next=2, first=2 (of each prompt, prediction or picture), matching=TEXT (of the
prompt), sticky, seconds, status, value. Endpoints are create, get, cancel, executions, models, presign, upload; and
prediction (drawn once for each POST that was taken) and picture (each download), which have kinds of their own alone:
"""

KINDS = Path(__file__).parents[1] / "testing" / "emulator" / "fault_kinds.json"

FLAGS: tuple[tuple[str, type, str, str], ...] = (
    ("service_seconds", float, "S", "mean time from POST to end (5)"),
    ("spread", float, "X", "relative standard deviation of that time (0.2)"),
    ("seed", int, "N", "makes service times and faults the same in each run (0)"),
    ("cost_usd", float, "USD", "what a picture costs (0.039)"),
    ("settle_seconds", float, "S", "costs are told so long after the end (0)"),
    ("balance_usd", float, "USD", "what the account may spend, else 402 (no end)"),
    ("image_size_px", int, "PX", "width and height of the pictures (512)"),
    ("picture_query", str, "TEXT", "appended to the pictures' URLs, as a signature would be"),
    ("public_url", str, "URL", "where others reach this server (the host they ask)"),
    ("long_poll_seconds", float, "S", "a GET of an unfinished prediction is held so long (0)"),
    ("clock_skew_seconds", float, "S", "the vendor's dates are off by so much (0)"),
    ("listing_delay_seconds", float, "S", "executions shows the world as it was so long ago (0)"),
)
"""Options of the emulator that are plain values: field, type, what stands for the value, help."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG + _kinds()
    parser.add_argument("--host", default="127.0.0.1", help="where it listens (127.0.0.1)")
    parser.add_argument("--port", type=int, default=8700, help="0 takes a free one (8700)")
    _add(parser, "api_keys", flag="--api-key", action="append", metavar="KEY", help="a good key (any); repeatable")
    for field, limit in (("requests_per_minute", 60), ("max_in_flight", 10)):
        _add(parser, field, type=count_or_none, metavar="N", help=f"else 429; 'none': no limit ({limit})")
    for field, kind, shown, text in FLAGS:
        _add(parser, field, type=kind, metavar=shown, help=text)
    _add(parser, "retry_after", choices=("none", "seconds", "date"), help="what a 429 says in Retry-After (none)")
    _add(parser, "pictures", choices=("drawn", "plain"), help="drawn shows the prompt, plain is quick (drawn)")
    _add(parser, "count_rejected", action="store_true", help="requests answered by 429 count against the minute too")
    _add(parser, "require_version", action="store_true", help="refuse a POST without a version")
    unknown = "take models outside the catalogue, and any input"
    _add(parser, "strict_models", flag="--any-model", action="store_false", help=unknown)
    _add(parser, "faults", flag="--fault", action="append", metavar="FAULT", help="see below; repeatable")


def _kinds() -> str:
    """Every kind of fault, with a line about each."""
    known: dict[str, dict[str, str]] = json.loads(KINDS.read_text(encoding="utf-8"))
    shared = {"every endpoint": {**known.pop("before"), **known.pop("after")}}
    return "".join(
        f"  {endpoint}\n" + "".join(f"    {kind:<19} {words}\n" for kind, words in kinds.items())
        for endpoint, kinds in {**shared, **known}.items()
    )


def _add(parser: argparse.ArgumentParser, field: str, *, flag: str = "", **how: Any) -> None:
    """A flag for an option; not given, it is not in the namespace: the default is the emulator's own."""
    parser.add_argument(flag or f"--{field.replace('_', '-')}", dest=field, default=argparse.SUPPRESS, **how)


def run(arguments: argparse.Namespace) -> int:
    try:
        from prefect_eachlabs.testing.emulator import EmulatorOptions, run_emulator
    except ImportError as error:
        raise SetupError(f"The emulator needs {error.name}: pip install 'prefect-eachlabs[demo]'.") from error
    from pydantic import ValidationError

    given = {name: value for name, value in vars(arguments).items() if name in EmulatorOptions.model_fields}
    try:
        options = EmulatorOptions(**given)
    except ValidationError as error:
        faults = "; ".join(
            f"{_flag(fault['loc'])}: {fault['msg'].removeprefix('Value error, ')}"
            for fault in error.errors(include_input=False, include_url=False)
        )
        raise BadInput(f"The emulator cannot be set up so: {faults}.") from None
    try:
        run_emulator(options, arguments.host, arguments.port, say=_say)
    except (OSError, OverflowError) as error:
        place = f"{arguments.host}:{arguments.port}"
        raise SetupError(f"The emulator cannot listen on {place} ({error}): choose another --port or --host.") from None
    return 0


def _flag(location: tuple[int | str, ...]) -> str:
    field = str(location[0]) if location else "fault"
    return {"faults": "--fault", "api_keys": "--api-key"}.get(field, f"--{field.replace('_', '-')}")


def _say(line: str) -> None:
    print(line, flush=True)
    print("Ctrl-C ends it. `prefect-eachlabs emulator --help` says what can be set and asked.", file=sys.stderr)
