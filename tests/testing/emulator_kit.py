"""The emulator, called without a socket, on a clock that stands still until a test moves it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import httpx

from prefect_eachlabs.testing.emulator import Clock, Emulator, EmulatorOptions, InProcessTransport
from tests.virtual_time import run

T = TypeVar("T")

KEY = "a-test-key"
ORDER = {"model": "gemini", "input": {"prompt": "a red fox"}}


class Api:
    """An emulator at second 1,000: `api.time += 5` moves it."""

    def __init__(self, key: str | None = KEY, **options: Any) -> None:
        self.time = 1_000.0
        told = EmulatorOptions(**{"spread": 0.0, "image_size_px": 32, **options})
        self.emulator = Emulator(told, clock=Clock(lambda: self.time), threads=False)
        self.transport = InProcessTransport(self.emulator)
        self.headers = {} if key is None else {"X-API-Key": key}

    def call(self, method: str, path: str, **request: Any) -> httpx.Response:
        async def asked() -> httpx.Response:
            async with httpx.AsyncClient(
                transport=self.transport, base_url="http://emulator", headers=self.headers
            ) as http:
                return await http.request(method, path, **request)

        return asyncio.run(asked())

    def create(self, prompt: str = "a red fox", **body: Any) -> httpx.Response:
        return self.call("POST", "/v1/prediction/", json={"model": "gemini", "input": {"prompt": prompt}, **body})

    def buy(self, prompt: str = "a red fox", **body: Any) -> str:
        answer = self.create(prompt, **body)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["predictionID"])

    def get(self, prediction_id: str) -> dict[str, Any]:
        answer = self.call("GET", f"/v1/prediction/{prediction_id}")
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def rows(self, **query: Any) -> list[dict[str, Any]]:
        return list(self.page(**query)["executions"])

    def page(self, **query: Any) -> dict[str, Any]:
        answer = self.call("GET", "/v1/executions", params=query)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def download(self, url: str, **request: Any) -> httpx.Response:
        """As the file host is asked: without a key."""
        return self.call("GET", url, **{"headers": {"X-API-Key": ""}, **request})

    def tallies(self) -> dict[str, Any]:
        return self.emulator.tallies()


def in_virtual_time(story: Callable[[httpx.AsyncClient, Emulator], Awaitable[T]], **options: Any) -> T:
    """Tells a story on a loop whose time jumps, for what takes its time."""
    transport = InProcessTransport(EmulatorOptions(**{"spread": 0.0, "image_size_px": 32, **options}))

    async def told() -> T:
        headers = {"X-API-Key": KEY}
        async with httpx.AsyncClient(
            transport=transport, base_url="http://emulator", headers=headers, timeout=None
        ) as http:
            return await story(http, transport.emulator)

    return run(told())
