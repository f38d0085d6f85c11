"""A table in a database: its rows without a picture, and the pictures' addresses written back (SQLAlchemy, async).

PostgreSQL (asyncpg) and SQLite (aiosqlite) need nothing more than Prefect brings; another database needs its own
async driver, named in the URL.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from prefect_eachlabs.errors import BadInput, SetupError, StoreFailed
from prefect_eachlabs.retry import retry_while_retryable

PAGE_ROWS = 200
WRITE_ATTEMPTS = 5
SHOWN_CHARACTERS = 300
_ASYNC_DRIVERS = {
    "postgresql": "postgresql+asyncpg",
    "postgres": "postgresql+asyncpg",
    "postgresql+psycopg2": "postgresql+asyncpg",
    "sqlite": "sqlite+aiosqlite",
}


@dataclass(frozen=True)
class Row:
    """A row that wants a picture."""

    key: Any
    """Its value in the id column."""
    read: tuple[Any, ...]
    """The columns that were asked for, as the database has them."""


def async_url(text: str) -> URL:
    """The URL with a driver that can be awaited, where it names none or one that cannot.

    Raises:
        SetupError: It is no URL of SQLAlchemy's. The message does not hold it: a password may be in it.

    >>> async_url("postgresql://shop@db.internal/shop?sslmode=require").render_as_string()
    'postgresql+asyncpg://shop@db.internal/shop?ssl=require'
    """
    try:
        url = make_url(text.strip())
    except (ArgumentError, ValueError):
        raise SetupError(
            "The database's URL cannot be read: write it as SQLAlchemy does, such as "
            "postgresql://USER:WORD@HOST/NAME or sqlite:////srv/shop.db. Nothing was bought."
        ) from None
    url = url.set(drivername=_ASYNC_DRIVERS.get(url.drivername, url.drivername))
    if url.drivername.endswith("+asyncpg") and "sslmode" in url.query:
        query = dict(url.query)
        url = url.set(query={**query, "ssl": query.pop("sslmode")}).difference_update_query(["sslmode"])
    return url


class PictureTable:
    """A table that was looked at: its columns are there. Made by `open_table`.

    Args:
        engine: To its database.
        table: As reflected.
        key: The column that names a row.
        uri: The column for the pictures' addresses.
        columns: What prompts are made of.
    """

    def __init__(
        self, engine: AsyncEngine, table: sa.Table, key: sa.Column[Any], uri: sa.Column[Any], columns: Sequence[str]
    ) -> None:
        self._engine = engine
        self._table = table
        self._key = key
        self._uri = uri
        self._columns = [table.columns[name] for name in columns]

    async def without_picture(self, most: int) -> AsyncGenerator[Row, None]:
        """The rows whose address is NULL or empty, in the order of their ids, each once; a page of 200 at a time.

        No connection is held between two pages: making a page's pictures takes minutes.

        Args:
            most: So many rows at most.

        Raises:
            SetupError: The database does not answer, or refuses.
        """
        after: Any = None
        while most > 0:
            size = min(PAGE_ROWS, most)
            wanted = sa.select(self._key, *self._columns).where(self._is_empty()).order_by(self._key).limit(size)
            if after is not None:
                wanted = wanted.where(self._key > after)
            try:
                async with self._engine.connect() as connection:
                    page = [Row(row[0], tuple(row[1:])) for row in await connection.execute(wanted)]
            except (SQLAlchemyError, OSError) as error:
                raise _set_up_wrong(f"Rows of {self._table.fullname} could not be read", error) from error
            for row in page:
                yield row
            if len(page) < size:
                return
            most -= size
            after = page[-1].key

    async def write_back(self, row: Row, uri: str) -> bool:
        """Writes the picture's address into its row; tries for some seconds.

        Args:
            row: As it was read.
            uri: Where its picture is.

        Returns:
            Whether the row took it. False: it has an address by now, its text is another one, or it is gone.

        Raises:
            StoreFailed: The database did not take it. The picture is safe; run again, which buys nothing.
        """
        unchanged = [
            column.is_not_distinct_from(value)
            for column, value in zip(self._columns, row.read, strict=True)
            # Of other types equality is not always known to the database (JSON), or not exact (floats).
            if isinstance(column.type, (sa.String, sa.Integer))
        ]
        change = (
            sa.update(self._table).where(self._key == row.key, self._is_empty(), *unchanged).values({self._uri: uri})
        )

        async def write() -> bool:
            try:
                async with self._engine.begin() as connection:
                    return (await connection.execute(change)).rowcount > 0
            except (SQLAlchemyError, OSError) as error:
                raise StoreFailed(
                    f"The picture of row {row.key} is stored at {uri}; {self._table.fullname} could not be told: "
                    f"{_said(error)}. Run again: it is found, and nothing is bought."
                ) from error

        return await retry_while_retryable(write, attempts=WRITE_ATTEMPTS)

    def _is_empty(self) -> sa.ColumnElement[bool]:
        return sa.or_(self._uri.is_(None), self._uri == "")


@asynccontextmanager
async def open_table(
    url: str, table: str, *, id_column: str, uri_column: str, columns: Sequence[str]
) -> AsyncIterator[PictureTable]:
    """Looks at the table before anything is bought.

    Args:
        url: The database's, as SQLAlchemy writes it.
        table: Its name, or SCHEMA.NAME.
        id_column: The primary key, or another column of which no two rows have the same value.
        uri_column: Text; takes the pictures' addresses.
        columns: What prompts are made of.

    Raises:
        BadInput: There is no such table or column, the id column is not unique, or the address is not text.
        SetupError: The database does not answer, refuses, or its driver is not installed.
    """
    try:
        engine = create_async_engine(async_url(url), pool_pre_ping=True, hide_parameters=True)
    except (SQLAlchemyError, ImportError) as error:
        raise _set_up_wrong("There is no async driver for this database", error) from error
    try:
        try:
            async with engine.connect() as connection:
                found, unique = await _reflected(connection, table)
        except (SQLAlchemyError, OSError) as error:
            if isinstance(error, sa.exc.NoSuchTableError):
                raise BadInput(f"table: there is no table {table!r}. Nothing was bought.") from None
            raise _set_up_wrong(f"The table {table!r} could not be looked at", error) from error
        for name in (id_column, uri_column, *columns):
            if name not in found.columns:
                there = ", ".join(sorted(found.columns.keys()))
                raise BadInput(f"{table} has no column {name!r}: there are {there}. Nothing was bought.")
        if (id_column,) not in unique:
            raise BadInput(
                f"id_column: {table}.{id_column} may hold a value twice; name the primary key or a column with a "
                "unique index. Nothing was bought."
            )
        if not isinstance(found.columns[uri_column].type, sa.String):
            raise BadInput(f"uri_column: {table}.{uri_column} is not text. Nothing was bought.")
        yield PictureTable(engine, found, found.columns[id_column], found.columns[uri_column], columns)
    finally:
        await engine.dispose()


async def _reflected(connection: AsyncConnection, name: str) -> tuple[sa.Table, set[tuple[str, ...]]]:
    """The table, and the sets of columns by which each row is told apart."""
    schema, _, plain = name.strip().rpartition(".")

    def look(sync_connection: sa.Connection) -> tuple[sa.Table, set[tuple[str, ...]]]:
        where = schema or None
        table = sa.Table(plain, sa.MetaData(), schema=where, autoload_with=sync_connection, resolve_fks=False)
        inspector = sa.inspect(sync_connection)
        found = {tuple(column.name for column in table.primary_key.columns)}
        found |= {tuple(one["column_names"]) for one in inspector.get_unique_constraints(plain, schema=where)}
        indexes = inspector.get_indexes(plain, schema=where)
        found |= {tuple(str(column) for column in one["column_names"]) for one in indexes if one["unique"]}
        return table, found

    return await connection.run_sync(look)


def _set_up_wrong(what: str, error: BaseException) -> SetupError:
    return SetupError(f"{what}: {_said(error)}. Mend it and run again; nothing was bought for rows that it hides.")


def _said(error: BaseException) -> str:
    """What the database said, without the statement."""
    cause = getattr(error, "orig", None) or error
    return f"{type(cause).__name__}: {' '.join(str(cause).split())[:SHOWN_CHARACTERS]}"
