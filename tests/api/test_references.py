"""Reference pictures: what may be one, what is looked at before money is spent, what is uploaded and how often."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import boto3
import httpx
import pytest

from prefect_eachlabs.api import references
from prefect_eachlabs.api.references import Prober, Seen
from prefect_eachlabs.errors import BadInput, Throttled, Unanswered
from prefect_eachlabs.ledger.rules import PurchaseOptions
from prefect_eachlabs.models import Destination, Item, UploadSlot, without_signature
from prefect_eachlabs.net.public_only import HostGuard
from prefect_eachlabs.reference_images import MAX_PICTURE_BYTES, Picture, Roots, content_type_of, opened, parse_s3_name
from prefect_eachlabs.settings import AccountSettings
from prefect_eachlabs.tasks import create_prediction, generate_and_store
from tests.api.reference_kit import Shop, buy, picture_bytes
from tests.flows.flow_fixtures import BUCKET, Studio
from tests.virtual_time import run

# ----------------------------------------------------------------------------------- what may be a picture


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_a_picture_is_known_by_its_first_bytes(format: str) -> None:
    assert content_type_of(picture_bytes(format=format)[:64]) == f"image/{format.lower()}"


@pytest.mark.parametrize("head", [b"", b"<html>", b"{}", b"%PDF-1.7", b"BMW is a car", b"PK\x03\x04", bytes(64)])
def test_other_bytes_are_no_picture(head: bytes) -> None:
    assert content_type_of(head) is None
    with pytest.raises(BadInput, match=r"image_url: the bytes: (empty|no picture)"):
        Picture.of_bytes(head)


def test_a_video_is_no_reference_picture() -> None:
    with pytest.raises(BadInput, match="no picture \\(video/mp4\\)"):
        Picture.of_bytes(b"\0\0\0\x18ftypisom" + bytes(40))


def test_a_picture_is_shown_without_its_bytes_and_named_by_its_content() -> None:
    data = picture_bytes()
    picture = Picture.of_bytes(data)
    assert "data" not in repr(picture)
    item = Item.wanted("a fox", image_url=data)
    assert item.input == {"prompt": "a fox", "image_url": picture.name}
    assert "sources" not in repr(item)
    assert "sources" not in item.model_dump()


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("s3://acme/a.png", ("acme", "a.png")),
        ("s3://acme/refs/ü b.png", ("acme", "refs/ü b.png")),
        ("s3://acme", None),
        ("s3://acme/", None),
        ("s3:///a.png", None),
        ("s3://acme/refs/../secret.png", None),
        ("s3://acme/./a.png", None),
        ("s3://acme/a\n.png", None),
        ("https://acme/a.png", None),
    ],
)
def test_an_object_is_named_by_bucket_and_key_and_no_key_leads_elsewhere(
    text: str, name: tuple[str, str] | None
) -> None:
    assert parse_s3_name(text) == name


# --------------------------------------------------------------------------------------------- fingerprints


def test_the_fingerprint_is_of_the_content_whatever_the_way_it_came(tmp_path: Path) -> None:
    data = picture_bytes(3)
    (tmp_path / "one.png").write_bytes(data)
    (tmp_path / "two.png").write_bytes(data)
    roots = Roots((tmp_path,))
    ways: list[object] = [data, bytearray(data), str(tmp_path / "one.png"), tmp_path / "two.png", "one.png"]
    assert len({Item.wanted("x", image_url=opened(way, roots)).fingerprint for way in ways}) == 1
    assert Item.wanted("x", image_url=picture_bytes(4)).fingerprint != Item.wanted("x", image_url=data).fingerprint


@pytest.mark.parametrize(
    ("first", "second", "kept"),
    [
        ("X-Amz-Date=1&X-Amz-Signature=a", "X-Amz-Signature=b&X-Amz-Date=2&X-Amz-Security-Token=t", ""),
        ("id=5&X-Goog-Signature=a&X-Goog-Expires=9", "id=5&X-Goog-Signature=b", "?id=5"),
        ("w=8&Expires=1&Signature=a&Key-Pair-Id=k", "w=8&Expires=2&Signature=b&Key-Pair-Id=k", "?w=8"),
        ("sv=2024&se=1&sp=r&sig=a", "sv=2024&se=2&sp=r&sig=b", ""),
    ],
)
def test_a_presigned_url_is_the_same_picture_whenever_it_was_signed(first: str, second: str, kept: str) -> None:
    base = "https://cdn.example.org/a.png"
    one, other = (Item.wanted("x", image_url=f"{base}?{query}") for query in (first, second))
    assert one.fingerprint == other.fingerprint
    assert one.input["image_url"] == f"{base}{kept}", "the signature is a secret: it does not stand in the record"
    assert one.sources == {f"{base}{kept}": f"{base}?{first}"}


@pytest.mark.parametrize("query", ["id=5", "expires=1&policy=2", "w=100&design=a", ""])
def test_a_plain_url_stays_as_it_is(query: str) -> None:
    url = f"https://cdn.example.org/a.png?{query}"
    assert without_signature(url) == url
    item = Item.wanted("x", image_url=url)
    assert item.request_body()["input"]["image_url"] == url
    assert not item.sources


def test_several_samples_of_one_input_are_several_items() -> None:
    plain, first, second, third = (Item.wanted("x", sample=sample) for sample in (None, 1, 2, 3))
    assert plain == first
    assert len({plain.item_id, second.item_id, third.item_id}) == 3
    assert plain.request_body() == third.request_body(), "the model is not told"
    for wrong in (0, -1, True, 1.5, 10_001, "2"):
        with pytest.raises(BadInput, match="sample: must be a number from 1 to 10,000"):
            Item.wanted("x", sample=wrong)  # type: ignore[arg-type]  # that is the point


# ------------------------------------------------------------------------------------------- whose disk


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A folder that is allowed, beside one that is not."""
    for folder in ("allowed/sub", "secret"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "allowed/fox.png").write_bytes(picture_bytes(1))
    (tmp_path / "allowed/sub/owl.jpg").write_bytes(picture_bytes(2, "JPEG"))
    (tmp_path / "secret/key.png").write_bytes(picture_bytes(9))
    (tmp_path / "allowed/link.png").symlink_to(tmp_path / "secret/key.png")
    (tmp_path / "allowed/inside.png").symlink_to(tmp_path / "allowed/sub/owl.jpg")
    (tmp_path / "allowed/ring.png").symlink_to(tmp_path / "allowed/ring.png")
    return tmp_path


@pytest.mark.parametrize("name", ["fox.png", "sub/owl.jpg", "{0}/allowed/fox.png", "sub/../fox.png", "inside.png"])
def test_a_file_in_an_allowed_folder_is_taken(disk: Path, name: str) -> None:
    picture = Roots.parse(f"{disk}/allowed").open(name.format(disk))
    assert len(picture.read()) == picture.size_bytes
    assert picture.data is None, "it is read again when it is needed"


@pytest.mark.parametrize(
    "name",
    [
        *("{0}/secret/key.png", "../secret/key.png", "sub/../../secret/key.png", "link.png", "ring.png"),
        *("missing.png", "/etc/passwd", "~/.aws/credentials", "a\0b.png"),
    ],
)
def test_no_other_file_is_taken_and_nobody_learns_whether_it_is_there(disk: Path, name: str) -> None:
    said = "is not an http\\(s\\) URL, an s3://bucket/key, or a file in a folder that EACHLABS_REFERENCE_ROOTS names"
    with pytest.raises(BadInput, match=said):
        Roots.parse(f"{disk}/allowed").open(name.format(disk))
    with pytest.raises(BadInput, match=said):
        opened(name.format(disk), Roots())


def test_at_the_command_line_every_readable_file_will_do(disk: Path) -> None:
    assert Roots(anywhere=True).open(disk / "allowed/link.png").size_bytes > 0
    with pytest.raises(BadInput, match="or a file that can be read"):
        Roots(anywhere=True).open(disk / "missing.png")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path.write_bytes(b""), "'x.png': empty"),
        (lambda path: path.write_text("hello"), "'x.png': no picture"),
        (lambda path: os.truncate(_png_at(path), MAX_PICTURE_BYTES + 1), "the API takes at most 100 MB"),
        (os.mkfifo, "is not an http"),
        (lambda path: path.mkdir(), "is not an http"),
    ],
    ids=["empty", "text", "too large", "pipe", "folder"],
)
def test_what_is_no_picture_of_at_most_100_mb_is_refused_unread(
    disk: Path, make: Callable[[Path], Any], said: str
) -> None:
    make(disk / "allowed/x.png")
    with pytest.raises(BadInput, match=said):
        Roots.parse(f"{disk}/allowed").open("x.png")


def _png_at(path: Path) -> Path:
    path.write_bytes(picture_bytes())
    return path


def test_100_mb_are_taken(disk: Path) -> None:
    os.truncate(_png_at(disk / "allowed/x.png"), MAX_PICTURE_BYTES)
    assert Roots.parse(f"{disk}/allowed").open("x.png").size_bytes == MAX_PICTURE_BYTES


def test_a_file_that_was_changed_meanwhile_is_not_sent_as_what_it_was(disk: Path) -> None:
    picture = Roots.parse(f"{disk}/allowed").open("fox.png")
    (disk / "allowed/fox.png").write_bytes(picture_bytes(5))
    with pytest.raises(BadInput, match="was changed while the run was going on: run again"):
        picture.read()
    (disk / "allowed/fox.png").unlink()
    with pytest.raises(BadInput, match="cannot be read any more"):
        picture.read()


@pytest.mark.parametrize(
    ("bucket", "key", "allowed"),
    [
        ("acme", "refs/a.png", True),
        ("acme", "refs2/a.png", False),
        ("acme", "refs", False),
        ("whole", "any/thing.png", True),
        ("whole2", "any/thing.png", False),
    ],
)
def test_a_bucket_is_allowed_by_its_name_and_a_prefix_by_its_folder(bucket: str, key: str, allowed: bool) -> None:
    roots = Roots.parse("/data/refs:s3://acme/refs/:s3://whole: ")
    assert roots.folders == (Path("/data/refs"),)
    assert roots.allow_object(bucket, key) is allowed
    assert not Roots().allow_object(bucket, key)


@pytest.mark.parametrize("text", ["refs", "s3://", "s3://a/b", "/data:relative/refs"])
def test_a_setting_that_names_no_folder_and_no_bucket_is_a_wrong_set_up(text: str) -> None:
    with pytest.raises(ValueError, match="must be"):
        Roots.parse(text)
    with pytest.raises(ValueError, match="must be"):
        AccountSettings(api_key="k", reference_roots=text)


# --------------------------------------------------------------------------------- looked at before it costs


class Host:
    """Answers from a script; remembers what it was asked."""

    def __init__(self, *answers: Callable[[httpx.Request], httpx.Response] | httpx.Response | Exception) -> None:
        self._answers = list(answers)
        self.asked: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request)
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer(request) if callable(answer) else answer

    @property
    def methods(self) -> str:
        return " ".join(request.method for request in self.asked)


def look(host: Host, url: str = "https://cdn.example.org/a.png?token=secret", **given: Any) -> Seen:
    async def story() -> Seen:
        prober = Prober(httpx.MockTransport(host), hosts=HostGuard(resolve=None))
        try:
            return await prober.check(url, **given)
        finally:
            await prober.aclose()

    return run(story())


def head(size: int | None = 1_000, content_type: str = "image/png", status: int = 200) -> httpx.Response:
    headers = {"Content-Type": content_type, **({} if size is None else {"Content-Length": str(size)})}
    return httpx.Response(status, headers=headers)


def part(body: bytes, total: int | str = 1_000, content_type: str = "image/png") -> httpx.Response:
    headers = {"Content-Type": content_type, "Content-Range": f"bytes 0-{len(body) - 1}/{total}"}
    return httpx.Response(206, headers=headers, content=body)


def test_a_picture_that_head_describes_costs_one_request() -> None:
    host = Host(head())
    assert look(host) == Seen("image/png", 1_000)
    assert host.methods == "HEAD"
    assert not {"x-api-key", "authorization", "cookie"} & set(host.asked[0].headers)


@pytest.mark.parametrize(
    "refused",
    [httpx.Response(405), httpx.Response(403), httpx.Response(501), httpx.Response(404), httpx.ReadError("cut")],
    ids=["405", "403", "501", "404", "cut"],
)
def test_a_head_that_is_refused_falls_back_to_a_ranged_get(refused: httpx.Response | Exception) -> None:
    host = Host(refused, part(picture_bytes()[:64]))
    assert look(host) == Seen("image/png", 1_000)
    assert host.methods == "HEAD GET"
    assert host.asked[1].headers["range"] == "bytes=0-63"


def test_a_host_that_ignores_the_range_is_not_read_to_its_end() -> None:
    came: list[int] = []

    async def endless() -> Any:
        while True:
            came.append(1)
            yield picture_bytes()[:64]

    host = Host(head(status=405), httpx.Response(200, headers={"Content-Length": "5000"}, content=endless()))
    assert look(host).size_bytes == 5_000
    assert len(came) < 5


def test_a_head_without_a_length_or_a_type_asks_for_the_first_bytes() -> None:
    for vague in (head(size=None), head(content_type="application/octet-stream")):
        host = Host(vague, part(picture_bytes(format="WEBP")[:64], 77))
        assert look(host) == Seen("image/webp", 77)


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ([httpx.Response(404)], "its host answers HTTP 404"),
        ([httpx.Response(403)], "its host answers HTTP 403"),
        ([head(size=MAX_PICTURE_BYTES + 1)], "100000001 bytes, and at most 100 MB are taken"),
        ([head(status=405), part(picture_bytes()[:64], MAX_PICTURE_BYTES + 1)], "at most 100 MB are taken"),
        (
            [head(content_type="text/html"), part(b"<!doctype html>", content_type="text/html")],
            "not a picture \\(text/html\\)",
        ),
        ([head(status=405), part(b"<html>sign in</html>")], "not a picture \\(text/html\\)"),
        ([head(status=405), part(b"\0\0\0\x18ftypisom" + bytes(40))], "not a picture \\(video/mp4\\)"),
        ([head(content_type="image/svg+xml"), part(b"<svg/>", content_type="image/svg+xml")], "not a picture"),
        ([httpx.Response(302, headers={"Location": "/a.png"})], "more than 5 redirects"),
        ([httpx.Response(302, headers={"Location": "ftp://x/a.png"})], "not http"),
        ([httpx.ConnectError("no route")], "could not be reached \\(ConnectError\\)"),
        ([httpx.ReadTimeout("slow")], "did not answer in time"),
        ([httpx.Response(503)], "its host answers HTTP 503"),
    ],
)
def test_what_the_vendor_could_not_fetch_is_refused_with_its_reason(
    answers: list[httpx.Response | Exception], said: str
) -> None:
    with pytest.raises(
        BadInput, match=f"image_url: https://cdn.example.org/a.png: .*{said}.*nothing was bought"
    ) as info:
        look(Host(*answers))
    assert "secret" not in str(info.value)


def test_a_hiccup_is_no_refusal() -> None:
    host = Host(httpx.Response(503), httpx.Response(503), httpx.Response(429), httpx.Response(429), head())
    assert look(host).size_bytes == 1_000


@pytest.mark.parametrize(
    "url",
    [
        *("http://127.0.0.1:8080/a.png", "http://localhost/a.png", "http://169.254.169.254/latest/meta-data"),
        *("http://10.0.0.7/a.png", "http://[::1]/a.png", "http://[fd00::1]/a.png", "https://wiki.internal/a.png"),
        "https://printer.local./a.png",
    ],
)
def test_a_host_of_this_network_alone_is_not_even_asked(url: str) -> None:
    host = Host(head())
    with pytest.raises(BadInput, match="the vendor could not fetch it"):
        look(host, url)
    with pytest.raises(BadInput, match="the vendor could not fetch it"):
        look(Host(httpx.Response(302, headers={"Location": url})))
    assert host.asked == []


async def test_a_name_that_leads_to_an_address_of_this_network_is_not_asked_either() -> None:
    async def rebound(host: str) -> list[str]:
        return ["93.184.215.14", "192.168.1.5"]

    host = Host(head())
    prober = Prober(httpx.MockTransport(host), hosts=HostGuard(resolve=rebound))
    with pytest.raises(BadInput, match="an address of this network alone"):
        await prober.check("https://evil.example.org/a.png")
    assert host.asked == []


# ------------------------------------------------------------------------------------- the whole, in memory


async def test_forty_items_with_one_picture_upload_it_once_and_send_its_public_url() -> None:
    shop, data = Shop(), picture_bytes(1, "JPEG")
    engine = shop.process()
    await asyncio.gather(*(buy(engine, f"fox {n}", data) for n in range(40)))
    assert (shop.uploads, shop.requests()["presign"]) == (1, 1)
    (url,) = {sent["image_url"] for sent in shop.sent()}
    assert shop.api.journal.violations == Counter(), "the key went along, or not the required headers"
    record = shop.store.json(shop.store.keys("p/records/")[0])
    assert record["input"]["image_url"] == Picture.of_bytes(data).name
    assert record["sent_input"]["image_url"] == url


async def test_another_destination_of_the_same_process_knows_the_upload() -> None:
    shop, data = Shop(), picture_bytes(1)
    engine = shop.process()
    await buy(engine, "one", data)
    other = Destination.parse("s3://bucket/other")
    await engine.generate_and_store(Item.wanted("two", image_url=data), other, options=PurchaseOptions())
    assert shop.uploads == 1


async def test_an_upload_whose_time_is_about_to_end_is_done_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    shop, data = Shop(), picture_bytes(1)
    engine = shop.process()
    monkeypatch.setattr(references, "KEPT_SECONDS", 3_000)
    await buy(engine, "one", data)
    monkeypatch.undo()
    await buy(engine, "two", data)
    await buy(engine, "three", data)
    assert shop.uploads == 2


@pytest.mark.parametrize(
    "fault", ["upload:error,next=2", "upload:lost_answer,next=1", "upload:cut,next=2", "presign:lost_answer,next=1"]
)
async def test_an_upload_that_stumbles_is_repeated(fault: str) -> None:
    shop, data = Shop(fault), picture_bytes(1)
    engine = shop.process()
    if fault.startswith("presign"):  # a question: whoever asked repeats it
        with pytest.raises(Unanswered):
            await buy(engine, "one", data)
    await buy(engine, "one", data)
    assert shop.requests()["create"] == 1


async def test_an_upload_that_fails_buys_nothing_and_the_next_run_uploads_it() -> None:
    shop, data = Shop("upload:error,status=500,next=3"), picture_bytes(1)
    with pytest.raises(Unanswered, match="could not be uploaded \\(HTTP 500 from the store\\): run again") as info:
        await buy(shop.process(), "one", data)
    assert (info.value.retryable, info.value.kind) == (True, "upload failed")
    assert info.value.item_id == Item.wanted("one", image_url=data).item_id
    assert (shop.requests()["create"], shop.store.keys("p/records/")) == (0, [])
    await buy(shop.process(), "one", data)


async def test_a_throttled_presign_is_an_error_that_may_be_repeated() -> None:
    shop = Shop("presign:throttled,next=1")
    with pytest.raises(Throttled):
        await buy(shop.process(), "one", picture_bytes())
    assert shop.requests()["create"] == 0


def test_what_the_presign_says_is_taken_with_care() -> None:
    good = {"presigned_url": "https://s/p", "public_url": "https://s/u", "required_headers": {"a": "b"}}
    slot = UploadSlot.parse({**good, "expires_at": "2026-12-08T18:15:00Z"}, may_be_http=False)
    assert slot is not None
    assert (slot.required_headers, slot.expires_at is not None) == ({"a": "b"}, True)
    assert "https://s/p" not in repr(slot), "whoever has it may write there"
    for change in ({"presigned_url": "http://s/p"}, {"public_url": None}, {"required_headers": "a: b"}):
        assert UploadSlot.parse({**good, **change}, may_be_http=False) is None
    assert UploadSlot.parse([], may_be_http=True) is None


async def test_an_object_is_taken_only_where_a_setting_or_the_person_allows_it() -> None:
    shop = Shop(reference_roots="")
    refused = "may not be taken: EACHLABS_REFERENCE_ROOTS does not name its place"
    with pytest.raises(BadInput, match=f"s3://bucket/p/a.png {refused}"):
        await buy(shop.process(), "one", "s3://bucket/p/a.png")
    with pytest.raises(BadInput, match=refused):
        await buy(shop.process(), "one", "s3://other/a.png")
    with pytest.raises(BadInput, match=refused):
        await buy(shop.process(reference_roots="s3://other/refs"), "one", "s3://other/a.png")
    with pytest.raises(BadInput, match=refused):
        await buy(shop.process(), "one", input={"images": ["s3://other/a.png"]})
    assert (shop.requests()["create"], shop.store.keys()) == (0, [])
    await buy(shop.process(reference_roots="s3://bucket/anything"), "two", "s3://bucket/anything/a.png")
    await buy(shop.process(reference_roots="s3://other"), "three", "s3://other/a.png")
    await buy(shop.process(), "four", "s3://other/a.png", any_reference=True)
    assert [sent["image_url"].partition("?")[0] for sent in shop.sent()] == [
        "https://bucket.memory.invalid/anything/a.png",
        "https://other.memory.invalid/a.png",
        "https://other.memory.invalid/a.png",
    ]


async def test_a_signature_is_sent_and_never_written_down() -> None:
    shop = Shop()
    await buy(shop.process(), "one", "s3://bucket/a.png")
    await buy(shop.process(), "two", "https://cdn.example.org/b.png?X-Amz-Signature=abc&v=1")
    assert ["ignature=" in sent["image_url"] for sent in shop.sent()] == [True, True]
    for key in shop.store.keys("p/"):
        assert b"ignature=" not in shop.store.objects[key].body, key
    records = [shop.store.json(key) for key in shop.store.keys("p/records/")]
    assert {(r["input"]["image_url"], r.get("sent_input", {}).get("image_url")) for r in records} == {
        ("s3://bucket/a.png", "https://bucket.memory.invalid/a.png"),
        ("https://cdn.example.org/b.png?v=1", None),
    }


@pytest.mark.parametrize(
    ("image_url", "model"),
    [
        (picture_bytes(1), "gemini"),
        ("s3://bucket/a.png", "gemini"),
        ("https://cdn.example.org/b.png?X-Amz-Signature=abc", "gemini"),
        (picture_bytes(1), "flux-kontext-pro"),
        ("s3://bucket/a.png", "nano-banana-pro-edit"),
    ],
    ids=["bytes", "object", "signed", "bytes, other field", "object, list"],
)
@pytest.mark.parametrize("by", ["the same run", "another run"])
async def test_an_order_whose_answer_was_lost_is_found_by_what_was_sent(image_url: object, model: str, by: str) -> None:
    """The API echoes URLs; the record has what they stand for."""

    shop = Shop("create:lost_answer,next=1")
    engine = shop.process()
    buying = asyncio.ensure_future(buy(engine, "one", image_url, model=model))
    if by == "another run":
        while not shop.api.ledger.billed:
            await asyncio.sleep(0.01)
        buying.cancel()
        await asyncio.gather(buying, return_exceptions=True)
        await asyncio.sleep(100)
        buying = asyncio.ensure_future(buy(shop.process(), "one", image_url, model=model))
    await buying
    assert shop.api.ledger.billed == 1


async def test_equal_prompts_with_different_pictures_are_not_mistaken_for_each_other() -> None:
    shop = Shop("create:lost_answer,at=1+2")
    engine = shop.process()
    await asyncio.gather(*(buy(engine, "one", picture_bytes(n)) for n in range(3)))
    assert shop.api.ledger.billed == 3
    for key in shop.store.keys("p/records/"):
        record = shop.store.json(key)
        job = shop.api.ledger.get(record["prediction_id"], asyncio.get_running_loop().time())
        assert job is not None
        assert job.input == record["sent_input"]


# ------------------------------------------------------------------------- the whole, over real connections


@pytest.fixture
def other_bucket(studio: Studio) -> str:
    """A bucket of another region, with a picture and something that is none."""
    with closing(boto3.client("s3")) as s3:
        with suppress(s3.exceptions.BucketAlreadyOwnedByYou):
            s3.create_bucket(Bucket="far-refs", CreateBucketConfiguration={"LocationConstraint": "eu-west-1"})
        s3.put_object(Bucket="far-refs", Key="refs/a fox.png", Body=picture_bytes(1))
        s3.put_object(Bucket="far-refs", Key="refs/page.png", Body=b"<html>")
    return "far-refs"


@pytest.mark.usefixtures("other_bucket")
def test_a_presigned_get_is_of_the_buckets_region_and_outlives_the_prediction(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EACHLABS_REFERENCE_ROOTS", "s3://far-refs/refs")
    monkeypatch.setenv("EACHLABS_DEADLINE_SECONDS", "7200")
    generate_and_store.fn("a fox", destination=studio.destination, image_url="s3://far-refs/refs/a fox.png")
    (sent,) = (prediction["input"]["image_url"] for prediction in studio.api.predictions())
    query = {name: values[0] for name, values in parse_qs(urlsplit(sent).query).items()}
    assert query["X-Amz-Algorithm"] == "AWS4-HMAC-SHA256"
    assert query["X-Amz-Credential"].split("/")[2:] == ["eu-west-1", "s3", "aws4_request"]
    assert int(query["X-Amz-Expires"]) == 2 * 7_200 + 600
    assert httpx.get(sent).content == picture_bytes(1)
    assert studio.api.tallies()["violations"] == {}


@pytest.mark.usefixtures("other_bucket")
@pytest.mark.parametrize(
    ("image_url", "said"),
    [
        ("s3://far-refs/refs/none.png", "there is no such object \\(HTTP 404\\)"),
        ("s3://far-refs/refs/page.png", "it is not a picture"),
        ("s3://no-such-bucket/refs/a.png", "there is no such object"),
        ("s3://far-refs/elsewhere/a.png", "may not be taken"),
    ],
)
def test_an_object_that_is_no_picture_for_us_costs_nothing(
    studio: Studio, monkeypatch: pytest.MonkeyPatch, image_url: str, said: str
) -> None:
    monkeypatch.setenv("EACHLABS_REFERENCE_ROOTS", "s3://far-refs/refs:s3://no-such-bucket")
    with pytest.raises(BadInput, match=f"image_url: s3://.*{said}.* [Nn]othing was bought"):
        generate_and_store.fn("a fox", destination=studio.destination, image_url=image_url)
    assert studio.api.tallies()["requests"] == 0
    assert studio.keys("records/") == []


def test_a_url_is_looked_at_once_a_run_and_not_at_all_where_that_is_turned_off(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = generate_and_store.fn("a fox", destination=studio.destination)
    key = first.uri.removeprefix(f"s3://{BUCKET}/")
    with closing(boto3.client("s3")) as s3:
        s3.put_object_acl(Bucket=BUCKET, Key=key, ACL="public-read")
    url = f"{studio.s3.url}/{BUCKET}/{key}"
    before = dict(studio.s3.counts())
    for number in range(2):
        generate_and_store.fn(f"variation {number}", destination=studio.destination, image_url=url)
    folder = f"{BUCKET}/{key.rpartition('/')[0]}"
    assert studio.s3.counts()[f"HEAD {folder}"] == before.get(f"HEAD {folder}", 0) + 1 + 2, "and each item's own place"
    with pytest.raises(BadInput, match="HTTP 404"):
        generate_and_store.fn("none", destination=studio.destination, image_url=f"{url}.none")
    monkeypatch.setenv("EACHLABS_CHECK_REFERENCES", "no")
    generate_and_store.fn("unseen", destination=studio.destination, image_url=f"{url}.none")


def test_a_task_takes_bytes_and_files_of_allowed_folders(
    studio: Studio, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = studio.destination
    with pytest.raises(BadInput, match="EACHLABS_REFERENCE_ROOTS"):
        generate_and_store.fn("a fox", destination=place, image_url=str(disk / "allowed/fox.png"))
    monkeypatch.setenv("EACHLABS_REFERENCE_ROOTS", f"{disk}/allowed")
    with pytest.raises(BadInput, match="EACHLABS_REFERENCE_ROOTS"):
        generate_and_store.fn("a fox", destination=place, image_url=disk / "allowed/../secret/key.png")
    by_file = generate_and_store.fn("a fox", destination=place, image_url="fox.png")
    by_bytes = generate_and_store.fn("a fox", destination=place, image_url=picture_bytes(1))
    assert (by_bytes.reused, by_bytes.uri) == (True, by_file.uri)
    create_prediction.fn("another", destination=place, image_url=picture_bytes(1))
    tallies = studio.api.tallies()
    assert (tallies["uploads"], tallies["billed"], tallies["violations"]) == (1, 2, {})
