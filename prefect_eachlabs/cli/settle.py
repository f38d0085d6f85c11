"""`prefect-eachlabs settle`: the janitor. What runs left behind is found out, and what was paid for is stored."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from typing import Annotated
from uuid import uuid4

from prefect_eachlabs.cli.account import account_gateway
from prefect_eachlabs.cli.options import InJson, destination_of, flag


def settle(
    destination: Annotated[
        str | None, flag("s3://bucket/prefix, as it was given when buying (EACHLABS_DESTINATION)")
    ] = None,
    /,
    *,
    in_json: InJson = False,
) -> int:
    """What runs left behind in a bucket: find out, store what was paid for, buy nothing.

    Looks at records that are neither stored nor ended and older than a claim and a
    deadline (EACHLABS_CLAIM_SECONDS + EACHLABS_DEADLINE_SECONDS); younger ones, at
    which a run may be at work, are counted. Buys nothing, so it may run at any
    time, on a schedule: every six hours, since the vendor keeps pictures for a day.

    exit status: 0 nothing is left, 1 something is (run it again later), 2 usage or
    set-up wrong

    example:
      prefect-eachlabs settle s3://acme/daily
    """
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")
    place = destination_of(destination)
    with account_gateway() as gateway:
        report = gateway.call(gateway.engine.settle(place, run_id=uuid4().hex))
    if in_json:
        print(json.dumps({"destination": str(place), **dataclasses.asdict(report)}), flush=True)
    else:
        print(f"{place}: {report.in_words()}")
        for item_id, problem in sorted(report.problems.items()):
            print(f"  {item_id}: {problem}")
    return 1 if report.pending or report.ambiguous or report.too_young else 0
