"""A flow, written once as a plan, for sync and for async callers; and how it ends.

An error of this package ends it as Failed, with the error's sentence for a message; callers are raised the error.
Where Prefect keeps results, it keeps these as JSON: its own choice is pickle. A state that a plan returns is the flow's
own: callers get, or are raised, what it holds.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar, cast

from prefect import Flow, Task
from prefect.client.schemas.objects import State
from prefect.context import FlowRunContext
from prefect.states import Completed, Failed

from prefect_eachlabs.engine.sync_async import Plan, alone, async_wrapper, either, sync_wrapper
from prefect_eachlabs.errors import EachlabsError

P = ParamSpec("P")
T = TypeVar("T")


def sync_flow(
    name: str, *, description: str, flow_run_name: Callable[[], str] | None = None
) -> Callable[[Callable[P, Plan[T]]], Flow[P, T]]:
    """Makes a plan the flow of that name: the one that is deployed, and that sync code calls."""

    facts: dict[str, Any] = {"name": name, "description": description, "flow_run_name": flow_run_name}
    return lambda plan: _kept_as_json(Flow(_typed(sync_wrapper(plan, _failed)), **facts))


def async_flow(blocking: Flow[P, T]) -> Flow[P, Coroutine[Any, Any, T]]:
    """The same flow for async callers, to be awaited."""
    facts = {name: getattr(blocking, name) for name in ("name", "description", "flow_run_name")}
    return _kept_as_json(Flow(_typed(async_wrapper(blocking.fn, _failed)), **facts))


def _typed(form: Callable[P, T]) -> Callable[P, T]:
    """With the plan's types themselves: Prefect would look for their names where the wrapper is written."""
    signature = inspect.signature(inspect.unwrap(form), eval_str=True)
    form.__annotations__ = {name: one.annotation for name, one in signature.parameters.items()}
    form.__signature__ = signature.replace(return_annotation=inspect.Signature.empty)  # type: ignore[attr-defined]  # what inspect reads, and Prefect
    return form


def both(blocking: Task[P, T], awaiting: Task[P, Coroutine[Any, Any, T]], *args: P.args, **kwargs: P.kwargs) -> Plan[T]:
    """A task, in the form that whoever calls the flow needs."""
    return either(blocking, awaiting, *args, **kwargs)


def ended(message: str, data: T, error: EachlabsError | None = None) -> T:
    """A flow's own end: Completed with what callers get, or Failed with what they are raised."""
    return cast(T, Failed(message=message, data=error) if error else Completed(message=message, data=data))


def _failed(error: EachlabsError) -> State[Any]:
    if FlowRunContext.get() is None:  # called through `.fn`
        raise error
    # Raised, it would stand in the state behind Prefect's own words and the name of its class.
    return Failed(message=str(error), data=alone(error))


def _kept_as_json(flow: Flow[P, T]) -> Flow[P, T]:
    flow.result_serializer = "json"  # as an argument of `Flow` it would have them kept everywhere
    return flow
