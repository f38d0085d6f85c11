"""A work pool in which whoever starts a run chooses its parameters and no command: also of templates made by hand."""

from __future__ import annotations

import asyncio

import pytest
from prefect.workers.process import ProcessJobConfiguration

from prefect_eachlabs.cli.work_pool import closed, closed_template, openings


@pytest.mark.usefixtures("prefect_server")
def test_an_env_that_is_a_variables_default_alone_is_open_and_is_not_called_closed() -> None:
    template = closed_template()
    template["variables"]["properties"]["env"] = {"type": "object", "default": {"HTTPS_PROXY": "http://proxy:3128"}}
    chosen = {"env": {"LD_PRELOAD": "/tmp/x.so"}}
    configuration = asyncio.run(ProcessJobConfiguration.from_template_and_values(template, chosen))
    assert configuration.env["LD_PRELOAD"], "Prefect takes it no more: then it may be a default"
    assert openings(template) == ["env"]
    assert closed(template) is None
