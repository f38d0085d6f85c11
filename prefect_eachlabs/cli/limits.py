"""`prefect-eachlabs limits`: the account's shared limits on the Prefect server: create, show, mend."""

# ruff: noqa: PLC0415 - what is heavy is imported when the command runs, so that help and refusals answer at once

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from prefect_eachlabs.cli.options import account_for_the_server, count_or_none

if TYPE_CHECKING:
    from prefect_eachlabs.limits.admin import LimitStatus

EPILOG = """\
apply  writes the account's numbers (EACHLABS_REQUESTS_PER_MINUTE, EACHLABS_MAX_IN_FLIGHT) to the server
show   what is taken, by how many processes, and whether places are leaked
reset  gives leaked places back; what live processes hold stays theirs

example:
  prefect-eachlabs limits apply --tag eachlabs-create=5
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("action", choices=("apply", "show", "reset"), help="see below")
    parser.add_argument(
        "--tag",
        action="append",
        default=[],
        type=tag_limit,
        metavar="NAME=N",
        help="with apply: at most N task runs with this tag at once, an operator's brake; repeatable",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else on stdout")


def tag_limit(text: str) -> tuple[str, int]:
    """`NAME=N` as a pair."""
    name, equals, number = text.rpartition("=")
    count = count_or_none(number) if equals else None
    if not name or count is None:
        raise argparse.ArgumentTypeError(f"{text!r} must be NAME=N, with N at least 1")
    return name, count


def run(arguments: argparse.Namespace) -> int:
    from prefect_eachlabs.errors import BadInput
    from prefect_eachlabs.limits import admin as limits_admin

    if arguments.tag and arguments.action != "apply":
        raise BadInput("--tag goes with `limits apply`.")
    settings = account_for_the_server()
    if arguments.action == "apply":
        statuses = asyncio.run(limits_admin.apply(settings, dict(arguments.tag)))
    elif arguments.action == "show":
        statuses = asyncio.run(limits_admin.show(settings))
    else:
        statuses = asyncio.run(limits_admin.reset(settings))
    if arguments.json:
        print(json.dumps({"account": settings.account, "limits": as_json(statuses)}), flush=True)
    else:
        for status in statuses:
            print(_as_line(status, arguments.action))
    return 0


def as_json(statuses: Sequence[LimitStatus]) -> list[dict[str, object]]:
    """The limits as plain values."""
    return [{**vars(status), "kind": status.kind.value} for status in statuses]


def _as_line(status: LimitStatus, action: str) -> str:
    if status.limit is None:
        return f"{status.name}: absent; the first run creates it, or `prefect-eachlabs limits apply`"
    facts = [f"{status.in_use} of {status.limit} taken by {status.processes} processes"]
    if status.waiting:
        facts.append(f"{status.waiting} processes wait")
    if status.setting is None:
        facts.append("not used: the account's setting is none")
    elif status.setting != status.limit:
        facts.append(f"the account's setting is {status.setting}: `prefect-eachlabs limits apply` writes it")
    if status.leaked and action == "reset":
        facts.append(f"{status.leaked} leaked places were given back")
    elif status.leaked:
        facts.append(f"{status.leaked} LEAKED: `prefect-eachlabs limits reset` gives them back")
    return f"{status.name}: {', '.join(facts)}"
