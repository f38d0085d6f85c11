"""The flows for async callers: the same flows, awaited, with the same task runs, results and errors."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from prefect import flow

from prefect_eachlabs.errors import BatchIncomplete
from prefect_eachlabs.flows import agenerate_batch, agenerate_image, ascheduled_image, asettle_leftovers
from tests.flows.flow_fixtures import Studio

pytestmark = pytest.mark.usefixtures("prefect_server")


def test_an_async_flow_awaits_the_others_and_is_raised_their_errors(
    studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EACHLABS_REFERENCE_ROOTS", str(tmp_path))
    (tmp_path / "zoo.csv").write_text("id,prompt\na,a fox\nb,\n")

    @flow(name="async-parent")
    async def parent() -> list[str]:
        image = await agenerate_image("a red fox", studio.destination, item_id="fox", formats=("png", "jpeg"))
        dated = await ascheduled_image("a fox on a {date:%A}", studio.destination, "dated")
        try:
            await agenerate_batch(tmp_path / "zoo.csv", studio.destination)
        except BatchIncomplete as error:
            told = str(error)
        counts = await asettle_leftovers(studio.destination)
        return [image.uri, dated.uri, told, str(counts["records"])]

    fox, dated, told, records = asyncio.run(parent())  # type: ignore[arg-type]  # Prefect types flows for both worlds
    assert (fox, dated) == (f"{studio.destination}/images/fox.png", f"{studio.destination}/images/dated.png")
    assert told.startswith("1 stored, 0 reused, 1 failed (1 bad input) of 2")
    assert records == "3"
    assert studio.billed == 3
