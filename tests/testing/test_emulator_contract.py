"""The emulator's answers against the vendor's two OpenAPI files: status, content type and schema of each.

What the files have and the emulator has not, because nobody here asks for it: synchronous runs, deleting files, and
filters of executions other than model and dates.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
import yaml
from referencing import Registry
from referencing.jsonschema import DRAFT202012

from tests.testing.emulator_kit import Api
from tests.testing.test_emulator_webhooks import called

CONTRACT = "urn:contract"
FILES = ["eachlabs-openapi-2025-12.yaml", "eachlabs-openapi-2026-08.json"]


def in_json_schema(node: Any) -> Any:
    """OpenAPI 3.0's `nullable` in JSON Schema's words; references lead to the contract, wherever they stand."""
    if isinstance(node, list):
        return [in_json_schema(inner) for inner in node]
    if not isinstance(node, dict):
        return node
    plain = {name: in_json_schema(inner) for name, inner in node.items() if name not in ("nullable", "example")}
    if "$ref" in plain:
        return {"$ref": CONTRACT + str(plain["$ref"])}
    if node.get("nullable") is True and ("type" in plain or "oneOf" in plain):
        return {"anyOf": [plain, {"type": "null"}]}
    return plain


class Contract:
    """One of the vendor's files: checks an answer against what it says of method, path and status."""

    def __init__(self, path: Path) -> None:
        text = path.read_text(encoding="utf-8")
        self.file = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
        self.components = in_json_schema(self.file["components"])
        whole = DRAFT202012.create_resource({"components": self.components})
        self.registry = Registry().with_resource(CONTRACT, whole)

    def knows(self, method: str, path: str) -> bool:
        return method.lower() in self.file["paths"].get(path, {})

    def schema(self, method: str, path: str, status: int) -> dict[str, Any] | None:
        answer = self.file["paths"][path][method.lower()]["responses"].get(str(status))
        assert answer is not None, f"{method} {path} is never answered by {status}"
        if "$ref" in answer:
            answer = self.file["components"]["responses"][answer["$ref"].rsplit("/", 1)[1]]
        schema = answer.get("content", {}).get("application/json", {}).get("schema")
        return None if schema is None else in_json_schema(schema)

    def check(self, answer: httpx.Response, path: str) -> None:
        schema = self.schema(answer.request.method, path, answer.status_code)
        if schema is None:
            assert answer.content == b""
            return
        assert answer.headers["content-type"] == "application/json"
        self.validate(answer.json(), schema)

    def validate(self, value: Any, schema: dict[str, Any]) -> None:
        jsonschema.Draft202012Validator(
            schema, registry=self.registry, format_checker=jsonschema.FormatChecker()
        ).validate(value)


@pytest.fixture(params=FILES, scope="module")
def contract(request: pytest.FixtureRequest, require_shared: Callable[[str], Path]) -> Contract:
    return Contract(require_shared(str(request.param)))


GET, CANCEL = "/v1/prediction/{id}", "/v1/prediction/{id}/cancel"


@pytest.mark.parametrize(
    "fault",
    [
        "none",
        "fail",
        "fail_logs",
        "fail_text",
        "fail_moderation",
        "fail_under_success",
        "output_list",
        "output_object",
        "output_images",
        "output_json",
        "output_empty",
    ],
)
def test_a_prediction_keeps_the_contract_all_its_life(contract: Contract, fault: str) -> None:
    api = Api(faults=[] if fault == "none" else [f"prediction:{fault}"])
    created = api.create(version="0.0.1")
    contract.check(created, "/v1/prediction")
    bought = created.json()["predictionID"]
    for _ in range(7):
        contract.check(api.call("GET", f"/v1/prediction/{bought}"), GET)
        if contract.knows("GET", "/v1/executions"):
            contract.check(api.call("GET", "/v1/executions"), "/v1/executions")
        api.time += 1
    if contract.knows("POST", CANCEL):
        contract.check(api.call("POST", f"/v1/prediction/{bought}/cancel"), CANCEL)


def test_a_cancelled_prediction_keeps_the_contract(contract: Contract) -> None:
    api = Api()
    bought = api.buy()
    answer = api.call("POST", f"/v1/prediction/{bought}/cancel")
    if contract.knows("POST", CANCEL):
        contract.check(answer, CANCEL)
    contract.check(api.call("GET", f"/v1/prediction/{bought}"), GET)


@pytest.mark.parametrize(
    ("method", "path", "template", "body"),
    [
        ("POST", "/v1/prediction", "/v1/prediction", {}),
        ("POST", "/v1/prediction", "/v1/prediction", {"model": "gemini", "input": {}}),
        ("GET", "/v1/prediction/none", GET, None),
        ("POST", "/v1/prediction/none/cancel", CANCEL, None),
        ("GET", "/v1/executions?limit=101", "/v1/executions", None),
        ("GET", "/v1/models", "/v1/models", None),
        ("GET", "/v1/models?limit=0", "/v1/models", None),
        ("GET", "/v1/model?slug=gemini", "/v1/model", None),
        ("GET", "/v1/model?slug=imagen-4", "/v1/model", None),
        ("GET", "/v1/model", "/v1/model", None),
        ("GET", "/v1/model?slug=none", "/v1/model", None),
        ("POST", "/v1/upload/presign", "/v1/upload/presign", {"content_type": "image/png"}),
        ("POST", "/v1/upload/presign", "/v1/upload/presign", {}),
    ],
)
def test_every_endpoint_keeps_the_contract(
    contract: Contract, method: str, path: str, template: str, body: dict[str, Any] | None
) -> None:
    if not contract.knows(method, template):
        assert template not in ("/v1/prediction", GET, "/v1/models", "/v1/model"), "in both files"
        return
    contract.check(Api().call(method, path, json=body), template)


@pytest.mark.parametrize(
    ("options", "key", "status"),
    [
        ({}, None, 401),
        ({"requests_per_minute": 1}, "k", 429),
        ({"max_in_flight": 1}, "k", 429),
        ({"balance_usd": 0.04}, "k", 402),
        ({"faults": ["create:error,at=2"]}, "k", 503),
        ({"faults": ["create:error_after,at=2"]}, "k", 500),
    ],
)
def test_every_error_is_one_that_the_contract_knows(
    contract: Contract, options: dict[str, Any], key: str | None, status: int
) -> None:
    api = Api(key=key, **options)
    api.create()
    answer = api.create()
    assert answer.status_code == status
    contract.validate(answer.json(), {"$ref": f"{CONTRACT}#/components/schemas/Error"})


def test_the_lists_of_webhooks_are_those_of_the_contract(contract: Contract) -> None:
    hook, page, one = called(errors=5)
    contract.validate(page, contract.schema("GET", "/v1/webhooks", 200) or {})
    contract.validate(one, contract.schema("GET", "/v1/webhooks/{execution_id}", 200) or {})
    assert [attempt["status"] for attempt in one["attempts"]] == ["FAILED"] * 3
    assert len(hook.calls) == 3


def test_the_orders_that_the_contract_shows_are_taken(contract: Contract) -> None:
    example = contract.file["paths"]["/v1/prediction"]["post"]["requestBody"]["content"]["application/json"]["example"]
    example = {**example, "webhook_url": "http://127.0.0.1:1/"}
    assert Api().call("POST", "/v1/prediction", json=example).status_code == 200
    schema = contract.components["schemas"]["CreatePredictionRequest"]
    order = {"model": "gemini", "version": "v", "input": {"prompt": "a fox"}, "webhook_url": "http://127.0.0.1:1/"}
    contract.validate(order, schema)
    assert Api().call("POST", "/v1/prediction", json=order).status_code == 200
    required = set(schema["required"])
    api = Api(require_version="version" in required)
    for missing in required:
        body = {name: value for name, value in order.items() if name != missing}
        assert api.call("POST", "/v1/prediction", json=body).status_code == 400, missing


def test_the_query_of_executions_has_the_bounds_of_the_contract(contract: Contract) -> None:
    if not contract.knows("GET", "/v1/executions"):
        return
    parameters = contract.file["paths"]["/v1/executions"]["get"]["parameters"]
    limit = next(one["schema"] for one in parameters if one["name"] == "limit")
    api = Api()
    assert api.call("GET", "/v1/executions").json()["limit"] == limit["default"]
    for asked, status in ((limit["minimum"] - 1, 400), (limit["minimum"], 200), (limit["maximum"], 200)):
        assert api.call("GET", "/v1/executions", params={"limit": asked}).status_code == status
    assert api.call("GET", "/v1/executions", params={"limit": limit["maximum"] + 1}).status_code == 400
