"""The report for people: one page without scripts, with small pictures in it (`report.html.j2`); pure.

Everything that came from outside is escaped, by Jinja, and control and direction characters are written out; the page
loads nothing but pictures.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime, timezone
from typing import Any

from jinja2 import Environment, PackageLoader, Template
from markupsafe import Markup

from prefect_eachlabs.batch.outcomes import Outcome
from prefect_eachlabs.batch.thumbs import SUFFIXES
from prefect_eachlabs.net.redaction import visible

MOST_PICTURES = 2_000
MOST_FAILURES = 1_000
SHORT_CHARACTERS = 110
"""Of a prompt; the rest shows on demand."""
LONGEST_CHARACTERS = 2_000


@functools.cache
def page_template(folder: str, name: str) -> Template:
    """A page of this package: what is put into it is escaped, and control and direction characters are written out."""
    jinja = Environment(
        loader=PackageLoader("prefect_eachlabs", folder),
        autoescape=True,
        # What a macro has made is HTML already, its values escaped.
        finalize=lambda value: value if isinstance(value, Markup) else visible(str(value), keeping="\n\t"),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return jinja.get_template(name)


def index_page(
    totals: Mapping[str, Any],
    *,
    pictures: Iterable[Outcome],
    not_there: Iterable[Outcome],
    links: Mapping[str, str] | None = None,
    links_end_at: datetime | None = None,
    up: str = "../../",
    thumbs: Mapping[str, str] | None = None,
    edge_px: int = 240,
) -> Iterator[str]:
    """`index.html`, piece by piece.

    Args:
        totals: What `report.json` holds.
        pictures: Rows with a picture; the first 2,000 are shown.
        not_there: Rows without one; the first 1,000 are shown.
        links: Item id → presigned URL, in place of paths relative to the page.
        links_end_at: When those URLs end.
        up: The way from the page to the destination's prefix.
        thumbs: SHA-256 of a picture → its thumbnail's data URL; the others are loaded from where they lie.
        edge_px: How large each is shown.
    """
    counts = ("items", "stored", "reused", "failed", "ambiguous", "skipped")
    facts = [(name, f"{totals.get(name, 0):,}") for name in counts]
    facts.append(("spent in this run", f"${totals.get('cost_usd', 0):,.2f}"))
    if totals.get("cost_unknown"):
        facts.append(("orders of unknown cost", f"{totals['cost_unknown']:,}"))
    facts.append(("all its pictures", f"${totals.get('pictures_cost_usd', 0):,.2f}"))
    if totals.get("stored"):
        facts.append(("stored a minute", f"{totals.get('pictures_per_minute', 0):,}"))
    return page_template("batch", "report.html.j2").generate(
        totals=totals,
        ended=_date(totals.get("ended_at")),
        facts=facts,
        failure_count=sum(int(totals.get(name, 0)) for name in ("failed", "ambiguous", "skipped")),
        not_there=itertools.islice(not_there, MOST_FAILURES),
        most_failures=MOST_FAILURES,
        picture_count=sum(int(totals.get(name, 0)) for name in ("stored", "reused")),
        pictures=itertools.islice(pictures, MOST_PICTURES),
        most_pictures=MOST_PICTURES,
        links=links or {},
        links_end=_date(links_end_at),
        up=up,
        shown=SUFFIXES,
        thumbs=thumbs or {},
        edge_px=edge_px,
        short=SHORT_CHARACTERS,
        longest=LONGEST_CHARACTERS,
    )


def _date(when: datetime | str | None) -> str:
    """`27 November 2026, 14:05 UTC`, as people write it; what is not a date stays as it is."""
    try:
        when = datetime.fromisoformat(when) if isinstance(when, str) else when
        return "" if when is None else f"{(utc := when.astimezone(timezone.utc)).day} {utc:%B %Y, %H:%M} UTC"
    except ValueError:
        return str(when)
