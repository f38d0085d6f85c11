"""What the answers to the watcher's questions mean: ends, patience, or giving up.

A row of executions is believed as far as `sweeping` says; where it says more than it can tell (an error, several
outputs), the prediction is asked about by id.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import OrderedDict
from datetime import datetime, timezone

from prefect_eachlabs.errors import EachlabsError, KeyRefused, PredictionTimedOut, Rejected, Throttled
from prefect_eachlabs.models import Execution, Prediction
from prefect_eachlabs.polling.durations import Durations
from prefect_eachlabs.polling.executions import Sweeping
from prefect_eachlabs.polling.schedule import Schedule
from prefect_eachlabs.polling.watched import Watched

logger = logging.getLogger(__name__)

ENDS_REMEMBERED = 10_000
UNKNOWN_ID_GRACE_SECONDS = 30.0
"""A prediction may be invisible right after its creation: a 404 counts only after so long."""
GIVEN_UP_SECONDS = 86_400.0
"""Outputs are kept for 24 h: after that there is nothing to be had."""
HELD_SECONDS = 1.0
"""A GET that took longer and came back with the end was held open by the API."""
KEY_GOOD_SECONDS = 60.0
"""An answer this recent shows that the key is accepted."""
LONGEST_QUIET_SECONDS = 120.0
_LONGEST_GROWN_QUIET_SECONDS = 30.0


class Answers:
    """Takes in answers and errors, and ends what has ended."""

    def __init__(self, schedule: Schedule, sweeping: Sweeping, durations: Durations) -> None:
        self._schedule = schedule
        self._sweeping = sweeping
        self._durations = durations
        self._ends: OrderedDict[str, Prediction] = OrderedDict()
        self._throttles_in_a_row = 0
        self._answered_at = -math.inf

    def end_of(self, prediction_id: str) -> Prediction | None:
        return self._ends.get(prediction_id)

    # ---- by id

    def told(self, watched: Watched, answer: Prediction, sent_at: float, now: float) -> None:
        """GET by id was answered."""
        self._throttles_in_a_row, self._answered_at = 0, now
        if not self._is_watched(watched):
            return
        held = now - sent_at > HELD_SECONDS
        if not answer.status.ended:
            self._schedule.holds = self._schedule.holds and held
            self._still_pending(watched, sent_at, now, by_id=True)
            return
        self._schedule.holds = self._schedule.holds or held
        end = _end_from_answer(watched.prediction, answer)
        self._sweeping.learned_by_id(end, watched.began_at if watched.age_known else math.inf, now)
        self._end(watched, end, now)

    def failed(self, watched: Watched, error: Exception, now: float) -> None:
        """GET by id was not answered, or with an error."""
        if isinstance(error, KeyRefused):
            # 403 where the key was just good: this prediction is not ours to see, the others are.
            only_this = error.status_code == 403 and now - self._answered_at < KEY_GOOD_SECONDS
            for one in [watched] if only_this else list(self._schedule.watched.values()):
                self._fail(one, error)
            return
        if isinstance(error, Throttled):
            self.throttled(error, now)
        elif not isinstance(error, EachlabsError):
            logger.error("Asking about prediction %s failed unexpectedly.", watched.prediction.id, exc_info=error)
        if not self._is_watched(watched):
            return
        unknown = isinstance(error, Rejected) and error.status_code == 404
        if unknown and now - watched.watched_at >= UNKNOWN_ID_GRACE_SECONDS:
            self._fail(watched, error)
        elif not self._gave_up(watched, now):
            self._schedule.back_off(watched, now)

    def throttled(self, error: Throttled, now: float) -> None:
        """Nothing is asked for a while."""
        self._throttles_in_a_row += 1
        grown = min(0.25 * 2.0 ** min(self._throttles_in_a_row, 10), _LONGEST_GROWN_QUIET_SECONDS)
        asked = min(error.retry_after_seconds or 0.0, LONGEST_QUIET_SECONDS)
        self._schedule.quiet_until = max(self._schedule.quiet_until, now + max(asked, grown))

    # ---- by sweep

    def page(
        self, rows: tuple[Execution, ...], *, offset: int, target: Watched, newest: int, sent_at: float, now: float
    ) -> None:
        """A page of executions came.

        Args:
            rows: As sent, newest first.
            offset: The number of the first row.
            target: The prediction it was asked for.
            newest: The number of the newest prediction when it was asked for.
            sent_at: When it was asked for.
            now: When it came.
        """
        self._throttles_in_a_row, self._answered_at = 0, now
        ours: list[tuple[int, Watched, Execution]] = []
        for number, row in enumerate(rows, start=offset):
            watched = self._schedule.watched.get(row.id)
            if watched is not None:
                ours.append((number, watched, row))
            elif not row.status.ended:
                self._sweeping.shows_pending(row.id, sent_at, now)
        listing = self._schedule.listing
        listing.learn([(number, watched) for number, watched, _ in ours], newest)
        left_out = listing.left_out(
            self._schedule.watched.values(), [w for _, w, _ in ours], target, sent_at, offset=offset, rows=len(rows)
        )
        for watched in left_out:
            watched.missing = True
        self._sweeping.answered(expected=0 if offset else len(ours) + len(left_out), shown=len(ours), now=now)
        for _, watched, row in ours:
            watched.missing = False
            if self._sweeping.tells_the_end(row) and self._sweeping.believes(watched.prediction, row.model):
                self._end(watched, _end_from_row(watched.prediction, row), now)
            elif row.status.ended:
                self._schedule.insist(watched, now)
            else:
                self._still_pending(watched, sent_at, now, by_id=False)

    def sweep_failed(self, error: Exception, now: float) -> None:
        """The list of executions was not answered with a page: predictions are asked about by id meanwhile."""
        if isinstance(error, Throttled):
            self.throttled(error, now)
        else:
            self._sweeping.failed(error, now)

    # ---- ends

    def remember(self, end: Prediction) -> None:
        self._ends[end.id] = end
        if len(self._ends) > ENDS_REMEMBERED:
            self._ends.popitem(last=False)

    def _is_watched(self, watched: Watched) -> bool:
        """A sweep may have told its end while the question was out."""
        return self._schedule.watched.get(watched.prediction.id) is watched

    def _still_pending(self, watched: Watched, sent_at: float, now: float, *, by_id: bool) -> None:
        if not self._gave_up(watched, now):
            self._schedule.found_pending(watched, sent_at, now, by_id=by_id)

    def _gave_up(self, watched: Watched, now: float) -> bool:
        if now - watched.watched_at <= GIVEN_UP_SECONDS:
            return False
        error = PredictionTimedOut(
            "The end of the prediction was not seen within 24 h and it is no longer asked about; look at it in the "
            "vendor's dashboard.",
            item_id=watched.prediction.item_id,
            prediction_id=watched.prediction.id,
        )
        self._fail(watched, error)
        return True

    def _end(self, watched: Watched, end: Prediction, now: float) -> None:
        if watched.created_here:
            self._durations.learn(
                watched.prediction.model,
                told_seconds=end.predict_time_seconds,
                pending_at_seconds=max(0.0, (watched.pending_at or 0.0) - watched.began_at),
                ended_at_seconds=now - watched.began_at,
            )
        self._schedule.remove(watched)
        self._schedule.learned(watched.prediction.model)
        self.remember(end)
        watched.give_back_slot()
        if not watched.future.done():
            watched.future.set_result(end)

    def _fail(self, watched: Watched, error: Exception) -> None:
        self._schedule.remove(watched)
        watched.give_back_slot()
        if not watched.future.done():
            watched.future.set_exception(error)


def age_seconds(prediction: Prediction) -> float | None:
    """How long ago it was created, by this machine's clock; None when that is not known."""
    if prediction.created_at is None:
        return None
    created_at = prediction.created_at
    if created_at.tzinfo is None:
        created_at = created_at.replace(tzinfo=timezone.utc)
    seconds = (datetime.now(timezone.utc) - created_at).total_seconds()
    return seconds if seconds > 1.0 else 0.0  # just now: the loop's clock is all that is needed


def quiet(future: asyncio.Future[Prediction]) -> asyncio.Future[Prediction]:
    """Its exception counts as seen: nobody may be awaiting any more, and that is no fault."""
    future.add_done_callback(lambda done: done.cancelled() or done.exception())
    return future


def _end_from_answer(known: Prediction, answer: Prediction) -> Prediction:
    return answer.model_copy(
        update={
            "item_id": known.item_id,
            "created_at": known.created_at,
            "input": answer.input if known.input is None else known.input,
            "model": known.model or answer.model,
            "version": known.version or answer.version,
        }
    )


def _end_from_row(known: Prediction, row: Execution) -> Prediction:
    return known.model_copy(
        update={
            "status": row.status,
            "status_word": row.status_word,
            "output_urls": row.output_urls,
            "cost_usd": row.cost_usd,
            "predict_time_seconds": row.run_time_seconds,
            "model": known.model or row.model,
        }
    )
