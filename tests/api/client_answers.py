"""A client whose answers are made up, in virtual time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import httpx

from prefect_eachlabs.api.client import EachlabsClient
from prefect_eachlabs.models import Item, Prediction
from prefect_eachlabs.settings import AccountSettings
from tests.virtual_time import run

KEY = "sk-very-secret-0123456789"
ITEM = Item.wanted("a fox in the snow", item_id="fox")
BASE_URL = "https://api.eachlabs.invalid"


def settings(**given: Any) -> AccountSettings:
    return AccountSettings(**{"api_key": KEY, "base_url": BASE_URL, **given})


def answered(answer: Any, ask: Callable[[EachlabsClient], Awaitable[Any]], **given: Any) -> Any:
    """What the client makes of an answer (a response, an exception, or a handler), in virtual time."""

    def handler(request: httpx.Request) -> httpx.Response:
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, httpx.Response):
            return answer
        response: httpx.Response = answer(request)
        return response

    async def story() -> Any:
        client = EachlabsClient(settings(**given), transport=httpx.MockTransport(handler))
        try:
            return await ask(client)
        finally:
            await client.aclose()

    return run(story())


def create(client: EachlabsClient) -> Awaitable[Prediction]:
    return client.create(ITEM)


def get(client: EachlabsClient) -> Awaitable[Prediction]:
    return client.get("p-1")


def cancel(client: EachlabsClient) -> Awaitable[None]:
    return client.cancel("p-1")


def executions(client: EachlabsClient) -> Awaitable[Any]:
    return client.executions()
