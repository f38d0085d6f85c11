"""Pictures of the emulator: drawn for any prompt, and spoilt in every way."""

from __future__ import annotations

import io
import zlib

import httpx
import pytest
from PIL import Image

from prefect_eachlabs.testing.emulator.pictures import CAPTION, bomb, draw, plain_png
from tests.testing.emulator_kit import Api

PNG = b"\x89PNG"


def downloaded(fault: str) -> tuple[httpx.Response, bytes]:
    """A spoilt download, and the picture as it is."""
    api = Api(faults=[f"picture:{fault},at=2"], service_seconds=0)
    url = f"/files/{api.buy()}.png"
    whole, spoilt = api.download(url), api.download(url)
    assert api.tallies()["faults"] == {f"picture:{fault.partition(',')[0]}": 1}
    return spoilt, whole.content


def test_a_refused_download_is_not_the_apis_429() -> None:
    api = Api(faults=["picture:throttled"], service_seconds=0)
    assert api.download(f"/files/{api.buy()}.png").status_code == 429
    assert api.tallies()["rejected_429"] == 0


def test_a_bomb_is_small_and_inflates_as_it_says() -> None:
    small = bomb(4, 4, 3)
    assert zlib.decompress(small[small.index(b"IDAT") + 4 : small.index(b"IEND") - 8]) == bytes(3 * 1024 * 1024)
    packed = bomb(512, 512, 1_024)
    assert len(packed) < 2 * 1024 * 1024
    assert downloaded("bomb")[0].content == packed


@pytest.mark.parametrize(
    "prompt",
    [
        "a red fox in the snow",
        " \n\t ",
        "漢字 and emoji 🦊👩‍👩‍👧 und “Füße” – العربية Привет e\u0301",
        "\ud800 half a character \x00\x1b[31m",
        "x" * 3_000,
        "word " * 2_000,
        "\u202eright to left\u2066",
    ],
    ids=lambda prompt: ascii(prompt[:20]),
)
def test_any_prompt_can_be_drawn(prompt: str) -> None:
    picture = Image.open(io.BytesIO(draw(prompt, size_px=64, seed="s")))
    picture.load()
    assert (picture.format, picture.size) == ("PNG", (64, 64))


def test_pictures_differ_by_prompt_and_seed_and_repeat_themselves() -> None:
    one = draw("a", size_px=64, seed="1")
    assert one == draw("a", size_px=64, seed="1")
    assert len({one, draw("b", size_px=64, seed="1"), draw("a", size_px=64, seed="2")}) == 3


def test_a_plain_picture_is_whole_says_who_made_it_and_can_be_asked_for() -> None:
    api = Api(pictures="plain", picture_query="?X-Amz-Signature=secret", service_seconds=0)
    bought = api.buy()
    url = api.get(bought)["output"]
    assert url.endswith(".png?X-Amz-Signature=secret")
    sold = api.download(url).content
    assert sold == plain_png(32, f"{bought}/1")
    picture = Image.open(io.BytesIO(sold))
    picture.load()
    assert picture.size == (32, 32)
    assert CAPTION in picture.info["Comment"]
