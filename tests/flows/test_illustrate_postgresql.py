"""The pipeline to copy, on PostgreSQL, killed with its rows bought and no address written."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from tests.conftest import ROOT
from tests.flows.flow_fixtures import Studio
from tests.ui.stage import PostgreSQL, Process, Stage, until

pytestmark = pytest.mark.slow

COUNT = 12


@pytest.fixture
def postgresql() -> Iterator[PostgreSQL]:
    program = shutil.which("postgres")
    if program is None:
        pytest.skip("PostgreSQL is not installed")
    server = PostgreSQL(Path(program).resolve().parent)
    server.start()
    yield server
    server.stop()


def dsn(server: PostgreSQL) -> str:
    return server.url.replace("+asyncpg", "")


async def filled(server: PostgreSQL) -> None:
    connection = await asyncpg.connect(dsn(server))
    await connection.execute("CREATE TABLE products (sku text PRIMARY KEY, name text, colour text, picture text)")
    rows = [(f"SKU/{number}.0", f"chair {number}", "red") for number in range(COUNT)]
    await connection.executemany("INSERT INTO products VALUES ($1, $2, $3, NULL)", rows)
    await connection.close()


async def pictures(server: PostgreSQL) -> list[str | None]:
    connection = await asyncpg.connect(dsn(server))
    try:
        return [row["picture"] for row in await connection.fetch("SELECT picture FROM products ORDER BY sku")]
    finally:
        await connection.close()


def started(studio: Studio, server: PostgreSQL, prefect: Stage, folder: Path) -> Process:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PREFECT_HOME": str(folder),
        "PREFECT_API_URL": prefect.url,
        "EACHLABS_DATABASES": "SHOP_DATABASE",
        "SHOP_DATABASE": server.url,
        "EACHLABS_CLAIM_SECONDS": "2",
        "EACHLABS_MAX_IN_FLIGHT": "none",  # what is killed keeps its slots for 75 s
    }
    flow = str(ROOT / "flows" / "illustrate_products.py")
    command = [sys.executable, flow, "SHOP_DATABASE", studio.destination]
    return Process(command, environment, folder / "log")


async def killed_at_the_write(studio: Studio, server: PostgreSQL, prefect: Stage, folder: Path) -> None:
    """The table is held against writing; with all rows stored, the process is killed where it waits to write."""
    connection = await asyncpg.connect(dsn(server))
    await connection.execute("BEGIN; LOCK TABLE products IN SHARE MODE")
    process = await asyncio.to_thread(started, studio, server, prefect, folder)

    async def waits() -> Any:
        return await connection.fetchval(
            "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'products'::regclass"
        )

    try:
        for _ in range(3_000):
            if await waits():
                break
            assert process.is_running, process.tail()
            await asyncio.sleep(0.1)  # a real process: its clock cannot be moved
        assert await waits(), process.tail()
    finally:
        process.kill()
        await connection.close()


def test_killed_between_buying_and_writing_back_it_buys_nothing_again(
    studio: Studio, postgresql: PostgreSQL, server_process: Stage, tmp_path: Path
) -> None:
    asyncio.run(filled(postgresql))
    asyncio.run(killed_at_the_write(studio, postgresql, server_process, tmp_path))
    assert studio.billed == COUNT
    assert asyncio.run(pictures(postgresql)) == [None] * COUNT

    process = started(studio, postgresql, server_process, tmp_path)
    try:
        until(lambda: not process.is_running, 120, f"the second run ends: {process.tail()}")
    finally:
        process.stop()
    assert process.popen.returncode == 0, process.tail()
    assert f"{COUNT} of {COUNT} products have their picture now. 0 stored, {COUNT} reused" in process.tail()
    written = asyncio.run(pictures(postgresql))
    assert all(str(uri).startswith(f"{studio.destination}/images/SKU-") for uri in written)
    assert studio.billed == COUNT
