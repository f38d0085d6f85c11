"""Runs that die around their POST, and others in the organization who buy at the same time."""

from __future__ import annotations

from typing import Any

from prefect_eachlabs.models import Item
from tests.protocol.kit import Process, World, order, wanted

A, B, C = wanted(1), wanted(2), wanted(3)


async def lost(world: World, item: Item, **given: Any) -> Process:
    """A process that died when its POST had taken effect."""
    process = world.process(die_at="after POST", **given)
    await process.dies(process.obtain(item))
    return process


async def abandoned(world: World, item: Item) -> Process:
    """A process that died right before its POST."""
    process = world.process(die_at="before POST")
    await process.dies(process.obtain(item))
    return process


def others_buy(world: World, item: Item, times: int = 1) -> None:
    """Other keys of the organization."""
    for _ in range(times):
        world.emulator.announce_foreign(order(item), base_url="https://api.invalid")
    world.emulator.ledger.settle(world.now())
