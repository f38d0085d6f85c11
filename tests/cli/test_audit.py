"""`prefect-eachlabs audit`: exit statuses, the one JSON object, the page, and what it says when it cannot look."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prefect_eachlabs.cli.main import main
from tests.flows.flow_fixtures import BUCKET, Studio

Printed = pytest.CaptureFixture[str]


def test_a_bill_is_accounted_for_until_a_picture_is_deleted(studio: Studio, capsys: Printed, tmp_path: Path) -> None:
    assert main(["generate", "a red fox", "--to", studio.destination, "--item-id", "fox"]) == 0
    capsys.readouterr()
    page = tmp_path / "bill.html"
    assert main(["audit", studio.destination, studio.destination, "--since", "1d", "--page", str(page), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["destinations"] == [studio.destination]
    assert said["billed_usd"] == said["recorded_usd"] == studio.api.tallies()["cost_usd"] == 0.039
    assert (said["accounted_for"], said["foreign"]["count"], said["unknown_orders"]["count"]) == (True, 0, 0)
    assert said["corrected"] == {"count": 0, "usd": 0.0, "named": []}
    assert [one["pictures"] for one in said["by_day"]] == [1]
    assert f"{studio.destination}/images/fox.png" in page.read_text(encoding="utf-8")

    studio.delete("images/fox.png")
    assert main(["audit", studio.destination]) == 1
    printed = capsys.readouterr().out
    assert "1 paid and not stored:" in printed
    assert "fox" in printed
    assert "Not all is accounted for." in printed
    assert studio.billed == 1


def test_an_api_that_does_not_answer_is_an_audit_that_could_not_look(
    studio: Studio, capsys: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    studio.api.set_faults("executions:missing")
    assert main(["audit", studio.destination]) == 2
    assert "The audit could not look: " in capsys.readouterr().err
    assert main(["audit", studio.destination, "--since", "yesterday"]) == 2
    assert "--since: 'yesterday' must be a day" in capsys.readouterr().err
    assert main(["audit", f"s3://{BUCKET}-nowhere/x"]) == 2
