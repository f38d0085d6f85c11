"""Settles what runs have left behind in a destination: nothing that was paid for stays unstored. Buys nothing."""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import Collection
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from prefect_eachlabs.engine.account import Account
from prefect_eachlabs.errors import EachlabsError, SetupError, StoreFailed
from prefect_eachlabs.ledger.purchase import Job
from prefect_eachlabs.ledger.records import Ledger, Record, RecordChanged, RecordState, VersionedRecord
from prefect_eachlabs.ledger.rules import PurchaseOptions
from prefect_eachlabs.models import Destination, Item
from prefect_eachlabs.net.redaction import visible
from prefect_eachlabs.storage.s3_client import S3Access

logger = logging.getLogger(__name__)

AT_A_TIME = 16
CLOCK_MARGIN = timedelta(minutes=10)
"""The machines of a store may disagree by so much about when an object was written."""
UNSETTLED = (RecordState.CLAIMED, RecordState.CREATED, RecordState.AMBIGUOUS)
MEMORY_SCHEMA = "eachlabs-settled/1"


@dataclass
class SettleReport:
    """What the cleanup found and did.

    Attributes:
        records: Records in the destination.
        looked_at: Those that were neither stored nor ended, and old enough.
        stored: Pictures that were paid for and are stored now.
        nothing_bought: Claims under which nothing had been bought; the next run buys.
        ended: Predictions that had failed or been cancelled.
        pending: Predictions that have not ended, or whose picture could not be stored yet; unreadable records.
        ambiguous: Nobody can tell whether they were bought.
        too_young: Not settled yet, and no older than a claim and a deadline: a run may be at work on them.
        look_again_seconds: When the last of those is old enough; None: there are none.
        problems: Item id → what to do, for pending and ambiguous ones.
    """

    records: int = 0
    looked_at: int = 0
    stored: int = 0
    nothing_bought: int = 0
    ended: int = 0
    pending: int = 0
    ambiguous: int = 0
    too_young: int = 0
    look_again_seconds: float | None = None
    problems: dict[str, str] = field(default_factory=dict)

    def in_words(self) -> str:
        """All counts in a sentence."""
        said = (
            f"{self.records} records, {self.looked_at} to settle: {self.stored} stored, {self.ended} had failed or "
            f"been cancelled, {self.nothing_bought} had bought nothing, {self.pending} pending, "
            f"{self.ambiguous} ambiguous."
        )
        if self.look_again_seconds is not None:
            are = "is" if self.too_young == 1 else "are"
            said += f" {self.too_young} more {are} too young to settle yet: look again in "
            said += f"{math.ceil(self.look_again_seconds)} s."
        return said


async def settle(
    account: Account, destination: Destination, *, run_id: str, access: S3Access | None = None
) -> SettleReport:
    """Settles records that are neither stored nor ended and older than a claim and a deadline. Buys nothing.

    Every record is read once after each change, whatever it seems to be from outside. A small object,
    `PREFIX/settled.json`, keeps until when that was done and what was left open, so that the next look reads what
    has changed since, and what was open, and lists the rest.

    Args:
        account: Whose.
        destination: Where the records are.
        run_id: Names this run in the records it takes over.
        access: How to get into the bucket.

    Raises:
        SetupError: The bucket or the key is missing or refused.
        StoreFailed: The bucket did not answer.
    """
    ledger = account.ledger(destination, access)
    memory = await _Memory.read(ledger)
    report = SettleReport()
    old_seconds = account.settings.claim_seconds + account.settings.deadline_seconds
    turns = asyncio.Semaphore(AT_A_TIME)
    left: set[str] = set()

    async def one(item_id: str) -> None:
        try:
            async with turns:
                held = await ledger.read(item_id)
        except StoreFailed as error:  # of this record alone: the listing was answered
            report.pending += 1
            report.problems[visible(item_id)] = str(error)
            left.add(item_id)
            return
        if held is None or held.record.state not in UNSETTLED:
            return
        if held.age_seconds <= old_seconds:
            left.add(item_id)
            report.too_young += 1
            report.look_again_seconds = max(report.look_again_seconds or 0.0, old_seconds - held.age_seconds + 1)
            return
        report.looked_at += 1
        options = PurchaseOptions(run_id=run_id)
        outcome, problem = await _settle_one(account, Job(item_of(held.record), ledger, options), held)
        setattr(report, outcome, getattr(report, outcome) + 1)
        if problem:
            report.problems[visible(item_id)] = problem
            left.add(item_id)

    began: datetime | None = None  # by the bucket's clock
    suspects = []
    async for item_id, listed in ledger.listed():
        began = began or listed.date
        report.records += 1
        looked_at = memory.looked_at
        if item_id in memory.left or looked_at is None or listed.modified_at > looked_at - CLOCK_MARGIN:
            suspects.append(item_id)
    await asyncio.gather(*map(one, suspects))
    if began is not None:
        await memory.write(ledger, began, left)
    return report


async def _settle_one(account: Account, job: Job, held: VersionedRecord) -> tuple[str, str]:
    """The report's field to count it under, and what a person should know."""
    try:
        if held.record.state is not RecordState.CREATED:
            held = await account.purchaser.settle_only(job, held)
            if held.record.state is not RecordState.CREATED:
                return "nothing_bought", ""
        if await account.image_store.recover(job.ledger, held) is not None:
            return "stored", ""
        prediction = held.record.prediction()
        assert prediction is not None, "a created record names its prediction"
        future = account.poller.watch(prediction, slot=None)
        end = await account.end_within(future, prediction, None)
        done = await account.image_store.finish(job.ledger, held, end, fresh=False)
        return ("stored" if done.record.state is RecordState.STORED else "ended"), ""
    except SetupError:
        raise
    except RecordChanged:
        return "pending", "Another run works on it."
    except EachlabsError as error:
        return ("ambiguous" if error.kind == "outcome unknown" else "pending"), str(error)


def item_of(record: Record) -> Item:
    """The item that a record is about."""
    names = ("item_id", "model", "version", "input", "fingerprint", "labels", "sample")
    return Item(**{name: getattr(record, name) for name in names})


@dataclass(frozen=True)
class _Memory:
    """What the last look knew.

    Attributes:
        looked_at: When it began, by the bucket's clock: every record written before was read; None: there was none.
        left: The items that it left open.
        is_ours: False where another object stands in its place, which is left alone.
    """

    looked_at: datetime | None = None
    left: frozenset[str] = frozenset()
    is_ours: bool = True

    @classmethod
    async def read(cls, ledger: Ledger) -> _Memory:
        found = await ledger.store.get(ledger.destination.key("settled.json"))
        if found is None:
            return cls()
        try:
            said = json.loads(found.body)
            looked_at, left = datetime.fromisoformat(said["looked_at"]), frozenset(map(str, said["left"]))
            if said["schema"] != MEMORY_SCHEMA or looked_at.tzinfo is None or looked_at > found.date + CLOCK_MARGIN:
                raise ValueError(said["schema"])
        except (ValueError, KeyError, TypeError, RecursionError):
            logger.warning("%s is not what settling writes there: every record is read.", ledger.store.uri(found.key))
            return cls(is_ours=False)
        return cls(looked_at, left)

    async def write(self, ledger: Ledger, looked_at: datetime, left: Collection[str]) -> None:
        """The next look reads more when this fails, no less."""
        if not self.is_ours:
            return
        body = json.dumps({"schema": MEMORY_SCHEMA, "looked_at": looked_at.isoformat(), "left": sorted(left)}, indent=1)
        try:
            key = ledger.destination.key("settled.json")
            await ledger.store.put(key, body.encode(), content_type="application/json")
        except (StoreFailed, SetupError) as error:
            logger.warning("What was settled could not be written down: %s", error)
