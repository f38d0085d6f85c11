"""A process that makes a batch of pictures, with this package's batches or by a bare script, and says what it took.

    python benchmarks/batcher.py ours SOURCE --url URL --to s3://BUCKET/PREFIX
    python benchmarks/batcher.py bare SOURCE --url URL --to s3://BUCKET/PREFIX
    python benchmarks/batcher.py copy URLS --url URL --to s3://BUCKET/PREFIX

Answers with one JSON object: seconds (imports not counted), pictures, peak memory, CPU seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import csv
import io
import itertools
import json
import logging
import os
import resource
import sys
import time
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import httpx
from botocore.config import Config

import prefect_eachlabs.batch.plan
import prefect_eachlabs.batch.sheet
import prefect_eachlabs.cli.batch
import prefect_eachlabs.engine.runtime  # noqa: F401 - what the command imports when it runs is not what is measured
from prefect_eachlabs.cli import main as cli
from prefect_eachlabs.models import Destination

KEY = "a-benchmark-key"
MODEL, VERSION = "gemini", "2.0-flash-exp-image-generation"
AT_A_TIME = 16
"""Of the bare script; with more, httpx spends more time on its pool of connections than it wins."""
THREADS = 16
POLL_SECONDS = 0.05


def ours(source: str, url: str, to: str) -> dict[str, Any]:
    """`prefect-eachlabs batch SOURCE --to s3://... --json`, without limits, in this process."""
    os.environ.update(
        EACHLABS_API_KEY=KEY,
        EACHLABS_BASE_URL=url,
        EACHLABS_REQUESTS_PER_MINUTE="none",
        EACHLABS_MAX_IN_FLIGHT="none",
    )
    printed = io.StringIO()
    began = time.monotonic()
    with contextlib.redirect_stdout(printed):
        status = cli.main(["batch", source, "--to", to, "--json"])
    seconds = time.monotonic() - began
    result = json.loads(printed.getvalue())
    if status != 0:
        sys.exit(f"the batch ended with status {status}: {result}")
    others = result["items"] - result["stored"] - result["reused"]
    return {"seconds": seconds, "pictures": result["stored"], "reused": result["reused"], "others": others}


class Bucket:
    """boto3's put in threads, and nothing else."""

    def __init__(self, to: str) -> None:
        destination = Destination.parse(to)
        self._bucket, self._destination = destination.bucket, destination
        self._client = boto3.client("s3", config=Config(max_pool_connections=THREADS))
        self._threads = ThreadPoolExecutor(THREADS)

    async def put(self, name: str, picture: bytes) -> None:
        def put() -> None:
            self._client.put_object(
                Bucket=self._bucket, Key=self._destination.key(name), Body=picture, ContentType="image/png"
            )

        await asyncio.get_running_loop().run_in_executor(self._threads, put)


async def several(works: Iterable[Awaitable[None]], at_a_time: int = AT_A_TIME) -> None:
    """Awaits all of them, so many at a time."""
    waiting = iter(works)

    async def one_after_the_other() -> None:
        for work in waiting:
            await work

    await asyncio.gather(*(one_after_the_other() for _ in range(at_a_time)))


def timed(bucket: Bucket, url: str, work: Callable[[httpx.AsyncClient, Bucket], Awaitable[int]]) -> dict[str, Any]:
    async def run() -> dict[str, Any]:
        limits = httpx.Limits(max_connections=AT_A_TIME)
        async with httpx.AsyncClient(base_url=url, timeout=30, limits=limits) as client:
            began = time.monotonic()
            pictures = await work(client, bucket)
            return {"seconds": time.monotonic() - began, "pictures": pictures}

    return asyncio.run(run())


def bare(source: str, url: str, to: str) -> dict[str, Any]:
    """The script: POST, ask until it is there, download, upload. Nothing is written down, checked or repeated."""
    headers = {"X-API-Key": KEY}
    urls: list[str] = []
    with Path(source).open(newline="", encoding="utf-8") as rows:
        prompts = [row["prompt"] for row in csv.DictReader(rows)]

    async def work(client: httpx.AsyncClient, bucket: Bucket) -> int:
        async def picture(prompt: str) -> None:
            order = {"model": MODEL, "version": VERSION, "input": {"prompt": prompt}}
            created = await client.post("/v1/prediction/", headers=headers, json=order)
            prediction_id = created.raise_for_status().json()["predictionID"]
            while True:
                await asyncio.sleep(POLL_SECONDS)
                said = (await client.get(f"/v1/prediction/{prediction_id}", headers=headers)).json()
                if said["status"] == "success":
                    break
            urls.append(said["output"])
            answer = (await client.get(said["output"])).raise_for_status()
            await bucket.put(f"images/{prediction_id}.png", answer.content)

        await several(picture(prompt) for prompt in prompts)
        return len(urls)

    return {**timed(Bucket(to), url, work), "urls": urls}


def copy(source: str, url: str, to: str) -> dict[str, Any]:
    """Less than the script: only downloads and uploads pictures that are there already."""
    urls = Path(source).read_text().split()

    async def work(client: httpx.AsyncClient, bucket: Bucket) -> int:
        async def picture(number: int, from_url: str) -> None:
            answer = (await client.get(from_url)).raise_for_status()
            await bucket.put(f"images/{number}.png", answer.content)

        await several(itertools.starmap(picture, enumerate(urls)))
        return len(urls)

    return timed(Bucket(to), url, work)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("way", choices=("ours", "bare", "copy"))
    parser.add_argument("source")
    parser.add_argument("--url", required=True)
    parser.add_argument("--to", required=True)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    began = resource.getrusage(resource.RUSAGE_SELF)
    answer = {"ours": ours, "bare": bare, "copy": copy}[arguments.way](arguments.source, arguments.url, arguments.to)
    ended = resource.getrusage(resource.RUSAGE_SELF)
    cpu_seconds = ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime
    print(json.dumps({**answer, "cpu_seconds": cpu_seconds, "peak_mb": ended.ru_maxrss / 1024}), flush=True)


if __name__ == "__main__":
    main()
