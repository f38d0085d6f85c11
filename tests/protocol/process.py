"""A process: an engine whose every way out passes boundaries, where it can die, freeze or be left without answer."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar

import httpx

from prefect_eachlabs.api.client import EachlabsClient
from prefect_eachlabs.engine.engine import Engine
from prefect_eachlabs.errors import StoreFailed
from prefect_eachlabs.images.download import Downloader
from prefect_eachlabs.ledger.rules import PurchaseOptions
from prefect_eachlabs.models import Item, StoredImage
from prefect_eachlabs.storage.base import ListedObject, PreconditionFailed, StoredObject
from tests.limits.local import local_limiter
from tests.virtual_time import here

if TYPE_CHECKING:
    from tests.protocol.kit import World

T = TypeVar("T")
Phase = Literal["before", "after"]
Fault = Literal["refuse", "lose", "lose refused"]
"""`refuse`: no effect, an error; `lose`: it takes effect, its answer is lost; `lose refused`: boto3 repeated the put
whose answer was lost by itself, and was told 412."""


async def for_ever() -> NoReturn:
    await asyncio.get_running_loop().create_future()
    raise AssertionError("nobody wakes the dead")


async def _at_once(work: Callable[..., Any], *args: Any) -> Any:
    return work(*args)


@dataclass
class Operation:
    """One thing that a process did to the outer world."""

    number: int
    name: str
    at: float


@dataclass
class Plan:
    """What happens to a process, by the numbers of its boundaries and operations, counted from 1."""

    die_at: int | str | None = None
    freeze_at: int | str | None = None
    faults: dict[int, Fault] = field(default_factory=dict)
    by_name: list[tuple[str, Fault, int]] = field(default_factory=list)
    """(beginning of the operation's name, fault, how many times)."""


class Process:
    """An engine whose every way to the outer world passes boundaries.

    Args:
        die_at: The boundary at which it is killed: its number, or how its name begins ("after POST").
        freeze_at: The boundary at which it is stopped, until `thaw`.
        faults: Number of the operation → what becomes of it.
        clock_error_seconds: How wrong this machine's clock is.
        jitter: Seed of random latencies; None: all the same.
        settings: Fields of the account that differ.
    """

    def __init__(
        self,
        world: World,
        *,
        die_at: int | str | None = None,
        freeze_at: int | str | None = None,
        faults: Mapping[int, Fault] | None = None,
        by_name: Iterable[tuple[str, Fault, int]] = (),
        clock_error_seconds: float = 0.0,
        jitter: int | None = None,
        run_id: str | None = None,
        **settings: Any,
    ) -> None:
        self.world = world
        self.plan = Plan(die_at, freeze_at, dict(faults or {}), list(by_name))
        self.run_id = run_id or f"run-{len(world.processes) + 1}"
        self.boundaries: list[str] = []
        self.operations: list[Operation] = []
        self.dead = False
        self.died = asyncio.Event()
        self.froze = asyncio.Event()
        self._frozen: asyncio.Event | None = None
        self.clock_error_seconds = clock_error_seconds
        self._jitter = None if jitter is None else random.Random(jitter)
        self._posts_at_the_door = 0
        self._under_way: set[asyncio.Task[Any]] = set()
        self.settings = world.settings.model_copy(update=settings)
        self.engine = Engine(
            self.settings,
            local_limiter(
                requests_per_minute=self.settings.requests_per_minute, max_in_flight=self.settings.max_in_flight
            ),
            lambda _destination, _access: Bucket(self),
            client=EachlabsClient(self.settings, transport=Network(self)),
            downloader=Downloader(Network(self)),
            way=world.receivers.way_to(self) if self.settings.webhook_url else None,
        )
        self.engine.account.catalogue.beside_the_loop = _at_once

    # ---------------------------------------------------------------- what it is told to do

    async def obtain(self, item: Item, **given: Any) -> StoredImage:
        if given.get("retry_ambiguous"):
            await asyncio.sleep(2)  # a person's word is about what was ambiguous before it was given
        return await self.run(
            self.engine.generate_and_store(
                item, self.world.destination, options=PurchaseOptions(run_id=self.run_id, **given)
            )
        )

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The work, on this machine's clock."""
        before = here.set(self)
        try:
            return await work
        finally:
            here.reset(before)

    async def until_it_ends(self, work: Coroutine[Any, Any, Any]) -> object:
        """The work's result or exception; None once the process is dead."""
        task = asyncio.ensure_future(work)
        death = asyncio.ensure_future(self.died.wait())
        await asyncio.wait({task, death}, return_when=asyncio.FIRST_COMPLETED)
        death.cancel()
        if task.done():
            return task.exception() or task.result()
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return None

    def is_about_to_post(self) -> bool:
        """Whether a POST stands at its first boundary."""
        return self._posts_at_the_door > 0

    @property
    def is_frozen(self) -> bool:
        return self._frozen is not None

    def kill(self) -> None:
        self.dead = True
        self.died.set()

    def freeze(self) -> None:
        if self._frozen is None:
            self._frozen = asyncio.Event()
            self.froze.set()

    async def dies(self, work: Coroutine[Any, Any, Any]) -> None:
        """Works until it is dead, as planned."""
        ended = await self.until_it_ends(work)
        assert self.dead, f"it was to die at {self.plan.die_at} and ended: {ended!r}"

    def thaw(self) -> None:
        if self._frozen is not None:
            self._frozen.set()
            self._frozen = None

    def count(self, beginning: str) -> int:
        """How many operations began whose names begin so."""
        return sum(operation.name.startswith(beginning) for operation in self.operations)

    # ---------------------------------------------------------------- on its way out

    async def perform(
        self, name: str, effect: Callable[[], Awaitable[T]], fail: Callable[[str], Exception], again: Exception | None
    ) -> T:
        """One operation with its two boundaries. It goes on although its caller gives up, as what is sent is sent."""

        if self.world.over:
            raise asyncio.CancelledError

        async def work() -> T:
            here.set(None)  # what is sent goes on without it
            operation = Operation(len(self.operations) + 1, name, self.world.now())
            self.operations.append(operation)
            is_order = name == "POST /v1/prediction"
            self._posts_at_the_door += is_order
            await self._pass(name, "before")
            self._posts_at_the_door -= is_order
            await self._latency()
            fault = self._fault_of(operation)
            if fault == "refuse":
                await self._pass(name, "after")
                raise fail("refused on purpose, without effect")
            try:
                result = await effect()
            finally:
                await self._latency()
                await self._pass(name, "after")
            if fault == "lose refused" and again is not None:
                raise again
            if fault is not None:
                raise fail("it took effect, its answer is lost on purpose")
            return result

        task = asyncio.ensure_future(work())
        self._under_way.add(task)
        task.add_done_callback(self._forget)
        return await asyncio.shield(task)

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._under_way.discard(task)
        if not task.cancelled():
            task.exception()  # seen: its caller may have given up

    def _fault_of(self, operation: Operation) -> Fault | None:
        if operation.number in self.plan.faults:
            return self.plan.faults[operation.number]
        for index, (beginning, fault, times) in enumerate(self.plan.by_name):
            if operation.name.startswith(beginning) and times > 0:
                self.plan.by_name[index] = (beginning, fault, times - 1)
                return fault
        return None

    async def _pass(self, name: str, phase: Phase) -> None:
        if not self.dead:
            self.boundaries.append(f"{phase} {name}")
            if self._is_here(self.plan.die_at):
                self.kill()
            if self._is_here(self.plan.freeze_at):
                self.plan.freeze_at = None
                self.freeze()
        while self._frozen is not None and not self.dead:
            await self._frozen.wait()
        if self.dead:
            await for_ever()

    def _is_here(self, boundary: int | str | None) -> bool:
        if isinstance(boundary, str):
            return self.boundaries[-1].startswith(boundary)
        return len(self.boundaries) == boundary

    async def _latency(self) -> None:
        share = 0.5 if self._jitter is None else self._jitter.random()
        await asyncio.sleep(self.world.latency_seconds * share)


def _store_failed(said: str) -> Exception:
    return StoreFailed(said)


class Bucket:
    """The bucket as one process reaches it."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._store = process.world.store

    def uri(self, key: str) -> str:
        return self._store.uri(key)

    async def get(self, key: str) -> StoredObject | None:
        return await self._process.perform(f"S3 GET {key}", lambda: self._store.get(key), _store_failed, None)

    async def head(self, key: str) -> StoredObject | None:
        return await self._process.perform(f"S3 HEAD {key}", lambda: self._store.head(key), _store_failed, None)

    async def put(self, key: str, body: bytes, **given: Any) -> str:
        said = ""
        if "/records/" in key:
            record = json.loads(body)
            said = f" {record['state']}{' ' + record['intent'] if record.get('intent') else ''}"
        again = PreconditionFailed("boto3 repeated it")
        return await self._process.perform(
            f"S3 PUT {key}{said}", lambda: self._store.put(key, body, **given), _store_failed, again
        )

    async def list(self, prefix: str) -> AsyncIterator[ListedObject]:
        async def rows() -> list[ListedObject]:
            return [row async for row in self._store.list(prefix)]

        for row in await self._process.perform(f"S3 LIST {prefix}", rows, _store_failed, None):
            yield row

    async def presigned_get(self, key: str, *, expires_seconds: int) -> str:
        return await self._store.presigned_get(key, expires_seconds=expires_seconds)


class Network(httpx.AsyncBaseTransport):
    """The network as one process reaches it; closing it leaves the emulator standing."""

    def __init__(self, process: Process) -> None:
        self._process = process

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        await request.aread()

        async def deliver() -> httpx.Response:
            hidden = self._process.world.hidden.get(request.url.path.rpartition("/")[2])
            if hidden is not None:
                return httpx.Response(hidden, json={"error": "not for you"}, request=request)
            return await self._process.world.transport.handle_async_request(request)

        def fail(said: str) -> Exception:
            return httpx.ReadError(said, request=request)

        path = request.url.path
        name = f"{request.method} {path.rstrip('/')}" if path.startswith("/v1/") else f"DOWNLOAD {path}"
        return await self._process.perform(name, deliver, fail, None)

    async def aclose(self) -> None:
        """The emulator is everybody's."""
