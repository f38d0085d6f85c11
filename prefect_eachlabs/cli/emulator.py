"""`prefect-eachlabs emulator`: the stand-in for the API, in the foreground until Ctrl-C."""

# ruff: noqa: PLC0415 - what is heavy is imported when the command runs, so that help answers at once

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from prefect_eachlabs.cli.options import Port, Verbose, cannot_listen, flag, log_requests
from prefect_eachlabs.errors import BadInput, SetupError

KINDS = Path(__file__).parents[1] / "testing" / "emulator" / "fault_kinds.json"


@Parameter(name="*")
@dataclass(frozen=True)
class Flags:
    """Fields of `EmulatorOptions`, which checks them; what is not given is its own default."""

    api_keys: Annotated[Sequence[str] | None, flag("a good key (any); repeatable", name="--api-key")] = None
    requests_per_minute: Annotated[int | Literal["none"] | None, flag("else 429; none: no limit (60)")] = None
    max_in_flight: Annotated[int | Literal["none"] | None, flag("else 429; none: no limit (10)")] = None
    service_seconds: Annotated[float | None, flag("mean time from POST to end (5)")] = None
    spread: Annotated[float | None, flag("relative standard deviation of that time (0.2)")] = None
    seed: Annotated[int | None, flag("makes service times and faults the same in each run (0)")] = None
    cost_usd: Annotated[float | None, flag("what a picture costs (0.039)")] = None
    settle_seconds: Annotated[float | None, flag("costs are told so long after the end (0)")] = None
    balance_usd: Annotated[float | None, flag("what the account may spend, else 402 (no end)")] = None
    image_size_px: Annotated[int | None, flag("width and height of the pictures (512)")] = None
    picture_query: Annotated[str | None, flag("appended to the pictures' URLs, as a signature would be")] = None
    public_url: Annotated[str | None, flag("where others reach this server (the host they ask)")] = None
    long_poll_seconds: Annotated[float | None, flag("a GET of an unfinished prediction is held so long (0)")] = None
    clock_skew_seconds: Annotated[float | None, flag("the vendor's dates are off by so much (0)")] = None
    listing_delay_seconds: Annotated[float | None, flag("executions shows the world as it was so long ago (0)")] = None
    webhooks: Annotated[
        Literal["newest", "older", "none"] | None, flag("which of the vendor's texts calls of webhooks follow (newest)")
    ] = None
    webhook_retry_seconds: Annotated[float | None, flag("between two attempts of a call, of three (10)")] = None
    retry_after: Annotated[Literal["none", "seconds", "date"] | None, flag("what a 429 says in Retry-After (none)")] = (
        None
    )
    pictures: Annotated[Literal["drawn", "plain"] | None, flag("drawn shows the prompt, plain is quick (drawn)")] = None
    count_rejected: Annotated[bool, flag("requests answered by 429 count against the minute too")] = False
    require_version: Annotated[bool, flag("refuse a POST without a version")] = False
    any_model: Annotated[bool, flag("take models outside the catalogue, and any input")] = False
    faults: Annotated[Sequence[str] | None, flag("see above; repeatable", name="--fault")] = None


NONE_GIVEN = Flags()
READY = """\
In another terminal:
  export EACHLABS_BASE_URL={url} EACHLABS_API_KEY={key}
Ctrl-C ends it. `prefect-eachlabs emulator --help` says what can be set and asked."""


def emulator(
    *,
    host: Annotated[str, flag("where it listens (127.0.0.1)")] = "127.0.0.1",
    port: Annotated[Port, flag("0 takes a free one (8700)")] = 8700,
    verbose: Verbose = False,
    flags: Flags = NONE_GIVEN,
) -> int:
    """A stand-in for the Eachlabs API that keeps its rules, on this machine.

    Point a program at it:
      export EACHLABS_BASE_URL=http://127.0.0.1:8700 EACHLABS_API_KEY=any-key

    It judges while it runs: GET /_emulator/tallies (billed, worst window, worst in
    flight), /_emulator/journal, /_emulator (options and every kind of fault), POST
    /_emulator/faults and /_emulator/reset.

    A fault is ENDPOINT:KIND[=RATE][,NAME=VALUE]..., for example
      --fault create:lost_answer=0.05
                           one POST in twenty is billed and not answered
      --fault create:error,status=500,matching=fox
                           each POST with that word in its prompt is answered 500
      --fault picture:not_found,first=2
                           the first two downloads of each picture are answered 404
      --fault prediction:listed_late,seconds=90
                           executions show a prediction 90 s after its POST
    Names: at=3+7 (the 3rd and 7th call), next=2, first=2 (of each prompt,
    prediction or picture), matching=TEXT (of the prompt), sticky, seconds, status,
    value. Endpoints are create, get, cancel, executions, models, presign, upload, webhooks;
    and prediction (drawn once for each POST that was taken) and picture (each
    download) and webhook (each call), which have kinds of their own alone:
    """
    try:
        from prefect_eachlabs.testing.emulator import EmulatorOptions, run_emulator
    except ImportError as error:
        raise SetupError(f"The emulator needs {error.name}: pip install 'prefect-eachlabs[demo]'.") from error
    from pydantic import ValidationError

    from prefect_eachlabs.settings import faults_in

    given = {name: value for name, value in vars(flags).items() if value is not None}
    unlimited = {name: None for name in ("requests_per_minute", "max_in_flight") if given.get(name) == "none"}
    try:
        options = EmulatorOptions(strict_models=not given.pop("any_model"), **{**given, **unlimited})
    except ValidationError as error:
        raise BadInput(f"The emulator cannot be set up so: {faults_in(error, _flag)}.") from None
    if verbose:
        log_requests("prefect_eachlabs.testing.emulator")

    def say(line: str) -> None:
        print(line, flush=True)
        key = next(iter(flags.api_keys or ()), "any-key")
        print(READY.format(url=line.rsplit(maxsplit=1)[-1], key=key), file=sys.stderr)

    try:
        run_emulator(options, host, port, say=say)
    except OSError as error:
        raise cannot_listen(error, port, host) from None
    return 0


def _kinds() -> str:
    """Every kind of fault, with a line about each: the end of the help."""
    known: dict[str, dict[str, str]] = json.loads(KINDS.read_text(encoding="utf-8"))
    shared = {"every endpoint": {**known.pop("before"), **known.pop("after")}}
    return "".join(
        f"      {endpoint}\n" + "".join(f"        {kind:<19} {words}\n" for kind, words in kinds.items())
        for endpoint, kinds in {**shared, **known}.items()
    )


emulator.__doc__ = f"{str(emulator.__doc__).rstrip()}\n{_kinds()}"


def _flag(field: str) -> str:
    return {"faults": "--fault", "api_keys": "--api-key", "": "--fault"}.get(field, f"--{field.replace('_', '-')}")
