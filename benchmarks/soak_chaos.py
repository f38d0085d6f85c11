"""What befalls processes while the soak runs: kills, freezes, clock jumps, full disks, a server that restarts."""

from __future__ import annotations

import heapq
import itertools
import random
import signal
from collections import Counter
from collections.abc import Callable

from soak_faults import CLOCK_JUMPS_HOURS, FROZEN_SECONDS
from soak_world import Buyer, World

KILL_EVERY_SECONDS = 45.0
FREEZE_EVERY_SECONDS = 12.0
JUMP_EVERY_SECONDS = 8.0
FULL_DISK_EVERY_SECONDS = 50.0
KILL_WHILE_AWAY_SECONDS = 0.5
LIVES_A_WIDE_SOURCE = 2
TWO_RESTARTS_FROM_SECONDS = 120.0


KILLED = "SIGKILL of a buyer"
FROZEN = "buyer frozen for 1 to 6 s (SIGSTOP)"
JUMPED = "buyer's wall clock jumps, by up to 30 h"
FULL_DISK = "buyer's life on a full disk"
RESTARTED = "Prefect server restarted (SIGTERM)"
CRASHED = "Prefect server restarted (SIGKILL)"


class Chaos:
    """Strikes at moments drawn from the seed; `look` does what is due.

    Args:
        world: Whom it strikes.
        seconds: How long it goes on, from 0.
        seed: Draws moments and victims.
    """

    def __init__(self, world: World, seconds: float, seed: int) -> None:
        self.counts: Counter[str] = Counter()
        self._world, self._random = world, random.Random(f"chaos/{seed}")
        self._numbers = itertools.count()
        self._due: list[tuple[float, int, Callable[[float], object]]] = []
        self._kills, self._full_disks = itertools.cycle(world.pair), itertools.count()

        def every(least: float, strike: Callable[[float], object], first: float | None = None) -> None:
            # Not too many kills: the slots of the dead come back after 75 s.
            pause = min(least, seconds / (2 if least == KILL_EVERY_SECONDS else 4))
            at = pause if first is None else first
            while at < seconds:
                self._at(at, strike)
                at += pause * (1.0 if least == KILL_EVERY_SECONDS else self._random.uniform(0.6, 1.4))

        every(KILL_EVERY_SECONDS, self._kill)
        every(FREEZE_EVERY_SECONDS, self._freeze)
        every(JUMP_EVERY_SECONDS, self._jump)
        every(FULL_DISK_EVERY_SECONDS, self._fill_the_disk, first=3.0)
        self._at(seconds / 3, self._restart)
        if seconds >= TWO_RESTARTS_FROM_SECONDS:
            self._at(seconds * 2 / 3, self._crash)

    def _at(self, moment: float, strike: Callable[[float], object]) -> None:
        heapq.heappush(self._due, (moment, next(self._numbers), strike))

    def look(self, now: float) -> None:
        """Does what is due at this moment."""
        while self._due and self._due[0][0] <= now:
            heapq.heappop(self._due)[2](now)

    def end(self) -> None:
        """Nothing more befalls anybody: who is frozen goes on, clocks are right."""
        self._due.clear()
        for buyer in self._world.buyers:
            buyer.freeze(False)
            buyer.clock_hours(0.0)

    def _kill(self, now: float) -> None:
        victim = next(self._kills)
        self.counts[KILLED] += victim.is_running
        victim.kill()
        victim.start()

    def _anybody(self) -> Buyer | None:
        there = [buyer for buyer in self._world.buyers if buyer.is_running and not buyer.is_frozen]
        return self._random.choice(there) if there else None

    def _freeze(self, now: float) -> None:
        victim = self._anybody()
        if victim is not None:
            self.counts[FROZEN] += 1
            victim.freeze(True)
            self._at(now + self._random.uniform(*FROZEN_SECONDS), lambda _: victim.freeze(False))

    def _jump(self, now: float) -> None:
        victim = self._anybody()
        if victim is not None:
            self.counts[JUMPED] += 1
            victim.clock_hours(self._random.uniform(*CLOCK_JUMPS_HOURS))

    def _fill_the_disk(self, now: float) -> None:
        buyer = self._world.on_a_full_disk
        if not buyer.is_running:
            buyer.begin_at(next(self._full_disks) // LIVES_A_WIDE_SOURCE + 1)
            buyer.start()
            self.counts[FULL_DISK] += 1

    def _restart(self, now: float) -> None:
        self.counts[RESTARTED] += 1
        self._world.prefect.process.send(signal.SIGTERM)
        self._start_again(now)

    def _crash(self, now: float) -> None:
        self.counts[CRASHED] += 1
        self._world.prefect.process.send(signal.SIGKILL, to_all=True)
        self._start_again(now)

    def _start_again(self, now: float) -> None:
        """It takes 10 to 20 s to come up, and a buyer's new life begins meanwhile."""
        self._world.prefect.process.end()
        self._world.prefect.start()
        self._at(now + KILL_WHILE_AWAY_SECONDS, self._kill)
