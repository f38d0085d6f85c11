"""What all work of one account shares: its slots, its client, its ledgers, and what it remembers of its purchases."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from enum import Enum
from typing import Any

import httpx

from prefect_eachlabs.api.catalogue import Catalogue
from prefect_eachlabs.api.client import EachlabsClient
from prefect_eachlabs.api.references import References
from prefect_eachlabs.errors import EachlabsError, NotSent, PredictionTimedOut, Throttled, Unanswered
from prefect_eachlabs.images.download import Downloader
from prefect_eachlabs.images.store import ImageStore
from prefect_eachlabs.ledger.late_costs import correct_cost
from prefect_eachlabs.ledger.purchase import Job, Purchaser
from prefect_eachlabs.ledger.records import Ledger, RecordChanged, RecordState, amended
from prefect_eachlabs.limits.limiter import RateLimiter
from prefect_eachlabs.models import Destination, Execution, Prediction, PredictionStatus
from prefect_eachlabs.net.public_only import HostGuard
from prefect_eachlabs.polling.poller import Poller
from prefect_eachlabs.settings import AccountSettings
from prefect_eachlabs.storage.base import ObjectStore
from prefect_eachlabs.storage.s3_client import S3Access
from prefect_eachlabs.webhooks.costs import LateCosts
from prefect_eachlabs.webhooks.webhooks import Way, Webhooks

logger = logging.getLogger(__name__)

LAST_WAIT_SECONDS = 45.0
"""A prediction that is found after its deadline gets so long to be asked about once more; an id that the API does
not know counts as unknown after 30 s."""
LAST_QUESTION_SECONDS = 5.0
"""So long before its deadline a prediction is asked about once more."""
CLEAN_UP_SECONDS = 8.0
"""How long a cancelled run may take to learn how its cancelled prediction ended (Prefect waits some 30 s)."""
REMEMBERED_PURCHASES = 10_000

StoreFor = Callable[[Destination, "S3Access | None"], ObjectStore]


@dataclass
class Bought:
    """What this process remembers of a prediction that it bought."""

    at: float
    ledger: Ledger
    item_id: str
    run_id: str


class Interruption(str, Enum):
    """What became of a prediction whose run was cancelled."""

    CANCELLED = "cancelled"
    """The API confirms it: nothing is billed."""
    STORED = "stored"
    """It had ended already: it is paid for, and stored."""
    OPEN = "open"
    """It was asked to cancel and no end was seen: it is paid for unless the cancel still takes effect."""


class Account:
    """Client, slots, watcher, purchaser and finisher of one account, wired; and its ledgers."""

    def __init__(
        self,
        settings: AccountSettings,
        limiter: RateLimiter,
        store_for: StoreFor,
        client: EachlabsClient | None = None,
        downloader: Downloader | None = None,
        outside: httpx.AsyncBaseTransport | None = None,
        *,
        way: Way | None = None,
    ) -> None:
        self.settings = settings
        self.limiter = limiter
        self.client = client or EachlabsClient(settings)
        self.poller = Poller(self.client, self.limiter)
        self.webhooks = Webhooks(settings, self.poller, way)
        self._late_costs = LateCosts(self.client, self.limiter, self.poller, self._note_cost, self.webhooks.heard)
        self.webhooks.end_listeners.append(self._late_costs.expect)
        self.catalogue = Catalogue(self.client, self.limiter)
        self.references = References(self.client, self.limiter, settings, store_for, outside)
        self.purchaser = Purchaser(
            self.client,
            self.limiter,
            self.poller,
            settings,
            catalogue=self.catalogue,
            references=self.references,
            webhooks=self.webhooks,
            known=self.known,
        )
        self.image_store = ImageStore(
            downloader or Downloader(hosts=HostGuard(settings.private_hosts, settings.api_host))
        )
        self._store_for = store_for
        self._ledgers: dict[tuple[Destination, S3Access | None], Ledger] = {}
        self._bought: OrderedDict[str, Bought] = OrderedDict()
        self._waiting: Counter[str] = Counter()
        """Prediction id → how many wait for its end right now."""
        self._clean_ups: set[asyncio.Task[None]] = set()
        self.interruptions: dict[str, Interruption] = {}
        """Prediction id → what became of it, of those whose runs were cancelled in this process."""

    def ledger(self, destination: Destination, access: S3Access | None = None) -> Ledger:
        """The ledger of a destination, made once."""
        key = (destination, access)
        if key not in self._ledgers:
            conditional = self.settings.conditional_writes == "require"
            store = self._store_for(destination, access)
            self._ledgers[key] = Ledger(store, destination, conditional=conditional, access=access)
        return self._ledgers[key]

    def known(self) -> Mapping[str, float]:
        now = asyncio.get_running_loop().time()
        return {prediction_id: now - bought.at for prediction_id, bought in self._bought.items()}

    def remember(self, job: Job) -> None:
        if job.prediction_id is not None and job.prediction_id not in self._bought:
            now = asyncio.get_running_loop().time()
            self._bought[job.prediction_id] = Bought(now, job.ledger, job.item.item_id, job.run_id)
            while len(self._bought) > REMEMBERED_PURCHASES:
                self._bought.popitem(last=False)

    def bought_here(self, prediction_id: str) -> Bought | None:
        """What is remembered of a prediction that this process bought."""
        return self._bought.get(prediction_id)

    async def end_within(
        self, future: asyncio.Future[Prediction], prediction: Prediction, deadline_seconds: float | None
    ) -> Prediction:
        deadline_seconds = self.settings.deadline_seconds if deadline_seconds is None else deadline_seconds
        age_seconds = 0.0
        if prediction.created_at is not None:
            age_seconds = max(0.0, (datetime.now(timezone.utc) - prediction.created_at).total_seconds())
        remaining = max(deadline_seconds - age_seconds, min(LAST_WAIT_SECONDS, deadline_seconds))
        last_seconds = min(LAST_QUESTION_SECONDS, remaining / 10)
        self._waiting[prediction.id] += 1
        try:
            with suppress(asyncio.TimeoutError):
                end = await asyncio.wait_for(asyncio.shield(future), timeout=remaining - last_seconds)
                return await self._late_costs.told(end)
            # Nobody may have asked about it for long, where requests are scarce.
            self.poller.hurry(prediction.id)
            return await asyncio.wait_for(asyncio.shield(future), timeout=last_seconds)
        except asyncio.TimeoutError:
            raise PredictionTimedOut(
                f"The prediction had not ended {deadline_seconds:g} s after its POST. It is paid for if it still ends: "
                "run the same again (or `prefect-eachlabs settle`) and it is stored.",
                item_id=prediction.item_id,
                prediction_id=prediction.id,
            ) from None
        finally:
            self._waiting[prediction.id] -= 1
            if not self._waiting[prediction.id]:
                del self._waiting[prediction.id]

    def lists_cost(self, prediction_id: str) -> bool:
        """Whether a call has told its end, so that the list tells its cost, and its record learns it then."""
        return self._late_costs.are_awaited(prediction_id)

    async def _note_cost(self, row: Execution) -> bool:
        """Writes down what a picture cost that was stored before that was told; whether that is done with."""
        bought = self._bought.get(row.id)
        held = None if bought is None else await bought.ledger.read(bought.item_id)
        if bought is None or held is None or not row.cost_usd:
            return True
        if held.record.prediction_id == row.id and held.record.state is RecordState.CREATED:
            return False
        await correct_cost(bought.ledger, held, row.id, row.cost_usd)
        return True

    async def cancel(self, prediction_id: str) -> Prediction:
        """Asks the API to cancel, best effort, and returns what GET says then (it may have succeeded). Free."""
        for pause_seconds in (0.5, 0.5, 0.0):
            try:
                await self.limiter.asked(lambda: self.client.cancel(prediction_id))
                break
            except (Unanswered, NotSent, Throttled) as error:
                # Its answer may be all that was lost: only GET tells.
                logger.warning("Cancelling prediction %s was not confirmed: %s", prediction_id, error)
            await asyncio.sleep(pause_seconds)
        future = self.poller.watch(Prediction(id=prediction_id), slot=None)
        self.poller.hurry(prediction_id)
        with suppress(asyncio.TimeoutError):
            return await asyncio.wait_for(asyncio.shield(future), timeout=CLEAN_UP_SECONDS)
        return await self.ask_once(prediction_id)

    async def ask_once(self, prediction_id: str) -> Prediction:
        """What GET says now; takes a request slot."""
        return await self.limiter.asked(lambda: self.client.get(prediction_id))

    async def clean_up(self, work: Coroutine[Any, Any, None]) -> None:
        """Awaits work that goes on although whoever began it is cancelled once more."""
        task = asyncio.ensure_future(work)
        self._clean_ups.add(task)
        task.add_done_callback(self._clean_ups.discard)
        await asyncio.shield(task)

    async def interrupt(self, task: asyncio.Task[Any], job: Job) -> None:
        """Ends a job whose callers are gone: never between its claim and its note; what it bought is cancelled."""
        await job.until_it_may_be_interrupted()
        if not task.done():
            task.cancel()
            await asyncio.wait({task})
        if job.prediction_id is not None:
            self.remember(job)
            await self.cancel_and_note(job.prediction_id, self._bought[job.prediction_id])

    async def cancel_and_note(self, prediction_id: str, bought: Bought) -> None:
        """Cancels what a cancelled run has in flight, looks again and writes down the truth; a success is stored.

        Once for each prediction, however many callers go away, and not while somebody else waits for it.
        """
        if prediction_id in self.interruptions or self._waiting[prediction_id]:
            return
        try:
            ledger = bought.ledger
            held = await ledger.read(bought.item_id)
            if (
                held is None
                or held.record.state is not RecordState.CREATED
                or held.record.prediction_id != prediction_id
                or held.record.run_id != bought.run_id
            ):
                return
            self.interruptions[prediction_id] = Interruption.OPEN
            held = await ledger.write(amended(held.record, cancel_requested=True), replacing=held)
            end = await self.cancel(prediction_id)
            logger.info("Prediction %s was cancelled with its run; it ended as %s.", prediction_id, end.status.value)
            if end.status is PredictionStatus.CANCELLED:
                self.interruptions[prediction_id] = Interruption.CANCELLED
            if end.status.ended:
                done = await self.image_store.finish(ledger, held, end, fresh=False)
                if done.record.state is RecordState.STORED:
                    self.interruptions[prediction_id] = Interruption.STORED
        except (EachlabsError, RecordChanged) as error:
            logger.warning("Prediction %s could not be cancelled cleanly: %s", prediction_id, error)

    async def aclose(self) -> None:
        """Ends cleanly: cancels that are under way are waited for, connections closed, leased slots given back."""
        if self._clean_ups:
            await asyncio.wait(self._clean_ups, timeout=CLEAN_UP_SECONDS)
        await self.purchaser.aclose()
        await self.webhooks.aclose()
        await self._late_costs.aclose()
        await self.poller.close()
        await self.catalogue.aclose()
        await self.references.aclose()
        await self.client.aclose()
        await self.image_store.aclose()
        await self.limiter.close()
