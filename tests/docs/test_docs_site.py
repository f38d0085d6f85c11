"""The documentation site builds without a warning, its links lead somewhere, and it loads nothing from elsewhere."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag

import pytest

import prefect_eachlabs
from tests.conftest import IN_CI, ROOT


class Page(HTMLParser):
    """What a built page has and where it leads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.classes: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attributes}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        self.classes |= set(given.get("class", "").split())
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag in ("img", "script", "iframe", "source", "link") and (to := given.get("src") or given.get("href")):
            self.loaded.append(to)


pytestmark = pytest.mark.slow
"""Making the site takes six seconds of CPU."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("material") is None or importlib.util.find_spec("mkdocstrings") is None:
        missing = "mkdocs-material is not installed: the extra docs brings it"
        if IN_CI:
            pytest.fail(missing, pytrace=False)
        pytest.skip(missing)
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if line and not line.startswith("INFO")] == []
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in sorted(site.rglob("*.html"))}


def test_every_link_within_the_site_leads_to_a_page_and_a_place_on_it(site: Path, pages: dict[Path, Page]) -> None:
    for path, page in pages.items():
        if path.name == "404.html":
            continue  # served for any address: its links start at the root
        for link in [*page.links, *page.loaded]:
            if re.match(r"[a-z]+:|//", link):
                continue
            name, anchor = urldefrag(unquote(link))
            target = (path.parent / name).resolve() if name else path
            assert target.is_file(), f"{path.relative_to(site)}: {link}"
            if anchor and target in pages and not anchor.startswith("__"):
                assert anchor in pages[target].anchors, f"{path.relative_to(site)}: {link}"


def test_nothing_is_loaded_from_elsewhere(site: Path, pages: dict[Path, Page]) -> None:
    for path, page in pages.items():
        assert not [to for to in page.loaded if re.match(r"https?:|//", to)], path
        assert "mermaid" not in page.classes, f"{path.relative_to(site)}: a browser would load mermaid from a CDN"
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//|@import ['\"]?http", sheet.read_text(encoding="utf-8")), sheet


def test_every_public_name_has_a_place_in_the_built_reference(site: Path) -> None:
    inventory = zlib.decompress((site / "objects.inv").read_bytes().split(b"\n", 4)[4]).decode()
    there = {line.split()[0].rpartition(".")[2] for line in inventory.splitlines()}
    assert set(prefect_eachlabs.__all__) <= there


def test_a_link_out_of_docs_leads_to_a_page_that_shows_the_file(site: Path) -> None:
    shown = (site / "files" / "deployments" / "automation.yaml.html").read_text(encoding="utf-8")
    assert "eachlabs-pause-what-fails" in shown


def test_a_file_that_is_shown_is_not_found_by_search(site: Path) -> None:
    index = (site / "search" / "search_index.json").read_text(encoding="utf-8")
    assert "files/SECURITY.md.html" in index
    assert ".py.html" not in index


# ------------------------------------------------------------- in a browser, from the disk

RUNS_OUT = """() => [...document.querySelectorAll("main *")].filter(element => {
    if (element.getBoundingClientRect().right <= innerWidth + 1) return false;
    for (let outer = element.parentElement; outer; outer = outer.parentElement)
        if (outer !== document.documentElement && getComputedStyle(outer).overflowX !== "visible") return false;
    return true;
}).map(element => `${element.tagName}: ${element.textContent.slice(0, 60)}`)"""
"""What is wider than the screen and does not scroll by itself."""


@pytest.fixture(scope="module")
def browser(require_tool: Callable[[str], Path]) -> Iterator[Any]:
    chromium = require_tool("chromium")
    if not IN_CI:
        pytest.importorskip("playwright.sync_api")
    playwright = importlib.import_module("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=str(chromium), args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


def test_search_finds_a_word_on_pages_that_are_opened_from_the_disk(site: Path, browser: Any) -> None:
    page = browser.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto((site / "index.html").as_uri())
    page.locator(".md-search__input").click()
    page.keyboard.type("presigned")
    page.locator(".md-search-result__item a", has_text="Private buckets").first.click()
    page.wait_for_url("**/how-to/private-buckets.html*")
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    page.close()


SHOWN_IN_PLACE = """async ([address, html]) => {
    const made = new DOMParser().parseFromString(html, "text/html");
    const base = document.head.querySelector("base") ?? document.head.appendChild(document.createElement("base"));
    base.href = address;
    document.body.replaceWith(document.adoptNode(made.body));
    await Promise.allSettled([...document.images].map(image => image.decode()));
}"""
"""Another page in the one that is open, without its scripts: opening one takes half a second of CPU."""


def test_no_page_runs_out_of_a_phones_screen(site: Path, pages: dict[Path, Page], browser: Any) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 844}, is_mobile=True)
    page = context.new_page()

    def fits(path: Path) -> None:
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, path.relative_to(site)
        assert page.evaluate(RUNS_OUT) == [], path.relative_to(site)

    for name in ("how-to/limits-and-accounts.html", "files/SECURITY.md.html", "index.html"):  # scripts wrap tables
        page.goto((site / name).as_uri())
        fits(site / name)
    for path in pages:
        page.evaluate(SHOWN_IN_PLACE, [path.as_uri(), path.read_text(encoding="utf-8")])
        fits(path)
    context.close()


def test_pages_have_an_icon_of_their_own(site: Path, pages: dict[Path, Page]) -> None:
    assert (site / "favicon.svg").read_text(encoding="utf-8").startswith("<svg")
    assert all(any(to.endswith("favicon.svg") for to in page.loaded) for page in pages.values())
