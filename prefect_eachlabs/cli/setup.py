"""`prefect-eachlabs setup`: work pool, limits, blocks and an automation on the Prefect server, from the environment."""

# ruff: noqa: PLC0415 - what is heavy is imported when the command runs, so that help and refusals answer at once

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

from prefect_eachlabs.cli.account import account_for_the_server
from prefect_eachlabs.cli.options import InJson, flag
from prefect_eachlabs.errors import SetupError

if TYPE_CHECKING:
    from prefect.blocks.core import Block

WORK_POOL = "eachlabs"
SAID_MORE = {
    "work pool closed": " now: whoever could start a run could choose its command and environment, and so run any code "
    "on the workers. Deployments that set job variables are refused in this pool: give them one of their own.",
    "work pool open": ": whoever may start a run runs any code on the workers. It cannot be closed while its template "
    "sets env: move that into the workers' own environment, take it out under Work Pools → eachlabs → Edit, and run "
    "this again.",
    "automation made": ", which ends runs whose machine died",
    "automation none": ": PREFECT_FLOWS_HEARTBEAT_FREQUENCY says that runs send no heartbeats, so nobody can tell "
    "which are dead",
}


def setup(
    *,
    destination: Annotated[str | None, flag("s3://bucket/prefix: also make the block of a destination")] = None,
    block: Annotated[str, flag("the blocks' name (default)")] = "default",
    deploy: Annotated[bool, flag("also make the deployments")] = False,
    in_json: InJson = False,
) -> int:
    """Makes work pool, limits, blocks and an automation on the Prefect server, as often as you like.

    Makes what is missing, and writes what the environment says over what is there;
    the rest stays as it is:
      the work pool `eachlabs` (processes), closed: whoever starts a run chooses its
      parameters, and no command or environment; one that is open is closed
      the account's two limits (EACHLABS_REQUESTS_PER_MINUTE,
      EACHLABS_MAX_IN_FLIGHT)
      the block types, and the block eachlabs-credentials/default when
      EACHLABS_API_KEY is set
      the block eachlabs-s3-destination/default with --destination; AWS_REGION and
      AWS_ENDPOINT_URL_S3 go into it, AWS keys do not: workers find them by boto3's
      own chain
      the automation eachlabs-end-dead-runs: runs of this package whose machine died
      end as Crashed, 3.5 heartbeats later (PREFECT_FLOWS_HEARTBEAT_FREQUENCY)
      with --deploy the deployments generate-image, generate-batch and so on, for
      workers that have the package and no clone, their forms filled in with the
      block; parameters and schedules of those that are there stay

    example:
      prefect-eachlabs setup --destination s3://acme-pictures/daily --deploy
    """
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")
    from prefect.client.orchestration import get_client

    from prefect_eachlabs.cli import automation
    from prefect_eachlabs.cli.limits import as_json
    from prefect_eachlabs.limits import admin as limits_admin
    from prefect_eachlabs.models import Destination

    place = Destination.parse(destination) if destination else None
    settings = account_for_the_server()
    with server_errors(), get_client(sync_client=True) as client:
        pool = {WORK_POOL: make_work_pool()}
        limits = asyncio.run(limits_admin.apply(settings))
        blocks = make_blocks(os.environ, block, place)
        automations = {automation.DEAD_RUNS: automation.make(client)}
        deployed: dict[str, str] = {}
        if deploy:
            from prefect_eachlabs.cli import deployments

            deployed = deployments.deploy(client, block)
    if in_json:
        told = {"work_pool": pool, "limits": as_json(limits), "blocks": blocks}
        print(json.dumps({**told, "automations": automations, "deployments": deployed}), flush=True)
        return 0
    numbers = {one.name: str(one.limit if one.setting is not None else "none wanted") for one in limits}
    for what, done in {
        "work pool": pool,
        "limit": numbers,
        "block": blocks,
        "automation": automations,
        "deployment": deployed,
    }.items():
        for name, state in done.items():
            print(f"{what} {name}: {state}{SAID_MORE.get(f'{what} {state}', '')}")
    first = "" if deploy else "prefect-eachlabs setup --deploy makes the deployments; "
    print(
        f"Next: {first}prefect worker start --pool {WORK_POOL} on each machine; prefect-eachlabs doctor says what is "
        "missing."
    )
    return 0


@contextmanager
def server_errors() -> Iterator[None]:
    """What a server that is missing, away or closed raises, as an error that says what to do."""
    import httpx
    from prefect.exceptions import PrefectHTTPStatusError
    from prefect.settings import PREFECT_API_URL

    if not PREFECT_API_URL.value():
        raise SetupError(
            "No Prefect server is configured, so there is nothing to set up. Start one with `prefect server start` "
            "and set PREFECT_API_URL, e.g. to http://127.0.0.1:4200/api."
        )
    try:
        yield
    except PrefectHTTPStatusError as error:
        raise SetupError(
            f"The Prefect server refused a request (HTTP {error.response.status_code}): check PREFECT_API_URL and "
            "PREFECT_API_AUTH_STRING (or the API key).",
            url=str(error.request.url),
            status_code=error.response.status_code,
        ) from error
    except (httpx.TransportError, RuntimeError) as error:
        raise SetupError(
            f"The Prefect server gives no usable answer ({type(error).__name__}): start it with `prefect server "
            "start`, or correct PREFECT_API_URL.",
            url=str(PREFECT_API_URL.value()),
        ) from error


def make_work_pool() -> str:
    """`made`, `there`, `closed` (it was open) or `open` (it cannot be closed as it is).

    Raises:
        SetupError: There is one of that name which runs something else than processes.
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
    from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound

    from prefect_eachlabs.cli.work_pool import closed, closed_template, openings

    with get_client(sync_client=True) as client:
        try:
            pool = client.read_work_pool(WORK_POOL)
        except ObjectNotFound:
            wanted = WorkPoolCreate(
                name=WORK_POOL,
                type="process",
                description="Pictures from Eachlabs: `prefect worker start --pool eachlabs` on each machine.",
                base_job_template=closed_template(),
            )
            try:
                client.create_work_pool(wanted)
            except ObjectAlreadyExists:  # made by another process at this moment
                return "there"
            return "made"
        if pool.type != "process":
            raise SetupError(
                f"The server's work pool {WORK_POOL!r} is of type {pool.type!r}, and this project's is of processes: "
                "rename or delete it, or name your own pool in deployments/prefect.yaml."
            )
        if not openings(pool.base_job_template):
            return "there"
        template = closed(pool.base_job_template)
        if template is None:
            return "open"
        client.update_work_pool(WORK_POOL, WorkPoolUpdate(base_job_template=template))
        return "closed"


def make_blocks(environ: Mapping[str, str], name: str, place: Any) -> dict[str, str]:
    """Registers both types; makes or updates the blocks that the environment and the flags describe."""
    from prefect_eachlabs.blocks import EachlabsCredentials, S3Destination

    done = {}
    for kind, given in (
        (EachlabsCredentials, credentials_given(environ)),
        (S3Destination, destination_given(environ, place)),
    ):
        slug = f"{kind.get_block_type_slug()}/{name}"
        if given is None:
            kind.register_type_and_schema()
            done[kind.get_block_type_slug()] = "type registered; the environment describes no block"
        else:
            done[slug] = save(kind, name, given)
    return done


def credentials_given(environ: Mapping[str, str]) -> dict[str, Any] | None:
    """The fields of `EachlabsCredentials` that the environment gives; None without a key."""
    from prefect_eachlabs.blocks import EachlabsCredentials
    from prefect_eachlabs.settings import ENVIRONMENT, settings_from_environment

    if not environ.get(ENVIRONMENT["api_key"], "").strip():
        return None
    settings = settings_from_environment(environ)
    named = [field for field in EachlabsCredentials.model_fields if environ.get(ENVIRONMENT[field], "").strip()]
    return {field: 0 if (value := getattr(settings, field)) is None else value for field in named}


def destination_given(environ: Mapping[str, str], place: Any) -> dict[str, Any] | None:
    """The fields of `S3Destination` that the flag and the environment give; None without a destination."""
    if place is None:
        return None
    region = environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION")
    of_aws = {"region": region, "endpoint_url": environ.get("AWS_ENDPOINT_URL_S3")}
    return {"bucket": place.bucket, "prefix": place.prefix} | {name: text for name, text in of_aws.items() if text}


def save(kind: type[Block], name: str, given: Mapping[str, Any]) -> str:
    """`made`, `updated` or `there`: fields that are not given keep what a person has put into them."""
    from pydantic import ValidationError

    from prefect_eachlabs.settings import faults_in

    try:
        found = kind.load(name, _sync=True)  # type: ignore[call-arg]  # the sync form of a method that is both
    except ValueError:
        found = None
    before = {field: getattr(found, field) for field in kind.model_fields} if isinstance(found, kind) else {}
    if before and all(before[field] == value for field, value in given.items()):
        return "there"
    try:
        block = kind(**{**before, **given})
    except ValidationError as error:
        slug = kind.get_block_type_slug()
        raise SetupError(f"The block {slug}/{name} cannot be made: {faults_in(error)}.") from None
    block.save(name, overwrite=True)
    return "updated" if before else "made"
