"""What is wanted: checked before it costs, called by its fingerprint, kept where the contract says."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_eachlabs.errors import BadInput
from prefect_eachlabs.models import Destination, Item, canonical_json, fingerprint_of, without_signature

URL = "https://files.invalid/p-1.png"

# -------------------------------------------------------------------------------- items


def test_the_fingerprint_is_what_the_documentation_says() -> None:
    """The first 32 hex digits of the SHA-256 of the sorted, compact UTF-8 JSON of {model, version, input}."""
    text = '{"input":{"a":1,"prompt":"ü"},"model":"gemini","version":null}'
    assert canonical_json({"model": "gemini", "version": None, "input": {"prompt": "ü", "a": 1}}) == text.encode()
    assert fingerprint_of("gemini", None, {"prompt": "ü", "a": 1}) == hashlib.sha256(text.encode()).hexdigest()[:32]


def test_an_item_without_an_id_is_called_by_its_fingerprint() -> None:
    item = Item.wanted("a fox")
    assert item.item_id == item.fingerprint
    assert item.version == "2.0-flash-exp-image-generation"
    assert Item.wanted("a fox", model="flux-1-1-pro").version is None
    assert Item.wanted("a fox").fingerprint == Item.wanted("a fox", item_id="x", labels={"a": "b"}).fingerprint
    assert Item.wanted("a fox").fingerprint != Item.wanted("a fox ").fingerprint


def test_the_order_of_fields_does_not_matter_and_their_values_do() -> None:
    one = Item.wanted("a", input={"x": 1, "y": [1, 2]})
    assert one.fingerprint == Item.wanted("a", input={"y": [1, 2], "x": 1}).fingerprint
    assert one.fingerprint != Item.wanted("a", input={"x": 1, "y": [2, 1]}).fingerprint


@pytest.mark.parametrize(
    ("given_fields", "where"),
    [
        ({}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": " \n\u200b\ufeff"}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": "a", "image_url": "no url"}, "image_url"),
        ({"prompt": "a", "image_url": "file:///etc/passwd"}, "image_url"),
        ({"prompt": "a", "image_url": "https://user:pass@"}, "image_url"),
        ({"prompt": "a", "item_id": ""}, "item_id"),
        ({"prompt": "a", "item_id": "a/b"}, "item_id"),
        ({"prompt": "a", "item_id": "x" * 129}, "item_id"),
        ({"prompt": "a", "model": ""}, "model"),
        ({"prompt": "a", "model": "a b"}, "model"),
        ({"prompt": "a", "version": " "}, "version"),
        ({"prompt": "a\ud800"}, "surrogate"),
        ({"prompt": "a", "input": {"x": float("nan")}}, "JSON"),
        ({"prompt": "a", "input": {"x": object()}}, "JSON"),
        ({"prompt": "a", "input": {"x\ud800": 1}}, "surrogate"),
    ],
)
def test_a_bad_input_is_refused_before_it_costs_saying_what_and_how_to_mend_it(
    given_fields: dict[str, Any], where: str
) -> None:
    with pytest.raises(BadInput, match=where) as refused:
        Item.wanted(**given_fields)
    str(refused.value).encode()
    assert "user:pass" not in str(refused.value)


@given(st.text(min_size=1), st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), max_size=3))
def test_an_item_is_refused_or_survives_json_unchanged(prompt: str, input: dict[str, Any]) -> None:
    input.pop("prompt", None)
    input.pop("image_url", None)
    try:
        item = Item.wanted(prompt, input=input)
    except BadInput:
        return
    assert item.input == {**input, "prompt": prompt}
    assert Item.model_validate_json(item.model_dump_json()) == item
    body = json.loads(json.dumps(item.request_body(), ensure_ascii=False).encode())
    assert fingerprint_of(body["model"], body["version"], body["input"]) == item.fingerprint


def test_a_presigned_query_does_not_count_where_inputs_are_compared() -> None:
    signed = f"{URL}?X-Amz-Signature=abc&X-Amz-Date=1"
    assert without_signature(signed) == URL
    assert without_signature(f"{URL}?size=2") == f"{URL}?size=2"
    assert without_signature("what is this?signature=1") == "what is this?signature=1"


# -------------------------------------------------------------------------- destinations


@pytest.mark.parametrize(
    ("text", "bucket", "prefix"),
    [
        ("s3://acme", "acme", ""),
        ("s3://acme/", "acme", ""),
        ("s3://acme/daily", "acme", "daily"),
        ("s3://acme/daily/2026/", "acme", "daily/2026"),
        ("s3://acme/ü b", "acme", "ü b"),
    ],
)
def test_a_destination_is_a_bucket_and_perhaps_a_prefix(text: str, bucket: str, prefix: str) -> None:
    destination = Destination.parse(text)
    assert (destination.bucket, destination.prefix) == (bucket, prefix)
    assert Destination.parse(str(destination)) == destination
    assert Destination.parse(destination) is destination


@pytest.mark.parametrize(
    "text",
    ["", "acme", "s3:/acme", "https://acme", "s3://", "s3://a", "s3://acme/a?b", "s3://acme/a\nb", None, 3,
     "s3://acme/" + "x" * 701],
)  # fmt: skip
def test_what_is_no_destination_is_refused(text: object) -> None:
    with pytest.raises(BadInput, match="s3://BUCKET"):
        Destination.parse(text)


def test_keys_are_where_the_contract_puts_them() -> None:
    destination = Destination.parse("s3://acme/daily")
    assert destination.image_key("a1") == "daily/images/a1.png"
    assert destination.image_key("a1", 2) == "daily/images/a1.2.png"
    assert destination.record_key("a1") == "daily/records/a1.json"
    assert Destination.parse("s3://acme").record_key("a1") == "records/a1.json"
