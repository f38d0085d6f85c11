"""Rows of a product table get their pictures, and the pictures' addresses come back into the table."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from prefect.blocks.system import Secret
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
from prefect.client.schemas.objects import State

from prefect_eachlabs import BadInput, SetupError
from prefect_eachlabs.flows.database_table import PAGE_ROWS, PictureTable, Row, async_url, open_table
from prefect_eachlabs.flows.illustrate_table import illustrate_table, item_id_of
from tests.flows.flow_fixtures import Studio

pytestmark = pytest.mark.usefixtures("prefect_server")

Sql = Callable[..., list[Any]]


@pytest.fixture
def sql(tmp_path: Path) -> Iterator[Sql]:
    """Runs a statement in the shop's database."""
    with closing(sqlite3.connect(tmp_path / "shop.db")) as connection:

        def run(statement: str, *values: Any) -> list[Any]:
            with connection:
                return connection.execute(statement, values).fetchall()

        run("CREATE TABLE products (id INTEGER PRIMARY KEY, name TEXT, colour TEXT, picture_uri TEXT, price REAL)")
        yield run


def shop(sql: Sql, *products: tuple[str, str | None]) -> None:
    for name, colour in products:
        sql("INSERT INTO products (name, colour) VALUES (?, ?)", name, colour)


def illustrate(studio: Studio, tmp_path: Path, **given: Any) -> State[dict[str, Any]]:
    parameters: dict[str, Any] = {
        "table": "products",
        "prompt_template": "a studio photo of a {colour} {name}",
        "destination": studio.destination,
        "database": f"sqlite:///{tmp_path / 'shop.db'}",
        **given,
    }
    state: State[dict[str, Any]] = asyncio.run(illustrate_table(**parameters, return_state=True))  # type: ignore[call-overload]  # Prefect's keyword
    return state


def counts(state: State[dict[str, Any]]) -> dict[str, Any]:
    data: dict[str, Any] = asyncio.run(_data(state))
    return data


async def _data(state: State[dict[str, Any]]) -> dict[str, Any]:
    return await state.aresult(raise_on_failure=False)


def test_each_row_without_a_picture_gets_one_and_its_address(studio: Studio, sql: Sql, tmp_path: Path) -> None:
    shop(sql, ("chair", "red"), ("lamp", "blue"))
    sql("INSERT INTO products (name, colour, picture_uri) VALUES ('sofa', 'grey', 'https://shop.example/sofa.jpg')")
    sql("INSERT INTO products (name, colour, picture_uri) VALUES ('desk', 'white', '')")
    state = illustrate(studio, tmp_path, item_id_prefix="product-")
    assert state.is_completed(), state.message
    assert counts(state) | {"cost_usd": 0} == {"bought": 3, "found": 0, "changed": 0, "failed": 0, "cost_usd": 0}
    assert dict(sql("SELECT id, picture_uri FROM products")) == {
        1: f"{studio.destination}/images/product-1.png",
        2: f"{studio.destination}/images/product-2.png",
        3: "https://shop.example/sofa.jpg",
        4: f"{studio.destination}/images/product-4.png",
    }
    prompts = {one["input"]["prompt"] for one in studio.api.predictions()}
    assert prompts == {f"a studio photo of a {thing}" for thing in ("red chair", "blue lamp", "white desk")}


def test_running_it_again_buys_nothing_and_a_lost_address_is_found(studio: Studio, sql: Sql, tmp_path: Path) -> None:
    shop(sql, ("chair", "red"), ("lamp", "blue"))
    illustrate(studio, tmp_path)
    assert counts(illustrate(studio, tmp_path))["found"] == 0
    sql("UPDATE products SET picture_uri = NULL WHERE id = 2")  # as if killed between the picture and its address
    assert counts(illustrate(studio, tmp_path))["found"] == 1
    assert sql("SELECT count(*) FROM products WHERE picture_uri IS NULL") == [(0,)]
    assert studio.billed == 2


def test_a_row_that_fails_is_told_and_the_others_have_their_pictures(studio: Studio, sql: Sql, tmp_path: Path) -> None:
    shop(sql, ("chair", "red"), ("lamp", None), ("naked lady", "pink"), ("desk", "white"))
    studio.api.set_faults("prediction:fail_moderation,matching=naked")
    state = illustrate(studio, tmp_path)
    assert state.is_failed()
    assert "2 rows have no picture" in (state.message or "")
    assert counts(state)["failed"] == 2
    assert [row[0] for row in sql("SELECT id FROM products WHERE picture_uri IS NOT NULL ORDER BY id")] == [1, 4]
    (artifact,) = asyncio.run(_artifacts(state))
    assert "content refused" in artifact
    assert "colour is empty" in artifact.replace("&#32;", " ")


async def _artifacts(state: State[Any]) -> list[str]:
    async with get_client() as client:
        mine = ArtifactFilterFlowRunId(any_=[state.state_details.flow_run_id])
        return [str(one.data) for one in await client.read_artifacts(artifact_filter=ArtifactFilter(flow_run_id=mine))]


def test_a_changed_row_is_refused_until_it_may_be_replaced(studio: Studio, sql: Sql, tmp_path: Path) -> None:
    shop(sql, ("chair", "red"))
    illustrate(studio, tmp_path)
    sql("UPDATE products SET colour = 'green', picture_uri = NULL")
    assert "another input" in (illustrate(studio, tmp_path).message or "")
    assert studio.billed == 1
    assert counts(illustrate(studio, tmp_path, replace=True))["bought"] == 1
    assert studio.billed == 2


def test_no_more_rows_are_begun_than_asked_for(studio: Studio, sql: Sql, tmp_path: Path) -> None:
    shop(sql, *((f"chair {n}", "red") for n in range(5)))
    assert counts(illustrate(studio, tmp_path, most=2))["bought"] == 2
    assert [row[0] for row in sql("SELECT id FROM products WHERE picture_uri IS NOT NULL ORDER BY id")] == [1, 2]


def test_an_empty_balance_is_met_by_the_first_rows_alone(studio: Studio, sql: Sql, tmp_path: Path) -> None:
    shop(sql, *((f"chair {n}", "red") for n in range(60)))
    studio.api.set_faults("create:no_balance")
    state = illustrate(studio, tmp_path)
    assert (state.message or "").startswith("Stopped:")
    assert studio.api.tallies()["requests"] < 60


def test_what_is_in_flight_when_the_database_fails_is_stored_and_written_back(
    studio: Studio, sql: Sql, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop(sql, ("chair", "red"), ("lamp", "blue"))
    read = PictureTable.without_picture

    async def then_fail(table: PictureTable, most: int) -> AsyncGenerator[Row, None]:
        async for row in read(table, most):
            yield row
        raise SetupError("The next page could not be read.")

    monkeypatch.setattr(PictureTable, "without_picture", then_fail)
    state = illustrate(studio, tmp_path)
    with pytest.raises(SetupError, match="next page"):
        asyncio.run(state.aresult())
    assert sql("SELECT count(*) FROM products WHERE picture_uri IS NOT NULL") == [(2,)]
    assert [one["status"] for one in studio.api.predictions()] == ["success", "success"]


def test_a_password_in_a_form_is_refused_unseen(studio: Studio, tmp_path: Path) -> None:
    state = illustrate(studio, tmp_path, database="postgresql://shop:hunter2@db.example/shop")
    with pytest.raises(BadInput, match="Secret block") as refused:
        asyncio.run(state.aresult())
    assert "hunter2" not in str(refused.value)


def test_the_database_is_found_by_a_variable_and_by_a_secret_block(
    studio: Studio, sql: Sql, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop(sql, ("chair", "red"))
    url = f"sqlite:///{tmp_path / 'shop.db'}"
    monkeypatch.setenv("SHOP_DATABASE", url)
    assert counts(illustrate(studio, tmp_path, database="SHOP_DATABASE"))["bought"] == 1
    Secret(value=url).save("shop-database", overwrite=True, _sync=True)  # type: ignore[call-arg]  # the sync door
    shop(sql, ("lamp", "red"))
    assert counts(illustrate(studio, tmp_path, database="secret/shop-database"))["bought"] == 1


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"table": "nowhere"}, BadInput, "no table 'nowhere'"),
        ({"prompt_template": "a {size} {name}"}, BadInput, "no column 'size'"),
        ({"prompt_template": "a {name"}, BadInput, "single '{'"),
        ({"uri_column": "price"}, BadInput, "is not text"),
        ({"id_column": "name"}, BadInput, "may hold a value twice"),
        ({"database": "NO_SUCH_VARIABLE"}, SetupError, "no variable 'NO_SUCH_VARIABLE'"),
        ({"database": "sqlite:////nowhere/shop.db"}, SetupError, "unable to open database file"),
        ({"database": "nothing://x"}, SetupError, "no async driver"),
        ({"most": 0}, BadInput, "1 to 100,000"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_bought(
    studio: Studio, sql: Sql, tmp_path: Path, given: dict[str, Any], error: type[Exception], said: str
) -> None:
    shop(sql, ("chair", "red"))
    state = illustrate(studio, tmp_path, **given)
    with pytest.raises(error, match=said):
        asyncio.run(state.aresult())
    assert studio.api.tallies()["requests"] == 0


def test_a_row_that_changed_meanwhile_keeps_what_it_has(sql: Sql, tmp_path: Path) -> None:
    shop(sql, ("chair", "red"), ("lamp", "blue"), ("sofa", "grey"))

    async def read_change_write(table: PictureTable) -> list[bool]:
        rows = [row async for row in table.without_picture(10)]
        sql("UPDATE products SET colour = 'green' WHERE id = 1")
        sql("UPDATE products SET picture_uri = 'by hand' WHERE id = 2")
        sql("UPDATE products SET price = 17.5 WHERE id = 3")  # not in the prompt
        return [await table.write_back(row, f"s3://acme/{row.key}.png") for row in rows]

    assert asyncio.run(with_table(tmp_path, read_change_write)) == [False, False, True]
    assert [row[0] for row in sql("SELECT picture_uri FROM products ORDER BY id")] == [
        None,
        "by hand",
        "s3://acme/3.png",
    ]


def test_rows_are_read_page_by_page_each_once(sql: Sql, tmp_path: Path) -> None:
    wanted = 2 * PAGE_ROWS + 3
    shop(sql, *((f"chair {n}", "red") for n in range(wanted)))

    async def read(table: PictureTable) -> list[Row]:
        return [row async for row in table.without_picture(10_000)]

    assert [row.key for row in asyncio.run(with_table(tmp_path, read))] == list(range(1, wanted + 1))


async def with_table(tmp_path: Path, use: Callable[[PictureTable], Any]) -> Any:
    url, columns = f"sqlite:///{tmp_path / 'shop.db'}", ["colour", "name"]
    async with open_table(url, "products", id_column="id", uri_column="picture_uri", columns=columns) as table:
        return await use(table)


def test_item_ids_of_any_key_are_told_apart() -> None:
    keys = ["7", "a/b", "a-b", "a b", "ä", "x" * 200, "x" * 199 + "y", ""]
    ids = [item_id_of("", key) for key in keys]
    assert len(set(ids)) == len(keys)
    assert all(0 < len(item_id) <= 128 for item_id in ids)


def test_urls_name_a_driver_that_can_be_awaited() -> None:
    assert async_url("postgres://shop@db/shop?sslmode=require").query == {"ssl": "require"}
    assert async_url("postgresql+psycopg2://shop@db/shop").drivername == "postgresql+asyncpg"
    assert async_url("postgresql+psycopg://shop@db/shop").drivername == "postgresql+psycopg"
    assert async_url("sqlite:///shop.db").drivername == "sqlite+aiosqlite"
    with pytest.raises(SetupError, match="cannot be read") as refused:
        async_url("hunter2 is no URL")
    assert "hunter2" not in str(refused.value)
