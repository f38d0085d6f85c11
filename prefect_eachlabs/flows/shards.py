"""A batch on several workers: each takes its share of the items, and the first one finishes what the others leave.

Which worker buys an item is settled by its record in the bucket, as always; shares only keep workers out of each
other's way. So nobody has to find out whether a worker is still alive: the first one goes through the whole table at
the end, waits for what others have in flight, and buys what nobody has bought.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.runtime import flow_run
from prefect.states import Cancelled, Cancelling

from prefect_eachlabs.errors import SetupError

logger = logging.getLogger(__name__)

DEPLOYMENT = "generate-shard/generate-shard"
MOST_SHARDS = 64


@contextmanager
def other_shards(shards: int, parameters: Mapping[str, Any]) -> Iterator[list[UUID]]:
    """Runs shards 1 to N-1 on the work pool while the block runs shard 0 and then everything.

    Left by an error or a cancel, it cancels them; left in peace, those that no worker has begun.

    Args:
        shards: How many in all.
        parameters: Of `generate_shard`, but for its number.

    Raises:
        SetupError: The deployment is not there.
    """
    runs: list[UUID] = []
    try:
        for number in range(1, shards):
            runs.append(_start(number, shards, parameters))
        yield runs
    except BaseException:
        _end(runs, also_running=True)
        raise
    _end(runs, also_running=False)


def _start(number: int, shards: int, parameters: Mapping[str, Any]) -> UUID:
    try:
        run = run_deployment(
            DEPLOYMENT,
            parameters={**parameters, "shard": number, "shards": shards},
            flow_run_name=f"shard {number} of {shards}",
            timeout=0,
            # Prefect's retry of the flow begins anew; a repeated request of this attempt does not.
            idempotency_key=f"{flow_run.id}/{flow_run.run_count}/{number}",
        )
    except ObjectNotFound as error:
        raise SetupError(
            f"shards={shards} needs the deployment {DEPLOYMENT}: prefect --no-prompt deploy --all --prefect-file "
            "deployments/prefect.yaml; or run with shards=1. Nothing was bought."
        ) from error
    assert isinstance(run, FlowRun), "called from a sync flow"
    return run.id


def _end(runs: Sequence[UUID], *, also_running: bool) -> None:
    """Best effort: a shard that is not ended finds every row done, and ends by itself."""
    if not runs:
        return
    try:
        with get_client(sync_client=True) as client:
            for run_id in runs:
                state = client.read_flow_run(run_id).state
                if state is None or state.is_final():
                    continue
                if state.is_scheduled() or state.is_pending():
                    client.set_flow_run_state(run_id, Cancelled(message="The batch ended without it."))
                elif also_running:
                    client.set_flow_run_state(run_id, Cancelling(message="The batch was stopped."))
    except Exception as error:
        logger.warning("A shard could not be ended: %s: %s", type(error).__name__, str(error)[:200])
