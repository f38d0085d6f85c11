"""The flow `illustrate_table`: rows of a database table without a picture get one, and its address is written back."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import re
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from prefect import flow
from prefect.artifacts import acreate_markdown_artifact
from prefect.blocks.system import Secret
from prefect.client.schemas.objects import State
from prefect.logging import get_run_logger
from prefect.states import Completed, Failed

from prefect_eachlabs.artifacts import escaped
from prefect_eachlabs.artifacts import table as html_table
from prefect_eachlabs.blocks import load_block
from prefect_eachlabs.errors import BadInput, EachlabsError, InsufficientBalance, SetupError
from prefect_eachlabs.flows.database_table import PictureTable, Row, async_url, open_table
from prefect_eachlabs.flows.generate_image import target
from prefect_eachlabs.flows.templates import columns_of, filled_from
from prefect_eachlabs.models import DEFAULT_MODEL, ITEM_ID_PATTERN
from prefect_eachlabs.tasks import agenerate_and_store

__all__ = ["illustrate_table"]

logger = logging.getLogger(__name__)

AT_A_TIME = 20
MOST_SHOWN = 100
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def item_id_of(prefix: str, key: object) -> str:
    """The item id of a row: the prefix and its key; what an item id cannot hold is replaced, and told apart by a hash.

    >>> item_id_of("product-", 17)
    'product-17'
    >>> item_id_of("", "Chaise longue №3")
    'Chaise-longue--3-d9b2ff01e5'
    """
    plain = f"{prefix}{key}"
    if ITEM_ID_PATTERN.fullmatch(plain):
        return plain
    kept = re.sub(r"[^A-Za-z0-9_-]", "-", plain)[:100]
    return f"{kept}-{hashlib.sha256(plain.encode('utf-8', 'replace')).hexdigest()[:10]}"


def database_url(named: str) -> str:
    """The URL that a form's `database` stands for; a password does not belong into a run's parameters.

    Args:
        named: A variable of the worker's environment, `secret/NAME` of a Secret block, or a URL without a password.

    Raises:
        BadInput: A URL with a password.
        SetupError: There is no such variable or block.
    """
    text = named.strip()
    if "://" in text:
        if async_url(text).password:
            raise BadInput(
                "database: a URL with a password would be readable in the run's parameters. Put it into a Secret block "
                "and write secret/NAME, or into a variable of the worker's environment and write its name."
            )
        return text
    if text.startswith("secret/"):
        return str(load_block(text, Secret).get())
    if not _VARIABLE.fullmatch(text) or not os.environ.get(text):
        raise SetupError(
            f"database: the worker's environment has no variable {text[:80]!r}. Set it to the database's URL, or write "
            "secret/NAME of a Secret block. Nothing was bought."
        )
    return os.environ[text]


@dataclass
class _Tally:
    """What became of the rows."""

    bought: int = 0
    found: int = 0
    changed: int = 0
    cost_usd: float = 0.0
    failures: list[tuple[str, EachlabsError]] = field(default_factory=list)
    stopped_by: EachlabsError | None = None

    def state(self) -> State[dict[str, Any]]:
        counts: dict[str, Any] = {
            "bought": self.bought,
            "found": self.found,
            "changed": self.changed,
            "failed": len(self.failures),
            "cost_usd": round(self.cost_usd, 6),
        }
        said = f"{self.bought} bought, {self.found} there already; {self.cost_usd:.4f} USD"
        if self.changed:
            said += (
                f"; {self.changed} rows had changed meanwhile and were left as they are: `replace` buys their new text"
            )
        if not self.failures:
            return Completed(message=said, data=counts)
        key, first = self.failures[0]
        said = f"{len(self.failures)} rows have no picture, the first is {key}: {first}; {said}"
        return Failed(message=f"Stopped: {said}" if self.stopped_by else said, data=counts)


@flow(
    name="illustrate-table",
    description="Rows of a database table without a picture get one, bought once; its address is written back.",
    flow_run_name="illustrate {table}",
)
async def illustrate_table(  # noqa: PLR0917 - the UI's form has no keywords
    table: str,
    prompt_template: str,
    destination: str,
    database: str = "DATABASE_URL",
    id_column: str = "id",
    uri_column: str = "picture_uri",
    item_id_prefix: str = "",
    most: int = 1_000,
    replace: bool = False,
    model: str = DEFAULT_MODEL,
    version: str = "",
    credentials_block: str = "",
) -> State[dict[str, Any]]:
    """Rows without a picture get one, and its address is written into them. **Costs money** once a row.

    Run it again, on a schedule too: rows with an address are left alone; a row whose picture was bought by a run that
    died gets that one. It is an async flow: call it with `await`, or `asyncio.run`.

    Args:
        table: The table, or SCHEMA.TABLE.
        prompt_template: What the picture shows, with columns in braces: a studio photo of {name}, {colour}.
        destination: Where the pictures go: s3://bucket/prefix, or eachlabs-s3-destination/NAME of a saved block.
        database: Where its URL is: a variable of the worker's environment, or secret/NAME of a Secret block. Or the
            URL itself where it holds no password, such as sqlite:////srv/shop.db.
        id_column: The primary key, or another column of which no two rows have the same value.
        uri_column: A text column. Rows where it is NULL or empty want a picture.
        item_id_prefix: Put before the id to name the picture; needed where two tables share a destination.
        most: At most so many rows in one run, 1 to 100,000; the next run goes on.
        replace: A row whose text changed since its picture was bought, and whose address was emptied, gets a new one.
            Without it such a row fails, and says so.
        model: The model's slug.
        version: The model's version. Empty: the default model has its own.
        credentials_block: The name of an Eachlabs Credentials block. Empty: the worker's environment.

    Returns:
        The counts: bought, found (bought earlier), changed (meanwhile, left alone), failed, and cost_usd. The run
        fails when a row has no picture; the others have theirs.

    Raises:
        BadInput: No such table or column, a template that cannot be read, a bound exceeded; nothing was bought.
        SetupError: The database or a setting is missing or refused.
    """
    if not 1 <= most <= 100_000:
        raise BadInput(f"most: {most} must be 1 to 100,000.")
    columns = columns_of(prompt_template, name="prompt_template")
    place = target(destination)
    tally = _Tally()
    turns = asyncio.Semaphore(AT_A_TIME)

    async def illustrate(rows: PictureTable, row: Row) -> None:
        try:
            image = await agenerate_and_store(
                _prompt(prompt_template, columns, row),
                destination=place,
                item_id=item_id_of(item_id_prefix, row.key),
                model=model,
                version=version or None,
                credentials=credentials_block or None,
                replace=replace,
            )
            tally.bought += not image.reused
            tally.found += image.reused
            tally.cost_usd += 0.0 if image.reused else image.cost_usd or 0.0
            if not await rows.write_back(row, image.uri):
                tally.changed += 1
        except EachlabsError as error:
            tally.failures.append((str(row.key), error))
            if isinstance(error, (SetupError, InsufficientBalance)):
                tally.stopped_by = error  # the next row would meet the same
        except Exception as error:
            logger.exception("Row %s: unexpected.", row.key)
            said = f"Unexpected {type(error).__name__}: {str(error)[:300]}. Run again: what was bought is found."
            tally.failures.append((str(row.key), EachlabsError(said, kind="unexpected")))
        finally:
            turns.release()

    url = database_url(database)
    working: set[asyncio.Task[None]] = set()
    async with open_table(url, table, id_column=id_column, uri_column=uri_column, columns=columns) as rows:
        try:
            async with aclosing(rows.without_picture(most)) as wanted:
                async for row in wanted:
                    await turns.acquire()
                    if tally.stopped_by is not None:
                        break
                    one = asyncio.create_task(illustrate(rows, row))
                    working.add(one)
                    one.add_done_callback(working.discard)
        except asyncio.CancelledError:
            for one in working:
                one.cancel()
            raise
        finally:
            # When the database fails, what is in flight is paid for: it ends, and is written back if that can be.
            await asyncio.gather(*working, return_exceptions=True)
    await _show(table, tally)
    return tally.state()


def _prompt(template: str, columns: list[str], row: Row) -> str:
    """The row's prompt.

    Raises:
        BadInput: A column that it needs is empty.
    """
    values = {name: "" if value is None else str(value).strip() for name, value in zip(columns, row.read, strict=True)}
    empty = [name for name, value in values.items() if not value]
    if empty:
        raise BadInput(f"Row {row.key}: its column {', '.join(empty)} is empty. Fill it in and run again.")
    return filled_from(template, values, name="prompt_template")


async def _show(table: str, tally: _Tally) -> None:
    """The counts and the rows without a picture, as the run's artifact."""
    counts = [
        ("bought", str(tally.bought)),
        ("there already", str(tally.found)),
        ("changed meanwhile", str(tally.changed)),
        ("without a picture", str(len(tally.failures))),
        ("USD in this run", f"{tally.cost_usd:.4f}"),
    ]
    blocks = [f"<h1>Pictures for {escaped(table)}</h1>", html_table(counts)]
    if tally.failures:
        cells = [(escaped(key, 120), error.kind, escaped(error, 400)) for key, error in tally.failures[:MOST_SHOWN]]
        blocks.append(html_table(cells, head=("row", "kind", "why")))
    try:
        await acreate_markdown_artifact("\n".join(blocks), description=f"Pictures for {table}")
    except Exception as error:
        get_run_logger().warning("The run's artifact could not be made: %s: %s", type(error).__name__, str(error)[:200])
