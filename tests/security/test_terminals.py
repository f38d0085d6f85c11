"""Who writes a prompt, a table or an answer moves nobody's terminal (a pseudo-terminal here) and forges no line."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefect_eachlabs.testing.s3 import LocalS3
from tests.security.hostile import ESCAPES, FORGED, hostile_api, hostile_s3
from tests.security.terminal import assert_unmoved, typed, typed_in_turn

pytestmark = pytest.mark.slow

KEY = "sk-HOSTILE/key+7f3a9c1e5b=="
BUCKET = "terminals"


@pytest.fixture
def environment(local_s3: LocalS3) -> Iterator[dict[str, str]]:
    local_s3.create_bucket(BUCKET)
    with hostile_api() as url:
        yield {
            "EACHLABS_API_KEY": KEY,
            "EACHLABS_BASE_URL": url,
            "EACHLABS_REQUESTS_PER_MINUTE": "none",
            "AWS_ENDPOINT_URL_S3": local_s3.url,
        }


def test_an_answer_moves_no_terminal(environment: dict[str, str], tmp_path: Path) -> None:
    hows = ("refused", "plain", "error", "word", "url")
    more = ["--to", f"s3://{BUCKET}/x", "--deadline-seconds", "3"]
    words = [["generate", f"{how} {ESCAPES}{FORGED}", *more, "--item-id", how] for how in hows]
    for status, sent in typed_in_turn(words, environment, tmp_path):
        assert status == 1, sent
        assert "prefect-eachlabs: " in sent
        assert_unmoved(sent)
        assert KEY not in sent


def test_the_words_of_a_store_move_no_terminal(environment: dict[str, str], tmp_path: Path) -> None:
    secret = environment["AWS_SECRET_ACCESS_KEY"] = "HOSTILEsecret/Zz81+mPqT4vX"
    with hostile_s3(secret) as url:
        environment["AWS_ENDPOINT_URL_S3"] = url
        status, sent = typed(["generate", "a fox", "--to", "s3://acme/x"], environment, tmp_path)
    assert (status, secret in sent) == (2, False), sent
    assert_unmoved(sent)


def test_a_table_moves_no_terminal(environment: dict[str, str], tmp_path: Path) -> None:
    table = tmp_path / "hostile.csv"
    with table.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["prompt", "id", "image_url", f"label {ESCAPES}", "model", "input.x"])
        hostile = f"{ESCAPES}{FORGED}"
        rows.writerow(["a fox", hostile, "", hostile, "", hostile])
        rows.writerow([f"a hare {hostile}", "", f"ftp://{hostile}", "", "", ""])
        rows.writerow([f"a lynx {hostile}", "", f"s3://acme/{hostile}", "", "", ""])
        rows.writerow([f"an owl {hostile}", "", hostile, "", "", ""])
        rows.writerow([f"a cat {hostile}", "", "", "", hostile, ""])
        rows.writerow([hostile, "", "", "", "", ""])
    status, sent = typed(["batch", str(table), "--to", f"s3://{BUCKET}/x", "--dry-run"], environment, tmp_path)
    assert status == 1, sent
    assert "line 15" in sent
    assert_unmoved(sent)


def test_the_head_of_a_table_moves_no_terminal(environment: dict[str, str], tmp_path: Path) -> None:
    table = tmp_path / "hostile.csv"
    table.write_text(f'"{ESCAPES}{FORGED}",b\n1,2\n')
    status, sent = typed(["batch", str(table), "--to", f"s3://{BUCKET}/x", "--dry-run"], environment, tmp_path)
    assert status == 2, sent
    assert_unmoved(sent)
