"""The local S3 server as a process of its own, of whose requests some go wrong: each kind at a rate, seeded, counted.

    python benchmarks/soak_s3.py --bucket soak --seed 0

The first line on stdout is its URL. `POST /_soak {"on": true}` switches the faults, `GET /_soak` says how many there
were.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import threading
import time
from collections import Counter
from typing import Any, NamedTuple

from prefect_eachlabs.testing.s3 import LocalS3, _Answer, _error


class Rate(NamedTuple):
    """How often something goes wrong with requests of some methods."""

    kind: str
    methods: tuple[str, ...]
    rate: float


ALL = ("PUT", "GET", "HEAD", "LIST")
RATES = (
    Rate("slow down", ALL, 0.02),
    Rate("internal error", ALL, 0.01),
    Rate("cut before", ALL, 0.01),
    Rate("answer lost", ("PUT",), 0.03),
    Rate("answer cut", ("GET", "LIST"), 0.02),
    Rate("slow", ALL, 0.01),
)
KINDS = {
    "slow down": "503 SlowDown, nothing done",
    "internal error": "500 InternalError, nothing done",
    "cut before": "connection cut, nothing done",
    "answer lost": "the put is done, its answer lost",
    "answer cut": "half of the answer comes",
    "slow": "done 1 to 3 s later",
}
SLOW_SECONDS = (1.0, 3.0)


class FaultyS3(LocalS3):
    """The local S3 server with faults at rates, which are off at first."""

    def __init__(self, *, seed: int, **given: Any) -> None:
        super().__init__(**given)
        self._random = random.Random(f"s3/{seed}")
        self._drawing = threading.Lock()
        self._on = False
        self._injected: Counter[str] = Counter()

    def answer(self, environ: dict[str, Any], body: bytes) -> _Answer:
        if environ["PATH_INFO"] == "/_soak":
            return self._switched(environ["REQUEST_METHOD"], body)
        method = "LIST" if "list-type" in environ["QUERY_STRING"] else environ["REQUEST_METHOD"]
        kind, seconds = self._draw(method)
        if kind == "slow":
            time.sleep(seconds)
        elif kind == "slow down":
            return _error(503, "SlowDown", "Please reduce your request rate.")
        elif kind == "internal error":
            return _error(500, "InternalError", "We encountered an internal error. Please try again.")
        elif kind == "cut before":
            return _Answer(500, [], b"", sent_bytes=0)
        answer = super().answer(environ, body)
        if kind == "answer lost":
            return answer._replace(sent_bytes=0)
        return answer._replace(sent_bytes=len(answer.body) // 2) if kind == "answer cut" else answer

    def _draw(self, method: str) -> tuple[str | None, float]:
        with self._drawing:
            drawn, seconds = self._random.random(), self._random.uniform(*SLOW_SECONDS)
            for one in RATES if self._on else ():
                if method in one.methods:
                    if drawn < one.rate:
                        self._injected[one.kind] += 1
                        return one.kind, seconds
                    drawn -= one.rate
        return None, 0.0

    def _switched(self, method: str, body: bytes) -> _Answer:
        with self._drawing:
            if method == "POST":
                self._on = bool(json.loads(body)["on"])
            return _Answer(200, [("Content-Type", "application/json")], json.dumps(self._injected).encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--bucket", required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    with FaultyS3(seed=arguments.seed, buckets=[arguments.bucket]) as server:
        print(server.url, flush=True)
        ended.wait()


if __name__ == "__main__":
    main()
