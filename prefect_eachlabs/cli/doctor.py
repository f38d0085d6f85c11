"""`prefect-eachlabs doctor`: what is set up and what is wrong; each line ok, or what to do. Costs nothing."""

# ruff: noqa: PLC0415 - what is heavy is imported when the command runs, so that help and refusals answer at once

from __future__ import annotations

import asyncio
import json
import logging
import platform
import sys
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from enum import Enum
from functools import partial, wraps
from importlib import metadata
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec

from prefect_eachlabs.cli.options import InJson, flag
from prefect_eachlabs.errors import EachlabsError, KeyRefused, Rejected, SetupError, Throttled, without_query

if TYPE_CHECKING:
    from prefect_eachlabs.engine.runtime import Gateway
    from prefect_eachlabs.limits.admin import LimitStatus, TagLimit
    from prefect_eachlabs.models import Callback
    from prefect_eachlabs.settings import AccountSettings

P = ParamSpec("P")

SLOT_WITHIN_SECONDS = 20.0
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


Said = tuple[State, str] | tuple[State, str, str]


def _about(thing: str) -> Callable[[Callable[P, Said]], Callable[P, Finding]]:
    """Makes what a check says (state, what was found, advice) a line about a thing; errors say what to do next."""

    def decorate(look: Callable[P, Said]) -> Callable[P, Finding]:
        @wraps(look)
        def check(*args: P.args, **kwargs: P.kwargs) -> Finding:
            try:
                return Finding(thing, *look(*args, **kwargs))
            except EachlabsError as error:
                return _of_error(thing, error)

        return check

    return decorate


def _of_error(thing: str, error: EachlabsError) -> Finding:
    return Finding(thing, WRONG, " ".join(str(error).split()))


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

    settings, of_account = account(credentials)
    findings = [versions(), of_account]
    of_server, limits_are_there = server_findings(settings)
    try:
        findings += [api(settings, shared=limits_are_there), bucket(to), webhooks(settings), *of_server]
    finally:
        close_gateways()
    states = {one.state for one in findings}
    status = 2 if WRONG in states else 1 if MEND in states else 0
    if in_json:
        print(json.dumps({"status": status, "findings": [vars(one) for one in findings]}, default=str), flush=True)
        return status
    width = max(len(one.about) for one in findings)
    for one in findings:
        print(f"{one.state.value:7} {one.about:{width}}  {one.said}")
        if one.advice:
            print(f"{'':7} {'':{width}}  → {one.advice}")
    return status


@_about("versions")
def versions() -> Said:
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
        return WRONG, f"{line}: {'; '.join(faults)}", "pip install -c constraints.txt ."
    return OK, line


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
    said = f"{settings.account!r} at {settings.base_url}, {settings.auth_scheme}, "
    said += f"{settings.requests_per_minute or 'no limit of'} requests a minute, "
    return settings, Finding("account", OK, f"{said}{settings.max_in_flight or 'no limit of'} in flight")


@_about("API")
def api(settings: AccountSettings | None, *, shared: bool) -> Said:
    """Whether the API is reachable and takes the key: one free request, within the account's pace."""
    if settings is None:
        return SKIPPED, "not asked without a key"
    from prefect_eachlabs.engine.runtime import gateway_for
    from prefect_eachlabs.limits.prefect_leases import limiter_for

    # Without limits on the server nobody shares them yet, and asking through them would create them.
    gateway = gateway_for(settings, make_limiter=limiter_for if shared else None)
    try:
        seconds = gateway.call(_ask(gateway))
    except asyncio.TimeoutError:
        said = f"not asked: no request was free within {SLOT_WITHIN_SECONDS:.0f} s"
        return MEND, said, "The account is busy, or slots are lost (prefect-eachlabs limits show)."
    except KeyRefused as error:
        return WRONG, f"{settings.base_url} refuses the key (HTTP {error.status_code})", "Check EACHLABS_API_KEY."
    except Throttled as error:
        return MEND, f"it takes the key and throttles: {error.message}", "Wait, or top up the balance."
    except Rejected as error:
        if error.status_code != 404:
            raise
        return (
            MEND,
            f"{settings.base_url} answers and has no list of executions (HTTP 404)",
            "Check EACHLABS_BASE_URL; without that list a lost order cannot be found out and is reported ambiguous.",
        )
    return OK, f"{settings.base_url} answers in {seconds:.1f} s and takes the key; nothing was bought"


async def _ask(gateway: Gateway) -> float:
    """How many seconds the list takes; a page of somebody else's server is told apart before that."""
    account = gateway.engine.account
    began = 0.0
    for ask in (account.client.check_api, partial(account.client.executions, limit=1)):
        slot = await asyncio.wait_for(account.limiter.take_request(question=True), SLOT_WITHIN_SECONDS)
        began = asyncio.get_running_loop().time()
        try:
            await ask()
        finally:
            slot.done()
    return asyncio.get_running_loop().time() - began


@_about("bucket")
def bucket(to: str | None) -> Said:
    """Whether the bucket can be listed and written, and keeps conditions."""
    if not to:
        return SKIPPED, "not checked: give --to s3://bucket/prefix"
    from prefect_eachlabs.blocks import S3Destination, where
    from prefect_eachlabs.cli.setup import server_errors
    from prefect_eachlabs.storage.base import PreconditionFailed, honours_conditions
    from prefect_eachlabs.storage.s3 import S3Store
    from prefect_eachlabs.storage.s3_client import S3Access

    with server_errors() if to.startswith(f"{S3Destination.get_block_type_slug()}/") else nullcontext():
        place, access = where(to)

    async def look() -> bool:
        store = S3Store(place.bucket, access or S3Access())
        async for _ in store.list(place.key(PROBE)):
            break
        body, kind = b"Written by prefect-eachlabs doctor to see whether conditional writes work.\n", "text/plain"
        etag = await store.put(place.key(PROBE), body, content_type=kind)
        with suppress(PreconditionFailed):
            await store.put(place.key(PROBE), body, content_type=kind, if_match=etag)
            return await honours_conditions(store, place.key(PROBE), body, content_type=kind)
        return False

    if asyncio.run(look()):
        return OK, f"{place} can be listed and written and keeps conditions"
    return (
        WRONG,
        f"{place} can be written and ignores conditions (If-None-Match, If-Match)",
        "Use a store that keeps them; or EACHLABS_CONDITIONAL_WRITES=ignore with one worker, at your own risk.",
    )


@_about("webhooks")
def webhooks(settings: AccountSettings | None) -> Said:
    """Whether a call to the configured URL comes in here: it calls itself."""
    if settings is None or not settings.webhook_url:
        return SKIPPED, "EACHLABS_WEBHOOK_URL is not set: ends are asked for"
    from prefect_eachlabs.engine.runtime import gateway_for

    gateway = gateway_for(settings)
    by = f"port {settings.webhook_listen}" if settings.webhook_listen else "the Prefect server's events"
    way_is_open, came_after_seconds, answer = gateway.call(_call_oneself(gateway))
    where = without_query(settings.webhook_url)
    if came_after_seconds is not None:
        return OK, f"a call to {where} came in by {by} after {came_after_seconds:.1f} s"
    if settings.webhook_listen and not way_is_open and answer == "HTTP 202":
        return OK, f"a call to {where} was taken by the process that listens at {by}"
    advice = {
        **dict.fromkeys(("HTTP 202", "HTTP 204"), TAKEN_ELSEWHERE),
        "HTTP 401": "The receiver has another EACHLABS_WEBHOOK_SECRET than this machine.",
    }.get(answer, "Look at what stands between that URL and here (docs, Webhooks); until then ends are asked for.")
    said = "" if way_is_open else f"; nothing can come in by {by}"
    return MEND, f"a call to {where} ({answer}) did not come in within {CALL_WITHIN_SECONDS:.0f} s{said}", advice


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
        said = "no server is configured: the processes of this machine share the account's limits"
        advice = "To share them over machines, and for the Prefect UI: prefect server start, and set PREFECT_API_URL."
        return [Finding("Prefect", OK, said, advice)], False
    try:
        with get_client(sync_client=True) as client:
            findings = [server(url, str(client.request("GET", "/admin/version").json()))]
            workers, of_pool = work_pool(client)
            findings += [*of_pool, *storage(client, workers)]
            findings.append(dead_runs(automation.find(client), automation.seconds_between_beats()))
    except (httpx.TransportError, PrefectHTTPStatusError, ValueError, RuntimeError) as error:
        said = f"the server at {url} gives no usable answer ({type(error).__name__})"
        advice = "Start it with `prefect server start`, or correct PREFECT_API_URL (and PREFECT_API_AUTH_STRING)."
        return [Finding("Prefect", WRONG, said, advice)], False
    of_limits, there = limits(settings)
    return [*findings, *of_limits], there


@_about("Prefect")
def server(url: str, version: str) -> Said:
    """Whether it answers, and is as new as what is installed here."""
    import prefect

    if version == prefect.__version__:
        return OK, f"the server at {url} answers ({version})"
    said = f"the server at {url} is {version}, and {prefect.__version__} is installed here"
    return MEND, said, "Install the same version on the server and on every worker."


def work_pool(client: Any) -> tuple[int, list[Finding]]:
    """How many workers are online in the pool; whether it is there, and what runs may choose in it."""
    from prefect.exceptions import ObjectNotFound

    from prefect_eachlabs.cli.setup import WORK_POOL
    from prefect_eachlabs.cli.work_pool import openings

    about, name = "work pool", repr(WORK_POOL)
    try:
        pool = client.read_work_pool(WORK_POOL)
        rows = client.request("POST", "/work_pools/{name}/workers/filter", path_params={"name": WORK_POOL}, json={})
        online = sum(row.get("status") == "ONLINE" for row in rows.json())
    except ObjectNotFound:
        return 0, [Finding(about, MEND, f"{name} is not there", "prefect-eachlabs setup makes it.")]
    if pool.is_paused:
        said = Finding(about, MEND, f"{name} is paused", "Resume it: prefect work-pool resume eachlabs")
    elif not online:
        said = Finding(about, MEND, f"{name} is there and no worker is", "prefect worker start --pool eachlabs")
    else:
        said = Finding(about, OK, f"{name} with {online} workers")
    return online, [said, job_variables(openings(pool.base_job_template))]


@_about("job variables")
def job_variables(chosen: list[str]) -> Said:
    """Whether starting a run is running code."""
    if not chosen:
        return OK, "none: whoever starts a run chooses its parameters alone"
    said = f"whoever starts a run chooses {', '.join(chosen)} of its process; who chooses command, env or working_dir "
    said += "runs any code on the workers, with their keys"
    return MEND, said, "prefect-eachlabs setup closes the pool (SECURITY.md)."


def storage(client: Any, workers: int) -> list[Finding]:
    """Database and lease storage, as far as the server tells: it hides the database's URL."""
    from prefect.exceptions import PrefectHTTPStatusError

    try:
        of_server = client.request("GET", "/admin/settings").json()["server"]
        database, lease_storage = of_server["database"], str(of_server["concurrency"]["lease_storage"])
    except (PrefectHTTPStatusError, KeyError, TypeError):
        return [Finding("database", SKIPPED, "this server does not tell its settings")]
    return [_database(database, workers), _leases(lease_storage)]


@_about("database")
def _database(database: dict[str, Any], workers: int) -> Said:
    told = f"{database.get('connection_url') or ''} {database.get('driver') or ''}".strip()
    if "postgresql" in told:
        return OK, "PostgreSQL"
    if database.get("connection_url") and "sqlite" not in told:
        return OK, "one of its own; the server hides which (PostgreSQL is the one for several workers)"
    if workers <= 1:
        return OK, "SQLite: right for one worker, PostgreSQL for more"
    return (
        MEND,
        f"SQLite, with {workers} workers: it takes some 15 task runs a second and drops the rest",
        "PREFECT_SERVER_DATABASE_CONNECTION_URL=postgresql+asyncpg://USER:WORD@HOST/NAME (docs/operations.md)",
    )


@_about("leases")
def _leases(lease_storage: str) -> Said:
    if lease_storage != MEMORY_LEASES:
        return OK, lease_storage.rpartition("lease_storage.")[2]
    return (
        MEND,
        "kept in the server's memory: slots that are taken at a restart are lost",
        f"Start the server with PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE={FILE_LEASES}",
    )


@_about("dead runs")
def dead_runs(found: dict[str, Any] | None, beat_seconds: int | None) -> Said:
    """Whether runs whose machine died end by themselves."""
    from prefect_eachlabs.cli.automation import BEATS, DEAD_RUNS

    stays = "whose machine died stays Running, and generate-batch cancels all that follow"
    if beat_seconds is None:
        advice = "Take PREFECT_FLOWS_HEARTBEAT_FREQUENCY= out of the workers' environment, then prefect-eachlabs setup."
        return MEND, f"runs send no heartbeats: one {stays}", advice
    if found is None:
        said = f"the automation {DEAD_RUNS!r} is not there: a run {stays}"
        return MEND, said, "prefect-eachlabs setup makes it."
    within_seconds = float(found["trigger"].get("within") or 0)
    if not found["enabled"]:
        return MEND, f"the automation {DEAD_RUNS!r} is switched off", "Automations → switch it on."
    if within_seconds >= (BEATS - 1) * beat_seconds:
        return OK, f"end as Crashed after {within_seconds:g} s without a heartbeat"
    said = f"the automation {DEAD_RUNS!r} waits {within_seconds:g} s, and runs beat every {beat_seconds} s"
    return MEND, f"{said}: it ends runs that live", "Delete it (Automations); prefect-eachlabs setup makes it anew."


def limits(settings: AccountSettings | None) -> tuple[list[Finding], bool]:
    """Whether the account's limits are there and say what the account says."""
    from prefect_eachlabs.limits import admin

    if settings is None:
        return [Finding("limits", SKIPPED, "not looked at without an account")], False
    try:
        statuses, of_tags = asyncio.run(admin.show(settings)), asyncio.run(admin.tags(settings))
    except SetupError as error:
        return [_of_error("limits", error)], False
    are_there = all(status.limit is not None for status in statuses if status.setting is not None)
    return [*map(_limit, statuses), *map(_tag_limit, of_tags)], are_there


def _limit(status: LimitStatus) -> Finding:
    about, taken = f"limit {status.kind.value}", f"{status.name}: {status.in_use} of {status.limit} taken"
    if status.setting is None:
        return Finding(about, OK, "none is wanted")
    if status.limit is None:
        said = f"{status.name} is not there; the first run makes it"
        return Finding(about, MEND, said, "prefect-eachlabs setup makes it.")
    if status.limit == status.setting:
        return Finding(about, OK, taken)
    said = f"{taken}, and the account's setting is {status.setting}"
    return Finding(about, MEND, said, "prefect-eachlabs limits apply writes it.")


def _tag_limit(one: TagLimit) -> Finding:
    from prefect_eachlabs.cli.limits import problem_of

    about, said = f"tag {one.tag}", f"{one.in_use} of {one.limit} task runs"
    if problem := problem_of(one):
        advice = f"prefect-eachlabs limits apply --tag {one.tag}= takes it away."
        return Finding(about, MEND, f"{said}; {problem}", advice)
    return Finding(about, OK, said)
