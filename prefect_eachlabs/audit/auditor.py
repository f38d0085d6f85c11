"""Walks the account's bill once and joins it with the records of destinations. Buys nothing.

The executions are walked first and the records read afterwards, so that whatever the walk has shown is in its record
by then; what is younger than the walk is not looked at. Two things alone are changed: nothing, and a record that lacks
the cost that the bill tells.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime, timedelta, timezone
from functools import partial
from typing import Any, TypeVar

from prefect_eachlabs.audit.report import RECORDED, AuditReport, Kind, Named
from prefect_eachlabs.audit.scratch import Lost, Scratch
from prefect_eachlabs.batch.outcomes import money
from prefect_eachlabs.batch.worker import on_disk
from prefect_eachlabs.engine.account import Account
from prefect_eachlabs.errors import BadInput, EachlabsError, Rejected, StoreFailed, Unanswered
from prefect_eachlabs.ledger.evidence import fit, newest
from prefect_eachlabs.ledger.late_costs import correct_cost, lacks_cost
from prefect_eachlabs.ledger.records import Ledger, Record, RecordState, VersionedRecord
from prefect_eachlabs.models import Destination, PredictionStatus
from prefect_eachlabs.retry import retry_while_retryable
from prefect_eachlabs.storage.s3_client import S3Access

PAGE_ROWS = 100
PAGES_WITHOUT_NEWS = 3
"""A list that shows the same rows again and again has no end."""
READ_AT_A_TIME = 16
MARGIN = timedelta(minutes=10)
"""The buyers' clocks, the bucket's and the API's may disagree by so much before a record is called unlisted."""
READ_BACK = timedelta(hours=1)
"""Records are read from so long before the window: they are written after what they name was created."""
LOOKED_BACK = timedelta(days=1)
"""An order without a trace was sent at most so long before the one that was made in its place."""
LISTED_FOR = timedelta(days=89)
"""The vendor's list goes back 90 days."""
EARLIEST = datetime.min.replace(tzinfo=timezone.utc)
MOST_ASKED_ABOUT = 200
"""Executions whose input is asked for, a request each: those that a lost order may have bought."""
MOST_SUSPECTS = 10_000
MOST_STRAYS = 1_000
DEAREST = 10

T = TypeVar("T")
Show = Callable[[str], None]
Place = tuple[Destination, "S3Access | None"]


class Auditor:
    """One audit of one account.

    Args:
        account: Whose bill it is; requests take its slots.
        since: Where the window begins; None: as far back as the vendor lists, 90 days.
        until: Where it ends; None: now.
        show: Told how far it is.

    Raises:
        BadInput: The window ends before it begins.
    """

    def __init__(
        self,
        account: Account,
        *,
        since: datetime | None = None,
        until: datetime | None = None,
        show: Show = lambda text: None,
    ) -> None:
        if since is not None and until is not None and since >= until:
            raise BadInput(f"The window ends ({until:%Y-%m-%d %H:%M}) before it begins ({since:%Y-%m-%d %H:%M}).")
        self._account = account
        self._since, self._until, self._show = since, until, show
        self._scratch = Scratch()
        self._requests = 0
        self._api_ahead = timedelta()
        """How far the API's clock is ahead of this loop's zero."""

    async def audit(self, places: Sequence[Place]) -> AuditReport:
        """The bill of the window, accounted for.

        Costs a request for each 100 executions, and one for each execution that a lost order may have bought (200 at
        most); of each destination one listing of its records and one of its pictures, and a read of each record that
        has changed since the window began.

        Args:
            places: The destinations that share the account, and how to reach each.

        Raises:
            EachlabsError: The API or a bucket did not answer, or refused: nothing can be said.
        """
        with on_disk():
            try:
                await self._walk()
                for place, access in places:
                    await self._read_records(self._account.ledger(place, access))
                await self._ask_about_lost_orders()
                return self._report([str(place) for place, _ in places])
            finally:
                self._scratch.close()

    # ------------------------------------------------------------------------------------------------ the bill

    async def _walk(self) -> None:
        client, offset, without_news = self._account.client, 0, 0
        while True:
            page = await self._asked(
                partial(client.executions_page, limit=PAGE_ROWS, offset=offset, since=self._since, until=self._until)
            )
            if offset == 0:
                # The window's ends by the API's clock, as its first answer tells it.
                now = page.date or newest(page.rows) or datetime.now(timezone.utc)
                self._api_ahead = timedelta(seconds=now.timestamp() - asyncio.get_running_loop().time())
                self._walked_at = now
                self._ends_at = min(self._until or now, now) + timedelta(seconds=1)  # a `Date` has whole seconds
                self._begins_at = self._since or now - LISTED_FOR
            begins_at = self._since or EARLIEST
            rows = (row for row in page.rows if row.created_at is None or begins_at <= row.created_at <= self._ends_at)
            new = self._scratch.add_bill(rows)
            offset += page.row_count
            self._show(f"{offset:,} executions")
            latest = newest(page.rows)
            if page.is_last(offset) or (latest is not None and latest < begins_at):
                return
            without_news = 0 if new else without_news + 1
            if without_news == PAGES_WITHOUT_NEWS:
                raise Unanswered("The API's list of executions has no end: it shows the same rows again and again.")

    async def _asked(self, question: Callable[[], Awaitable[T]]) -> T:
        async def counted() -> T:
            self._requests += 1
            return await question()

        return await retry_while_retryable(lambda: self._account.limiter.asked(counted))

    # -------------------------------------------------------------------------------------------- the records

    async def _read_records(self, ledger: Ledger) -> None:
        """Pictures first: what is stored after this listing is looked at by itself."""
        place = ledger.destination
        prefix = place.key("images/")
        async for listed in ledger.store.list(prefix):
            if self._is_of_the_window(listed.date, listed.age_seconds):
                item_id = listed.key.removeprefix(prefix).partition(".")[0]
                self._scratch.add_picture(listed.key, item_id, listed.size_bytes)
        several: list[str] = []
        read = 0
        async for item_id, listed in ledger.listed():
            self._scratch.add_record(item_id)
            if self._is_of_the_window(listed.date, listed.age_seconds):
                several.append(item_id)
            if len(several) == READ_AT_A_TIME:
                await asyncio.gather(*(self._read(ledger, one) for one in several))
                read += len(several)
                several.clear()
                self._show(f"{read:,} records of {place}")
        await asyncio.gather(*(self._read(ledger, one) for one in several))
        for key, item_id in self._scratch.without_record(MOST_STRAYS):
            await self._look_at_stray(ledger, key, item_id)
        self._scratch.next_destination()

    def _is_of_the_window(self, date: datetime, age_seconds: float) -> bool:
        """Whether an object may be about the window: it is written after the execution that it is about."""
        written_at = date - timedelta(seconds=age_seconds) + self._ahead_of(date)
        return self._since is None or written_at >= self._since - READ_BACK

    async def _read(self, ledger: Ledger, item_id: str) -> None:
        try:
            held = await retry_while_retryable(partial(ledger.read, item_id))
        except StoreFailed as error:  # of this record alone: the listing was answered
            self._find(Kind.UNREADABLE, ledger, item_id, said=str(error))
            return
        if held is None:
            return
        record = held.record
        for prediction_id in record.also_bought:
            said = f"bought beside {record.prediction_id}, and not cancelled in time; its picture is not stored"
            self._name(ledger, record, prediction_id, Kind.ONE_TOO_MANY, said)
        for prediction_id in record.earlier:
            self._name(ledger, record, prediction_id, Kind.REPLACED, "an earlier purchase of this item")
        for prediction_id in record.adopted_among:
            self._scratch.note(prediction_id, f"could as well be what item {item_id} of {_place(ledger)} ordered")
        if record.prediction_id is not None:
            await self._judge(ledger, held, record.prediction_id)
        self._take_lost_order(ledger, held)

    async def _judge(self, ledger: Ledger, held: VersionedRecord, prediction_id: str) -> None:
        """What the prediction that a record is about comes to."""
        record = held.record
        row = self._scratch.billed(prediction_id)
        if row is None:
            self._look_for_unlisted(ledger, record, prediction_id)
            return
        if row.model not in (None, record.model):
            self._scratch.add_name(record.model, row.model or "")
        if row.kind in RECORDED[:3] and (row.item_id, row.destination) != (record.item_id, _place(ledger)):
            said = f"item {row.item_id} of {row.destination} names it too: one of both lacks its own picture"
            self._find(Kind.NAMED_TWICE, ledger, record.item_id, prediction_id, cost_usd=row.cost_usd, said=said)
        # A failure may be listed as a success.
        is_paid = row.is_paid and not (row.cost_usd == 0 and record.state is RecordState.FAILED and record.ended_free)
        is_open = row.status is PredictionStatus.PENDING
        kind, said = await self._kind_of(ledger, held, prediction_id, is_paid=is_paid, is_open=is_open)
        self._name(ledger, record, prediction_id, kind, said)
        if lacks_cost(held, row.cost_usd):
            await self._correct(ledger, held, prediction_id, row.cost_usd)

    async def _kind_of(
        self, ledger: Ledger, held: VersionedRecord, prediction_id: str, *, is_paid: bool, is_open: bool
    ) -> tuple[Kind, str]:
        record, place = held.record, _place(ledger)
        if record.state is RecordState.STORED:
            if await self._has_pictures(ledger, record):
                return Kind.STORED, ""
            if not is_paid and not is_open:
                return Kind.ENDED, ""
            return Kind.NOT_STORED, (
                f"its picture is gone from the bucket: {_store_again(prediction_id, place)} while the vendor keeps it, "
                "for a day; later, run its item again with --rebuy-missing"
            )
        if is_open:
            return Kind.IN_FLIGHT, ""
        if not is_paid:
            return Kind.ENDED, ""
        if record.state is RecordState.CREATED:
            settings = self._account.settings
            if held.age_seconds <= settings.claim_seconds + settings.deadline_seconds:
                return Kind.IN_FLIGHT, "it has ended; a run may be storing it"
            return Kind.NOT_STORED, f"prefect-eachlabs settle {place}"
        if record.state is RecordState.FAILED:
            why = record.error.message if record.error is not None else "its record says that it failed"
            return Kind.NOT_STORED, f"{_store_again(prediction_id, place)}; {why}"
        return Kind.NOT_STORED, f"its record says that it was cancelled: {_store_again(prediction_id, place)}"

    async def _has_pictures(self, ledger: Ledger, record: Record) -> bool:
        """Whether all pictures of a stored item are in the bucket; those that the listing shows cost no request."""
        place = ledger.destination
        for uri in (record.uri or "", *record.more_uris):
            key = place.stored_key(uri)
            size_bytes = self._scratch.picture_bytes(key)
            if size_bytes is not None and (uri != record.uri or size_bytes == record.size_bytes):
                continue
            found = await retry_while_retryable(partial(ledger.store.head, key))
            if found is None or found.metadata.get("prediction-id", record.prediction_id) != record.prediction_id:
                return False
            if "prediction-id" not in found.metadata and uri == record.uri and found.size_bytes != record.size_bytes:
                return False
        return True

    def _look_for_unlisted(self, ledger: Ledger, record: Record, prediction_id: str) -> None:
        """A record whose prediction is not on the bill: is that outside the window, or missing?"""
        created_at = record.created_at
        if created_at is None or record.state is RecordState.CANCELLED or record.cancel_requested:
            return  # a cancelled one need not be listed, and costs nothing
        settling = timedelta(seconds=self._account.settings.settling_seconds)
        latest = min(self._ends_at - MARGIN, self._walked_at - settling) if self._until else self._walked_at - settling
        if self._begins_at + MARGIN < created_at < latest:
            said = "the vendor's list does not show it: look in the dashboard whether it was billed"
            self._find(Kind.NOT_LISTED, ledger, record.item_id, prediction_id, cost_usd=record.cost_usd, said=said)

    def _name(self, ledger: Ledger, record: Record, prediction_id: str, kind: Kind, said: str) -> None:
        if kind in (Kind.REPLACED, Kind.ONE_TOO_MANY):
            row = self._scratch.billed(prediction_id)
            if row is not None and not row.is_paid:
                kind, said = Kind.ENDED, ""
        self._scratch.name(
            prediction_id,
            kind,
            destination=_place(ledger),
            item_id=record.item_id,
            said=said,
            pictures=1 + len(record.more_uris) if prediction_id == record.prediction_id else 1,
            uri=record.uri,
        )

    async def _correct(self, ledger: Ledger, held: VersionedRecord, prediction_id: str, cost_usd: float) -> None:
        """The only change that an audit makes."""
        before = "no cost" if not held.record.cost_usd else f"${held.record.cost_usd:.6g}"
        kind, said = Kind.CORRECTED, f"its record said {before}"
        try:
            if await correct_cost(ledger, held, prediction_id, cost_usd) is None:
                return
        except EachlabsError as error:
            kind, said = Kind.NOT_CORRECTED, f"it says {before}: {error}"
        self._find(kind, ledger, held.record.item_id, prediction_id, cost_usd=cost_usd, said=said)

    async def _look_at_stray(self, ledger: Ledger, key: str, item_id: str) -> None:
        """A picture of which there is no record: it may say itself what it is."""
        found = await retry_while_retryable(partial(ledger.store.head, key))
        if found is None:
            return
        prediction_id = found.metadata.get("prediction-id")
        row = self._scratch.billed(prediction_id) if prediction_id else None
        said = f"{ledger.store.uri(key)} has no record"
        if prediction_id and row is not None and row.kind is Kind.FOREIGN:
            uri = ledger.store.uri(key)
            self._scratch.name(
                prediction_id, Kind.WITHOUT_RECORD, destination=_place(ledger), item_id=item_id, said=said, uri=uri
            )
        else:
            self._find(Kind.STRAYS, ledger, item_id, prediction_id, said=said)

    # ------------------------------------------------------------------------------------------- lost orders

    def _take_lost_order(self, ledger: Ledger, held: VersionedRecord) -> None:
        """An order of this item that may have bought something which no record names."""
        record, place = held.record, _place(ledger)
        ahead = self._ahead_of(held.read_at)
        sent_at, until = held.modified_at + ahead, held.modified_at + ahead + MARGIN
        since, count = sent_at - MARGIN, 1
        kind, said = Kind.UNKNOWN_ORDERS, f"its input is that of item {record.item_id}, an order of which got no answer"
        if record.may_have_bought_unseen:
            if record.unsettled_since is not None:
                sent_at = record.unsettled_since + ahead
                since = min(since, sent_at - MARGIN)
            if record.state is RecordState.CLAIMED and held.age_seconds <= self._account.settings.claim_seconds + 1:
                kind, said = Kind.IN_FLIGHT, "a run waits for the answer to this order, or looks for it"
            else:
                why = record.error.message if record.error is not None else "its order got no answer"
                self._find(Kind.AMBIGUOUS, ledger, record.item_id, said=f"prefect-eachlabs settle {place}: {why}")
                said += f": prefect-eachlabs settle {place}"
        elif record.orders_without_trace or record.possible_loss:
            since, count = since - LOOKED_BACK, max(1, record.orders_without_trace)
            if record.possible_loss and not self._scratch.has_bill():
                self._find(Kind.AMBIGUOUS, ledger, record.item_id, record.prediction_id, said=record.possible_loss)
        else:
            return
        for _ in range(count):
            order = Lost(None, kind, place, record.item_id, said, record.order)
            self._scratch.lose(order, record.model, since, sent_at, until)

    def _ahead_of(self, bucket_time: datetime) -> timedelta:
        """How far the API's clock is ahead of the bucket's, which says `bucket_time` now."""
        loop_seconds = timedelta(seconds=asyncio.get_running_loop().time())
        return datetime.fromtimestamp(0, timezone.utc) + self._api_ahead + loop_seconds - bucket_time

    async def _ask_about_lost_orders(self) -> None:
        """Asks for the input of executions that no record names and that a lost order may have bought."""
        asked = 0
        for prediction_id in self._scratch.suspects(MOST_SUSPECTS):
            orders = self._scratch.lost_near(prediction_id)
            if not orders:
                continue  # what it might have been was found
            if asked == MOST_ASKED_ABOUT:
                return
            asked += 1
            self._show(f"{asked} executions that a lost order may have bought")
            try:
                prediction = await self._asked(partial(self._account.client.get, prediction_id))
            except Rejected:  # another organization's, or too old
                continue
            for lost in orders:
                if fit(prediction.input or {}, lost.input) is not None:
                    place, item_id = lost.destination, lost.item_id
                    self._scratch.name(prediction_id, lost.kind, destination=place, item_id=item_id, said=lost.said)
                    self._scratch.find_lost(lost)
                    break

    # --------------------------------------------------------------------------------------------- the report

    def _find(self, kind: Kind, ledger: Ledger, item_id: str, prediction_id: str | None = None, **facts: Any) -> None:
        self._scratch.find(kind, Named(prediction_id, item_id, _place(ledger), **facts))

    def _report(self, destinations: list[str]) -> AuditReport:
        executions, billed_usd, unsettled = self._scratch.sums()
        findings = {kind: self._scratch.finding(kind) for kind in Kind}
        return AuditReport(
            destinations=destinations,
            since=self._since,
            until=self._until or self._walked_at,
            executions=executions,
            requests=self._requests,
            billed_usd=billed_usd,
            recorded_usd=money(sum(findings[kind].usd for kind in RECORDED)),
            unsettled=unsettled,
            findings=findings,
            by_day=self._scratch.spent_by("day"),
            by_model=self._scratch.spent_by("model"),
            by_destination=self._scratch.spent_by("destination"),
            dearest=self._scratch.dearest(DEAREST),
        )


def moment_of(text: str | None, name: str) -> datetime | None:
    """A day or a time (UTC where it does not say), or an age.

    Raises:
        BadInput: It is none.
    """
    if text is None:
        return None
    if (age := re.fullmatch(r"(\d{1,5})([dh])", text.strip())) is not None:
        return datetime.now(timezone.utc) - timedelta(hours=int(age[1]) * (24 if age[2] == "d" else 1))
    try:
        moment = datetime.fromisoformat(text.strip().replace("Z", "+00:00"))
    except ValueError:
        raise BadInput(
            f"{name}: {text[:40]!r} must be a day such as 2026-11-01, or an age such as 7d or 12h."
        ) from None
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=timezone.utc)


def _place(ledger: Ledger) -> str:
    return str(ledger.destination)


def _store_again(prediction_id: str, place: str) -> str:
    return f'store_image(await_result("{prediction_id}"), "{place}") stores it'
