"""What S3 does wrong, and what is set up wrong, comes out in plain words; one client serves an access."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from typing import Any

import pytest

from prefect_eachlabs.errors import EachlabsError, SetupError, StoreFailed
from prefect_eachlabs.storage import s3_client as s3_access
from prefect_eachlabs.storage.s3 import S3Store
from prefect_eachlabs.storage.s3_client import S3Access
from prefect_eachlabs.testing.s3 import Fault, LocalS3
from tests.net.real_time import in_real_time
from tests.storage.test_memory_store import found, listed, refusal

JSON = "application/json"


# ----------------------------------------------------------------------- faults


def test_two_refusals_in_passing_are_overcome(s3: LocalS3, bucket: S3Store) -> None:
    s3.set_faults(Fault("refuse", times=2), Fault("refuse", method="GET", times=2))

    async def story() -> bytes:
        await bucket.put("a", b"there", content_type=JSON)
        return (await found(bucket, "a")).body

    assert asyncio.run(story()) == b"there"


@in_real_time
async def test_a_refusal_that_lasts_is_a_failed_store_and_nothing_is_written(s3: LocalS3, bucket: S3Store) -> None:
    s3.set_faults(Fault("refuse", times=3))
    with pytest.raises(StoreFailed, match=r"s3://pictures/a .*SlowDown, HTTP 503.*run again") as caught:
        await bucket.put("a", b"", content_type=JSON)
    assert caught.value.retryable
    assert await bucket.get("a") is None


@in_real_time
async def test_a_lost_answer_to_a_conditional_put_reads_as_a_failed_precondition_over_ones_own_body(
    s3: LocalS3, bucket: S3Store
) -> None:
    s3.set_faults(Fault("lose"))
    assert await refusal(bucket.put("a", b"mine", content_type=JSON, if_absent=True))
    mine = await found(bucket, "a")
    assert mine.body == b"mine"
    s3.set_faults(Fault("lose"))
    assert await refusal(bucket.put("a", b"mine too", content_type=JSON, if_match=mine.etag))
    assert (await found(bucket, "a")).body == b"mine too"


@in_real_time
async def test_answers_that_are_lost_each_time_leave_the_outcome_unknown(s3: LocalS3, bucket: S3Store) -> None:
    s3.set_faults(Fault("lose", times=3))
    with pytest.raises(StoreFailed, match="gave no whole answer"):
        await bucket.put("a", b"there", content_type=JSON)
    assert (await found(bucket, "a")).body == b"there"


@in_real_time
async def test_a_body_that_is_cut_is_read_again_and_given_up_after_the_last_attempt(
    s3: LocalS3, bucket: S3Store
) -> None:
    await bucket.put("a", b"x" * 100_000, content_type=JSON)
    s3.set_faults(Fault("cut", method="GET", times=2))
    assert (await found(bucket, "a")).body == b"x" * 100_000
    s3.set_faults(Fault("cut", method="GET", times=3))
    with pytest.raises(StoreFailed, match="s3://pictures/a"):
        await bucket.get("a")


SECRET = "wJalrXUtnFEMI-never-shown"


@pytest.mark.parametrize(
    ("status", "code", "kind", "advice"),
    [
        (403, "AccessDenied", SetupError, "s3:PutObject and s3:ListBucket"),
        (403, "InvalidAccessKeyId", SetupError, "check AWS_ACCESS_KEY_ID"),
        (403, "SignatureDoesNotMatch", SetupError, "check AWS_SECRET_ACCESS_KEY"),
        (403, "RequestTimeTooSkewed", SetupError, "clock is wrong"),
        (400, "ExpiredToken", SetupError, "session token has expired"),
        (404, "NoSuchBucket", SetupError, "create it, or fix the destination"),
        (301, "PermanentRedirect", SetupError, "set AWS_REGION"),
        (400, "AuthorizationHeaderMalformed", SetupError, "set AWS_REGION"),
        (400, "IllegalLocationConstraintException", SetupError, "set AWS_REGION"),
        (400, "KMS.NotFoundException", SetupError, "check kms_key_id"),
        (400, "InvalidStorageClass", SetupError, "fix storage_class"),
        (400, "SomethingNew", SetupError, "Fix the destination"),
        (400, "BadDigest", StoreFailed, "run again"),
        (400, "RequestTimeout", StoreFailed, "run again"),
        (429, "TooManyRequests", StoreFailed, "run again"),
        (500, "InternalError", StoreFailed, "run again"),
        (502, "", StoreFailed, "run again"),
    ],
)
def test_each_refusal_names_bucket_and_endpoint_and_says_what_to_do(
    s3: LocalS3, status: int, code: str, kind: type[EachlabsError], advice: str
) -> None:
    store = S3Store("pictures", S3Access(**{**vars(s3.access), "secret_access_key": SECRET}))
    for method, ask in (
        ("PUT", lambda: store.put("a", b"", content_type=JSON)),
        ("GET", lambda: store.get("a")),
        ("LIST", lambda: listed(store.list("a"))),
    ):
        s3.set_faults(Fault("refuse", method=method, status=status, code=code, times=20))
        with pytest.raises(kind) as caught:
            asyncio.run(ask())
        message = str(caught.value)
        assert "s3://pictures/a" in message
        assert s3.url in message
        assert advice in message
        assert SECRET not in message


@pytest.mark.parametrize("status", [403, 400])
def test_a_refused_head_which_has_no_body_is_explained_by_its_status(s3: LocalS3, bucket: S3Store, status: int) -> None:
    s3.set_faults(Fault("refuse", method="HEAD", status=status, times=20))
    with pytest.raises(SetupError, match=f"HTTP {status}"):
        asyncio.run(bucket.head("a"))


def test_a_missing_bucket_is_named(s3: LocalS3) -> None:
    store = S3Store("no-such-bucket", s3.access)
    for ask in (store.put("a", b"", content_type=JSON, if_absent=True), store.get("a"), listed(store.list(""))):
        with pytest.raises(SetupError, match=r"s3://no-such-bucket/.*there is no such bucket"):
            asyncio.run(ask)
    assert asyncio.run(store.head("a")) is None


def test_an_endpoint_where_nobody_listens_is_named_and_may_be_repeated(s3: LocalS3) -> None:
    with LocalS3() as ended:
        url = ended.url
    store = S3Store("pictures", S3Access(endpoint_url=url, region="us-east-1"))
    with pytest.raises(StoreFailed, match=f"{url} .AWS_ENDPOINT_URL_S3.*EndpointConnectionError") as caught:
        asyncio.run(store.get("a"))
    assert caught.value.retryable


def test_missing_credentials_are_named(s3: LocalS3, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    store = S3Store("pictures", S3Access(endpoint_url=s3.url, region="us-east-1"))
    with pytest.raises(SetupError, match=r"No usable AWS credentials.*set AWS_ACCESS_KEY_ID"):
        asyncio.run(store.get("a"))


@pytest.mark.parametrize(
    ("bucket", "access"),
    [
        ("no/bucket", S3Access(region="us-east-1")),
        ("pictures", S3Access(endpoint_url="nonsense", region="us-east-1")),
        ("pictures", S3Access(access_key_id="half", region="us-east-1")),
        ("pictures", S3Access(region="no region")),
    ],
)
def test_settings_that_boto3_refuses_are_a_set_up_error(bucket: str, access: S3Access) -> None:
    with pytest.raises(SetupError, match=f"s3://{bucket}/a"):
        asyncio.run(S3Store(bucket, access).get("a"))


def test_secrets_are_in_no_repr() -> None:
    access = S3Access("https://u:pass@s3.invalid/?k=pass", "r", "AKIAEXAMPLE", SECRET, "token-secret")
    for text in (repr(access), str(access), repr(S3Store("b", access))):
        assert not any(secret in text for secret in ("pass", "AKIAEXAMPLE", SECRET, "token-secret"))


# ----------------------------------------------------------- threads and clients


@in_real_time
async def test_a_cancelled_write_that_had_begun_goes_on_and_its_end_is_logged(
    bucket: S3Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="prefect_eachlabs")
    begun, go_on, logged = threading.Event(), threading.Event(), threading.Event()
    write = S3Store._write

    def slow_write(self: S3Store, *arguments: Any) -> str:
        begun.set()
        assert go_on.wait(10)
        return write(self, *arguments)

    monkeypatch.setattr(S3Store, "_write", slow_write)
    log_orphaned_write = s3_access._log_orphaned_write

    def log(*arguments: Any) -> None:
        log_orphaned_write(*arguments)
        logged.set()

    monkeypatch.setattr(s3_access, "_log_orphaned_write", log)
    task = asyncio.ensure_future(bucket.put("a", b"x", content_type=JSON))
    await asyncio.get_running_loop().run_in_executor(None, begun.wait, 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    go_on.set()
    await asyncio.get_running_loop().run_in_executor(None, logged.wait, 10)
    assert (await found(bucket, "a")).body == b"x"
    assert "s3://pictures/a went through after its caller had been cancelled" in caplog.text


def test_one_client_serves_an_access_until_the_environment_changes(
    s3: LocalS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = s3_access.client_of(s3.access)
    assert s3_access.client_of(S3Access(**vars(s3.access))) is client
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3.url)
    assert s3_access.client_of(s3.access) is not client
    assert s3_access.client_of(S3Access()).meta.endpoint_url == s3.url
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3")
    assert s3_access.client_of(s3.access) is client


def test_a_small_body_goes_with_its_headers_and_a_large_one_waits_until_it_is_wanted(bucket: S3Store) -> None:
    asked: list[bool] = []

    def sent(request: Any, **_: Any) -> None:
        asked.append("Expect" in request.headers)

    events = s3_access.client_of(bucket.access).meta.events
    events.register("before-send.s3", sent)

    async def story() -> None:
        for size_bytes in (0, s3_access.SENT_AT_ONCE_BYTES, s3_access.SENT_AT_ONCE_BYTES + 1):
            await bucket.put("a", b"x" * size_bytes, content_type=JSON)
            assert (await found(bucket, "a")).size_bytes == size_bytes

    try:
        asyncio.run(story())
    finally:
        events.unregister("before-send.s3", sent)
    puts = asked[::2]
    assert puts == [False, False, True]


def test_another_process_makes_its_own_threads_and_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = s3_access.this_process()
    assert s3_access.this_process() is mine
    monkeypatch.setattr(os, "getpid", lambda: -1)
    monkeypatch.setattr(s3_access, "_processes", dict(s3_access._processes))
    assert s3_access.this_process() is not mine
