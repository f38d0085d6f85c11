"""Whether the list of executions may be asked, and how far its rows are believed; pure, the time handed in.

One page of executions can tell the ends of a hundred predictions for one request. But its rows hold one output at
most, and whether it is as fresh as GET by id is unknown: so it is checked as it goes, and left alone for a while
where it is missing, refused, blind or stale.
"""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from prefect_eachlabs.errors import EachlabsError, Rejected
from prefect_eachlabs.models import DEFAULT_MODEL, Execution, Prediction, PredictionStatus

logger = logging.getLogger(__name__)

STOPPED_SECONDS = 600.0
"""Sweeping that was given up is tried again after so long."""
STRIKES = 2
"""So many contradictions, or blind pages in a row, and sweeping is given up."""
STALE_SECONDS = 2.0
"""A page that is behind by less than this is fresh enough."""
_LONGEST_BACK_OFF_SECONDS = 60.0

_ENDED_REMEMBERED = 200
_COUNTS = ("num_images", "n", "samples", "num_outputs", "batch_size", "num_samples", "number_of_images")


def names_several(input: Mapping[str, Any] | None) -> bool:
    """Whether an input asks for more than one picture."""
    for name in _COUNTS:
        try:
            if input and float(input.get(name) or 0) > 1:
                return True
        except (TypeError, ValueError):
            continue
    return False


class Sweeping:
    """What is known about the list of executions of this account."""

    def __init__(self) -> None:
        self._not_before = 0.0
        self._failures = 0
        self._stale = 0
        self._blind = 0
        self._ended: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._single: dict[str, bool] = {DEFAULT_MODEL: True}

    def allowed(self, now: float) -> bool:
        """Whether the list may be asked now."""
        return now >= self._not_before

    @property
    def not_before(self) -> float:
        return self._not_before

    # ---- what a row is worth

    def believes(self, prediction: Prediction, model: str | None = None) -> bool:
        """Whether a row's one output is all of this prediction's output.

        The mission's model makes one picture; of any other model the first end is learned by id, and an input that
        is not known may ask for several.
        """
        model = prediction.model or model
        if model is None or not self._single.get(model, False) or names_several(prediction.input):
            return False
        return prediction.input is not None or model == DEFAULT_MODEL

    def learned_by_id(self, ended: Prediction, began_at: float, now: float) -> None:
        """An end that was asked for by id tells whether its model makes one picture, and how fresh the list is."""
        self._ended[ended.id] = (began_at + (ended.predict_time_seconds or math.inf), now)
        if len(self._ended) > _ENDED_REMEMBERED:
            self._ended.popitem(last=False)
        if ended.model is None or ended.status is not PredictionStatus.SUCCEEDED:
            return
        if len(ended.output_urls) != 1:
            self._single[ended.model] = False
        elif not names_several(ended.input):
            self._single.setdefault(ended.model, True)

    @staticmethod
    def tells_the_end(row: Execution) -> bool:
        """Whether a row says all there is to say: success, with one picture."""
        return row.status is PredictionStatus.SUCCEEDED and len(row.output_urls) == 1

    # ---- whether the list is worth its requests

    def answered(self, *, expected: int, shown: int, now: float) -> None:
        """A page came; so many of our predictions that are old enough were expected on it, so many were there."""
        self._failures = 0
        if shown:
            self._blind = 0
        elif expected >= 2:
            self._blind += 1
            if self._blind >= STRIKES:
                self._stop("it does not show this account's predictions", now)

    def shows_pending(self, prediction_id: str, sent_at: float, now: float) -> None:
        """A page that was asked for at `sent_at` shows a prediction as pending that is not watched (any more)."""
        ended_at, seen_at = self._ended.get(prediction_id, (math.inf, math.inf))
        if seen_at > sent_at or min(ended_at, seen_at) > sent_at - STALE_SECONDS:
            return
        del self._ended[prediction_id]
        self._stale += 1
        if self._stale >= STRIKES:
            self._stop("it is behind what GET by id says", now)

    def failed(self, error: Exception, now: float) -> None:
        """The list was asked and did not answer with a page."""
        if isinstance(error, Rejected):  # missing (404, 405), refused (401, 403) or not to be asked like that (400)
            self._stop(str(error), now)
            return
        self._failures += 1
        self._not_before = max(self._not_before, now + min(2.0 ** min(self._failures, 10), _LONGEST_BACK_OFF_SECONDS))
        if not isinstance(error, EachlabsError):
            logger.error(
                "Asking for the list of executions failed unexpectedly; asking by id meanwhile.", exc_info=error
            )

    def _stop(self, reason: str, now: float) -> None:
        self._stale = self._blind = 0
        self._not_before = max(self._not_before, now + STOPPED_SECONDS)
        logger.info(
            "The list of executions is left alone for %.0f min, predictions are asked for by id: %s",
            STOPPED_SECONDS / 60,
            reason,
        )
