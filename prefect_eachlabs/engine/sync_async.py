"""What is to be done, written once for sync and for async callers: a generator that yields its steps.

    def stored(gateway: Gateway, uri: str) -> Plan[StoredImage]:
        image = yield from on_the_loop(gateway, gateway.engine.find(uri))
        data = yield from beside_the_loop(Path(uri).read_bytes)
        return image

`run(stored(...))` blocks at each step, `await arun(stored(...))` awaits each. Between its steps a plan runs where its
caller runs, in the caller's context; it must not block there.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Generator
from functools import wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar, cast

from prefect_eachlabs.engine.runtime import Gateway
from prefect_eachlabs.errors import EachlabsError
from prefect_eachlabs.net import redaction

logger = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")


class Step(NamedTuple):
    """A step of a plan: how it is done by a caller that may block, and by one that awaits."""

    blocking: Callable[[], Any]
    awaiting: Callable[[], Awaitable[Any]]


Plan = Generator[Step, Any, T]


def on_the_loop(gateway: Gateway, work: Coroutine[Any, Any, T]) -> Plan[T]:
    """Work of the account's engine, on the gateway's own loop."""
    done: T = yield Step(lambda: gateway.call(work), lambda: gateway.acall(work))
    return done


def beside_the_loop(work: Callable[[], T]) -> Plan[T]:
    """Work that blocks: beside the caller's loop, where it has one."""
    done: T = yield Step(work, lambda: asyncio.to_thread(work))
    return done


def either(blocking: Callable[P, T], awaiting: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> Plan[T]:
    """A call of a library that has both forms itself."""
    done: T = yield Step(lambda: blocking(*args, **kwargs), lambda: awaiting(*args, **kwargs))
    return done


def run(plan: Plan[T]) -> T:
    """Goes through a plan, blocking; what a step raises is raised in the plan."""
    try:
        step = next(plan)
        while True:
            try:
                done = step.blocking()
            except BaseException as error:
                step = plan.throw(error)
            else:
                step = plan.send(done)
    except StopIteration as end:
        found: T = end.value
        return found


async def arun(plan: Plan[T]) -> T:
    """Goes through a plan, awaiting."""
    try:
        step = next(plan)
        while True:
            try:
                done = await step.awaiting()
            except BaseException as error:
                step = plan.throw(error)
            else:
                step = plan.send(done)
    except StopIteration as end:
        found: T = end.value
        return found


Failed = Callable[[EachlabsError], Any]
"""What comes of an error of this package: it is raised, or returns what the caller gets instead."""


def sync_wrapper(plan: Callable[P, Plan[T]], failed: Failed) -> Callable[P, T]:
    """The plan for callers that may block."""

    @wraps(plan)
    def form(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return run(plan(*args, **kwargs))
        except EachlabsError as error:
            return cast(T, failed(error))

    return form


def async_wrapper(blocking: Callable[P, Any], failed: Failed) -> Callable[P, Coroutine[Any, Any, Any]]:
    """The plan of a `sync_wrapper` for callers that await; its name has an `a` in front."""
    plan: Callable[P, Plan[Any]] = blocking.__wrapped__  # type: ignore[attr-defined]  # by functools.wraps

    @wraps(plan)
    async def form(*args: P.args, **kwargs: P.kwargs) -> Any:
        try:
            return await arun(plan(*args, **kwargs))
        except EachlabsError as error:
            return failed(error)

    form.__name__ = form.__qualname__ = f"a{plan.__name__}"
    return form


def alone(error: EachlabsError) -> EachlabsError:
    """The error as it leaves the package: what happened and what to do, without the calls that it came through.

    Those stand in the log at debug level, with the causes (of httpx, of boto3), and Prefect logs the sentence alone.
    """
    redaction.install()
    logger.debug("%s", error, exc_info=error)
    error.__cause__, error.__suppress_context__ = None, True
    return error.with_traceback(None)
