"""Workers that are given a small input of a stranger each, and tell how much it grew and how long its loop stood still.

    echo '["thumbnails", "a.png"]' | python -m tests.security.small_inputs

Each line is the work of a process of its own, forked once all is imported. Memory is that of the process and its child
together. The loop's stops are counted without what the kernel gave to others meanwhile, so that a busy machine does not
look like a hostile input.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import resource
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Awaitable, Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import httpx

from prefect_eachlabs.api.catalogue import Catalogue
from prefect_eachlabs.api.client import EachlabsClient
from prefect_eachlabs.artifacts import thumbnail_url
from prefect_eachlabs.batch.source import Defaults, open_source
from prefect_eachlabs.errors import EachlabsError
from prefect_eachlabs.images.download import Downloader
from prefect_eachlabs.images.thumbnails import NoThumbnail
from prefect_eachlabs.ledger.evidence import fit, is_near
from prefect_eachlabs.models import Item
from prefect_eachlabs.settings import AccountSettings

AT_ONCE = 3
"""One more than are decoded at a time."""
GIVEN_UP_AFTER_SECONDS = 600


async def thumbnails(data: bytes) -> None:
    async def one() -> None:
        with suppress(NoThumbnail):
            await asyncio.to_thread(thumbnail_url, data)

    await asyncio.gather(*(one() for _ in range(AT_ONCE)))


async def downloads(data: bytes) -> None:
    host = httpx.MockTransport(lambda _: httpx.Response(200, content=data))
    downloader = Downloader(host, total_seconds=600.0)
    formats = ("png", "jpeg", "webp", "gif")

    async def one(number: int) -> None:
        with suppress(EachlabsError):
            await downloader.fetch(f"https://p.invalid/{number}", formats=formats, prediction_id="p")

    await asyncio.gather(*(one(number) for number in range(AT_ONCE)))


async def table(data: bytes, kind: str) -> None:
    with tempfile.NamedTemporaryFile(suffix=f".{kind}") as file:
        file.write(data)
        file.flush()

        def read() -> None:
            with suppress(EachlabsError), closing(open_source(file.name, None, Defaults())) as source:
                for _ in source.rows():
                    pass

        await asyncio.to_thread(read)


class Librarian:
    """A catalogue that has one model, described as the file says."""

    def __init__(self, data: bytes) -> None:
        self._said = json.loads(data)

    async def model(self, slug: str) -> Any:
        return {"slug": slug, "request_schema": self._said["schema"]}

    async def models(self, name: str = "", *, limit: int = 100, offset: int = 0) -> list[Any]:
        return []


async def schema(data: bytes) -> None:
    catalogue = Catalogue(Librarian(data), None)
    item = Item.wanted(json.loads(data)["prompt"], model="m")

    async def one() -> None:
        with suppress(EachlabsError):
            await catalogue.checked(item)

    await asyncio.gather(one(), one())  # they are checked one after the other, each for its two seconds


async def answer(data: bytes, status_code: int = 200, **headers: str) -> None:
    def answered(_: httpx.Request) -> httpx.Response:
        return httpx.Response(status_code, stream=httpx.ByteStream(data), headers=headers)

    host = httpx.MockTransport(answered)
    client = EachlabsClient(AccountSettings(api_key="key-of-the-team", base_url="https://api.invalid"), transport=host)
    item = Item.wanted("a fox", input={"seed": 1})
    asks = (client.executions, lambda: client.model("m"), client.models, lambda: client.create(item))
    for ask in asks:
        try:
            await ask()
        except EachlabsError as error:
            logging.getLogger("prefect_eachlabs").warning("It failed: %s", error, exc_info=error)
    with suppress(EachlabsError):
        echo = (await client.get("p-1")).input or {}
        for _ in range(AT_ONCE):  # as for orders whose answers were lost
            await asyncio.sleep(0)
            assert fit(echo, item.input) is None
            is_near(echo, item.input)
    await client.aclose()


async def prompt(data: bytes) -> None:
    """What a form or a row may say, compared with its own echo."""
    with suppress(EachlabsError):
        item = Item.wanted(data.decode())
        await asyncio.sleep(0)
        assert fit(item.input, item.input) is not None
        await asyncio.sleep(0)
        is_near({"prompt": data.decode()}, item.input)


SCENARIOS: dict[str, Callable[[bytes], Awaitable[None]]] = {
    "thumbnails": thumbnails,
    "downloads": downloads,
    "parquet": lambda data: table(data, "parquet"),
    "csv": lambda data: table(data, "csv"),
    "jsonl": lambda data: table(data, "jsonl"),
    "xlsx": lambda data: table(data, "xlsx"),
    "schema": schema,
    "answer": answer,
    "prompt": prompt,
    "refusal": lambda data: answer(data, 422),
    "redirect": lambda data: answer(b"", 302, Location=data.decode("latin-1")),
    "gzipped answer": lambda data: answer(data, **{"Content-Encoding": "gzip"}),
}


async def measured(scenario: str, data: bytes) -> dict[str, float]:
    stopped_seconds = 0.0
    schedule = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat")

    def waited_seconds() -> float:
        return int(schedule.read_text().split()[1]) / 1e9

    async def beat() -> None:
        nonlocal stopped_seconds
        while True:
            began, waited_before = time.monotonic(), waited_seconds()
            await asyncio.sleep(0.002)
            waited = waited_seconds() - waited_before
            stopped_seconds = max(stopped_seconds, time.monotonic() - began - waited)

    await asyncio.to_thread(_count_memory_anew)  # in a thread, so that threads are there
    before_mb = _most_mb("self")
    beating = asyncio.ensure_future(beat())
    began = time.monotonic()
    await SCENARIOS[scenario](data)
    await asyncio.sleep(0.05)
    beating.cancel()
    children = [_most_mb(child) for child in _children()] + [
        resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    ]
    return {
        "grown_mb": _most_mb("self") - before_mb + max(children),
        "stopped_seconds": stopped_seconds,
        "took_seconds": time.monotonic() - began,
    }


def _count_memory_anew() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _children() -> list[str]:
    """Whichever thread has started them."""
    return [child for file in Path("/proc/self/task").glob("*/children") for child in file.read_text().split()]


def _most_mb(process: str) -> float:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def work(scenario: str, path: str) -> None:
    """In a process of its own, which says what it measured and ends."""
    signal.alarm(GIVEN_UP_AFTER_SECONDS)
    try:
        print(json.dumps(asyncio.run(measured(scenario, Path(path).read_bytes()))), flush=True)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    for line in sys.stdin:
        child = os.fork()
        if not child:
            work(*json.loads(line))
        _, status = os.waitpid(child, 0)
        if status:
            print(json.dumps({"failed": status}), flush=True)
