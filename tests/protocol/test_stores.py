"""Stores that ignore conditional writes are found out before anything is bought, and before a record is lost."""

from __future__ import annotations

import pytest

from prefect_eachlabs.errors import SetupError
from tests.protocol.kit import Fault, World, wanted

A = wanted(1)


@pytest.mark.parametrize("fault", [None, "lose"])
async def test_a_store_that_ignores_conditions_is_found_out_before_anything_is_bought(fault: Fault | None) -> None:
    world = World(honours_conditions=False)
    process = world.process(by_name=[("S3 PUT", fault, 1)] if fault else [])
    with pytest.raises(SetupError, match="EACHLABS_CONDITIONAL_WRITES=ignore"):
        await process.obtain(A)
    assert process.count("POST") == 0


async def test_a_store_that_ignores_conditions_may_be_used_on_purpose() -> None:
    world = World(honours_conditions=False)
    await world.process(conditional_writes="ignore").obtain(A)
    world.check([A])


@pytest.mark.parametrize("conditional_writes", ["require", "ignore"])
async def test_what_is_presumed_new_and_is_not_keeps_its_record_in_a_store_that_ignores_conditions(
    conditional_writes: str,
) -> None:
    world = World(honours_conditions=False)
    await world.process(conditional_writes="ignore").obtain(A)
    again = world.process(conditional_writes=conditional_writes)
    assert (await again.obtain(A, presume_new=True)).reused
    world.check([A])


async def test_what_is_presumed_new_and_is_not_is_refused_by_the_bucket() -> None:
    world = World()
    await world.process().obtain(A)
    process = world.process()
    await process.obtain(wanted(7))
    assert (await process.obtain(A, presume_new=True)).reused
    world.check([A, wanted(7)])
