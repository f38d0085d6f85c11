"""What a stranger's attack has found, each as it was tried: a form, an answer, a row, an object of the bucket."""

from __future__ import annotations

import asyncio
from typing import ClassVar

import pytest
from botocore.exceptions import ClientError
from prefect.blocks.core import Block

from flows.illustrate_products import secret_of
from prefect_eachlabs.api import client as api_client
from prefect_eachlabs.batch.outcomes import Outcome, RowState
from prefect_eachlabs.batch.report import check_batch_id
from prefect_eachlabs.blocks import EachlabsCredentials, load_block
from prefect_eachlabs.errors import BadInput, EachlabsError, SetupError, without_query
from prefect_eachlabs.images.formats import format_by_name
from prefect_eachlabs.images.store import MOST_OUTPUTS, _number
from prefect_eachlabs.models import is_http_url
from prefect_eachlabs.net import redaction
from prefect_eachlabs.storage import s3_client

KEY = "sk-attacked-key-0123456789-abcdefghijk"
SIGNATURE = "5f1d0c3ab77e9e2b" * 4
MARKS = "http://a" + "̀̕" * 30_000 + "/x.png"
"""A host that `urlsplit` would normalise for seconds."""


@pytest.mark.parametrize(
    "name", ["../../../openai-credentials/block_documents/name/prod", "a/b", "%2e%2e/x", "", "x" * 300, "a?b", "a#b"]
)
def test_a_form_names_a_block_and_no_path_to_another(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("the server was asked")

    monkeypatch.setattr(EachlabsCredentials, "load", load)
    with pytest.raises(BadInput, match="not the name of a block"):
        load_block(name, EachlabsCredentials)


def test_the_flow_to_copy_names_a_secret_and_no_path_to_another() -> None:
    with pytest.raises(ValueError, match="not the name of a Secret block"):
        asyncio.run(secret_of("../../openai-credentials/block_documents/name/prod"))


def test_what_a_block_holds_is_in_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Block):
        _block_type_slug: ClassVar[str] = "broken"

        @classmethod
        def load(cls, *_: object, **__: object) -> Block:  # type: ignore[override]
            raise RuntimeError("input_value={'value': 'the password'}")

    with pytest.raises(SetupError) as caught:
        load_block("broken", Broken)
    assert "password" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_a_host_of_sixty_thousand_marks_is_not_normalised() -> None:
    assert not is_http_url(MARKS)
    assert without_query(MARKS) == "(unreadable URL)"
    assert format_by_name(MARKS) is None


def test_a_key_that_the_reason_of_an_error_quotes_is_taken_out_before_it_is_cut() -> None:
    redaction.hide(KEY)
    said = api_client._reason(ValueError("x" * 170 + KEY))
    assert KEY[:20] not in said


def test_a_signature_that_an_answer_quotes_is_in_no_error() -> None:
    error = EachlabsError(
        f"refused https://b.example/x.png?X-Amz-Signature={SIGNATURE}&x=1", details=f"X-Amz-Signature={SIGNATURE}"
    )
    assert SIGNATURE not in f"{error} {error.details}"


def test_numbers_in_an_objects_metadata_are_believed_within_bounds() -> None:
    assert [_number(text) for text in ("nan", "inf", "-1e6", "", None, "x", "0.039")] == [None] * 6 + [0.039]
    assert MOST_OUTPUTS == 64


def test_the_kind_of_an_error_in_a_record_moves_no_terminal() -> None:
    evil = "\x1b[2J\nforged\u202e"
    assert not set("\x1b\n\u202e") & set(EachlabsError("no", kind=evil).kind)
    row = Outcome(row=2, state=RowState.FAILED, error={"kind": evil, "message": "no", "code": None})
    assert not set("\x1b\n\u202e") & set(row.kind)


@pytest.mark.parametrize("name", ["images", "records", "adopted", "batches"])
def test_a_batch_is_not_named_as_a_folder_of_what_was_bought(name: str) -> None:
    with pytest.raises(BadInput, match="a folder that every destination has"):
        check_batch_id(name)


def test_what_s3_says_is_looked_through_to_a_bound_and_entities_are_not_unfolded() -> None:
    said = ClientError({"Error": {"Code": "BadThing", "Message": "x" * 10_000_000}}, "PutObject")
    s3_client.explain(said, uri="s3://b/k", endpoint="http://127.0.0.1")
    assert len(said.args[0]) <= s3_client.MOST_WORDS
    answer = {"body": b'<!DOCTYPE x [<!ENTITY a "b">]><ListBucketResult/>'}
    s3_client._refuse_entities(answer)
    assert answer["body"] == b"<"
