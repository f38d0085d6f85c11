"""What a prediction puts out: one picture or several, of which formats, whole or not at all."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator
from contextlib import closing
from typing import Any

import boto3
import httpx
import pytest
from PIL import Image

from prefect_eachlabs.cli.main import main
from prefect_eachlabs.errors import (
    BadInput,
    ContentRefused,
    DownloadFailed,
    FormatNotAllowed,
    NotAPng,
    PictureMissing,
    StoreFailed,
)
from prefect_eachlabs.images import formats as media
from prefect_eachlabs.images import store as finishing
from prefect_eachlabs.images.download import Downloader
from prefect_eachlabs.images.formats import MediaReader, check_formats, format_of, verify, verify_in_turns
from prefect_eachlabs.images.png import MediaError
from prefect_eachlabs.tasks import await_result, create_prediction, generate_and_store, store_image
from prefect_eachlabs.testing.emulator.outputs import MEDIA_TYPES, PICTURE_TYPES, other_output
from prefect_eachlabs.testing.s3 import Fault as S3Fault
from tests.flows.flow_fixtures import BUCKET, Studio

FORMATS = ("jpeg", "webp", "gif", "avif")
Printed = pytest.CaptureFixture[str]


def picture(format: str, size_px: tuple[int, int] = (48, 32), frames: int = 1) -> bytes:
    """A picture with enough in it that a cut is seen."""
    buffer = io.BytesIO()
    images = [Image.effect_noise(size_px, 60 + number).convert("RGB") for number in range(frames)]
    more: dict[str, Any] = {"save_all": True, "append_images": images[1:]} if frames > 1 else {}
    images[0].save(buffer, format.upper(), **more)
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------------ verified


@pytest.mark.parametrize("format", ["png", *FORMATS])
def test_a_whole_picture_of_each_format_is_known_and_measured(format: str) -> None:
    data = picture(format)
    assert format_of(data[:16]) == format
    found = asyncio.run(verify_in_turns(data))
    assert (found.format, found.width_px, found.height_px, found.data) == (format, 48, 32, data)


@pytest.fixture(autouse=True)
def _quick_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finishing, "FIRST_PAUSE_SECONDS", 0.01)


@pytest.mark.parametrize("format", ["gif", "webp"])
def test_a_moving_picture_is_whole_to_its_last_frame(format: str) -> None:
    data = picture(format, frames=3)
    assert verify(data).format == format
    with pytest.raises(MediaError):
        verify(data[: len(data) * 2 // 3])


@pytest.mark.parametrize("format", FORMATS)
def test_a_head_without_a_body_is_refused(format: str) -> None:
    with pytest.raises(MediaError):
        verify(picture(format)[:40] + bytes(100))


@pytest.mark.parametrize("size_px", [(1, 1), (33, 57), (1_000, 3)])
@pytest.mark.parametrize(
    ("format", "how"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("JPEG", {"quality": 100, "subsampling": 0, "comment": b"\xff\xd9" * 9, "exif": b"Exif\0\0" + bytes(99)}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
        ("WEBP", {"exif": b"Exif\0\0" + bytes(99)}),
        ("GIF", {"comment": b";" * 300}),
        ("AVIF", {"speed": 10}),
    ],
)
def test_the_walk_through_a_pictures_parts_finds_the_size_that_its_decoder_finds(
    format: str, how: dict[str, Any], size_px: tuple[int, int]
) -> None:
    for mode in ("RGB", "L", "P", "RGBA", "CMYK"):
        if mode in {"JPEG": ("P", "RGBA"), "WEBP": ("CMYK",), "GIF": ("CMYK",), "AVIF": ("CMYK",)}[format]:
            continue
        buffer = io.BytesIO()
        Image.effect_noise(size_px, 90).convert("RGB").convert(mode).save(buffer, format, **how)
        data = buffer.getvalue()
        found = verify(data)
        assert (found.width_px, found.height_px) == size_px
        for cut in {len(data) * part // 20 for part in range(1, 20)} | {len(data) - 1}:
            with pytest.raises(MediaError):
                verify(data[:cut])


def test_a_picture_that_would_fill_a_readers_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "MAX_PIXELS", 1_000)
    with pytest.raises(MediaError, match="1 frames of 48 x 32 px, which is too much"):
        verify(picture("jpeg"))
    monkeypatch.setattr(media, "MAX_PIXELS", 2_000)
    monkeypatch.setattr(media, "MAX_PIXELS_OF_ALL_FRAMES", 4_000)
    with pytest.raises(MediaError, match="3 frames of 48 x 32 px, which is too much"):
        verify(picture("gif", frames=3))


def test_what_comes_in_single_bytes_is_read_as_well() -> None:
    for format in ("png", "jpeg"):
        reader = MediaReader(("png", "jpeg"))
        for byte in picture(format):
            reader.feed(bytes([byte]))
        assert reader.finish().format == format


def test_a_picture_that_is_too_long_is_not_read_to_its_end() -> None:
    reader = MediaReader(("jpeg",), max_bytes=1_000)
    reader.feed(picture("jpeg")[:900])
    with pytest.raises(MediaError, match="larger than 1000 bytes"):
        reader.feed(bytes(101))


@pytest.mark.parametrize(
    ("given", "names"),
    [(None, None), ("png,jpg", ("png", "jpeg")), (["PNG", "png", " webp "], ("png", "webp")), (("gif",), ("gif",))],
)
def test_formats_are_named_as_people_name_them(given: Any, names: tuple[str, ...] | None) -> None:
    assert check_formats(given) == names


@pytest.mark.parametrize("given", ["", "exe", ["png", "exe"], []])
def test_formats_that_are_none_are_refused(given: Any) -> None:
    with pytest.raises(BadInput, match=r"formats: .* Name one or more of png, jpeg, webp, gif"):
        check_formats(given)


# ----------------------------------------------------------------------------------------------- downloaded


def fetched(data: bytes, *formats: str, url: str = "1", content_type: str = "", any_format: bool = False) -> Any:
    """What comes of a host's answer where these formats are wanted; of a PNG where none is named."""

    async def story() -> Any:
        told = {"Content-Type": content_type}
        downloader = Downloader(httpx.MockTransport(lambda _: httpx.Response(200, content=data, headers=told)))
        try:
            return await downloader.fetch(
                f"https://cdn.example.org/{url}",
                formats=None if any_format else formats or ("png",),
                prediction_id="p-1",
                item_id="fox",
            )
        finally:
            await downloader.aclose()

    return asyncio.run(story())


@pytest.mark.parametrize("format", FORMATS)
def test_another_format_than_was_promised_is_refused_and_the_error_says_how_to_have_it(format: str) -> None:
    title = media.FORMATS[format].title
    said = rf"is paid for and not stored: it is an? {title} where a PNG is promised.* --formats png,{format}"
    with pytest.raises(FormatNotAllowed, match=said) as info:
        fetched(picture(format))
    assert (info.value.retryable, info.value.prediction_id, info.value.item_id) == (False, "p-1", "fox")
    assert isinstance(info.value, NotAPng)


@pytest.mark.parametrize("format", FORMATS)
def test_a_format_that_is_allowed_is_taken_as_it_is(format: str) -> None:
    data = picture(format)
    assert fetched(data, "png", format).data == data
    with pytest.raises(NotAPng, match=f"not a whole PNG or {media.FORMATS[format].title}: .*") as info:
        fetched(data[:-40], "png", format)
    assert info.value.retryable, "it may come whole another time"


def test_a_png_is_refused_where_it_is_not_what_was_asked_for() -> None:
    with pytest.raises(FormatNotAllowed, match="it is a PNG where a JPEG or WebP is promised"):
        fetched(picture("png"), "jpeg", "webp")


def fetched_as(data: bytes, url: str, content_type: str) -> Any:
    return fetched(data, url=url, content_type=content_type, any_format=True)


@pytest.mark.parametrize(
    ("format", "url", "content_type"),
    [
        *((name, f"out.{name}", type_) for name, type_ in MEDIA_TYPES.items() if name not in PICTURE_TYPES),
        *((name, "output", "application/octet-stream") for name in ("svg", "mp4", "webm", "mp3", "wav", "glb", "json")),
        ("txt", "output", ""),
        ("txt", "caption", "text/plain"),
    ],
)
def test_what_is_not_a_picture_is_taken_as_it_came_and_known_for_what_it_is(
    format: str, url: str, content_type: str
) -> None:
    data = other_output("a fox", format)
    found = fetched_as(data, url, content_type)
    assert (found.format, found.verified, found.data, found.width_px) == (format, False, data, None)


@pytest.mark.parametrize("format", ["png", *FORMATS])
def test_where_anything_is_taken_pictures_are_verified_all_the_same(format: str) -> None:
    data = picture(format)
    assert fetched_as(data, f"out.{format}", "").verified
    with pytest.raises(NotAPng, match="not a whole file"):
        fetched_as(data[:-40], f"out.{format}", "")


HTML = b"<!DOCTYPE html><title>Sign in</title>" + bytes(99)


@pytest.mark.parametrize(
    ("data", "url", "content_type", "said"),
    [
        (HTML, "out", "text/html", "an HTML page, as hosts send"),
        (HTML, "out.mp3", "audio/mpeg", "an HTML page, as hosts send"),
        (b"not found", "out.png", "text/plain", "called a PNG and does not begin as one"),
        (b"<Error>expired</Error>", "out.mp4", "application/xml", "called an MP4 and does not begin as one"),
        (b'{"error": "expired"}', "out", "image/webp", "called a WebP and does not begin as one"),
        (b"", "out.txt", "text/plain", "it is empty"),
    ],
)
def test_what_a_host_sends_in_place_of_an_output_is_not_taken_for_it(
    data: bytes, url: str, content_type: str, said: str
) -> None:
    with pytest.raises(NotAPng, match=said) as info:
        fetched_as(data, url, content_type)
    assert info.value.retryable
    if data:
        whatever_comes = fetched(data, "any", url=url, content_type=content_type)
        assert whatever_comes.data == data


def test_a_file_whose_end_cannot_be_known_is_not_taken_for_whole() -> None:
    class Unending(httpx.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            yield other_output("a fox", "wav")

    async def story() -> None:
        downloader = Downloader(httpx.MockTransport(lambda _: httpx.Response(200, stream=Unending())))
        with pytest.raises(DownloadFailed, match="does not say how long it is"):
            await downloader.fetch("https://cdn.example.org/out.wav", formats=None)
        await downloader.aclose()

    asyncio.run(story())


# --------------------------------------------------------------------------------------------------- stored


@pytest.mark.parametrize(
    ("format", "content_type", "disposition"),
    [
        ("mp4", "video/mp4", None),
        ("svg", "image/svg+xml", "attachment"),
        ("html", "application/octet-stream", "attachment"),
    ],
)
def test_what_was_paid_for_is_stored_whatever_it_is_and_runs_in_no_browser(
    studio: Studio, format: str, content_type: str, disposition: str | None, capsys: Printed
) -> None:
    studio.api.set_faults(f"prediction:output_format,value={format}")
    item_id = f"fox-{format}"
    assert main(["generate", "a fox", "--to", studio.destination, "--item-id", item_id, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["format"], told["verified"], told["width_px"]) == (format, False, None)
    stored = objects_of(studio)[f"{item_id}.{format}"]
    assert (stored["ContentType"], stored.get("ContentDisposition")) == (content_type, disposition)
    record = record_of(studio, item_id)
    assert (record["verified"], record["state"]) == (False, "stored")
    assert record["content_type"] == media.FORMATS[format].content_type

    given: dict[str, Any] = {"destination": studio.destination, "item_id": item_id}
    again = generate_and_store.fn("a fox", **given)
    assert (again.reused, again.verified, again.uri, studio.billed) == (True, False, told["uri"], 1)


@pytest.mark.parametrize(
    ("format", "content_type", "disposition"),
    [
        ("jpeg", "image/jpeg", None),
        ("webp", "image/webp", None),
        ("gif", "image/gif", None),
        ("wav", "audio/wav", None),
        ("glb", "model/gltf-binary", "attachment"),
        ("txt", "text/plain; charset=utf-8", "attachment"),
    ],
)
def test_what_a_browser_would_run_is_an_attachment(format: str, content_type: str, disposition: str | None) -> None:
    assert (media.FORMATS[format].content_type, media.FORMATS[format].disposition) == (content_type, disposition)


def objects_of(studio: Studio) -> dict[str, Any]:
    with closing(boto3.client("s3")) as s3:
        return {key: s3.head_object(Bucket=BUCKET, Key=studio.key(f"images/{key}")) for key in sorted(studio.keys())}


def record_of(studio: Studio, item_id: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(studio.get(f"records/{item_id}.json"))
    return record


def test_a_picture_of_another_format_is_stored_as_what_it_is(studio: Studio) -> None:
    given: dict[str, Any] = {
        "destination": studio.destination,
        "item_id": "fox",
        "model": "flux-1-1-pro",
        "input": {"output_format": "jpeg"},
    }
    with pytest.raises(FormatNotAllowed, match="Allow it and run the same again, which buys nothing"):
        generate_and_store.fn("a fox", formats=["png"], **given)
    assert studio.keys() == []
    assert record_of(studio, "fox")["state"] == "created"

    image = generate_and_store.fn("a fox", formats=["png", "jpeg"], **given)
    assert (image.uri, image.format) == (f"{studio.destination}/images/fox.jpg", "jpeg")
    stored = objects_of(studio)
    assert {key: one["ContentType"] for key, one in stored.items()} == {"fox.jpg": "image/jpeg"}
    again = generate_and_store.fn("a fox", **given)
    assert (again.reused, again.uri, again.format) == (True, image.uri, "jpeg"), "what is there needs no permission"
    assert studio.billed == 1


def test_what_may_be_stored_stands_in_the_record_for_whoever_finishes_it(studio: Studio) -> None:
    """A run that dies leaves a record; the janitor asks nobody what was allowed."""
    prediction = create_prediction.fn(
        "a fox",
        destination=studio.destination,
        item_id="fox",
        model="flux-1-1-pro",
        input={"output_format": "webp"},
        formats=["webp"],
    )
    assert record_of(studio, "fox")["formats"] == ["webp"]
    image = store_image.fn(await_result.fn(prediction), studio.destination)
    assert image.uri.endswith("/images/fox.webp")


def test_a_step_may_be_told_what_it_may_store(studio: Studio) -> None:
    created = create_prediction.fn(
        "a fox", destination=studio.destination, model="flux-1-1-pro", input={"output_format": "gif"}
    )
    finished = await_result.fn(created)
    with pytest.raises(FormatNotAllowed):
        store_image.fn(finished, studio.destination, formats=["png"])
    assert store_image.fn(finished, studio.destination).uri.endswith(".gif")


@pytest.mark.parametrize("format", ["png", "webm"])
def test_a_run_that_died_before_its_last_note_is_finished_from_the_bucket(studio: Studio, format: str) -> None:
    """The pictures are there, the record says `created`: nothing is fetched and nothing bought."""
    given: dict[str, Any] = {
        "destination": studio.destination,
        "item_id": f"fox-{format}",
        "model": "flux-1-1-pro",
        "formats": None if format == "webm" else ["png"],
    }
    studio.api.set_faults("prediction:output_several,value=3", f"prediction:output_format,value={format}")
    first = generate_and_store.fn("a fox", **given)
    record = {name: value for name, value in record_of(studio, f"fox-{format}").items() if "uri" not in name}
    studio.put(f"records/fox-{format}.json", json.dumps({**record, "state": "created"}).encode())
    again = generate_and_store.fn("a fox", **given)
    assert (again.uri, again.more_uris, again.sha256) == (first.uri, first.more_uris, first.sha256)
    assert (len(again.more_uris), studio.billed, studio.api.tallies()["downloads"]) == (2, 1, 3)


# -------------------------------------------------------------------------------------------------- several


def test_an_output_of_any_shape_is_stored(studio: Studio) -> None:
    for shape, names in (
        ("list", ["list.png"]),
        ("object", ["object.png"]),
        ("images", ["images.png"]),
        ("json", ["json.png"]),
        ("several,value=3", ["several.png", "several.2.png", "several.3.png"]),
    ):
        studio.api.set_faults(f"prediction:output_{shape}")
        image = generate_and_store.fn("a fox", destination=studio.destination, item_id=shape.partition(",")[0])
        uris = [image.uri, *image.more_uris]
        assert uris == [f"{studio.destination}/images/{name}" for name in names]
        assert set(names) <= set(studio.keys())


def test_several_pictures_are_several_files_each_with_its_own_bytes(studio: Studio, capsys: Printed) -> None:
    words = ["generate", "a fox", "--to", studio.destination, "--item-id", "fox", "--model", "imagen-4"]
    assert main([*words, "--input", "num_images=4", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["uri"] == f"{studio.destination}/images/fox.png"
    assert answer["more_uris"] == [f"{studio.destination}/images/fox.{number}.png" for number in (2, 3, 4)]
    assert len({one["ETag"] for one in objects_of(studio).values()}) == 4
    assert {one["Metadata"]["prediction-id"] for one in objects_of(studio).values()} == {answer["prediction_id"]}
    assert studio.billed == 1


def test_several_pictures_are_stored_all_or_none(studio: Studio) -> None:
    """The first goes last: as long as one of them is missing, the item is not there, and nothing is bought again."""
    given: dict[str, Any] = {
        "destination": studio.destination,
        "item_id": "fox",
        "model": "imagen-4",
        "input": {"num_images": 3},
    }
    studio.s3.set_faults(S3Fault("refuse", "PUT", times=99, key_contains="fox.2.png"))
    with pytest.raises(StoreFailed):
        generate_and_store.fn("a fox", **given)
    assert studio.keys() == ["fox.3.png"]
    assert record_of(studio, "fox")["state"] == "created"
    studio.s3.set_faults()
    image = generate_and_store.fn("a fox", **given)
    assert len(image.more_uris) == 2
    assert sorted(studio.keys()) == ["fox.2.png", "fox.3.png", "fox.png"]
    assert studio.billed == 1


def test_one_of_several_that_is_gone_is_missed(studio: Studio) -> None:
    given: dict[str, Any] = {"destination": studio.destination, "item_id": "fox", "model": "imagen-4"}
    image = generate_and_store.fn("a fox", **given)
    studio.delete("images/" + image.more_uris[0].rpartition("/")[2])
    with pytest.raises(PictureMissing, match="gone from the bucket"):
        generate_and_store.fn("a fox", **given)
    again = generate_and_store.fn("a fox", rebuy_missing=True, **given)
    assert (len(studio.keys()), again.prediction_id != image.prediction_id, studio.billed) == (2, True, 2)


# ----------------------------------------------------------------------------------------------- moderation


def test_a_refusal_by_moderation_is_a_kind_of_its_own_and_is_not_repeated(studio: Studio, capsys: Printed) -> None:
    studio.api.set_faults("prediction:fail_moderation")
    said = r"CONTENT_MODERATION: The request was refused by the provider's safety system. Change the prompt"
    with pytest.raises(ContentRefused, match=said) as info:
        generate_and_store.fn("a fox", destination=studio.destination, item_id="fox")
    assert (info.value.retryable, info.value.kind) == (False, "content refused")
    record = record_of(studio, "fox")
    assert (record["state"], record["error"]["kind"], record["resubmissions"]) == ("failed", "content refused", 0)

    studio.api.set_faults()
    with pytest.raises(ContentRefused, match=r"It failed in an earlier run: .*only when asked"):
        generate_and_store.fn("a fox", destination=studio.destination, item_id="fox")
    assert main(["generate", "a fox", "--to", studio.destination, "--item-id", "fox"]) == 1
    assert "safety system" in capsys.readouterr().err
    assert (studio.billed, studio.api.tallies()["cost_usd"]) == (1, 0.0)
