"""A batch in shares: nobody's rows overlap, nobody's are lost, and there is one report in the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.states import Scheduled

from prefect_eachlabs.batch.run import shard_of
from prefect_eachlabs.errors import BadInput, SetupError
from prefect_eachlabs.flows import shards
from prefect_eachlabs.flows.batch import generate_batch
from tests.flows.flow_fixtures import Studio

ROWS = 6


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("EACHLABS_REFERENCE_ROOTS", str(tmp_path))
    path = tmp_path / "harbours.csv"
    path.write_text("\n".join(["prompt", *(f"a harbour at {n}" for n in range(ROWS))]))
    return str(path)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64])
def test_shares_do_not_overlap_and_leave_nothing_out(count: int) -> None:
    items = [f"item-{n}" for n in range(2_000)]
    sizes = [sum(shard_of(item, count) == number for item in items) for number in range(count)]
    assert sum(sizes) == len(items)
    assert min(sizes) > len(items) / count / 3


@pytest.mark.usefixtures("prefect_server")
class TestOnAServer:
    def batch(self, studio: Studio, table: str, **more: Any) -> State[Any]:
        state: State[Any] = generate_batch(table, studio.destination, return_state=True, **more)
        return state

    def test_a_share_leaves_parts_and_no_report_and_the_batch_buys_the_rest(self, studio: Studio, table: str) -> None:
        share = generate_batch(table, studio.destination, shard="2/2")
        assert 0 < share.stored == studio.billed < ROWS
        names = studio.keys("batches/harbours/")
        assert [name.rpartition("/")[2] for name in names if name.endswith(".jsonl")] == ["part-00001.jsonl"]
        state = self.batch(studio, table)
        assert state.is_completed(), state.message
        assert studio.billed == ROWS
        assert "report.jsonl" in studio.keys("batches/harbours/")

    def test_a_share_that_no_worker_begins_is_done_by_the_first_one_and_cancelled(
        self, studio: Studio, table: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made: list[FlowRun] = []

        def scheduled(name: str, parameters: dict[str, Any], **_: Any) -> FlowRun:
            assert (name, parameters["shard"]) == (shards.DEPLOYMENT, f"{len(made) + 2}/3")
            with get_client(sync_client=True) as client:
                made.append(client.create_flow_run(generate_batch, parameters=parameters, state=Scheduled()))
            return made[-1]

        monkeypatch.setattr(shards, "run_deployment", scheduled)
        state = self.batch(studio, table, shards=3)
        assert state.is_completed(), state.message
        assert f"{ROWS} stored, 0 reused" in str(state.message)
        assert studio.billed == ROWS
        with get_client(sync_client=True) as client:
            states = [client.read_flow_run(run.id).state for run in made]
        assert [one.is_cancelled() for one in states if one is not None] == [True, True]

    def test_without_its_deployment_nothing_is_bought(self, studio: Studio, table: str) -> None:
        with pytest.raises(SetupError, match="generate-batch/shard"):
            generate_batch(table, studio.destination, shards=2)
        assert studio.billed == 0

    def test_a_budget_is_for_one_worker(self, studio: Studio, table: str) -> None:
        for wrong in ({"shards": 2, "budget_usd": 1.0}, {"shards": 0}, {"shards": 65}):
            with pytest.raises(BadInput, match="shards"):
                generate_batch.fn(table, studio.destination, **wrong)  # type: ignore[arg-type]
        for wrong_share in ("0/2", "3/2", "2", "1/65", "a/b"):
            with pytest.raises(BadInput, match="shard"):
                generate_batch.fn(table, studio.destination, shard=wrong_share)
