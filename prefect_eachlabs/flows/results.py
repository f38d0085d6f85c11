"""How the flows' results are kept where an operator has Prefect keep results."""

from __future__ import annotations

from typing import ParamSpec, TypeVar

from prefect import Flow

P = ParamSpec("P")
R = TypeVar("R")


def kept_as_json(flow: Flow[P, R]) -> Flow[P, R]:
    """Has a flow's results kept as JSON, where they are kept: Prefect's own choice is pickle.

    As an argument of `flow` it would have them kept everywhere.
    """
    flow.result_serializer = "json"
    return flow
