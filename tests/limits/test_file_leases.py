"""Processes of one machine share an account's limits through a file: in virtual time, several sources on one file."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import shutil
from pathlib import Path

import pytest

from prefect_eachlabs.limits import file_leases
from prefect_eachlabs.limits.file_leases import FileLeases, machine_limiter, state_folders
from prefect_eachlabs.limits.limiter import Kind, RateLimiter
from prefect_eachlabs.settings import AccountSettings
from tests.limits.lease_workers import Api, Buyer, now, takes, warnings
from tests.limits.local import local_limiter
from tests.polling.model_api import ModelApi, Shop
from tests.virtual_time import run


def account(**given: object) -> AccountSettings:
    return AccountSettings(**{"api_key": "a-secret-key", "account": "acme", **given})


def files(folder: Path, pattern: str = "*") -> list[Path]:
    return list(folder.glob(pattern))


class Process(Buyer):
    """A process of this machine."""

    def __init__(self, folder: Path, api: Api, name: str = "a", **given: object) -> None:
        buys = {key: given.pop(key) for key in ("prediction_seconds", "latency_seconds") if key in given}
        settings = account(**given)
        super().__init__(settings, FileLeases(settings, folder), api, name, **buys)  # type: ignore[arg-type]


# ------------------------------------------------------------------ side by side


async def test_processes_side_by_side_share_the_window_and_the_slots_in_flight_evenly(tmp_path: Path, api: Api) -> None:
    for name in range(3):
        Process(tmp_path, api, str(name)).start()
        await asyncio.sleep(7)
    await asyncio.sleep(240)
    sent = [api.sent(60, 240, str(name)) for name in range(3)]
    assert sum(sent) >= 0.98 * 3 * 60
    assert max(sent) <= 2 * min(sent)


async def test_a_single_picture_beside_a_large_batch_has_its_turn(tmp_path: Path, api: Api) -> None:
    Process(tmp_path, api, "batch").start()
    await asyncio.sleep(200)
    began = now()
    single = Process(tmp_path, api, "single").start(callers=1, pictures=1)
    await asyncio.gather(*single.callers)
    assert (now() - began) < 60


async def test_processes_take_turns_at_a_single_slot_in_flight(tmp_path: Path, api: Api) -> None:
    for name in "abc":
        Process(tmp_path, api, name, max_in_flight=1).start(callers=3)
    await asyncio.sleep(300)
    assert api.most_in_flight == 1
    assert all(api.sent(0, 300, name) >= 15 for name in "abc")


async def test_accounts_and_addresses_have_limits_of_their_own(tmp_path: Path) -> None:
    api = Api()

    async def gets(**given: object) -> bool:
        return await takes(Process(tmp_path, api, max_in_flight=1, **given), Kind.IN_FLIGHT, 1) is not None

    assert await gets()
    assert not await gets()
    assert await gets(account="other")
    assert await gets(base_url="http://127.0.0.1:9")


async def test_without_a_limit_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))

    limiter = machine_limiter(account(requests_per_minute=None, max_in_flight=None))
    await limiter.take_in_flight()
    await limiter.take_request()
    await limiter.close()
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------ one after the other


async def test_a_run_after_another_goes_on_with_its_window(tmp_path: Path, api: Api) -> None:
    """`generate` in a loop: each process buys five pictures and ends."""
    for number in range(20):
        process = Process(tmp_path, api, str(number)).start(callers=5, pictures=1)
        await asyncio.gather(*process.callers)
        await process.stop()
    assert len(api.requests) == 200


async def test_predictions_that_were_seen_to_end_leave_nothing_behind(tmp_path: Path, api: Api) -> None:
    first = Process(tmp_path, api, "first")
    slots = [await first.limiter.take_in_flight() for _ in range(10)]
    for slot in slots:
        slot.done()
    await first.stop()
    began = now()
    second = Process(tmp_path, api, "second")
    for _ in range(10):
        await second.limiter.take_in_flight()
    assert now() - began < 1


# ------------------------------------------------------------------ killed, stopped


@pytest.mark.parametrize("seed", range(3))
async def test_killed_anywhere_and_started_again_it_is_never_over(tmp_path: Path, api: Api, seed: int) -> None:
    random.seed(seed)

    for number in range(12):
        process = Process(tmp_path, api, str(number)).start(callers=random.choice([3, 30]))
        await asyncio.sleep(random.uniform(0.1, 40))
        process.kill()
        await asyncio.sleep(random.choice([0.0, 1.0, 30.0, 80.0]))
    assert len(api.requests) > 100


async def test_a_killed_process_slots_come_back_and_are_not_given_out_before(tmp_path: Path, api: Api) -> None:
    killed = Process(tmp_path, api, "killed", prediction_seconds=40.0).start()
    await asyncio.sleep(30)
    killed.kill()
    killed_at = now()
    heir = Process(tmp_path, api, "heir")
    slots = [await heir.limiter.take_in_flight() for _ in range(10)]
    assert 60 <= now() - killed_at <= 76
    assert len(slots) == 10


async def test_a_process_that_was_stopped_for_minutes_takes_nothing_from_its_old_leases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the machine slept: the loop's clock does not know of it, the leases have ended."""
    api = Api()
    sleeper = Process(tmp_path, api, "sleeper")
    held = [await sleeper.limiter.take_in_flight() for _ in range(4)]
    spare = await sleeper.limiter.take_in_flight()
    spare.unused()
    monkeypatch.setattr("prefect_eachlabs.limits.leases.suspended_seconds", lambda: 300.0)
    other = Process(tmp_path, api, "other")
    others = [await other.limiter.take_in_flight() for _ in range(8)]
    waiting = asyncio.ensure_future(sleeper.limiter.take_in_flight())
    await asyncio.sleep(30)
    assert not waiting.done()  # four are still in flight, eight are the other's: first those must end
    for slot in others[:6]:
        slot.done()
    await asyncio.sleep(30)
    assert waiting.done()
    taken = json.loads(the_file(tmp_path).read_text())["leases"]
    assert len(taken) == len(held) + 1 + len(others[6:])


# ------------------------------------------------------------------ nothing waits in silence


async def test_who_waits_for_what_others_hold_says_so_after_five_seconds_and_seldom_again(
    tmp_path: Path, api: Api, caplog: pytest.LogCaptureFixture
) -> None:
    first = Process(tmp_path, api, "first")
    slots = [await first.limiter.take_in_flight() for _ in range(10)]
    second = Process(tmp_path, api, "second")
    waiting = asyncio.ensure_future(second.limiter.take_in_flight())
    await asyncio.sleep(4.9)
    assert second.limiter.standstill is None
    await asyncio.sleep(0.6)
    assert second.limiter.standstill is not None
    assert "other processes on this machine (pid " in second.limiter.standstill
    assert "comes back within 75 s" in second.limiter.standstill
    await asyncio.sleep(110)
    assert len(warnings(caplog, "Waiting for 10 of 10 slots in flight of account 'acme'")) == 1
    await asyncio.sleep(100)
    assert len(warnings(caplog, "Waiting for")) == 2
    slots[0].done()
    await waiting
    assert second.limiter.standstill is None


async def test_who_waits_for_its_own_window_says_nothing(
    tmp_path: Path, api: Api, caplog: pytest.LogCaptureFixture
) -> None:
    Process(tmp_path, api).start()
    await asyncio.sleep(180)
    assert not caplog.records


# ------------------------------------------------------------------ the file


def the_file(folder: Path) -> Path:
    (path,) = files(folder, "*.json")
    return path


async def test_the_file_is_its_users_alone_and_has_no_key_in_it(tmp_path: Path, api: Api) -> None:
    folder = tmp_path / "state"

    process = Process(folder, api)
    await process.limiter.take_request()
    assert folder.stat().st_mode & 0o777 == 0o700
    for path in folder.iterdir():
        assert path.stat().st_mode & 0o777 == 0o600
        assert b"a-secret-key" not in path.read_bytes()


def test_it_is_in_the_state_folder_or_else_in_the_temporary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    state, temporary = state_folders()
    assert state == tmp_path / "state" / "prefect-eachlabs"
    assert temporary == tmp_path / "tmp" / f"prefect-eachlabs-{os.getuid()}"
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    assert state_folders()[0] == Path.home() / ".local/state/prefect-eachlabs"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert Path(FileLeases(account()).where).parent == temporary


@pytest.mark.parametrize(
    "damage",
    [
        b"\x00" * 100,
        b"[]",
        b'{"version": 1}',
        b'{"version": 2, "leases": {"x": {}}}',
        b'{"version": 2, "leases": {"x": ["requests", 1, 9e99, 1]}}',
        b'{"version": 2, "leases": {"x": ["requests", -1, 1.0, 1]}}',
        b"[" * 100_000,
    ],
)
async def test_a_damaged_file_is_written_anew_with_what_all_still_hold_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: bytes
) -> None:
    api = Api()
    first, second = Process(tmp_path, api, "first"), Process(tmp_path, api, "second")
    for _ in range(4):
        await first.limiter.take_in_flight()
    the_file(tmp_path).write_bytes(damage)
    for _ in range(3):
        await second.limiter.take_in_flight()
    await asyncio.sleep(15)  # by then the first has renewed what it has
    assert len(json.loads(the_file(tmp_path).read_text())["leases"]) == 7
    assert await takes(Process(tmp_path, api), Kind.IN_FLIGHT, 1) is not None
    assert len(warnings(caplog, "could not be read")) == 1


async def test_a_file_that_somebody_removed_is_written_anew_with_what_all_still_hold(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    api = Api()
    first, second = Process(tmp_path, api, "first"), Process(tmp_path, api, "second")
    for _ in range(10):
        await first.limiter.take_in_flight()
    the_file(tmp_path).unlink()
    await asyncio.sleep(15)
    assert await takes(second, Kind.IN_FLIGHT, 60) is None
    assert len(warnings(caplog, "somebody has removed or emptied it")) == 1


async def test_a_folder_that_cannot_be_used_leaves_the_limits_to_the_process_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "state").write_text("no folder")

    api = Api()
    process = Process(tmp_path / "state", api).start(callers=30)
    await asyncio.sleep(180)
    assert api.sent(60, 180) >= 110
    assert api.worst_window() <= 60
    await process.stop()
    assert len(warnings(caplog, "counted in this process alone")) == len(caplog.records) == 1


def test_somebody_elses_folder_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: os.getuid() + 1)
    assert FileLeases(account(), tmp_path).where
    assert len(warnings(caplog, "belongs to another user")) == 1


async def test_a_disk_that_fills_up_leaves_the_limits_to_the_process_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(descriptor: int, rows: object) -> None:
        raise OSError(28, "No space left on device")

    api = Api()
    Process(tmp_path, api).start()
    await asyncio.sleep(30)
    monkeypatch.setattr(file_leases, "_write", full)
    await asyncio.sleep(180)
    assert api.sent(60, 210) >= 140
    assert api.worst_window() <= 60
    assert api.most_in_flight <= 10
    assert len(warnings(caplog, "No space left")) == len(caplog.records) == 1


async def test_what_others_were_seen_to_hold_counts_for_a_process_that_can_no_longer_read_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(path: Path) -> None:
        raise OSError(5, "Input/output error")

    first, second = Process(tmp_path, Api()), Process(tmp_path, Api())
    for _ in range(10):
        await first.limiter.take_in_flight()
    assert await takes(second, Kind.IN_FLIGHT, 1) is None
    monkeypatch.setattr(file_leases, "_try_lock", gone)
    await second.limiter.take_in_flight()
    assert 74 < now() < 77


async def test_a_lock_that_a_stopped_process_holds_is_waited_for_and_then_done_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = FileLeases(account(), tmp_path), Process(tmp_path, Api())
    await first.lease(Kind.REQUESTS, 1, 60)
    descriptor = await first._lock()
    assert descriptor is not None
    assert await takes(second, Kind.REQUESTS, 4.9) is None
    assert not caplog.records
    assert await takes(second, Kind.REQUESTS, 1) is not None
    os.close(descriptor)
    assert await takes(second, Kind.REQUESTS, 1) is not None
    assert await first.taken(Kind.REQUESTS) == 3, "shared again, with what it had taken alone"
    assert len(warnings(caplog, "does not go on")) == len(caplog.records) == 1


async def test_a_folder_that_somebody_removed_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "state"

    first, second = Process(folder, Api()), FileLeases(account(), folder)
    assert await takes(first, Kind.REQUESTS, 1) is not None
    shutil.rmtree(folder)
    assert await takes(first, Kind.REQUESTS, 1) is not None
    assert await second.taken(Kind.REQUESTS) == 2
    assert len(warnings(caplog, "somebody has removed")) == len(caplog.records) == 1


async def test_without_file_locks_the_limits_are_the_processs_own_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(file_leases, "HAS_FILE_LOCKS", False)

    limiter = machine_limiter(account(max_in_flight=2))
    assert [await limiter.take_in_flight() for _ in range(2)]
    assert limiter.pressure(Kind.IN_FLIGHT) == 1.0
    assert len(warnings(caplog, "no file locks")) == len(caplog.records) == 1


async def test_after_a_reboot_the_file_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = Process(tmp_path, Api(), max_in_flight=1)
    assert await takes(before, Kind.IN_FLIGHT, 1) is not None
    monkeypatch.setattr(file_leases, "_boot_id", lambda: "another boot")
    after = Process(tmp_path, Api(), max_in_flight=1)
    assert await takes(after, Kind.IN_FLIGHT, 1) is not None


def test_files_of_earlier_boots_are_removed(tmp_path: Path) -> None:
    old, lately = tmp_path / "limits-acme-0123456789abcdef.json", tmp_path / "limits-acme-76543210fedcba98.json"
    for path in (old, lately):
        path.write_text("{}")
    os.utime(old, (0, 0))
    assert FileLeases(account(), tmp_path).where
    assert files(tmp_path) == [lately]


def test_the_log_says_where_the_file_is_when_it_is_not_the_usual_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert FileLeases(account()).where
    assert len(warnings(caplog, "are not kept in")) == 1


def test_a_process_alone_on_its_machine_is_as_fast_as_its_own_window(tmp_path: Path) -> None:
    async def pictures(limiter: RateLimiter) -> float:
        model = ModelApi(requests_per_minute=60, max_in_flight=10, seed=1)
        shop = Shop(model, limiter)
        buyers = [asyncio.ensure_future(shop.buy_for_ever()) for _ in range(20)]
        await asyncio.sleep(180)
        assert [buyer for buyer in buyers if buyer.done()] == []
        await shop.poller.close()
        await limiter.close()
        assert model.throttled == 0
        return shop.per_minute(60, 180)

    async def shared() -> float:
        return await pictures(RateLimiter(account(), FileLeases(account(), tmp_path)))

    assert run(shared()) >= 0.98 * run(pictures(local_limiter(requests_per_minute=60, max_in_flight=10)))


def test_one_api_in_two_spellings_is_one_account(tmp_path: Path) -> None:
    spellings = ("https://api.eachlabs.ai", "https://API.eachlabs.ai:443")
    places = {FileLeases(account(base_url=url), tmp_path).where for url in spellings}
    assert len(places) == 1
    assert places != {FileLeases(account(base_url="https://api.eachlabs.ai:8443"), tmp_path).where}
