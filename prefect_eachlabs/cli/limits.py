"""`prefect-eachlabs limits`: the account's shared limits on the Prefect server: create, show, reset."""

# ruff: noqa: PLC0415 - what is heavy is imported when the command runs, so that help and refusals answer at once

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from prefect_eachlabs.cli.account import account_for_the_server
from prefect_eachlabs.cli.options import InJson, flag
from prefect_eachlabs.errors import BadInput

if TYPE_CHECKING:
    from prefect_eachlabs.limits.admin import LimitStatus, TagLimit

TAKEN_AWAY = "`prefect-eachlabs limits apply --tag NAME=` takes it away"
LONG = ("eachlabs", "eachlabs-generate")
"""Tags that a task run may have for hours."""


def limits(
    action: Annotated[Literal["apply", "show", "reset"], flag("what to do")],
    /,
    *,
    tag: Annotated[
        Sequence[str],
        flag(
            "NAME=N, with apply: at most N task runs with this tag at once, an operator's brake; NAME= takes it away; "
            "repeatable"
        ),
    ] = (),
    in_json: InJson = False,
) -> int:
    """The account's limits on the Prefect server: create, show, reset.

    apply  writes the account's numbers (EACHLABS_REQUESTS_PER_MINUTE,
           EACHLABS_MAX_IN_FLIGHT) to the server
    show   what is taken; the limits on this package's tags too, and which of them
           do nothing or stop everything
    reset  frees all that is taken, for slots lost in a restart of the server;
           end the account's processes first

    example:
      prefect-eachlabs limits apply --tag eachlabs-create=5
    """
    tags = dict(map(tag_limit, tag))
    if tags and action != "apply":
        raise BadInput("--tag goes with `limits apply`.")
    from prefect_eachlabs.limits import admin as limits_admin

    settings = account_for_the_server()
    if action == "apply":
        statuses = asyncio.run(limits_admin.apply(settings, tags))
    else:
        statuses = asyncio.run(limits_admin.show(settings) if action == "show" else limits_admin.reset(settings))
    of_tags = asyncio.run(limits_admin.tags(settings))
    if in_json:
        told = [{**vars(one), "problem": problem_of(one) or None} for one in of_tags]
        print(json.dumps({"account": settings.account, "limits": as_json(statuses), "tags": told}), flush=True)
    else:
        for status in statuses:
            print(_as_line(status, action))
        for one in of_tags:
            problem = f"; {said}: {TAKEN_AWAY}" if (said := problem_of(one)) else ""
            print(f"tag {one.tag}: {one.in_use} of {one.limit} task runs{problem}")
        if action == "show":
            print(f"tags without a limit: {', '.join(sorted(our_tags() - {one.tag for one in of_tags})) or 'none'}")
    return 0


def tag_limit(text: str) -> tuple[str, int | None]:
    """`NAME=N` as a pair; of `NAME=` the number is None."""
    name, _, number = text.rpartition("=")
    if not name or (number and not (number.isdecimal() and int(number) >= 1)):
        raise BadInput(f"--tag: {text!r} must be NAME=N, with N at least 1, or NAME= to take the limit away.")
    return name, int(number) if number else None


def our_tags() -> set[str]:
    """The tags of this package's task runs."""
    from prefect_eachlabs import rows, tasks

    return {*tasks.TAGS, *rows.generate_chunk.tags}


def problem_of(one: TagLimit) -> str:
    """Why a tag's limit cannot be meant; empty where it can."""
    if one.tag not in our_tags():
        return "no task of this package has this tag, so it bounds nothing of it"
    if one.limit < 1:
        return "no task run with this tag ever begins"
    if one.limit == 1 and one.tag in LONG:
        return "a batch of rows holds it until its end, and whatever else has the tag waits"
    return ""


def as_json(statuses: Sequence[LimitStatus]) -> list[dict[str, object]]:
    """The limits as plain values; what is no longer known of leases and processes is null."""
    unknown = dict.fromkeys(("leases", "leased", "processes", "waiting", "leaked"))
    return [{**vars(status), "kind": status.kind.value, **unknown} for status in statuses]


def _as_line(status: LimitStatus, action: str) -> str:
    if status.limit is None:
        return f"{status.name}: absent; the first run creates it, or `prefect-eachlabs limits apply`"
    if action == "reset":
        return f"{status.name}: {status.in_use} of {status.limit} were taken and are free now"
    facts = [f"{status.in_use} of {status.limit} taken"]
    if status.setting is None:
        facts.append("not used: the account's setting is none")
    elif status.setting != status.limit:
        facts.append(f"the account's setting is {status.setting}: `prefect-eachlabs limits apply` writes it")
    if status.in_use:
        facts.append("by processes that run, or for 75 s by dead ones; for longer: `prefect-eachlabs limits reset`")
    return f"{status.name}: {', '.join(facts)}"
