"""`prefect-eachlabs batch`: from words to pictures, a report and an exit status."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prefect_eachlabs import retry
from prefect_eachlabs.batch import state
from prefect_eachlabs.batch.progress import Progress, duration, terminal_bar
from prefect_eachlabs.cli import batch as command
from prefect_eachlabs.cli.main import main
from prefect_eachlabs.storage import s3_client
from tests.flows.flow_fixtures import Studio

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture(autouse=True)
def _logging_as_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """The command sets logging up for its process, and looks for Prefect's settings around it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "limiter_maker", lambda: None)
    root, ours = logging.getLogger(), logging.getLogger("prefect_eachlabs.batch")
    before = root.handlers[:], root.level, ours.level
    yield
    root.handlers[:], root.level, ours.level = before


def write(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def test_a_table_becomes_pictures_and_a_report_and_again_buys_nothing_and_asks_the_api_nothing(
    studio: Studio, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "spring.csv", "id,prompt,shelf", *(f"i{number},fox {number},A" for number in range(3)))
    assert main(["batch", source, "--to", studio.destination, "--json"]) == 0
    out, err = capsys.readouterr()
    answer: dict[str, Any] = json.loads(out)
    assert err == ""
    assert answer["items"] == 3
    assert answer["stored"] == 3 == studio.billed
    assert answer["cost_usd"] == pytest.approx(3 * 0.039)
    assert answer["report_uri"] == f"{studio.destination}/batches/spring/report.json"
    assert sorted(studio.keys()) == ["i0.png", "i1.png", "i2.png"]
    report = [json.loads(line) for line in studio.get("batches/spring/report.jsonl").splitlines()]
    assert {row["state"] for row in report} == {"stored"}
    assert {row["labels"]["shelf"] for row in report} == {"A"}
    assert json.loads(studio.get("batches/spring/report.json"))["stored"] == 3
    assert b"fox 2" in studio.get("batches/spring/index.html")
    assert studio.get("batches/spring/contact-sheet.png").startswith(b"\x89PNG")
    asked = len(studio.api.journal())
    assert main(["batch", source, "--to", studio.destination, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["reused"], answer["stored"], answer["cost_usd"]) == (3, 0, 0)
    assert len(studio.api.journal()) == asked
    assert studio.billed == 3


def test_a_dry_run_buys_and_writes_nothing(studio: Studio, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "spring.csv", "prompt", "fox", "dog")
    assert main(["batch", source, "--to", studio.destination, "--dry-run"]) == 0
    assert "2 new, 0 there already, 0 that cannot be bought. Nothing was bought." in capsys.readouterr().out
    assert main(["batch", source, "--to", studio.destination, "--dry-run", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["dry_run"], answer["new"], answer["items"]) == (True, 2, 2)
    assert studio.billed == 0
    assert studio.keys("") == []
    bad = write(tmp_path / "bad.csv", "id,prompt", "no id,fox")
    assert main(["batch", bad, "--to", studio.destination, "--dry-run"]) == 1
    assert "row 1 (line 2), no id: id: 'no id' must be" in capsys.readouterr().out


def test_a_dry_run_tells_what_the_run_comes_to(
    studio: Studio, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ids that stand twice, inputs beyond a bound and another input under an old id: counted as the run counts them."""

    def counts(*flags: str) -> dict[str, Any]:
        main(["batch", source, "--to", studio.destination, "--json", *flags])
        told: dict[str, Any] = json.loads(capsys.readouterr().out)
        return told

    rows = ["a,one,", "a,other,", "b,two,", f"c,{'x ' * 6_000},", 'd,"two\nlines",', "f,three,gemni"]
    source = write(tmp_path / "spring.csv", "id,prompt,model", *rows)
    planned = counts("--dry-run")
    ran = counts()
    assert (planned["new"], planned["failed"]) == (ran["stored"], ran["failed"]) == (3, 3)
    again = counts("--dry-run")
    assert (again["new"], again["reused"], again["failed"]) == (0, 3, 3)
    write(tmp_path / "spring.csv", "id,prompt", "a,one", "b,something else", "e,new")
    planned = counts("--dry-run")
    assert (planned["new"], planned["reused"], planned["failed"]) == (1, 1, 1)
    assert "item conflict" in planned["why"]
    assert planned["estimated_by"] == {"gemini": {"mean_usd": 0.039, "pictures": 3, "told_by": "report"}}
    assert studio.billed == 3


def test_a_dry_run_asks_the_accounts_executions_what_a_picture_costs_and_says_from_how_many(
    studio: Studio, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "spring.csv", "prompt", "fox", "dog", "cat")
    assert main(["batch", source, "--to", studio.destination, "--dry-run"]) == 0
    assert "What they would cost is not known: neither a report nor" in capsys.readouterr().out
    other = write(tmp_path / "other.csv", "prompt", "an owl", "a crow")
    assert main(["batch", other, "--to", f"{studio.destination}/other"]) == 0
    capsys.readouterr()
    asked = len(studio.api.journal())
    assert main(["batch", source, "--to", studio.destination, "--dry-run"]) == 0
    told = "would cost $0.12 (gemini: $0.0390 each, by 2 of the account's past pictures) and take"
    assert told in capsys.readouterr().out
    endpoints = [one["endpoint"] for one in studio.api.journal()[asked:]]
    assert sorted(endpoints) == ["executions", "model"]


def test_bad_rows_and_failed_predictions_end_with_status_1_ten_named_on_the_terminal_and_all_in_the_report(
    studio: Studio, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    studio.api.set_faults("prediction:fail_moderation,matching=naked")
    rows = ['ok,"a fox\non two lines"', *(f"no {n}," for n in range(11)), "d,too,many", "b,a naked fox"]
    source = write(tmp_path / "spring.csv", "id,prompt", *rows)
    assert main(["batch", source, "--to", studio.destination]) == 1
    out = capsys.readouterr().out
    assert "14 rows: 1 stored, 0 reused, 13 failed, 0 ambiguous, 0 skipped" in out
    assert "12 bad input" in out
    assert "1 content refused" in out
    assert "  row 2 (line 4), no 0: prompt: missing. Write what the picture shows.\n" in out
    assert "  row 11 (line 13), no 9: " in out
    assert "  row 12 (line 14)" not in out
    assert "  and 3 more, in the report\n" in out
    report = [json.loads(line) for line in studio.get("batches/spring/report.jsonl").splitlines()]
    assert [(row["table_row"], row["row"]) for row in report] == [(1, 2), *((n, n + 2) for n in range(2, 15))]
    assert [row["state"] for row in report] == ["stored", *["failed"] * 13]
    assert all(row["error"]["message"] for row in report[1:])
    page = studio.get("batches/spring/index.html").decode()
    assert "row 13 (line 15)" in page


def test_a_budget_leaves_the_rest_out_with_status_1(
    studio: Studio, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "spring.csv", "prompt", *(f"fox {number}" for number in range(4)))
    assert main(["batch", source, "--to", studio.destination, "--budget-usd", "0.1", "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert (answer["stored"], answer["skipped"]) == (2, 2)
    assert studio.billed == 2


def test_a_wrong_key_ends_it_at_the_first_item_with_status_2(
    studio: Studio, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    studio.api.set_faults("create:error,status=401")
    source = write(tmp_path / "spring.csv", "prompt", *(f"fox {number}" for number in range(50)))
    assert main(["batch", source, "--to", studio.destination, "--json"]) == 2
    answer = json.loads(capsys.readouterr().out)
    assert (answer["items"], answer["failed"], answer["skipped"]) == (50, 1, 49)
    assert "does not accept the key" in answer["stopped_by"]
    assert sum(row["method"] == "POST" for row in studio.api.journal()) == 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--to", "s3://no-such-bucket-here/p"], "NoSuchBucket"),
        (["--to", "nowhere"], "must be s3://"),
        (["--to", "s3://acme-pictures/p", "--batch-id", "a/b"], "batch_id"),
        (["--to", "s3://acme-pictures/p", "--budget-usd", "0"], "must be greater than 0"),
        (["--to", "s3://acme-pictures/p", "--presigned-days", "8"], "7 days at most"),
        (["--to", "s3://acme-pictures/p", "--model", "no model"], "model"),
        ([], "--to"),
    ],
)
def test_a_wrong_set_up_is_said_at_once_with_status_2(
    studio: Studio, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    source = write(tmp_path / "spring.csv", "prompt", "fox")
    assert main(["batch", source, *words]) == 2
    assert told in capsys.readouterr().err
    assert studio.billed == 0


def test_a_full_disk_ends_it_with_status_2_and_run_again_it_buys_nothing_twice(
    studio: Studio, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite refuses a page more ("database or disk is full"), and then there is no room for the report."""
    rows = (f"i{number},fox {number},{'x' * 16_000}" for number in range(4))
    source = write(tmp_path / "spring.csv", "id,prompt,notes", *rows)
    with monkeypatch.context() as patch:
        patch.setattr(state, "_TABLES", state._TABLES + "PRAGMA max_page_count = 12;")
        assert main(["batch", source, "--to", studio.destination, "--json"]) == 2
    out, err = capsys.readouterr()
    assert "TMPDIR" in json.loads(out)["error"]
    assert "Traceback" not in err
    assert studio.billed == 4
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(tmp_path / "no such folder"))
        assert main(["batch", source, "--to", studio.destination]) == 2
    assert "TMPDIR" in capsys.readouterr().err
    assert main(["batch", source, "--to", studio.destination]) == 0
    assert studio.billed == 4


def test_a_log_tells_the_progress_where_no_terminal_is(
    studio: Studio, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "LOG_SECONDS", 0.01)
    logging.getLogger().handlers[:] = []
    source = write(tmp_path / "spring.csv", "prompt", *(f"fox {number}" for number in range(3)))
    assert main(["batch", source, "--to", studio.destination]) == 0
    err = capsys.readouterr().err
    assert "stored, 0 reused, 0 not there" in err
    assert " of " in err


def test_what_is_not_there_is_said_in_a_line_that_says_what_to_do(
    studio: Studio, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file, a model, the API and S3: for one picture as for a table."""
    source = write(tmp_path / "spring.csv", "id,prompt", "p-1,fox")
    to = ["--to", studio.destination]

    def said(*words: str, status: int = 2) -> str:
        assert main([*words, *to]) == status
        return capsys.readouterr().err.splitlines()[-1].removeprefix("prefect-eachlabs: ")

    assert said("batch", "none.csv") == "none.csv: there is no such file."
    assert said("batch", str(tmp_path)) == f"{tmp_path} is a folder: name the table in it."
    wrong = said("generate", "fox", "--model", "gemni")
    assert wrong == said("batch", source, "--model", "gemni")
    assert wrong.startswith("model: the catalogue has no model 'gemni'. Did you mean gemini? `prefect-eachlabs models`")
    assert wrong.endswith(" lists what there is. Nothing was bought.")
    assert said("generate", "fox " * 5_000, status=1) == (
        "prompt: 20,000 characters, at most 10,000. `prefect-eachlabs models gemini` shows what gemini takes. "
        "Nothing was bought."
    )
    with monkeypatch.context() as away:
        away.setenv("EACHLABS_BASE_URL", "http://127.0.0.1:9")
        assert main(["batch", source, *to, "--dry-run"]) == 0
        out, err = capsys.readouterr()
        assert "Inputs and prices were not checked. The API at 127.0.0.1:9 (EACHLABS_BASE_URL) could not be" in out
        assert out.count("Is `prefect-eachlabs emulator` running?") == 1
        assert err == ""
    monkeypatch.setattr(s3_client, "ATTEMPTS", 1)
    monkeypatch.setattr(retry.random, "uniform", lambda *_: 0.001)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    for words in (["generate", "fox"], ["batch", source], ["batch", source, "--dry-run"]):
        line = said(*words, status=1)
        assert "Is `prefect-eachlabs s3` running?" in line
        assert line.startswith("No S3 answers at http://127.0.0.1:9 (AWS_ENDPOINT_URL_S3) for s3://")
        assert line.endswith(
            "Is `prefect-eachlabs s3` running? Run again: nothing is bought twice. Nothing was bought."
        )


def test_the_bar_fits_a_terminal_of_80_columns(tmp_path: Path) -> None:
    with (tmp_path / "bar").open("w+", encoding="utf-8") as stream:
        with terminal_bar(stream) as bar:
            bar(Progress(412, 1_632, False, 400, 10, 2, 15.6, 52.1, 1_400.0))
        stream.seek(0)
        assert "412 of ~1,632, 2 not there, 52 a minute, $15.60, 23 min left" in " ".join(stream.read().split())


def test_durations_are_short() -> None:
    assert [duration(seconds) for seconds in (0, 89, 90, 3_600, 90_000)] == ["0 s", "89 s", "2 min", "60 min", "25.0 h"]
