"""What to ask the API now, and when to look again: the poller's policy. Pure; all times are the loop's.

Two inequalities decide.

*By the list or by id?* A page of executions costs one request and tells of all that are due, a question by id tells
of one: so the list is asked when more than one prediction that it can tell of is due.

*Soon or late?* Asked soon, each picture costs its create and about half a request more. Slots in flight that come
back at once allow `60 * max_in_flight / typical_seconds` creates a minute: when one and a half times that exceeds the
requests that a minute has, every question takes the place of a create. Then nothing is asked before it is nearly sure
to find an end, and the list not before most of the group have ended. Else questions begin early and repeat.
"""

from __future__ import annotations

import asyncio
import math
from bisect import insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from prefect_eachlabs.limits.limiter import Kind, RateLimiter, Slot
from prefect_eachlabs.models import Prediction
from prefect_eachlabs.polling.execution_list import PAGE_ROWS, ExecutionList

PRIOR_SECONDS = 5.0
"""What the model's page states."""
SHAPE = (0.7, 0.8, 0.88, 0.95, 1.0, 1.05, 1.12, 1.25, 1.4)
"""How durations spread around their median, as long as few have been seen."""
FEW = 20
REMEMBERED = 40
"""An API that was slow for a while and is fast again is believed soon."""

LATE_SHARE_LISTED = 0.9
"""A page may find one of ten still pending: the next page tells of it."""
LATE_SHARE_BY_ID = 0.97
"""A question by id that finds its prediction pending was wasted: ask later."""
GROUP_SHARE = 0.9
"""A page waits until so many of the group are at their late age: a straggler must not hold the others up."""
ENOUGH_ROWS = 20
"""A page that is expected to tell so many ends costs less than 5 % of the requests: it waits for no more."""
HOLD_SECONDS = 6.0
"""While creates wait for requests, a page frees nothing that they could use: it waits for more ends."""
STRAGGLER_FACTOR = 1.3
"""Who is pending beyond so many times the 99 % duration is waited for by itself, not with the others."""
LOOK_SECONDS = 0.5
"""Under a tight limit things change without a word (a batch has no more to create): look twice a second."""
FIRST_LOOK_SECONDS = 0.3
"""Without a limit, at a model whose durations nobody knows."""
LONGEST_INTERVAL_SECONDS = 60.0
BY_ID_AT_ONCE = 64
"""The client's connections must suffice for creates and pages as well."""
BY_ID_OVERDUE_SECONDS = 30.0
"""A question by id that is out for so long is no reason not to ask again."""
PAGE_OVERDUE_SECONDS = 3.0
"""A page that is out for so long is not waited for: ask by id."""
ROWS_ABOVE = 75
"""A page beyond the first shows so many of those created after the one it is asked for."""
SPARE_ROWS = 10
"""Creations within a second of each other may be listed either way round, and others' rows come in between."""
CALL_SECONDS = 30.0
"""The vendor calls three times, some 10 s apart: so long after its likely end a prediction's call is waited for."""
LISTED_WITHIN_SECONDS = 1.0
"""A page that was asked for sooner after the creation need not show it."""


class Durations:
    """Seconds from a prediction's creation to its end: quantiles of a model's last 40."""

    def __init__(self) -> None:
        self._seen: dict[str | None, deque[float]] = {}
        self._sorted: dict[str | None, list[float]] = {}
        self._unknown = [PRIOR_SECONDS * part for part in SHAPE]

    def known(self, model: str | None) -> bool:
        """Whether an end of this model has been seen."""
        return model in self._seen

    def quantile(self, model: str | None, share: float) -> float:
        """The duration that this share of the model's predictions does not exceed."""
        values = self._sorted.get(model, self._unknown)
        position = share * (len(values) - 1)
        low = int(position)
        high = min(low + 1, len(values) - 1)
        return values[low] + (values[high] - values[low]) * (position - low)

    def learn(self, model: str | None, *, told_seconds: float | None, pending_at: float, ended_at: float) -> None:
        """Learns from one end.

        "It took until we asked" would make the next question later still, and so on without end: so a sample lies
        between what is certain, the age at which it was last seen pending and the one at which it was seen ended.

        Args:
            model: The model's slug.
            told_seconds: The API's own figure (`predict_time`, `run_time`), when it gave one.
            pending_at: The highest age in seconds at which it was seen pending, 0 when it never was.
            ended_at: The age in seconds at which it was seen ended.
        """
        ended_at = max(pending_at, ended_at)
        usual = self.quantile(model, 0.5)
        if told_seconds is not None and pending_at <= told_seconds <= ended_at:
            seconds = told_seconds
        elif pending_at > 0:
            seconds = min((pending_at + ended_at) / 2, pending_at + 0.2 * usual)
        else:  # "before we asked" and no more: the guess goes down a little, until a question finds one pending
            seconds = min(ended_at, 0.95 * usual)
        if seconds <= 0:
            return
        seen = self._seen.setdefault(model, deque(maxlen=REMEMBERED))
        seen.append(seconds)
        values = sorted(seen)
        if len(values) < FEW:
            # Two that took what the page states hold the first down: one that took an hour makes nobody wait for hours.
            middles = sorted([*values, PRIOR_SECONDS, PRIOR_SECONDS])
            middle = max(values[len(values) // 2], 0.0) if values[-1] <= PRIOR_SECONDS else middles[len(middles) // 2]
            values = [min(value, 2 * middle) for value in values]
            for part in SHAPE:
                insort(values, middle * part)
        self._sorted[model] = values


@dataclass(eq=False)
class Watched:
    """A prediction whose end is not known yet, and what has been learned about it so far."""

    prediction: Prediction
    future: asyncio.Future[Prediction]
    slot: Slot | None
    watched_at: float
    began_at: float
    """Its creation, as far as known."""
    created_here: bool
    """Whether it was watched right from its creation: its age is certain, and its number says where it is listed."""
    number: int
    """Counts what is watched: whose number is higher stands higher in the list of executions."""
    not_before: float = 0.0
    """A back-off, or a question that is out."""
    insisted: bool = False
    """It is asked about by id as soon as there is a slot: a row says that it ended, or somebody is in a hurry."""
    by_id: bool = False
    """The list does not show it, or says pending for longer than is likely."""
    calls: bool = False
    """The vendor was asked to call when it ends."""
    doubted_at_age: float = 0.0
    pending_at: float | None = None
    """When the last question was sent that found it pending."""
    failures: int = 0
    without_output_since: float | None = None
    """When it was first said to have succeeded, and its output was not there yet."""
    release: asyncio.TimerHandle | None = None
    """Gives its slot back when nobody has seen its end for too long."""

    def take_over(self, slot: Slot | None) -> None:
        """Its slot in flight; of two the second is given back at once."""
        if self.slot is None:
            self.slot = slot
        elif slot is not None and slot is not self.slot:
            slot.done()

    def give_back_slot(self) -> None:
        if self.release is not None:
            self.release.cancel()
            self.release = None
        if self.slot is not None:
            self.slot.done()
            self.slot = None

    def know_more(self, prediction: Prediction) -> None:
        """It was known by its id alone, perhaps, and now comes with its input."""
        known = self.prediction
        more = {name: value for name, value in prediction if value is not None and getattr(known, name) is None}
        if more:
            self.prediction = known.model_copy(update=more)


@dataclass(frozen=True)
class Question:
    """One request: about one prediction by id, or (with an offset) the page of executions that it should be on."""

    watched: Watched
    offset: int | None = None
    newest: int = 0
    """The number of the newest prediction when the page was asked for."""


class Schedule:
    """All that is watched, and what of it to ask about now."""

    def __init__(self, limiter: RateLimiter, executions: ExecutionList, durations: Durations) -> None:
        self.watched: dict[str, Watched] = {}
        self.newest = 0
        """The number of the newest prediction."""
        self.quiet_until = 0.0
        """The API throttles questions too: nothing is asked before."""
        self.calls_come = False
        """The vendor's calls are seen to come: who waits for one is not asked about before its call is overdue."""
        self._limiter = limiter
        self._limit: int | None = None
        self._pressure = 0.0
        """Of requests, at the last decision."""
        self._executions = executions
        self._durations = durations
        self._by_id_out = 0
        self._page_is_out = False
        self._page_sent_at = -math.inf

    # ---- what comes and goes

    def sent(self, question: Question, now: float) -> None:
        """A question goes out."""
        if question.offset is not None:
            self._page_is_out, self._page_sent_at = True, now
        else:
            self._by_id_out += 1
            question.watched.not_before = now + BY_ID_OVERDUE_SECONDS

    def came_back(self, question: Question) -> None:
        """It was answered, or was not."""
        if question.offset is not None:
            self._page_is_out = False
        else:
            self._by_id_out -= 1
            question.watched.not_before = 0.0

    def back_off(self, watched: Watched, now: float) -> None:
        """A question got no answer, or one that contradicts another: ask again, later each time."""
        watched.failures += 1
        watched.not_before = now + min(0.25 * 2.0 ** min(watched.failures, 10), LONGEST_INTERVAL_SECONDS)

    def found_pending(self, watched: Watched, sent_at: float, now: float, *, by_id: bool) -> None:
        """An answer says that it had not ended when the question was sent."""
        watched.pending_at = max(sent_at, watched.pending_at or sent_at)
        age = sent_at - watched.began_at
        if by_id and watched.insisted:  # a row knew better, or a cancel takes its time: again, patiently
            watched.insisted = watched.failures < 5
            self.back_off(watched, now)
        elif by_id:
            watched.failures, watched.by_id = 0, False
        elif self._straggles(watched) and age > 2.0 * watched.doubted_at_age:
            watched.by_id, watched.doubted_at_age = True, age

    def left_out(self, page: Question, shown: Sequence[Watched], sent_at: float) -> list[Watched]:
        """Those that a page should have shown and did not: the one it was asked for, and those around it."""
        known = {id(one) for one in shown}
        last = page.newest - (page.offset or 0)
        return [
            one
            for one in self.watched.values()
            if id(one) not in known
            and one.watched_at < sent_at - LISTED_WITHIN_SECONDS
            and (
                one is page.watched
                or (
                    one.created_here
                    and last - PAGE_ROWS + SPARE_ROWS < one.number <= last - SPARE_ROWS * bool(page.offset)
                )
            )
        ]

    # ---- the decision

    def decide(self, now: float) -> Question | float:
        """What to ask now; or when to look again, should nothing happen before."""
        if not self.watched or now < self.quiet_until:
            return self.quiet_until if self.watched else math.inf
        if self._by_id_out < BY_ID_AT_ONCE + 8:
            insisted = [one for one in self.watched.values() if one.insisted]
            if insisted and (first := min(insisted, key=lambda one: one.not_before)).not_before <= now:
                return Question(first)
        else:
            insisted = []
        self._limit, self._pressure = self._limiter.limit(Kind.REQUESTS), self._limiter.pressure(Kind.REQUESTS)
        choice = self._late(now) if self._scarce() else self._soon(now)
        if isinstance(choice, float):
            overdue = [self.call_until(one) for one in self.watched.values() if self._awaits_call(one, now)]
            return min([choice, *(one.not_before for one in insisted), *overdue])
        return choice

    def wants_slot_in_hand(self, now: float) -> bool:
        """Whether to have a request slot before it is needed.

        Else creates take the last ones, and ten finished pictures wait for one slot to come back.
        """
        return bool(self._askable(now)) and self._limiter.pressure(Kind.REQUESTS) >= 0.8 and self._scarce()

    def ended_after(self, watched: Watched) -> float:
        """When it was seen pending, or nearly none of its model has ended yet."""
        return max(watched.pending_at or -math.inf, watched.began_at + self._age(watched, 0.05))

    def call_until(self, watched: Watched) -> float:
        """Until when its call is waited for."""
        return watched.began_at + self._age(watched, 0.99) + CALL_SECONDS

    def _awaits_call(self, watched: Watched, now: float) -> bool:
        return self.calls_come and watched.calls and not watched.insisted and now < self.call_until(watched)

    def _askable(self, now: float) -> list[Watched]:
        """Those that nobody is about to tell of."""
        return [one for one in self.watched.values() if not self._awaits_call(one, now)]

    def _age(self, watched: Watched, share: float) -> float:
        return self._durations.quantile(watched.prediction.model, share)

    def _straggles(self, watched: Watched) -> bool:
        """Whether it was found pending at an age that hardly any reaches."""
        if watched.pending_at is None:
            return False
        return watched.pending_at - watched.began_at > STRAGGLER_FACTOR * self._age(watched, 0.99)

    def _scarce(self) -> bool:
        """Whether a request spent on asking is missing for creating (see above)."""
        limit = self._limiter.limit(Kind.REQUESTS)
        if limit is None:
            return False
        if self._limiter.requests_waiting:
            return True
        in_flight = self._limiter.limit(Kind.IN_FLIGHT)
        pressure = self._limiter.pressure(Kind.REQUESTS)
        all_taken = self._limiter.pressure(Kind.IN_FLIGHT) >= 1.0 and pressure >= 0.3
        if in_flight is None or not (self._limiter.in_flight_waiting or all_taken):
            return False
        typical_seconds = next((self._age(one, 0.5) for one in self.watched.values()), PRIOR_SECONDS)
        return pressure > 0.9 or 1.5 * 60.0 * in_flight / max(typical_seconds, 0.01) >= limit

    def _page_may_tell(self, watched: Watched) -> bool:
        return not watched.by_id and not watched.insisted

    def _may_ask_list(self, now: float) -> bool:
        return self._executions.allowed(now) and not (
            self._page_is_out and now >= self._page_sent_at + PAGE_OVERDUE_SECONDS
        )

    def _page_for(self, oldest: Watched) -> Question:
        row = self.newest - oldest.number
        return Question(oldest, offset=0 if row < PAGE_ROWS - SPARE_ROWS else row - ROWS_ABOVE, newest=self.newest)

    def _again_at(self, watched: Watched, interval: float) -> float:
        """After it was found pending: further apart the longer it is overdue."""
        if watched.pending_at is None:
            return watched.not_before
        beyond = watched.pending_at - watched.began_at - self._age(watched, 0.99)
        return max(watched.not_before, watched.pending_at + max(interval, min(0.1 * beyond, LONGEST_INTERVAL_SECONDS)))

    # ---- where requests are free

    def _interval(self, watched: Watched) -> float:
        """Between two looks: 3 % of the usual duration; under a limit a tenth of it or less, more as it fills."""
        shortest = min(max(0.03 * self._age(watched, 0.5), 0.05), 0.25)
        if self._limit is None:
            return shortest
        relaxed = min(max(600.0 / self._limit, shortest), 0.5)
        return min(5.0, relaxed * max(1.0, 0.3 / max(1.0 - self._pressure, 0.01)))

    def _soon_at(self, watched: Watched) -> float:
        if self._limit is not None:
            age = self._age(watched, max(0.05, min(self._pressure, 0.95)))
        elif not self._durations.known(watched.prediction.model):
            age = FIRST_LOOK_SECONDS
        else:
            age = self._age(watched, 0.05)
        return max(watched.began_at + age, self._again_at(watched, self._interval(watched)))

    def _soon(self, now: float) -> Question | float:
        due = [(self._soon_at(one), one.number, one) for one in self._askable(now) if not one.insisted]
        if not due:
            return math.inf
        at, _, first = min(due)
        if at > now:
            return at
        if self._page_may_tell(first) and self._may_ask_list(now):
            if self._page_is_out:
                return self._page_sent_at + PAGE_OVERDUE_SECONDS
            interval = self._interval(first)
            told = sum(1 for at, _, one in due if at <= now + interval and self._page_may_tell(one))
            if told > 1:
                next_page_at = self._page_sent_at + interval / math.ceil(told / ROWS_ABOVE)
                return self._page_for(first) if next_page_at <= now else next_page_at
        return Question(first) if self._by_id_out < BY_ID_AT_ONCE else math.inf

    # ---- where requests are scarce

    def _late_at(self, watched: Watched, *, listed: bool) -> float:
        age = self._age(watched, LATE_SHARE_LISTED)
        if not listed:  # a long tail is no reason to wait for it with all the others
            age = min(1.25 * age, self._age(watched, LATE_SHARE_BY_ID))
        return max(watched.began_at + age, self._again_at(watched, 0.2 * self._age(watched, 0.5)))

    def _late(self, now: float) -> Question | float:
        may_list = self._may_ask_list(now)
        askable = self._askable(now)
        if not askable:
            return math.inf
        listed = [
            one
            for one in askable
            if may_list and self._page_may_tell(one) and self._executions.believes(one.prediction)
        ]
        if len(listed) == 1:
            listed = []
        on_list = {id(one) for one in listed}
        again_at = now + LOOK_SECONDS
        if listed and not self._page_is_out:
            page_at = self._page_at(listed)
            if page_at <= now:
                return self._page_for(min(listed, key=lambda one: one.number))
            again_at = min(again_at, page_at)
        by_id = [
            (self._late_at(one, listed=False), one.number, one)
            for one in askable
            if id(one) not in on_list and not one.insisted and not (may_list and self._waits_for_another(one))
        ]
        if by_id and self._by_id_out < BY_ID_AT_ONCE:
            at, _, watched = min(by_id)
            if at <= now:
                return Question(watched)
            again_at = min(again_at, at)
        return again_at

    def _waits_for_another(self, watched: Watched) -> bool:
        """Whether the first end of its model is about to tell if the list can be believed."""
        model = watched.prediction.model
        if not self._page_may_tell(watched) or self._executions.knows(model):
            return False
        return any(
            one.number < watched.number and one.prediction.model == model and not self._straggles(one)
            for one in self.watched.values()
        )

    def _page_at(self, listed: Sequence[Watched]) -> float:
        """When a page is worth its request; stragglers are told of by the pages for the others."""
        times = sorted(self._late_at(one, listed=True) for one in listed if not self._straggles(one))
        if not times:
            return min(self._late_at(one, listed=True) for one in listed)
        at = times[math.ceil(GROUP_SHARE * len(times)) - 1]
        if self._limiter.requests_waiting:
            at = times[0] + HOLD_SECONDS
        return min(at, times[ENOUGH_ROWS - 1]) if len(times) >= ENOUGH_ROWS else at
