"""`prefect-eachlabs doctor`: what is set up and what is wrong; each line ok, or what to do. Costs nothing."""

# ruff: noqa: PLC0415 - what is heavy is imported when the command runs, so that help and refusals answer at once

from __future__ import annotations

import asyncio
import json
import logging
import platform
import sys
from collections.abc import Iterable
from importlib import metadata
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from prefect_eachlabs.cli.findings import Finding, State, finding_of, mend, ok, skipped, wrong
from prefect_eachlabs.cli.options import InJson
from prefect_eachlabs.errors import EachlabsError, KeyRefused, Rejected, SetupError, StoreFailed, Throttled

if TYPE_CHECKING:
    from prefect_eachlabs.blocks import S3Destination
    from prefect_eachlabs.engine.runtime import Gateway
    from prefect_eachlabs.settings import AccountSettings

PLACE_WITHIN_SECONDS = 20.0
PROBE = "doctor.txt"


def doctor(
    *,
    to: Annotated[
        str | None, Parameter(help="s3://bucket/prefix, or eachlabs-s3-destination/NAME: check the bucket too")
    ] = None,
    credentials: Annotated[
        str | None, Parameter(help="name of an EachlabsCredentials block; the environment otherwise")
    ] = None,
    in_json: InJson = False,
) -> int:
    """What is set up and what is wrong: each line ok, or what to do; costs nothing.

    Sends one request to the API, which is free (a list of one execution), and with
    --to writes one small object (PREFIX/doctor.txt) to see whether the bucket keeps
    the conditions that purchases rely on.

    exit status: 0 all is well, 1 it works and something should be mended, 2 it
    cannot work until something is mended

    example:
      prefect-eachlabs doctor --to s3://acme-pictures/daily
    """
    logging.basicConfig(level=logging.ERROR, stream=sys.stderr, format="%(message)s")
    from prefect_eachlabs.cli.doctor_server import server_findings
    from prefect_eachlabs.engine.runtime import close_gateways

    findings = [versions()]
    settings, said = account(credentials)
    findings.append(said)
    of_server, limits_are_there = server_findings(settings)
    try:
        findings.append(api(settings, shared=limits_are_there))
        findings.append(bucket(to))
    finally:
        close_gateways()
    findings += of_server
    status = exit_status(findings)
    if in_json:
        print(json.dumps({"status": status, "findings": [vars(one) for one in findings]}, default=str), flush=True)
    else:
        width = max(len(one.about) for one in findings)
        for one in findings:
            print(f"{one.state.value:7} {one.about:{width}}  {one.said}")
            if one.advice:
                print(f"{'':7} {'':{width}}  → {one.advice}")
    return status


def exit_status(findings: Iterable[Finding]) -> int:
    """0 all is well, 1 something should be mended, 2 something must be."""
    states = {one.state for one in findings}
    return 2 if State.WRONG in states else 1 if State.MEND in states else 0


def versions() -> Finding:
    """Whether what is installed is what this package was made for."""
    from packaging.requirements import Requirement

    faults = []
    shown = {"Python": platform.python_version(), "prefect-eachlabs": metadata.version("prefect-eachlabs")}
    for text in metadata.requires("prefect-eachlabs") or ():
        needed = Requirement(text)
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        try:
            here = metadata.version(needed.name)
        except metadata.PackageNotFoundError:
            faults.append(f"{needed.name} is not installed")
            continue
        if needed.name in ("prefect", "boto3"):
            shown[needed.name] = here
        if not needed.specifier.contains(here, prereleases=True):
            faults.append(f"{needed.name} {here} is not {needed.specifier}")
    line = ", ".join(f"{name} {version}" for name, version in shown.items())
    if faults:
        return wrong(
            "versions",
            f"{line}: {'; '.join(faults)}",
            "pip install -c constraints.txt .",
        )
    return ok("versions", line)


def account(block: str | None) -> tuple[AccountSettings | None, Finding]:
    """The account, and what is configured; never the key."""
    from prefect_eachlabs.settings import settings_from_environment

    try:
        if block:
            from prefect_eachlabs.blocks import EachlabsCredentials, load_block
            from prefect_eachlabs.cli.setup import server_errors

            with server_errors():
                settings: AccountSettings = load_block(block, EachlabsCredentials).account_settings()
        else:
            settings = settings_from_environment()
    except SetupError as error:
        return None, finding_of("account", error)
    minute, flight = settings.requests_per_minute, settings.max_in_flight
    return settings, ok(
        "account",
        f"{settings.account!r} at {settings.base_url}, {settings.auth_scheme}, "
        f"{'no limit of' if minute is None else minute} requests a minute, "
        f"{'no limit of' if flight is None else flight} in flight",
    )


def api(settings: AccountSettings | None, *, shared: bool) -> Finding:
    """Whether the API is reachable and takes the key: one free request, within the account's pace."""
    if settings is None:
        return skipped("API", "not asked without a key")
    from prefect_eachlabs.engine.runtime import gateway_for
    from prefect_eachlabs.limits.leases import lot_source_for

    # Without limits on the server nobody shares them yet, and asking through them would create them.
    gateway = gateway_for(settings, make_source=lot_source_for if shared else None)
    try:
        seconds = gateway.call(_ask(gateway))
    except asyncio.TimeoutError:
        return mend(
            "API",
            f"not asked: no request was free within {PLACE_WITHIN_SECONDS:.0f} s",
            "The account is busy, or slots are lost (prefect-eachlabs limits show).",
        )
    except KeyRefused as error:
        return wrong(
            "API", f"{settings.base_url} refuses the key (HTTP {error.status_code})", "Check EACHLABS_API_KEY."
        )
    except Throttled as error:
        return mend("API", f"it takes the key and throttles: {error.message}", "Wait, or top up the balance.")
    except Rejected as error:
        if error.status_code != 404:
            return finding_of("API", error)
        return mend(
            "API",
            f"{settings.base_url} answers and has no list of executions (HTTP 404)",
            "Check EACHLABS_BASE_URL; without that list a lost order cannot be found out and is reported ambiguous.",
        )
    except EachlabsError as error:
        return finding_of("API", error)
    return ok("API", f"{settings.base_url} answers in {seconds:.1f} s and takes the key; nothing was bought")


async def _ask(gateway: Gateway) -> float:
    account = gateway.engine.account
    place = await asyncio.wait_for(account.limiter.take_request(question=True), PLACE_WITHIN_SECONDS)
    loop = asyncio.get_running_loop()
    began = loop.time()
    try:
        await account.client.executions(limit=1)
    finally:
        place.done()
    return loop.time() - began


def bucket(to: str | None) -> Finding:
    """Whether the bucket can be listed and written, and keeps conditions."""
    if not to:
        return skipped("bucket", "not checked: give --to s3://bucket/prefix")
    from prefect_eachlabs.blocks import S3Destination, load_block, where
    from prefect_eachlabs.cli.setup import server_errors
    from prefect_eachlabs.storage.s3 import S3Store, check_conditional_writes
    from prefect_eachlabs.storage.s3_client import S3Access

    try:
        target: S3Destination | str = to
        if to.startswith(f"{S3Destination.get_block_type_slug()}/"):
            with server_errors():
                target = load_block(to, S3Destination)
        place, access = where(target)

        async def look() -> bool:
            store = S3Store(place.bucket, access or S3Access())
            async for _ in store.list(place.key(PROBE)):
                break
            return await check_conditional_writes(store, place.key(PROBE))

        conditional = asyncio.run(look())
    except (EachlabsError, StoreFailed) as error:
        return finding_of("bucket", error)
    if not conditional:
        return wrong(
            "bucket",
            f"{place} can be written and ignores conditions (If-None-Match, If-Match)",
            "Use a store that keeps them; or EACHLABS_CONDITIONAL_WRITES=ignore with one worker, at your own risk.",
        )
    return ok("bucket", f"{place} can be listed and written and keeps conditions")
