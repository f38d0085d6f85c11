"""The automation that ends runs whose machine died: Prefect's heartbeats, and what the server does when they stop.

A run beats every PREFECT_FLOWS_HEARTBEAT_FREQUENCY (180 s) while its process lives. Without this a run whose machine
died stays Running, and a deployment that takes one run at a time cancels all that follow.
"""

from __future__ import annotations

from typing import Any

DEAD_RUNS = "eachlabs-end-dead-runs"
BEATS = 3.5
"""So many beats fail to come before a run counts as dead: one may be lost, or late."""
_ENDS = ("Completed", "Failed", "Cancelled", "Crashed")


def seconds_between_beats() -> int | None:
    """As this environment says; None: no beats."""
    from prefect.settings import get_current_settings  # noqa: PLC0415 - heavy

    return get_current_settings().flows.heartbeat_frequency


def dead_runs(beat_seconds: int) -> dict[str, Any]:
    """The automation, as the server's API takes it."""
    beat = "prefect.flow-run.heartbeat"
    return {
        "name": DEAD_RUNS,
        "description": "Ends runs of prefect-eachlabs as Crashed when their heartbeats stop: their machine has died.",
        "enabled": True,
        "trigger": {
            "type": "event",
            "posture": "Proactive",
            "after": [beat],
            "expect": [beat, *(f"prefect.flow-run.{end}" for end in _ENDS)],
            "match": {"prefect.resource.id": "prefect.flow-run.*"},
            "match_related": {"prefect.resource.role": "tag", "prefect.resource.id": "prefect.tag.eachlabs"},
            "for_each": ["prefect.resource.id"],
            "threshold": 1,
            "within": BEATS * beat_seconds,
        },
        "actions": [
            {
                "type": "change-flow-run-state",
                "state": "CRASHED",
                "message": "Its heartbeats stopped: its machine or its process has died.",
            }
        ],
    }


def find(client: Any) -> dict[str, Any] | None:
    """The automation as it stands on the server."""
    named = {"automations": {"name": {"any_": [DEAD_RUNS]}}}
    found: list[dict[str, Any]] = client.request("POST", "/automations/filter", json=named).json()
    return found[0] if found else None


def make(client: Any) -> str:
    """`made`, `there` (as a person may have changed it), or `none` where this environment's runs do not beat."""
    if find(client) is not None:
        return "there"
    beat_seconds = seconds_between_beats()
    if beat_seconds is None:
        return "none"
    client.request("POST", "/automations/", json=dead_runs(beat_seconds))
    return "made"
