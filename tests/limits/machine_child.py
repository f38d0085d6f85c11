"""A process that buys as fast as its account's limits on this machine allow, until a signal ends it.

`python -m tests.limits.machine_child URL CALLERS`. Each caller creates one prediction after the other and waits for its
end. SIGINT ends it in order: what waits is cancelled, what is in flight goes on at the API.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys

from prefect_eachlabs.api.client import EachlabsClient
from prefect_eachlabs.limits.file_leases import machine_limiter
from prefect_eachlabs.models import Item
from prefect_eachlabs.polling.poller import Poller
from prefect_eachlabs.settings import AccountSettings


async def buy(url: str, callers: int) -> None:
    settings = AccountSettings(api_key="a-key", base_url=url)
    limiter = machine_limiter(settings)
    client = EachlabsClient(settings)
    poller = Poller(client, limiter)

    async def caller() -> None:
        while True:
            slot = await limiter.take_in_flight()
            request = await limiter.take_request()
            try:
                prediction = await client.create(Item.wanted("a lighthouse"))
            finally:
                request.done()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.shield(poller.watch(prediction, slot=slot))

    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, ended.set)
    tasks = [asyncio.ensure_future(caller()) for _ in range(callers)]
    print("buying", flush=True)
    await ended.wait()
    for task in tasks:
        task.cancel()
    await poller.close()
    await client.aclose()
    await limiter.close()


if __name__ == "__main__":
    asyncio.run(buy(sys.argv[1], int(sys.argv[2])))
