"""The emulator's server under schemathesis: by the vendor's OpenAPI files, and by the one that its own app makes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from prefect_eachlabs.testing.emulator import EmulatorOptions, create_app
from prefect_eachlabs.testing.emulator.server import EmulatorServer
from tests.testing.test_emulator_contract import FILES

pytest.importorskip("schemathesis", reason="schemathesis 4 needs Python 3.11")

import requests
import schemathesis
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

pytestmark = pytest.mark.slow

EXAMPLES = 20
KEYS = ("x-api-key", "authorization")
KEY = {"X-API-Key": "k"}
LACKS: dict[str, str] = {}
"""Operations of the vendor's files that the emulator does not have, and why: none."""
UNLISTED = {("GET /v1/webhooks", 400): "a limit or an offset out of bounds is refused, as by the other lists"}
"""Answers of the emulator that the vendor's files do not name, and why."""

OPTIONS = EmulatorOptions(
    requests_per_minute=None,
    max_in_flight=None,
    service_seconds=0.2,
    image_size_px=16,
    pictures="plain",
    # An order for a model outside the catalogue is answered by 404, which the vendor's files do not name for orders.
    strict_models=False,
)


@pytest.fixture(scope="module")
def server() -> Iterator[EmulatorServer]:
    with EmulatorServer(OPTIONS) as server:
        yield server


def bought(server: EmulatorServer, count: int = 5) -> list[str]:
    """Ids that the emulator knows, at every stage of their lives."""
    body = {"model": "gemini", "version": "v", "input": {"prompt": "a fox"}}
    order = {"url": f"{server.url}/v1/prediction", "headers": KEY, "json": body, "timeout": 30}
    return [requests.post(**order).json()["predictionID"] for _ in range(count)]


def answered(server: EmulatorServer, case: Any) -> requests.Response:
    """One connection for each case: what is sent may break it. The key is good: what is asked is in question."""
    given = {name: value for name, value in (case.headers or {}).items() if name.lower() not in KEYS}
    case.headers = {**given, **KEY}
    with requests.Session() as session:
        return case.call(base_url=server.url, session=session, timeout=30)


def run_through(operation: Any, check: Callable[[Any], None], ids: list[str]) -> int:
    """Checks valid and invalid requests of an operation; every other one is about an id that exists."""
    seen = 0
    for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
        strategy = operation.as_strategy(generation_mode=mode)

        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=strategy, known=st.none() | st.sampled_from(ids))
        def test(case: Any, known: str | None) -> None:
            nonlocal seen
            seen += 1
            for name in case.path_parameters or {} if known else ():
                case.path_parameters[name] = known
            check(case)

        try:
            test()
        except Exception as error:
            # An operation without parameters cannot be asked wrongly.
            if type(error).__name__ not in ("Unsatisfiable", "SkipTest", "Skipped"):
                raise
    return seen


def operations(schema: Any) -> dict[str, Any]:
    found = {}
    for result in schema.get_all_operations():
        operation = result.ok()
        found[f"{operation.method.upper()} {operation.path}"] = operation
    return found


@pytest.mark.parametrize("name", FILES)
def test_every_operation_of_the_vendor_keeps_its_schema_whatever_is_asked(
    name: str, server: EmulatorServer, require_shared: Callable[[str], Path]
) -> None:
    text = require_shared(name).read_text(encoding="utf-8")
    file = json.loads(text) if name.endswith(".json") else yaml.safe_load(text)
    ids = bought(server)

    def check(case: Any) -> None:
        answer = answered(server, case)
        if (f"{case.operation.method.upper()} {case.operation.path}", answer.status_code) in UNLISTED:
            return
        case.validate_response(
            answer,
            headers=KEY,  # checks ask once more by themselves
            checks=[
                not_a_server_error,
                status_code_conformance,
                content_type_conformance,
                response_headers_conformance,
                response_schema_conformance,
            ],
        )

    asked = 0
    found = operations(schemathesis.openapi.from_dict(file))
    assert len(found) >= 6
    for title, operation in found.items():
        if title not in LACKS:
            asked += run_through(operation, check, ids)
    assert asked >= EXAMPLES * (len(found) - len(LACKS))


def test_nothing_that_the_emulators_own_description_allows_is_a_server_error(server: EmulatorServer) -> None:
    ids = bought(server)
    asked = 0
    found = operations(schemathesis.openapi.from_dict(create_app(OPTIONS).openapi()))
    assert "GET /_emulator/journal" in found
    for title, operation in found.items():
        if title.endswith("/"):
            continue  # the same with a slash

        asked += run_through(
            operation,
            lambda case: case.validate_response(answered(server, case), headers=KEY, checks=[not_a_server_error]),
            ids,
        )
    assert asked > 10 * EXAMPLES, "what takes no parameter is asked once"
