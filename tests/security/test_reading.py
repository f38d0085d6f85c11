"""Who fills in a form or writes a table reads no file and no bucket of the worker's that an operator did not name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import boto3
import pytest

from prefect_eachlabs import S3Destination, generate_and_store
from prefect_eachlabs.cli.main import main
from prefect_eachlabs.engine.runtime import close_gateways
from prefect_eachlabs.errors import BadInput, EachlabsError, SetupError
from prefect_eachlabs.flows.batch import generate_batch
from prefect_eachlabs.flows.settle import settle_leftovers
from tests.api.reference_kit import picture_bytes
from tests.flows.flow_fixtures import Studio

PRIVATE = "hr-private"
PICTURE = f"s3://{PRIVATE}/scans/passport.png"
TABLE = f"s3://{PRIVATE}/tables/salaries.csv"
SECRET_LINE = "AKIAIOSFODNN7EXAMPLE,wJalrXUtnFEMI/K7MDENG"


@pytest.fixture(autouse=True)
def private(studio: Studio) -> Iterator[Studio]:
    """A bucket that the worker's credentials open and that no operator named."""
    with closing(boto3.client("s3")) as s3:
        s3.create_bucket(Bucket=PRIVATE)
        s3.put_object(Bucket=PRIVATE, Key="scans/passport.png", Body=picture_bytes(), ContentType="image/png")
        s3.put_object(Bucket=PRIVATE, Key="tables/salaries.csv", Body=f"{SECRET_LINE}\n".encode())
        s3.put_object(Bucket=PRIVATE, Key="tables/prompts.csv", Body=f"prompt,image_url\na fox,{PICTURE}\n".encode())
    yield studio
    close_gateways()


def block(studio: Studio, prefix: str) -> S3Destination:
    keys: dict[str, Any] = {"access_key_id": "testing", "secret_access_key": "testing", "region": "us-east-1"}
    return S3Destination(bucket=PRIVATE, prefix=prefix, endpoint_url=studio.s3.url, **keys)


def plan(source: str, destination: str) -> Any:
    """The form of generate-batch, which only looks."""
    return generate_batch.fn(source, destination, dry_run=True).data


# ------------------------------------------------------------------ reference pictures


@pytest.mark.parametrize(
    "destination", [f"s3://{PRIVATE}", f"s3://{PRIVATE}/scans", f"s3://{PRIVATE}/x", "s3://acme-pictures"]
)
def test_a_form_that_names_a_bucket_as_destination_cannot_read_there(studio: Studio, destination: str) -> None:
    with pytest.raises(BadInput, match="may not be taken"):
        generate_and_store.fn("a passport", destination=destination, image_url=PICTURE)
    with pytest.raises(BadInput, match="may not be taken"):
        generate_and_store.fn(
            "a passport", destination=destination, input={"image_urls": [PICTURE]}, model="nano-banana-pro-edit"
        )
    assert studio.billed == 0


def test_an_operators_root_or_block_lets_a_run_read_there_and_no_further(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not generate_and_store.fn("one", destination=block(studio, "scans"), image_url=PICTURE).reused
    with pytest.raises(BadInput, match="may not be taken"):
        generate_and_store.fn("two", destination=block(studio, "scan"), image_url=PICTURE)
    monkeypatch.setenv("EACHLABS_REFERENCE_ROOTS", f"s3://{PRIVATE}/scans")
    assert not generate_and_store.fn("three", destination=studio.destination, image_url=PICTURE).reused
    with pytest.raises(BadInput, match="may not be taken"):
        generate_and_store.fn("four", destination=studio.destination, image_url=f"s3://{PRIVATE}/scans2/a.png")


def test_a_row_of_a_table_reads_no_bucket(studio: Studio, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nor does a command whose table it is in: a person named the table, others wrote its rows."""
    table = tmp_path / "prompts.csv"
    table.write_text(f"prompt,image_url\na fox,{PICTURE}\na hare,/etc/hostname\n")
    assert main(["batch", str(table), "--to", f"s3://{PRIVATE}/x", "--json"]) == 1
    assert '"failed": 2' in capsys.readouterr().out
    assert studio.billed == 0


def test_a_person_at_the_command_line_may_name_any_object(studio: Studio, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "a passport", "--to", studio.destination, "--image-url", PICTURE]) == 0


# -------------------------------------------------------------------------- tables


@pytest.mark.parametrize("destination", [f"s3://{PRIVATE}", f"s3://{PRIVATE}/tables", "s3://acme-pictures/x"])
def test_a_form_reads_no_table_that_no_operator_named(studio: Studio, tmp_path: Path, destination: str) -> None:
    keys = tmp_path / "creds.csv"
    keys.write_text(f"{SECRET_LINE}\n1,2\n")
    (tmp_path / "linked.csv").symlink_to(keys)
    there = {"creds.csv", "linked.csv"}
    sources = [
        TABLE,
        f"{TABLE}x.csv",
        str(keys),
        f"{tmp_path}/none.csv",
        "creds.csv",
        f"{tmp_path}/../{tmp_path.name}/creds.csv",
    ]
    said = set()
    before = Path.cwd()
    os.chdir(tmp_path)
    try:
        for source in (*sources, *there):
            with pytest.raises(BadInput, match="may not be read by runs, or is not there") as refused:
                plan(source, destination)
            assert "AKIA" not in str(refused.value)
            said.add(str(refused.value).partition(" may not be read")[2])
    finally:
        os.chdir(before)
    assert len(said) == 1, "what is there and what is not are told apart"


def test_a_table_in_a_root_is_read_and_a_link_out_of_it_is_not(
    studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside.csv"
    root.mkdir()
    (root / "prompts.csv").write_text("prompt\na fox\n")
    outside.write_text("prompt\na secret\n")
    (root / "link.csv").symlink_to(outside)
    monkeypatch.setenv("EACHLABS_REFERENCE_ROOTS", f"{root}:s3://{PRIVATE}/tables")
    for source in (str(root / "prompts.csv"), "prompts.csv", f"s3://{PRIVATE}/tables/prompts.csv"):
        assert plan(source, studio.destination)["new"] == 1
    for source in (str(root / "link.csv"), f"{root}/../outside.csv", f"s3://{PRIVATE}/tables/../tables/prompts.csv"):
        with pytest.raises(BadInput, match="may not be read"):
            plan(source, studio.destination)


def test_a_table_that_is_none_does_not_tell_its_first_line_to_a_run_and_does_to_a_person(
    studio: Studio, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys, twice = tmp_path / "creds.csv", tmp_path / "twice.csv"
    keys.write_text(f"{SECRET_LINE}\n1,2\n")
    twice.write_text(f"prompt,{SECRET_LINE},{SECRET_LINE}\n")
    monkeypatch.setenv("EACHLABS_REFERENCE_ROOTS", str(tmp_path))
    for source in (keys, twice):
        with pytest.raises(EachlabsError) as refused:
            plan(str(source), studio.destination)
        assert "AKIA" not in f"{refused.value} {refused.value!r}"
        assert main(["batch", str(source), "--to", studio.destination]) == 2
        assert "AKIA" in capsys.readouterr().err


# ---------------------------------------------------------------------- where runs write


def test_where_an_operator_bounds_it_runs_write_nowhere_else(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EACHLABS_DESTINATIONS", f"{studio.destination}:s3://acme-pictures/shared")
    for destination in (f"s3://{PRIVATE}", f"{studio.destination}x", "s3://acme-pictures", block(studio, "scans")):
        with pytest.raises(BadInput, match="EACHLABS_DESTINATIONS"):
            generate_and_store.fn("a fox", destination=destination)
    with pytest.raises(BadInput, match="EACHLABS_DESTINATIONS"):
        settle_leftovers.fn(f"s3://{PRIVATE}")
    with pytest.raises(BadInput, match="must be s3://BUCKET"):
        generate_and_store.fn("a fox", destination=f"{studio.destination}/../../hr")
    assert generate_and_store.fn("a fox", destination=studio.destination).uri.startswith(studio.destination)
    assert generate_and_store.fn("a hare", destination=f"{studio.destination}/below").uri
    assert studio.billed == 2


def test_a_list_of_destinations_that_cannot_be_read_allows_none(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    for setting in ("acme/daily", "s3://", ":", "/folder"):
        monkeypatch.setenv("EACHLABS_DESTINATIONS", setting)
        with pytest.raises((SetupError, BadInput), match="EACHLABS_DESTINATIONS"):
            generate_and_store.fn("a fox", destination=studio.destination)


def test_a_person_at_the_command_line_writes_anywhere(
    studio: Studio, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EACHLABS_DESTINATIONS", "s3://acme-pictures/shared")
    assert main(["generate", "a fox", "--to", studio.destination]) == 0
