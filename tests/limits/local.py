"""The limits of one process alone, which nobody shares: for what is not about sharing them."""

from __future__ import annotations

import itertools

from prefect_eachlabs.limits.leases import Granted, Kind
from prefect_eachlabs.limits.limiter import RateLimiter
from prefect_eachlabs.settings import AccountSettings


class OwnLeases:
    """`Leases` that are all this process's."""

    where = "(this process)"
    parts = 100
    turn_seconds = 0.0
    spread = 0.0
    loses_slots = False

    def __init__(self) -> None:
        self._numbers = itertools.count()

    async def lease(self, kind: Kind, slots: int, limit: int) -> Granted:
        return Granted(str(next(self._numbers)), limit)

    async def renew(self, lease_id: str) -> None: ...

    async def release(self, lease_id: str) -> None: ...

    async def taken(self, kind: Kind) -> int:
        return 0

    async def close(self) -> None: ...


def local_limiter(*, requests_per_minute: int | None, max_in_flight: int | None) -> RateLimiter:
    settings = AccountSettings(api_key="key", requests_per_minute=requests_per_minute, max_in_flight=max_in_flight)
    return RateLimiter(settings, OwnLeases())
