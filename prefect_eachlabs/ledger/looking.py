"""Asks what a look is made of: the walk over executions, the records, the echo of a candidate."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import TypeVar

from prefect_eachlabs.api.client import EachlabsClient
from prefect_eachlabs.errors import Rejected
from prefect_eachlabs.ledger.evidence import READ_BACK_SECONDS, WALKED_BACK_SECONDS, Evidence, newest
from prefect_eachlabs.ledger.records import Ledger, VersionedRecord
from prefect_eachlabs.limits.limiter import RateLimiter, Slot
from prefect_eachlabs.models import Execution, Prediction
from prefect_eachlabs.settings import AccountSettings

T = TypeVar("T")

UNKNOWN_ID_GRACE_SECONDS = 30.0
"""A prediction that is listed may be invisible right after its creation; later a 404 means that it is not ours."""
PAGE_ROWS = 100
MOST_PAGES = 100
READS_AT_A_TIME = 16
REMEMBERED = 10_000


class Looker:
    """Looks at one destination's records and at the account's executions.

    Args:
        client: Asks the API, a request slot for each question.
        slots: Where those come from.
        ledger: The records.
        settings: The account.
        known: Predictions that this process bought itself (id → seconds since then), whatever the destination.
        ours: The claims that are being settled, by their write ids.
        meanwhile: Awaited again and again while a look takes its time.
    """

    def __init__(
        self,
        client: EachlabsClient,
        limiter: RateLimiter,
        ledger: Ledger,
        settings: AccountSettings,
        *,
        known: Callable[[], Mapping[str, float]],
        ours: Callable[[], set[str]],
        meanwhile: Callable[[], Awaitable[None]],
    ) -> None:
        self._client = client
        self._limiter = limiter
        self._ledger = ledger
        self._settings = settings
        self._known = known
        self._ours = ours
        self._meanwhile = meanwhile
        self._echoes: OrderedDict[str, Prediction] = OrderedDict()
        self._invisible_since: OrderedDict[str, float] = OrderedDict()
        self._old_names: dict[str, tuple[str, set[str]]] = {}

    async def see(self, oldest_seconds: float) -> Evidence:
        """One look, for claims of which the oldest is so old."""
        began_at = asyncio.get_running_loop().time()
        rows, is_whole = await self._walk(oldest_seconds)
        evidence = Evidence(began_at, oldest_seconds, rows, is_whole)
        for prediction_id, age_seconds in self._known().items():
            now = asyncio.get_running_loop().time()
            evidence.know(prediction_id, age_seconds, settling_seconds=self._settings.settling_seconds, now=now)
        await self._read_records(evidence, younger_than_seconds=oldest_seconds + READ_BACK_SECONDS)
        return evidence

    async def see_everything(self, evidence: Evidence) -> None:
        """Reads also the records that are older: one of them may name what looks like a lost order's."""
        await self._read_records(evidence, younger_than_seconds=float("inf"))

    async def echo(self, prediction_id: str) -> Prediction | float:
        """What the API says it was; or the loop time from which it is not ours, when it does not show it to us."""
        if prediction_id in self._echoes:
            return self._echoes[prediction_id]
        request = await self._take_request()
        try:
            prediction = await self._client.get(prediction_id)
        except Rejected:
            # The key is good for the listing: what it is not good for is not ours, or too young to be seen.
            now = asyncio.get_running_loop().time()
            return _remember(self._invisible_since, prediction_id, now) + UNKNOWN_ID_GRACE_SECONDS
        finally:
            request.done()
        return prediction if prediction.input is None else _remember(self._echoes, prediction_id, prediction)

    def forget(self) -> None:
        """Nothing waits any more: what was remembered of old records is let go."""
        self._old_names.clear()

    async def _take_request(self) -> Slot:
        taking = asyncio.ensure_future(self._limiter.take_request(question=True))
        try:
            while not taking.done():
                await asyncio.wait({taking}, timeout=self._settings.claim_seconds / 4)
                await self._meanwhile()
            return taking.result()
        except BaseException:
            taking.cancel()
            with suppress(asyncio.CancelledError):
                (await taking).unused()
            raise

    async def _walk(self, oldest_seconds: float) -> tuple[tuple[Execution, ...], bool]:
        """The executions since the oldest claim, newest first, and whether that is all of them.

        The end is found by the API's clock alone: its newest date is not later than now.
        """
        rows: dict[str, Execution] = {}
        offset = 0
        back = timedelta(seconds=oldest_seconds + WALKED_BACK_SECONDS)
        for _ in range(MOST_PAGES):
            request = await self._take_request()
            try:
                found = await self._client.executions(limit=PAGE_ROWS, offset=offset)
            finally:
                request.done()
            offset += len(found)
            rows.update((row.id, row) for row in found)
            on_page, of_all = newest(found), newest(rows.values())
            # A page may hold less than its limit because of rows that are no predictions.
            if len(found) <= PAGE_ROWS // 2:
                return tuple(rows.values()), True
            if on_page is not None and of_all is not None and on_page < of_all - back:
                return tuple(rows.values()), True
        return tuple(rows.values()), False

    async def _read_records(self, evidence: Evidence, *, younger_than_seconds: float) -> None:
        prefix = self._ledger.destination.key("records/")
        wanted: list[str] = []
        async for listed in self._ledger.store.list(prefix):
            if listed.key.endswith(".json") and listed.age_seconds <= younger_than_seconds:
                item_id = listed.key[len(prefix) : -len(".json")]
                etag, names = self._old_names.get(item_id, ("", set()))
                if etag == listed.etag:
                    evidence.named |= names
                else:
                    wanted.append(item_id)
        ours = self._ours()
        for begin in range(0, len(wanted), 10 * READS_AT_A_TIME):
            found = await self._read_some(wanted[begin : begin + 10 * READS_AT_A_TIME])
            await self._meanwhile()
            ours |= self._ours()
            for held in found:
                self._take_in(held, evidence, ours)

    async def _read_some(self, item_ids: Sequence[str]) -> list[VersionedRecord]:
        limit = asyncio.Semaphore(READS_AT_A_TIME)

        async def read(item_id: str) -> VersionedRecord | None:
            async with limit:
                return await self._ledger.read(item_id)

        return [held for held in await asyncio.gather(*map(read, item_ids)) if held is not None]

    def _take_in(self, held: VersionedRecord, evidence: Evidence, ours: Collection[str]) -> None:
        evidence.read(
            held,
            ours=ours,
            claim_seconds=self._settings.claim_seconds,
            settling_seconds=self._settings.settling_seconds,
            now=asyncio.get_running_loop().time(),
        )
        if held.age_seconds > evidence.oldest_seconds + READ_BACK_SECONDS and not held.record.may_have_bought_unseen:
            self._old_names[held.record.item_id] = (held.etag, held.record.named_predictions)


def _remember(memory: OrderedDict[str, T], name: str, value: T) -> T:
    """What is remembered under the name: the first value, of the last 10,000 names."""
    value = memory.setdefault(name, value)
    while len(memory) > REMEMBERED:
        memory.popitem(last=False)
    return value
