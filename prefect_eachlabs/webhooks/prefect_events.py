"""Calls as events of the Prefect server: `webhooks serve` (or a webhook of Prefect Cloud) emits them, workers listen.

Workers listen outwards, so a firewall may close all that leads in. Whoever may emit events is not believed: each event
carries the proof that the vendor's call carried, and whoever listens checks it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from typing import Any

from prefect.client.orchestration import get_client
from prefect.events import Event, Resource
from prefect.events.clients import get_events_subscriber
from prefect.events.filters import EventFilter, EventNameFilter
from prefect.settings import PREFECT_API_URL

from prefect_eachlabs.errors import without_query
from prefect_eachlabs.limits.prefect_leases import context_without_retries
from prefect_eachlabs.webhooks.calls import Call, event_payload, parse_call, secret_of
from prefect_eachlabs.webhooks.webhooks import Close, Take, Verdict

logger = logging.getLogger(__name__)

CALLED = "eachlabs.webhook.called"
MOST_WAITING = 10_000
"""So many calls wait for a server that is away; then the vendor is asked to call again."""
EMIT_WITHIN_SECONDS = 10.0
EVENTS_AT_ONCE = 50
FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 30.0
READY_WITHIN_SECONDS = 10.0


def has_server() -> bool:
    """Whether a Prefect server is configured whose events can be listened to."""
    return bool(PREFECT_API_URL.value())


class EventForwarder:
    """Checks calls and hands the good ones on as events, in the background; keeps them while the server is away.

    Args:
        master: `EACHLABS_WEBHOOK_SECRET`: all that it needs to know.
    """

    def __init__(self, master: str) -> None:
        self._master = master
        self._waiting: asyncio.Queue[dict[str, Any]] = asyncio.Queue(MOST_WAITING)
        self.counts: Counter[Verdict] = Counter()
        self.where = without_query(PREFECT_API_URL.value() or "(no PREFECT_API_URL)")

    def take(self, call: Call) -> Verdict:
        """Raises BlockingIOError when too many wait already."""
        verdict = self._judge(call)
        self.counts[verdict] += 1
        return verdict

    def _judge(self, call: Call) -> Verdict:
        secret = secret_of(self._master, call.write_id or "")
        if not call.is_proven_by(secret) or call.write_id is None:
            return Verdict.REFUSED
        payload = event_payload(call, secret)
        if payload is None:
            return Verdict.UNREADABLE
        try:
            self._waiting.put_nowait(payload)
        except asyncio.QueueFull:
            raise BlockingIOError("too many calls wait for the Prefect server") from None
        return Verdict.KEPT

    async def run(self) -> None:
        """Emits until it is cancelled."""
        pause_seconds = FIRST_PAUSE_SECONDS
        async with get_client(httpx_settings={"timeout": EMIT_WITHIN_SECONDS}) as client:
            batch: list[dict[str, Any]] = []
            while True:
                if not batch:
                    batch.append(await self._waiting.get())
                while len(batch) < EVENTS_AT_ONCE and not self._waiting.empty():
                    batch.append(self._waiting.get_nowait())
                try:
                    await client.request("POST", "/events", json=[event_of(payload) for payload in batch])
                except Exception as error:  # whatever it is, the calls are kept
                    logger.warning(
                        "The Prefect server takes no events (%s); %s calls wait, trying again in %g s.",
                        type(error).__name__,
                        len(batch) + self._waiting.qsize(),
                        pause_seconds,
                    )
                    await asyncio.sleep(pause_seconds)
                    pause_seconds = min(2 * pause_seconds, LONGEST_PAUSE_SECONDS)
                else:
                    for _ in batch:
                        self._waiting.task_done()
                    batch, pause_seconds = [], FIRST_PAUSE_SECONDS

    async def drained(self) -> None:
        """Comes back when all that was taken is handed on."""
        await self._waiting.join()


def event_of(payload: dict[str, Any]) -> dict[str, Any]:
    """As the server takes it."""
    resource = Resource({"prefect.resource.id": f"eachlabs.webhook.{payload['write_id']}"})
    return Event(event=CALLED, resource=resource, payload=payload).model_dump(mode="json")


async def listen_to_events(take: Take) -> Close:
    """The way in through the Prefect server's event stream.

    A server that does not let us listen within 10 s is tried on in the background.
    """
    ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    # With settings of its own, not those of the flow run that happened to buy first.
    listening = context_without_retries().run(asyncio.ensure_future, _listen(take, ready))

    async def close() -> None:
        listening.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await listening

    await asyncio.wait({ready}, timeout=READY_WITHIN_SECONDS)
    return close


async def _listen(take: Take, ready: asyncio.Future[None]) -> None:
    """Listens for as long as the process lives; a server that is away is waited for."""
    pause_seconds, is_away = FIRST_PAUSE_SECONDS, False
    while True:
        try:
            wanted = EventFilter(event=EventNameFilter(name=[CALLED]))
            async with get_events_subscriber(filter=wanted, reconnection_attempts=0) as subscriber:
                if not ready.done():
                    ready.set_result(None)
                if is_away:
                    logger.warning("The Prefect server's events come again.")
                pause_seconds, is_away = FIRST_PAUSE_SECONDS, False
                async for event in subscriber:
                    call = parse_call(event.payload)
                    if call is not None:
                        take(call)
        except asyncio.CancelledError:
            raise
        except Exception as error:  # those of Prefect, httpx and websockets have no common kind
            if not is_away:
                logger.warning("The Prefect server's events do not come (%s); trying on.", type(error).__name__)
            is_away = True
        await asyncio.sleep(pause_seconds)
        pause_seconds = min(2 * pause_seconds, LONGEST_PAUSE_SECONDS)
