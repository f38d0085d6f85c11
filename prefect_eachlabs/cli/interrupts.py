"""Ctrl-C: what was in flight is cancelled, and whoever pressed it is told what came of it."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from prefect_eachlabs.engine.account import Interruption
from prefect_eachlabs.engine.runtime import CutShort, close_gateways, gateway_for
from prefect_eachlabs.errors import StoreFailed

if TYPE_CHECKING:
    from prefect_eachlabs.engine.runtime import Gateway, MakeLimiter

T = TypeVar("T")

CLEAN_UP_SECONDS = 120.0
"""The end of all patience: cancels wait for request slots, up to a minute, and then the report is written."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, and what came of it.

    Attributes:
        message: For people.
        answer: More of the JSON object.
        at_once: The process is to end without waiting for anything.
    """

    def __init__(self, message: str, answer: Mapping[str, Any] | None = None, *, at_once: bool = False) -> None:
        super().__init__(message)
        self.message = message
        self.answer = dict(answer or {})
        self.at_once = at_once


def call(
    make_limiter: MakeLimiter | None,
    work: Callable[[Gateway], Coroutine[Any, Any, T]],
    came_of: Callable[[Gateway], Interrupted],
) -> T:
    """Runs the work on the account's gateway, which is closed in the end.

    Args:
        make_limiter: Who counts the account's slots.
        work: What is to be done.
        came_of: What a Ctrl-C has come to, when what was in flight has been cleaned up.

    Raises:
        Interrupted: Ctrl-C, or the SIGTERM of a service manager, a container or a CI job; the second one comes back
            at once, and leaves what is in flight as it is.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    is_left = False
    try:
        gateway = gateway_for(make_limiter=make_limiter)
        try:
            return gateway.call(work(gateway), clean_up_seconds=CLEAN_UP_SECONDS)
        except StoreFailed as error:
            if not gateway.engine.account.client.orders_sent:
                error.message += " Nothing was bought."
            raise
        except CutShort as error:
            is_left = True
            raise _left_in_flight(gateway.engine.in_flight) from error
        except KeyboardInterrupt as error:
            raise came_of(gateway) from error
    except asyncio.CancelledError:  # the gateway was closed under it
        raise KeyboardInterrupt from None
    finally:
        if not is_left:
            close_gateways()


def _left_in_flight(count: int) -> Interrupted:
    if not count:
        return Interrupted("Ended at once; nothing was in flight any more.", {"left_in_flight": 0}, at_once=True)
    return Interrupted(
        f"Ended at once: {_predictions(count)} in flight left, whose cancel the API has not confirmed. What ends is "
        "paid for: run the same again, or `prefect-eachlabs settle`, and it is stored.",
        {"left_in_flight": count},
        at_once=True,
    )


def interrupt_summary(ends: Mapping[str, Interruption], *, unanswered: int) -> tuple[str, dict[str, int]]:
    """What came of predictions in flight when their run was interrupted, in words and in numbers.

    Args:
        ends: Prediction id → what came of it.
        unanswered: Orders that nobody has answered yet.
    """
    counts = Counter(ends.values())
    cancelled, stored, left = (counts[end] for end in (Interruption.CANCELLED, Interruption.STORED, Interruption.OPEN))
    left += unanswered
    numbers = {"cancelled": cancelled, "stored_after_all": stored, "left_in_flight": left}
    total = cancelled + stored + left
    if not total:
        return "Interrupted; nothing was in flight.", numbers
    text = f"Interrupted with {_predictions(total)} in progress: the API confirms {cancelled} as cancelled, which cost "
    text += "nothing"
    if stored:
        text += f"; {stored} had ended and {'is' if stored == 1 else 'are'} stored"
    if left:
        verb = "is" if left == 1 else "are"
        text += f"; {left} {verb} paid for if {'it ends' if left == 1 else 'they end'}, and {verb} not stored yet"
    return f"{text}.", numbers


def _predictions(count: int) -> str:
    return f"{count:,} prediction{'' if count == 1 else 's'}"
