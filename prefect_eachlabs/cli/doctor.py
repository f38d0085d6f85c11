"""`prefect-eachlabs doctor`: what is set up and what is wrong; each line ok, or what to do. Costs nothing."""

# ruff: noqa: PLC0415 - what is heavy is imported when the command runs, so that help and refusals answer at once

from __future__ import annotations

import asyncio
import json
import logging
import platform
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from importlib import metadata
from typing import TYPE_CHECKING, Annotated, Any

from prefect_eachlabs.cli.options import InJson, flag
from prefect_eachlabs.errors import (
    EachlabsError,
    KeyRefused,
    Rejected,
    SetupError,
    StoreFailed,
    Throttled,
    without_query,
)

if TYPE_CHECKING:
    from prefect_eachlabs.blocks import S3Destination
    from prefect_eachlabs.engine.runtime import Gateway
    from prefect_eachlabs.limits.admin import LimitStatus, TagLimit
    from prefect_eachlabs.models import Callback
    from prefect_eachlabs.settings import AccountSettings

PLACE_WITHIN_SECONDS = 20.0
CALL_WITHIN_SECONDS = 15.0
TAKEN_ELSEWHERE = (
    "The receiver took it: does it have the same PREFECT_API_URL as this machine, and do their clocks agree to a "
    "minute? Does another process listen at EACHLABS_WEBHOOK_LISTEN?"
)
PROBE = "doctor.txt"
FILE_LEASES = "prefect.server.concurrency.lease_storage.filesystem"
MEMORY_LEASES = "prefect.server.concurrency.lease_storage.memory"


class State(str, Enum):
    """How it stands."""

    OK = "ok"
    MEND = "MEND"
    WRONG = "WRONG"
    SKIPPED = "-"


OK, MEND, WRONG, SKIPPED = State


@dataclass(frozen=True)
class Finding:
    """A line about one thing.

    Attributes:
        about: The thing.
        state: `ok`; `MEND` (it works, and should be fixed); `WRONG` (nothing works until it is fixed); `-`.
        said: What was found.
        advice: What to do; empty when all is well.
    """

    about: str
    state: State
    said: str
    advice: str = ""


def doctor(
    *,
    to: Annotated[str | None, flag("s3://bucket/prefix, or eachlabs-s3-destination/NAME: check the bucket too")] = None,
    credentials: Annotated[str | None, flag("name of an EachlabsCredentials block; the environment otherwise")] = None,
    in_json: InJson = False,
) -> int:
    """What is set up and what is wrong: each line ok, or what to do; costs nothing.

    Sends one request to the API, which is free (a list of one execution), and with
    --to writes one small object (PREFIX/doctor.txt) to see whether the bucket keeps
    the conditions that purchases rely on. Where EACHLABS_WEBHOOK_URL is set, it calls
    itself there and waits 15 s for the call to come in.

    exit status: 0 all is well, 1 it works and something should be fixed, 2 it
    cannot work until something is fixed

    example:
      prefect-eachlabs doctor --to s3://acme-pictures/daily
    """
    logging.basicConfig(level=logging.ERROR, stream=sys.stderr, format="%(message)s")
    from prefect_eachlabs.engine.runtime import close_gateways

    findings = [versions()]
    settings, said = account(credentials)
    findings.append(said)
    of_server, limits_are_there = server_findings(settings)
    try:
        findings.append(api(settings, shared=limits_are_there))
        findings.append(bucket(to))
        findings.append(webhooks(settings))
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
    """0 all is well, 1 something should be fixed, 2 something must be."""
    states = {one.state for one in findings}
    return 2 if WRONG in states else 1 if MEND in states else 0


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
        return Finding("versions", WRONG, f"{line}: {'; '.join(faults)}", "pip install -c constraints.txt .")
    return Finding("versions", OK, line)


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
        return None, _of_error("account", error)
    minute, flight = settings.requests_per_minute, settings.max_in_flight
    return settings, Finding(
        "account",
        OK,
        f"{settings.account!r} at {settings.base_url}, {settings.auth_scheme}, "
        f"{'no limit of' if minute is None else minute} requests a minute, "
        f"{'no limit of' if flight is None else flight} in flight",
    )


def api(settings: AccountSettings | None, *, shared: bool) -> Finding:
    """Whether the API is reachable and takes the key: one free request, within the account's pace."""
    if settings is None:
        return Finding("API", SKIPPED, "not asked without a key")
    from prefect_eachlabs.engine.runtime import gateway_for
    from prefect_eachlabs.limits.prefect_leases import lot_source_for

    # Without limits on the server nobody shares them yet, and asking through them would create them.
    gateway = gateway_for(settings, make_source=lot_source_for if shared else None)
    try:
        seconds = gateway.call(_ask(gateway))
    except asyncio.TimeoutError:
        return Finding(
            "API",
            MEND,
            f"not asked: no request was free within {PLACE_WITHIN_SECONDS:.0f} s",
            "The account is busy, or slots are lost (prefect-eachlabs limits show).",
        )
    except KeyRefused as error:
        return Finding(
            "API", WRONG, f"{settings.base_url} refuses the key (HTTP {error.status_code})", "Check EACHLABS_API_KEY."
        )
    except Throttled as error:
        return Finding("API", MEND, f"it takes the key and throttles: {error.message}", "Wait, or top up the balance.")
    except Rejected as error:
        if error.status_code != 404:
            return _of_error("API", error)
        return Finding(
            "API",
            MEND,
            f"{settings.base_url} answers and has no list of executions (HTTP 404)",
            "Check EACHLABS_BASE_URL; without that list a lost order cannot be found out and is reported ambiguous.",
        )
    except EachlabsError as error:
        return _of_error("API", error)
    return Finding("API", OK, f"{settings.base_url} answers in {seconds:.1f} s and takes the key; nothing was bought")


async def _ask(gateway: Gateway) -> float:
    account = gateway.engine.account
    place = await asyncio.wait_for(account.limiter.take_request(question=True), PLACE_WITHIN_SECONDS)
    try:
        await account.client.check_api()
    finally:
        place.done()
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
        return Finding("bucket", SKIPPED, "not checked: give --to s3://bucket/prefix")
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
        return _of_error("bucket", error)
    if not conditional:
        return Finding(
            "bucket",
            WRONG,
            f"{place} can be written and ignores conditions (If-None-Match, If-Match)",
            "Use a store that keeps them; or EACHLABS_CONDITIONAL_WRITES=ignore with one worker, at your own risk.",
        )
    return Finding("bucket", OK, f"{place} can be listed and written and keeps conditions")


def webhooks(settings: AccountSettings | None) -> Finding:
    """Whether a call to the configured URL comes in here: it calls itself."""
    if settings is None or not settings.webhook_url:
        return Finding("webhooks", SKIPPED, "EACHLABS_WEBHOOK_URL is not set: ends are asked for")
    from prefect_eachlabs.engine.runtime import gateway_for

    gateway = gateway_for(settings)
    by = f"port {settings.webhook_listen}" if settings.webhook_listen else "the Prefect server's events"
    way_is_open, came_after_seconds, answer = gateway.call(_call_oneself(gateway))
    where = without_query(settings.webhook_url)
    if came_after_seconds is not None:
        return Finding("webhooks", OK, f"a call to {where} came in by {by} after {came_after_seconds:.1f} s")
    if settings.webhook_listen and not way_is_open and answer == "HTTP 202":
        return Finding("webhooks", OK, f"a call to {where} was taken by the process that listens at {by}")
    advice = {
        **dict.fromkeys(("HTTP 202", "HTTP 204"), TAKEN_ELSEWHERE),
        "HTTP 401": "The receiver has another EACHLABS_WEBHOOK_SECRET than this machine.",
    }.get(answer, "Look at what stands between that URL and here (docs, Webhooks); until then ends are asked for.")
    said = "" if way_is_open else f"; nothing can come in by {by}"
    return Finding(
        "webhooks",
        MEND,
        f"a call to {where} ({answer}) did not come in within {CALL_WITHIN_SECONDS:.0f} s{said}",
        advice,
    )


async def _call_oneself(gateway: Gateway) -> tuple[bool, float | None, str]:
    """Whether the way in is open, after how many seconds the call came, and what answered at the URL."""
    import httpx

    of_account = gateway.engine.account.webhooks
    way_is_open = await of_account.open()
    answer = "no answer"

    async def send(callback: Callback) -> None:
        nonlocal answer
        body = {"exec_id": "doctor", "status": "succeeded", "output": ""}
        try:
            async with httpx.AsyncClient(timeout=CALL_WITHIN_SECONDS) as http:
                sent = await http.post(callback.url, json=body, headers={"X-Webhook-Secret": callback.secret})
                answer = f"HTTP {sent.status_code}"
        except httpx.HTTPError as error:
            answer = type(error).__name__

    loop = asyncio.get_running_loop()
    began = loop.time()
    within_seconds = CALL_WITHIN_SECONDS if way_is_open else 0.0
    came = await of_account.call_oneself(send, within_seconds=within_seconds)
    return way_is_open, loop.time() - began if came else None, answer


# ------------------------------------------------------------ the Prefect server


def server_findings(settings: AccountSettings | None) -> tuple[list[Finding], bool]:
    """What is to be said about the server, and whether the account's limits are there."""
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.exceptions import PrefectHTTPStatusError
    from prefect.settings import PREFECT_API_URL

    from prefect_eachlabs.cli import automation

    url = PREFECT_API_URL.value()
    if not url:
        return [
            Finding(
                "Prefect",
                MEND,
                "no server is configured: the processes of this machine share the account's limits",
                "Right for one process at a time. For more: prefect server start, and set PREFECT_API_URL.",
            )
        ], False
    try:
        with get_client(sync_client=True) as client:
            version = str(client.request("GET", "/admin/version").json())
            findings = [server(url, version)]
            workers, said = work_pool(client)
            findings += said
            findings += storage(client, workers)
            findings.append(dead_runs(automation.find(client), automation.seconds_between_beats()))
    except (httpx.TransportError, PrefectHTTPStatusError, ValueError, RuntimeError) as error:
        return [
            Finding(
                "Prefect",
                WRONG,
                f"the server at {url} gives no usable answer ({type(error).__name__})",
                "Start it with `prefect server start`, or correct PREFECT_API_URL (and PREFECT_API_AUTH_STRING).",
            )
        ], False
    of_limits, there = limits(settings)
    return [*findings, *of_limits], there


def server(url: str, version: str) -> Finding:
    """Whether it answers, and is as new as what is installed here."""
    import prefect

    if version != prefect.__version__:
        return Finding(
            "Prefect",
            MEND,
            f"the server at {url} is {version}, and {prefect.__version__} is installed here",
            "Install the same version on the server and on every worker.",
        )
    return Finding("Prefect", OK, f"the server at {url} answers ({version})")


def work_pool(client: Any) -> tuple[int, list[Finding]]:
    """How many workers are online in the pool; whether it is there, and what runs may choose in it."""
    from prefect.exceptions import ObjectNotFound

    from prefect_eachlabs.cli.setup import WORK_POOL
    from prefect_eachlabs.cli.work_pool import openings

    try:
        pool = client.read_work_pool(WORK_POOL)
        rows = client.request("POST", "/work_pools/{name}/workers/filter", path_params={"name": WORK_POOL}, json={})
        online = sum(row.get("status") == "ONLINE" for row in rows.json())
    except ObjectNotFound:
        return 0, [Finding("work pool", MEND, f"{WORK_POOL!r} is not there", "prefect-eachlabs setup makes it.")]
    said = Finding("work pool", OK, f"{WORK_POOL!r} with {online} workers")
    if pool.is_paused:
        said = Finding("work pool", MEND, f"{WORK_POOL!r} is paused", "Resume it: prefect work-pool resume eachlabs")
    elif not online:
        said = Finding(
            "work pool", MEND, f"{WORK_POOL!r} is there and no worker is", "prefect worker start --pool eachlabs"
        )
    return online, [said, job_variables(openings(pool.base_job_template))]


def job_variables(chosen: list[str]) -> Finding:
    """Whether starting a run is running code."""
    if not chosen:
        return Finding("job variables", OK, "none: whoever starts a run chooses its parameters alone")
    return Finding(
        "job variables",
        MEND,
        f"whoever starts a run chooses {', '.join(chosen)} of its process; who chooses command, env or working_dir "
        "runs any code on the workers, with their keys",
        "prefect-eachlabs setup closes the pool (SECURITY.md).",
    )


def storage(client: Any, workers: int) -> list[Finding]:
    """Database and lease storage, as far as the server tells: it hides the database's URL."""
    from prefect.exceptions import PrefectHTTPStatusError

    try:
        told = client.request("GET", "/admin/settings").json()
        of_server = told["server"]
        database, lease_storage = of_server["database"], str(of_server["concurrency"]["lease_storage"])
    except (PrefectHTTPStatusError, KeyError, TypeError):
        return [Finding("database", SKIPPED, "this server does not tell its settings")]
    return [_database(database, workers), _leases(lease_storage)]


def _database(database: dict[str, Any], workers: int) -> Finding:
    url, driver = str(database.get("connection_url") or ""), str(database.get("driver") or "")
    if "postgresql" in url or "postgresql" in driver:
        return Finding("database", OK, "PostgreSQL")
    if url and "sqlite" not in url and "sqlite" not in driver:
        return Finding(
            "database", OK, "one of its own; the server hides which (PostgreSQL is the one for several workers)"
        )
    if workers > 1:
        return Finding(
            "database",
            MEND,
            f"SQLite, with {workers} workers: it takes some 15 task runs a second and drops the rest",
            "PREFECT_SERVER_DATABASE_CONNECTION_URL=postgresql+asyncpg://USER:WORD@HOST/NAME (docs/operations.md)",
        )
    return Finding("database", OK, "SQLite: right for one worker, PostgreSQL for more")


def _leases(lease_storage: str) -> Finding:
    if lease_storage == MEMORY_LEASES:
        return Finding(
            "leases",
            MEND,
            "kept in the server's memory: slots that are taken at a restart are lost",
            f"Start the server with PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE={FILE_LEASES}",
        )
    return Finding("leases", OK, lease_storage.rpartition("lease_storage.")[2])


def dead_runs(found: dict[str, Any] | None, beat_seconds: int | None) -> Finding:
    """Whether runs whose machine died end by themselves."""
    from prefect_eachlabs.cli.automation import BEATS, DEAD_RUNS

    about = "dead runs"
    if beat_seconds is None:
        return Finding(
            about,
            MEND,
            "runs send no heartbeats: one whose machine died stays Running, and generate-batch cancels all that follow",
            "Take PREFECT_FLOWS_HEARTBEAT_FREQUENCY= out of the workers' environment, then prefect-eachlabs setup.",
        )
    if found is None:
        return Finding(
            about,
            MEND,
            f"the automation {DEAD_RUNS!r} is not there: a run whose machine died stays Running, and generate-batch "
            "cancels all that follow",
            "prefect-eachlabs setup makes it.",
        )
    within_seconds = float(found["trigger"].get("within") or 0)
    if not found["enabled"]:
        return Finding(about, MEND, f"the automation {DEAD_RUNS!r} is switched off", "Automations → switch it on.")
    if within_seconds < (BEATS - 1) * beat_seconds:
        return Finding(
            about,
            MEND,
            f"the automation {DEAD_RUNS!r} waits {within_seconds:g} s, and runs beat every {beat_seconds} s: it ends "
            "runs that live",
            "Delete it (Automations); prefect-eachlabs setup makes it anew.",
        )
    return Finding(about, OK, f"end as Crashed after {within_seconds:g} s without a heartbeat")


def limits(settings: AccountSettings | None) -> tuple[list[Finding], bool]:
    """Whether the account's limits are there and say what the account says."""
    from prefect_eachlabs.limits import admin as limits_admin

    if settings is None:
        return [Finding("limits", SKIPPED, "not looked at without an account")], False
    try:
        statuses = asyncio.run(limits_admin.show(settings))
        of_tags = asyncio.run(limits_admin.tags(settings))
    except SetupError as error:
        return [_of_error("limits", error)], False
    return [*map(_limit, statuses), *map(_tag_limit, of_tags)], _all_there(statuses)


def _all_there(statuses: Sequence[LimitStatus]) -> bool:
    return all(status.limit is not None for status in statuses if status.setting is not None)


def _limit(status: LimitStatus) -> Finding:
    about = f"limit {status.kind.value}"
    if status.setting is None:
        return Finding(about, OK, "none is wanted")
    if status.limit is None:
        return Finding(
            about, MEND, f"{status.name} is not there; the first run makes it", "prefect-eachlabs setup makes it."
        )
    taken = f"{status.name}: {status.in_use} of {status.limit} taken"
    if status.limit != status.setting:
        return Finding(
            about,
            MEND,
            f"{taken}, and the account's setting is {status.setting}",
            "prefect-eachlabs limits apply writes it.",
        )
    return Finding(about, OK, taken)


def _tag_limit(one: TagLimit) -> Finding:
    from prefect_eachlabs.cli.limits import problem_of

    said, problem = f"{one.in_use} of {one.limit} task runs", problem_of(one)
    if problem:
        advice = f"prefect-eachlabs limits apply --tag {one.tag}= takes it away."
        return Finding(f"tag {one.tag}", MEND, f"{said}; {problem}", advice)
    return Finding(f"tag {one.tag}", OK, said)


def _of_error(about: str, error: EachlabsError) -> Finding:
    """An error's message says what to do next."""
    return Finding(about, WRONG, " ".join(str(error).split()))
