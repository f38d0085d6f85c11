"""The report for people: one page without scripts, its pictures beside it in the bucket; pure.

Everything that came from outside is escaped; the page loads nothing but pictures.
"""

from __future__ import annotations

import html
import itertools
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any
from urllib.parse import quote

from prefect_eachlabs.batch.outcomes import Outcome

MOST_PICTURES = 2_000
MOST_FAILURES = 1_000
THUMBNAIL_PX = 240

_STYLE = """
:root { color-scheme: light dark; --paper: #f6f4f0; --card: #fff; --ink: #20232a; --pale: #666a73; --bad: #a4262c; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #17181b; --card: #222428; --ink: #e8e6e1; --pale: #9a9ea8; --bad: #f1707b; }
}
* { box-sizing: border-box; }
body { margin: 0; padding: 2rem clamp(1rem, 4vw, 3rem); background: var(--paper); color: var(--ink);
  font: 15px/1.45 system-ui, sans-serif; }
h1 { margin: 0; font-size: 1.6rem; overflow-wrap: anywhere; }
h2 { margin: 2.5rem 0 .8rem; font-size: 1.15rem; }
p.pale, .pale { color: var(--pale); overflow-wrap: anywhere; }
.bad { color: var(--bad); }
dl { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.4rem 0; }
dl div { background: var(--card); border-radius: 8px; padding: .7rem 1.1rem; min-width: 7rem; }
dt { color: var(--pale); font-size: .82rem; }
dd { margin: 0; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.table { overflow-x: auto; background: var(--card); border-radius: 8px; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .45rem .8rem; border-top: 1px solid var(--paper);
  overflow-wrap: anywhere; }
th { white-space: nowrap; font-size: .82rem; color: var(--pale); font-weight: 600; }
td.word { font-variant-numeric: tabular-nums; white-space: nowrap; }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(240px, 1fr)); gap: 1rem; }
figure { margin: 0; background: var(--card); border-radius: 8px; overflow: hidden; }
figure img, figure video { display: block; width: 100%; height: auto; aspect-ratio: 1; object-fit: cover;
  background: var(--paper); font-size: .8rem; color: var(--pale); }
figcaption { padding: .6rem .8rem .7rem; overflow-wrap: anywhere; }
figcaption small { display: block; margin-top: .3rem; color: var(--pale); }
.sheet { max-width: 100%; height: auto; border-radius: 8px; }
"""


def _escaped(value: object) -> str:
    return html.escape(str(value), quote=True)


def index_page(
    totals: Mapping[str, Any],
    *,
    pictures: Iterable[Outcome],
    not_there: Iterable[Outcome],
    links: Mapping[str, str] | None = None,
    links_end_at: datetime | None = None,
    up: str = "../../",
) -> Iterator[str]:
    """`index.html`, piece by piece.

    Args:
        totals: What `report.json` holds.
        pictures: Rows with a picture; the first 2,000 are shown.
        not_there: Rows without one; the first 1,000 are shown.
        links: Item id → presigned URL, in place of paths relative to the page.
        links_end_at: When those URLs end.
        up: The way from the page to the destination's prefix.
    """
    title = _escaped(totals.get("batch_id", "Batch"))
    yield (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src 'self' http: https: file:; media-src 'self' http: https: file:; "
        "style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n"
    )
    yield from _head(totals, links_end_at)
    yield from _failures(totals, not_there)
    yield from _pictures(totals, pictures, links or {}, up)
    yield "</body>\n</html>\n"


def _head(totals: Mapping[str, Any], links_end_at: datetime | None) -> Iterator[str]:
    yield (
        f'<p class="pale">{_escaped(totals.get("source", ""))} → {_escaped(totals.get("destination", ""))}<br>'
        f"run {_escaped(totals.get('run', ''))}, ended {_escaped(totals.get('ended_at', ''))}</p>\n"
    )
    if totals.get("stopped_by"):
        yield f'<p class="bad">Stopped: {_escaped(totals["stopped_by"])}</p>\n'
    if links_end_at is not None:
        yield f'<p class="pale">The links to the pictures end at {_escaped(f"{links_end_at:%Y-%m-%d %H:%M %Z}")}.</p>\n'
    facts = [(name, totals.get(name, 0)) for name in ("items", "stored", "reused", "failed", "ambiguous", "skipped")]
    facts.append(("spent in this run", f"${totals.get('cost_usd', 0):,.2f}"))
    if totals.get("cost_unknown"):
        facts.append(("orders of unknown cost", totals["cost_unknown"]))
    facts.append(("all its pictures", f"${totals.get('pictures_cost_usd', 0):,.2f}"))
    facts.append(("pictures a minute", totals.get("pictures_per_minute", 0)))
    yield "<dl>"
    yield from (f"<div><dt>{_escaped(name)}</dt><dd>{_escaped(value)}</dd></div>" for name, value in facts)
    yield '</dl>\n<p class="pale">All rows: <a href="report.jsonl">report.jsonl</a>, totals: '
    yield '<a href="report.json">report.json</a>'
    if totals.get("contact_sheet"):
        yield ', at a glance: <a href="contact-sheet.png">contact-sheet.png</a>'
    yield "</p>\n"


def _failures(totals: Mapping[str, Any], not_there: Iterable[Outcome]) -> Iterator[str]:
    count = sum(int(totals.get(name, 0)) for name in ("failed", "ambiguous", "skipped"))
    if not count:
        return
    shown = f" (the first {MOST_FAILURES:,} of {count:,})" if count > MOST_FAILURES else ""
    yield f'<h2>Not there{shown}</h2>\n<div class="table"><table>\n'
    yield "<tr><th>row</th><th>state</th><th>why</th><th>prompt</th><th>item</th></tr>\n"
    for outcome in itertools.islice(not_there, MOST_FAILURES):
        error = outcome.error or {}
        yield (
            f'<tr><td class="word">{outcome.row}</td><td class="word">{_escaped(outcome.state.value)}</td>'
            f"<td><b>{_escaped(outcome.kind)}</b> {_escaped(error.get('message') or '')}</td>"
            f'<td>{_escaped(outcome.prompt or "")}</td><td class="pale">{_escaped(outcome.item_id or "")}</td></tr>\n'
        )
    yield "</table></div>\n"


def _pictures(
    totals: Mapping[str, Any], pictures: Iterable[Outcome], links: Mapping[str, str], up: str
) -> Iterator[str]:
    count = sum(int(totals.get(name, 0)) for name in ("stored", "reused"))
    if not count:
        return
    shown = f" (the first {MOST_PICTURES:,} of {count:,})" if count > MOST_PICTURES else ""
    yield f"<h2>Pictures{shown}</h2>\n<main>\n"
    for outcome in itertools.islice(pictures, MOST_PICTURES):
        item_id = outcome.item_id or ""
        link = _escaped(links.get(item_id) or f"{up}images/{quote(outcome.file_name)}")
        facts = [f"row {outcome.row}"]
        if outcome.cost_usd is not None:
            facts.append(f"${outcome.cost_usd:.4f}")
        if outcome.seconds is not None:
            facts.append(f"{outcome.seconds:.1f} s")
        facts += [f"{name}: {value}" for name, value in list(outcome.labels.items())[:6]]
        size = f'width="{THUMBNAIL_PX}" height="{THUMBNAIL_PX}"'
        shown = f'<img loading="lazy" decoding="async" {size} src="{link}" alt="{_escaped(item_id)}">'
        if outcome.file_name.endswith(".mp4"):
            shown = f'<video preload="none" muted controls {size} src="{link}"></video>'
        yield (
            f'<figure><a href="{link}">{shown}</a><figcaption>{_escaped(outcome.prompt or item_id)}'
            f"<small>{_escaped(' · '.join(facts))}</small></figcaption></figure>\n"
        )
    yield "</main>\n"
