"""Processes that die, freeze and lose answers at any boundary, at one emulator and one bucket, in virtual time.

    async def story() -> None:
        world = World()
        with world.process(die_at=7) as first:          # SIGKILL at its 7th boundary
            await first.until_it_ends(first.obtain(ITEM))
        await world.process().obtain(ITEM)              # the same thing again
        world.check([ITEM])                             # billed once, stored once, named once

A *boundary* is the moment before or after anything that leaves the process: an S3 request, a POST, a GET, a download.
A process that is dead or frozen passes no boundary: its timers may run, but nothing that it does has an effect. What
it had sent goes on without it, as on a real network.
"""

from __future__ import annotations

import asyncio
import contextvars
import json
import random
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone, tzinfo
from typing import Any, Literal, NoReturn, TypeVar

import httpx
import pytest

from prefect_eachlabs import client as client_room
from prefect_eachlabs.client import EachlabsClient
from prefect_eachlabs.decisions import PurchaseOptions
from prefect_eachlabs.download import Downloader
from prefect_eachlabs.emulator import EmulatorOptions, InProcessTransport
from prefect_eachlabs.emulator.ledger import Job
from prefect_eachlabs.engine import Engine
from prefect_eachlabs.errors import StoreFailed
from prefect_eachlabs.models import Destination, Item, StoredImage
from prefect_eachlabs.object_store import ListedObject, PreconditionFailed, StoredObject
from prefect_eachlabs.pacing import LocalLots
from prefect_eachlabs.png import verify_png
from prefect_eachlabs.records import Record, RecordState
from prefect_eachlabs.settings import AccountSettings
from tests.memory_store import MemoryStore
from tests.virtual_time import run

T = TypeVar("T")
Phase = Literal["before", "after"]
Fault = Literal["refuse", "lose", "lose refused"]
"""`refuse`: no effect, an error; `lose`: it takes effect, its answer is lost; `lose refused`: boto3 repeated the put
whose answer was lost by itself, and was told 412."""

MACHINE_DATE = datetime(2026, 11, 22, 9, 0, tzinfo=timezone.utc)
"""The machines' date when the loop's clock says 0. The bucket's is another one, so nobody may compare the two."""
KEY = "kit-key-0123456789"
BASE_URL = "https://api.invalid"
DESTINATION = Destination.parse("s3://bucket/kit")

def wanted(number: int = 1, *, prompt: str | None = None, item_id: str | None = None, **input: Any) -> Item:
    """An item of its own for each number; equal prompts are equal inputs."""
    return Item.wanted(prompt or f"picture {number}", item_id=item_id or f"item-{number}", input=input)


def options(run_id: str = "run", **given: Any) -> PurchaseOptions:
    return PurchaseOptions(run_id=run_id, **given)


_worlds: list[World] = []


def play(story: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Runs a story in virtual time. What the dead left behind ends with it, without any effect."""

    async def whole() -> T:
        try:
            return await story()
        finally:
            for world in _worlds:
                world.over = True
            _worlds.clear()

    return run(whole())


def order(item: Item) -> dict[str, Any]:
    """What the API is sent for an item."""
    return {"model": item.model, "version": item.version, "input": item.input}


async def for_ever() -> NoReturn:
    await asyncio.get_running_loop().create_future()
    raise AssertionError("nobody wakes the dead")


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


class World:
    """What all processes share.

    Args:
        faults: Of the emulator, as text.
        latency_seconds: Half of it passes before a request takes effect, half after.
        emulated: Options of the emulator.
    """

    def __init__(
        self,
        *faults: str,
        latency_seconds: float = 0.1,
        honours_conditions: bool = True,
        settings: Mapping[str, Any] | None = None,
        **emulated: Any,
    ) -> None:
        given = {
            "requests_per_minute": None,
            "max_in_flight": None,
            "service_seconds": 2.0,
            "spread": 0.0,
            "pictures": "plain",
            "image_size_px": 16,
            **emulated,
        }
        self.transport = InProcessTransport(EmulatorOptions(faults=faults, **given))
        self.emulator = self.transport.emulator
        self.store = MemoryStore(honours_conditions=honours_conditions)
        self.latency_seconds = latency_seconds
        self.destination = DESTINATION
        self.settings = AccountSettings(**{"api_key": KEY, "base_url": BASE_URL, **(settings or {})})
        self.processes: list[Process] = []
        self.hidden: dict[str, int] = {}
        """Prediction id → the status that GET answers with."""
        self.over = False
        _worlds.append(self)

    def process(self, **given: Any) -> Process:
        """One more process with an engine of its own; see `Process`."""
        process = Process(self, **given)
        self.processes.append(process)
        return process

    # ------------------------------------------------------------------ what came of it

    def now(self) -> float:
        return asyncio.get_running_loop().time()

    def bought(self) -> list[Job]:
        """Every prediction of our own that the API accepted, oldest first."""
        return self.bought_at(self.now())

    def bought_at(self, now: float) -> list[Job]:
        return [job for job in reversed(list(self.emulator.ledger.newest_first(now))) if not job.foreign]

    def bought_for(self, item: Item) -> list[Job]:
        return [job for job in self.bought() if job.input == item.input]

    def record(self, item: Item) -> Record:
        return Record.model_validate(self.store.json(self.destination.record_key(item.item_id)))

    def records(self) -> list[Record]:
        keys = self.store.keys(self.destination.key("records/"))
        return [Record.model_validate(self.store.json(key)) for key in keys]

    def named(self) -> Counter[str]:
        """Prediction id → how many records name it."""
        return Counter(name for record in self.records() for name in record.named_predictions)

    def check(self, items: Iterable[Item], *, allow_one_too_many: bool = False) -> None:
        """Each item is stored, as one prediction of its own; each prediction is named once, and none is superfluous.

        Args:
            items: All that were wanted.
            allow_one_too_many: An assumption was broken on purpose: more may be bought, if reported.
        """
        items = list(items)
        for item in items:
            record = self.record(item)
            assert record.state is RecordState.STORED, (item.item_id, record.state, record.error)
            picture = self.store.objects[self.destination.image_key(item.item_id)]
            assert picture.metadata["prediction-id"] == record.prediction_id, item.item_id
            assert verify_png(picture.body).sha256 == record.sha256
            job = self.emulator.ledger.get(record.prediction_id or "", self.now())
            assert job is not None, record.prediction_id
            assert job.input == item.input, f"{item.item_id} has the picture of another input"
            assert not job.foreign, f"{item.item_id} adopted another key's prediction"
        stored = Counter(self.record(item).prediction_id for item in items)
        assert set(stored.values()) <= {1}, f"two items share a prediction: {stored.most_common(3)}"
        named = self.named()
        bought = self.bought()
        unnamed = [job.id for job in bought if named[job.id] == 0]
        assert not unnamed, f"bought and named by no record: {unnamed}"
        shared = [job.id for job in bought if named[job.id] > 1]
        assert not shared, f"named by more than one record: {shared}"
        extra = len(bought) - len(items)
        reported = sum(len(record.also_bought) for record in self.records())
        if allow_one_too_many:
            assert extra == reported <= 1, f"{extra} too many, {reported} reported"
        else:
            assert extra == 0, f"{len(bought)} bought for {len(items)} items"
            assert reported == 0


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
            LocalLots(requests_per_minute=self.settings.requests_per_minute, max_in_flight=self.settings.max_in_flight),
            lambda _destination, _access: _Store(self),
            client=EachlabsClient(self.settings, transport=_Transport(self)),
            downloader=Downloader(_Transport(self)),
        )

    # ---------------------------------------------------------------- what it is told to do

    async def obtain(self, item: Item, **given: Any) -> StoredImage:
        return await self.run(
            self.engine.generate_and_store(item, self.world.destination, options=options(self.run_id, **given))
        )

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The work, on this machine's clock."""
        before = _process.set(self)
        try:
            return await work
        finally:
            _process.reset(before)

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
