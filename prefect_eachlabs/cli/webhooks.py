"""`prefect-eachlabs webhooks serve`: receives the vendor's calls and hands them on as events of the Prefect server."""

# ruff: noqa: PLC0415 - what is heavy is imported when the command runs, so that help and refusals answer at once

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
from typing import Annotated, Literal

from prefect_eachlabs.cli.account import account_for_the_server
from prefect_eachlabs.cli.options import Port, cannot_listen, flag
from prefect_eachlabs.errors import SetupError

HANDED_ON_WITHIN_SECONDS = 5.0


def webhooks(
    action: Annotated[Literal["serve"], flag("what to do")],
    /,
    *,
    host: Annotated[str, flag("where it listens (127.0.0.1; 0.0.0.0: everywhere)")] = "127.0.0.1",
    port: Annotated[Port, flag("0 takes a free one (8800)")] = 8800,
) -> int:
    """Receives the vendor's calls and hands them on as events of the Prefect server.

    Stands where the vendor reaches it, with https in front; workers listen to the
    server's events and need no open port. Knows neither the API's key nor S3's:
      EACHLABS_WEBHOOK_SECRET  the workers' own; calls without an order's secret that
                               is made of it are answered 401 and go no further
      PREFECT_API_URL          where the events go (and PREFECT_API_KEY or
                               PREFECT_API_AUTH_STRING)

    example:
      prefect-eachlabs webhooks serve --port 8800
    """
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")
    from prefect_eachlabs.settings import NEEDED_SECRET
    from prefect_eachlabs.webhooks.prefect_events import EventForwarder, has_server
    from prefect_eachlabs.webhooks.receiver import listening, server_of

    secret = account_for_the_server().webhook_secret
    if not secret:
        raise SetupError(f"Set {NEEDED_SECRET}. All workers have the same.")
    if not has_server():
        raise SetupError("No Prefect server is configured, to hand calls on to: set PREFECT_API_URL.")
    try:
        socket = listening(host, port)
    except OSError as error:
        raise cannot_listen(error, port, host) from None
    hand_on = EventForwarder(secret.get_secret_value())

    async def serve() -> None:
        server = server_of(hand_on.take)
        emitting = asyncio.ensure_future(hand_on.run())
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(NotImplementedError):  # Windows: Ctrl-C ends it all the same
                asyncio.get_running_loop().add_signal_handler(number, setattr, server, "should_exit", True)
        print(f"Receiving calls at http://{host}:{socket.getsockname()[1]}, for {hand_on.where}", flush=True)
        await server.serve(sockets=[socket])
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(hand_on.drained(), HANDED_ON_WITHIN_SECONDS)
        emitting.cancel()
        await asyncio.gather(emitting, return_exceptions=True)

    with contextlib.closing(socket), contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve())
    counts = sorted((verdict.value, count) for verdict, count in hand_on.counts.items())
    print(", ".join(f"{count} {what}" for what, count in counts) or "no calls", file=sys.stderr)
    return 0
