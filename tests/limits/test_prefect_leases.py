"""What a Prefect server's answers mean to `PrefectLeases`, against a server that says what the test tells it to."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Coroutine, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect.settings import PREFECT_API_KEY, PREFECT_API_URL, PREFECT_CLIENT_CSRF_SUPPORT_ENABLED, temporary_settings

from prefect_eachlabs.limits.leases import Denied, Kind, LeaseGone, ServerAway
from prefect_eachlabs.limits.prefect_leases import PrefectLeases

Answer = tuple[int, str]


class Scripted:
    """Answers requests one after the other as told, then as the last time."""

    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self.requests: list[tuple[str, str, Any]] = []
        scripted = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                scripted.requests.append((self.command, self.path, json.loads(body) if body else None))
                status, text = scripted.answers.pop(0) if len(scripted.answers) > 1 else scripted.answers[0]
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())

            do_GET = do_POST = _answer

            def log_message(self, *_: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/api"

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scripted]:
    monkeypatch.setattr("random.uniform", lambda low, high: 0.0)  # no pause before a repeated call
    server = Scripted()
    settings = {PREFECT_API_URL: server.url, PREFECT_CLIENT_CSRF_SUPPORT_ENABLED: False, PREFECT_API_KEY: "pnu_secret"}
    try:
        with temporary_settings(settings):
            yield server
    finally:
        server.stop()


def ask(call: Callable[[PrefectLeases], Coroutine[Any, Any, Any]]) -> Any:
    async def story() -> Any:
        leases = PrefectLeases("acme")
        try:
            return await call(leases)
        finally:
            await leases.close()

    return asyncio.run(story())


def granted(lease_id: UUID, *names: str) -> str:
    return json.dumps(
        {"lease_id": str(lease_id), "limits": [{"id": str(uuid4()), "name": n, "limit": 60} for n in names]}
    )


def test_a_lease_says_its_id_and_the_servers_number(server: Scripted) -> None:
    lease_id = uuid4()
    server.answers = [(200, granted(lease_id, "eachlabs-requests-acme"))]
    result = ask(lambda leases: leases.lease(Kind.REQUESTS, 3, 60))
    assert (result.lease_id, result.limit) == (str(lease_id), 60)
    ((_, _, body),) = server.requests
    assert body["lease_duration"] >= 60
    assert (body["names"], body["slots"]) == (["eachlabs-requests-acme"], 3)


@pytest.mark.parametrize(
    ("answer", "meaning"),
    [
        ((423, "{}"), Denied),
        ((422, '{"detail": "Slots requested is greater than the limit"}'), Denied),
        ((410, "{}"), LeaseGone),
        ((500, "oops"), ServerAway),
        ((401, "{}"), ServerAway),
        ((200, "<html>not Prefect</html>"), ServerAway),
        ((200, "[]"), ServerAway),
        ((200, "{}"), ServerAway),
    ],
)
def test_every_answer_has_one_meaning(server: Scripted, answer: Answer, meaning: type[Exception]) -> None:
    server.answers = [answer]
    with pytest.raises(meaning):
        ask(lambda leases: leases.lease(Kind.REQUESTS, 3, 60))
    assert len(server.requests) == 1


def test_a_locked_database_is_asked_again(server: Scripted) -> None:
    server.answers = [(503, "{}"), (503, "{}"), (204, "")]
    ask(lambda leases: leases.renew(str(uuid4())))
    assert len(server.requests) == 3


def test_a_database_that_stays_locked_is_an_absence(server: Scripted) -> None:
    server.answers = [(503, "{}")]
    with pytest.raises(ServerAway, match="503"):
        ask(lambda leases: leases.release(str(uuid4())))
    assert len(server.requests) == 4


def test_a_refused_key_says_which_setting_to_look_at_and_not_the_key(server: Scripted) -> None:
    server.answers = [(401, "{}")]
    with pytest.raises(ServerAway, match="PREFECT_API_KEY") as caught:
        ask(lambda leases: leases.taken(Kind.REQUESTS))
    assert "pnu_secret" not in str(caught.value)


def test_the_address_is_shown_without_what_is_secret_in_it() -> None:
    with temporary_settings({PREFECT_API_URL: "http://me:secret@127.0.0.1:4200/api?token=secret"}):
        assert PrefectLeases("acme").where == "http://127.0.0.1:4200/api"
