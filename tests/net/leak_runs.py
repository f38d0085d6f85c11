"""Runs of which no output may hold a secret, each by itself: `python -m tests.net.leak_runs KIND FOLDER FACTS`.

Everything is logged at DEBUG, to stderr and to FOLDER/debug.log, tracebacks too. The signatures that botocore makes
are kept in the file that LEAK_SIGNATURES names, so that they can be searched for.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

LOGGERS = ("httpx", "httpcore", "botocore", "boto3", "urllib3", "prefect_eachlabs")
OF_PREFECT_TOO = LOGGERS[:2]
"""Prefect sends its own requests with these. Named in PREFECT_LOGGING_EXTRA_LOGGERS they make Prefect 3.8.8 wait for
itself for ever: its log handler wants a lock that its events' worker holds while it sends, and logs."""

logger = logging.getLogger("prefect_eachlabs.of_a_user")


def keep_signatures() -> None:
    from botocore.auth import SigV4Auth

    sign = SigV4Auth.signature

    def signature(self: Any, string_to_sign: str, request: Any) -> str:
        made: str = sign(self, string_to_sign, request)
        with Path(os.environ["LEAK_SIGNATURES"]).open("a") as file:
            file.write(f"{made}\n")
        return made

    SigV4Auth.signature = signature  # type: ignore[method-assign,assignment]


def log_everything(folder: Path) -> None:
    root = logging.getLogger()
    for handler in (logging.StreamHandler(sys.stderr), logging.FileHandler(folder / "debug.log")):
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
        root.addHandler(handler)
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.DEBUG)


def send_to_prefect() -> None:
    """What this package's requests log goes to the Prefect server, as with PREFECT_LOGGING_EXTRA_LOGGERS."""
    from prefect.logging.handlers import APILogHandler

    handler = APILogHandler()
    handler.addFilter(lambda record: record.threadName == "eachlabs-gateway")
    for name in OF_PREFECT_TOO:
        logging.getLogger(name).addHandler(handler)


def attempt(work: Callable[[], object]) -> object:
    """What fails is logged as users do it."""
    try:
        return work()
    except Exception as error:
        logger.exception("It failed: %s (%r)", error, error)
        return None


def commands(folder: Path, facts: dict[str, Any]) -> int:
    """Commands of the command line, whose exit statuses are printed; `NAME=VALUE` before one is for the later, too."""
    from prefect_eachlabs.cli import main as cli

    log_everything(folder)

    def typed(words: list[str]) -> int:
        while "=" in words[0]:
            name, _, value = words.pop(0).partition("=")
            os.environ[name] = value
        return cli.main(words)

    print(json.dumps({"statuses": [typed(words) for words in facts["commands"]]}))
    return 0


def flows(folder: Path, facts: dict[str, Any]) -> int:
    """Flow runs, with blocks; results are kept on disk."""
    import boto3
    from prefect import flow
    from prefect.logging import get_run_logger

    from prefect_eachlabs import (
        EachlabsCredentials,
        S3Destination,
        await_result,
        create_prediction,
        generate_and_store,
        store_image,
    )
    from prefect_eachlabs.flows.batch import generate_batch

    log_everything(folder)
    send_to_prefect()
    to, signed = facts["destination"], facts["signed"]
    bucket, _, prefix = to.removeprefix("s3://").partition("/")

    @flow(persist_result=True)
    def well() -> list[str]:
        finished = await_result(create_prediction("a fox", image_url=signed, destination=to))
        one = store_image(finished, to)
        two = generate_and_store("an owl", destination=to, image_url=facts["object"])
        other = await_result(create_prediction("by its id", image_url=signed, destination=to).id)
        store_image.with_options(retries=0)(other, f"{to}/other")
        with closing(boto3.client("s3")) as s3:
            theirs = s3.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": "x"})
            s3.list_buckets()
        logger.debug("%s leads to nothing", theirs)
        get_run_logger().debug("signed for %s and %s", signed, os.environ["EACHLABS_API_KEY"])
        return [one.uri, two.uri]

    @flow(persist_result=True)
    def by_blocks() -> str:
        EachlabsCredentials(api_key=facts["block_key"]).save("leaks", overwrite=True)
        S3Destination(
            bucket=bucket,
            prefix=f"{prefix}/blocks",
            access_key_id="AKIABLOCK",
            secret_access_key=facts["block_secret"],
            session_token=facts["block_token"],
        ).save("leaks", overwrite=True)
        credentials, destination = EachlabsCredentials.load("leaks"), S3Destination.load("leaks")
        logger.debug("with %r and %r, to %r", credentials, destination, destination.access())
        image = generate_and_store("a block", destination=destination, credentials=credentials, image_url=signed)
        return str(image.uri)

    @flow
    def ill(prompt: str) -> str:
        once = generate_and_store.with_options(retries=0)
        return str(once(prompt, destination=to, item_id=prompt.replace(" ", "-"), image_url=signed).uri)

    @flow
    def wrong_key() -> None:
        credentials = EachlabsCredentials(api_key=facts["wrong_key"])
        generate_and_store("a wrong key", destination=to, credentials=credentials, image_url=signed)

    said: dict[str, object] = {"well": attempt(well), "by_blocks": attempt(by_blocks)}
    for prompt in ("refused by moderation", "refused by s3", "gone from its host", "spoilt on its way"):
        said[prompt] = attempt(lambda prompt=prompt: ill(prompt))  # type: ignore[misc]
    said["wrong key"] = attempt(wrong_key)
    said["batch"] = attempt(lambda: str(generate_batch(facts["table"], to, return_state=True)))
    print(json.dumps(said))
    return 0


QUOTING = ("refused", "plain", "lost", "error", "logs", "output", "url", "word")
"""How an answer may quote the key: at the POST, or as the end of the prediction."""


def quoted(folder: Path, facts: dict[str, Any]) -> int:
    """A command, flow runs and batches, all of whose answers quote the key."""
    from prefect import flow

    from prefect_eachlabs import await_result, create_prediction, generate_and_store
    from prefect_eachlabs.cli import main as cli
    from prefect_eachlabs.flows.batch import generate_batch

    log_everything(folder)
    to = facts["destination"]

    @flow(persist_result=True)
    def one(prompt: str) -> str:
        once = generate_and_store.with_options(retries=0)
        return str(once(prompt, destination=to, item_id=f"flow-{prompt}", on_ambiguous="fail").uri)

    @flow
    def steps(prompt: str) -> None:
        await_result.with_options(retries=0)(create_prediction(prompt, destination=to, item_id=f"steps-{prompt}"))

    for how in facts["quoting"]:
        attempt(lambda how=how: one(how))  # type: ignore[misc]
    attempt(lambda: steps("error"))
    attempt(lambda: generate_batch(facts["table"], f"{to}-flow", on_ambiguous="fail", return_state=True))
    for how in ("error", "refused"):
        cli.main(["generate", how, "--to", f"{to}-cli", "--json"])
    cli.main(["batch", facts["table"], "--to", f"{to}-cli", "--on-ambiguous", "fail"])
    return 0


def without_the_filter() -> None:
    """The control: what the search would find if nothing were taken out."""
    from prefect_eachlabs.net import redaction

    redaction._Secrets.are_in = lambda self, text: False  # type: ignore[method-assign]
    redaction._Secrets.hidden_in = lambda self, text: text  # type: ignore[method-assign]


def hurry() -> None:
    """A picture that is not there is looked for in a second, not in half a minute, each time."""
    from prefect_eachlabs.images import store

    store.LOOKED_FOR_SECONDS = 1.0


if __name__ == "__main__":
    keep_signatures()
    hurry()
    if os.environ.get("LEAK_CONTROL"):
        without_the_filter()
    with suppress(KeyboardInterrupt):
        run = {"commands": commands, "flows": flows, "quoted": quoted}[sys.argv[1]]
        sys.exit(run(Path(sys.argv[2]), json.loads(sys.argv[3])))
