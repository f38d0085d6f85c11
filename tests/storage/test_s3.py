"""`storage.py` keeps S3's promises, and the tests' store in memory keeps the same ones."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import urllib.request
from collections.abc import Callable, Coroutine
from datetime import timedelta
from typing import Any

import pytest
from moto.s3.models import s3_backends

from prefect_eachlabs.errors import BadInput, SetupError, StoreFailed
from prefect_eachlabs.retry import retry_while_retryable
from prefect_eachlabs.storage import s3_client as s3_access
from prefect_eachlabs.storage.base import ObjectStore, PreconditionFailed, StoredObject, honours_conditions
from prefect_eachlabs.storage.s3 import S3Store
from prefect_eachlabs.storage.s3_client import S3Access
from prefect_eachlabs.testing.s3 import ACCOUNT, Fault, LocalS3
from tests.memory_store import MemoryStore
from tests.net.real_time import in_real_time
from tests.storage.conftest import backend
from tests.storage.test_memory_store import found, listed, refusal
from tests.virtual_time import run

Runner = Callable[[Coroutine[Any, Any, Any]], Any]
JSON = "application/json"


@pytest.fixture(params=["S3", "memory", pytest.param("SeaweedFS", marks=pytest.mark.slow)])
def both(request: pytest.FixtureRequest) -> tuple[ObjectStore, Runner]:
    """A store and what runs a coroutine against it: real time for the real ones, virtual time for the fake."""
    if request.param == "S3":
        return request.getfixturevalue("bucket"), asyncio.run
    if request.param == "SeaweedFS":
        seaweedfs = request.getfixturevalue("seaweedfs")
        seaweedfs.empty()
        return S3Store("pictures", seaweedfs.access), asyncio.run
    return MemoryStore("pictures"), run


# --------------------------------------------------- what both stores promise


def test_what_is_put_comes_back_unchanged(both: tuple[ObjectStore, Runner]) -> None:
    store, runs = both

    async def story() -> None:
        assert await store.get("daily/records/a.json") is None
        assert await store.head("daily/records/a.json") is None
        metadata = {"prediction-id": "p-1", "Model": "gemini", "label": "été\n"}
        etag = await store.put("daily/records/a.json", b"{}\0\r\n", content_type=JSON, metadata=metadata)
        stored = await found(store, "daily/records/a.json")
        assert (stored.key, stored.body, stored.etag) == ("daily/records/a.json", b"{}\0\r\n", etag)
        assert stored.size_bytes == 5
        assert stored.metadata == {"prediction-id": "p-1", "model": "gemini", "label": "%C3%A9t%C3%A9%0A"}
        assert await store.head("daily/records/a.json") == StoredObject(**{**vars(stored), "body": b""})
        assert store.uri("daily/records/a.json") == "s3://pictures/daily/records/a.json"

    runs(story())


def test_if_absent_writes_only_where_nothing_is(both: tuple[ObjectStore, Runner]) -> None:
    store, runs = both

    async def story() -> None:
        await store.put("a", b"first", content_type=JSON, if_absent=True)
        assert await refusal(store.put("a", b"second", content_type=JSON, if_absent=True))
        assert (await found(store, "a")).body == b"first"

    runs(story())


def test_if_match_writes_only_over_the_version_it_names(both: tuple[ObjectStore, Runner]) -> None:
    store, runs = both

    async def story() -> None:
        first = await store.put("a", b"first", content_type=JSON)
        second = await store.put("a", b"second", content_type=JSON, if_match=first)
        assert second != first
        assert await refusal(store.put("a", b"third", content_type=JSON, if_match=first))
        assert (await found(store, "a")).etag == second
        assert await refusal(store.put("gone", b"x", content_type=JSON, if_match=first)), "404 is a refusal too"
        assert await store.get("gone") is None

    runs(story())


def test_a_listing_is_sorted_and_keeps_to_its_prefix(both: tuple[ObjectStore, Runner]) -> None:
    store, runs = both
    keys = ["r/a b+c%2F&.json", "r/a.json", "r/b.json", "r/é.json", "r/🐕.json"]

    async def story() -> None:
        for key in [*reversed(keys), "q/z", "s/a"]:
            await store.put(key, key.encode(), content_type=JSON)
        rows = await listed(store.list("r/"))
        assert [row.key for row in rows] == keys
        assert [row.size_bytes for row in rows] == [len(key.encode()) for key in keys]
        assert [row.etag for row in rows] == [(await found(store, key)).etag for key in keys]
        assert all(-1 <= row.age_seconds <= 60 for row in rows)
        assert await listed(store.list("none/")) == []

    runs(story())


def test_a_checksum_that_does_not_fit_the_body_keeps_it_out(both: tuple[ObjectStore, Runner]) -> None:
    store, runs = both

    async def story() -> None:
        right = hashlib.sha256(b"x").hexdigest()
        await store.put("a.png", b"x", content_type="image/png", sha256=right)
        with pytest.raises(StoreFailed):
            await store.put("a.png", b"y", content_type="image/png", sha256=right)
        assert (await found(store, "a.png")).body == b"x"

    runs(story())


def test_a_store_that_honours_conditions_is_recognised(both: tuple[ObjectStore, Runner]) -> None:
    store, runs = both

    async def story() -> None:
        await store.put("daily/probe", b"", content_type=JSON)
        assert await honours_conditions(store, "daily/probe", b"", content_type=JSON)

    runs(story())


# ------------------------------------------------------------ conditional writes


def test_a_store_that_does_not_implement_conditions_says_so(s3: LocalS3, bucket: S3Store) -> None:
    s3.set_faults(Fault("refuse", status=501, code="NotImplemented", times=10))
    with pytest.raises(SetupError, match="does not implement conditional writes"):
        asyncio.run(bucket.put("a", b"", content_type=JSON, if_absent=True))


def test_a_conflict_with_a_concurrent_conditional_write_is_a_failed_precondition(s3: LocalS3, bucket: S3Store) -> None:
    s3.set_faults(Fault("refuse", status=409, code="ConditionalRequestConflict", times=2))
    with pytest.raises(PreconditionFailed, match="ConditionalRequestConflict"):
        asyncio.run(bucket.put("a", b"", content_type=JSON, if_absent=True))
    with pytest.raises(StoreFailed):
        asyncio.run(bucket.put("a", b"", content_type=JSON))


# --------------------------------------------------------------- what S3 is sent


def described(s3: LocalS3, key: str) -> dict[str, Any]:
    client = s3_access.client_of(s3.access)
    answer: dict[str, Any] = client.head_object(Bucket="pictures", Key=key, ChecksumMode="ENABLED")
    return answer


def test_a_picture_carries_type_checksum_and_metadata(s3: LocalS3, bucket: S3Store) -> None:
    digest = hashlib.sha256(b"picture")
    arguments: dict[str, Any] = {"content_type": "image/png", "sha256": digest.hexdigest()}
    asyncio.run(bucket.put("images/a.png", b"picture", metadata={"prediction-id": "p-1"}, **arguments))
    head = described(s3, "images/a.png")
    assert head["ContentType"] == "image/png"
    assert head["Metadata"] == {"prediction-id": "p-1"}
    assert head["ChecksumSHA256"] == base64.b64encode(digest.digest()).decode()


@in_real_time
async def test_encryption_is_for_all_objects_and_the_storage_class_for_pictures_alone(s3: LocalS3) -> None:
    access = S3Access(**{**vars(s3.access), "kms_key_id": "alias/pictures", "storage_class": "STANDARD_IA"})
    store = S3Store("pictures", access)
    await store.put("a.png", b"x", content_type="image/png")
    await store.put("a.json", b"{}", content_type=JSON)
    picture, record = described(s3, "a.png"), described(s3, "a.json")
    assert picture["ServerSideEncryption"] == record["ServerSideEncryption"] == "aws:kms"
    assert picture["SSEKMSKeyId"] == record["SSEKMSKeyId"] == "alias/pictures"
    assert picture["StorageClass"] == "STANDARD_IA"
    assert "StorageClass" not in record


def test_a_missing_objects_answer_that_was_cut_is_asked_for_again(s3: LocalS3, bucket: S3Store) -> None:
    """Without its body a 404 does not say whether the object or the bucket is missing. Old boto3 says "run again"."""
    s3.set_faults(Fault("cut", method="GET"))
    assert asyncio.run(retry_while_retryable(lambda: bucket.get("nothing"), first_pause_seconds=0)) is None
    s3.set_faults(Fault("cut", method="GET", times=100))
    with pytest.raises((SetupError, StoreFailed), match=r"404|run again"):
        asyncio.run(bucket.get("nothing"))


def test_a_change_of_a_missing_object_is_a_failed_condition_even_when_its_answer_was_cut(
    s3: LocalS3, bucket: S3Store
) -> None:
    s3.set_faults(Fault("cut"))
    with pytest.raises(PreconditionFailed):
        asyncio.run(bucket.put("nothing", b"{}", content_type=JSON, if_match='"e"'))


@in_real_time
async def test_age_is_by_the_stores_clock_in_get_head_and_list(s3: LocalS3, bucket: S3Store) -> None:
    await bucket.put("a", b"", content_type=JSON)
    backend().keys["a"].last_modified -= timedelta(seconds=120)
    (row,) = await listed(bucket.list("a"))
    stored, head = await found(bucket, "a"), await bucket.head("a")
    assert head is not None
    for age_seconds in (row.age_seconds, stored.age_seconds, head.age_seconds):
        assert 119 <= age_seconds <= 180
    assert stored.date.utcoffset() == timedelta(0)


def test_a_listing_of_more_than_one_page_is_whole(s3: LocalS3, bucket: S3Store) -> None:
    for number in range(1101):
        s3_backends[ACCOUNT]["aws"].put_object("pictures", f"many/{number:05}", b"")
    before = s3.counts().get("LIST pictures/many", 0)
    rows = asyncio.run(listed(bucket.list("many/")))
    assert [row.key for row in rows] == [f"many/{number:05}" for number in range(1101)]
    assert s3.counts()["LIST pictures/many"] - before == 2


def test_a_presigned_url_opens_the_object_and_is_bounded(bucket: S3Store) -> None:
    async def story() -> str:
        await bucket.put("a.png", b"picture", content_type="image/png")
        for wrong in (0, 7 * 86_400 + 1):
            with pytest.raises(BadInput, match="expires_seconds"):
                await bucket.presigned_get("a.png", expires_seconds=wrong)
        await bucket.presigned_get("a.png", expires_seconds=7 * 86_400)
        return await bucket.presigned_get("a.png", expires_seconds=60)

    url = asyncio.run(story())
    assert "X-Amz-Signature=" in url
    assert "X-Amz-Expires=60" in url
    with urllib.request.urlopen(url) as answer:
        assert answer.read() == b"picture"
