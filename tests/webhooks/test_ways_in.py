"""Each way in, over real sockets: a port of this process; a receiver, a Prefect server and its event stream."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings
from pydantic import SecretStr

from prefect_eachlabs.cli.main import main
from prefect_eachlabs.engine.runtime import Gateway, LoopThread
from prefect_eachlabs.ledger.rules import PurchaseOptions
from prefect_eachlabs.models import Destination, Item
from prefect_eachlabs.settings import AccountSettings
from prefect_eachlabs.testing.emulator import EmulatorOptions, EmulatorServer
from prefect_eachlabs.webhooks import prefect_events
from prefect_eachlabs.webhooks.calls import Call, callback_of, parse_call, secret_of
from prefect_eachlabs.webhooks.prefect_events import EventForwarder
from prefect_eachlabs.webhooks.receiver import listen_at
from prefect_eachlabs.webhooks.webhooks import Verdict
from tests.limits.local import local_limiter
from tests.memory_store import MemoryStore
from tests.ui.stage import Stage, free_port, until

MASTER = "the secret of all orders' secrets"
PLACE = Destination.parse("s3://bucket/ways")
ORDER = "0" * 32
BODY = json.dumps({"exec_id": "p-1", "status": "succeeded", "output": "https://x.test/1.png"}).encode()


@contextmanager
def buyer(api: EmulatorServer, port: int, **settings: Any) -> Iterator[Gateway]:
    """A process's gateway, whose orders ask for calls at the port."""
    account = AccountSettings(
        api_key=SecretStr("a-key"),
        base_url=api.url,
        requests_per_minute=None,
        webhook_url=f"http://127.0.0.1:{port}/in",
        webhook_secret=SecretStr(MASTER),
        **settings,
    )
    store = MemoryStore()
    thread = LoopThread()
    gateway = Gateway(
        account,
        thread,
        make_limiter=lambda _: local_limiter(requests_per_minute=None, max_in_flight=10),
        store_for=lambda _, __: store,
    )
    try:
        yield gateway
    finally:
        gateway.close()
        thread.stop()


def buy(gateway: Gateway, *numbers: int) -> None:
    async def bought() -> None:
        items = [Item.wanted(f"picture {number}") for number in numbers]
        options = PurchaseOptions(run_id="run")
        await asyncio.gather(*(gateway.engine.generate_and_store(item, PLACE, options=options) for item in items))

    gateway.call(bought())


def counts(gateway: Gateway) -> dict[Verdict, int]:
    return dict(gateway.engine.account.webhooks.counts)


def test_this_process_receives_for_itself_and_gives_its_port_back() -> None:
    port = free_port()
    with EmulatorServer(EmulatorOptions(service_seconds=0.3, spread=0.0, pictures="plain")) as api:
        with buyer(api, port, webhook_listen=f"127.0.0.1:{port}") as gateway:
            buy(gateway, 1)
            buy(gateway, *range(2, 10))
            assert counts(gateway)[Verdict.TAKEN] >= 8
            assert httpx.post(f"http://127.0.0.1:{port}/in?write_id={ORDER}", content=BODY).status_code == 401
            assert httpx.post(f"http://127.0.0.1:{port}/in", content=b"x" * 300_000).status_code in (401, 413)
        assert api.tallies()["billed"] == 9
        with buyer(api, port, webhook_listen=f"127.0.0.1:{port}") as gateway:
            buy(gateway, 10)


def test_accounts_of_one_process_share_its_port() -> None:
    async def story() -> list[int]:
        port = free_port()
        orders = {"the first account's own secret": "0" * 32, "the other account's own secret": "1" * 32}
        takers = [EventForwarder(secret).take for secret in orders]
        closes = [await listen_at(f"127.0.0.1:{port}")(take) for take in takers]
        statuses = []
        async with httpx.AsyncClient() as http:
            for secret, order in orders.items():
                callback = callback_of(f"http://127.0.0.1:{port}", secret, order)
                headers = {"X-Webhook-Secret": callback.secret}
                statuses.append((await http.post(callback.url, content=BODY, headers=headers)).status_code)
        for close in closes:
            await close()
        return statuses

    assert asyncio.run(story()) == [202, 202]


class _Client:
    """A Prefect client whose server is away for a while."""

    def __init__(self, away: int) -> None:
        self.away = away
        self.events: list[dict[str, Any]] = []

    async def __aenter__(self) -> _Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def request(self, _method: str, _path: str, *, json: list[dict[str, Any]]) -> None:
        self.away -= 1
        if self.away >= 0:
            raise httpx.ConnectError("away")
        self.events += json


async def test_calls_wait_for_a_server_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    client = _Client(away=3)
    monkeypatch.setattr(prefect_events, "get_client", lambda **_: client)

    hand_on = EventForwarder(MASTER)
    for number in range(120):
        name = f"{number:032x}"
        assert hand_on.take(Call(BODY, name, secret_of(MASTER, name))) is Verdict.KEPT
    emitting = asyncio.ensure_future(hand_on.run())
    await hand_on.drained()
    emitting.cancel()
    names = [event["payload"]["write_id"] for event in client.events]
    assert names == [f"{number:032x}" for number in range(120)]
    for event in client.events:
        found = parse_call(event["payload"])
        assert found is not None
        assert found.is_proven_by(secret_of(MASTER, found.write_id or ""))
        assert "whs_" not in json.dumps(event)


def test_serve_needs_its_secret_and_a_server_and_nothing_else(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("EACHLABS_API_KEY", "EACHLABS_WEBHOOK_SECRET"):
        monkeypatch.delenv(name, raising=False)
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        assert main(["webhooks", "serve"]) == 2
        assert "EACHLABS_WEBHOOK_SECRET" in capsys.readouterr().err
        monkeypatch.setenv("EACHLABS_WEBHOOK_SECRET", MASTER)
        assert main(["webhooks", "serve"]) == 2
        assert "PREFECT_API_URL" in capsys.readouterr().err


class Receiver:
    """`prefect-eachlabs webhooks serve` in a process of its own, without any key."""

    def __init__(self, port: int, api_url: str, folder: Path) -> None:
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(("EACHLABS", "AWS", "PREFECT"))
        }
        environment = {
            **kept,
            "PREFECT_API_URL": api_url,
            "PREFECT_HOME": str(folder),
            "EACHLABS_WEBHOOK_SECRET": MASTER,
        }
        command = [sys.executable, "-m", "prefect_eachlabs", "webhooks", "serve", "--port", str(port)]
        self._log = (folder / "receiver.log").open("ab")
        self.process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=self._log, start_new_session=True
        )
        assert self.process.stdout is not None
        assert b"Receiving calls" in self.process.stdout.readline()

    def kill(self) -> None:
        self.process.kill()
        self.end()

    def end(self) -> None:
        with suppress(ProcessLookupError):
            self.process.terminate()
        self.process.wait(20)
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._log.close()


@pytest.mark.slow
def test_through_a_receiver_and_a_server_that_are_killed_and_started_again(
    at_server_process: Stage, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers behind a firewall: everything is bought once and stored, whoever is away, and calls come again."""
    server, port = at_server_process, free_port()
    options = EmulatorOptions(service_seconds=1.0, spread=0.0, pictures="plain", webhook_retry_seconds=2.0)
    with EmulatorServer(options) as api:
        receiver = Receiver(port, server.url, tmp_path)
        try:
            with buyer(api, port) as gateway:
                buy(gateway, 1, 2, 3)
                until(lambda: sum(counts(gateway).values()) >= 3, 120, "three calls came as events")

                # Somebody who may emit events, and knows no secret.
                forged = {"write_id": ORDER, "body": BODY.decode(), "signature": "0" * 64}
                httpx.post(f"{server.url}/events", json=[prefect_events.event_of(forged)]).raise_for_status()
                until(lambda: counts(gateway).get(Verdict.REFUSED) == 1, 120, "the forged event was refused")

                receiver.kill()
                before = sum(counts(gateway).values())
                buy(gateway, *range(4, 8))
                receiver = Receiver(port, server.url, tmp_path)
                buy(gateway, *range(8, 12))
                until(lambda: sum(counts(gateway).values()) > before, 120, "calls come again")

                server.stop_server()
                buy(gateway, *range(12, 16))
                before = sum(counts(gateway).values())
                server.start_server()
                until(lambda: sum(counts(gateway).values()) > before, 120, "calls that waited for the server come")
            assert api.tallies()["billed"] == 15
            assert api.tallies()["billed_too_often"] == 0

            for name, value in {
                "EACHLABS_API_KEY": "a-key",
                "EACHLABS_BASE_URL": api.url,
                "EACHLABS_WEBHOOK_URL": f"http://127.0.0.1:{port}/in",
                "EACHLABS_WEBHOOK_SECRET": MASTER,
            }.items():
                monkeypatch.setenv(name, value)
            main(["doctor", "--json"])
            said = {one["about"]: one for one in json.loads(capsys.readouterr().out)["findings"]}
            assert said["webhooks"]["state"] == "ok", said["webhooks"]
            assert "the Prefect server's events" in said["webhooks"]["said"]
        finally:
            receiver.end()
