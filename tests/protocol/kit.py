"""Processes that die, freeze and lose answers at any boundary, at one emulator and one bucket, in virtual time.

    async def test_it_is_bought_once() -> None:
        world = World()
        first = world.process(die_at=7)
        await first.dies(first.obtain(ITEM))    # SIGKILL at its 7th boundary
        await world.process().obtain(ITEM)      # the same thing again
        world.check([ITEM])                     # billed once, stored once, named once

A *boundary* is the moment before or after anything that leaves the process: an S3 request, a POST, a GET, a download.
A process that is dead or frozen passes no boundary: its timers may run, but nothing that it does has an effect. What
it had sent goes on without it, as on a real network.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Mapping
from functools import partial
from typing import Any, TypeVar

import httpx

from prefect_eachlabs.images.png import PngReader
from prefect_eachlabs.ledger.records import Record, RecordState
from prefect_eachlabs.ledger.rules import PurchaseOptions
from prefect_eachlabs.models import Destination, Item
from prefect_eachlabs.settings import AccountSettings
from prefect_eachlabs.testing.emulator import Clock, Emulator, EmulatorOptions, InProcessTransport
from prefect_eachlabs.testing.emulator import Fault as EmulatorFault
from prefect_eachlabs.testing.emulator.predictions import Job
from prefect_eachlabs.webhooks.calls import Call
from prefect_eachlabs.webhooks.receiver import receiver_app
from prefect_eachlabs.webhooks.webhooks import Verdict, Way
from tests.memory_store import MemoryStore
from tests.protocol.clocks import patched_clocks
from tests.protocol.process import Fault, Process
from tests.virtual_time import run

__all__ = ["Fault", "Process", "World", "at_each_boundary", "options", "order", "patched_clocks", "play", "wanted"]

T = TypeVar("T")

KEY = "kit-key-0123456789"
BASE_URL = "https://api.invalid"
WEBHOOK_URL = "https://hooks.invalid/eachlabs"
WEBHOOK_SECRET = "the secret of all orders' secrets"
DESTINATION = Destination.parse("s3://bucket/kit")


def wanted(number: int = 1, *, prompt: str | None = None, item_id: str | None = None, **input: Any) -> Item:
    """An item of its own for each number; equal prompts are equal inputs."""
    return Item.wanted(prompt or f"picture {number}", item_id=item_id or f"item-{number}", input=input)


def options(run_id: str = "run", **given: Any) -> PurchaseOptions:
    return PurchaseOptions(run_id=run_id, **given)


_worlds: list[World] = []


def play(story: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Runs a story in virtual time; no machine in it asks the real one.

    What the dead left behind ends with it, without any effect.
    """

    async def whole() -> T:
        try:
            return await story()
        finally:
            for world in _worlds:
                world.over = True

    undo = patched_clocks()
    try:
        return run(whole())
    finally:
        undo()
        for world in list(_worlds):
            let_go(world)


def at_each_boundary(story: Callable[[int | None], Coroutine[Any, Any, int]]) -> None:
    """Plays a story, which tells its number of boundaries, without a death, and then with one at each of them."""
    for at in range(1, play(partial(story, None)) + 1):
        play(partial(story, at))


def let_go(world: World) -> None:
    """The world is over, and so is its loop."""
    _worlds.remove(world)


def order(item: Item) -> dict[str, Any]:
    """What the API is sent for an item."""
    return {"model": item.model, "version": item.version, "input": item.input}


class AheadClock(Clock):
    """The API's clock, which goes on while the machine of the processes stands still."""

    ahead_seconds = 0.0

    def now(self) -> float:
        return super().now() + self.ahead_seconds


class Receivers(httpx.AsyncBaseTransport):
    """The network on the way to the processes that receive calls: each that lives gets each call."""

    def __init__(self) -> None:
        self._takers: dict[Process, Callable[[Call], Verdict]] = {}
        self.are_away = False

    def way_to(self, process: Process) -> Way:
        async def way(take: Callable[[Call], Verdict]) -> Callable[[], Coroutine[Any, Any, None]]:
            self._takers[process] = take

            async def close() -> None:
                del self._takers[process]

            return close

        return way

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        living = [take for process, take in self._takers.items() if not process.dead and not process.is_frozen]
        if self.are_away or not living:
            raise httpx.ConnectError("nobody receives", request=request)

        def take(call: Call) -> Verdict:
            verdicts = [one(call) for one in living]
            return next((one for one in verdicts if one is not Verdict.REFUSED), Verdict.REFUSED)

        return await httpx.ASGITransport(receiver_app(take)).handle_async_request(request)


class World:
    """What all processes share.

    Args:
        faults: Of the emulator, as text.
        latency_seconds: Half of it passes before a request takes effect, half after.
        calls: Whether orders ask for calls, which any process that lives receives.
        emulated: Options of the emulator.
    """

    def __init__(
        self,
        *faults: str,
        latency_seconds: float = 0.1,
        honours_conditions: bool = True,
        calls: bool = False,
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
        told = EmulatorOptions(faults=faults, **given)
        self.clock = AheadClock()
        self.receivers = Receivers()
        self.emulator = Emulator(told, clock=self.clock, threads=False, outwards=self.receivers)
        self.transport = InProcessTransport(self.emulator)
        self.store = MemoryStore(honours_conditions=honours_conditions)
        self.latency_seconds = latency_seconds
        self.destination = DESTINATION
        of_calls = {"webhook_url": WEBHOOK_URL, "webhook_secret": WEBHOOK_SECRET} if calls else {}
        self.settings = AccountSettings(**{"api_key": KEY, "base_url": BASE_URL, **of_calls, **(settings or {})})
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

    def set_faults(self, *faults: str) -> None:
        """These from now on, in place of those before; none: the API is well."""
        self.emulator.faults.set(tuple(map(EmulatorFault.parse, faults)))

    def pass_unnoticed(self, seconds: float) -> None:
        """Time goes on at the bucket and at the API, and stands still on the machine of the processes."""
        self.store.ahead_seconds += seconds
        self.clock.ahead_seconds += seconds

    # ------------------------------------------------------------------ what came of it

    def now(self) -> float:
        return self.clock.now()

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
            reader = PngReader()
            reader.feed(picture.body)
            assert reader.finish().sha256 == record.sha256
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
