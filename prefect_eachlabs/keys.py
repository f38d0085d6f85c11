"""The key under which a purchase without a ledger is kept, so that a retried flow finds what it bought."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

from prefect.cache_policies import CachePolicy
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.context import FlowRunContext, TaskRunContext

from prefect_eachlabs.errors import BadInput
from prefect_eachlabs.models import Item
from prefect_eachlabs.reference_images import Roots, opened

MOST_REMEMBERED = 1_000


class OnceInAFlowRun(CachePolicy):
    """`eachlabs/{flow_run_id}/{fingerprint}/{n}`; of a subflow, the outermost run's id and the way down to it.

    `n` counts equal inputs of one attempt of the flow, so that a retried flow or task finds what it bought, and two
    equal prompts stay two. Prefect's own keys make one prediction of them.
    """

    def compute_key(
        self, task_ctx: TaskRunContext, inputs: dict[str, Any], flow_parameters: dict[str, Any], **kwargs: Any
    ) -> str | None:
        """The key; None with a destination, whose record does it better, and for an input that is refused anyway."""
        if inputs.get("destination") is not None:
            return None
        names = ("prompt", "model", "version", "item_id", "input", "sample")
        try:
            picture = opened(inputs.get("image_url"), Roots.from_environment())
            item = Item.wanted(image_url=picture, **{name: inputs[name] for name in names if name in inputs})
        except BadInput:
            return None
        flow_context = FlowRunContext.get()
        flow_run = flow_context.flow_run if flow_context is not None else None
        if not isinstance(flow_run, FlowRun):
            return f"eachlabs/{task_ctx.task_run.id}/{item.fingerprint}/1"
        attempt = f"{flow_run.id}/{flow_run.run_count}"
        number = _numbers.number(attempt, item.fingerprint, str(task_ctx.task_run.id))
        return f"eachlabs/{_scopes.scope(flow_run)}/{item.fingerprint}/{number}"


class _Numbers:
    """Numbers equal inputs of one attempt of a flow run, in the order in which their task runs begin."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: OrderedDict[str, dict[str, list[str]]] = OrderedDict()

    def number(self, attempt: str, fingerprint: str, task_run_id: str) -> int:
        with self._lock:
            of_attempt = self._seen.setdefault(attempt, {})
            self._seen.move_to_end(attempt)
            if len(self._seen) > MOST_REMEMBERED:
                self._seen.popitem(last=False)
            runs = of_attempt.setdefault(fingerprint, [])
            if task_run_id not in runs:
                runs.append(task_run_id)
            return runs.index(task_run_id) + 1


class _Scopes:
    """What stays the same when a flow run is retried.

    Prefect gives the subflow of a retried flow a fresh run (and a fresh id) unless its result was persisted. What
    stays is the outermost run, and the place of each subflow's call in the flow above it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: OrderedDict[str, str] = OrderedDict()

    def scope(self, flow_run: FlowRun) -> str:
        if flow_run.parent_task_run_id is None:
            return str(flow_run.id)
        key = str(flow_run.id)
        with self._lock:
            if key in self._known:
                return self._known[key]
        way: list[str] = []
        with get_client(sync_client=True) as client:
            while flow_run.parent_task_run_id is not None:
                call = client.read_task_run(flow_run.parent_task_run_id)
                way.insert(0, f"{call.task_key}-{call.dynamic_key}")
                if call.flow_run_id is None:
                    break
                flow_run = client.read_flow_run(call.flow_run_id)
        scope = "/".join([str(flow_run.id), *way])
        with self._lock:
            self._known[key] = scope
            if len(self._known) > MOST_REMEMBERED:
                self._known.popitem(last=False)
        return scope


_numbers = _Numbers()
_scopes = _Scopes()
