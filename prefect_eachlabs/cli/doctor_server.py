"""The doctor's look at the Prefect server: does it answer, what is it made of, are limits there."""

# ruff: noqa: PLC0415 - what is heavy is imported when the command runs, so that help and refusals answer at once

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from prefect_eachlabs.cli.findings import Finding, State, finding_of, mend, ok, skipped, wrong
from prefect_eachlabs.errors import SetupError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prefect_eachlabs.limits.admin import LimitStatus
    from prefect_eachlabs.settings import AccountSettings

FILE_LEASES = "prefect.server.concurrency.lease_storage.filesystem"
MEMORY_LEASES = "prefect.server.concurrency.lease_storage.memory"


def server_findings(settings: AccountSettings | None) -> tuple[list[Finding], bool]:
    """What is to be said about the server, and whether the account's limits are there."""
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.exceptions import PrefectHTTPStatusError
    from prefect.settings import PREFECT_API_URL

    url = PREFECT_API_URL.value()
    if not url:
        return [
            mend(
                "Prefect",
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
    except (httpx.TransportError, PrefectHTTPStatusError, ValueError, RuntimeError) as error:
        return [
            wrong(
                "Prefect",
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
        return mend(
            "Prefect",
            f"the server at {url} is {version}, and {prefect.__version__} is installed here",
            "Install the same version on the server and on every worker.",
        )
    return ok("Prefect", f"the server at {url} answers ({version})")


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
        return 0, [mend("work pool", f"{WORK_POOL!r} is not there", "prefect-eachlabs setup makes it.")]
    said = ok("work pool", f"{WORK_POOL!r} with {online} workers")
    if pool.is_paused:
        said = mend("work pool", f"{WORK_POOL!r} is paused", "Resume it: prefect work-pool resume eachlabs")
    elif not online:
        said = mend("work pool", f"{WORK_POOL!r} is there and no worker is", "prefect worker start --pool eachlabs")
    return online, [said, job_variables(openings(pool.base_job_template))]


def job_variables(chosen: list[str]) -> Finding:
    """Whether starting a run is running code."""
    if not chosen:
        return ok("job variables", "none: whoever starts a run chooses its parameters alone")
    return mend(
        "job variables",
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
        return [skipped("database", "this server does not tell its settings")]
    return [_database(database, workers), _leases(lease_storage)]


def _database(database: dict[str, Any], workers: int) -> Finding:
    url, driver = str(database.get("connection_url") or ""), str(database.get("driver") or "")
    if "postgresql" in url or "postgresql" in driver:
        return ok("database", "PostgreSQL")
    if url and "sqlite" not in url and "sqlite" not in driver:
        return ok("database", "one of its own; the server hides which (PostgreSQL is the one for several workers)")
    if workers > 1:
        return mend(
            "database",
            f"SQLite, with {workers} workers: it takes some 15 task runs a second and drops the rest",
            "PREFECT_SERVER_DATABASE_CONNECTION_URL=postgresql+asyncpg://USER:WORD@HOST/NAME (docs/operations.md)",
        )
    return ok("database", "SQLite: right for one worker, PostgreSQL for more")


def _leases(lease_storage: str) -> Finding:
    if lease_storage == MEMORY_LEASES:
        return mend(
            "leases",
            "kept in the server's memory: slots that are taken at a restart are lost",
            f"Start the server with PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE={FILE_LEASES}",
        )
    return ok("leases", lease_storage.rpartition("lease_storage.")[2])


def limits(settings: AccountSettings | None) -> tuple[list[Finding], bool]:
    """Whether the account's limits are there and say what the account says."""
    from prefect_eachlabs.limits import admin as limits_admin

    if settings is None:
        return [skipped("limits", "not looked at without an account")], False
    try:
        statuses = asyncio.run(limits_admin.show(settings))
    except SetupError as error:
        return [finding_of("limits", error)], False
    return [_limit(status) for status in statuses], _all_there(statuses)


def _all_there(statuses: Sequence[LimitStatus]) -> bool:
    return all(status.limit is not None for status in statuses if status.setting is not None)


def _limit(status: LimitStatus) -> Finding:
    about = f"limit {status.kind.value}"
    if status.setting is None:
        return ok(about, "none is wanted")
    if status.limit is None:
        return mend(about, f"{status.name} is not there; the first run makes it", "prefect-eachlabs setup makes it.")
    taken = f"{status.name}: {status.in_use} of {status.limit} taken"
    if status.limit != status.setting:
        return mend(
            about, f"{taken}, and the account's setting is {status.setting}", "prefect-eachlabs limits apply writes it."
        )
    return Finding(about, State.OK, taken)
