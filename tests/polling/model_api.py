"""A model of the API in virtual time: keeps its limits exactly, has latencies, counts everything."""

from __future__ import annotations

import asyncio
import functools
import heapq
import inspect
import random
from collections import deque
from collections.abc import Awaitable, Callable, Container
from dataclasses import dataclass, field
from datetime import datetime, timezone
from itertools import chain, islice, pairwise
from typing import Any, TypeVar

from prefect_eachlabs.errors import EachlabsError, NotSent, Rejected, Throttled
from prefect_eachlabs.limits.limiter import Kind, RateLimiter
from prefect_eachlabs.models import Execution, Prediction, PredictionStatus
from prefect_eachlabs.polling.poller import Poller
from tests.limits.local import local_limiter
from tests.virtual_time import run

T = TypeVar("T")


def about_five_seconds(rng: random.Random) -> float:
    return min(max(rng.gauss(5.0, 0.5), 4.0), 7.0)


def now() -> float:
    return asyncio.get_running_loop().time()


@dataclass
class Job:
    """A prediction as the API knows it."""

    id: str
    model: str
    input: dict[str, Any]
    began_at: float
    seconds: float
    urls: tuple[str, ...]
    end: PredictionStatus

    def status(self, at: float) -> PredictionStatus:
        return self.end if at >= self.began_at + self.seconds else PredictionStatus.PENDING


@dataclass
class ModelApi:
    """What the poller asks, and `create`; `faults` are raised, one for each request to the endpoint named."""

    requests_per_minute: int | None = None
    max_in_flight: int | None = None
    has_executions: bool = True
    list_lag_seconds: float = 0.0
    holds: bool = False
    tells_time: bool = True
    shows: Callable[[Job], bool] = lambda job: True
    duration: Callable[[random.Random], float] = about_five_seconds
    one_way_seconds: tuple[float, float] = (0.01, 0.04)
    urls: int = 1
    end: PredictionStatus = PredictionStatus.SUCCEEDED
    seed: int = 1
    jobs: dict[str, Job] = field(default_factory=dict)
    foreign_rows: int = 0
    faults: dict[str, deque[Exception]] = field(default_factory=dict)
    hangs: dict[str, float] = field(default_factory=dict)
    """The next GET by id of these is answered so many seconds later."""
    asked: list[tuple[float, str, str]] = field(default_factory=list)
    throttled: int = 0
    most_in_flight: int = 0

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self._recent: deque[float] = deque()
        self._running: list[float] = []

    # ---- the endpoints

    async def create(self, model: str = "gemini", input: dict[str, Any] | None = None) -> Prediction:
        await self._arrive("create", "")
        while self._running and self._running[0] <= now():
            heapq.heappop(self._running)
        if self.max_in_flight is not None and len(self._running) >= self.max_in_flight:
            self.throttled += 1
            raise Throttled("in flight", status_code=429)
        id = f"p{len(self.jobs) + 1}"
        urls = tuple(f"https://pictures.test/{id}.{number}.png" for number in range(self.urls))
        job = Job(id, model, input or {"prompt": "a fox"}, now(), self.duration(self.rng), urls, self.end)
        self.jobs[id] = job
        heapq.heappush(self._running, job.began_at + job.seconds)
        self.most_in_flight = max(self.most_in_flight, len(self._running))
        await self._travel()
        return Prediction(id=id, model=model, input=job.input, created_at=datetime.now(timezone.utc), item_id=f"i-{id}")

    async def get(self, prediction_id: str) -> Prediction:
        await self._arrive("get", prediction_id)
        job = self.jobs.get(prediction_id)
        if job is None:
            raise Rejected("unknown", status_code=404)
        if prediction_id in self.hangs:
            await asyncio.sleep(self.hangs.pop(prediction_id))
        if self.holds:
            await asyncio.sleep(max(0.0, job.began_at + job.seconds - now()))
        status = job.status(now())
        await self._travel()
        ended = status.ended
        return Prediction(
            id=job.id,
            status=status,
            status_word=status.value,
            model=job.model,
            output_urls=job.urls if status is PredictionStatus.SUCCEEDED else (),
            predict_time_seconds=job.seconds if ended and self.tells_time else None,
            cost_usd=0.04 if ended else None,
        )

    async def executions(
        self, *, limit: int = 100, offset: int = 0, of: Container[str] | None = None
    ) -> tuple[Execution, ...]:
        await self._arrive("executions", str(offset))
        if not self.has_executions:
            raise Rejected("no such endpoint", status_code=404)
        foreign = [Job(f"f{number}", "flux", {}, 0, 0, (), self.end) for number in range(self.foreign_rows)]
        ours = (job for job in reversed(self.jobs.values()) if self.shows(job))
        page = islice(chain(foreign, ours), offset, offset + limit)
        rows = [self._row(job) for job in page if of is None or job.id in of]
        await self._travel()
        return tuple(rows)

    def _row(self, job: Job) -> Execution:
        status = job.status(now() - self.list_lag_seconds)
        ended = status.ended
        return Execution(
            id=job.id,
            model=job.model,
            status=status,
            status_word=status.value,
            cost_usd=0.04 if ended else None,
            run_time_seconds=job.seconds if ended and self.tells_time else None,
            output_urls=job.urls[:1] if status is PredictionStatus.SUCCEEDED else (),
        )

    # ---- its network and its limits

    async def _travel(self) -> None:
        await asyncio.sleep(self.rng.uniform(*self.one_way_seconds))

    async def _arrive(self, endpoint: str, about: str) -> None:
        faults = self.faults.get(endpoint)
        fault = faults.popleft() if faults else None
        if isinstance(fault, NotSent):
            raise fault.with_traceback(None)
        await self._travel()
        at = now()
        self.asked.append((at, endpoint, about))
        while self._recent and self._recent[0] < at - 60:
            self._recent.popleft()
        self._recent.append(at)
        if self.requests_per_minute is not None and len(self._recent) > self.requests_per_minute:
            self.throttled += 1
            raise Throttled("requests", status_code=429)
        if fault is not None:
            await self._travel()
            raise fault.with_traceback(None)

    def count(self, endpoint: str) -> int:
        return len(self.times(endpoint))

    def times(self, endpoint: str, about: str | None = None) -> list[float]:
        return [at for at, name, of in self.asked if name == endpoint and about in (None, of)]

    def worst_minute(self) -> int:
        times = [at for at, _, _ in self.asked]
        worst = first = 0
        for last, at in enumerate(times):
            while times[first] < at - 60:
                first += 1
            worst = max(worst, last - first + 1)
        return worst


@dataclass
class Shop:
    """Callers as a gateway has them: each takes its limiter, posts, and has its prediction watched."""

    api: ModelApi
    limiter: RateLimiter
    ends: list[tuple[float, float]] = field(default_factory=list)
    """For each end: when it happened, and when we knew."""

    def __post_init__(self) -> None:
        self.poller = Poller(self.api, self.limiter)

    async def buy(self, model: str = "gemini", input: dict[str, Any] | None = None) -> Prediction:
        in_flight = await self.limiter.take_in_flight()
        request = await self.limiter.take_request()
        try:
            prediction = await self.api.create(model, input)
        except EachlabsError:
            in_flight.unused()
            raise
        finally:
            request.done()
        end = await asyncio.shield(self.poller.watch(prediction, slot=in_flight))
        job = self.api.jobs[end.id]
        self.ends.append((job.began_at + job.seconds, now()))
        return end

    async def buy_for_ever(self, **order: Any) -> None:
        while True:
            await self.buy(**order)

    def per_minute(self, start_at: float, end_at: float) -> float:
        return 60 * sum(1 for _, known_at in self.ends if start_at <= known_at < end_at) / (end_at - start_at)

    def delays(self, start_at: float = 0.0) -> list[float]:
        return sorted(known_at - ended_at for ended_at, known_at in self.ends if ended_at >= start_at)


def in_shop(
    story: Callable[[Shop], Awaitable[T]],
    *,
    requests_per_minute: int | None = None,
    max_in_flight: int | None = 10,
    **api: Any,
) -> T:
    """Runs a story in a shop; the request places taken must be back a minute after its end."""

    async def whole() -> T:
        model = ModelApi(requests_per_minute=requests_per_minute, max_in_flight=max_in_flight, **api)
        limiter = local_limiter(requests_per_minute=requests_per_minute, max_in_flight=max_in_flight)
        shop = Shop(model, limiter)
        result = await story(shop)
        await shop.poller.close()
        await asyncio.sleep(61)
        assert shop.limiter.pressure(Kind.REQUESTS) == 0
        return result

    return run(whole())


def a_shop(**given: Any) -> Callable[[Callable[..., Awaitable[None]]], Callable[..., None]]:
    """Has a test run in a shop."""

    def decorate(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
        def played(**more: Any) -> None:
            in_shop(lambda shop: test(shop, **more), **given)

        _, *others = inspect.signature(test).parameters.values()
        played.__signature__ = inspect.Signature(others)  # type: ignore[attr-defined]  # whose fixtures pytest makes
        return functools.update_wrapper(played, test)

    return decorate


def in_flight(shop: Shop) -> float:
    return shop.limiter.pressure(Kind.IN_FLIGHT)


def seconds(value: float) -> Callable[[random.Random], float]:
    """A duration that is always the same."""
    return lambda rng: value


def gaps_of(times: list[float]) -> list[float]:
    return [later - earlier for earlier, later in pairwise(times)]


def refused(status_code: int) -> Rejected:
    return Rejected("no", status_code=status_code)
