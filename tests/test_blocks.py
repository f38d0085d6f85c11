"""The blocks: as Prefect wants them, saved and loaded, right in the UI's form, safe in what they accept."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import pytest
from prefect.blocks.core import Block
from prefect.cli.block import _register_blocks_in_module
from prefect.client.orchestration import get_client
from prefect.testing.standard_test_suites import BlockStandardTestSuite
from pydantic import ValidationError

import prefect_eachlabs
from prefect_eachlabs import EachlabsCredentials, S3Destination
from prefect_eachlabs.blocks import access_of_block, load_block, where
from prefect_eachlabs.errors import SetupError

KEY = "key-that-nobody-may-see"
SECRET = "secret-that-nobody-may-see"


@pytest.mark.parametrize("block", [EachlabsCredentials, S3Destination])
class TestPrefectsOwnSuite(BlockStandardTestSuite):
    """All of it but the logo: Prefect takes http(s) URLs alone, which the browser would load from another host."""

    test_has_a_valid_image = None  # type: ignore[assignment]


@pytest.mark.parametrize("block", [EachlabsCredentials, S3Destination])
def test_the_form_has_a_title_and_a_description_for_every_field(block: type[Block]) -> None:
    for name, field in block.model_json_schema()["properties"].items():
        assert field["title"] != name.replace("_", " ").title() or "_" not in name, name
        assert field["description"].endswith("."), name


def test_the_form_knows_the_bounds_and_the_choices() -> None:
    fields = EachlabsCredentials.model_json_schema()["properties"]
    whole = fields["requests_per_minute"]["anyOf"][0]
    assert (whole["type"], whole["minimum"], whole["maximum"]) == ("integer", 0, 100_000)
    assert fields["max_in_flight"]["anyOf"][0]["maximum"] == 10_000
    assert fields["auth_scheme"]["anyOf"][0]["enum"] == ["x-api-key", "bearer"]
    assert fields["api_key"]["format"] == "password"


@pytest.mark.parametrize(
    "wrong",
    [
        {"base_url": "http://api.example.com"},
        {"base_url": "https://user:word@api.example.com"},
        {"base_url": "ftp://api.example.com"},
        {"requests_per_minute": -1},
        {"requests_per_minute": 100_001},
        {"max_in_flight": 10_001},
        {"auth_scheme": "basic"},
        {"account": "two words"},
    ],
)
def test_credentials_out_of_bounds_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as refused:
        EachlabsCredentials(api_key=KEY, **wrong)
    assert KEY not in str(refused.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"bucket": "a"},
        {"bucket": "acme", "access_key_id": "AKIA"},
        {"bucket": "acme", "secret_access_key": SECRET},
        {"bucket": "acme", "endpoint_url": "minio.example.com"},
        {"bucket": "acme", "access_key_id": "A", "secret_access_key": SECRET, "aws_credentials_block": "team"},
    ],
)
def test_a_destination_that_cannot_be_right_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as refused:
        S3Destination(**wrong)
    assert SECRET not in str(refused.value)


def test_a_field_of_text_is_one_field_in_the_form_and_takes_none_as_empty() -> None:
    for block in (EachlabsCredentials, S3Destination):
        fields = block.model_json_schema()["properties"]
        plain = [name for name, field in fields.items() if field.get("type") == "string"]
        assert len(plain) >= len(fields) - 4, fields
    assert S3Destination(bucket="acme", region=None, endpoint_url=None).access().region is None


def test_zero_means_no_limit_and_empty_means_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EACHLABS_MAX_IN_FLIGHT", "3")
    settings = EachlabsCredentials(api_key=KEY, requests_per_minute=0).account_settings()
    assert (settings.requests_per_minute, settings.max_in_flight) == (None, 3)


def test_without_a_block_of_prefect_aws_it_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prefect_aws", None)
    monkeypatch.setitem(sys.modules, "prefect_aws.credentials", None)
    destination = S3Destination(
        bucket="acme", prefix="daily", access_key_id="AKIA", secret_access_key=SECRET, region="eu-central-1"
    )
    place, access = where(destination)
    assert access is not None
    assert (str(place), access.access_key_id, access.region) == ("s3://acme/daily", "AKIA", "eu-central-1")
    with pytest.raises(SetupError, match="prefect-aws"):
        access_of_block("team")


@pytest.mark.usefixtures("prefect_server")
class TestOnAServer:
    def test_register_finds_both_blocks_in_the_lazy_package(self) -> None:
        """What `prefect block register -m prefect_eachlabs` does with the module."""
        found = asyncio.run(_register_blocks_in_module(prefect_eachlabs))
        assert {block.__name__ for block in found} == {"EachlabsCredentials", "S3Destination"}

    def test_a_saved_block_comes_back_by_its_name_and_its_secret_is_masked(self) -> None:
        EachlabsCredentials(api_key=KEY, requests_per_minute=30, account="studio").save("studio", overwrite=True)
        loaded: EachlabsCredentials = load_block("studio", EachlabsCredentials)
        assert loaded.api_key.get_secret_value() == KEY
        assert (loaded.requests_per_minute, loaded.account, loaded.base_url) == (30, "studio", "")
        with get_client(sync_client=True) as client:
            document = client.read_block_document_by_name("studio", "eachlabs-credentials", include_secrets=False)
        assert KEY not in json.dumps(document.data, default=str)
        assert KEY not in repr(loaded)

    def test_a_destination_takes_its_keys_from_a_block_of_prefect_aws(self) -> None:
        aws = pytest.importorskip("prefect_aws.credentials")
        aws.AwsCredentials(
            aws_access_key_id="AKIA-OF-THE-TEAM", aws_secret_access_key=SECRET, region_name="eu-west-1"
        ).save("team", overwrite=True)
        destination = S3Destination(bucket="acme", aws_credentials_block="team", storage_class="STANDARD_IA")
        _, access = where(destination)
        assert access is not None
        assert (access.access_key_id, access.secret_access_key) == ("AKIA-OF-THE-TEAM", SECRET)
        assert (access.region, access.storage_class) == ("eu-west-1", "STANDARD_IA")
        assert SECRET not in repr(access)

    def test_a_block_nobody_saved_is_named_with_what_to_do(self) -> None:
        with pytest.raises(SetupError, match="eachlabs-credentials/nobody"):
            load_block("nobody", EachlabsCredentials)
