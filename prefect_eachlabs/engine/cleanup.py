"""Settles what runs have left behind in a destination: nothing that was paid for stays unstored. Buys nothing."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field

from prefect_eachlabs.engine.account import Account, Books
from prefect_eachlabs.errors import EachlabsError, SetupError
from prefect_eachlabs.ledger.purchase import Job
from prefect_eachlabs.ledger.records import Ledger, Overtaken, Record, RecordState, VersionedRecord
from prefect_eachlabs.ledger.rules import PurchaseOptions
from prefect_eachlabs.models import Destination, Item
from prefect_eachlabs.storage.s3_client import S3Access

logger = logging.getLogger(__name__)

AT_A_TIME = 16
RIGHT_AFTER_SECONDS = 60.0


@dataclass
class SettleReport:
    """What the cleanup found and did.

    Attributes:
        records: Records in the destination.
        looked_at: Those that were neither stored nor ended, and old enough.
        stored: Pictures that were paid for and are stored now.
        nothing_bought: Claims under which nothing had been bought; the next run buys.
        ended: Predictions that had failed or been cancelled.
        pending: Predictions that have not ended, or whose picture could not be stored yet.
        ambiguous: Nobody can tell whether they were bought.
        problems: Item id → what to do, for the last two.
    """

    records: int = 0
    looked_at: int = 0
    stored: int = 0
    nothing_bought: int = 0
    ended: int = 0
    pending: int = 0
    ambiguous: int = 0
    problems: dict[str, str] = field(default_factory=dict)


class Cleanup:
    """Goes through a destination's records, on a schedule or when somebody asks."""

    def __init__(self, account: Account) -> None:
        self._account = account

    async def settle(self, destination: Destination, *, run_id: str, access: S3Access | None = None) -> SettleReport:
        """Settles records that are neither stored nor ended and older than a claim and a deadline. Buys nothing.

        Args:
            destination: Where the records are.
            run_id: Names this run in the records it takes over.
            access: How to get into the bucket.

        Raises:
            SetupError: The bucket or the key is missing or refused.
            StoreFailed: The bucket did not answer.
        """
        books = self._account.books(destination, access)
        report = SettleReport()
        limit = asyncio.Semaphore(AT_A_TIME)

        async def one(item_id: str) -> None:
            async with limit:
                held = await books.ledger.read(item_id)
            if held is not None and held.record.state in (
                RecordState.CLAIMED,
                RecordState.CREATED,
                RecordState.AMBIGUOUS,
            ):
                report.looked_at += 1
                outcome, problem = await self._settle_one(books, held, run_id)
                setattr(report, outcome, getattr(report, outcome) + 1)
                if problem:
                    report.problems[item_id] = problem

        suspects = await self._suspects(books.ledger, destination, report)
        await asyncio.gather(*map(one, suspects))
        return report

    async def _suspects(self, ledger: Ledger, destination: Destination, report: SettleReport) -> list[str]:
        """Items whose record is old and was not written right after their picture, as a stored item's record is."""
        pictures: dict[str, float] = {}
        prefix = destination.key("images/")
        async for listed in ledger.store.list(prefix):
            pictures[listed.key[len(prefix) :].partition(".")[0]] = listed.age_seconds
        old_seconds = self._account.settings.claim_seconds + self._account.settings.deadline_seconds
        suspects = []
        prefix = destination.key("records/")
        async for listed in ledger.store.list(prefix):
            if not listed.key.endswith(".json"):
                continue
            report.records += 1
            item_id = listed.key[len(prefix) : -len(".json")]
            # A picture that is much older than the record is of an earlier purchase, which was replaced.
            finished = item_id in pictures and 0 <= pictures[item_id] - listed.age_seconds <= RIGHT_AFTER_SECONDS
            if not finished and listed.age_seconds > old_seconds:
                suspects.append(item_id)
        return suspects

    async def _settle_one(self, books: Books, held: VersionedRecord, run_id: str) -> tuple[str, str]:
        """The report's field to count it under, and what a person should know."""
        item = item_of(held.record)
        job = Job(run_id)
        try:
            if held.record.state is not RecordState.CREATED:
                options = PurchaseOptions(run_id=run_id)
                held = await self._account.purchaser.settle_only(
                    item, books.ledger, books.reconciler, held, options, job
                )
                if held.record.state is not RecordState.CREATED:
                    return "nothing_bought", ""
            recovered = await self._account.image_store.recover(books.ledger, held)
            if recovered is not None:
                return "stored", ""
            prediction = held.record.prediction()
            assert prediction is not None, "a created record names its prediction"
            future = self._account.poller.watch(prediction, slot=None)
            end = await self._account.end_within(future, prediction, None)
            done = await self._account.image_store.finish(books.ledger, held, end, fresh=False)
            return ("stored" if done.record.state is RecordState.STORED else "ended"), ""
        except SetupError:
            raise
        except Overtaken:
            return "pending", "Another run works on it."
        except EachlabsError as error:
            return ("ambiguous" if error.kind == "outcome unknown" else "pending"), str(error)


def item_of(record: Record) -> Item:
    """The item that a record is about."""
    return Item(
        item_id=record.item_id,
        model=record.model,
        version=record.version,
        input=record.input,
        fingerprint=record.fingerprint,
        labels=record.labels,
        sample=record.sample,
    )
