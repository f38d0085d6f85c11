"""Ctrl-C on `batch` and `generate`, in processes of their own, judged by what the vendor and the bucket saw."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefect_eachlabs.testing.emulator import EmulatorOptions, EmulatorServer
from prefect_eachlabs.testing.s3 import Fault, LocalS3
from tests.batch.cli_process import Command, cancels_of, command, emptied, objects_of, table_of

pytestmark = pytest.mark.slow

BUCKET = "interrupted"
PRICE_USD = 0.039


@pytest.fixture
def s3() -> Iterator[LocalS3]:
    with LocalS3(buckets=[BUCKET]) as server:
        yield emptied(server, BUCKET)


@pytest.fixture
def api() -> Iterator[EmulatorServer]:
    options = EmulatorOptions(
        service_seconds=600.0, requests_per_minute=None, max_in_flight=10, image_size_px=64, pictures="plain"
    )
    with EmulatorServer(options) as server:
        yield server


def batch(folder: Path, rows: int) -> list[str]:
    return ["batch", table_of(folder, rows), "--to", f"s3://{BUCKET}/p", "--json"]


def is_true_to_the_vendor(running: Command, api: EmulatorServer, s3: LocalS3) -> None:
    """The report, the JSON and the bill say the same."""
    tallies = api.tallies()
    answer = running.answer
    assert answer["status"] == "failed"
    assert answer["cost_usd"] == pytest.approx(tallies["cost_usd"])
    assert answer["cancelled"] == tallies["cancelled"]
    objects = objects_of(s3, BUCKET, "p/batches/spring/")
    report = json.loads(objects["report.json"])
    assert report["cost_usd"] == pytest.approx(tallies["cost_usd"])
    rows = [json.loads(line) for line in objects["report.jsonl"].splitlines()]
    named = {row["prediction_id"] for row in rows if row["prediction_id"]}
    assert named == {prediction["id"] for prediction in api.predictions()}
    assert b"interrupted" in objects["index.html"]


def test_each_prediction_in_flight_is_cancelled_once_and_the_report_says_so(
    api: EmulatorServer, s3: LocalS3, tmp_path: Path
) -> None:
    """By SIGTERM here; by Ctrl-C in all the others."""
    with command(batch(tmp_path, 40), api, s3, tmp_path / "run") as running:
        running.until(lambda: api.tallies()["in_flight"] == 10)
        running.press_ctrl_c(signal.SIGTERM)
        assert running.wait() == 130
    assert sorted(cancels_of(api).values()) == [1] * 10
    assert (api.tallies()["cancelled"], api.tallies()["in_flight"]) == (10, 0)
    assert (running.answer["cancelled"], running.answer["left_in_flight"], running.answer["cost_unknown"]) == (10, 0, 0)
    assert "10 predictions in progress: the API confirms 10 as cancelled" in running.said
    is_true_to_the_vendor(running, api, s3)


def test_before_the_first_order_nothing_is_bought(api: EmulatorServer, s3: LocalS3, tmp_path: Path) -> None:
    s3.set_faults(latency_seconds=0.2)
    before = s3.counts()
    with command(batch(tmp_path, 40), api, s3, tmp_path / "run") as running:
        running.until(lambda: s3.counts() != before)
        running.press_ctrl_c()
        assert running.wait() == 130
    assert api.predictions() == []
    assert "nothing was in flight" in running.said


def test_what_is_being_downloaded_is_stored_and_what_is_in_flight_is_cancelled(s3: LocalS3, tmp_path: Path) -> None:
    options = EmulatorOptions(
        service_seconds=0.3, requests_per_minute=None, max_in_flight=10, image_size_px=64, pictures="plain"
    )
    with EmulatorServer(options) as api:
        api.set_faults("picture:slow,seconds=3", "prediction:stuck,matching=fox 1")
        with command(batch(tmp_path, 12), api, s3, tmp_path / "run") as running:
            running.until(lambda: sum(row["path"].startswith("/files/") for row in api.journal()) >= 8)
            running.press_ctrl_c()
            assert running.wait() == 130
        assert set(cancels_of(api).values()) == {1}
        assert api.tallies()["in_flight"] == 0
        assert running.answer["stored"] == api.tallies()["succeeded"]
        assert running.answer["left_in_flight"] == 0
        is_true_to_the_vendor(running, api, s3)


def test_while_the_report_is_written_it_is_written_to_its_end(s3: LocalS3, tmp_path: Path) -> None:
    options = EmulatorOptions(service_seconds=0.1, requests_per_minute=None, image_size_px=64, pictures="plain")
    s3.set_faults(latency_seconds=0.2)
    with EmulatorServer(options) as api, command(batch(tmp_path, 3), api, s3, tmp_path / "run") as running:
        running.until(lambda: s3.counts().get(f"PUT {BUCKET}/p/batches/spring", 0) >= 1)  # index.html
        running.press_ctrl_c()
        assert running.wait() == 130
        assert api.tallies()["cancelled"] == 0
        objects = objects_of(s3, BUCKET, "p/batches/spring/")
        assert json.loads(objects["report.json"])["stored"] == 3
        assert len(objects["report.jsonl"].splitlines()) == 3
        assert json.loads(objects["report.json"])["cost_usd"] == pytest.approx(api.tallies()["cost_usd"])


def test_a_second_ctrl_c_ends_it_at_once_and_says_how_many_are_left(
    api: EmulatorServer, s3: LocalS3, tmp_path: Path
) -> None:
    api.set_faults("cancel:late,seconds=30")
    with command(batch(tmp_path, 40), api, s3, tmp_path / "run") as running:
        running.until(lambda: api.tallies()["in_flight"] == 10)
        running.press_ctrl_c()
        running.until(lambda: "Ctrl-C again" in running.said)
        running.press_ctrl_c()
        assert running.wait() == 130
    assert running.answer["left_in_flight"] == 10, running.said
    assert "10 predictions in flight left" in running.said
    assert api.tallies()["cancelled"] == 0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux delivers a signal to a thread of another process")
def test_a_ctrl_c_that_another_thread_catches_is_heard_at_once(
    api: EmulatorServer, s3: LocalS3, tmp_path: Path
) -> None:
    api.set_faults("cancel:late,seconds=120")
    with command(batch(tmp_path, 12), api, s3, tmp_path / "run") as running:
        running.until(lambda: api.tallies()["in_flight"] == 10)
        running.interrupt_another_thread()
        running.until(lambda: "Ctrl-C again" in running.said)
        running.interrupt_another_thread()
        assert running.wait() == 130
    assert running.answer["left_in_flight"] == 10, running.said


def test_cancels_that_the_api_does_not_confirm_are_counted_as_left(
    api: EmulatorServer, s3: LocalS3, tmp_path: Path
) -> None:
    api.set_faults("prediction:uncancellable,matching=fox 3")
    with command(batch(tmp_path, 12), api, s3, tmp_path / "run") as running:
        running.until(lambda: api.tallies()["in_flight"] == 10)
        running.press_ctrl_c()
        assert running.wait() == 130
    assert sorted(cancels_of(api)) == sorted(prediction["id"] for prediction in api.predictions())
    assert (running.answer["cancelled"], running.answer["left_in_flight"], running.answer["cost_unknown"]) == (9, 1, 1)
    assert "1 is paid for if it ends" in running.said
    is_true_to_the_vendor(running, api, s3)


def test_orders_whose_answer_has_not_come_are_waited_for_and_cancelled(
    api: EmulatorServer, s3: LocalS3, tmp_path: Path
) -> None:
    api.set_faults("create:late_answer,seconds=3")
    with command(batch(tmp_path, 12), api, s3, tmp_path / "run") as running:
        running.until(lambda: api.tallies()["in_flight"] == 10)
        running.press_ctrl_c()
        assert running.wait() == 130
    assert (api.tallies()["cancelled"], api.tallies()["in_flight"]) == (10, 0)
    is_true_to_the_vendor(running, api, s3)


def test_run_again_after_a_ctrl_c_it_buys_what_was_cancelled(s3: LocalS3, tmp_path: Path) -> None:
    options = EmulatorOptions(service_seconds=2.0, requests_per_minute=None, image_size_px=64, pictures="plain")
    with EmulatorServer(options) as api:
        with command(batch(tmp_path, 14), api, s3, tmp_path / "first") as running:
            running.until(lambda: api.tallies()["succeeded"] >= 3 and api.tallies()["in_flight"] >= 2)
            running.press_ctrl_c()
            assert running.wait() == 130
            is_true_to_the_vendor(running, api, s3)
        before = api.tallies()
        with command(batch(tmp_path, 14), api, s3, tmp_path / "second") as running:
            assert running.wait() == 0
        assert api.tallies()["cost_usd"] == pytest.approx(14 * PRICE_USD)
        assert running.answer["cost_usd"] == pytest.approx(14 * PRICE_USD - before["cost_usd"])
        assert (running.answer["stored"], running.answer["reused"]) == (14 - before["succeeded"], before["succeeded"])


def test_a_lost_order_that_is_being_settled_is_counted_as_left(
    api: EmulatorServer, s3: LocalS3, tmp_path: Path
) -> None:
    api.set_faults("create:lost_answer,next=1", "prediction:listed_late,seconds=60")
    words = ["generate", "a fox", "--to", f"s3://{BUCKET}/p", "--item-id", "fox", "--json"]
    with command(words, api, s3, tmp_path / "run") as running:
        running.until(
            lambda: ("eachlabs" in running.said and "no answer" in running.said) or api.tallies()["billed"] == 1
        )
        running.until(lambda: any("/v1/executions" in one["path"] for one in api.journal()))
        running.press_ctrl_c()
        assert running.wait() == 130
    assert running.answer["left_in_flight"] == 1
    assert "nothing was in flight" not in running.said


def test_a_bucket_that_is_away_keeps_nobody_from_ending(api: EmulatorServer, s3: LocalS3, tmp_path: Path) -> None:
    with command(batch(tmp_path, 2), api, s3, tmp_path / "run") as running:
        running.until(lambda: api.tallies()["in_flight"] == 2)
        s3.set_faults(*(Fault("refuse", method, times=100_000) for method in ("PUT", "GET", "HEAD", "LIST")))
        running.press_ctrl_c()
        assert running.wait() == 130
    assert "could not be written" in running.said
