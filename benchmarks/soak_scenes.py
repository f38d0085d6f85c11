"""What people do with batches in the soak: Ctrl-C, overlapping `--replace`, budgets, rows that cannot succeed."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from soak_faults import BUDGET_USD, INTERRUPTED_SECONDS
from soak_world import Buyer, World

INTERRUPTED_TWICE = "a batch interrupted by Ctrl-C, up to twice, and run again"
CTRL_C = "Ctrl-C (SIGINT) to a batch"
REPLACED = "two overlapping batches with --replace over the same items"
BUDGETED = "a batch with a budget, killed twice and run again as the same run"
HOPELESS = "a batch with rows that are answered 500 for ever, run twice"

INTERRUPTS, KILLS = 2, 2
INTERRUPTED_EARLY = 0.2
"""So often while its process still imports."""
AFTER_SECONDS = (0.0, 14.0)
"""From the beginning of a batch: claiming, ordering, waiting, storing, reporting."""
KILLED_AFTER_SECONDS = (1.0, 9.0)
ENDS_WITHIN_SECONDS = 60.0
KNOWN_FOR_SECONDS = (1.0, INTERRUPTED_SECONDS / 2)
"""Who knows a prediction for so long at a Ctrl-C has the time to ask for its end."""


@dataclass
class Seen:
    """What scenes saw that the books at the end cannot show.

    Attributes:
        counts: How often each happened.
        not_asked: Predictions that were in flight at a Ctrl-C, known to the buyer, and never asked to be cancelled.
        not_ended: Batches that did not end in time: within a minute of Ctrl-C, or in the calm.
    """

    counts: Counter[str] = field(default_factory=Counter)
    not_asked: list[str] = field(default_factory=list)
    not_ended: list[str] = field(default_factory=list)


Story = Iterator[None]
"""What happens in a scene: each `next` is a look around, some times a second; it never waits."""


class Scenes:
    """Plays two scenes at a time, one after the other; `look` goes on with them.

    Args:
        world: Where.
        seed: Draws moments.
    """

    def __init__(self, world: World, seed: int) -> None:
        self.seen = Seen()
        self._world, self._random = world, random.Random(f"scenes/{seed}")
        self._now = 0.0
        self._under_way = [self._one_after_the_other(0), self._one_after_the_other(1)]

    def look(self, now: float) -> None:
        self._now = now
        for story in self._under_way:
            next(story)

    def end(self) -> None:
        """Nothing more happens; batches that are under way end by themselves."""
        self._under_way = []

    def _one_after_the_other(self, which: int) -> Story:
        number = 0
        while True:
            number += 1
            yield from self._interrupted(number) if which else self._replaced(number)
            yield from self._budgeted(number) if which else self._hopeless(number)

    def _until_ended(self, *buyers: Buyer) -> Story:
        while any(buyer.is_running for buyer in buyers):
            yield

    def _until_begun(self, buyer: Buyer) -> Story:
        while buyer.is_running and not buyer.has_begun:
            yield

    def _for(self, seconds: float, *buyers: Buyer) -> Story:
        """For so long, or until they have ended."""
        until = self._now + seconds
        while self._now < until and any(buyer.is_running for buyer in buyers):
            yield

    # ------------------------------------------------------------------ the scenes

    def _interrupted(self, number: int) -> Story:
        buyer = self._world.interrupted
        self.seen.counts[INTERRUPTED_TWICE] += 1
        for _ in range(INTERRUPTS):
            buyer.start_at(number)
            if self._random.random() > INTERRUPTED_EARLY:
                yield from self._until_begun(buyer)
            yield from self._for(self._random.uniform(*AFTER_SECONDS), buyer)
            if not buyer.is_running:
                break
            known = self._in_flight_and_known(buyer, number)
            self.seen.counts[CTRL_C] += 1
            buyer.interrupt()
            yield from self._for(ENDS_WITHIN_SECONDS, buyer)
            if buyer.is_running:
                self.seen.not_ended.append(f"{buyer.name}, life {buyer.lives}, after Ctrl-C")
                buyer.kill()
            self._look_for_cancels(known, buyer)
        buyer.start_at(number)
        yield from self._until_ended(buyer)

    def _in_flight_and_known(self, buyer: Buyer, number: int) -> list[str]:
        """Predictions that it bought a second ago, with an answer that it could read, and that go on for seconds."""
        emulator = self._world.emulator
        prompts = {wanted.prompt for wanted in buyer.group.wanted_of(number)}
        there = {
            one["id"]
            for one in self._world.predictions()
            if one["status"] in ("starting", "processing") and one["input"]["prompt"] in prompts
        }
        journal = emulator.journal()
        now = journal[-1]["at"] if journal else 0.0
        return [
            entry["prediction_id"]
            for entry in journal
            if entry["endpoint"] == "create"
            and entry["prediction_id"] in there
            and entry["fault"] is None
            and entry["seconds"] is not None
            and KNOWN_FOR_SECONDS[0] <= now - entry["at"] - entry["seconds"] <= KNOWN_FOR_SECONDS[1]
        ]

    def _look_for_cancels(self, known: Sequence[str], buyer: Buyer) -> None:
        asked = {entry["prediction_id"] for entry in self._world.emulator.journal() if entry["endpoint"] == "cancel"}
        ended = {one["id"]: one for one in self._world.predictions()}
        self.seen.not_asked += [
            f"{buyer.name}, life {buyer.lives}: {id} ({ended[id]['status']})" for id in known if id not in asked
        ]

    def _replaced(self, number: int) -> Story:
        self.seen.counts[REPLACED] += 1
        one, other = self._world.replacing
        one.start_at(number, "--replace")
        yield from self._for(self._random.uniform(0.0, 3.0), one)
        other.start_at(number, "--replace")
        yield from self._until_ended(one, other)

    def _budgeted(self, number: int) -> Story:
        buyer = self._world.budgeted
        self.seen.counts[BUDGETED] += 1
        for life in range(KILLS + 1):
            buyer.start_at(number, "--budget-usd", f"{BUDGET_USD}", run_id=f"{number:08}{0:024}")
            if life < KILLS:
                yield from self._until_begun(buyer)
                yield from self._for(self._random.uniform(*KILLED_AFTER_SECONDS), buyer)
                buyer.kill()
            else:
                yield from self._until_ended(buyer)

    def _hopeless(self, number: int) -> Story:
        self.seen.counts[HOPELESS] += 1
        for _ in range(2):
            self._world.hopeless.start_at(number)
            yield from self._until_ended(self._world.hopeless)
