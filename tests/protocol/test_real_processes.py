"""The same with real processes, a real bucket over HTTP and real signals: SIGKILL and SIGSTOP at every boundary."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from prefect_eachlabs.ledger.records import Record, RecordState
from prefect_eachlabs.storage.s3_client import client_of
from prefect_eachlabs.testing.emulator import EmulatorOptions, EmulatorServer
from prefect_eachlabs.testing.s3 import LocalS3
from tests.protocol.test_one_item import BEFORE_THE_POST, BOUNDARIES

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent.parent
BUCKET = "pictures"
# Short enough to wait for, long enough for a busy machine: a POST begins within 3 s of its claim.
TIMES = {"claim_seconds": 18.0, "settling_seconds": 2.0, "deadline_seconds": 120.0}
AT_A_TIME = 4


class Scene:
    """An emulator, a bucket, and children that are run at them."""

    def __init__(self, emulator: EmulatorServer, s3: LocalS3, name: str) -> None:
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
        listed = client_of(self._s3.access).list_objects_v2(Bucket=BUCKET, Prefix=f"{self._prefix}/images/")
        return int(listed["KeyCount"])

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

    def end(self) -> None:
        for child in self._children:
            child.kill()
            child.wait()
            for pipe in (child.stdout, child.stderr):
                if pipe is not None:
                    pipe.close()


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[EmulatorServer, LocalS3]]:
    pytest.importorskip("moto")
    options = EmulatorOptions(
        service_seconds=0.3, requests_per_minute=None, max_in_flight=None, image_size_px=32, pictures="plain"
    )
    with EmulatorServer(options) as emulator, LocalS3(buckets=[BUCKET]) as s3:
        yield emulator, s3


@pytest.fixture
def scene(servers: tuple[EmulatorServer, LocalS3], request: pytest.FixtureRequest) -> Iterator[Scene]:
    emulator, s3 = servers
    emulator.reset()
    emulator.set_faults()
    made = Scene(emulator, s3, request.node.name.partition("[")[0][:60])
    yield made
    made.end()


def one_for_each_boundary() -> list[dict[str, str]]:
    return [{"item_id": f"item-{at}", "prompt": f"killed at {at}"} for at in range(1, len(BOUNDARIES) + 1)]


def test_killed_by_sigkill_at_any_boundary_and_run_again_each_is_bought_once(scene: Scene) -> None:
    items = one_for_each_boundary()

    def kill(at: int) -> int:
        child = scene.start([items[at - 1]], strike_at=at, strike_with="kill")
        child.communicate(timeout=180)
        return child.returncode

    with ThreadPoolExecutor(AT_A_TIME) as pool:
        codes = list(pool.map(kill, range(1, len(items) + 1)))
    assert codes == [-signal.SIGKILL] * len(items)
    said = scene.obtain(items)
    assert not [line for line in said if "error" in line]
    scene.check(items)


def wait_until_stopped(child: subprocess.Popen[str]) -> None:
    ended = os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    assert ended is not None
    assert ended.si_code == os.CLD_STOPPED, child.communicate()


@pytest.mark.skipif(not hasattr(os, "waitid"), reason="needs waitid to see that a process is stopped")
def test_stopped_at_any_boundary_while_another_takes_over_and_continued_each_is_bought_once(scene: Scene) -> None:
    """Stopped right before its POST, the one case that the promise leaves open, it reports what it bought too many."""
    items = one_for_each_boundary()
    children = []
    for at in range(1, len(items) + 1):
        child = scene.start([items[at - 1]], strike_at=at, strike_with="stop")
        children.append(child)
        if at % AT_A_TIME == 0:
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
    assert len(scene.record(items[BEFORE_THE_POST - 1]).also_bought) == 1


def test_two_processes_racing_for_the_same_fifty_items_buy_each_once(scene: Scene) -> None:
    """Half of them with equal inputs, one order in ten without an answer."""
    scene.emulator.set_faults("create:lost_answer=0.1")
    items = [
        {"item_id": f"item-{number}", "prompt": f"picture {number}" if number < 25 else "the same picture"}
        for number in range(50)
    ]
    racers = [scene.start(items), scene.start(items)]
    said = [line for racer in racers for line in scene.finish(racer)]
    assert not [line for line in said if "error" in line]
    scene.check(items)
    assert len({line["prediction_id"] for line in said}) == len(items)
