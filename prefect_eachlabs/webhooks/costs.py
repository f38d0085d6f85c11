"""What predictions cost whose ends calls have told: calls do not say, the list of executions does, many at once."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from prefect_eachlabs.api.client import EachlabsClient
from prefect_eachlabs.errors import EachlabsError
from prefect_eachlabs.limits.limiter import Kind, RateLimiter
from prefect_eachlabs.models import Execution, Prediction
from prefect_eachlabs.polling.poller import Poller

logger = logging.getLogger(__name__)

PAGE_ROWS = 100
AT_MOST_EVERY_SECONDS = 60.0
PRESSED = 0.8
"""Of the requests that there are: beyond that each page takes the place of a create."""
NOT_LONGER_THAN_SECONDS = 600.0
"""While creates wait for requests, costs do: so long at most."""
GIVEN_UP_SECONDS = 3600.0
"""What is not told by then, a later look at the account tells (`settle`, the batch's end)."""
AT_THE_END_SECONDS = 3.0
MOST_PAGES = 20
LOOK_SECONDS = 1.0
REMEMBERED = 10_000


@dataclass
class _Untold:
    end: Prediction
    age_seconds: float
    since: float
    row: Execution | None = None


class LateCosts:
    """Asks the list what calls left open: once a minute at most, while creates do not need the requests; or at the end.

    Args:
        client: Asks the API, a request slot of the `limiter` for each page.
        poller: Says when nothing is watched any more, and learns how long predictions took.
        note: Writes down what a stored picture cost; False: it is not stored yet, try again.
        heard: Told how late some calls came.
    """

    def __init__(
        self,
        client: EachlabsClient,
        limiter: RateLimiter,
        poller: Poller,
        note: Callable[[Execution], Awaitable[bool]],
        heard: Callable[[Sequence[float]], None],
    ) -> None:
        self._client, self._limiter, self._poller, self._note, self._heard = client, limiter, poller, note, heard
        self._untold: OrderedDict[str, _Untold] = OrderedDict()
        self._asked_at = float("-inf")
        self._runner: asyncio.Task[None] | None = None
        self._asking = asyncio.Lock()

    def expect(self, end: Prediction, age_seconds: float) -> None:
        """A call has told this end, at this age."""
        self._untold[end.id] = _Untold(end, age_seconds, asyncio.get_running_loop().time())
        while len(self._untold) > REMEMBERED:
            self._untold.popitem(last=False)
        if self._runner is None or self._runner.done():
            self._runner = asyncio.ensure_future(self._run())

    def are_awaited(self, prediction_id: str) -> bool:
        """Whether the list is going to be asked what it cost."""
        return prediction_id in self._untold

    async def told(self, end: Prediction) -> Prediction:
        """The end with its cost, when it was the last one in flight: then the list is asked at once."""
        untold = self._untold.get(end.id)
        if untold is None:
            return end
        waiting = self._limiter.in_flight_waiting or self._limiter.requests_waiting
        if untold.row is None and self._poller.is_idle and not waiting:
            try:
                await asyncio.wait_for(self._ask(most_pages=1), AT_THE_END_SECONDS)
            except (asyncio.TimeoutError, EachlabsError) as error:
                logger.info("What prediction %s cost is not known yet (%s).", end.id, type(error).__name__)
        row = untold.row
        if row is None:
            return end
        self._untold.pop(end.id, None)  # whoever stores it writes it down
        return end.model_copy(update={"cost_usd": row.cost_usd, "predict_time_seconds": row.run_time_seconds})

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while self._untold:
            await asyncio.sleep(LOOK_SECONDS)
            now = loop.time()
            for untold in list(self._untold.values()):
                if now - untold.since > GIVEN_UP_SECONDS:
                    del self._untold[untold.end.id]
            open_ = [one for one in self._untold.values() if one.row is None]
            pressed = self._limiter.requests_waiting or self._limiter.pressure(Kind.REQUESTS) > PRESSED
            is_time = (
                open_
                and now - self._asked_at >= AT_MOST_EVERY_SECONDS
                and (not pressed or now - open_[0].since > NOT_LONGER_THAN_SECONDS)
            )
            try:
                await self._look(most_pages=MOST_PAGES if is_time else 0)
            except EachlabsError as error:
                logger.info("Costs are not known yet (%s).", error)

    async def _ask(self, *, most_pages: int) -> None:
        """Pages of the list until all that is open was seen."""
        async with self._asking:
            late_seconds: list[float] = []
            not_seen = {one for one, untold in self._untold.items() if untold.row is None}
            for page in range(most_pages if not_seen else 0):
                self._asked_at = asyncio.get_running_loop().time()
                offset = page * PAGE_ROWS
                rows = await self._limiter.asked(partial(self._client.executions, limit=PAGE_ROWS, offset=offset))
                for row in rows:
                    untold = self._untold.get(row.id)
                    # The cost is 0 until the vendor has settled it.
                    if row.id in not_seen and untold is not None and row.cost_usd:
                        untold.row = row
                        if row.run_time_seconds:
                            self._poller.learn_duration(untold.end.model, row.run_time_seconds)
                            late_seconds.append(untold.age_seconds - row.run_time_seconds)
                    not_seen.discard(row.id)
                if not not_seen or len(rows) < PAGE_ROWS:
                    break
            self._heard(late_seconds)

    async def _look(self, *, most_pages: int) -> None:
        """Asks, and writes down what is told."""
        await self._ask(most_pages=most_pages)
        for untold in list(self._untold.values()):
            if untold.row is not None and await self._note(untold.row):
                self._untold.pop(untold.end.id, None)

    async def aclose(self) -> None:
        """Looks once more, within 3 s, and stops; what is not told by then stays open."""
        if self._runner is not None:
            self._runner.cancel()
            await asyncio.gather(self._runner, return_exceptions=True)
        with suppress(asyncio.TimeoutError, EachlabsError):
            await asyncio.wait_for(self._look(most_pages=1), AT_THE_END_SECONDS)
