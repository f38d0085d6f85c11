"""Opens batches: to run one, or only to see what it would do."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from prefect_eachlabs.batch.budget import ModelPrice
from prefect_eachlabs.batch.buying import EngineBuyer
from prefect_eachlabs.batch.files import S3Files
from prefect_eachlabs.batch.outcomes import Outcome, RowState, Totals, money, refused
from prefect_eachlabs.batch.progress import Show
from prefect_eachlabs.batch.report import BatchFolder
from prefect_eachlabs.batch.run import Batch, BatchOptions
from prefect_eachlabs.batch.source import Defaults, Source, Wanted, open_source
from prefect_eachlabs.batch.tables import AS_USUAL, BadRow, Columns, Table, base_name
from prefect_eachlabs.batch.worker import Worker
from prefect_eachlabs.engine.engine import Engine
from prefect_eachlabs.models import Destination
from prefect_eachlabs.reference_images import Roots
from prefect_eachlabs.settings import AccountSettings
from prefect_eachlabs.storage.s3_client import S3Access

ROWS = "rows"
"""What a table without a name is called, and its batch."""
EXPECTED_PREDICTION_SECONDS = 5.0
"""What the model's page says, until a report tells better."""
SHARE_OF_REQUESTS_FOR_BUYING = 0.9
"""Of the account's requests; the rest are questions."""


async def open_batch(
    engine: Engine,
    source: str | Table,
    destination: Destination,
    options: BatchOptions,
    *,
    batch_id: str | None = None,
    access: S3Access | None = None,
    defaults: Defaults | None = None,
    worker: Worker,
    show: Show | None = None,
    show_seconds: float = 30.0,
    any_source: bool = False,
    columns: Columns = AS_USUAL,
) -> Batch:
    """Opens a source and makes a batch of it; nothing is bought yet. On the gateway's loop.

    Args:
        engine: Buys for the account.
        source: A path or `s3://bucket/key`: CSV, TSV, JSON Lines, Parquet or Excel; or a table, which the batch closes.
        destination: Where pictures, records and reports go.
        options: What this run may do.
        batch_id: Names the batch's folder of reports; the base name of a source when None.
        access: How to reach the bucket; boto3's own chain when None.
        defaults: The model of rows that name none.
        worker: Runs what blocks; the caller closes it.
        show: Told the progress every `show_seconds`.
        any_source: A person at the command line named it: every file and bucket will do. Otherwise it is read where
            EACHLABS_REFERENCE_ROOTS names its place, and below a destination that a block describes.
        columns: Which hold the prompts and ids, where they are not called so.

    Raises:
        BadInput: The source may not be read, is no table, or has no prompt column; or there is no such model.
        SetupError: It cannot be read.
    """
    if defaults is not None:
        await engine.account.catalogue.check_slug(defaults.model)
    if batch_id is None:
        batch_id = base_name(source) if isinstance(source, str) else ROWS
    store = engine.account.ledger(destination, access).store
    folder = BatchFolder(store, S3Files(destination.bucket, access), destination, batch_id, worker)
    roots = Roots.parse(engine.settings.reference_roots)
    if access is not None:
        roots = roots.and_below(destination.bucket, destination.prefix)
    if isinstance(source, str):
        within = None if any_source else roots
        if within is not None:
            source = await worker(within.source, source)
        opened = await worker(partial(open_source, source, access, defaults, roots, columns=columns, within=within))
    else:
        opened = Source(source, ROWS, defaults, roots, columns)
    return Batch(
        EngineBuyer(engine), opened, folder, options, worker=worker, access=access, show=show, show_seconds=show_seconds
    )


@dataclass(frozen=True)
class Plan:
    """What a run would do; nothing was bought or written.

    Attributes:
        items: Rows of the source.
        new: Rows that would be bought, or whose lost orders would be looked for.
        reused: Rows whose picture is there, or that are paid for: records say so.
        failed: Rows that cannot be bought: bad rows, inputs that their models refuse, what failed for good before, ids
            that stand for another input.
        why: The failed ones by kind.
        cost_usd: What the new ones would cost, by learned prices; None while nobody knows a price.
        seconds: How long it would take; None while nobody can tell.
        prices: Model of new rows → its price, and from how many pictures that is known.
        limits: The account's, in words.
        bad_rows: The first failed ones.
        unchecked: Why the API did not say what models take and cost; empty: it did.
    """

    batch_id: str
    items: int
    new: int
    reused: int
    failed: int
    why: str
    cost_usd: float | None
    seconds: float | None
    prices: dict[str, ModelPrice] = field(default_factory=dict)
    limits: str = ""
    bad_rows: tuple[Outcome, ...] = ()
    unchecked: str = ""
    set_up_wrong: bool = False

    @property
    def is_complete(self) -> bool:
        """Whether every row can have its picture."""
        return not self.failed

    @property
    def cost(self) -> str:
        """`$195.00 (gemini: $0.0390 each, by 87 of the account's past pictures)`; empty where nobody knows a price."""
        if self.cost_usd is None:
            return ""
        whose = {"report": "of the last report's pictures", "executions": "of the account's past pictures"}
        told = "; ".join(
            f"{model}: ${price.mean_usd:,.4f} each, by {price.pictures:,} {whose[price.told_by]}"
            for model, price in sorted(self.prices.items())
        )
        return f"${self.cost_usd:,.2f}{f' ({told})' if told else ''}"

    def as_json(self) -> dict[str, Any]:
        """What `--dry-run --json` prints: the counts of a run that bought nothing."""
        return {
            "batch_id": self.batch_id,
            "dry_run": True,
            "items": self.items,
            "stored": 0,
            "reused": self.reused,
            "failed": self.failed,
            "ambiguous": 0,
            "skipped": self.new,
            "new": self.new,
            "cost_usd": 0.0,
            "estimated_cost_usd": self.cost_usd,
            "estimated_by": {
                model: {**price._asdict(), "mean_usd": money(price.mean_usd)} for model, price in self.prices.items()
            },
            "estimated_seconds": self.seconds,
            "why": self.why,
            "report_uri": None,
        }


SHOWN_BAD_ROWS = 20
CHECKED_AT_A_TIME = 100
"""Against their models' schemas, in a process of its own."""


async def plan_batch(batch: Batch, settings: AccountSettings) -> Plan:
    """Reads everything and buys nothing: what is new, what is there, what is wrong, what it would cost.

    Free: for each model of new rows its schema is asked for, and where no report tells its price a page of the
    account's executions.

    Args:
        batch: As `open_batch` made it; closed in the end.
        settings: The account, whose limits say how long it would take.

    Raises:
        EachlabsError: The source or the bucket cannot be read, or the key is refused.
    """
    try:
        await batch.history.load()
        totals, new, bad = Totals(), Counter[str](), list[Outcome]()
        while several := await _several(batch, settings):
            left = [row for row in several if isinstance(row, Wanted)]
            refusals = iter(await batch.refused_by_their_models(left))
            for row in several:
                outcome = next(refusals) if isinstance(row, Wanted) else row
                if outcome is None:
                    assert isinstance(row, Wanted), "what is known has its outcome"
                    new[row.item.model] += 1
                    continue
                totals.add(outcome)
                if outcome.state is RowState.FAILED and len(bad) < SHOWN_BAD_ROWS:
                    bad.append(outcome)
        for model in new.keys() - batch.unchecked.keys():
            await batch.budget.look_up(model)
    finally:
        await batch.close()
    prices = {model: price for model in new if (price := batch.budget.price_of(model)) is not None}
    cost_usd = sum(count * prices[model].mean_usd for model, count in new.items() if model in prices)
    count = new.total()
    limits = ((settings.requests_per_minute, "requests a minute"), (settings.max_in_flight, "in flight"))
    return Plan(
        batch_id=batch.folder.batch_id,
        items=totals.items + count,
        new=count,
        reused=totals.count(RowState.REUSED),
        failed=totals.count(RowState.FAILED),
        why=totals.why(),
        cost_usd=None if len(prices) < len(new) else money(cost_usd),
        seconds=estimated_seconds(count, settings, batch.history.earlier.mean_seconds),
        prices=prices,
        limits=" and ".join(f"{most} {what}" for most, what in limits if most is not None),
        bad_rows=tuple(bad),
        unchecked=next(map(str, batch.unchecked.values()), ""),
    )


async def _several(batch: Batch, settings: AccountSettings) -> list[Wanted | Outcome]:
    """The next rows, a hundred at most: what will come of each, or the row itself where nothing settles it."""
    several: list[Wanted | Outcome] = []
    while len(several) < CHECKED_AT_A_TIME and (found := await batch.rows.next()) is not None:
        row, earlier = found
        if isinstance(row, BadRow):
            several.append(refused(row))
            continue
        outcome, _ = await batch.history.settled(row, earlier)
        if outcome is None:
            outcome = await batch.history.by_record(row, batch.options, settings.claim_seconds)
        several.append(outcome or row)
    return several


def estimated_seconds(count: int, settings: AccountSettings, prediction_seconds: float | None) -> float | None:
    """How long so many pictures take within the account's limits; None without limits, where machines decide."""
    each = prediction_seconds or EXPECTED_PREDICTION_SECONDS
    rates = []
    if settings.requests_per_minute is not None:
        rates.append(settings.requests_per_minute * SHARE_OF_REQUESTS_FOR_BUYING / 60)
    if settings.max_in_flight is not None:
        rates.append(settings.max_in_flight / each)
    if not count:
        return 0.0
    return round(count / min(rates) + each, 1) if rates else None
