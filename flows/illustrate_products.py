"""Products of a database without a picture get one, and its address is written back to them.

    python flows/illustrate_products.py products-database s3://acme/products         # once
    prefect deploy flows/illustrate_products.py:illustrate_products ...              # each night

The database is named, never addressed: by a saved Secret block that holds its URL, or by a variable of the worker's
environment that the operator lists in EACHLABS_DATABASES. The URL has an async driver: postgresql+asyncpg://...,
sqlite+aiosqlite:///... Copy this file and make the two statements your own.
"""

from __future__ import annotations

import asyncio
import os
import re
import sys

from prefect import flow
from prefect.blocks.system import Secret
from sqlalchemy import URL, make_url, text
from sqlalchemy.ext.asyncio import create_async_engine

from prefect_eachlabs import agenerate_rows
from prefect_eachlabs.errors import SetupError
from prefect_eachlabs.models import item_id_of

WANTED = text("SELECT sku, name, colour FROM products WHERE picture IS NULL ORDER BY sku")
WRITE = text("UPDATE products SET picture = :uri WHERE sku = :sku AND picture IS NULL")
QUERY = {"ssl", "sslmode", "charset"}  # nothing else: drivers take hosts, files and passwords there, under many names


@flow
async def illustrate_products(database: str, destination: str, budget_usd: float | None = None) -> str:
    """Buys each missing picture once; killed at any moment, the next run finds it. **Costs money.**

    Args:
        database: The name of a Secret block, or of a variable on the operator's list.
        destination: Where pictures, records and the report go: s3://bucket/prefix.
        budget_usd: Spend at most so much in this run; the rest waits for the next one.
    """
    engine = create_async_engine(await url_of(database))
    try:
        async with engine.connect() as connection:
            products = (await connection.execute(WANTED)).all()
        rows = [{"id": item_id_of(p.sku), "prompt": f"a studio photo of a {p.colour} {p.name}"} for p in products]
        result = await agenerate_rows(rows, destination=destination, budget_usd=budget_usd)
        there = [{"sku": p.sku, "uri": row.uri} for p, row in zip(products, result, strict=True) if row.uri]
        if there:
            async with engine.begin() as connection:
                await connection.execute(WRITE, there)
    finally:
        await engine.dispose()
    return f"{len(there)} of {len(products)} products have their picture now. {result.in_words()}"


async def url_of(database: str) -> URL:
    """Where the database of that name is. Raises SetupError when there is none, or its URL may not be used."""
    listed = os.environ.get("EACHLABS_DATABASES", "").replace(",", " ").split()
    try:
        url = make_url(os.environ[database] if database in listed else await secret_of(database))
    except Exception:  # whose text may hold the URL, with its password
        raise SetupError(f"database: {database[:80]!r} is not the name of a Secret block with a URL.") from None
    if not QUERY.issuperset(url.query):
        raise SetupError(f"database: the URL of {database!r} may have no query but {', '.join(sorted(QUERY))}.")
    return url


async def secret_of(block: str) -> str:
    if not re.fullmatch("[a-z0-9-]+", block):  # a path would lead to a block of another type
        raise ValueError(f"{block!r} is not the name of a Secret block")
    found: Secret[str] = await Secret.aload(block)
    return found.get()


if __name__ == "__main__":
    print(asyncio.run(illustrate_products(sys.argv[1], sys.argv[2])))
