"""A batch on several workers: each takes its share of the items, and the first one finishes what the others leave.

Which worker buys an item is settled by its record in the bucket, as always; shares only keep workers out of each
other's way. So nobody has to find out whether a worker is still alive: the first one goes through the whole table at
the end, waits for what others have in flight, and buys what nobody has bought.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.runtime import flow_run
from prefect.states import Cancelled, Cancelling

from prefect_eachlabs.errors import BadInput, SetupError

logger = logging.getLogger(__name__)

DEPLOYMENT = "generate-batch/shard"
MOST_SHARDS = 64
NEVER_FAILS = 10**9
"""Rows without a picture that a share may have: the first run goes through all rows, and says what is not there."""


def one_of(shard: str) -> tuple[int, int] | None:
    """Which share `2/4` is, counted from 0, and of how many; None where none is named.

    Raises:
        BadInput: It is not one.
    """
    if not shard.strip():
        return None
    number, _, shards = shard.partition("/")
    try:
        found = int(number) - 1, int(shards)
    except ValueError:
        found = -1, 0
    if not 0 <= found[0] < found[1] <= MOST_SHARDS:
        raise BadInput(f"shard: {shard[:40]!r} must be such as 2/4, of {MOST_SHARDS} at most.")
    return found


def start_shares(shards: int, parameters: Mapping[str, Any]) -> list[UUID]:
    """Runs shares 2 to N on the work pool. Blocks.

    Args:
        shards: How many in all.
        parameters: Of `generate_batch`.

    Raises:
        BadInput: Too many, or none.
        SetupError: The deployment is not there.
    """
    if not 1 <= shards <= MOST_SHARDS:
        raise BadInput(f"shards: {shards} must be 1 to {MOST_SHARDS}.")
    runs: list[UUID] = []
    try:
        for number in range(2, shards + 1):
            given = {"shard": f"{number}/{shards}", "shards": 1, "fail_above": NEVER_FAILS}
            run = run_deployment(
                DEPLOYMENT,
                parameters={**{name: value for name, value in parameters.items() if value is not None}, **given},
                flow_run_name=f"share {number}/{shards}",
                timeout=0,
                # Prefect's retry of the flow begins anew; a repeated request of this attempt does not.
                idempotency_key=f"{flow_run.id}/{flow_run.run_count}/{number}",
            )
            assert isinstance(run, FlowRun), "called from a sync flow"
            runs.append(run.id)
    except BaseException as error:
        end_shares(runs, also_running=True)
        if isinstance(error, ObjectNotFound):
            raise SetupError(
                f"shards={shards} needs the deployment {DEPLOYMENT}: prefect-eachlabs setup --deploy makes it; or run "
                "with shards=1. Nothing was bought."
            ) from error
        raise
    return runs


def end_shares(runs: Sequence[UUID], *, also_running: bool) -> None:
    """Cancels those that no worker has begun, or all. Blocks.

    Best effort: a shard that is not ended finds every row done, and ends by itself.
    """
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
