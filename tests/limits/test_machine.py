"""Processes of one machine share an account's limits through a file: in virtual time, several sources on one file."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from prefect_eachlabs.limits import machine
from prefect_eachlabs.limits.limiter import Kind, LocalSlots
from prefect_eachlabs.limits.machine import MachineSlots, machine_source, state_folders
from prefect_eachlabs.settings import AccountSettings
from tests.limits.lease_workers import Api, Buyer, now, takes, warnings
from tests.virtual_time import run


@pytest.fixture(autouse=True)
def the_same_every_time() -> None:
    random.seed(20261122)


@pytest.fixture
def api() -> Iterator[Api]:
    """No test may send more than the page's limits allow; tests with other numbers use an `Api` of their own."""
    seen = Api()
    yield seen
    assert seen.worst_window() <= 60
    assert seen.most_in_flight <= 10


def account(**given: object) -> AccountSettings:
    return AccountSettings(**{"api_key": "a-secret-key", "account": "acme", **given})


def files(folder: Path, pattern: str = "*") -> list[Path]:
    return list(folder.glob(pattern))


class Process(Buyer):
    """A process of this machine; `kill` and `stop_running` are what its signals do to it."""

    def __init__(self, folder: Path, api: Api, name: str = "a", **given: object) -> None:
        buys = {key: given.pop(key) for key in ("prediction_seconds", "latency_seconds") if key in given}
        self.slots = MachineSlots(account(**given), folder)
        super().__init__(self.slots, api, name, **buys)  # type: ignore[arg-type]

    def kill(self) -> None:
        """As SIGKILL does: nothing is given back, and the operating system drops its locks."""
        self.freeze()
        for task in self.callers:
            task.cancel()
        assert self.slots._files is not None
        if self.slots._files._alive is not None:
            os.close(self.slots._files._alive[1])
            machine._live_locks.discard(self.slots._files._alive[1])
            self.slots._files._alive = None

    def freeze(self) -> None:
        """As SIGSTOP does to its source: it writes nothing more, and its locks stay."""
        self.slots._closed = True
        if self.slots._timer is not None:
            self.slots._timer.cancel()


# ------------------------------------------------------------------ side by side


def test_one_process_keeps_the_pace_of_its_own_window(tmp_path: Path, api: Api) -> None:
    async def story() -> None:
        Process(tmp_path, api).start()
        await asyncio.sleep(600)

    run(story())
    assert api.sent(60, 600) >= 0.99 * 9 * 60


@pytest.mark.parametrize("count", [2, 4])
def test_processes_side_by_side_share_the_window_and_the_slots_in_flight_evenly(
    tmp_path: Path, api: Api, count: int
) -> None:
    async def story() -> None:
        for name in range(count):
            Process(tmp_path, api, str(name)).start()
            await asyncio.sleep(7)
        await asyncio.sleep(420)

    run(story())
    sent = [api.sent(60, 420, str(name)) for name in range(count)]
    assert sum(sent) >= 0.98 * 6 * 60
    assert max(sent) <= 1.3 * min(sent)


def test_a_single_picture_beside_a_large_batch_has_its_turn(tmp_path: Path, api: Api) -> None:
    async def story() -> float:
        Process(tmp_path, api, "batch").start()
        await asyncio.sleep(200)
        began = now()
        single = Process(tmp_path, api, "single").start(callers=1, pictures=1)
        await asyncio.gather(*single.callers)
        return now() - began

    assert run(story()) < 60  # the batch holds all ten slots until its questions have their turn in the window


def test_processes_take_turns_at_a_single_slot_in_flight(tmp_path: Path, api: Api) -> None:
    async def story() -> None:
        for name in "abc":
            Process(tmp_path, api, name, max_in_flight=1).start(callers=3)
        await asyncio.sleep(300)

    run(story())
    assert api.most_in_flight == 1
    assert all(api.sent(0, 300, name) >= 30 for name in "abc")


def test_accounts_and_addresses_have_limits_of_their_own(tmp_path: Path) -> None:
    async def story() -> None:
        ours, theirs = (
            MachineSlots(account(max_in_flight=1), tmp_path),
            MachineSlots(account(max_in_flight=1), tmp_path),
        )
        other = MachineSlots(account(max_in_flight=1, account="other"), tmp_path)
        elsewhere = MachineSlots(account(max_in_flight=1, base_url="http://127.0.0.1:9"), tmp_path)
        assert ours.try_take(Kind.IN_FLIGHT) is not None
        assert theirs.try_take(Kind.IN_FLIGHT) is None
        assert other.try_take(Kind.IN_FLIGHT) is not None
        assert elsewhere.try_take(Kind.IN_FLIGHT) is not None

    run(story())


def test_without_a_limit_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    source = machine_source(account(requests_per_minute=None, max_in_flight=None))
    assert isinstance(source, LocalSlots)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------ one after the other


def test_a_run_after_another_goes_on_with_its_window(tmp_path: Path, api: Api) -> None:
    """`generate` in a loop: each process buys five pictures and ends."""

    async def story() -> None:
        for number in range(30):
            process = Process(tmp_path, api, str(number)).start(callers=5, pictures=1)
            await asyncio.gather(*process.callers)
            await process.stop()

    run(story())
    assert len(api.requests) == 300


def test_what_an_orderly_end_leaves_in_flight_counts_until_it_can_have_ended(tmp_path: Path, api: Api) -> None:
    async def story() -> None:
        first = Process(tmp_path, api, "first", prediction_seconds=50.0).start()
        await asyncio.sleep(10)
        await first.stop()
        ended_at = now()
        second = Process(tmp_path, api, "second")
        assert await takes(second, Kind.IN_FLIGHT, 59) is None
        assert await takes(second, Kind.IN_FLIGHT, 2) is not None
        assert now() - ended_at < 62

    run(story())


def test_predictions_that_were_seen_to_end_leave_nothing_behind(tmp_path: Path, api: Api) -> None:
    async def story() -> None:
        first = Process(tmp_path, api, "first")
        slots = [await first.limiter.take_in_flight() for _ in range(10)]
        for slot in slots:
            slot.done()
        await first.stop()
        second = Process(tmp_path, api, "second")
        for _ in range(10):
            assert second.slots.try_take(Kind.IN_FLIGHT) is not None

    run(story())


# ------------------------------------------------------------------ killed, stopped


@pytest.mark.parametrize("seed", range(6))
def test_killed_anywhere_and_started_again_it_is_never_over(tmp_path: Path, api: Api, seed: int) -> None:
    random.seed(seed)

    async def story() -> None:
        for number in range(12):
            process = Process(tmp_path, api, str(number)).start(callers=random.choice([3, 30]))
            await asyncio.sleep(random.uniform(0.1, 40))
            process.kill()
            await asyncio.sleep(random.choice([0.0, 1.0, 30.0, 80.0]))

    run(story())
    assert len(api.requests) > 100


def test_a_killed_process_slots_come_back_and_are_not_given_out_before(tmp_path: Path, api: Api) -> None:
    async def story() -> None:
        killed = Process(tmp_path, api, "killed", prediction_seconds=40.0).start()
        await asyncio.sleep(30)
        killed.kill()
        killed_at = now()
        heir = Process(tmp_path, api, "heir")
        slots = [await heir.limiter.take_in_flight() for _ in range(10)]
        assert 60 <= now() - killed_at <= 75
        await asyncio.sleep(60)
        assert len(slots) == 10
        assert len(files(tmp_path, "*.alive")) == 1  # the killed one's is gone

    run(story())


def test_slow_predictions_of_a_killed_process_count_longer(tmp_path: Path) -> None:
    async def story() -> float:
        api = Api()
        killed = Process(tmp_path, api, prediction_seconds=100.0).start()
        await asyncio.sleep(250)
        killed.kill()
        killed_at = now()
        heir = Process(tmp_path, api, "heir")
        await heir.limiter.take_in_flight()
        return now() - killed_at

    assert 180 <= run(story()) <= 230


def test_a_stopped_process_keeps_what_it_has_taken_however_long(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def story() -> None:
        api = Api()
        stopped = Process(tmp_path, api, "stopped")
        for _ in range(10):
            await stopped.limiter.take_in_flight()
        stopped.freeze()
        await asyncio.sleep(3600)
        other = Process(tmp_path, api, "other")
        assert await takes(other, Kind.IN_FLIGHT, 600) is None

    run(story())
    assert f"pid {os.getpid()} (stopped?)" in warnings(caplog, "Waiting for 10 of 10 slots in flight")[0]


def test_a_process_that_waited_and_was_killed_keeps_nobody_from_a_free_slot(tmp_path: Path, api: Api) -> None:
    async def story() -> None:
        first, second = Process(tmp_path, api, "first", max_in_flight=1), Process(tmp_path, api, max_in_flight=1)
        slot = await first.limiter.take_in_flight()
        waiting = asyncio.ensure_future(second.limiter.take_in_flight())
        await asyncio.sleep(10)
        second.kill()
        waiting.cancel()
        slot.done()
        assert await takes(first, Kind.IN_FLIGHT, 3) is not None

    run(story())


# ------------------------------------------------------------------ nothing waits in silence


def test_who_waits_for_what_others_hold_says_so_after_five_seconds_and_seldom_again(
    tmp_path: Path, api: Api, caplog: pytest.LogCaptureFixture
) -> None:
    async def story() -> None:
        first = Process(tmp_path, api, "first")
        slots = [await first.limiter.take_in_flight() for _ in range(10)]
        second = Process(tmp_path, api, "second")
        waiting = asyncio.ensure_future(second.limiter.take_in_flight())
        await asyncio.sleep(4.9)
        assert second.limiter.standstill is None
        await asyncio.sleep(0.6)
        assert second.limiter.standstill is not None
        assert f"hold (pid {os.getpid()})" in second.limiter.standstill
        await asyncio.sleep(110)
        assert len(warnings(caplog, "Waiting for 10 of 10 slots in flight of account 'acme'")) == 1
        await asyncio.sleep(100)
        assert len(warnings(caplog, "Waiting for")) == 2
        slots[0].done()
        await waiting
        assert second.limiter.standstill is None

    run(story())


def test_who_waits_for_a_dead_process_says_when_its_slots_come_back(
    tmp_path: Path, api: Api, caplog: pytest.LogCaptureFixture
) -> None:
    async def story() -> None:
        first = Process(tmp_path, api, "first")
        for _ in range(10):
            await first.limiter.take_in_flight()
        await first.stop()
        await takes(Process(tmp_path, api, "second"), Kind.IN_FLIGHT, 30)

    run(story())
    assert len(warnings(caplog, "that ended processes have left: those come back within 5")) == 1


def test_who_waits_for_its_own_window_says_nothing(tmp_path: Path, api: Api, caplog: pytest.LogCaptureFixture) -> None:
    async def story() -> None:
        Process(tmp_path, api).start()
        await asyncio.sleep(180)

    run(story())
    assert not caplog.records


# ------------------------------------------------------------------ the file


def the_file(folder: Path) -> Path:
    (path,) = files(folder, "*.json")
    return path


def test_the_file_is_its_users_alone_and_has_no_key_in_it(tmp_path: Path, api: Api) -> None:
    folder = tmp_path / "state"

    async def story() -> None:
        process = Process(folder, api)
        await process.limiter.take_request()

    run(story())
    assert folder.stat().st_mode & 0o777 == 0o700
    for path in folder.iterdir():
        assert path.stat().st_mode & 0o777 == 0o600
        assert b"a-secret-key" not in path.read_bytes()


def test_it_is_in_the_state_folder_or_else_in_the_temporary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    state, temporary = state_folders({"XDG_STATE_HOME": str(tmp_path / "state")})
    assert state == tmp_path / "state" / "prefect-eachlabs"
    assert temporary == tmp_path / "tmp" / f"prefect-eachlabs-{os.getuid()}"
    assert state_folders({"XDG_STATE_HOME": "relative"})[0] == Path.home() / ".local/state/prefect-eachlabs"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert MachineSlots(account())._files.folder == temporary  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "damage",
    [
        b"\x00" * 100,
        b"[]",
        b'{"version": 2}',
        b'{"version": 1, "holdings": {"x": {}}, "left": {}, "held_seconds": []}',
        b'{"version": 1, "holdings": {}, "left": {"requests": [[9e99, 60]], "in-flight": []}, "held_seconds": []}',
        b"[" * 100_000,
    ],
)
def test_a_damaged_file_is_written_anew_with_what_all_still_hold_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: bytes
) -> None:
    async def story() -> None:
        api = Api()
        first, second = Process(tmp_path, api, "first"), Process(tmp_path, api, "second")
        for _ in range(4):
            await first.limiter.take_in_flight()
        the_file(tmp_path).write_bytes(damage)
        for _ in range(3):
            await second.limiter.take_in_flight()
        await asyncio.sleep(6)
        said = json.loads(the_file(tmp_path).read_text())
        assert sorted(holding["taken"]["in-flight"] for holding in said["holdings"].values()) == [3, 4]
        assert await takes(Process(tmp_path, api), Kind.IN_FLIGHT, 1) is not None

    run(story())
    assert len(warnings(caplog, "could not be read")) == 1


def test_a_file_that_somebody_removed_is_written_anew_with_what_all_still_hold(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def story() -> None:
        api = Api()
        first, second = Process(tmp_path, api, "first"), Process(tmp_path, api, "second")
        for _ in range(10):
            await first.limiter.take_in_flight()
        for path in files(tmp_path):
            path.unlink()
        await asyncio.sleep(6)
        assert await takes(second, Kind.IN_FLIGHT, 60) is None

    run(story())
    assert len(warnings(caplog, "somebody has removed or emptied it")) == 1


def test_a_folder_that_cannot_be_used_leaves_the_limits_to_the_process_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "state").write_text("no folder")

    async def story() -> None:
        api = Api()
        process = Process(tmp_path / "state", api).start(callers=30)
        await asyncio.sleep(180)
        assert api.sent(60, 180) >= 110
        assert api.worst_window() <= 60
        await process.stop()

    run(story())
    assert len(warnings(caplog, "counted in this process alone")) == len(caplog.records) == 1


def test_somebody_elses_folder_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: os.getuid() + 1)
    MachineSlots(account(), tmp_path)
    assert len(warnings(caplog, "belongs to another user")) == 1


def test_a_disk_that_fills_up_leaves_the_limits_to_the_process_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(self: machine.Files, descriptor: int, body: bytes) -> None:
        raise OSError(28, "No space left on device")

    async def story() -> None:
        api = Api()
        Process(tmp_path, api).start()
        await asyncio.sleep(30)
        monkeypatch.setattr(machine.Files, "write", full)
        await asyncio.sleep(180)
        assert api.sent(60, 210) >= 140
        assert api.worst_window() <= 60
        assert api.most_in_flight <= 10

    run(story())
    assert len(warnings(caplog, "No space left")) == len(caplog.records) == 1


def test_a_lock_that_a_stopped_process_holds_is_waited_for_and_then_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(machine, "LOCK_WITHIN_SECONDS", 0.0)

    async def story() -> None:
        first, second = MachineSlots(account(), tmp_path), Process(tmp_path, Api())
        assert first._files is not None
        with first._files.locked():
            assert await takes(second, Kind.REQUESTS, 4.9) is None
            assert not caplog.records
            assert await takes(second, Kind.REQUESTS, 1) is not None
        assert first.try_take(Kind.REQUESTS) is not None

    run(story())
    assert len(warnings(caplog, "does not go on")) == len(caplog.records) == 1


def test_without_file_locks_the_limits_are_the_processs_own_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(machine, "HAS_FILE_LOCKS", False)
    assert isinstance(machine_source(account()), LocalSlots)
    assert len(caplog.records) == 1


def test_after_a_reboot_the_file_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        before = MachineSlots(account(max_in_flight=1), tmp_path)
        assert before.try_take(Kind.IN_FLIGHT) is not None
        monkeypatch.setattr(machine, "_boot_id", lambda: "another boot")
        after = MachineSlots(account(max_in_flight=1), tmp_path)
        assert after.try_take(Kind.IN_FLIGHT) is not None

    run(story())


def test_files_of_earlier_boots_are_removed_and_those_in_use_are_not(tmp_path: Path) -> None:
    async def story() -> None:
        in_use = MachineSlots(account(), tmp_path)
        assert in_use.try_take(Kind.IN_FLIGHT) is not None
        old = tmp_path / "limits-acme-0123456789abcdef.json"
        old.write_text("{}")
        for path in files(tmp_path):
            os.utime(path, (0, 0))
        again = MachineSlots(account(), tmp_path)
        assert not old.exists()
        assert in_use._files is not None
        assert again._files is not None
        assert again._files.is_alive(in_use._name)

    run(story())


def test_a_forked_child_does_not_keep_its_parent_alive(tmp_path: Path) -> None:
    async def story() -> MachineSlots:
        parent = MachineSlots(account(), tmp_path)
        assert parent.try_take(Kind.IN_FLIGHT) is not None
        return parent

    parent = run(story())
    assert parent._files is not None
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with suppress(BaseException):
            os.close(writing)
            os.read(reading, 1)
        os._exit(0)
    try:
        parent._files.say_gone()
        path = parent._files._alive_path(parent._name)
        path.touch(0o600)
        assert not parent._files.is_alive(parent._name)
    finally:
        os.close(writing)
        os.close(reading)
        os.waitpid(child, 0)


def test_the_log_says_where_the_file_is_when_it_is_not_the_usual_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    MachineSlots(account())
    assert len(warnings(caplog, "are not kept in")) == 1
