"""What an operator does and sees, in a browser, in both of Prefect's UIs."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import IN_CI, ROOT
from tests.security.hostile import MARKUP
from tests.ui.conftest import BUCKET, IMAGE, PLACE, Studio
from tests.ui.stage import until

pytestmark = pytest.mark.slow

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-software-rasterizer",  # V1 draws a run's graph with WebGL: a third of all that these tests took
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    # The UI would ask a telemetry host for its settings. A route of playwright's would turn the cache off.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]
PATIENCE_MS = 120_000
PHOTOGRAPHS = bool(os.environ.get("PHOTOGRAPH"))
"""Whether the pictures in docs/ are taken anew: PHOTOGRAPH=1 make test-ui."""
UIS = (("v1", ""), ("v2", "/v2"))
IN_BOTH = pytest.mark.parametrize(("ui", "base"), UIS)


@pytest.fixture(scope="module")
def studio(studio_on_sqlite: Studio) -> Studio:
    return studio_on_sqlite


@pytest.fixture(scope="module")
def tab(require_tool: Callable[[str], Path]) -> Iterator[Any]:
    """Of the system's own chromium: a browser that playwright would download is another program."""
    chromium = require_tool("chromium")
    if not IN_CI:  # in CI a test that silently never runs would go unnoticed
        pytest.importorskip("playwright.sync_api")
    playwright = importlib.import_module("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=str(chromium), args=FLAGS)
        context = browser.new_context(viewport={"width": 1280, "height": 900}, reduced_motion="reduce")
        context.set_default_timeout(PATIENCE_MS)
        yield context.new_page()
        browser.close()


@pytest.fixture
def page(tab: Any) -> Iterator[Any]:
    dialogs: list[str] = []

    def dismiss(dialog: Any) -> None:
        dialogs.append(dialog.message)
        dialog.dismiss()

    tab.on("dialog", dismiss)
    yield tab
    leave(tab)
    tab.remove_listener("dialog", dismiss)
    assert not dialogs, "a script of somebody else's ran"


def leave(page: Any) -> None:
    """Prefect's pages draw and ask for as long as they are open."""
    page.goto("about:blank")


WIDER = """() => [...document.querySelectorAll("table")].map(one => {
  const page = one.parentElement.getBoundingClientRect(), own = one.getBoundingClientRect();
  return [one.innerText.slice(0, 40), Math.round(own.right - page.right)];
}).filter(([_, beyond]) => beyond > 1)"""


def photograph(page: Any, name: str) -> None:
    """Into docs/, when asked to."""
    if PHOTOGRAPHS:
        page.wait_for_timeout(1_500)  # what moves comes to rest
        page.screenshot(path=str(ROOT / "docs" / f"ui-{name}.png"))


@contextlib.contextmanager
def nothing_begins(studio: Studio) -> Iterator[None]:
    """Meanwhile workers are given no runs."""
    studio.stage.ask("PATCH", "/work_pools/eachlabs", {"is_paused": True})
    try:
        yield
    finally:
        studio.stage.ask("PATCH", "/work_pools/eachlabs", {"is_paused": False})


def text_box(page: Any, name: str) -> Any:
    """The field of a parameter: the first text box after its label."""
    return page.locator(
        f'xpath=//label[normalize-space(.)="{name}" or starts-with(normalize-space(.), "{name} (")]'
        "/following::textarea[1]"
    )


def submitted(ui: str, base: str, studio: Studio, page: Any, prompt: str) -> dict[str, Any]:
    """The run that a UI's form asks for."""
    deployment = studio.stage.deployment(IMAGE)
    wanted = {"flow_runs": {"deployment_id": {"any_": [deployment["id"]]}}}
    before = [run["id"] for run in studio.stage.ask("POST", "/flow_runs/filter", wanted)]
    # The server checks what is filled in, for both.
    for name in ("not/a name", "lighthouse") if ui == "v1" else ("lighthouse",):
        page.goto(f"{studio.stage.ui}{base}/deployments/deployment/{deployment['id']}/run")
        text_box(page, "Prompt").fill(prompt)
        assert text_box(page, "Destination").input_value() == "eachlabs-s3-destination/default"
        assert "Property is type" not in page.locator("body").inner_text()
        text_box(page, "Name").fill(name)
        if name == "not/a name":
            page.get_by_role("button", name="Submit").click()
            page.get_by_text("does not match").first.wait_for()  # and nothing is begun
    text_box(page, "Prompt").scroll_into_view_if_needed()
    photograph(page, f"{ui}-form")
    page.get_by_role("button", name="Submit").click()

    def begun() -> list[dict[str, Any]]:
        runs = studio.stage.ask("POST", "/flow_runs/filter", wanted)
        return [run for run in runs if run["id"] not in before]

    (run,) = until(begun, 90, "the form was submitted")
    leave(page)
    return dict(run)


IS_DRAWN = "image => image.complete && image.naturalWidth == 256 && image.clientWidth == 320"


def test_an_operator_fills_in_the_form_and_sees_the_picture(studio: Studio, page: Any) -> None:
    """The forms of both UIs ask for the same; it is made once, and both show it."""
    prompt = "a lighthouse in a storm, <b>bold</b> | [strokes](https://example.invalid)"
    if PHOTOGRAPHS:
        prompt = "a lighthouse in a storm, oil on canvas, thick strokes"
    with nothing_begins(studio):
        run, same = (submitted(ui, base, studio, page, prompt) for ui, base in UIS)
        assert run["parameters"] == same["parameters"]
        assert (run["parameters"]["prompt"], run["parameters"]["item_id"]) == (prompt, "lighthouse")
        studio.stage.ask("DELETE", f"/flow_runs/{same['id']}")
    run = studio.stage.ended(run["id"])
    assert run["state"]["type"] == "COMPLETED", run["state"]["message"]
    (artifact,) = studio.stage.artifacts(run["id"])
    for ui, base in UIS:
        page.goto(f"{studio.stage.ui}{base}/artifacts/artifact/{artifact['id']}")
        picture = page.locator('img[src^="data:image/jpeg"]')
        picture.wait_for()
        until(partial(picture.evaluate, IS_DRAWN), 30, "it is drawn, which the page may do twice")
        page.get_by_text(prompt, exact=True).wait_for()
        assert page.locator('a[href*="example.invalid"]').count() == 0
        page.get_by_text(f"{PLACE}/images/lighthouse.png").first.wait_for()
        photograph(page, f"{ui}-picture")


@IN_BOTH
def test_the_blocks_forms_show_every_field(ui: str, base: str, studio: Studio, page: Any) -> None:
    page.goto(f"{studio.stage.ui}{base}/blocks/catalog/eachlabs-credentials/create")
    for title in ("API key", "Base URL", "Authentication", "Account", "Requests a minute", "Predictions in flight"):
        page.get_by_text(title, exact=False).first.wait_for()
    photograph(page, f"{ui}-block")
    page.goto(f"{studio.stage.ui}{base}/blocks/catalog/eachlabs-s3-destination/create")
    for title in ("Bucket", "Prefix", "Region", "Endpoint", "AWS Credentials block", "KMS key", "Storage class"):
        page.get_by_text(title, exact=False).first.wait_for()


RUNS = """
import json, sys
from prefect_eachlabs import flows

for name, parameters in json.loads(sys.argv[1]):
    state = getattr(flows, name)(**parameters, return_state=True)
    print(json.dumps([str(state.state_details.flow_run_id), state.type.value, state.message]))
"""
STRANGERS = f"s3://{BUCKET}/![x](https://evil.invalid/p.png)<img src=x onerror=alert(1)>"
BOATS = f"s3://{BUCKET}/tables/boats.csv"


@dataclass
class Runs:
    """Their ids: a batch, and what was given by a stranger."""

    batch: str
    of_a_stranger: list[str]


@pytest.fixture(scope="module")
def runs(studio: Studio) -> Runs:
    """In one process, as pages show of them what they show of a worker's.

    A batch with hostile prompts, one of which moderation refuses; and with markup for prompts and destinations a
    picture, a table that cannot be read, and what settle found.
    """
    prompts = [f"a boat on {sea}" for sea in ("the Baltic", "Lake Como", "the Nile", "a canal")]
    rows = ["prompt", *prompts, "<b>bold</b> | [strokes](https://example.invalid) &#58;", "an indecent *figure*"]
    s3 = studio.client()
    try:
        s3.put_object(Bucket=BUCKET, Key="tables/boats.csv", Body="\n".join(rows).encode())
    finally:
        s3.close()
    studio.api.set_faults("prediction:fail_moderation,matching=indecent")
    wanted: list[tuple[str, str, dict[str, str]]] = [
        ("generate_batch", "FAILED", {"source": BOATS, "destination": f"s3://{BUCKET}/boats"}),
        ("generate_image", "COMPLETED", {"prompt": MARKUP, "item_id": "of-a-stranger", "destination": STRANGERS}),
        ("generate_batch", "FAILED", {"source": f"s3://{BUCKET}/{MARKUP}.csv", "destination": STRANGERS}),
        ("settle_leftovers", "COMPLETED", {"destination": STRANGERS}),
    ]
    given = json.dumps([(name, parameters) for name, _, parameters in wanted])
    done = subprocess.run(
        [sys.executable, "-c", RUNS, given],
        env=studio.stage.environment("a-process"),
        cwd=studio.stage.empty_folder,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    studio.api.set_faults()
    ended = [json.loads(line) for line in done.stdout.splitlines()]
    assert [state for _, state, _ in ended] == [state for _, state, _ in wanted], done.stdout
    batch, *of_a_stranger = (run for run, _, _ in ended)
    return Runs(batch, of_a_stranger)


@pytest.fixture(scope="module")
def batch_artifact(studio: Studio, runs: Runs) -> str:
    """The batch's report."""
    assert studio.stage.flow_run(runs.batch)["name"] == "batch boats"
    (report,) = [one for one in studio.stage.artifacts(runs.batch) if one["key"] == "eachlabs-batch-boats"]
    made = {"filter": {"event": {"name": ["prefect.asset.materialization.succeeded"]}}}

    def told() -> dict[str, Any] | None:
        found = studio.stage.ask("POST", "/events/filter", made)["events"]
        ours = [one for one in found if one["resource"]["prefect.resource.id"] == f"s3://{BUCKET}/boats/batches/boats"]
        return ours[0] if ours else None

    asset = until(told, 90, "the server has the batch's asset")
    assert BOATS in {one["prefect.resource.id"] for one in asset["related"]}
    assert asset["payload"]["stored"] == 5
    return str(report["id"])


@IN_BOTH
def test_a_batch_shows_its_totals_what_failed_and_a_gallery(
    ui: str, base: str, studio: Studio, batch_artifact: str, page: Any
) -> None:
    from playwright.sync_api import expect

    page.goto(f"{studio.stage.ui}{base}/artifacts/artifact/{batch_artifact}")
    gallery = page.locator('img[src^="data:image/webp"]')
    expect(gallery).to_have_count(5, timeout=PATIENCE_MS)  # V2 draws the page once more in between
    assert gallery.first.evaluate("image => image.complete && image.naturalWidth >= 100")
    page.get_by_text("an indecent *figure*").first.wait_for()
    photograph(page, f"{ui}-batch")
    assert page.evaluate(WIDER) == [], "tables run out of the page"
    shown = page.locator("body").inner_text().replace("&#58;", "")  # which stands in a prompt
    assert "&#" not in shown, "entities show as they are written"
    assert page.locator('a[href*="example.invalid"]').count() == 0


def test_a_batchs_page_that_was_downloaded_shows_its_pictures_and_loads_nothing(
    studio: Studio, batch_artifact: str, page: Any, tmp_path: Path
) -> None:
    assert batch_artifact
    s3 = studio.client()
    try:
        body = s3.get_object(Bucket=BUCKET, Key="boats/batches/boats/index.html")["Body"].read()
    finally:
        s3.close()
    (tmp_path / "index.html").write_bytes(body)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto((tmp_path / "index.html").as_uri())
    shown = page.locator("figure img")
    assert shown.count() == 5
    assert all(
        shown.nth(at).evaluate("image => image.decode().then(() => image.naturalWidth)") > 100 for at in range(5)
    )
    assert page.get_by_text("an indecent *figure*").is_visible()
    assert not [url for url in asked if not url.startswith(("data:", "file:"))]


@IN_BOTH
def test_who_fills_in_a_form_puts_nothing_but_words_on_a_page(
    ui: str, base: str, studio: Studio, runs: Runs, page: Any
) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    # Without a key it is Prefect's own note of a result.
    artifacts = [one for run in runs.of_a_stranger for one in studio.stage.artifacts(run) if one["key"]]
    assert [one["key"] for one in artifacts] == ["eachlabs-of-a-stranger", "eachlabs-settle"]
    pages = [
        *(f"/artifacts/artifact/{one['id']}" for one in artifacts),
        f"/artifacts/key/{artifacts[0]['key']}",
        *(f"/runs/flow-run/{run}" for run in runs.of_a_stranger[:2]),
        "/artifacts",
    ]
    for number, path in enumerate(pages):
        page.goto(f"{studio.stage.ui}{base}{path}")
        if number < len(artifacts):
            page.get_by_text("<img src=x onerror=alert(1)>").first.wait_for()  # shown, and as it is
        page.screenshot()  # once all is drawn
        assert page.locator('[src*="evil.invalid"], [src="x"], [onerror]').count() == 0, path
        for link in page.locator('a[href*="evil.invalid"]').all():
            # Prefect's own, of every address in a log; it says where it leads.
            assert path.startswith("/runs/"), path
            assert link.inner_text() == link.get_attribute("href")
    assert not [url for url in asked if "evil.invalid" in url.partition("?")[0]]


def test_a_run_cancelled_from_the_browser_cancels_its_prediction(studio: Studio, page: Any) -> None:
    prompt = "a snail on its way"
    studio.api.set_faults("prediction:slow,seconds=120,matching=snail")
    run_id = studio.stage.run(IMAGE, prompt=prompt, destination=PLACE, item_id="snail")
    until(lambda: (studio.record("snail") or {}).get("state") == "created", 240, "the snail is bought")
    page.goto(f"{studio.stage.ui}/runs/flow-run/{run_id}")
    page.get_by_text("Running").first.wait_for()
    page.get_by_role("button", name="Cancel", exact=True).first.click()
    asked = page.get_by_role("dialog").or_(page.get_by_role("alertdialog"))  # whether one is sure
    asked.get_by_role("button", name=re.compile("Cancel|Confirm")).last.click()
    until(lambda: studio.stage.state(run_id) in ("CANCELLING", "CANCELLED"), 90, "the run is to end")
    leave(page)
    until(lambda: studio.predictions(prompt)[0]["status"] == "cancelled", 90, "the prediction is cancelled")
    assert studio.stage.ended(run_id)["state"]["type"] == "CANCELLED"
    record = studio.record("snail")
    assert record is not None
    assert (record["state"], record["cancel_requested"]) == ("cancelled", True)
    studio.api.set_faults()
