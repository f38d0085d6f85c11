"""Learns the end of each prediction in flight with as few requests as the limits make necessary.

One task asks `schedule` what to ask and when, with one timer; each question runs in a task of its own, so a GET that
the API holds open holds nothing else up. What the answers mean is in `answers`.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Coroutine
from typing import Any, Protocol

from prefect_eachlabs.errors import NotSent
from prefect_eachlabs.limits.limiter import RateLimiter, Slot
from prefect_eachlabs.models import Execution, Prediction
from prefect_eachlabs.polling.answers import Answers, age_seconds, quiet
from prefect_eachlabs.polling.durations import Durations
from prefect_eachlabs.polling.executions import Sweeping
from prefect_eachlabs.polling.listing import PAGE_ROWS
from prefect_eachlabs.polling.schedule import LOOK_SECONDS, Question, Schedule
from prefect_eachlabs.polling.watched import Watched

logger = logging.getLogger(__name__)

PLACE_KEPT_SECONDS = 3600.0
"""A slot in flight is not kept for longer for an end that nobody has seen."""
SHORTEST_SLEEP_SECONDS = 0.01


class Asker(Protocol):
    """Who asks the API; `EachlabsClient` does."""

    async def get(self, prediction_id: str) -> Prediction:
        """What has become of it; may be held open until its end."""

    async def executions(self, *, limit: int = 100, offset: int = 0) -> tuple[Execution, ...]:
        """A page of executions, newest first."""


class Poller:
    """Watches predictions until they end. Lives on one loop; asks only while something is watched.

    Args:
        asker: Asks the API.
        slots: Each question takes a request slot of its own, before the creates.
    """

    def __init__(self, asker: Asker, limiter: RateLimiter) -> None:
        self._asker = asker
        self._limiter = limiter
        self._durations = Durations()
        sweeping = Sweeping()
        self._schedule = Schedule(limiter, sweeping, self._durations)
        self._answers = Answers(self._schedule, sweeping, self._durations)
        self._questions: set[asyncio.Task[None]] = set()
        self._main: asyncio.Task[None] | None = None
        self._in_hand: Slot | None = None
        self._asleep: asyncio.Future[None] | None = None
        self._asleep_until = 0.0
        self._closed = False

    def __repr__(self) -> str:
        return f"<Poller of {len(self._schedule.watched)}, {len(self._questions)} questions out>"

    def watch(self, prediction: Prediction, *, slot: Slot | None) -> asyncio.Future[Prediction]:
        """The future of its end, whatever that is: succeeded, failed or cancelled. Costs requests, no money.

        Watching goes on even when nobody awaits it; awaiters use `asyncio.shield`. After `close` the future is
        cancelled from the start.

        Args:
            prediction: As it was created, or as far as it is known (its id is enough).
            slot: Its slot in flight, taken over: given back when its end is seen. Of two for the same
                prediction the second is given back at once.

        Raises:
            KeyRefused, Rejected, PredictionTimedOut: From the future: the key is not accepted; the API does not
                know the id; its end was not seen within 24 h.
        """
        loop = asyncio.get_running_loop()
        if self._closed:  # no error: who has just bought something must still get to noting that down
            closed: asyncio.Future[Prediction] = loop.create_future()
            closed.cancel()
            return closed
        watched = self._schedule.watched.get(prediction.id)
        if watched is not None:
            watched.take_over(slot)
            watched.know_more(prediction)
            if watched.future.cancelled():  # an awaiter forgot to shield
                watched.future = quiet(loop.create_future())
            return watched.future
        end = self.end_of(prediction.id) or (prediction if prediction.status.ended else None)
        future = quiet(loop.create_future())
        if end is not None:
            self._answers.remember(end)
            if slot is not None:
                slot.done()
            future.set_result(end)
            return future
        self._begin(prediction, future, slot)
        return future

    def end_of(self, prediction_id: str) -> Prediction | None:
        """Its end, when it was seen (the last 10,000 are remembered)."""
        return self._answers.end_of(prediction_id)

    def hurry(self, prediction_id: str) -> None:
        """Asks about it by id as soon as there is a request slot."""
        watched = self._schedule.watched.get(prediction_id)
        if watched is not None:
            watched.not_before = 0.0
            self._schedule.insist(watched, asyncio.get_running_loop().time())
            self._wake_for(watched)

    async def close(self) -> None:
        """Stops asking; futures not yet done are cancelled. Slots in flight are kept: their predictions go on."""
        self._closed = True
        tasks = [*self._questions, *([self._main] if self._main is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._put_back()
        for watched in list(self._schedule.watched.values()):
            self._schedule.remove(watched)
            watched.forget()

    def _begin(self, prediction: Prediction, future: asyncio.Future[Prediction], slot: Slot | None) -> None:
        loop = asyncio.get_running_loop()
        now, age = loop.time(), age_seconds(prediction)
        # Of unknown age: it may well have ended, so it is asked about at once.
        likely_age = self._durations.quantile(prediction.model, 0.99) if age is None else age
        watched = Watched(
            prediction,
            future,
            slot,
            watched_at=now,
            began_at=now - likely_age,
            age_known=age is not None,
            number=self._schedule.listing.next_number(),
        )
        watched.release = loop.call_later(PLACE_KEPT_SECONDS, watched.give_back_slot)
        self._schedule.add(watched)
        if self._main is None:
            self._main = loop.create_task(self._run(), name="eachlabs watcher")
        self._wake_for(watched)

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
        if self._in_hand is None and (isinstance(choice, Question) or self._wants_place_in_hand()):
            self._in_hand = await self._limiter.take_request(question=True)
            if loop.time() > began_at:  # waiting may have changed what is worth asking
                choice = self._schedule.decide(loop.time())
        if isinstance(choice, Question) and self._in_hand is not None:
            slot, self._in_hand = self._in_hand, None
            self._send(choice, slot)
            return
        if not self._wants_place_in_hand():
            self._put_back()
        until = choice if isinstance(choice, float) else loop.time()
        if self._in_hand is not None:
            until = min(until, loop.time() + LOOK_SECONDS)
        await self._sleep_until(max(until, loop.time() + SHORTEST_SLEEP_SECONDS))

    def _wants_place_in_hand(self) -> bool:
        somebody = self._schedule.watched or self._limiter.in_flight_waiting or self._limiter.requests_waiting
        return bool(somebody) and self._schedule.wants_place_in_hand()

    def _put_back(self) -> None:
        if self._in_hand is not None:
            slot, self._in_hand = self._in_hand, None
            slot.unused()

    async def _sleep_until(self, at: float) -> None:
        loop = asyncio.get_running_loop()
        self._asleep = loop.create_future()
        self._asleep_until = at
        timer = loop.call_at(at, self._wake) if at < math.inf else None
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

    # ---- one question

    def _send(self, question: Question, slot: Slot) -> None:
        loop = asyncio.get_running_loop()
        self._schedule.sent(question, loop.time())
        work: Coroutine[Any, Any, None]
        if question.offset is None:
            work = self._ask(question.watched, slot)
        else:
            work = self._sweep(question.watched, question.offset, slot)
        task = loop.create_task(work)
        self._questions.add(task)
        task.add_done_callback(self._questions.discard)

    async def _ask(self, watched: Watched, slot: Slot) -> None:
        loop = asyncio.get_running_loop()
        sent_at = loop.time()
        try:
            try:
                answer = await self._asker.get(watched.prediction.id)
            except NotSent:
                slot.unused()
                raise
            except BaseException:
                slot.done()
                raise
            finally:
                self._schedule.asking -= 1
            slot.done()
            self._answers.told(watched, answer, sent_at, loop.time())
        except Exception as error:
            self._answers.failed(watched, error, loop.time())
        self._wake()

    async def _sweep(self, target: Watched, offset: int, slot: Slot) -> None:
        loop = asyncio.get_running_loop()
        sent_at, newest = loop.time(), self._schedule.listing.newest
        try:
            try:
                rows = await self._asker.executions(limit=PAGE_ROWS, offset=offset)
            except NotSent:
                slot.unused()
                raise
            except BaseException:
                slot.done()
                raise
            finally:
                self._schedule.sweep_is_out = False
            slot.done()
            self._answers.page(rows, offset=offset, target=target, newest=newest, sent_at=sent_at, now=loop.time())
        except Exception as error:
            self._answers.sweep_failed(error, loop.time())
        self._wake()
