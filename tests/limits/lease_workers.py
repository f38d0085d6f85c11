"""Processes that share an account: each takes places from a `LeaseServer`; an `Api` sees what all of them send."""

from __future__ import annotations

import asyncio
import bisect
import random
from collections.abc import Callable
from typing import Any

import pytest
from typing_extensions import Self

from prefect_eachlabs.limits.leases import Kind, Leases
from prefect_eachlabs.limits.limiter import RateLimiter, Slot
from prefect_eachlabs.settings import AccountSettings
from tests.limits.lease_server import LeaseServer

WINDOW_SECONDS = 60.0
PREDICTION_SECONDS = 5.0


def now() -> float:
    return asyncio.get_running_loop().time()


class Api:
    """What the API sees of all processes: requests between sending and answer, predictions in flight."""

    def __init__(self) -> None:
        self.requests: list[tuple[float, float, str]] = []
        self.in_flight = 0
        self.most_in_flight = 0

    def worst_window(self) -> int:
        """The most requests that can have arrived within 60 s, wherever each arrived between sending and answer."""
        sent = sorted(request[0] for request in self.requests)
        answered = sorted(request[1] for request in self.requests)
        return max(
            (bisect.bisect_right(sent, at) - bisect.bisect_right(answered, at - WINDOW_SECONDS) for at in sent),
            default=0,
        )

    def sent(self, begin: float, end: float, name: str | None = None) -> int:
        return sum(begin <= at < end for at, _, who in self.requests if name in (None, who))


class Buyer:
    """A process with callers that each make one picture after the other: a slot in flight, a POST, one question."""

    def __init__(
        self,
        settings: AccountSettings,
        leases: Leases,
        api: Api,
        name: str = "a",
        *,
        latency_seconds: Callable[[], float] = lambda: random.uniform(0.05, 0.3),
        prediction_seconds: float = PREDICTION_SECONDS,
    ) -> None:
        self.limiter = RateLimiter(settings, leases)
        self.api = api
        self.name = name
        self.latency_seconds = latency_seconds
        self.prediction_seconds = prediction_seconds
        self.callers: list[asyncio.Task[None]] = []

    def start(self, callers: int = 30, pictures: int = 1_000_000) -> Self:
        self.callers += [asyncio.ensure_future(self._make(pictures)) for _ in range(callers)]
        return self

    async def request(self, *, question: bool = False) -> None:
        place = await self.limiter.take_request(question=question)
        sent_at = now()
        entry = (sent_at, float("inf"), self.name)
        self.api.requests.append(entry)
        try:
            await asyncio.sleep(self.latency_seconds())
        finally:  # a killed process's request was answered as well
            self.api.requests[self.api.requests.index(entry)] = (sent_at, now(), self.name)
        place.done()

    async def _make(self, pictures: int) -> None:
        for _ in range(pictures):
            place = await self.limiter.take_in_flight()
            await self.request()
            self.api.in_flight += 1
            self.api.most_in_flight = max(self.api.most_in_flight, self.api.in_flight)
            asyncio.get_running_loop().call_later(self.prediction_seconds, self._ended)
            await asyncio.sleep(self.prediction_seconds)
            await self.request(question=True)
            place.done()

    def _ended(self) -> None:
        self.api.in_flight -= 1

    async def stop(self) -> None:
        for task in self.callers:
            task.cancel()
        await asyncio.gather(*self.callers, return_exceptions=True)
        await self.limiter.close()

    def kill(self) -> None:
        """As SIGKILL does: nothing is given back."""
        for limit in self.limiter._limits.values():
            limit._closed = True
            for task in limit._tasks:
                task.cancel()
        for caller in self.callers:
            caller.cancel()


class Worker(Buyer):
    """One that leases them from a server."""

    def __init__(
        self,
        server: LeaseServer,
        api: Api,
        name: str = "a",
        *,
        requests_per_minute: int | None = 60,
        max_in_flight: int | None = 10,
        **given: Any,
    ) -> None:
        settings = AccountSettings(
            api_key="key", requests_per_minute=requests_per_minute, max_in_flight=max_in_flight, account="acme"
        )
        self.client = server.client()
        super().__init__(settings, self.client, api, name, **given)


async def takes(worker: Buyer, kind: Kind, within_seconds: float) -> Slot | None:
    """A place for one caller, if it comes in time."""
    take = worker.limiter.take_in_flight() if kind is Kind.IN_FLIGHT else worker.limiter.take_request()
    try:
        return await asyncio.wait_for(take, within_seconds)
    except asyncio.TimeoutError:
        return None


def warnings(caplog: pytest.LogCaptureFixture, words: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if words in record.getMessage()]
