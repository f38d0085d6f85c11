"""The pipeline to copy that takes its rows from a database and writes the pictures' addresses back."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from prefect.blocks.system import Secret
from sqlalchemy.exc import DatabaseError

from prefect_eachlabs.errors import SetupError
from tests.flows.flow_fixtures import Studio
from tests.flows.test_entry_points import pipeline

pytestmark = pytest.mark.usefixtures("prefect_server")

PRODUCTS = [("AB/12.3", "chair", "red"), ("p-1", "lamp", "blue"), ("p-2", "mug", "green")]


class Shop:
    """A SQLite file with products."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.url = f"sqlite+aiosqlite:///{path}"
        self.run("CREATE TABLE products (sku TEXT PRIMARY KEY, name TEXT, colour TEXT, picture TEXT)")
        for product in PRODUCTS:
            self.run("INSERT INTO products VALUES (?, ?, ?, NULL)", product)

    def run(self, statement: str, values: tuple[Any, ...] = ()) -> list[Any]:
        with closing(sqlite3.connect(self.path)) as database, database:
            return database.execute(statement, values).fetchall()

    @property
    def pictures(self) -> list[str | None]:
        return [picture for (picture,) in self.run("SELECT picture FROM products ORDER BY sku")]


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shop:
    made = Shop(tmp_path / "shop.db")
    monkeypatch.setenv("SHOP_DATABASE", made.url)
    monkeypatch.setenv("EACHLABS_DATABASES", "OTHER, SHOP_DATABASE")
    return made


def illustrate(database: str, studio: Studio, **more: Any) -> str:
    said: str = asyncio.run(pipeline("illustrate_products")(database, studio.destination, **more))
    return said


def test_each_product_gets_its_picture_once_and_has_its_address_and_a_saved_secret_names_the_database_too(
    studio: Studio, shop: Shop
) -> None:
    shop.run("UPDATE products SET picture = 's3://elsewhere/lamp.png' WHERE sku = 'p-1'")
    assert "2 of 2 products have their picture now" in illustrate("SHOP_DATABASE", studio)
    first, second, third = shop.pictures
    assert first is not None
    assert first.startswith(f"{studio.destination}/images/AB-12-3-")
    assert (second, third) == ("s3://elsewhere/lamp.png", f"{studio.destination}/images/p-2.png")
    Secret(value=shop.url).save("products-database", overwrite=True)
    assert "0 of 0" in illustrate("products-database", studio)
    assert studio.billed == 2


def test_what_was_bought_before_the_addresses_were_written_is_not_bought_again(studio: Studio, shop: Shop) -> None:
    """The write is refused, as it is where the run is killed right before it."""
    shop.run("CREATE TRIGGER away BEFORE UPDATE ON products BEGIN SELECT RAISE(ABORT, 'away'); END")
    with pytest.raises(DatabaseError, match="away"):
        illustrate("SHOP_DATABASE", studio)
    assert (studio.billed, shop.pictures) == (3, [None] * 3)
    shop.run("DROP TRIGGER away")
    assert "0 stored, 3 reused" in illustrate("SHOP_DATABASE", studio)
    assert studio.billed == 3
    assert None not in shop.pictures


def test_what_a_budget_leaves_out_stays_without_an_address(studio: Studio, shop: Shop) -> None:
    assert "1 of 3" in illustrate("SHOP_DATABASE", studio, budget_usd=0.04)
    assert shop.pictures.count(None) == 2


@pytest.mark.parametrize("name", ["HOME", "nothing-of-that-name", "sqlite:///{path}"])
def test_a_database_is_named_and_never_addressed(studio: Studio, shop: Shop, name: str) -> None:
    with pytest.raises(SetupError, match="not the name of a Secret block"):
        illustrate(name.replace("{path}", str(shop.path)), studio)
    assert studio.billed == 0
