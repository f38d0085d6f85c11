"""The work pool's template: whoever starts a run chooses its parameters, and nothing of the process that runs it.

The template that Prefect makes for a pool of processes takes `command`, `env` and `working_dir` from the run's job
variables, which the Run form and the API let anybody fill in who may start a run: that is any command on the workers,
with every key there. Here nothing is a job variable, and the server refuses those that are given nevertheless.
"""

from __future__ import annotations

from typing import Any

from prefect.utilities.templating import PlaceholderType, find_placeholders


def closed_template() -> dict[str, Any]:
    """A template without job variables."""
    return _template({"stream_output": True})


def openings(template: dict[str, Any]) -> list[str]:
    """The job variables that reach the process, by name; none where the pool is closed."""
    configuration = template.get("job_configuration", {})
    found = {one.name for one in find_placeholders(configuration) if one.type is PlaceholderType.STANDARD}
    # Prefect merges a run's `env` into that of the template, be it written out or a variable's default.
    default = template.get("variables", {}).get("properties", {}).get("env", {}).get("default")
    return sorted(found | ({"env"} if default or isinstance(configuration.get("env"), dict) else set()))


def closed(template: dict[str, Any]) -> dict[str, Any] | None:
    """The same with the variables' defaults written in; None where it would set `env`, which stays open."""
    variables = template.get("variables", {}).get("properties", {})
    configuration = {}
    for field, value in template.get("job_configuration", {}).items():
        whole = next((one for one in find_placeholders(value) if one.full_match == value), None)
        if whole is not None and whole.type is PlaceholderType.STANDARD:
            value = variables.get(whole.name, {}).get("default")  # noqa: PLW2901 - what it says without a job variable
        if value not in (None, {}):
            configuration[field] = value
    result = _template(configuration)
    return None if openings(result) or variables.get("env", {}).get("default") else result


def _template(configuration: dict[str, Any]) -> dict[str, Any]:
    # Without additionalProperties the server would take job variables and pass them on unused.
    schema = {"type": "object", "properties": {}, "additionalProperties": False}
    return {"job_configuration": configuration, "variables": schema}
