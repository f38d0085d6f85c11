"""`prefect-eachlabs s3`: the local S3 of demos and tests, in the foreground until Ctrl-C."""

# ruff: noqa: PLC0415 - what is heavy is imported when the command runs, so that help answers at once

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from prefect_eachlabs.cli.options import Port, Verbose, cannot_listen, flag, log_requests
from prefect_eachlabs.errors import SetupError

READY = """\
In another terminal:
  export AWS_ENDPOINT_URL_S3={url} AWS_DEFAULT_REGION=us-east-1
  export AWS_ACCESS_KEY_ID=local AWS_SECRET_ACCESS_KEY=local
Buckets: {buckets}; objects are kept {where}. Ctrl-C ends it."""


def s3(
    *,
    port: Annotated[Port, flag("0 takes a free one (9000)")] = 9000,
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
    try:
        server = LocalS3(port=port, buckets=bucket, folder=folder)
        server.start()
    except OSError as error:
        if error.filename is not None:
            raise SetupError(f"--folder {error.filename}: {error.strerror}. Choose another.") from None
        raise cannot_listen(error, port) from None
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    print(f"Local S3 ready at {server.url}", flush=True)
    where = "in memory: they end with it" if folder is None else f"in {folder}"
    buckets = ", ".join(f"s3://{name}" for name in bucket)
    print(READY.format(url=server.url, buckets=buckets, where=where), file=sys.stderr)
    ended.wait()
    server.stop()
    return 0
