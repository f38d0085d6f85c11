"""Which question is worth a request now, and when to look again: the watcher's policy, pure but for its inputs.

Two ways to ask, by what requests are worth at the moment:

- *Soon*, when requests are free or nobody waits for them: each prediction is looked at from an early quantile of
  its model's durations on, again and again, in intervals that grow as the limit comes nearer.
- *Late*, when a request spent on asking is one that cannot create: one sweep when nearly all of those in flight
  are expected to have ended (waiting costs nothing while all places in flight are taken), or one question for each
  at an age that nearly none exceeds.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, field

from prefect_eachlabs.durations import PRIOR_SECONDS, Durations
from prefect_eachlabs.listing import Listing
from prefect_eachlabs.pacing import Kind, Places
from prefect_eachlabs.sweeping import Sweeping
from prefect_eachlabs.watched import Watched

QUESTIONS_AT_ONCE = 64
"""By id; the client's connections must suffice for creates and sweeps as well."""
HELD_AT_ONCE = 32
"""So many questions may be left for the API to hold until their ends."""
ANSWER_OVERDUE_SECONDS = 30.0
"""A question by id that is out for so long is no reason not to ask again."""
SWEEP_OVERDUE_SECONDS = 3.0
LONGEST_INTERVAL_SECONDS = 60.0
LATE_SHARE_SWEPT = 0.9
LATE_SHARE_ASKED = 0.97
GROUP_SHARE = 0.9
"""A sweep waits until so many of the group are expected to have ended, each with its late share."""
ENOUGH_ROWS = 20
"""A sweep that is expected to tell so many ends costs less than 5 % of the requests: no need to wait for more."""
HOLD_SECONDS = 6.0
"""While creates wait for requests, ends that are not needed for going on are asked for by so much later."""
IN_HAND_PRESSURE = 0.8
INSISTED_TIMES = 5
LOOK_SECONDS = 0.5
"""Under a tight limit things change without a word (a batch has no more to create): look twice a second."""


@dataclass(frozen=True)
class Question:
    """One request: about one prediction by id, or (with an offset) the page of executions that it should be on."""

    watched: Watched
    offset: int | None = None


@dataclass
class Schedule:
    """All that is watched, in the order in which it is worth asking."""

    places: Places
    sweeping: Sweeping
    durations: Durations
    listing: Listing = field(default_factory=Listing)
    watched: dict[str, Watched] = field(default_factory=dict)
    asking: int = 0
    """Questions by id that are out."""
    sweep_sent_at: float = -math.inf
    sweep_is_out: bool = False
    quiet_until: float = 0.0
    """The API throttles questions too: nothing is asked before."""
    holds: bool = False
    """The API was seen to hold a GET open until the end."""

    def __post_init__(self) -> None:
        self._common: list[tuple[float, Watched]] = []
        self._certain: list[tuple[float, Watched]] = []
        self._overdue: set[str] = set()
        self._early: dict[str | None, float] = {}

    # ---- what comes and goes

    def add(self, watched: Watched, now: float) -> None:
        self.watched[watched.prediction.id] = watched
        self._due(watched, self._start_at(watched, now))

    def remove(self, watched: Watched) -> None:
        self.watched.pop(watched.prediction.id, None)
        self._overdue.discard(watched.prediction.id)

    def asked(self, watched: Watched, now: float) -> None:
        """A question by id goes out."""
        watched.not_before = now + ANSWER_OVERDUE_SECONDS
        self._due(watched, watched.not_before)

    def insist(self, watched: Watched, at: float) -> None:
        """It is asked about by id, before anything else."""
        watched.insisted = True
        self._due(watched, max(at, watched.not_before))

    def back_off(self, watched: Watched, now: float) -> None:
        """A question got no answer, or one that contradicts another: ask again, later each time."""
        watched.failures += 1
        watched.not_before = now + min(0.25 * 2.0 ** min(watched.failures, 10), LONGEST_INTERVAL_SECONDS)
        self._due(watched, watched.not_before)

    def found_pending(self, watched: Watched, sent_at: float, now: float, *, by_id: bool) -> None:
        """An answer says that it had not ended when the question was sent."""
        watched.pending_at = max(sent_at, watched.pending_at or sent_at)
        age = sent_at - watched.began_at
        likely = self._age(watched, 0.99)
        if age > likely + LONGEST_INTERVAL_SECONDS:
            self._overdue.add(watched.prediction.id)
        if by_id and watched.insisted:  # a row knew better, or a cancel takes its time: patiently, again
            watched.insisted = watched.failures < INSISTED_TIMES
            self.back_off(watched, now)
            return
        if by_id:
            watched.failures, watched.doubtful, watched.not_before = 0, False, 0.0
        elif not watched.doubtful and age > max(1.3 * likely, 2.0 * watched.doubted_at_age):
            watched.doubtful, watched.doubted_at_age = True, age
        if not watched.insisted:
            again_at = max(self._again_at(watched, self._interval(watched)), watched.not_before)
            self._due(watched, max(self._start_at(watched, now), again_at))

    def learned(self, model: str | None, now: float) -> None:
        """Its durations have changed: where it turns out much faster than thought, look sooner."""
        early = self.durations.quantile(model, 0.05)
        if early > 0.75 * self._early.get(model, math.inf):
            return
        self._early[model] = early
        for watched in self.watched.values():
            if watched.prediction.model == model and watched.pending_at is None and not watched.insisted:
                self._due(watched, max(watched.not_before, self._start_at(watched, now)))

    def _due(self, watched: Watched, at: float) -> None:
        watched.due_at = at
        heapq.heappush(self._certain if watched.insisted else self._common, (at, watched))

    def _first(self, heap: list[tuple[float, Watched]], *, certain: bool) -> Watched | None:
        while heap:
            at, watched = heap[0]
            if (
                watched.due_at == at
                and watched.insisted is certain
                and self.watched.get(watched.prediction.id) is watched
            ):
                return watched
            heapq.heappop(heap)
        return None

    # ---- times

    def _age(self, watched: Watched, share: float) -> float:
        return self.durations.quantile(watched.prediction.model, share)

    def _pressure(self) -> float:
        return self.places.pressure(Kind.REQUESTS)

    def _start_at(self, watched: Watched, now: float) -> float:
        """When to look for the first time where requests are free: the fuller the window, the later."""
        model = watched.prediction.model
        if self.places.limit(Kind.REQUESTS) is None:
            share = 0.05
            if not self.durations.known(model):
                return watched.began_at + 0.3
        else:
            share = max(0.05, min(self._pressure(), 0.95))
        age = self.durations.quantile(model, share)
        self._early.setdefault(model, age)
        return watched.began_at + age

    def _interval(self, watched: Watched | None) -> float:
        """Between two looks where requests are free."""
        model = watched.prediction.model if watched else None
        shortest = min(max(0.03 * self.durations.quantile(model, 0.5), 0.05), 0.25)
        limit = self.places.limit(Kind.REQUESTS)
        if limit is None:
            return shortest
        relaxed = min(max(600.0 / limit, shortest), 0.5)  # looking takes a tenth of the requests, or less
        return min(5.0, relaxed * max(1.0, 0.3 / max(1.0 - self._pressure(), 0.01)))

    def _again_at(self, watched: Watched, interval: float) -> float:
        """After it was found pending: further apart the longer it is overdue."""
        if watched.pending_at is None:
            return 0.0
        beyond = watched.pending_at - watched.began_at - self._age(watched, 0.99)
        interval = max(interval, min(0.1 * beyond, LONGEST_INTERVAL_SECONDS))
        limit = self.places.limit(Kind.REQUESTS)
        if limit is not None and watched.prediction.id in self._overdue:  # at most a quarter of the requests go there
            interval = max(interval, 240.0 * len(self._overdue) / limit)
        return watched.pending_at + interval

    # ---- the decision

    def decide(self, now: float) -> Question | float:
        """What to ask now; or when to look again, should nothing happen before."""
        if not self.watched:
            return math.inf
        if now < self.quiet_until:
            return self.quiet_until
        certain = self._first(self._certain, certain=True)
        if certain is not None and certain.due_at <= now and self.asking < QUESTIONS_AT_ONCE:
            return Question(certain)
        choice = self._late(now) if self._requests_are_scarce() else self._soon(now)
        if isinstance(choice, float) and certain is not None and certain.due_at > now:
            return min(choice, certain.due_at)
        return choice

    def wants_place_in_hand(self) -> bool:
        """Whether to have a place ready before it is needed.

        Else creates take the last ones, and ten finished pictures wait for one place to come back.
        """
        asked_soon = self.watched or self.places.requests_waiting or self.places.in_flight_waiting
        return bool(asked_soon) and self._pressure() >= IN_HAND_PRESSURE and self._requests_are_scarce()

    def _requests_are_scarce(self) -> bool:
        limit = self.places.limit(Kind.REQUESTS)
        if limit is None:
            return False
        if self.places.requests_waiting:
            return True
        in_flight = self.places.limit(Kind.IN_FLIGHT)
        if in_flight is None:
            return False
        pressure = self._pressure()
        if not self.places.in_flight_waiting and (pressure < 0.3 or self.places.pressure(Kind.IN_FLIGHT) < 1.0):
            return False
        seconds = next((self._age(watched, 0.5) for watched in self.watched.values()), PRIOR_SECONDS)
        creates_per_minute = 60.0 * in_flight / max(seconds, 0.01)
        return pressure > 0.9 or limit <= 1.5 * creates_per_minute

    def _soon(self, now: float) -> Question | float:
        first = self._first(self._common, certain=False)
        if first is None:
            return math.inf
        if first.due_at > now:
            return first.due_at
        if first.alone or (self.holds and self.asking < HELD_AT_ONCE):
            return Question(first) if self.asking < QUESTIONS_AT_ONCE else math.inf
        if self.sweeping.allowed(now):
            interval = self._interval(first)
            if self._sweep_blocks(now):
                return self.sweep_sent_at + SWEEP_OVERDUE_SECONDS
            if not self.sweep_is_out and self._another_is_due(first, now + interval):
                at = self.sweep_sent_at + interval
                return at if at > now else self._sweep(first)
        return Question(first) if self.asking < QUESTIONS_AT_ONCE else math.inf

    def _another_is_due(self, first: Watched, by: float) -> bool:
        """Whether a sweep would tell of more than one."""
        taken = heapq.heappop(self._common)
        second = self._first(self._common, certain=False)
        heapq.heappush(self._common, taken)
        return second is not None and second is not first and second.due_at <= by

    def _sweep_blocks(self, now: float) -> bool:
        return self.sweep_is_out and now < self.sweep_sent_at + SWEEP_OVERDUE_SECONDS

    def _sweep(self, oldest: Watched) -> Question:
        return Question(oldest, offset=self.listing.offset_for(oldest.number))

    def _late(self, now: float) -> Question | float:
        hold_seconds = HOLD_SECONDS if self.places.requests_waiting else 0.0
        again_at = now + LOOK_SECONDS
        swept: list[tuple[float, Watched]] = []
        asked: list[tuple[float, Watched]] = []
        may_sweep = self.sweeping.allowed(now)
        for watched in self.watched.values():
            if watched.insisted:
                continue
            by_sweep = may_sweep and not watched.alone and self.sweeping.believes(watched.prediction)
            (swept if by_sweep else asked).append((self._late_at(watched, by_sweep), watched))
        if len(swept) == 1:
            asked.append((self._late_at(swept[0][1], False), swept.pop()[1]))
        if swept and not self._sweep_blocks(now):
            swept.sort()
            sweep_at = swept[math.ceil(GROUP_SHARE * len(swept)) - 1][0]
            if hold_seconds:
                sweep_at = swept[0][0] + hold_seconds
            if len(swept) >= ENOUGH_ROWS:
                sweep_at = min(sweep_at, swept[ENOUGH_ROWS - 1][0])
            if sweep_at <= now:
                return self._sweep(swept[0][1])
            again_at = min(again_at, sweep_at)
        if asked and self.asking < QUESTIONS_AT_ONCE:
            at, watched = min(asked)
            if at <= now:
                return Question(watched)
            again_at = min(again_at, at)
        return again_at

    def _late_at(self, watched: Watched, by_sweep: bool) -> float:
        age = self._age(watched, LATE_SHARE_SWEPT)
        if not by_sweep:  # a long tail is no reason to wait for it with all the others
            age = min(1.25 * age, self._age(watched, LATE_SHARE_ASKED))
        straggle_seconds = 0.2 * self._age(watched, 0.5)
        return max(watched.began_at + age, self._again_at(watched, straggle_seconds), watched.not_before)
