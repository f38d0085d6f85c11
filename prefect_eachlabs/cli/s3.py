"""`prefect-eachlabs s3`: the local S3 of demos and tests, in the foreground until Ctrl-C."""

# ruff: noqa: PLC0415 - what is heavy is imported when the command runs, so that help answers at once

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from prefect_eachlabs.cli.options import Verbose, flag, log_requests
from prefect_eachlabs.errors import SetupError


def s3(
    *,
    port: Annotated[int, flag("0 takes a free one (9000)")] = 9000,
    folder: Annotated[Path | None, flag("keeps the objects, as BUCKET/KEY (they end with this command)")] = None,
    bucket: Annotated[Sequence[str], flag("made at the start; repeatable (pictures)")] = ("pictures",),
    verbose: Verbose = False,
) -> int:
    """A local S3 for demos and tests, on this machine alone.

    Point a program at it:
      export AWS_ENDPOINT_URL_S3=http://127.0.0.1:9000 AWS_DEFAULT_REGION=us-east-1
      export AWS_ACCESS_KEY_ID=local AWS_SECRET_ACCESS_KEY=local

    Credentials are not checked, and everything is held in memory: it is for
    thousands of pictures, not for production. With --folder, the objects are
    there again at the next start; files that you put there are objects, too.
    """
    from prefect_eachlabs.testing.s3 import LocalS3

    if verbose:
        log_requests("prefect_eachlabs.testing.s3")
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    try:
        server = LocalS3(port=port, buckets=bucket, folder=folder)
        server.start()
    except (OSError, OverflowError) as error:
        in_it = "" if folder is None else f", with {folder},"
        raise SetupError(
            f"The local S3 cannot listen on 127.0.0.1:{port}{in_it} ({error}): choose another --port"
            f"{'' if folder is None else ' or --folder'}."
        ) from None
    print(f"Local S3 ready at {server.url}", flush=True)
    where = "in memory: they end with it" if folder is None else f"in {folder}"
    print(f"Ctrl-C ends it. Buckets: {', '.join(bucket)}; objects are kept {where}.", file=sys.stderr)
    ended.wait()
    server.stop()
    return 0
