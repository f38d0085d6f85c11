"""The deployments of deployments/prefect.yaml, made by Prefect's own `deploy`: `prefect-eachlabs setup --deploy`."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]  # its types are another package
from prefect.exceptions import ObjectNotFound
from prefect.settings import get_current_settings
from prefect.utilities.callables import parameter_schema
from prefect.utilities.importtools import import_object

from prefect_eachlabs.blocks import S3Destination
from prefect_eachlabs.errors import SetupError

IN_A_WHEEL = Path(__file__).with_name("prefect.yaml")
IN_A_CLONE = Path(__file__).parents[2] / "deployments" / "prefect.yaml"
PRESET = f"{S3Destination.get_block_type_slug()}/default"


def deploy(client: Any, block: str) -> dict[str, str]:
    """Makes the deployments, or makes those that are there anew. Blocks for some seconds each.

    What a person has set on the server stays: the parameters, and whether and when they are scheduled.

    Args:
        client: Of the server, blocking.
        block: The name of the destination's block, which the forms are filled in with where it is there.

    Returns:
        `FLOW/NAME` → `made` or `updated`.

    Raises:
        SetupError: Prefect refuses them; says why.
    """
    file = IN_A_WHEEL if IN_A_WHEEL.is_file() else IN_A_CLONE
    wanted = yaml.safe_load(file.read_text(encoding="utf-8"))
    try:
        client.read_block_document_by_name(block, S3Destination.get_block_type_slug())
        preset = {"destination": PRESET.replace("default", block)}
    except ObjectNotFound:
        preset = {}  # the workers' EACHLABS_DESTINATION says where
    done = {}
    for one in wanted["deployments"]:
        flow = import_object(one["entrypoint"])
        given = one.get("parameters") or {}
        if given.pop("destination", None) == PRESET:
            given |= preset
        try:
            there = client.read_deployment_by_name(f"{flow.name}/{one['name']}")
        except ObjectNotFound:
            there = None
        else:
            fields = parameter_schema(flow).properties
            given |= {name: value for name, value in there.parameters.items() if name in fields}
            one.pop("schedules", None)
        one["parameters"] = given
        done[f"{flow.name}/{one['name']}"] = "made" if there is None else "updated"
    _deploy(wanted)
    return done


def _deploy(wanted: dict[str, Any]) -> None:
    # In an empty folder: Prefect would look for a repository around it, to clone on the workers.
    with tempfile.TemporaryDirectory(prefix="eachlabs-deploy-") as folder:
        Path(folder, "prefect.yaml").write_text(yaml.safe_dump(wanted, sort_keys=False), encoding="utf-8")
        command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
        environment = {**os.environ, **get_current_settings().to_environment_variables(exclude_unset=True)}
        ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if ran.returncode:
        said = " ".join((ran.stderr or ran.stdout).split())
        raise SetupError(f"Prefect did not take the deployments: {said[-500:]}")
