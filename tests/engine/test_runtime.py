"""One loop thread a process, two doors to it: from threads and from other loops; a forked child makes its own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import boto3
import pytest

from prefect_eachlabs.engine import runtime as gateway_room
from prefect_eachlabs.engine.runtime import Gateway, LoopThread, close_gateways, gateway_for, machine_limiter
from prefect_eachlabs.errors import BadInput
from prefect_eachlabs.images.download import Downloader
from prefect_eachlabs.ledger.rules import PurchaseOptions
from prefect_eachlabs.limits.limiter import RateLimiter
from prefect_eachlabs.models import Destination, Item, StoredImage
from prefect_eachlabs.net.public_only import HostGuard
from prefect_eachlabs.settings import AccountSettings
from prefect_eachlabs.testing.emulator import EmulatorOptions, EmulatorServer
from prefect_eachlabs.testing.s3 import LocalS3
from tests.limits.local import OwnLeases
from tests.memory_store import MemoryStore
from tests.net.real_time import in_real_time

DESTINATION = Destination.parse("s3://bucket/kit")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def thread() -> Iterator[LoopThread]:
    thread = LoopThread()
    yield thread
    thread.stop()


@pytest.fixture(scope="module")
def emulator() -> Iterator[EmulatorServer]:
    options = EmulatorOptions(
        service_seconds=0.05, requests_per_minute=None, max_in_flight=None, image_size_px=16, pictures="plain"
    )
    with EmulatorServer(options) as server:
        yield server


@pytest.fixture
def settings(emulator: EmulatorServer) -> AccountSettings:
    emulator.reset()
    emulator.set_faults()
    given = {"api_key": "k", "base_url": emulator.url, "requests_per_minute": None, "max_in_flight": None}
    return AccountSettings(**given)


@pytest.fixture
def gateway(settings: AccountSettings, thread: LoopThread) -> Iterator[Gateway]:
    store = MemoryStore()
    made = Gateway(
        settings,
        thread,
        make_limiter=machine_limiter,
        store_for=lambda _destination, _access: store,
        downloader=Downloader(hosts=HostGuard(settings.private_hosts, settings.api_host)),
    )
    yield made
    made.close()


def obtain(gateway: Gateway, number: int = 1) -> StoredImage:
    item = Item.wanted(f"picture {number}", item_id=f"item-{number}")
    return gateway.call(gateway.engine.generate_and_store(item, DESTINATION, options=PurchaseOptions(run_id="run")))


async def aobtain(gateway: Gateway, number: int = 1) -> StoredImage:
    item = Item.wanted(f"picture {number}", item_id=f"item-{number}")
    work = gateway.engine.generate_and_store(item, DESTINATION, options=PurchaseOptions(run_id="run"))
    return await gateway.acall(work)


# ----------------------------------------------------------------------------- two doors


def test_threads_and_loops_share_one_loop_one_pool_and_one_job_an_item(
    gateway: Gateway, emulator: EmulatorServer
) -> None:
    def from_a_loop_of_its_own(number: int) -> StoredImage:
        return asyncio.run(aobtain(gateway, number))

    with ThreadPoolExecutor(8) as pool:
        sync = [pool.submit(obtain, gateway, number % 4) for number in range(12)]
        own_loops = [pool.submit(from_a_loop_of_its_own, number % 4) for number in range(12)]
        images = [future.result(timeout=30) for future in (*sync, *own_loops)]
    assert len({image.prediction_id for image in images}) == 4
    assert emulator.tallies()["billed"] == 4


def test_everything_runs_on_the_loop_thread_alone(thread: LoopThread) -> None:
    async def where() -> str:
        return threading.current_thread().name

    names = {thread.call(where()), asyncio.run(thread.acall(where()))}
    assert names == {"eachlabs-gateway"}
    assert threading.current_thread().name not in names


def test_slots_go_back_although_the_engine_does_not_come_to_an_end(
    settings: AccountSettings, thread: LoopThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Leases(OwnLeases):
        closed = False

        async def close(self) -> None:
            self.closed = True

    leases = Leases()
    made = Gateway(settings, thread, make_limiter=lambda _: RateLimiter(settings, leases))

    async def for_ever() -> None:
        await asyncio.get_running_loop().create_future()

    monkeypatch.setattr(made.engine, "aclose", for_ever)
    monkeypatch.setattr(gateway_room, "CLOSE_SECONDS", 0.01)
    with pytest.raises(asyncio.TimeoutError):
        made.close()
    assert leases.closed


def test_results_and_errors_come_out_of_both_doors(thread: LoopThread) -> None:
    async def fail() -> None:
        raise BadInput("no")

    async def give() -> int:
        return 7

    assert (thread.call(give()), asyncio.run(thread.acall(give()))) == (7, 7)
    with pytest.raises(BadInput):
        thread.call(fail())
    with pytest.raises(BadInput):
        asyncio.run(thread.acall(fail()))


def test_work_that_asks_the_process_to_end_ends_alone(thread: LoopThread) -> None:
    """rich raises SystemExit out of a log line when nobody reads the log any more."""

    async def leave() -> None:
        raise SystemExit(1)

    async def stay() -> str:
        asyncio.get_running_loop().call_soon(sys.exit, 1)
        await asyncio.sleep(0.01)
        return "here"

    with pytest.raises(SystemExit):
        thread.call(leave())
    assert thread.call(stay()) == "here"


def test_many_callers_of_one_loop_do_not_block_it(thread: LoopThread) -> None:
    """Fifty wait for what the fifty-first brings."""

    async def story() -> int:
        async def make() -> asyncio.Event:
            return asyncio.Event()

        event = await thread.acall(make())

        async def wait_there() -> int:
            await event.wait()
            return 1

        async def bring() -> int:
            event.set()
            return 1

        waiting = [asyncio.ensure_future(thread.acall(wait_there())) for _ in range(50)]
        await asyncio.sleep(0)
        return await thread.acall(bring()) + sum(await asyncio.gather(*waiting))

    assert asyncio.run(story()) == 51


# ------------------------------------------------------------------------------- cancels


@in_real_time
async def test_a_cancelled_await_cancels_the_work_and_lets_it_clean_up(thread: LoopThread) -> None:
    said: list[str] = []
    began = threading.Event()

    async def work() -> None:
        began.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            for _ in range(10):
                await asyncio.sleep(0)
            said.append("cleaned up")
            raise

    task = asyncio.ensure_future(thread.acall(work()))
    await asyncio.to_thread(began.wait)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert said == ["cleaned up"], "the caller came back before the work had ended"


def test_an_interrupted_thread_cancels_the_work_and_lets_it_clean_up() -> None:
    """Ctrl-C in a sync flow: in a process of its own, for the signal goes to its main thread."""
    script = """
import asyncio, os, signal, threading
from prefect_eachlabs.engine.runtime import LoopThread
thread = LoopThread()
async def work():
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        await asyncio.sleep(0.05)
        print("cleaned up", flush=True)
        raise
try:
    thread.call(work())
except KeyboardInterrupt:
    print("interrupted", flush=True)
thread.stop()
"""
    assert run_script(script) == "cleaned up\ninterrupted\n"


def run_script(script: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@in_real_time
async def test_a_cancelled_await_of_a_purchase_leaves_nothing_in_flight(
    gateway: Gateway, emulator: EmulatorServer
) -> None:
    emulator.set_faults("prediction:slow,seconds=60")
    task = asyncio.ensure_future(aobtain(gateway))
    while not emulator.tallies()["billed"]:
        await asyncio.sleep(0.01)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert emulator.tallies()["cancelled"] == 1
    assert emulator.tallies()["in_flight"] == 0


# ------------------------------------------------------------------- one a process, anew after a fork


def test_an_account_has_one_gateway_a_process_and_all_share_one_thread(settings: AccountSettings) -> None:
    other = settings.model_copy(update={"account": "other"})
    try:
        one, two, three = gateway_for(settings), gateway_for(settings), gateway_for(other)
        assert one is two
        assert one is not three
        assert one._thread is three._thread
    finally:
        close_gateways()


def test_gateways_asked_for_at_the_same_moment_are_one(settings: AccountSettings) -> None:
    try:
        with ThreadPoolExecutor(8) as pool:
            made = {id(future.result()) for future in [pool.submit(gateway_for, settings) for _ in range(32)]}
        assert len(made) == 1
    finally:
        close_gateways()


def test_after_closing_a_new_one_is_made(settings: AccountSettings) -> None:
    try:
        first = gateway_for(settings)
        close_gateways()
        second = gateway_for(settings)
        assert first is not second
        assert not first._thread._thread.is_alive()
    finally:
        close_gateways()
    assert gateway_room._process.thread is None
    close_gateways()


@pytest.fixture
def bucket(local_s3: LocalS3, monkeypatch: pytest.MonkeyPatch) -> str:
    """A destination that scripts reach through the environment."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", local_s3.url)
    with closing(boto3.client("s3")) as s3:
        s3.create_bucket(Bucket="runtime")
    return "s3://runtime"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_makes_a_loop_of_its_own(emulator: EmulatorServer, bucket: str) -> None:
    script = f"""
import os, sys
from prefect_eachlabs.engine.runtime import gateway_for
from prefect_eachlabs.models import Destination, Item
from prefect_eachlabs.ledger.rules import PurchaseOptions
from prefect_eachlabs.limits.limiter import RateLimiter
from prefect_eachlabs.settings import AccountSettings
settings = AccountSettings(api_key="k", base_url={emulator.url!r}, requests_per_minute=None, max_in_flight=None)
to = Destination.parse({bucket + "/fork"!r})
def buy(prompt):
    gateway = gateway_for(settings)
    return gateway.call(gateway.engine.create(Item.wanted(prompt), to, options=PurchaseOptions())).id
mine = buy("parent")
child = os.fork()
if child == 0:
    theirs = buy("child")
    print("child", theirs != mine, flush=True)
    os._exit(0)
_, status = os.waitpid(child, 0)
print("parent", status, buy("parent again") != mine, flush=True)
"""
    emulator.reset()
    assert run_script(script) == "child True\nparent 0 True\n"
    assert emulator.tallies()["billed"] == 3


def test_a_process_ends_by_itself_though_nobody_closed_its_gateway(emulator: EmulatorServer, bucket: str) -> None:
    script = f"""
from prefect_eachlabs.engine.runtime import gateway_for
from prefect_eachlabs.models import Destination, Item
from prefect_eachlabs.ledger.rules import PurchaseOptions
from prefect_eachlabs.limits.limiter import RateLimiter
from prefect_eachlabs.settings import AccountSettings
to = Destination.parse({bucket!r})
gateway = gateway_for(AccountSettings(api_key="k", base_url={emulator.url!r}))
print(gateway.call(gateway.engine.create(Item.wanted("a"), to, options=PurchaseOptions())).status.value)
"""
    assert run_script(script) == "pending\n"
