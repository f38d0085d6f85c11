"""A process that buys pictures one after the other, in one of three ways, and says when it knew of each end.

    python benchmarks/buyer.py WAY --url URL --requests-per-minute 60 --in-flight 10

What EACHLABS_WEBHOOK_... says is heeded.

Says `ready`, begins at the word `go SECONDS`, and answers with one JSON object: prediction id -> the moment
(`time.monotonic`, which all processes of a machine share) at which its end was known.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import logging
import os
import resource
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import httpx
from pydantic import SecretStr

from prefect_eachlabs.engine.runtime import Gateway, LoopThread, MakeLimiter
from prefect_eachlabs.errors import EachlabsError
from prefect_eachlabs.ledger.rules import PurchaseOptions
from prefect_eachlabs.limits.file_leases import machine_limiter
from prefect_eachlabs.models import Destination, Item, Prediction
from prefect_eachlabs.settings import AccountSettings

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.memory_store import MemoryStore

KEY = "a-benchmark-key"
TO = Destination.parse("s3://benchmark")
MODEL, VERSION = "gemini", "2.0-flash-exp-image-generation"
LAST_ENDS_SECONDS = 12.0
"""What was bought within the time may end so much later."""
BEYOND_THE_LIMIT = 30
"""So many more items than may be in flight are wanted at a time, as in a batch."""

Known = dict[str, float]


def body(number: int) -> dict[str, object]:
    return {"model": MODEL, "version": VERSION, "input": {"prompt": f"picture {os.getpid()}/{number}"}}


def vendors_loop(url: str, in_flight: int, seconds: float) -> Known:
    """As the vendor's sample does it: create, then ask once a second until it is there; in so many threads."""
    known: Known = {}
    numbers, until = itertools.count(), time.monotonic() + seconds
    client = httpx.Client(
        base_url=url, headers={"X-API-Key": KEY}, timeout=30, limits=httpx.Limits(max_connections=None)
    )

    def create() -> str | None:
        answer = client.post("/v1/prediction/", json=body(next(numbers)))
        return str(answer.json()["predictionID"]) if answer.status_code == 200 else None

    def is_there(prediction_id: str) -> bool:
        answer = client.get(f"/v1/prediction/{prediction_id}")
        return answer.status_code == 200 and answer.json()["status"] in ("success", "failed")

    def thread() -> None:
        while time.monotonic() < until:
            prediction_id = create()
            while prediction_id is not None and time.monotonic() < until + LAST_ENDS_SECONDS:
                if is_there(prediction_id):
                    known[prediction_id] = time.monotonic()
                    break
                time.sleep(1)
            if prediction_id is None:  # throttled
                time.sleep(1)

    threads = [threading.Thread(target=thread) for _ in range(in_flight)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    client.close()
    return known


async def plain_asyncio(url: str, in_flight: int, seconds: float) -> Known:
    """What is written in an hour: a semaphore around create, and a poll every 2 s."""
    known: Known = {}
    semaphore, until = asyncio.Semaphore(in_flight), time.monotonic() + seconds
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, headers={"X-API-Key": KEY}, timeout=30, limits=limits) as client:

        async def picture(number: int) -> None:
            async with semaphore:
                if time.monotonic() > until:
                    return
                while (answer := await client.post("/v1/prediction/", json=body(number))).status_code == 429:
                    await asyncio.sleep(2)
                    if time.monotonic() > until:
                        return
                prediction_id = answer.json()["predictionID"]
                while time.monotonic() < until + LAST_ENDS_SECONDS:
                    await asyncio.sleep(2)
                    answer = await client.get(f"/v1/prediction/{prediction_id}")
                    if answer.status_code == 200 and answer.json()["status"] in ("success", "failed"):
                        known[prediction_id] = time.monotonic()
                        return

        tasks = [asyncio.ensure_future(picture(number)) for number in range(int(seconds * (in_flight + 1)))]
        await asyncio.gather(*tasks)
    return known


def prepare_ours(
    settings: AccountSettings, wanted_at_a_time: int
) -> tuple[Callable[[float], Known], Callable[[], None]]:
    """This package: `engine.create`, then `engine.wait`, on the gateway's loop; nothing is downloaded.

    The records' bucket is in memory: what is measured is how the account's requests are spent.
    """
    make_limiter: MakeLimiter = machine_limiter
    if os.environ.get("PREFECT_API_URL"):
        from prefect_eachlabs.limits.prefect_leases import limiter_for  # noqa: PLC0415 - it imports Prefect

        make_limiter = limiter_for
    store = MemoryStore()
    gateway = Gateway(settings, LoopThread(), make_limiter=make_limiter, store_for=lambda _, __: store)
    engine = gateway.engine
    known: Known = {}
    numbers = itertools.count()
    waiting: set[asyncio.Task[None]] = set()

    async def until_it_ends(prediction: Prediction) -> None:
        await engine.wait(prediction)
        known[prediction.id] = time.monotonic()

    async def buy(until: float) -> None:
        while time.monotonic() < until:
            item = Item.wanted(f"picture {os.getpid()}/{next(numbers)}")
            try:
                prediction = await engine.create(item, TO, options=PurchaseOptions())
                task = asyncio.ensure_future(until_it_ends(prediction))
                waiting.add(task)
                await asyncio.shield(task)
            except EachlabsError as error:
                logging.warning("%s", error)
                await asyncio.sleep(1)

    async def all_of_it(seconds: float) -> Known:
        until = time.monotonic() + seconds
        buyers = [asyncio.ensure_future(buy(until)) for _ in range(wanted_at_a_time)]
        await asyncio.sleep(seconds)
        for buyer in buyers:  # those that wait for a place
            buyer.cancel()
        await asyncio.wait(waiting, timeout=LAST_ENDS_SECONDS)
        return known

    return lambda seconds: gateway.call(all_of_it(seconds)), gateway.close


def settings_of(arguments: argparse.Namespace) -> AccountSettings:
    return AccountSettings(
        api_key=SecretStr(KEY),
        base_url=arguments.url,
        requests_per_minute=arguments.requests_per_minute or None,
        max_in_flight=arguments.in_flight,
        account=arguments.account,
        webhook_url=os.environ.get("EACHLABS_WEBHOOK_URL", ""),
        webhook_secret=SecretStr(os.environ.get("EACHLABS_WEBHOOK_SECRET", "")),
        webhook_listen=os.environ.get("EACHLABS_WEBHOOK_LISTEN", ""),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("way", choices=("vendor", "plain", "ours"))
    parser.add_argument("--url", required=True)
    parser.add_argument("--requests-per-minute", type=int, default=60, help="0: no limit")
    parser.add_argument("--in-flight", type=int, default=10)
    parser.add_argument("--account", default="default")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    ways: dict[str, Callable[[float], Known]] = {
        "vendor": lambda seconds: vendors_loop(arguments.url, arguments.in_flight, seconds),
        "plain": lambda seconds: asyncio.run(plain_asyncio(arguments.url, arguments.in_flight, seconds)),
    }
    close: Callable[[], None] | None = None
    if arguments.way == "ours":
        buy, close = prepare_ours(settings_of(arguments), arguments.in_flight + BEYOND_THE_LIMIT)
    else:
        buy = ways[arguments.way]
    print("ready", flush=True)
    seconds = float(sys.stdin.readline().split()[1])
    known = buy(seconds)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps({"known": known, "cpu_seconds": usage.ru_utime + usage.ru_stime}), flush=True)
    with suppress(Exception):
        if close is not None:
            close()


if __name__ == "__main__":
    main()
