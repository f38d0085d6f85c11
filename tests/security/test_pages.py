"""Who chooses names and prompts puts nothing but words on the pages of the Prefect UI."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, FlowRunFilter, FlowRunFilterId

from prefect_eachlabs.artifacts import escaped, picture_markdown, plain
from prefect_eachlabs.batch.outcomes import Outcome, RowState
from prefect_eachlabs.batch.pages import index_page
from prefect_eachlabs.batch_artifacts import chunk_markdown
from prefect_eachlabs.cli.main import main
from prefect_eachlabs.flows import generate_batch, generate_image, scheduled_image, settle_leftovers
from prefect_eachlabs.models import StoredImage
from prefect_eachlabs.net.redaction import visible
from tests.conftest import ROOT
from tests.flows.flow_fixtures import BUCKET, Studio
from tests.security.hostile import ESCAPES, FORGED, MARKUP

RENDER = MarkdownIt("gfm-like", {"html": True, "linkify": False})


def assert_words_alone(markdown: str) -> None:
    """Rendered with everything on, it is one paragraph of text, and nothing in it is made a link of."""
    kinds = [token.type for token in RENDER.parse(markdown)]
    assert kinds == ["paragraph_open", "inline", "paragraph_close"]
    (inline,) = (token for token in RENDER.parse(markdown) if token.type == "inline")
    assert {child.type for child in inline.children or ()} <= {"text"}
    assert "www." not in markdown
    assert "://" not in markdown
    assert visible(markdown) == markdown


@pytest.mark.parametrize("text", [MARKUP, f"{ESCAPES}{FORGED}", "- list", "1. list", "> quote", "=====", "\ud800\x00"])
def test_a_description_is_words_alone(text: str) -> None:
    assert_words_alone(f"Item {plain(text)}")


def test_what_moves_terminals_is_written_out_on_a_page() -> None:
    assert escaped("a\x1b[2J\u202eb") == "a&#92;x1b&#91;2J&#92;u202eb"
    row = Outcome(row=1, state=RowState.FAILED, prompt=MARKUP, error={"kind": MARKUP, "message": ESCAPES + FORGED})
    markdown = chunk_markdown([row])
    assert visible(markdown, keeping="\n") == markdown
    tokens = RENDER.parse(markdown)
    assert [token.type for token in tokens] == ["html_block"]
    assert "<img" not in markdown


@pytest.mark.usefixtures("prefect_server")
def test_the_artifacts_of_runs_describe_themselves_in_words_alone(studio: Studio) -> None:
    """A form's destination may hold any Markdown: it was the description of the picture's artifact."""
    hostile = f"s3://{BUCKET}/![x](https://evil.invalid/p.png)<img src=x onerror=alert(1)>"
    image = generate_image(MARKUP, hostile, return_state=True)
    left = settle_leftovers(hostile, return_state=True)

    async def read(run_id: Any) -> list[Any]:
        run = FlowRunFilter(id=FlowRunFilterId(any_=[run_id]))
        async with get_client() as client:
            return await client.read_artifacts(artifact_filter=ArtifactFilter(), flow_run_filter=run)

    for state in (image, left):
        (artifact,) = asyncio.run(read(state.state_details.flow_run_id))
        assert_words_alone(str(artifact.description))
        assert [token.type for token in RENDER.parse(str(artifact.data))] == ["html_block"]
        assert "evil.invalid/p.png)<img" not in str(artifact.data)


@pytest.mark.usefixtures("prefect_server")
@pytest.mark.parametrize(
    ("flow", "parameters"),
    [
        (generate_image, {"prompt": FORGED + ESCAPES}),
        (generate_image, {"prompt": "a fox", "item_id": ESCAPES + FORGED}),
        (scheduled_image, {"prompt_template": "a fox", "item_id_template": FORGED + ESCAPES}),
        (scheduled_image, {"prompt_template": "a fox", "time_zone": FORGED + ESCAPES}),
        (generate_batch, {"source": f"{ESCAPES}{FORGED}.csv"}),
        (generate_batch, {"source": "a.csv", "batch_id": ESCAPES + FORGED}),
    ],
)
def test_what_names_a_run_moves_no_log_and_is_no_line_of_it(studio: Studio, flow: Any, parameters: Any) -> None:
    state = flow(destination=f"{studio.destination}/\x1b[2J", **parameters, return_state=True)

    async def read() -> Any:
        async with get_client() as client:
            return await client.read_flow_run(state.state_details.flow_run_id)

    run = asyncio.run(read())
    assert state.is_failed()
    for text in (run.name, state.message):
        assert visible(text) == text


def test_the_deployment_that_events_start_says_that_each_spends_and_runs_few_at_a_time() -> None:
    deployments = yaml.safe_load((ROOT / "deployments" / "prefect.yaml").read_text())["deployments"]
    (asked,) = (one for one in deployments if "eachlabs.picture.requested" in str(one.get("triggers")))
    assert asked["concurrency_limit"]["limit"] <= 10
    assert "Each event eachlabs.picture.requested spends" in asked["description"]


def test_a_key_that_somebody_writes_to_the_bucket_moves_no_terminal(
    studio: Studio, capsys: pytest.CaptureFixture[str]
) -> None:
    studio.put("records/\x1b[2J\u202e.json", b"{}")
    assert main(["settle", studio.destination]) == 1
    said = capsys.readouterr().out
    assert "\\x1b[2J\\u202e" in said
    assert visible(said, keeping="\n") == said


@pytest.mark.parametrize("ending", ["svg", "html", "xml", "pdf"])
def test_what_a_browser_could_run_is_named_on_a_page_and_neither_shown_nor_linked(ending: str) -> None:
    uri = f"s3://{BUCKET}/images/fox.{ending}"
    there = Outcome(row=1, state=RowState.STORED, item_id="fox", prompt="a fox", uri=uri)
    page = "".join(
        index_page({"stored": 1}, pictures=[there], not_there=[], links={"fox": f"https://b.invalid/{ending}"})
    )
    assert f"fox.{ending}" in page
    for word in ("<img", "<object", "<iframe", "<embed", f'fox.{ending}"', "b.invalid"):
        assert word not in page
    shown = StoredImage(
        item_id="fox", prediction_id="p", uri=uri, sha256="0", size_bytes=9, format=ending, verified=False
    )
    assert "<img" not in picture_markdown(shown, thumbnail=None)


def test_the_page_of_a_report_shows_what_turns_text_as_what_it_is() -> None:
    text = f"{MARKUP}{ESCAPES}"
    there = Outcome(
        row=1, state=RowState.STORED, item_id=text, prompt=text, uri=f"s3://{BUCKET}/{text}.png", labels={text: text}
    )
    not_there = Outcome(row=2, state=RowState.FAILED, prompt=text, error={"kind": text, "message": text})
    totals = dict.fromkeys(("batch_id", "source", "destination", "run", "ended_at", "stopped_by"), text)
    page = "".join(index_page({**totals, "stored": 1, "failed": 1}, pictures=[there], not_there=[not_there]))
    assert page.count("\\x1b[2J") >= 12, "it is not shown at all"
    assert visible(page, keeping="\n") == page
    assert page.count("<img") == 1
    assert "onerror=alert(1)&gt;" in page
