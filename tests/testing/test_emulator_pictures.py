"""Pictures of the emulator: drawn for any prompt, and spoilt in every way."""

from __future__ import annotations

import asyncio
import io
import zlib

import httpx
import pytest
from PIL import Image

from prefect_eachlabs.testing.emulator import EmulatorOptions, InProcessTransport
from prefect_eachlabs.testing.emulator.pictures import CAPTION, draw, plain_png
from prefect_eachlabs.testing.emulator.spoilt import bomb, zeros_deflated
from tests.testing.test_emulator import KEY, Api
from tests.virtual_time import run

# --------------------------------------------------------------------- pictures


def downloaded(fault: str) -> tuple[httpx.Response, bytes]:
    api = Api(faults=[f"picture:{fault},at=2"])
    bought = api.buy()
    api.clock.time += 5
    api.headers = {}
    whole, spoilt = (api.call("GET", f"/files/{bought}.png") for _ in range(2))
    assert api.tallies()["faults"] == {f"picture:{fault}": 1}
    return spoilt, whole.content


def test_a_picture_may_be_truncated_or_longer_than_it_is() -> None:
    spoilt, whole = downloaded("truncated")
    assert 0 < len(spoilt.content) < len(whole)
    assert whole.startswith(spoilt.content)
    spoilt, whole = downloaded("trailing")
    assert spoilt.content.startswith(whole)
    assert len(spoilt.content) > len(whole)
    assert downloaded("empty")[0].content == b""


def test_a_picture_may_have_a_wrong_bit() -> None:
    spoilt, whole = downloaded("bad_crc")
    assert len(spoilt.content) == len(whole)
    assert sum(one != other for one, other in zip(spoilt.content, whole, strict=True)) == 1
    at = whole.index(b"IDAT")
    length = int.from_bytes(whole[at - 4 : at], "big")
    crc = int.from_bytes(spoilt.content[at + 4 + length : at + 8 + length], "big")
    assert zlib.crc32(spoilt.content[at : at + 4 + length]) != crc


def test_a_picture_may_be_a_page_or_a_jpeg() -> None:
    page, _ = downloaded("html")
    assert (page.status_code, page.headers["content-type"].split(";")[0]) == (200, "text/html")
    jpeg, _ = downloaded("jpeg")
    assert (jpeg.content[:2], jpeg.headers["content-type"]) == (b"\xff\xd8", "image/png")


@pytest.mark.parametrize(("fault", "status"), [("not_found", 404), ("error", 503), ("throttled", 429)])
def test_a_download_may_be_refused(fault: str, status: int) -> None:
    assert downloaded(fault)[0].status_code == status


def test_what_a_picture_refuses_is_no_429_of_the_api() -> None:
    api = Api(faults=["picture:throttled"])
    bought = api.buy()
    api.clock.time += 5
    assert api.call("GET", f"/files/{bought}.png", headers={"X-API-Key": ""}).status_code == 429
    assert api.tallies()["rejected_429"] == 0


def test_a_redirect_ends_at_the_picture_and_a_loop_nowhere() -> None:
    api = Api(faults=["picture:redirect,at=1", "picture:redirect_loop,at=2"])
    bought = api.buy()
    api.clock.time += 5
    api.headers = {}
    followed = api.call("GET", f"/files/{bought}.png", follow_redirects=True)
    assert followed.content.startswith(b"\x89PNG")
    with pytest.raises(httpx.TooManyRedirects):
        api.call("GET", f"/files/{bought}.png", follow_redirects=True)


def test_a_slow_picture_drips() -> None:
    transport = InProcessTransport(
        EmulatorOptions(service_seconds=0, image_size_px=32, faults=["picture:slow,seconds=40"])
    )

    async def story() -> tuple[bytes, float]:
        async with httpx.AsyncClient(transport=transport, base_url="http://e", timeout=None) as http:
            order = {"model": "gemini", "input": {"prompt": "a"}}
            bought = (await http.post("/v1/prediction", json=order, headers={"X-API-Key": KEY})).json()["predictionID"]
            picture = await http.get(f"/files/{bought}.png")
            return picture.content[:4], asyncio.get_running_loop().time()

    assert run(story()) == (b"\x89PNG", pytest.approx(40))


def test_a_bomb_is_small_and_inflates_as_it_says() -> None:
    assert zlib.decompress(zeros_deflated(3)) == bytes(3 * 1024 * 1024)
    packed = bomb(512, 512, 1_024)
    assert len(packed) < 2 * 1024 * 1024
    inflate = zlib.decompressobj()
    data = packed[packed.index(b"IDAT") + 4 :]
    inflated = 0
    while inflated < 2 * 1024 * 1024 and data:
        inflated += len(inflate.decompress(data, 1024 * 1024))
        data = inflate.unconsumed_tail
    assert inflated > 512 * 512 * 3
    assert downloaded("bomb")[0].content == packed


# ---------------------------------------------------------------------- drawing


@pytest.mark.parametrize(
    "prompt",
    [
        "a red fox in the snow",
        "",
        " \n\t ",
        "漢字 and emoji 🦊👩‍👩‍👧 und “Füße” – العربية Привет e\u0301",
        "\ud800 half a character \x00\x1b[31m",
        "x" * 3_000,
        "word " * 2_000,
        "\u202eright to left\u2066",
    ],
    ids=ascii,
)
@pytest.mark.parametrize("size_px", [16, 128])
def test_any_prompt_can_be_drawn(prompt: str, size_px: int) -> None:
    picture = Image.open(io.BytesIO(draw(prompt, size_px=size_px, seed="s")))
    picture.load()
    assert (picture.format, picture.size) == ("PNG", (size_px, size_px))


def test_pictures_differ_by_prompt_and_seed_and_repeat_themselves() -> None:
    one = draw("a", size_px=64, seed="1")
    assert one == draw("a", size_px=64, seed="1")
    assert len({one, draw("b", size_px=64, seed="1"), draw("a", size_px=64, seed="2")}) == 3


def test_a_plain_picture_is_whole_and_says_who_made_it() -> None:
    picture = Image.open(io.BytesIO(plain_png(64, "seed")))
    picture.load()
    assert picture.size == (64, 64)
    assert CAPTION in picture.info["Comment"]


def test_plain_pictures_can_be_asked_for() -> None:
    api = Api(pictures="plain", picture_query="?X-Amz-Signature=secret")
    bought = api.buy()
    api.clock.time += 5
    url = api.get(bought)["output"]
    assert url.endswith(".png?X-Amz-Signature=secret")
    assert api.call("GET", url).content == plain_png(32, f"{bought}/1")
