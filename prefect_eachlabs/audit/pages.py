"""The audit for people: one page without scripts (`audit.html.j2`), and its small charts; pure.

Everything that came from outside is escaped, by Jinja, and control and direction characters are written out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prefect_eachlabs.audit.report import NAMED, ON_THE_BILL, OPEN, AuditReport, Spent
from prefect_eachlabs.batch.pages import page_template

MOST_SHOWN = 1_000
"""Of each finding; `--json` names more."""
CHART_PX = (720, 120)
TEXT_BAR = 24


def audit_page(report: AuditReport) -> str:
    """The page, whole."""
    return page_template("audit", "audit.html.j2").render(
        report=report,
        bill=report.of(ON_THE_BILL),
        open=report.of(OPEN),
        others=report.of([kind for kind in NAMED if kind not in OPEN]),
        most=MOST_SHOWN,
        charts=[
            ("cost a day", chart([(one.name, one.usd) for one in report.by_day])),
            ("cost a picture", chart([(one.name, one.usd_each) for one in report.by_day])),
        ],
        width=CHART_PX[0],
        height=CHART_PX[1],
    )


def chart(values: Sequence[tuple[str, float]]) -> dict[str, Any]:
    """Bars of a chart, by name, in pixels; the highest has the chart's height."""
    width, height = CHART_PX
    highest = max((value for _, value in values), default=0.0)
    step = min(width / max(len(values), 1), 48.0)
    bars = [
        {
            "x": round(number * step, 2),
            "y": round(height - height * value / highest, 2) if highest else height,
            "width": round(step * 0.8, 2),
            "height": round(height * value / highest, 2) if highest else 0,
            "said": f"{name}: ${value:,.4f}",
        }
        for number, (name, value) in enumerate(values)
    ]
    return {
        "bars": bars,
        "highest": highest,
        "first": values[0][0] if values else "",
        "last": values[-1][0] if values else "",
    }


def text_bar(spent: Spent, of: Sequence[Spent]) -> str:
    """A bar of text, for where no drawing is shown."""
    highest = max((one.usd for one in of), default=0.0)
    return "█" * max(1, round(TEXT_BAR * spent.usd / highest)) if highest else ""
