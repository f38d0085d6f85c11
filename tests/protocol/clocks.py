"""What a machine's clock says, and what a frozen process does not notice, on the loop's virtual time."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine
from datetime import datetime, timedelta, timezone, tzinfo
from typing import Any, TypeVar

import pytest

from prefect_eachlabs.api import client as client_room
from tests.virtual_time import here

T = TypeVar("T")

MACHINE_DATE = datetime(2026, 11, 22, 9, 0, tzinfo=timezone.utc)
"""The machines' date when the loop's clock says 0. The bucket's is another one, so nobody may compare the two."""


class MachineDatetime(datetime):
    """`datetime` whose now is the loop's time, off by the error of the machine whose code asks."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
        machine = here.get()
        seconds = asyncio.get_running_loop().time() + (machine.clock_error_seconds if machine else 0.0)
        return (MACHINE_DATE + timedelta(seconds=seconds)).astimezone(tz)


async def within_running_seconds(work: Coroutine[Any, Any, T], seconds: float) -> T:
    """As the client's own, for a process that the kit has frozen: its timers stand still."""
    machine = here.get()
    task = asyncio.ensure_future(work)
    while seconds > 0 and not task.done():
        await asyncio.wait({task}, timeout=min(seconds, 1.0))
        if machine is None or not machine.is_frozen:
            seconds -= 1.0
    if task.done():
        return task.result()
    task.cancel()
    await asyncio.wait({task})
    raise asyncio.TimeoutError


def patched_clocks() -> Callable[[], None]:
    """The rooms that ask a machine what time it is ask the loop, until what is returned is called."""
    patch = pytest.MonkeyPatch()
    for name, room in list(sys.modules.items()):
        if name.startswith("prefect_eachlabs.") and getattr(room, "datetime", None) is datetime:
            patch.setattr(room, "datetime", MachineDatetime)
    patch.setattr(client_room, "within_running_seconds", within_running_seconds)
    return patch.undo
