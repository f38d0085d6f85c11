"""Learns the end of each prediction in flight with as few requests as the limits make necessary.

One task asks `schedule` what to ask and when, with one timer; each question runs in a task of its own, so that an
answer that is late holds nothing else up.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import OrderedDict
from collections.abc import Callable
from datetime import datetime, timezone

from prefect_eachlabs.api.client import EachlabsClient
from prefect_eachlabs.errors import EachlabsError, KeyRefused, NotSent, PredictionTimedOut, Rejected, Throttled
from prefect_eachlabs.limits.limiter import RateLimiter, Slot
from prefect_eachlabs.models import Execution, Failure, Prediction, PredictionStatus
from prefect_eachlabs.polling.execution_list import PAGE_ROWS, ExecutionList
from prefect_eachlabs.polling.schedule import LOOK_SECONDS, Durations, Question, Schedule, Watched

logger = logging.getLogger(__name__)

SLOT_KEPT_SECONDS = 3600.0
"""A slot in flight is not kept for longer for an end that nobody has seen."""
ENDS_REMEMBERED = 10_000
KEPT_INPUT_CHARACTERS = 2_000
"""A larger input, which may take twenty times as much in memory, is not kept: whoever has it brings it along."""
UNKNOWN_ID_GRACE_SECONDS = 30.0
"""A prediction may be invisible right after its creation: a 404 counts only after so long."""
FIRST_END_SECONDS = 0.2
"""About so long the first question by id about a model takes."""
OUTPUT_WAIT_SECONDS = 60.0
"""A success whose output is not there is asked about again for so long: the one may be told before the other; half
as long if it was bought earlier (whoever waits for it waits 45 s at most)."""
GIVEN_UP_SECONDS = 86_400.0
"""Outputs are kept for 24 h: after that there is nothing to be had."""
KEY_GOOD_SECONDS = 60.0
"""An answer this recent shows that the key is accepted."""
LONGEST_ASKED_QUIET_SECONDS = 120.0
LONGEST_GROWN_QUIET_SECONDS = 30.0
SHORTEST_SLEEP_SECONDS = 0.01


class Poller:
    """Watches predictions until they end. Lives on one loop; asks only while something is watched.

    Args:
        client: Asks the API.
        limiter: Each question takes a request slot of its own, before the creates.
    """

    def __init__(self, client: EachlabsClient, limiter: RateLimiter) -> None:
        self._client = client
        self._limiter = limiter
        self._durations = Durations()
        self._executions = ExecutionList()
        self._schedule = Schedule(limiter, self._executions, self._durations)
        self._ends: OrderedDict[str, Prediction] = OrderedDict()
        self._questions: set[asyncio.Task[None]] = set()
        self._main: asyncio.Task[None] | None = None
        self._in_hand: Slot | None = None
        self._wake_up = asyncio.Event()
        self._throttles_in_a_row = 0
        self._answered_at = -math.inf
        self._closed = False
        self.on_unheard: Callable[[str, bool, float], None] = lambda prediction_id, overdue, ended_after: None
        """Told of each end that was asked for although a call was to tell it, whether that was overdue, and the loop
        time after which it happened."""

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
                watched.future = _without_noise(loop.create_future())
            return watched.future
        future = _without_noise(loop.create_future())
        end = self.end_of(prediction.id) or (prediction if prediction.status.ended else None)
        if end is not None:
            if end.input is None and prediction.input is not None:
                end = end.model_copy(update={"input": prediction.input})
            self._remember(end)
            if slot is not None:
                slot.done()
            future.set_result(end)
            return future
        self._begin(prediction, future, slot)
        return future

    # ---- the vendor's calls (see `webhooks`)

    @property
    def calls_come(self) -> bool:
        """Whether the vendor's calls are seen to come: nobody is asked about before its call is overdue."""
        return self._schedule.calls_come

    @calls_come.setter
    def calls_come(self, they_do: bool) -> None:
        self._schedule.calls_come = they_do
        self._wake_up.set()

    def ended_after(self, prediction_id: str) -> float:
        """The loop time before which it had not ended, as far as is known."""
        watched = self._schedule.watched.get(prediction_id)
        return -math.inf if watched is None else self._schedule.ended_after(watched)

    def expect_call(self, prediction_id: str) -> None:
        """The vendor was asked to call when it ends."""
        watched = self._schedule.watched.get(prediction_id)
        if watched is not None:
            watched.calls = True
            self._wake_up.set()

    def ended(self, end: Prediction) -> bool:
        """A call that is believed tells its end; whether nobody knew it before. What it leaves open is asked by id."""
        watched = self._schedule.watched.get(end.id)
        if watched is None or not end.status.ended:
            return False
        if _lacks_its_output(end) or (
            end.status is PredictionStatus.FAILED and (end.failure or Failure()).code is None
        ):
            # Only GET tells whether it may be bought again, and what else there is to know.
            watched.calls = False
            self.hurry(end.id)
        else:
            end = _as_known(watched.prediction, end)
            if not end.may_have_several:  # an output that comes as a list says nothing about its model
                self._executions.learn(end)
            self._end(watched, end, by_call=True)
            self._wake_up.set()
        return True

    def is_watched(self, prediction_id: str) -> bool:
        """Whether its end is not known yet."""
        return prediction_id in self._schedule.watched

    def usual_seconds(self, model: str | None) -> float:
        """What 99 of 100 predictions of the model do not exceed, as seen here; as the model's page says before."""
        return self._durations.quantile(model, 0.99)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is watched."""
        return not self._schedule.watched

    def learn_duration(self, model: str | None, seconds: float) -> None:
        """What a prediction took by the API's own figure, whose end a call has told."""
        self._durations.learn(model, told_seconds=seconds, pending_at=0.0, ended_at=seconds)

    def end_of(self, prediction_id: str) -> Prediction | None:
        """Its end, when it was seen (the last 10,000 are remembered)."""
        return self._ends.get(prediction_id)

    def holds_slot(self, prediction_id: str) -> bool:
        """Whether it holds a slot in flight: until its end is seen, for an hour at most."""
        watched = self._schedule.watched.get(prediction_id)
        return watched is not None and watched.slot is not None

    def hurry(self, prediction_id: str) -> None:
        """Asks about it by id as soon as there is a request slot."""
        watched = self._schedule.watched.get(prediction_id)
        if watched is not None:
            watched.not_before, watched.insisted = 0.0, True
            self._wake_up.set()

    def likely_seconds(self, model: str | None) -> float | None:
        """What 99 of 100 predictions of the model do not exceed, as seen here; None before one was seen to end."""
        return self._durations.quantile(model, 0.99) if self._durations.known(model) else None

    async def close(self) -> None:
        """Stops asking; futures not yet done are cancelled. Slots in flight are kept: their predictions go on."""
        self._closed = True
        tasks = [*self._questions, *([self._main] if self._main is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._put_back()
        for watched in self._schedule.watched.values():
            if watched.release is not None:
                watched.release.cancel()
            watched.future.cancel()
        self._schedule.watched.clear()

    def _begin(self, prediction: Prediction, future: asyncio.Future[Prediction], slot: Slot | None) -> None:
        loop = asyncio.get_running_loop()
        now, age = loop.time(), _age_seconds(prediction)
        # Of unknown age: it may well have ended, so it is asked about at once.
        began_at = now - (self._durations.quantile(prediction.model, 0.99) if age is None else age)
        self._schedule.newest += 1
        watched = Watched(
            prediction,
            future,
            slot,
            watched_at=now,
            began_at=began_at,
            created_here=age is not None and age < 1.0,
            number=self._schedule.newest,
        )
        watched.release = loop.call_later(SLOT_KEPT_SECONDS, watched.give_back_slot)
        self._schedule.watched[prediction.id] = watched
        if self._main is None:
            self._main = loop.create_task(self._run(), name="eachlabs poller")
        self._wake_up.set()

    # ---- the one task

    async def _run(self) -> None:
        while True:
            try:
                await self._step()
            except Exception:
                logger.exception("The poller stumbled and goes on in a second; please report this.")
                await asyncio.sleep(1.0)

    async def _step(self) -> None:
        """Sends the next question, or sleeps until there is one to send."""
        loop = asyncio.get_running_loop()
        self._wake_up.clear()
        choice = self._schedule.decide(loop.time())
        if self._in_hand is None and (isinstance(choice, Question) or self._schedule.wants_slot_in_hand(loop.time())):
            self._in_hand = await self._limiter.take_request(question=True)
            choice = self._schedule.decide(loop.time())  # waiting may have changed what is worth asking
        if isinstance(choice, Question) and self._in_hand is not None:
            slot, self._in_hand = self._in_hand, None
            self._schedule.sent(choice, loop.time())
            task = loop.create_task(self._ask(choice, slot))
            self._questions.add(task)
            task.add_done_callback(self._questions.discard)
            return
        until = choice if isinstance(choice, float) else loop.time()
        if self._schedule.wants_slot_in_hand(loop.time()):
            until = min(until, loop.time() + LOOK_SECONDS)
        else:
            self._put_back()
        until = max(until, loop.time() + SHORTEST_SLEEP_SECONDS)
        timer = loop.call_at(until, self._wake_up.set) if until < math.inf else None
        try:
            await self._wake_up.wait()
        finally:
            if timer is not None:
                timer.cancel()

    def _put_back(self) -> None:
        if self._in_hand is not None:
            slot, self._in_hand = self._in_hand, None
            slot.unused()

    # ---- one question

    async def _ask(self, question: Question, slot: Slot) -> None:
        loop = asyncio.get_running_loop()
        watched, offset, sent_at = question.watched, question.offset, loop.time()
        answer: Prediction | tuple[Execution, ...]
        try:
            try:
                if offset is None:
                    answer = await self._client.get(watched.prediction.id)
                else:
                    answer = await self._client.executions(limit=PAGE_ROWS, offset=offset, of=self._schedule.watched)
            except NotSent:
                slot.unused()
                raise
            except BaseException:
                slot.done()
                raise
            finally:
                self._schedule.came_back(question)
            slot.done()
            self._throttles_in_a_row, self._answered_at = 0, loop.time()
            if isinstance(answer, Prediction):
                self._told(watched, answer, sent_at)
            else:
                self._page(answer, question, sent_at)
        except Throttled as error:
            self._be_quiet(error)
            if offset is None:
                self._failed(watched, error)
        except Exception as error:
            if offset is None:
                self._failed(watched, error)
            else:
                self._executions.failed(error, loop.time())
        self._wake_up.set()

    def _be_quiet(self, error: Throttled) -> None:
        """Nothing is asked for a while."""
        self._throttles_in_a_row += 1
        grown = min(0.25 * 2.0 ** min(self._throttles_in_a_row, 10), LONGEST_GROWN_QUIET_SECONDS)
        asked = min(error.retry_after_seconds or 0.0, LONGEST_ASKED_QUIET_SECONDS)
        until = asyncio.get_running_loop().time() + max(asked, grown)
        self._schedule.quiet_until = max(self._schedule.quiet_until, until)

    # ---- what the answers mean

    def _told(self, watched: Watched, answer: Prediction, sent_at: float) -> None:
        """GET by id was answered."""
        if self._schedule.watched.get(watched.prediction.id) is not watched:
            return  # a page told its end while the question was out
        if not answer.status.ended:
            self._still_pending(watched, sent_at, by_id=True)
            return
        if _lacks_its_output(answer) and self._output_may_come(watched):
            return
        end = _as_known(watched.prediction, answer)
        self._executions.learn(end)
        self._end(watched, end)

    def _output_may_come(self, watched: Watched) -> bool:
        """It succeeded and has no output: its slot is free, and it is asked about again, for a while."""
        now = asyncio.get_running_loop().time()
        if watched.without_output_since is None:
            watched.without_output_since = now
            watched.failures = 0
            watched.give_back_slot()
        patience_seconds = OUTPUT_WAIT_SECONDS if watched.created_here else OUTPUT_WAIT_SECONDS / 2
        if now - watched.without_output_since >= patience_seconds:
            return False
        watched.insisted = True
        self._schedule.back_off(watched, now)
        return True

    def _page(self, rows: tuple[Execution, ...], question: Question, sent_at: float) -> None:
        """A page of executions came. Where a row says more than it can tell, its prediction is asked about by id."""
        offset = question.offset or 0
        now = asyncio.get_running_loop().time()
        ours = [(watched, row) for row in rows if (watched := self._schedule.watched.get(row.id)) is not None]
        left_out = self._schedule.left_out(question, [watched for watched, _ in ours], sent_at)
        for watched in left_out:
            watched.by_id = True
        self._executions.answered(expected=0 if offset else len(ours) + len(left_out), shown=len(ours), now=now)
        # Of a model whose ends nobody knows yet one is asked about by id, and the others wait for what it tells.
        asked = {one.prediction.model for one in self._schedule.watched.values() if one.insisted and one.failures < 2}
        for watched, row in ours:
            known = watched.prediction
            if self._executions.tells_the_end(row) and self._executions.believes(known, row.model):
                told = {
                    "status": row.status,
                    "status_word": row.status_word,
                    "output_urls": row.output_urls,
                    "cost_usd": row.cost_usd,
                    "predict_time_seconds": row.run_time_seconds,
                    "model": known.model or row.model,
                }
                self._end(watched, known.model_copy(update=told))
            elif row.status.ended and not self._executions.knows(known.model) and known.model in asked:
                watched.not_before = now + FIRST_END_SECONDS
            elif row.status.ended:
                watched.insisted = True
                asked.add(known.model)
            else:
                self._still_pending(watched, sent_at, by_id=False)

    def _failed(self, watched: Watched, error: Exception) -> None:
        """GET by id was not answered, or with an error."""
        now = asyncio.get_running_loop().time()
        if isinstance(error, KeyRefused):
            # 403 where the key was just good: this prediction is not ours to see, the others are.
            only_this = error.status_code == 403 and now - self._answered_at < KEY_GOOD_SECONDS
            for one in [watched] if only_this else list(self._schedule.watched.values()):
                self._give_up(one, error)
            return
        if not isinstance(error, EachlabsError):
            logger.error("Asking about prediction %s failed unexpectedly.", watched.prediction.id, exc_info=error)
        if self._schedule.watched.get(watched.prediction.id) is not watched:
            return
        unknown = isinstance(error, Rejected) and error.status_code == 404
        if unknown and now - watched.watched_at >= UNKNOWN_ID_GRACE_SECONDS:
            self._give_up(watched, error)
        elif not self._is_too_old(watched):
            self._schedule.back_off(watched, now)

    def _still_pending(self, watched: Watched, sent_at: float, *, by_id: bool) -> None:
        if not self._is_too_old(watched):
            now = asyncio.get_running_loop().time()
            self._schedule.found_pending(watched, sent_at, now, by_id=by_id)

    def _is_too_old(self, watched: Watched) -> bool:
        if asyncio.get_running_loop().time() - watched.watched_at <= GIVEN_UP_SECONDS:
            return False
        error = PredictionTimedOut(
            "The end of the prediction was not seen within 24 h and it is no longer asked about; look at it in the "
            "vendor's dashboard.",
            item_id=watched.prediction.item_id,
            prediction_id=watched.prediction.id,
        )
        self._give_up(watched, error)
        return True

    def _end(self, watched: Watched, end: Prediction, *, by_call: bool = False) -> None:
        if watched.calls and not by_call:
            overdue = asyncio.get_running_loop().time() >= self._schedule.call_until(watched)
            told_at = watched.began_at + (end.predict_time_seconds or 0.0)
            self.on_unheard(watched.prediction.id, overdue, max(told_at, self._schedule.ended_after(watched)))
        if watched.created_here and not by_call:  # a call may be late
            self._durations.learn(
                watched.prediction.model,
                told_seconds=end.predict_time_seconds,
                pending_at=max(0.0, (watched.pending_at or 0.0) - watched.began_at),
                ended_at=asyncio.get_running_loop().time() - watched.began_at,
            )
        self._remember(end)
        self._let_go(watched)
        if not watched.future.done():
            watched.future.set_result(end)

    def _give_up(self, watched: Watched, error: Exception) -> None:
        self._let_go(watched)
        if not watched.future.done():
            watched.future.set_exception(error)

    def _let_go(self, watched: Watched) -> None:
        self._schedule.watched.pop(watched.prediction.id, None)
        watched.give_back_slot()

    def _remember(self, end: Prediction) -> None:
        if _lacks_its_output(end):
            return  # whoever asks later may be told more
        is_large = len(str(end.input)) > KEPT_INPUT_CHARACTERS
        self._ends[end.id] = end.model_copy(update={"input": None}) if is_large else end
        if len(self._ends) > ENDS_REMEMBERED:
            self._ends.popitem(last=False)


def _lacks_its_output(end: Prediction) -> bool:
    return end.status is PredictionStatus.SUCCEEDED and not end.output_urls and end.failure is None


def _as_known(known: Prediction, end: Prediction) -> Prediction:
    """An end as it was told, with what was known before."""
    return end.model_copy(
        update={
            "item_id": known.item_id,
            "created_at": known.created_at,
            "input": end.input if known.input is None else known.input,
            "model": known.model or end.model,
            "version": known.version or end.version,
        }
    )


def _age_seconds(prediction: Prediction) -> float | None:
    """How long ago it was created, by this machine's clock; None when that is not known."""
    created_at = prediction.created_at
    if created_at is None:
        return None
    if created_at.tzinfo is None:
        created_at = created_at.replace(tzinfo=timezone.utc)
    seconds = (datetime.now(timezone.utc) - created_at).total_seconds()
    return seconds if seconds > 1.0 else 0.0  # just now: the loop's clock is all that is needed


def _without_noise(future: asyncio.Future[Prediction]) -> asyncio.Future[Prediction]:
    """Its exception counts as seen: nobody may be awaiting any more, and that is no fault."""
    future.add_done_callback(lambda done: done.cancelled() or done.exception())
    return future
