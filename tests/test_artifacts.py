"""What a person sees of a picture: a thumbnail and the facts; hostile words stay words."""

from __future__ import annotations

import asyncio
import base64
import io
import logging
import re
from hashlib import sha256
from typing import Any

import pytest
from markdown_it import MarkdownIt
from PIL import Image
from prefect import flow
from prefect.assets import Asset

from prefect_eachlabs import (
    StoredImage,
    acreate_prediction,
    agenerate_and_store,
    artifacts,
    events,
    generate_and_store,
    generate_rows,
)
from prefect_eachlabs.artifacts import artifact_key, escaped, picture_markdown, settle_markdown, thumbnail_url
from prefect_eachlabs.confined import NotInstalled
from prefect_eachlabs.engine import engine
from prefect_eachlabs.engine.cleanup import SettleReport
from prefect_eachlabs.flows import generate_image
from prefect_eachlabs.images.thumbnails import NoThumbnail
from prefect_eachlabs.net.redaction import visible
from tests.flows.flow_fixtures import Studio, last_artifact
from tests.html_seen import Seen

HOSTILE = [
    "a | b | c\n| --- |",
    "`code` ```\nfence\n```",
    '<img src=x onerror="alert(1)">',
    "</td></table><script>alert(1)</script>",
    "a [link](https://evil.invalid) ![x](https://evil.invalid/x.png) ]( javascript:alert(1) )",
    "# heading\n\n- list\n1. list\n> quote\n***bold*** __x__ ~~y~~",
    "https://evil.invalid www.evil.invalid me@evil.invalid <https://evil.invalid>",
    "&lt;script&gt; &#60;b&#62; \\<b\\>",
    "\u202eright to left\u202c \x00 \x1b[31m",
]


def png(width: int = 64, height: int = 64, mode: str = "RGBA", noise: bool = False) -> bytes:
    out = io.BytesIO()
    picture = Image.effect_noise((width, height), 90) if noise else Image.new(mode, (width, height), "teal")
    picture.save(out, "PNG")
    return out.getvalue()


def image(**facts: Any) -> StoredImage:
    given: dict[str, Any] = {
        "item_id": "fox-1",
        "prediction_id": "p-1",
        "uri": "s3://acme/daily/images/fox-1.png",
        "sha256": "ab" * 32,
        "size_bytes": 12_345,
        "width_px": 512,
        "height_px": 512,
        "cost_usd": 0.039,
        "predict_time_seconds": 4.2,
        "model": "gemini",
        "prompt": "a red fox",
    }
    return StoredImage(**{**given, **facts})


def rendered(markdown: str) -> Seen:
    """As the UIs render it: GitHub's markdown with raw HTML, which must be one block of HTML from end to end."""
    tokens = MarkdownIt("gfm-like", {"html": True, "linkify": False}).parse(markdown)
    assert [token.type for token in tokens] == ["html_block"]
    return Seen(tokens[0].content)


@pytest.mark.parametrize("prompt", HOSTILE)
def test_a_hostile_prompt_is_shown_as_the_words_it_is(prompt: str) -> None:
    plain = rendered(picture_markdown(image(), thumbnail=None))
    seen = rendered(picture_markdown(image(prompt=prompt, prediction_id=prompt, model=prompt[:100]), thumbnail=None))
    assert [name for name, _ in seen.tags if name != "wbr"] == [name for name, _ in plain.tags if name != "wbr"]
    assert visible(" ".join(prompt.split())) in seen.text
    assert not re.search(r"https?://|www\.|@", escaped(prompt))


def test_the_facts_are_there_and_what_was_not_told_says_so() -> None:
    seen = rendered(picture_markdown(image(cost_usd=None, predict_time_seconds=None), thumbnail=None))
    assert seen.text.count("not told") == 2
    seen = rendered(
        picture_markdown(image(reused=True), thumbnail="data:image/png;base64,AA", link="https://x.invalid")
    )
    for fact in ("0.0390 USD", "4.2 s", "512 × 512 px, 12 kB", "a red fox", "bought nothing", "ab" * 32):
        assert fact in seen.text
    assert ("img", {"alt": "fox-1", "width": "320", "src": "data:image/png;base64,AA"}) in seen.tags
    assert ("a", {"href": "https://x.invalid"}) in seen.tags


def test_a_thumbnail_is_a_small_jpeg_of_the_whole_picture() -> None:
    head, _, data = thumbnail_url(png(1000, 500)).partition(",")
    assert head == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as small:
        assert small.size == (320, 160)


def test_without_pillow_a_small_png_is_its_own_thumbnail_and_a_large_one_has_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(*_: object, **__: object) -> bytes:
        raise NotInstalled("No module named 'PIL'")

    monkeypatch.setattr(artifacts, "thumbnail", missing)
    small, large = png(), png(600, 600, noise=True)
    assert thumbnail_url(small) == "data:image/png;base64," + base64.b64encode(small).decode()
    assert len(large) > artifacts.MOST_UNTOUCHED_BYTES
    for data in (large, b"<svg/>"):
        with pytest.raises(NoThumbnail, match="Pillow, which is not installed"):
            thumbnail_url(data)


def test_what_has_no_thumbnail_says_why_in_its_place() -> None:
    with pytest.raises(NoThumbnail, match="it cannot be read"):
        thumbnail_url(b"no picture")
    with pytest.raises(NoThumbnail, match="8000 × 8000 px are too many for a thumbnail") as none:
        thumbnail_url(png(8000, 8000, "1"))
    seen = rendered(picture_markdown(image(), thumbnail=None, note=str(none.value)))
    assert "No thumbnail: 8000 × 8000 px are too many" in seen.text


@pytest.mark.parametrize("item_id", ["fox-1", "Fox_1", "fox_1", "__", "A" * 128, "0123456789abcdef"])
def test_a_key_is_one_that_prefect_takes_and_items_do_not_share_one(item_id: str) -> None:
    key = artifact_key(image(item_id=item_id))
    assert re.fullmatch(r"[a-z0-9-]+", key)
    others = {artifact_key(image(item_id=other)) for other in ("fox-1", "Fox_1", "fox_1", "fox-1-") if other != item_id}
    assert key not in others


def test_an_item_without_a_name_of_its_own_fits_onto_its_card() -> None:
    keys = {artifact_key(image(item_id=one * 32, prompt="A red fox, 雪")) for one in "0f"}
    assert len(keys) == 2
    assert all(re.fullmatch("eachlabs-a-red-[0-9a-f]{6}", key) for key in keys)
    assert artifact_key(image(item_id="0" * 32, prompt="雪")) == f"eachlabs-{sha256(b'0' * 32).hexdigest()[:6]}"


def test_the_janitors_report_escapes_what_it_quotes() -> None:
    report = SettleReport(records=3, looked_at=1, ambiguous=1, problems={"fox": HOSTILE[2] + " | more"})
    seen = rendered(settle_markdown("s3://acme/daily", report))
    assert "img" not in [name for name, _ in seen.tags]
    assert HOSTILE[2] in seen.text.replace("\u200b", "")


# ---------------------------------------------------------------- on a server


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The events that left this process, but for Prefect's own."""
    heard: list[dict[str, Any]] = []

    def emit(event: str, **facts: Any) -> None:
        heard.append({"event": event, **facts})

    monkeypatch.setattr(events, "emit_event", emit)
    return heard


@pytest.fixture
def assets(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Prefect's events of assets that left this process."""
    heard: list[dict[str, Any]] = []
    monkeypatch.setattr("prefect.events.emit_event", lambda event, **facts: heard.append({"event": event, **facts}))
    return heard


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("s3://acme/images/fox 1.png", "s3://acme/images/fox-1.png"),
        ("https://cdn.example.org/fox.png?X-Amz-Signature=secret", "https://cdn.example.org/fox.png"),
        ("https://user:secret@cdn.example.org/fox.png", None),
        ("/home/me/table.csv", None),
        ("sha256:" + "0" * 64, None),
        ("s3://acme/<img src=x>&'\"{}%20\n", "s3://acme/-img-src=x-------20"),
    ],
)
def test_an_assets_key_is_one_that_prefect_takes_and_holds_no_secret(name: str, key: str | None) -> None:
    assert events.asset_key(name) == key
    if key is not None:
        assert Asset(key=key).key == key


@pytest.mark.usefixtures("prefect_server")
class TestOnAServer:
    def test_a_picture_and_a_batch_are_an_asset_each_with_what_they_were_made_from(
        self, studio: Studio, assets: list[dict[str, Any]], sent: list[dict[str, Any]]
    ) -> None:
        @flow
        def work() -> None:
            generate_and_store("one", destination=studio.destination, item_id="asset-1")
            generate_and_store("one", destination=studio.destination, item_id="asset-1")
            assert [one["event"] for one in sent] == [events.STORED], "what was there already is no event"
            generate_rows([{"prompt": f"fox {n}"} for n in range(3)], destination=studio.destination, batch_id="foxes")
            events.batch_finished(
                {"batch_id": "b", "stored": 2, "report_uri": "s3://acme/p/batches/b/runs/r/report.json", "items": 2},
                ["s3://acme/tables/spring.csv", "s3://acme/refs/fox.png", "/home/me/table.csv"],
            )

        work()
        made = [one for one in assets if one["event"] == "prefect.asset.materialization.succeeded"]
        keys = [one["resource"]["prefect.resource.id"] for one in made]
        place = studio.destination
        assert keys == [f"{place}/images/asset-1.png", f"{place}/batches/foxes", "s3://acme/p/batches/b"]
        assert [one["payload"].get("cost_usd") for one in made[:2]] == [0.039, 0.117]
        upstream = {one["prefect.resource.id"] for one in made[2]["related"]}
        assert upstream == {"s3://acme/tables/spring.csv", "s3://acme/refs/fox.png", "prefect-eachlabs"}
        assert "prompt" not in repr(assets)

    def test_the_flow_leaves_an_artifact_with_the_picture_and_its_cost_that_was_settled_late(
        self, studio: Studio, sent: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(engine, "COST_PAUSES_SECONDS", (0.3,) * 20)
        studio.api.set_faults("prediction:late_cost,seconds=0.5")
        stored = generate_image("a red <fox>", studio.destination, item_id="fox-of-the-flow")
        artifact = last_artifact("eachlabs-fox-of-the-flow")
        assert (artifact.type, artifact.description) == ("markdown", "$0.0390 · a red -fox-")
        seen = rendered(artifact.data)
        (picture,) = [attributes for name, attributes in seen.tags if name == "img"]
        assert str(picture["src"]).startswith("data:image/jpeg;base64,")
        assert "a red <fox>" in seen.text
        assert "0.0390" in seen.text
        assert (stored.cost_usd, sent[0]["payload"]["cost_usd"]) == (0.039, 0.039)
        assert [one["event"] for one in sent] == [events.STORED]
        assert sent[0]["resource"]["prefect.resource.id"] == f"eachlabs.picture.{stored.item_id}"
        assert "fox>" not in repr(sent)
        sent.clear()
        assert generate_image("a red <fox>", studio.destination, item_id="fox-of-the-flow").reused
        assert not sent

    def test_the_async_door_leaves_one_too(self, studio: Studio, sent: list[dict[str, Any]]) -> None:
        @flow
        async def sketches() -> None:
            await agenerate_and_store("one", destination=studio.destination, item_id="async-1", with_artifact=True)
            await agenerate_and_store("two", destination=studio.destination, item_id="async-2")
            await acreate_prediction("three", destination=studio.destination)

        asyncio.run(sketches())
        assert "data:image/jpeg" in last_artifact("eachlabs-async-1").data
        assert [one["event"] for one in sent] == [events.STORED, events.STORED]

    def test_an_artifact_or_event_that_cannot_be_made_fails_no_picture(
        self, studio: Studio, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def broken(*_: object, **__: object) -> None:
            raise RuntimeError("the server is away")

        monkeypatch.setattr(artifacts, "create_markdown_artifact", broken)
        monkeypatch.setattr(events, "emit_event", broken)
        with caplog.at_level(logging.WARNING, "prefect_eachlabs"):
            assert generate_image("a red fox", studio.destination).uri
        said = [record.getMessage() for record in caplog.records]
        assert sum("artifact could not be made" in line for line in said) == 1
        assert sum("could not be sent" in line for line in said) == 1


def test_a_task_called_outside_of_prefect_sends_nothing(sent: list[dict[str, Any]]) -> None:
    events.picture_stored(image())
    assert not sent
