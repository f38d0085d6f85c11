"""The janitor's flow: says what it did, and fails when somebody must look."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from prefect.client.schemas.objects import State

from prefect_eachlabs import create_prediction
from prefect_eachlabs.engine.cleanup import SettleReport
from prefect_eachlabs.engine.engine import Engine
from prefect_eachlabs.errors import OutcomeUnknown, SetupError
from prefect_eachlabs.flows import settle as settle_flow
from prefect_eachlabs.flows.settle import settle_leftovers
from tests.flows.flow_fixtures import Studio, last_artifact

pytestmark = pytest.mark.usefixtures("prefect_server")


def settled(destination: str) -> State[Any]:
    state: State[Any] = settle_leftovers(destination, return_state=True)
    return state


def test_what_was_bought_and_left_is_stored_and_a_tidy_bucket_is_completed(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that died after its purchase: with times of nought its record is old at once."""
    create_prediction.fn("a red fox", destination=studio.destination, item_id="left")
    monkeypatch.setenv("EACHLABS_CLAIM_SECONDS", "1")
    monkeypatch.setenv("EACHLABS_DEADLINE_SECONDS", "0.5")
    real = settle_flow.gateway_of

    def impatient(credentials: Any) -> Any:
        gateway = real(credentials)
        gateway.engine.account.settings = gateway.settings.model_copy(
            update={"claim_seconds": -5.0, "deadline_seconds": 0.5}
        )
        return gateway

    monkeypatch.setattr(settle_flow, "gateway_of", impatient)
    state = settled(studio.destination)
    assert state.is_completed(), state.message
    assert asyncio.run(state.aresult())["stored"] == 1
    assert (studio.keys(), studio.billed) == (["left.png"], 1)
    state = settled(studio.destination)
    assert state.is_completed()
    assert "1 records, 0 to settle" in str(state.message)
    assert last_artifact("eachlabs-settle").description == "What runs left behind"


def test_ambiguous_items_fail_the_run_with_their_reasons(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    problems = {f"item-{n}": "it may have been bought: look at the <dashboard>" for n in range(7)}

    async def settle(*_: object, **__: object) -> SettleReport:
        return SettleReport(records=9, looked_at=7, ambiguous=7, problems=problems)

    real = Engine.__init__

    def init(self: Engine, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **kwargs)
        self.settle = settle  # type: ignore[method-assign]

    monkeypatch.setattr(Engine, "__init__", init)
    state = settled(studio.destination)
    assert state.is_failed()
    for words in ("7 ambiguous", "item-0: it may have been bought", "and 2 more in the artifact"):
        assert words in str(state.message)
    assert "item&#45;6" in last_artifact("eachlabs-settle").data
    with pytest.raises(OutcomeUnknown, match="7 ambiguous"):
        settle_leftovers(studio.destination)


def test_a_block_that_is_not_there_fails_the_run_with_what_to_do(studio: Studio) -> None:
    with pytest.raises(SetupError, match="Blocks"):
        settle_leftovers("eachlabs-s3-destination/nobody")
