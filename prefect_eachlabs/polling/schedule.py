"""Which question is worth a request now, and when to look again: the watcher's policy.

Two ways to ask, by what requests are worth at the moment (`timing` says which):

- *Soon*, when requests are free: each prediction is looked at from an early quantile of its model's durations on,
  again and again; a sweep where that tells of more than one.
- *Late*, when they are scarce: one sweep when nearly all of those in flight are expected to have ended (waiting
  costs nothing while all slots in flight are taken), or one question for each at an age that few exceed.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

from prefect_eachlabs.limits.limiter import RateLimiter
from prefect_eachlabs.polling.durations import Durations
from prefect_eachlabs.polling.executions import Sweeping
from prefect_eachlabs.polling.listing import ROWS_COUNTED_ON, Listing
from prefect_eachlabs.polling.timing import LONGEST_INTERVAL_SECONDS, Timing
from prefect_eachlabs.polling.watched import Watched

QUESTIONS_AT_ONCE = 64
"""By id; the client's connections must suffice for creates and sweeps as well."""
INSISTED_AT_ONCE = QUESTIONS_AT_ONCE + 8
HELD_AT_ONCE = 32
"""So many questions may be left for the API to hold until their ends."""
ANSWER_OVERDUE_SECONDS = 30.0
"""A question by id that is out for so long is no reason not to ask again."""
SWEEP_OVERDUE_SECONDS = 3.0
"""A sweep that is out for so long is not waited for: ask by id."""
INSISTED_TIMES = 5
GROUP_SHARE = 0.9
"""A sweep waits until so many of the group are at their late age: a straggler must not hold the others up."""
ENOUGH_ROWS = 20
"""A sweep that is expected to tell so many ends costs less than 5 % of the requests: no need to wait for more."""
HOLD_SECONDS = 6.0
"""While creates wait for requests, a sweep frees nothing that they could use: it waits for more ends."""
STRAGGLE_SHARE = 0.2
"""After so much of the usual duration a straggler is asked about again."""
LOOK_SECONDS = 0.5
"""Under a tight limit things change without a word (a batch has no more to create): look twice a second."""

STALE_ENTRIES = 64
"""Entries that no longer hold are left in a heap until it has so many and more."""

_Heap = list[tuple[float, Watched]]


@dataclass(frozen=True)
class Question:
    """One request: about one prediction by id, or (with an offset) the page of executions that it should be on."""

    watched: Watched
    offset: int | None = None


class Schedule:
    """All that is watched, and what of it to ask about now."""

    def __init__(self, limiter: RateLimiter, sweeping: Sweeping, durations: Durations) -> None:
        self.watched: dict[str, Watched] = {}
        self.listing = Listing()
        self.asking = 0
        """Questions by id that are out."""
        self.sweep_is_out = False
        self.quiet_until = 0.0
        """The API throttles questions too: nothing is asked before."""
        self.holds = False
        """The API was seen to hold a GET open until the end."""
        self._timing = Timing(limiter, durations)
        self._sweeping = sweeping
        self._durations = durations
        self._sweep_sent_at = -math.inf
        self._sweep_spacing = 0.0
        self._common: _Heap = []
        self._insisted: _Heap = []
        self._overdue: set[str] = set()
        self._early: dict[str | None, float] = {}

    # ---- what comes and goes

    def add(self, watched: Watched) -> None:
        self.watched[watched.prediction.id] = watched
        self._early.setdefault(watched.prediction.model, self._timing.age(watched, 0.05))
        self._due(watched, self._timing.start_at(watched))

    def remove(self, watched: Watched) -> None:
        self.watched.pop(watched.prediction.id, None)
        self._overdue.discard(watched.prediction.id)

    def sent(self, question: Question, now: float) -> None:
        """A question goes out."""
        if question.offset is not None:
            self.sweep_is_out, self._sweep_sent_at = True, now
        else:
            self.asking += 1
            question.watched.not_before = now + ANSWER_OVERDUE_SECONDS
            self._due(question.watched, question.watched.not_before)

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
        if age > self._timing.age(watched, 0.99) + LONGEST_INTERVAL_SECONDS:
            self._overdue.add(watched.prediction.id)
        if by_id and watched.insisted:  # a row knew better, or a cancel takes its time: again, patiently
            watched.insisted = watched.failures < INSISTED_TIMES
            self.back_off(watched, now)
            return
        if by_id:
            watched.failures, watched.doubtful, watched.not_before = 0, False, 0.0
        elif self._timing.straggles(watched) and age > 2.0 * watched.doubted_at_age:
            watched.doubtful, watched.doubted_at_age = True, age
        if not watched.insisted:
            again_at = self._again_at(watched, self._timing.interval(watched))
            self._due(watched, max(self._timing.start_at(watched), again_at))

    def learned(self, model: str | None) -> None:
        """Its durations have changed: where it turns out much faster than thought, look sooner."""
        early = self._durations.quantile(model, 0.05)
        if early > 0.75 * self._early.get(model, math.inf):
            self._early[model] = max(early, self._early.get(model, early))
            return
        self._early[model] = early
        for watched in self.watched.values():
            if watched.prediction.model == model and watched.pending_at is None and not watched.insisted:
                self._due(watched, max(watched.not_before, self._timing.start_at(watched)))

    def _due(self, watched: Watched, at: float) -> None:
        watched.due_at = at
        heap = self._insisted if watched.insisted else self._common
        heapq.heappush(heap, (at, watched))
        if len(heap) > STALE_ENTRIES + 4 * len(self.watched):
            heap[:] = [entry for entry in heap if self._holds_true(heap, *entry)]
            heapq.heapify(heap)

    def _holds_true(self, heap: _Heap, at: float, watched: Watched) -> bool:
        in_place = watched.insisted is (heap is self._insisted)
        return in_place and watched.due_at == at and self.watched.get(watched.prediction.id) is watched

    def _first(self, heap: _Heap) -> Watched | None:
        """The first of a heap whose entry still holds."""
        while heap and not self._holds_true(heap, *heap[0]):
            heapq.heappop(heap)
        return heap[0][1] if heap else None

    def _again_at(self, watched: Watched, interval: float) -> float:
        alone = watched.alone or not self._sweeping.allowed(watched.pending_at or 0.0)
        rationed_among = len(self._overdue) if alone and watched.prediction.id in self._overdue else 0
        return max(watched.not_before, self._timing.again_at(watched, interval, rationed_among=rationed_among))

    # ---- the decision

    def wants_place_in_hand(self) -> bool:
        """Whether to have a request slot ready before it is needed."""
        return self._timing.wants_place_in_hand(self.watched.values())

    def decide(self, now: float) -> Question | float:
        """What to ask now; or when to look again, should nothing happen before."""
        if not self.watched:
            return math.inf
        if now < self.quiet_until:
            return self.quiet_until
        insisted = self._first(self._insisted)
        if insisted is not None and insisted.due_at <= now and self.asking < INSISTED_AT_ONCE:
            return Question(insisted)
        choice = self._late(now) if self._timing.scarce(self.watched.values()) else self._soon(now)
        if isinstance(choice, float) and insisted is not None and insisted.due_at > now:
            return min(choice, insisted.due_at)
        return choice

    def _may_sweep(self, now: float) -> bool:
        overdue = self.sweep_is_out and now >= self._sweep_sent_at + SWEEP_OVERDUE_SECONDS
        return self._sweeping.allowed(now) and not overdue

    def _sweep(self, oldest: Watched) -> Question:
        return Question(oldest, offset=self.listing.offset_for(oldest.number))

    def _soon(self, now: float) -> Question | float:
        first = self._first(self._common)
        if first is None:
            return math.inf
        if first.due_at > now:
            return first.due_at
        held = self.holds and self.asking < HELD_AT_ONCE
        if not first.alone and not held and self._may_sweep(now):
            if self.sweep_is_out:
                return self._sweep_sent_at + SWEEP_OVERDUE_SECONDS
            interval = self._timing.interval(first)
            if self._another_is_due(now + interval):
                at = self._sweep_sent_at + self._sweep_spacing
                if at > now:
                    return at
                due = sum(1 for one in self.watched.values() if one.due_at <= now + interval)
                self._sweep_spacing = interval / math.ceil(due / ROWS_COUNTED_ON)
                return self._sweep(first)
        return Question(first) if self.asking < QUESTIONS_AT_ONCE else math.inf

    def _another_is_due(self, by: float) -> bool:
        """Whether a sweep would tell of more than the first."""
        first = heapq.heappop(self._common)
        second = self._first(self._common)
        heapq.heappush(self._common, first)
        return second is not None and second is not first[1] and second.due_at <= by

    def _late(self, now: float) -> Question | float:
        swept: _Heap = []
        asked: _Heap = []
        may_sweep = self._may_sweep(now)
        for watched in self.watched.values():
            if not watched.insisted:
                by_sweep = may_sweep and not watched.alone and self._sweeping.believes(watched.prediction)
                (swept if by_sweep else asked).append((self._late_at(watched, by_sweep=by_sweep), watched))
        if len(swept) == 1:
            watched = swept.pop()[1]
            asked.append((self._late_at(watched, by_sweep=False), watched))
        again_at = now + LOOK_SECONDS
        if swept and not self.sweep_is_out:
            sweep_at = self._sweep_at(swept)
            if sweep_at <= now:
                return self._sweep(min(swept)[1])
            again_at = min(again_at, sweep_at)
        if asked and self.asking < QUESTIONS_AT_ONCE:
            at, watched = min(asked)
            if at <= now:
                return Question(watched)
            again_at = min(again_at, at)
        return again_at

    def _late_at(self, watched: Watched, *, by_sweep: bool) -> float:
        again_at = self._again_at(watched, STRAGGLE_SHARE * self._timing.age(watched, 0.5))
        return max(watched.began_at + self._timing.late_age(watched, by_sweep=by_sweep), again_at)

    def _sweep_at(self, swept: _Heap) -> float:
        """When a sweep is worth its request: stragglers are told of by the sweeps for the others."""
        times = sorted(at for at, watched in swept if not self._timing.straggles(watched))
        if not times:
            return min(at for at, _ in swept)
        at = times[math.ceil(GROUP_SHARE * len(times)) - 1]
        if self._timing.creates_wait_for_requests():
            at = times[0] + HOLD_SECONDS
        return min(at, times[ENOUGH_ROWS - 1]) if len(times) >= ENOUGH_ROWS else at
