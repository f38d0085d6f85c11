"""The audit's page: what came from outside is escaped, the chart has its bars, an empty account has a page too."""

from __future__ import annotations

from datetime import datetime, timezone

import pytest

from prefect_eachlabs.audit.auditor import moment_of
from prefect_eachlabs.audit.pages import CHART_PX, audit_page, chart, text_bar
from prefect_eachlabs.audit.report import NAMED, AuditReport, Dear, Finding, Kind, Named, Spent
from prefect_eachlabs.errors import BadInput
from tests.html_seen import Seen

HOSTILE = "<script>alert(1)</script>\u202e\x1b[2J"


def hostile_report() -> AuditReport:
    report = AuditReport(
        destinations=[HOSTILE],
        until=datetime(2026, 11, 27, tzinfo=timezone.utc),
        executions=3,
        by_day=[Spent("2026-11-25", 2.0, 20), Spent("2026-11-26", 1.0, 4)],
        by_model=[Spent(HOSTILE, 3.0, 24)],
        by_destination=[Spent(HOSTILE, 3.0, 24)],
        dearest=[Dear(1.0, HOSTILE, HOSTILE, HOSTILE, "2026-11-25", HOSTILE)],
    )
    for kind in Kind:
        report.findings[kind] = Finding(1, 0.5, [Named(HOSTILE, HOSTILE, HOSTILE, HOSTILE, HOSTILE, 0.5, HOSTILE)])
    return report


def test_what_came_from_outside_is_text_on_the_page() -> None:
    page = audit_page(hostile_report())
    tags = Seen(page).names
    assert "script" not in tags
    assert "\u202e" not in page
    assert "\x1b" not in page
    assert tags.count("rect") == 4
    assert "&lt;script&gt;" in page
    assert "&lt;table" not in page
    assert tags.count("table") == len(NAMED) + 5


def test_an_account_without_executions_has_a_page() -> None:
    page = audit_page(AuditReport(destinations=["s3://acme/daily"]))
    assert "Every cent of these destinations is accounted for" in page
    assert "<svg" not in page


def test_the_highest_bar_has_the_charts_height_and_none_leaves_it() -> None:
    drawn = chart([("a", 1.0), ("b", 4.0), ("c", 0.0)])
    assert [bar["height"] for bar in drawn["bars"]] == [CHART_PX[1] / 4, CHART_PX[1], 0]
    many = chart([(str(number), 1.0) for number in range(90)])
    assert max(bar["x"] + bar["width"] for bar in many["bars"]) <= CHART_PX[0]
    assert chart([])["bars"] == []
    assert text_bar(Spent("a", 1.0, 1), [Spent("a", 1.0, 1), Spent("b", 2.0, 1)]) == "█" * 12


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2026-11-01", datetime(2026, 11, 1, tzinfo=timezone.utc)),
        ("2026-11-01T06:30:00+01:00", datetime(2026, 11, 1, 5, 30, tzinfo=timezone.utc)),
        ("2026-11-01T06:30:00Z", datetime(2026, 11, 1, 6, 30, tzinfo=timezone.utc)),
    ],
)
def test_a_day_or_a_time_is_utc_where_it_does_not_say(text: str, moment: datetime) -> None:
    assert moment_of(text, "--since") == moment


@pytest.mark.parametrize("text", ["yesterday", "", "-1d", "99999999d", "1.5d"])
def test_what_is_no_moment_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match="--since"):
        moment_of(text, "--since")
