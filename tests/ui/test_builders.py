"""What other teams build on it: a table in their database, an event of their own."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from datetime import datetime, timezone
from typing import Any
from uuid import uuid4

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

from tests.conftest import ROOT
from tests.ui.conftest import PLACE, Studio
from tests.ui.stage import PostgreSQL, until

pytestmark = pytest.mark.slow

TABLE = "illustrate-table/illustrate-table"


async def on_database(url: str, *statements: str) -> list[Any]:
    """Runs statements; the rows of the last one."""
    engine = create_async_engine(url)
    try:
        async with engine.begin() as connection:
            for statement in statements:
                answer = await connection.execute(sa.text(statement))
            return list(answer) if answer.returns_rows else []
    finally:
        await engine.dispose()


def test_a_product_table_in_postgresql_is_illustrated_once(studio: Studio, database: PostgreSQL) -> None:
    rows = "(1, 'chair', 'red', NULL), (2, 'lamp', 'blue', ''), (3, 'sofa', 'grey', 's3://elsewhere/sofa.png')"
    columns = "id bigint PRIMARY KEY, name text, colour varchar(20), picture_uri text, facts json"
    asyncio.run(
        on_database(
            database.url,
            "CREATE SCHEMA shop",
            f"CREATE TABLE shop.products ({columns})",
            f"INSERT INTO shop.products VALUES {rows}",
        )
    )
    parameters = {
        "table": "shop.products",
        "prompt_template": "a {colour} {name} {{in a room}}",
        "destination": PLACE,
        "database": database.url.replace("+asyncpg", ""),
        "item_id_prefix": "product-",
    }
    billed = studio.api.tallies()["billed"]
    for _ in range(2):
        run = studio.stage.ended(studio.stage.run(TABLE, **parameters))
        assert (run["state"]["type"], run["name"]) == ("COMPLETED", "illustrate shop.products"), run["state"]["message"]
    found = asyncio.run(on_database(database.url, "SELECT id, picture_uri FROM shop.products ORDER BY id"))
    assert [tuple(row) for row in found] == [
        (1, f"{PLACE}/images/product-1.png"),
        (2, f"{PLACE}/images/product-2.png"),
        (3, "s3://elsewhere/sofa.png"),
    ]
    assert studio.api.tallies()["billed"] == billed + 2
    assert len(studio.predictions("a red chair {in a room}")) == 1


def test_an_event_of_another_team_becomes_a_picture_bought_once(studio: Studio) -> None:
    prompt = """a "quoted" {{ event.id }} {% raw %} fox\nin two lines, 50 % grey"""
    ask = "from prefect_eachlabs import request_picture as ask; import sys; print(ask(sys.argv[1], item_id='order-7'))"
    environment = studio.stage.environment("another-team")
    for name in ("EACHLABS_API_KEY", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        environment.pop(name, None)
    deployment = studio.stage.deployment("generate-image/requested-image")

    def ended() -> list[dict[str, Any]]:
        wanted = {"deployment_id": {"any_": [deployment["id"]]}}
        runs: list[dict[str, Any]] = studio.stage.ask("POST", "/flow_runs/filter", {"flow_runs": wanted})
        return [run for run in runs if run["state"]["type"] in ("COMPLETED", "FAILED", "CRASHED")]

    asked = subprocess.run(
        [sys.executable, "-c", ask, prompt], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert asked.stdout == "order-7\n"
    until(lambda: len(ended()) == 1, 120, f"a run for the event; {studio.stage.tails()}")
    again = {
        "id": str(uuid4()),
        "occurred": datetime.now(timezone.utc).isoformat(),
        "event": "eachlabs.picture.requested",
        "resource": {"prefect.resource.id": "eachlabs.picture.order-7", "prefect.resource.name": "order-7"},
        "payload": {"prompt": prompt, "item_id": "order-7"},
    }
    studio.stage.ask("POST", "/events", [again])
    until(lambda: len(ended()) == 2, 120, f"a run for each event; {studio.stage.tails()}")
    assert {run["state"]["type"] for run in ended()} == {"COMPLETED"}, [run["state"]["message"] for run in ended()]
    record = studio.record("order-7")
    assert record is not None
    assert record["state"] == "stored"
    assert len(studio.predictions(prompt)) == 1
