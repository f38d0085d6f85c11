"""Who fills in a form leads no worker to a database of their own, and has it send no password there."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from urllib.parse import quote

import pytest
from prefect.blocks.system import Secret

from prefect_eachlabs.errors import SetupError
from tests.flows.flow_fixtures import Studio
from tests.flows.test_entry_points import pipeline

pytestmark = pytest.mark.usefixtures("prefect_server")


@pytest.fixture
def listener(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A database that listens, on a worker whose environment holds the password of another one."""
    monkeypatch.setenv("PGPASSWORD", "hunter2-of-the-worker")
    monkeypatch.setenv("EACHLABS_DATABASES", "SHOP_DATABASE")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        yield server


def assert_nobody_came(listener: socket.socket) -> None:
    with pytest.raises(TimeoutError):
        listener.accept()


@pytest.mark.parametrize("scheme", ["postgresql", "postgresql+asyncpg", "mysql+aiomysql"])
def test_a_form_that_gives_an_address_leads_nowhere(studio: Studio, listener: socket.socket, scheme: str) -> None:
    address = f"{scheme}://shop@127.0.0.1:{listener.getsockname()[1]}/shop"
    with pytest.raises(SetupError, match="not the name of a Secret block"):
        asyncio.run(pipeline("illustrate_products")(address, studio.destination))
    assert_nobody_came(listener)
    assert studio.billed == 0


def test_a_url_whose_query_leads_elsewhere_is_refused_in_every_spelling(
    studio: Studio, listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = listener.getsockname()[1]
    names = ("host", "HOST", "%68ost", "+host", "hostaddr", "port", "password", "passfile", "service", "servicefile")
    for name in (*names, "dsn", "options", "unix_sock", "unix_socket", "read_default_file", "uri", "sslkey", "ssl_ca"):
        for query in (f"{name}=127.0.0.1:{port}", f"ssl=require&{name}={quote('/tmp')}", f"charset=utf8&{name}=x"):
            monkeypatch.setenv("SHOP_DATABASE", f"postgresql+asyncpg://shop@db.invalid/shop?{query}")
            with pytest.raises(SetupError) as refused:
                asyncio.run(pipeline("illustrate_products").fn("SHOP_DATABASE", studio.destination))
            assert "/shop" not in str(refused.value)
    assert_nobody_came(listener)


def test_a_secret_that_is_no_url_is_not_told(studio: Studio) -> None:
    Secret(value="sk-a-key-of-something-else").save("some-key", overwrite=True)
    with pytest.raises(SetupError, match="not the name of a Secret block") as refused:
        asyncio.run(pipeline("illustrate_products")("some-key", studio.destination))
    assert "sk-a-key" not in str(refused.value)
    assert refused.value.__cause__ is None
