"""The same with real processes, real buckets over HTTP and real signals: SIGKILL and SIGSTOP at every kind of boundary.

Against SeaweedFS, a distributed store with conditional writes of its own; a batch, and the conditions themselves,
against moto's S3, too. All boundaries are test_one_item.py's, in virtual time.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from prefect_eachlabs.ledger.records import Record, RecordState
from prefect_eachlabs.storage.base import PreconditionFailed
from prefect_eachlabs.storage.s3 import S3Store
from prefect_eachlabs.storage.s3_client import client_of
from prefect_eachlabs.testing.emulator import EmulatorOptions, EmulatorServer
from prefect_eachlabs.testing.s3 import LocalS3
from tests.net.real_time import in_real_time
from tests.protocol.test_one_item import BEFORE_THE_POST, BOUNDARIES
from tests.seaweed import SeaweedFS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent.parent
BUCKET = "pictures"
WRITERS = 12
# Short enough to wait for, long enough for a busy machine: a POST begins within 3 s of its claim.
TIMES = {"claim_seconds": 18.0, "settling_seconds": 2.0, "deadline_seconds": 120.0}
AT_A_TIME = 4
STAGE_SECONDS = 120

Store = LocalS3 | SeaweedFS


class Scene:
    """An emulator, a bucket, and children that are run at them."""

    def __init__(self, emulator: EmulatorServer, s3: Store, name: str) -> None:
        self.emulator = emulator
        self._s3 = s3
        self._prefix = name
        self._children: list[subprocess.Popen[str]] = []

    def start(self, items: list[dict[str, str]], **told: Any) -> subprocess.Popen[str]:
        settings = {
            "api_key": "kit",
            "base_url": self.emulator.url,
            "requests_per_minute": None,
            "max_in_flight": None,
            **TIMES,
        }
        order = {
            "items": items,
            "settings": settings,
            "s3_url": self._s3.url,
            "destination": f"s3://{BUCKET}/{self._prefix}",
            "run_id": f"run-{len(self._children)}",
            **told,
        }
        child = subprocess.Popen(
            [sys.executable, "-m", "tests.protocol.child", json.dumps(order)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._children.append(child)
        return child

    def finish(self, child: subprocess.Popen[str]) -> list[dict[str, Any]]:
        """What a child said of its items; it must have ended well."""
        out, errors = child.communicate(timeout=180)
        assert child.returncode == 0, errors
        return [json.loads(line) for line in out.splitlines()]

    def obtain(self, items: list[dict[str, str]]) -> list[dict[str, Any]]:
        return self.finish(self.start(items))

    def record(self, item: dict[str, str]) -> Record:
        s3 = client_of(self._s3.access)
        body = s3.get_object(Bucket=BUCKET, Key=f"{self._prefix}/records/{item['item_id']}.json")["Body"].read()
        return Record.model_validate_json(body)

    def pictures(self) -> int:
        return self.keys("images/")

    def check(self, items: list[dict[str, str]], *, may_be_too_many: int = 0) -> None:
        tallies = self.emulator.tallies()
        records = [self.record(item) for item in items]
        assert [record.state for record in records] == [RecordState.STORED] * len(items)
        assert self.pictures() == len(items)
        named = Counter(name for record in records for name in record.named_predictions)
        assert set(named.values()) == {1}
        too_many = sum(len(record.also_bought) for record in records)
        assert tallies["billed"] == len(named) == len(items) + too_many
        assert too_many <= may_be_too_many

    def keys(self, folder: str) -> int:
        """How many objects there are under a folder of the destination."""
        listed = client_of(self._s3.access).list_objects_v2(Bucket=BUCKET, Prefix=f"{self._prefix}/{folder}")
        return int(listed["KeyCount"])

    def batch(self, source: Path, log: Path) -> subprocess.Popen[str]:
        """`prefect-eachlabs batch SOURCE`, with what it writes in `log`, after a line once Python itself is up."""
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("PREFECT_API")},
            **self._s3.environment(),
            "EACHLABS_API_KEY": "kit",
            "EACHLABS_BASE_URL": self.emulator.url,
            "EACHLABS_REQUESTS_PER_MINUTE": "none",
            "EACHLABS_CLAIM_SECONDS": "12",
            "EACHLABS_SETTLING_SECONDS": "2",
            "PYTHONPATH": str(ROOT),
        }
        program = "import sys; print('up', flush=True); from prefect_eachlabs.cli.main import main; sys.exit(main())"
        command = [sys.executable, "-c", program, "batch", str(source)]
        with log.open("w") as written:
            child = subprocess.Popen(
                [*command, "--to", f"s3://{BUCKET}/{self._prefix}"],
                env=environment,
                stdout=written,
                stderr=subprocess.STDOUT,
                text=True,
            )
        self._children.append(child)
        return child

    def end(self) -> None:
        for child in self._children:
            child.kill()
            child.wait()
            for pipe in (child.stdout, child.stderr):
                if pipe is not None:
                    pipe.close()


@pytest.fixture(scope="module")
def emulator() -> Iterator[EmulatorServer]:
    options = EmulatorOptions(
        service_seconds=0.3, requests_per_minute=None, max_in_flight=None, image_size_px=32, pictures="plain"
    )
    with EmulatorServer(options) as server:
        yield server


SEAWEEDFS = pytest.mark.parametrize("s3", ["SeaweedFS"], indirect=True)


@pytest.fixture(scope="module", params=["moto", "SeaweedFS"])
def s3(request: pytest.FixtureRequest) -> Iterator[Store]:
    if request.param == "SeaweedFS":
        yield request.getfixturevalue("seaweedfs")
        return
    pytest.importorskip("moto")
    with LocalS3(buckets=[BUCKET]) as server:
        yield server


@pytest.fixture
def scene(emulator: EmulatorServer, s3: Store, request: pytest.FixtureRequest) -> Iterator[Scene]:
    emulator.reset()
    emulator.set_faults()
    made = Scene(emulator, s3, re.sub(r"\W+", "-", request.node.name)[-60:])
    yield made
    made.end()


STRUCK_AT = [
    BOUNDARIES.index(name) + 1
    for name in (
        "after S3 PUT kit/records/item-1.json claimed post",
        "before POST /v1/prediction",
        "after POST /v1/prediction",
        "after S3 PUT kit/records/item-1.json created",
        "after S3 PUT kit/images/item-1.png",
    )
]
"""One of each kind: claimed, ordered or not, noted, and stored. Where nothing has changed outside, nothing differs."""


def one_for_each_boundary() -> list[dict[str, str]]:
    return [{"item_id": f"item-{at}", "prompt": f"killed at {at}"} for at in STRUCK_AT]


@SEAWEEDFS
def test_killed_by_sigkill_at_each_kind_of_boundary_and_run_again_each_is_bought_once(scene: Scene) -> None:
    items = one_for_each_boundary()

    def kill(item: dict[str, str], at: int) -> int:
        child = scene.start([item], strike_at=at, strike_with="kill")
        child.communicate(timeout=180)
        return child.returncode

    with ThreadPoolExecutor(AT_A_TIME) as pool:
        codes = list(pool.map(kill, items, STRUCK_AT))
    assert codes == [-signal.SIGKILL] * len(items)
    said = scene.obtain(items)
    assert not [line for line in said if "error" in line]
    scene.check(items)


def wait_until_stopped(child: subprocess.Popen[str]) -> None:
    ended = os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    assert ended is not None
    assert ended.si_code == os.CLD_STOPPED, child.communicate()


@SEAWEEDFS
@pytest.mark.skipif(not hasattr(os, "waitid"), reason="needs waitid to see that a process is stopped")
def test_stopped_at_each_kind_of_boundary_while_another_takes_over_each_is_bought_once(scene: Scene) -> None:
    """Stopped right before its POST, the one case that the promise leaves open, it reports what it bought too many."""
    items = one_for_each_boundary()
    children = []
    for item, at in zip(items, STRUCK_AT, strict=True):
        children.append(scene.start([item], strike_at=at, strike_with="stop"))
        if len(children) % AT_A_TIME == 0:
            for started in children[-AT_A_TIME:]:
                wait_until_stopped(started)
    try:
        said = scene.obtain(items)
    finally:
        for child in children:
            child.send_signal(signal.SIGCONT)
    assert not [line for line in said if "error" in line]
    prediction_ids = {line["item_id"]: line["prediction_id"] for line in said}
    for item, child in zip(items, children, strict=True):
        (line,) = scene.finish(child)
        assert "error" not in line, line
        assert line["prediction_id"] == prediction_ids[item["item_id"]]
    scene.check(items, may_be_too_many=1)
    assert len(scene.record(items[STRUCK_AT.index(BEFORE_THE_POST)]).also_bought) == 1


@SEAWEEDFS
def test_two_processes_racing_for_the_same_thirty_items_buy_each_once(scene: Scene) -> None:
    """Half of them with equal inputs, one order in ten without an answer."""
    scene.emulator.set_faults("create:lost_answer=0.1")
    items = [
        {"item_id": f"item-{number}", "prompt": f"picture {number}" if number < 15 else "the same picture"}
        for number in range(30)
    ]
    racers = [scene.start(items), scene.start(items)]
    said = [line for racer in racers for line in scene.finish(racer)]
    assert not [line for line in said if "error" in line]
    scene.check(items)
    assert len({line["prediction_id"] for line in said}) == len(items)


@in_real_time
async def test_of_twelve_writers_one_makes_a_record_and_one_changes_it(s3: Store) -> None:
    """What the whole promise stands on: conditional writes of which one wins, in each of ten races."""
    store = S3Store(BUCKET, s3.access)

    async def race(key: str, **condition: Any) -> list[str]:
        async def write(number: int) -> str | None:
            body = f"{number} {condition}".encode()  # an ETag is a digest: no body may come twice
            try:
                return await store.put(key, body, content_type="application/json", **condition)
            except PreconditionFailed:
                return None

        written = await asyncio.gather(*(write(number) for number in range(WRITERS)))
        return [etag for etag in written if etag is not None]

    for number in range(10):
        key = f"races/{number}.json"
        (made,) = await race(key, if_absent=True)
        (changed,) = await race(key, if_match=made)
        found = await store.get(key)
        assert found is not None
        assert found.etag == changed
        assert await race(f"races/{number}-missing.json", if_match=made) == [], "neither a 404 nor a 412 is a win"


STAGES: dict[str, Callable[[Scene, int], bool]] = {
    "while it starts": lambda *_: True,
    "with predictions in flight": lambda scene, _: scene.emulator.tallies()["in_flight"] >= 5,
    "while pictures are stored": lambda scene, before: scene.pictures() >= before + 3,
}
"""Of a run that is up, told how many pictures there were before it."""


@pytest.mark.parametrize("s3", ["moto"], indirect=True)
def test_a_batch_that_is_interrupted_at_each_stage_is_finished_by_the_last_run(scene: Scene, tmp_path: Path) -> None:
    """One order in ten loses its answer; what Ctrl-C cancelled cost nothing, and may be bought again."""
    scene.emulator.set_faults("create:lost_answer=0.1")
    prompts = [f"picture {number}" for number in range(24)]
    source, log = tmp_path / "rows.csv", tmp_path / "log"
    source.write_text("id,prompt\n" + "".join(f"i{number},{prompt}\n" for number, prompt in enumerate(prompts)))
    for stage, is_reached in STAGES.items():
        before, interrupted = scene.pictures(), scene.batch(source, log)
        deadline = time.monotonic() + STAGE_SECONDS
        while not (log.read_text() and is_reached(scene, before)):
            assert interrupted.poll() is None, log.read_text()
            assert time.monotonic() < deadline, f"never {stage}"
            time.sleep(0.02)
        interrupted.send_signal(signal.SIGINT)
        assert interrupted.wait(STAGE_SECONDS) in (130, -signal.SIGINT), log.read_text()
    for _ in range(2):  # what is too young to be settled at first
        last = scene.batch(source, log)
        if last.wait(STAGE_SECONDS) == 0:
            break
    assert last.returncode == 0, log.read_text()
    paid = Counter(one["input"]["prompt"] for one in scene.emulator.predictions() if one["cost_usd"])
    assert paid == Counter(prompts)
    assert scene.pictures() == len(prompts)
