"""Who fills in a form or writes a table replaces no object of a bucket but pictures of the item they name."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import boto3
import pytest

from prefect_eachlabs import generate_and_store
from prefect_eachlabs.cli.main import main
from prefect_eachlabs.errors import ItemConflict
from tests.flows.flow_fixtures import Studio

SITE = "site"
OBJECTS = {
    "images/logo.png": (b"THE COMPANY LOGO", {}),
    "images/photo.png": (b"A PHOTOGRAPH", {"prediction-id": "p-1", "fingerprint": "0" * 32}),
    "records/payroll.json": (b'{"salaries": []}', {}),
}


@pytest.fixture(autouse=True)
def site(studio: Studio) -> None:
    """A bucket of the team's, in which nothing was ever bought."""
    with closing(boto3.client("s3")) as s3:
        s3.create_bucket(Bucket=SITE)
        for key, (body, metadata) in OBJECTS.items():
            s3.put_object(Bucket=SITE, Key=key, Body=body, Metadata=metadata)


def there(key: str) -> bytes:
    with closing(boto3.client("s3")) as s3, s3.get_object(Bucket=SITE, Key=key)["Body"] as body:
        return bytes(body.read())


@pytest.mark.parametrize("more", [{}, {"replace": True}, {"rebuy_missing": True}, {"formats": ("png", "jpeg", "webp")}])
@pytest.mark.parametrize("item", ["logo", "photo"])
def test_a_form_that_names_an_object_replaces_nothing(studio: Studio, item: str, more: dict[str, Any]) -> None:
    with pytest.raises(ItemConflict, match="Nothing was bought"):
        generate_and_store.fn("a fox", destination=f"s3://{SITE}", item_id=item, **more)
    assert there(f"images/{item}.png") == OBJECTS[f"images/{item}.png"][0]
    assert studio.billed == 0


def test_a_record_that_is_not_one_is_not_replaced(studio: Studio) -> None:
    with pytest.raises(Exception, match="payroll"):
        generate_and_store.fn("a fox", destination=f"s3://{SITE}", item_id="payroll")
    assert there("records/payroll.json") == OBJECTS["records/payroll.json"][0]
    assert studio.billed == 0


def test_a_row_that_names_an_object_replaces_nothing(studio: Studio, tmp_path: Path) -> None:
    table = tmp_path / "rows.csv"
    table.write_text("prompt,id\na fox,logo\na hare,photo\nan owl,owl\n")
    assert main(["batch", str(table), "--to", f"s3://{SITE}"]) == 1
    assert {key: there(key) for key in OBJECTS} == {key: body for key, (body, _) in OBJECTS.items()}
    assert studio.billed == 1
