"""When a question about a prediction is worth a request: by its model's durations, and by what requests are worth.

Requests are *scarce* when a request spent on asking is one that cannot create: then questions wait until they are
nearly sure to find an end. Else they begin early and repeat, in intervals that grow as the window fills.
"""

from __future__ import annotations

from collections.abc import Iterable

from prefect_eachlabs.limits.limiter import Kind, RateLimiter
from prefect_eachlabs.polling.durations import PRIOR_SECONDS, Durations
from prefect_eachlabs.polling.watched import Watched

LONGEST_INTERVAL_SECONDS = 60.0
LATE_SHARE_SWEPT = 0.9
"""A sweep may find one of ten still pending: the next sweep tells of it."""
LATE_SHARE_ASKED = 0.97
"""A question by id that finds its prediction pending is lost: ask later."""
STRAGGLER_FACTOR = 1.3
"""Who is pending beyond so many times the 99 % duration is waited for by itself, not with the others."""
FIRST_LOOK_SECONDS = 0.3
"""Without a limit, at a model whose durations nobody knows."""
IN_HAND_PRESSURE = 0.8


class Timing:
    """Turns durations and pressure into times; all times are the loop's."""

    def __init__(self, limiter: RateLimiter, durations: Durations) -> None:
        self._limiter = limiter
        self._durations = durations

    def age(self, watched: Watched, share: float) -> float:
        """The age that this share of its model's predictions does not exceed."""
        return self._durations.quantile(watched.prediction.model, share)

    def straggles(self, watched: Watched) -> bool:
        """Whether it was found pending at an age that hardly any reaches."""
        if watched.pending_at is None:
            return False
        return watched.pending_at - watched.began_at > STRAGGLER_FACTOR * self.age(watched, 0.99)

    # ---- what requests are worth

    def limit(self) -> int | None:
        return self._limiter.limit(Kind.REQUESTS)

    def pressure(self) -> float:
        return self._limiter.pressure(Kind.REQUESTS)

    def creates_wait_for_requests(self) -> bool:
        return self._limiter.requests_waiting > 0

    def scarce(self, watched: Iterable[Watched]) -> bool:
        """Whether a request spent on asking is missing for creating.

        That is so when creates wait for requests; and when they wait for slots in flight, but would fill the
        window if those came back as fast as they can.
        """
        limit = self.limit()
        if limit is None:
            return False
        if self._limiter.requests_waiting:
            return True
        in_flight = self._limiter.limit(Kind.IN_FLIGHT)
        if in_flight is None:
            return False
        pressure = self.pressure()
        if not self._limiter.in_flight_waiting and (pressure < 0.3 or self._limiter.pressure(Kind.IN_FLIGHT) < 1.0):
            return False
        seconds = next((self.age(one, 0.5) for one in watched), PRIOR_SECONDS)
        return pressure > 0.9 or limit <= 1.5 * 60.0 * in_flight / max(seconds, 0.01)

    def wants_place_in_hand(self, watched: Iterable[Watched]) -> bool:
        """Whether to have a slot ready before it is needed.

        Else creates take the last ones, and ten finished pictures wait for one place to come back.
        """
        return self.pressure() >= IN_HAND_PRESSURE and self.scarce(watched)

    # ---- where requests are free

    def start_at(self, watched: Watched) -> float:
        """When to look for the first time: the fuller the window, the later."""
        model = watched.prediction.model
        if self.limit() is not None:
            return watched.began_at + self.age(watched, max(0.05, min(self.pressure(), 0.95)))
        if not self._durations.known(model):
            return watched.began_at + FIRST_LOOK_SECONDS
        return watched.began_at + self.age(watched, 0.05)

    def interval(self, watched: Watched) -> float:
        """Between two looks: 3 % of the usual duration; under a limit, what takes a tenth of it or less."""
        shortest = min(max(0.03 * self.age(watched, 0.5), 0.05), 0.25)
        limit = self.limit()
        if limit is None:
            return shortest
        relaxed = min(max(600.0 / limit, shortest), 0.5)
        return min(5.0, relaxed * max(1.0, 0.3 / max(1.0 - self.pressure(), 0.01)))

    def again_at(self, watched: Watched, interval: float, *, rationed_among: int = 0) -> float:
        """After it was found pending: further apart the longer it is overdue.

        Args:
            watched: Was found pending (else: at once).
            interval: The shortest.
            rationed_among: So many are long overdue and can only be asked about one by one: all of them together
                get a quarter of the requests.
        """
        if watched.pending_at is None:
            return 0.0
        beyond = watched.pending_at - watched.began_at - self.age(watched, 0.99)
        interval = max(interval, min(0.1 * beyond, LONGEST_INTERVAL_SECONDS))
        limit = self.limit()
        if rationed_among and limit is not None:
            interval = max(interval, 240.0 * rationed_among / limit)
        return watched.pending_at + interval

    # ---- where requests are scarce

    def late_age(self, watched: Watched, *, by_sweep: bool) -> float:
        """The age at which its end is nearly sure; a long tail is no reason to wait for it with all the others."""
        age = self.age(watched, LATE_SHARE_SWEPT)
        return age if by_sweep else min(1.25 * age, self.age(watched, LATE_SHARE_ASKED))
