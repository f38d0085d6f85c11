"""What a run's log and state say of an error of this package: one sentence, without the calls that it came through."""

from __future__ import annotations

import io
import logging
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect import flow
from prefect.flow_engine import run_flow

from prefect_eachlabs import generate_and_store, generate_rows
from prefect_eachlabs.errors import BadInput, BatchIncomplete, EachlabsError, SetupError
from prefect_eachlabs.flows import generate_batch, generate_image, settle_leftovers
from tests.flows.flow_fixtures import Studio

pytestmark = pytest.mark.usefixtures("prefect_server")

NO_BUCKET = "s3://no-such-bucket-here/p"


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """What Prefect's loggers print of runs."""
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    names = ("prefect.flow_runs", "prefect.task_runs", "prefect.engine", "prefect.flow_engine")
    loggers = [logging.getLogger(name) for name in names]
    levels = [one.level for one in loggers]
    for one in loggers:
        one.addHandler(handler)
        one.setLevel(logging.INFO)
    yield text
    for one, level in zip(loggers, levels, strict=True):
        one.removeHandler(handler)
        one.setLevel(level)


@flow(name="a-users-own")
def users_own() -> str:
    return generate_and_store("a red fox", destination=NO_BUCKET).uri


@flow(name="a-users-rows")
def users_rows() -> Any:
    return generate_rows([{"prompt": "a red fox"}], destination=NO_BUCKET)


def of_the_bucket() -> list[Callable[[], Any]]:
    return [
        users_own,
        users_rows,
        lambda: settle_leftovers(NO_BUCKET),
        lambda: generate_batch("prompts.csv", NO_BUCKET),
    ]


@pytest.mark.parametrize("number", range(4), ids=["task", "rows", "settle", "generate-batch"])
def test_a_wrong_bucket_is_told_in_one_sentence(
    studio: Studio, log: io.StringIO, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompts.csv").write_text("prompt\na red fox\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EACHLABS_REFERENCE_ROOTS", str(tmp_path))
    with pytest.raises(SetupError, match="NoSuchBucket") as caught:
        of_the_bucket()[number]()
    assert studio.billed == 0
    printed = log.getvalue()
    assert "NoSuchBucket" in printed.strip().splitlines()[-1]
    assert "Traceback" not in printed
    assert len(printed.splitlines()) <= 10, printed
    told = "".join(traceback.format_exception(caught.value))
    assert told.count("Traceback") == 1, "its causes add nothing"
    assert "botocore" not in told
    assert told.rstrip().endswith(str(caught.value))


def test_a_missing_key_and_an_api_that_is_away_are_told_so(
    studio: Studio, log: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    @flow(name="no-key")
    def no_key() -> Any:
        return generate_rows([{"prompt": "a red fox"}], destination=studio.destination)

    monkeypatch.delenv("EACHLABS_API_KEY")
    with pytest.raises(SetupError, match="No API key"):
        no_key()
    assert "Traceback" not in log.getvalue()
    assert "No API key" in log.getvalue().strip().splitlines()[-1]


def test_a_deployed_runs_state_is_the_sentence_itself(studio: Studio, log: io.StringIO, tmp_path: Path) -> None:
    """As a worker's process runs it, which logs once more what came out."""
    state = generate_image("a red fox", NO_BUCKET, return_state=True)
    assert state.is_failed()
    assert isinstance(state.data.result if hasattr(state.data, "result") else state.data, SetupError)
    assert str(state.message).startswith("Bucket") or "NoSuchBucket" in str(state.message)
    assert "SetupError" not in str(state.message)
    with pytest.raises(SetupError):
        run_flow(
            generate_image,
            parameters={"prompt": "a red fox", "destination": NO_BUCKET},
            error_logger=logging.getLogger("prefect.flow_runs"),
        )
    assert "Traceback" not in log.getvalue()
    assert "NoSuchBucket" in log.getvalue().strip().splitlines()[-1]


def test_a_batch_with_a_bad_row_raises_an_error_of_ours_out_of_a_parent_flow(
    studio: Studio, log: io.StringIO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "zoo.csv").write_text("id,prompt\na,a fox\nb,\n")
    monkeypatch.setenv("EACHLABS_REFERENCE_ROOTS", str(tmp_path))

    @flow(name="parent")
    def parent() -> str:
        try:
            generate_batch(tmp_path / "zoo.csv", studio.destination)
        except BatchIncomplete as error:
            return error.result.report_uri if error.result is not None else "no result"
        return "complete"

    assert parent() == f"{studio.destination}/batches/zoo/report.json"
    assert "Traceback" not in log.getvalue()


def test_a_persons_own_faults_keep_their_tracebacks(studio: Studio, log: io.StringIO) -> None:
    @flow(name="faulty")
    def faulty() -> None:
        raise ZeroDivisionError("a fault of the flow's own")

    with pytest.raises(ZeroDivisionError):
        faulty()
    assert "Traceback" in log.getvalue()


def test_at_debug_level_the_calls_are_there(studio: Studio, log: io.StringIO, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "prefect_eachlabs"), pytest.raises(EachlabsError):
        users_own()
    assert "botocore" in caplog.text
    assert "Traceback" in log.getvalue()


def test_what_the_form_may_not_hold_is_one_sentence_too(studio: Studio, log: io.StringIO) -> None:
    with pytest.raises(BadInput, match="input_json"):
        generate_image("a red fox", studio.destination, input_json="{")
    assert "Traceback" not in log.getvalue()
