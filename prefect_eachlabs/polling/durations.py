"""How long predictions take, model by model, learned from the ends that were seen; pure.

An end is seen some time after it happened, later the tighter the limit is. Learning "it took until we asked" would
make the next question later still, and so on without end; so each sample is what the API tells, kept between what
is certain: the age at which it was last seen pending, and the age at which it was seen ended.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque

PRIOR_SECONDS = 5.0
"""What the model's page states."""
_SHAPE = (0.7, 0.8, 0.88, 0.95, 1.0, 1.05, 1.12, 1.25, 1.4)
"""How durations spread around their median, as long as few have been seen."""
_FEW = 20
_PRIOR_WEIGHT = 2
"""The first few are held down towards the prior: one prediction that took an hour must not make us wait for hours."""
_SAMPLE_SIZE = 40
"""Small, for an API that was slow for a while and is fast again must be believed soon."""
_STRAGGLE = 0.2
"""How much longer than it was last seen pending something takes, in medians, where nothing better is known."""
_CREEP = 0.95
"""Where nothing is told and an end says only "before we asked", the guess goes down a little: if that is too low,
a question finds its prediction pending and corrects it."""


class _Sample:
    """The last durations of one model, sorted as well."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque()
        self._sorted: list[float] = []
        self._filled_up: list[float] = [PRIOR_SECONDS * part for part in _SHAPE]

    def add(self, seconds: float) -> None:
        self._recent.append(seconds)
        insort(self._sorted, seconds)
        if len(self._recent) > _SAMPLE_SIZE:
            del self._sorted[bisect_left(self._sorted, self._recent.popleft())]
        if len(self._sorted) < _FEW:
            seen = len(self._sorted)
            middle = self._sorted[seen // 2]
            if middle > PRIOR_SECONDS:
                middle = (PRIOR_SECONDS**_PRIOR_WEIGHT * middle**seen) ** (1 / (_PRIOR_WEIGHT + seen))
            held_down = [min(seconds, 2 * middle) for seconds in self._sorted]
            self._filled_up = sorted(held_down + [middle * part for part in _SHAPE])
        else:
            self._filled_up = self._sorted

    def quantile(self, share: float) -> float:
        values = self._filled_up
        slot = share * (len(values) - 1)
        low = int(slot)
        high = min(low + 1, len(values) - 1)
        return values[low] + (values[high] - values[low]) * (slot - low)

    def __len__(self) -> int:
        return len(self._recent)


_PRIOR = _Sample()


class Durations:
    """Seconds from a prediction's creation to its end, by model (None: a model not known by name)."""

    def __init__(self) -> None:
        self._samples: dict[str | None, _Sample] = {}

    def known(self, model: str | None) -> bool:
        """Whether an end of this model has been seen."""
        return model in self._samples

    def quantile(self, model: str | None, share: float) -> float:
        """The duration that this share of the model's predictions does not exceed."""
        return self._samples.get(model, _PRIOR).quantile(share)

    def learn(
        self,
        model: str | None,
        *,
        told_seconds: float | None,
        pending_at_seconds: float,
        ended_at_seconds: float,
    ) -> None:
        """Learns from one end.

        Args:
            model: The model's slug.
            told_seconds: The API's own figure (`predict_time`, `run_time`), when it gave one.
            pending_at_seconds: The highest age at which it was seen pending, 0 when it never was.
            ended_at_seconds: The age at which it was seen ended.
        """
        low, high = pending_at_seconds, max(pending_at_seconds, ended_at_seconds)
        if told_seconds is not None and 0 < told_seconds <= high:
            seconds = told_seconds if told_seconds >= low else (low + high) / 2
        elif low > 0:
            seconds = min((low + high) / 2, low + _STRAGGLE * self.quantile(model, 0.5))
        else:
            seconds = min(high, _CREEP * self.quantile(model, 0.5))
        if seconds > 0:
            self._samples.setdefault(model, _Sample()).add(seconds)
