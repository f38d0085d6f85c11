"""Learns the end of each prediction in flight with as few requests as the limits make necessary.

One task decides what to ask and when (`schedule`), with one timer; each question runs in a task of its own, so a GET
that the API holds open holds nothing else up. What is learned by a sweep of executions is believed as far as
`sweeping` says, the rest is asked by id.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import OrderedDict
from collections.abc import Coroutine
from datetime import datetime, timezone
from typing import Any, Protocol

from prefect_eachlabs.durations import Durations
from prefect_eachlabs.errors import EachlabsError, KeyRefused, NotSent, PredictionTimedOut, Rejected, Throttled
from prefect_eachlabs.listing import PAGE_ROWS
from prefect_eachlabs.models import Execution, Prediction
from prefect_eachlabs.pacing import Place, Places
from prefect_eachlabs.schedule import LOOK_SECONDS, Question, Schedule
from prefect_eachlabs.sweeping import Sweeping
from prefect_eachlabs.watched import Watched

logger = logging.getLogger(__name__)

ENDS_REMEMBERED = 10_000
UNKNOWN_ID_GRACE_SECONDS = 30.0
"""A prediction may be invisible right after its creation: a 404 counts only after so long."""
PLACE_KEPT_SECONDS = 3600.0
GIVEN_UP_SECONDS = 86_400.0
"""Outputs are kept for 24 h: after that there is nothing to be had."""
HELD_SECONDS = 1.0
"""A GET that took longer and came back with the end was held open by the API."""
SHORTEST_SLEEP_SECONDS = 0.01
LONGEST_QUIET_SECONDS = 120.0


class Asker(Protocol):
    """Who asks the API; `EachlabsClient` does."""

    async def get(self, prediction_id: str) -> Prediction:
        """What has become of it; may be held open until its end."""

    async def executions(self, *, limit: int = 100, offset: int = 0) -> tuple[Execution, ...]:
        """A page of executions, newest first."""


class Watcher:
    """Watches predictions until they end. Lives on one loop; asks only while something is watched.

    Args:
        asker: Asks the API.
        places: Each question takes a request place of its own, before the creates.
    """

    def __init__(self, asker: Asker, places: Places) -> None:
        self._asker = asker
        self._places = places
        self._durations = Durations()
        self._sweeping = Sweeping()
        self._schedule = Schedule(places, self._sweeping, self._durations)
        self._ends: OrderedDict[str, Prediction] = OrderedDict()
        self._questions: set[asyncio.Task[None]] = set()
        self._in_hand: Place | None = None
        self._main: asyncio.Task[None] | None = None
        self._asleep: asyncio.Future[None] | None = None
        self._asleep_until = 0.0
        self._closed = False

    def __repr__(self) -> str:
        return f"<Watcher of {len(self._schedule.watched)}, {len(self._questions)} questions out>"

    def watch(self, prediction: Prediction, *, place: Place | None) -> asyncio.Future[Prediction]:
        """The future of its end, whatever that is: succeeded, failed or cancelled. Costs no money.

        Watching goes on even when nobody awaits it; awaiters use `asyncio.shield`.

        Args:
            prediction: As it was created, or as far as it is known (its id is enough).
            place: Its place in flight, taken over: given back when its end is seen. Of two for the same
                prediction the second is given back at once.

        Raises:
            KeyRefused, Rejected, PredictionTimedOut: From the future: the key is not accepted; the API does not
                know the id; its end was not seen within 24 h.
        """
        loop = asyncio.get_running_loop()
        if self._closed:
            raise RuntimeError("the watcher is closed")
        watched = self._schedule.watched.get(prediction.id)
        if watched is not None:
            return self._watch_again(watched, prediction, place)
        end = self._ends.get(prediction.id) or (prediction if prediction.status.ended else None)
        future: asyncio.Future[Prediction] = loop.create_future()
        if end is not None:
            self._remember(end)
            if place is not None:
                place.done()
            future.set_result(end)
            return future
        now = loop.time()
        age = _age_seconds(prediction)
        likely_age = self._durations.quantile(prediction.model, 0.99) if age is None else age
        watched = Watched(
            prediction,
            _quiet(future),
            place,
            watched_at=now,
            began_at=now - likely_age,
            age_known=age is not None,
            number=self._schedule.listing.next_number(),
        )
        watched.release = loop.call_later(PLACE_KEPT_SECONDS, watched.give_back_place)
        self._schedule.add(watched, now)
        if self._main is None:
            self._main = loop.create_task(self._run(), name="eachlabs watcher")
        self._wake_for(watched)
        return future

    def _watch_again(self, watched: Watched, prediction: Prediction, place: Place | None) -> asyncio.Future[Prediction]:
        watched.take_over(place)
        watched.know_more(prediction)
        if watched.future.cancelled():  # an awaiter forgot to shield
            watched.future = _quiet(asyncio.get_running_loop().create_future())
        return watched.future

    def end_of(self, prediction_id: str) -> Prediction | None:
        """Its end, when it was seen (the last 10,000 are remembered)."""
        return self._ends.get(prediction_id)

    def hurry(self, prediction_id: str) -> None:
        """Asks about it by id as soon as there is a request place."""
        watched = self._schedule.watched.get(prediction_id)
        if watched is not None:
            watched.not_before = 0.0
            self._schedule.insist(watched, asyncio.get_running_loop().time())
            self._wake_for(watched)

    async def close(self) -> None:
        """Stops asking; futures not yet done are cancelled. Places in flight are kept: their predictions go on."""
        self._closed = True
        tasks = [*self._questions, *([self._main] if self._main is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._put_back()
        for watched in list(self._schedule.watched.values()):
            self._schedule.remove(watched)
            watched.future.cancel()
            if watched.release is not None:
                watched.release.cancel()

    # ---- the one task

    async def _run(self) -> None:
        while True:
            try:
                await self._step()
            except Exception:
                logger.exception("The watcher stumbled and goes on in a second; please report this.")
                await asyncio.sleep(1.0)

    async def _step(self) -> None:
        """Sends the next question, or sleeps until there is one to send."""
        loop = asyncio.get_running_loop()
        began_at = loop.time()
        choice = self._schedule.decide(began_at)
        if self._in_hand is None and (isinstance(choice, Question) or self._schedule.wants_place_in_hand()):
            self._in_hand = await self._places.take_request(question=True)
            if loop.time() > began_at:  # waiting may have changed what is worth asking
                choice = self._schedule.decide(loop.time())
        if isinstance(choice, Question):
            place, self._in_hand = self._in_hand, None
            assert place is not None
            self._send(choice, place)
            return
        if self._in_hand is not None and not self._schedule.wants_place_in_hand():
            self._put_back()
        if self._in_hand is not None:
            choice = min(choice, began_at + LOOK_SECONDS)
        await self._sleep_until(max(choice, loop.time() + SHORTEST_SLEEP_SECONDS))

    def _put_back(self) -> None:
        if self._in_hand is not None:
            place, self._in_hand = self._in_hand, None
            place.unused()

    async def _sleep_until(self, at: float) -> None:
        loop = asyncio.get_running_loop()
        self._asleep = loop.create_future()
        self._asleep_until = at
        timer = loop.call_at(at, self._wake) if at != math.inf else None
        try:
            await self._asleep
        finally:
            self._asleep = None
            if timer is not None:
                timer.cancel()

    def _wake(self) -> None:
        if self._asleep is not None and not self._asleep.done():
            self._asleep.set_result(None)

    def _wake_for(self, watched: Watched) -> None:
        if watched.due_at < self._asleep_until:
            self._wake()

    def _send(self, question: Question, place: Place) -> None:
        now = asyncio.get_running_loop().time()
        work: Coroutine[Any, Any, None]
        if question.offset is not None:
            self._schedule.sweep_sent_at = now
            self._schedule.sweep_is_out = True
            work = self._sweep(question.watched, question.offset, place)
        else:
            self._schedule.asked(question.watched, now)
            self._schedule.asking += 1
            work = self._ask(question.watched, place)
        task = asyncio.get_running_loop().create_task(work)
        self._questions.add(task)
        task.add_done_callback(self._questions.discard)

    # ---- what comes back

    async def _ask(self, watched: Watched, place: Place) -> None:
        loop = asyncio.get_running_loop()
        sent_at, sent = loop.time(), True
        failure: Exception | None = None
        answer = watched.prediction
        try:
            answer = await self._asker.get(watched.prediction.id)
        except NotSent as error:
            sent, failure = False, error
        except Exception as error:
            failure = error
        finally:
            self._schedule.asking -= 1
            (place.done if sent else place.unused)()
        now = loop.time()
        held = now - sent_at > HELD_SECONDS
        if self._schedule.watched.get(watched.prediction.id) is watched:
            if failure is not None:
                self._unanswered(watched, failure, now)
            elif answer.status.ended:
                self._schedule.holds = self._schedule.holds or held
                self._end_by_id(watched, answer, now)
            else:
                self._schedule.holds = self._schedule.holds and held
                self._still_pending(watched, sent_at, now, by_id=True)
        self._wake()

    def _end_by_id(self, watched: Watched, answer: Prediction, now: float) -> None:
        known = watched.prediction
        end = answer.model_copy(
            update={
                "item_id": known.item_id,
                "created_at": known.created_at,
                "input": answer.input if known.input is None else known.input,
                "model": known.model or answer.model,
                "version": known.version or answer.version,
            }
        )
        self._sweeping.learned_by_id(end, watched.began_at if watched.age_known else math.inf, now)
        self._end(watched, end, now)

    def _unanswered(self, watched: Watched, error: Exception, now: float) -> None:
        if isinstance(error, KeyRefused):
            for every in list(self._schedule.watched.values()):
                self._fail(every, error)
            return
        if isinstance(error, Rejected) and error.status_code == 404:
            if now - watched.watched_at >= UNKNOWN_ID_GRACE_SECONDS:
                self._fail(watched, error)
                return
        elif isinstance(error, Throttled):
            self._be_quiet(error, now)
        elif not isinstance(error, EachlabsError):
            logger.error("Asking about prediction %s failed unexpectedly.", watched.prediction.id, exc_info=error)
        self._schedule.back_off(watched, now)

    def _be_quiet(self, error: Throttled, now: float) -> None:
        asked = min(error.retry_after_seconds or 0.0, LONGEST_QUIET_SECONDS)
        self._schedule.quiet_until = max(self._schedule.quiet_until, now + max(asked, 0.5))

    async def _sweep(self, target: Watched, offset: int, place: Place) -> None:
        loop = asyncio.get_running_loop()
        sent_at, sent = loop.time(), True
        newest = self._schedule.listing.newest
        rows: tuple[Execution, ...] = ()
        failure: Exception | None = None
        try:
            rows = await self._asker.executions(limit=PAGE_ROWS, offset=offset)
        except NotSent as error:
            sent, failure = False, error
        except Exception as error:
            failure = error
        finally:
            self._schedule.sweep_is_out = False
            (place.done if sent else place.unused)()
        now = loop.time()
        if isinstance(failure, Throttled):
            self._be_quiet(failure, now)
        elif failure is not None:
            self._sweeping.failed(failure, now)
        else:
            self._read_page(rows, offset, target, newest, sent_at, now)
        self._wake()

    def _read_page(
        self, rows: tuple[Execution, ...], offset: int, target: Watched, newest: int, sent_at: float, now: float
    ) -> None:
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
        self._sweeping.answered(expected=len(ours) + len(left_out), shown=len(ours), now=now)
        for _, watched, row in ours:
            watched.missing = False
            if self._sweeping.tells_the_end(row) and self._sweeping.believes(watched.prediction, row.model):
                self._end(watched, _end_from_row(watched.prediction, row), now)
            elif row.status.ended:
                self._schedule.insist(watched, now)
            else:
                self._still_pending(watched, sent_at, now, by_id=False)

    def _still_pending(self, watched: Watched, sent_at: float, now: float, *, by_id: bool) -> None:
        if now - watched.watched_at > GIVEN_UP_SECONDS:
            self._fail(
                watched,
                PredictionTimedOut(
                    "The prediction has not ended within 24 h and is no longer asked about; look at it in the "
                    "vendor's dashboard.",
                    item_id=watched.prediction.item_id,
                    prediction_id=watched.prediction.id,
                ),
            )
        else:
            self._schedule.found_pending(watched, sent_at, now, by_id=by_id)

    # ---- ends

    def _end(self, watched: Watched, end: Prediction, now: float) -> None:
        told = end.predict_time_seconds
        if watched.age_known or told is not None:
            self._durations.learn(
                watched.prediction.model,
                told_seconds=told,
                pending_at_seconds=(watched.pending_at or watched.began_at) - watched.began_at,
                ended_at_seconds=now - watched.began_at,
            )
        self._schedule.remove(watched)
        self._schedule.learned(watched.prediction.model, now)
        self._remember(end)
        watched.give_back_place()
        if not watched.future.done():
            watched.future.set_result(end)

    def _fail(self, watched: Watched, error: Exception) -> None:
        self._schedule.remove(watched)
        watched.give_back_place()
        if not watched.future.done():
            watched.future.set_exception(error)

    def _remember(self, end: Prediction) -> None:
        self._ends[end.id] = end
        if len(self._ends) > ENDS_REMEMBERED:
            self._ends.popitem(last=False)


def _end_from_row(prediction: Prediction, row: Execution) -> Prediction:
    return prediction.model_copy(
        update={
            "status": row.status,
            "status_word": row.status_word,
            "output_urls": row.output_urls,
            "cost_usd": row.cost_usd,
            "predict_time_seconds": row.run_time_seconds,
            "model": prediction.model or row.model,
        }
    )


def _age_seconds(prediction: Prediction) -> float | None:
    """How long ago it was created, by this machine's clock; None when that is not known."""
    if prediction.created_at is None:
        return None
    seconds = (datetime.now(timezone.utc) - prediction.created_at).total_seconds()
    return seconds if seconds > 1.0 else 0.0  # just now: the loop's clock is all that is needed


def _quiet(future: asyncio.Future[Prediction]) -> asyncio.Future[Prediction]:
    """Its exception counts as seen: nobody may be awaiting any more, and that is no fault."""
    future.add_done_callback(lambda done: done.cancelled() or done.exception())
    return future
