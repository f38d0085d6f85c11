"""The audit's flow: what is accounted for completes it, what is not fails it and is named in its artifact."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from prefect.client.schemas.objects import State

from prefect_eachlabs.errors import BadInput, OutcomeUnknown
from prefect_eachlabs.flows import audit_bill, generate_image
from tests.flows.flow_fixtures import Studio, last_artifact

pytestmark = pytest.mark.usefixtures("prefect_server")


def audited(destinations: str, **given: str) -> State[Any]:
    state: State[Any] = audit_bill(destinations, **given, return_state=True)
    return state


def test_a_bill_that_is_accounted_for_completes_and_one_that_is_not_fails_and_says_what_to_do(studio: Studio) -> None:
    generate_image("a red fox", studio.destination, item_id="fox")
    state = audited(f"{studio.destination}, {studio.destination}/elsewhere")
    assert state.is_completed(), state.message
    said = asyncio.run(state.aresult())
    assert (said["executions"], said["stored"]["count"], said["billed_usd"]) == (1, 1, 0.039)
    assert "every cent of these destinations is accounted for" in str(state.message)
    artifact = last_artifact("eachlabs-audit")
    assert artifact.description == "The bill accounted for"
    for words in ("paid and stored", "█", "0.0390", "fox&#46;png"):
        assert words in artifact.data

    studio.delete("images/fox.png")
    state = audited(studio.destination, since="")
    assert state.is_failed()
    assert "1 paid and not stored" in str(state.message)
    assert "&#45;&#45;rebuy&#45;missing" in last_artifact("eachlabs-audit").data
    with pytest.raises(OutcomeUnknown, match="paid and not stored"):
        audit_bill(studio.destination)
    assert studio.billed == 1


def test_a_window_that_is_none_is_refused(studio: Studio) -> None:
    with pytest.raises(BadInput, match="since: 'yesterday' must be a day"):
        audit_bill(studio.destination, since="yesterday")
