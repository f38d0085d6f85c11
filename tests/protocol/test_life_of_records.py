"""The life of records under everything at once: any order of starts, kills, freezes, cancels and lost answers.

Each step is drawn by Hypothesis; the assumptions of the promise hold throughout. After the last step everything heals,
one more process asks for every item, and each is bought once, stored once and named once.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from prefect_eachlabs.ledger.records import RecordState
from prefect_eachlabs.models import Item
from prefect_eachlabs.testing.emulator import Fault as EmulatorFault
from tests.protocol.kit import Process, World, let_go, patched_clocks, wanted
from tests.virtual_time import VirtualTimeLoop, _cancel_what_is_left

ITEMS = [
    wanted(1, prompt="one of its kind"),
    wanted(2, prompt="the same"),
    wanted(3, prompt="the same"),
    wanted(4, prompt="the same", seed=1),
]
MOST_PROCESSES = 3
FREEZE_ALLOWED_SECONDS = 19.0
QUIET_SECONDS = 700.0

items = st.sampled_from(ITEMS)
slots = st.integers(0, MOST_PROCESSES - 1)


class LifeOfRecords(RuleBasedStateMachine):
    """Several processes, one bucket, one account."""

    def __init__(self) -> None:
        super().__init__()
        self._unpatch = patched_clocks()
        self.loop = VirtualTimeLoop()
        self.processes: list[Process] = []
        self.works: list[tuple[Process, asyncio.Task[Any]]] = []
        self.frozen_at: dict[Process, float] = {}

    @initialize(
        skew_hours=st.sampled_from([0, 0, 1, -14, 14]),
        listing_delay_seconds=st.sampled_from([0.0, 2.0, 25.0]),
        service_seconds=st.sampled_from([0.5, 5.0, 40.0]),
        echo=st.sampled_from([None, "echo_defaults", "echo_text"]),
    )
    def begin(self, skew_hours: int, listing_delay_seconds: float, service_seconds: float, echo: str | None) -> None:
        self.lasting = (EmulatorFault(on="prediction", kind=echo),) if echo else ()

        async def make() -> World:
            return World(
                strict_models=False,
                clock_skew_seconds=skew_hours * 3600,
                listing_delay_seconds=listing_delay_seconds,
                service_seconds=service_seconds,
            )

        self.world = self.run(make())
        self.world.emulator.faults.set(self.lasting)
        for _ in range(2):
            self.start()

    def run(self, work: Any) -> Any:
        return self.loop.run_until_complete(work)

    def process(self, slot: int) -> Process:
        return self.processes[slot % len(self.processes)]

    # ---- what may happen

    @precondition(lambda self: len(self.processes) < MOST_PROCESSES)
    @rule()
    def start(self) -> None:
        async def make() -> Process:
            return self.world.process(jitter=len(self.world.processes))

        self.processes.append(self.run(make()))

    @rule(slot=slots, item=items)
    def want(self, slot: int, item: Item) -> None:
        process = self.process(slot)

        async def begin() -> None:
            work = asyncio.ensure_future(process.obtain(item))
            work.add_done_callback(lambda done: done.cancelled() or done.exception())
            self.works.append((process, work))

        self.run(begin())

    @rule(seconds=st.sampled_from([0.02, 0.05, 0.1, 0.3, 1.0, 5.0, 20.0, 45.0, 62.0, 125.0]))
    def pass_time(self, seconds: float) -> None:
        self.run(asyncio.sleep(seconds))
        for process, since in list(self.frozen_at.items()):
            if self.loop.time() - since > FREEZE_ALLOWED_SECONDS and process.is_about_to_post():
                process.kill()  # thawed, it would break assumption (d)
                self.forget(process)

    @precondition(lambda self: len(self.processes) > 1)
    @rule(slot=slots)
    def kill(self, slot: int) -> None:
        process = self.process(slot)
        process.kill()
        self.forget(process)

    def forget(self, process: Process) -> None:
        self.processes.remove(process)
        self.frozen_at.pop(process, None)
        self.works = [(owner, work) for owner, work in self.works if owner is not process]
        if not self.processes:
            self.start()

    @rule(slot=slots)
    def freeze(self, slot: int) -> None:
        process = self.process(slot)
        process.freeze()
        self.frozen_at.setdefault(process, self.loop.time())

    @precondition(lambda self: self.frozen_at)
    @rule()
    def thaw(self) -> None:
        process = next(iter(self.frozen_at))
        del self.frozen_at[process]
        process.thaw()
        self.run(asyncio.sleep(0))

    @precondition(lambda self: self.works)
    @rule(number=st.integers(0, 20))
    def cancel(self, number: int) -> None:
        _, work = self.works.pop(number % len(self.works))
        work.cancel()
        self.run(asyncio.sleep(0))

    @rule(
        slot=slots,
        name=st.sampled_from(["POST /v1/prediction", "S3 PUT", "S3 GET", "S3 LIST", "GET /v1", "DOWNLOAD"]),
        fault=st.sampled_from(["refuse", "lose", "lose refused"]),
    )
    def hurt_next(self, slot: int, name: str, fault: Any) -> None:
        self.process(slot).plan.by_name.append((name, fault, 1))

    @rule(seconds=st.sampled_from([5.0, 29.0]))
    def next_order_takes_effect_late(self, seconds: float) -> None:
        late = EmulatorFault(on="create", kind="late", seconds=seconds, next=1)
        self.world.emulator.faults.set((*self.lasting, late))

    # ---- what must hold

    @invariant()
    def nothing_is_bought_twice(self) -> None:
        if not hasattr(self, "world"):
            return
        kept = [job for job in self.world.bought_at(self.loop.time()) if job.cancelled is None]
        bought = Counter(str(job.input) for job in kept)
        wanted_times = Counter(str(item.input) for item in ITEMS)
        for sent, times in bought.items():
            assert times <= wanted_times[sent], f"{times} bought of {sent}"
        assert max(self.world.named().values(), default=0) <= 1, "two records name the same prediction"

    def teardown(self) -> None:
        try:
            if hasattr(self, "world"):
                self.run(self.heal_and_check())
        finally:
            if hasattr(self, "world"):
                self.world.over = True
            _cancel_what_is_left(self.loop)
            self.loop.close()
            if hasattr(self, "world"):
                let_go(self.world)
            self._unpatch()

    async def a_person_looks(self) -> None:
        """Items of which two orders left no trace: refused twice, or killed twice right before the POST."""
        told = self.world.process()
        for item in ITEMS:
            record = self.world.record(item)
            if record.state is RecordState.AMBIGUOUS and record.orders_without_trace == 2:
                await told.obtain(item, retry_ambiguous=True)

    async def heal_and_check(self) -> None:
        self.world.emulator.faults.set(self.lasting)
        for process in self.processes:
            process.plan.by_name.clear()
            if process in self.frozen_at and process.is_about_to_post():
                process.kill()
            process.thaw()
        await asyncio.sleep(QUIET_SECONDS)
        last = self.world.process()
        for _ in range(2):  # a prediction whose cancelling was not seen to its end is, at the second time
            outcomes = await asyncio.gather(*map(last.obtain, ITEMS), return_exceptions=True)
        await self.a_person_looks()
        outcomes = await asyncio.gather(*map(last.obtain, ITEMS), return_exceptions=True)
        assert not [outcome for outcome in outcomes if isinstance(outcome, BaseException)], outcomes
        kept = [job for job in self.world.bought() if job.cancelled is None]
        named = self.world.named()
        assert {job.id: 1 for job in self.world.bought()} == named
        assert len(kept) == len(ITEMS)
        for item in ITEMS:
            record = self.world.record(item)
            assert record.state is RecordState.STORED
            job = self.world.emulator.ledger.get(record.prediction_id or "", self.world.now())
            assert job is not None
            assert job.input == item.input, "the picture of another input"
            assert self.world.store.objects[f"kit/images/{item.item_id}.png"].metadata["prediction-id"] == job.id


NORMAL = settings(
    deadline=None,
    max_examples=12,
    stateful_step_count=30,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)

TestLifeOfRecords = LifeOfRecords.TestCase
TestLifeOfRecords.settings = NORMAL


class LongLifeOfRecords(LifeOfRecords):
    """The same, for much longer."""


TestLongLifeOfRecords = pytest.mark.slow(LongLifeOfRecords.TestCase)
TestLongLifeOfRecords.settings = settings(NORMAL, max_examples=50, stateful_step_count=40)
