"""The calls of one account: which orders wait for one, what came, and whether calls are to be counted on.

A call is taken only for the order that its secret opens, and tells the end of that order's prediction alone. One that
comes before the order's answer, or for an order whose answer is lost, is kept: it names the prediction.
"""

from __future__ import annotations

import asyncio
import logging
import math
import uuid
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from enum import Enum
from statistics import median
from typing import TypeVar

from prefect_eachlabs.errors import EachlabsError
from prefect_eachlabs.models import Callback, Prediction
from prefect_eachlabs.net import redaction
from prefect_eachlabs.polling.poller import Poller
from prefect_eachlabs.polling.schedule import CALL_SECONDS
from prefect_eachlabs.settings import AccountSettings
from prefect_eachlabs.webhooks.calls import Call, callback_of, parse_end, secret_of

logger = logging.getLogger(__name__)

T = TypeVar("T")

REMEMBERED = 10_000
MOST_TRIED = 2_000
"""So many orders' secrets are tried for a call that names none."""
MOST_HASHED_BYTES = 64 * 1024 * 1024
"""And so much is hashed for it, which takes a tenth of a second: its body comes from anybody, once for each secret."""
MISSED_IN_A_ROW = 2
LATE_SECONDS = 5.0
"""A call that comes so long after the end is of no use: asking is faster."""


class Verdict(str, Enum):
    """What became of a call."""

    TAKEN = "taken"
    """It told an end that nobody here knew."""
    KEPT = "kept"
    """It is good, and nobody here waits for it, or not yet."""
    REFUSED = "refused"
    """It is not from the vendor: its secret is wrong or missing."""
    UNREADABLE = "unreadable"
    """It is from the vendor and says nothing that can be read."""
    CONTRADICTS = "contradicts"
    """Its secret is one order's and its prediction another's: it changes nothing."""


Take = Callable[[Call], Verdict]
Close = Callable[[], Awaitable[None]]
Way = Callable[[Take], Awaitable[Close]]
"""Opens a way in: calls are handed to the function given; what it returns closes the way."""


class Webhooks:
    """Which orders asked for a call, and what the calls said. Lives on one loop.

    Args:
        settings: The account; without a `webhook_url` nobody is asked to call.
        poller: Learns of ends.
        way: How calls come in; None: they do not, and only the vendor's list of webhooks names orders.
    """

    def __init__(self, settings: AccountSettings, poller: Poller, way: Way | None = None) -> None:
        self._url, self._master = settings.webhook_url, settings.webhook_secret.get_secret_value()
        redaction.hide(self._master)  # it may be a block's
        self._poller = poller
        self._way = way
        self._opening: asyncio.Task[Close | None] | None = None
        self._orders: OrderedDict[str, str | None] = OrderedDict()
        """write_id → the prediction that it bought; None: that is not known (yet)."""
        self._bought_at: OrderedDict[str, float] = OrderedDict()
        """Prediction → when its order was answered."""
        self._kept: OrderedDict[str, Prediction] = OrderedDict()
        """write_id → what its call said, of orders whose prediction was not known then."""
        self._expected: dict[str, asyncio.Future[None]] = {}
        self._last_useful_at = -math.inf
        self._missed = 0
        self._ends_asked: OrderedDict[str, float] = OrderedDict()
        """Prediction → after when it ended, of those whose end was seen by asking and whose call had not come."""
        self._ended_at: OrderedDict[str, float] = OrderedDict()
        """Prediction → when its end was seen, of all that were to be called about."""
        self.given_up = False
        """Calls did not come, and have not come again since."""
        self.counts: Counter[Verdict] = Counter()
        self.named_listeners: list[Callable[[str], None]] = []
        """Told of each order that a call names."""
        self.end_listeners: list[Callable[[Prediction, float], None]] = []
        """Told of each end that a call told first, and of the prediction's age in seconds then."""
        poller.on_unheard = self._unheard

    def __repr__(self) -> str:
        return f"<Webhooks of {self._url or 'nobody'}: {dict(self.counts)}>"

    @property
    def are_on(self) -> bool:
        """Whether orders ask the vendor to call."""
        return bool(self._url)

    # ---- the orders

    def name(self) -> str:
        """The `write_id` of an order's claim, which is its name in a call; "" without webhooks."""
        return uuid.uuid4().hex if self.are_on else ""

    def callback(self, write_id: str) -> Callback | None:
        """What the order that is about to be sent tells the vendor."""
        if not self.are_on or not write_id:
            return None
        _remember(self._orders, write_id, None)
        return callback_of(self._url, self._master, write_id)

    async def open(self) -> bool:
        """Opens the way in, once; whether it is open. What cannot be opened is said once, and asking goes on.

        Before an order is claimed: it may take seconds.
        """
        if self._way is None:
            return False
        if self._opening is None:
            self._opening = asyncio.ensure_future(self._open(self._way))
        return await asyncio.shield(self._opening) is not None

    async def _open(self, way: Way) -> Close | None:
        try:
            return await way(self.take)
        except (OSError, EachlabsError) as error:
            logger.warning("The vendor's calls cannot come in here (%s); ends are asked for.", error)
            return None

    def bought(self, write_ids: Iterable[str], prediction: Prediction) -> None:
        """One of these orders bought this prediction, which is watched by now."""
        for write_id in write_ids:
            if not self.are_on or self._orders.get(write_id) is not None:
                continue
            kept = self._kept.get(write_id)
            if kept is not None and kept.id != prediction.id:
                continue
            _remember(self._orders, write_id, prediction.id)
            _remember(self._bought_at, prediction.id, asyncio.get_running_loop().time())
            self._poller.expect_call(prediction.id)
            if kept is not None:
                self._tell(kept)

    def prediction_of(self, write_ids: Iterable[str]) -> str | None:
        """The prediction that a call has named for one of these orders."""
        return next((self._kept[one].id for one in write_ids if one in self._kept), None)

    def ended_within(self, youngest_seconds: float, oldest_seconds: float) -> set[str]:
        """Predictions that were to be called about and whose end was seen so long ago: the vendor lists their calls."""
        now = asyncio.get_running_loop().time()
        return {one for one, at in self._ended_at.items() if youngest_seconds <= now - at <= oldest_seconds}

    def seconds_until_heard(self, model: str | None) -> float:
        """How long after an order its call may come; 0 where none is waited for."""
        if not self.are_on or self._way is None or self.given_up:
            return 0.0
        return self._poller.usual_seconds(model) + CALL_SECONDS

    # ---- the calls

    def take(self, call: Call) -> Verdict:
        """What a call changes: at most the end of the one prediction that was bought by the order it proves to know."""
        verdict = self._judge(call)
        self.counts[verdict] += 1
        if verdict not in (Verdict.TAKEN, Verdict.KEPT):
            logger.debug("A call was %s; %s so far.", verdict.value, self.counts[verdict])
        return verdict

    def _judge(self, call: Call) -> Verdict:
        write_id = self._write_id_proven_by(call)
        if write_id is None:
            return Verdict.REFUSED
        end = parse_end(call.body)
        if end is None:
            return Verdict.UNREADABLE
        if (expected := self._expected.get(write_id)) is not None:
            if not expected.done():
                expected.set_result(None)
            return Verdict.TAKEN
        bought = self._orders.get(write_id)
        if bought is not None:
            return self._tell(end) if bought == end.id else Verdict.CONTRADICTS
        kept = self._kept.get(write_id)
        if kept is None or (kept.id == end.id and not kept.status.ended):
            _remember(self._kept, write_id, end)
            for listener in self.named_listeners:
                listener(write_id)
        return Verdict.KEPT

    def _write_id_proven_by(self, call: Call) -> str | None:
        """The order whose secret the call knows; of one that names none, among those that are waited for."""
        if not self._master:
            return None
        if call.write_id is not None:
            return call.write_id if call.is_proven_by(secret_of(self._master, call.write_id)) else None
        open_ = (one for one, bought in self._orders.items() if bought is None or self._poller.is_watched(bought))
        waiting = [*self._expected, *open_]
        most = min(MOST_TRIED, MOST_HASHED_BYTES // max(len(call.body), 1))
        return next((one for one in waiting[-most:] if call.is_proven_by(secret_of(self._master, one))), None)

    def _tell(self, end: Prediction) -> Verdict:
        now = asyncio.get_running_loop().time()
        ended_after = self._ends_asked.pop(end.id, self._poller.ended_after(end.id))
        first = self._poller.ended(end)
        if first:
            _remember(self._ended_at, end.id, now)
        # Where ends are asked for, a call may be late and the first all the same: the question had to wait.
        if now - ended_after <= LATE_SECONDS or (first and self._poller.calls_come):
            self._last_useful_at, self._missed, self.given_up = now, 0, False
            self._poller.calls_come = True
        if not first:
            return Verdict.KEPT
        for listener in self.end_listeners:
            listener(self._poller.end_of(end.id) or end, now - self._bought_at.get(end.id, now))
        return Verdict.TAKEN

    async def call_oneself(self, send: Callable[[Callback], Awaitable[None]], *, within_seconds: float) -> bool:
        """Whether a call that `send` makes to the URL comes in here. For `doctor`."""
        write_id = self.name()
        came = self._expected[write_id] = asyncio.get_running_loop().create_future()
        try:
            await send(callback_of(self._url, self._master, write_id))
            await asyncio.wait_for(came, within_seconds)
        except asyncio.TimeoutError:
            return False
        finally:
            del self._expected[write_id]
        return True

    # ---- whether calls are to be counted on

    def _unheard(self, prediction_id: str, overdue: bool, ended_after: float) -> None:
        """An end was asked for although a call was to tell it: the call has 30 s more, unless it was overdue."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        _remember(self._ends_asked, prediction_id, ended_after)
        _remember(self._ended_at, prediction_id, now)
        loop.call_later(0.0 if overdue else CALL_SECONDS, self._miss, prediction_id, now - CALL_SECONDS * overdue)

    def _miss(self, prediction_id: str, ended_at: float) -> None:
        """One that is lost among others that come is no sign that none come."""
        if prediction_id not in self._ends_asked or self._last_useful_at > ended_at:
            return
        self._missed += 1
        if self._missed >= MISSED_IN_A_ROW:
            self._give_up("do not come")

    def heard(self, late_seconds: Sequence[float]) -> None:
        """How long after their ends calls came that had been counted on, of some that the list tells at once."""
        if len(late_seconds) >= MISSED_IN_A_ROW and median(late_seconds) > LATE_SECONDS:
            self._give_up("come late")

    def _give_up(self, what: str) -> None:
        self._poller.calls_come = False
        if not self.given_up:
            self.given_up = True
            logger.warning(
                "The vendor's calls %s. Ends are asked for again; orders go on asking for calls, and the next that "
                "comes in time is counted on again. `prefect-eachlabs doctor` tries the way from EACHLABS_WEBHOOK_URL "
                "to here.",
                what,
            )

    async def aclose(self) -> None:
        """Closes the way in."""
        opening, self._opening = self._opening, None
        if opening is not None:
            opening.cancel()
            (close,) = await asyncio.gather(opening, return_exceptions=True)
            if callable(close):
                await close()


def _remember(memory: OrderedDict[str, T], name: str, value: T) -> None:
    memory[name] = value
    while len(memory) > REMEMBERED:
        memory.popitem(last=False)
