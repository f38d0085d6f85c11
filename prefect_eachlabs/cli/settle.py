"""`prefect-eachlabs settle`: the janitor. What runs left behind is found out, and what was paid for is stored."""

# ruff: noqa: PLC0415 - what is heavy is imported when the command runs, so that help and refusals answer at once

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
from uuid import uuid4

from prefect_eachlabs.cli.generate import source_of_places

EPILOG = """\
Looks at records that are neither stored nor ended and older than a claim and a deadline
(EACHLABS_CLAIM_SECONDS + EACHLABS_DEADLINE_SECONDS); younger ones, at which a run may be at work, are counted. Buys
nothing, so it may run at any time, on a schedule: every six hours, since the vendor keeps pictures for a day.

exit status: 0 nothing is left, 1 something is (run it again later), 2 usage or set-up wrong

example:
  prefect-eachlabs settle s3://acme/daily
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument(
        "destination",
        metavar="S3_URI",
        nargs="?",
        help="s3://bucket/prefix, as it was given when buying (EACHLABS_DESTINATION)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else on stdout")


def run(arguments: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")
    from prefect_eachlabs.engine.runtime import close_gateways, gateway_for
    from prefect_eachlabs.models import Destination
    from prefect_eachlabs.settings import destination_from_environment

    destination = Destination.parse(arguments.destination or destination_from_environment())
    try:
        gateway = gateway_for(make_source=source_of_places())
        report = gateway.call(gateway.engine.settle(destination, run_id=uuid4().hex))
    finally:
        close_gateways()
    if arguments.json:
        print(json.dumps({"destination": str(destination), **dataclasses.asdict(report)}), flush=True)
    else:
        print(f"{destination}: {report.in_words()}")
        for item_id, problem in sorted(report.problems.items()):
            print(f"  {item_id}: {problem}")
    return 1 if report.pending or report.ambiguous else 0
