"""The list of executions: one page tells the ends of up to 100 predictions for one request. Pure, the time handed in.

Its rows hold one output at most, and it need not show every prediction: so a row is believed only where one picture is
all there is, and a list that is missing, refused or does not show this account's predictions is left alone for a while.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from prefect_eachlabs.errors import EachlabsError, Rejected
from prefect_eachlabs.models import DEFAULT_MODEL, Execution, Prediction, PredictionStatus

logger = logging.getLogger(__name__)

PAGE_ROWS = 100
LEFT_ALONE_SECONDS = 600.0
"""A list that is of no use is asked again after so long."""
PAGES_WITHOUT_OURS = 2
"""So many pages in a row that show none of ours, and the list is of no use."""
LONGEST_BACK_OFF_SECONDS = 60.0

_COUNTS = ("num_images", "n", "samples", "num_outputs", "batch_size", "num_samples", "number_of_images")


def names_several(input: Mapping[str, Any] | None) -> bool:
    """Whether an input asks for more than one picture."""
    for name in _COUNTS:
        try:
            if input and float(input.get(name) or 0) > 1:
                return True
        except (TypeError, ValueError, OverflowError):
            continue
    return False


class ExecutionList:
    """What is known about the list of executions of this account."""

    def __init__(self) -> None:
        self._not_before = -math.inf
        self._failures = 0
        self._pages_without_ours = 0
        self._makes_one_picture: dict[str | None, bool] = {}

    def allowed(self, now: float) -> bool:
        """Whether the list may be asked now."""
        return now >= self._not_before

    def knows(self, model: str | None) -> bool:
        """Whether an end of this model has told how many pictures it makes."""
        return model in self._makes_one_picture

    def believes(self, prediction: Prediction, model: str | None = None) -> bool:
        """Whether a row's one output is all of this prediction's output.

        Of each model the first end is learned by id: whoever answers with a list may answer with several. An input that
        is not known may ask for several as well, except the default model's.
        """
        model = prediction.model or model
        if model is None or not self._makes_one_picture.get(model, False) or names_several(prediction.input):
            return False
        return prediction.input is not None or model == DEFAULT_MODEL

    def learn(self, ended: Prediction) -> None:
        """An end that was asked for by id tells whether its model makes one picture."""
        if ended.model is None or ended.status is not PredictionStatus.SUCCEEDED:
            return
        if len(ended.output_urls) != 1 or ended.may_have_several:
            self._makes_one_picture[ended.model] = False
        elif not names_several(ended.input):
            self._makes_one_picture.setdefault(ended.model, True)

    @staticmethod
    def tells_the_end(row: Execution) -> bool:
        """Whether a row says all there is to say: success, with one picture."""
        return row.status is PredictionStatus.SUCCEEDED and len(row.output_urls) == 1

    def answered(self, *, expected: int, shown: int, now: float) -> None:
        """A page came; so many of ours should have been on it, so many were."""
        self._failures = 0
        if shown:
            self._pages_without_ours = 0
        elif expected >= 2:
            self._pages_without_ours += 1
            if self._pages_without_ours >= PAGES_WITHOUT_OURS:
                self._leave_alone("it does not show this account's predictions", now)

    def failed(self, error: Exception, now: float) -> None:
        """The list was asked and did not answer with a page."""
        if isinstance(error, Rejected):  # missing (404, 405), refused (401, 403) or not to be asked like that (400)
            self._leave_alone(str(error), now)
            return
        self._failures += 1
        self._not_before = max(self._not_before, now + min(2.0**self._failures, LONGEST_BACK_OFF_SECONDS))
        if not isinstance(error, EachlabsError):
            logger.error("The list of executions failed unexpectedly; asking by id meanwhile.", exc_info=error)

    def _leave_alone(self, reason: str, now: float) -> None:
        self._pages_without_ours = 0
        self._not_before = max(self._not_before, now + LEFT_ALONE_SECONDS)
        logger.info(
            "The list of executions is left alone for %.0f min, predictions are asked for by id: %s",
            LEFT_ALONE_SECONDS / 60,
            reason,
        )
