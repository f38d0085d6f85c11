"""S3 through boto3: conditional puts, listings, presigned URLs; every error says which bucket and what to do.

boto3 blocks, so its calls run in one bounded thread pool a process; one client serves all threads and all buckets
of the same access. Nothing here knows what the objects mean.

A write that was refused with `PreconditionFailed` may still be one's own: boto3 repeats a PUT whose answer was
lost, and the repetition meets the first body. Read the object back and look for a mark of your own in it.
"""

from __future__ import annotations

import base64
import contextlib
import functools
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace
from datetime import datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any, TypeVar

from botocore.exceptions import ClientError

from prefect_eachlabs.errors import BadInput, SetupError
from prefect_eachlabs.storage.base import ListedObject, PreconditionFailed, StoredObject, ascii_metadata
from prefect_eachlabs.storage.s3_client import (
    ATTEMPTS,
    CUT_OR_SILENT,
    S3Access,
    client_of,
    code_and_status,
    run_in_pool,
    this_process,
)

MAX_PRESIGNED_SECONDS = 7 * 86_400

T = TypeVar("T")


class S3Store:
    """One bucket on S3 or on anything that speaks its protocol.

    Args:
        bucket: The bucket's name; it must exist.
        access: Endpoint, region and keys; boto3's own chain when left out.
    """

    def __init__(self, bucket: str, access: S3Access | None = None) -> None:
        self.bucket = bucket
        self.access = access or S3Access()

    def __repr__(self) -> str:
        return f"S3Store({self.bucket!r}, {self.access!r})"

    def uri(self, key: str) -> str:
        return f"s3://{self.bucket}/{key}"

    async def get(self, key: str) -> StoredObject | None:
        """The object with its body; None when there is none.

        Raises:
            StoreFailed: The store did not answer, or cut its answer.
            SetupError: Bucket, key or region are missing or refused.
        """
        return await self._run(key, functools.partial(self._get, key))

    async def head(self, key: str) -> StoredObject | None:
        """The object without its body; None when there is none (or no such bucket: S3 does not tell them apart here).

        Raises as `get` does.
        """
        return await self._run(key, functools.partial(self._head, key))

    async def put(
        self,
        key: str,
        body: bytes,
        *,
        content_type: str,
        if_match: str | None = None,
        if_absent: bool = False,
        metadata: Mapping[str, str] | None = None,
        sha256: str | None = None,
        content_disposition: str | None = None,
    ) -> str:
        """Writes the object and returns its new ETag.

        Cancelling takes the write back only while it waits for a thread. Once begun it goes on to its end, and how
        it ended is logged: after a cancel, read the object to know.

        Args:
            key: The object's key.
            body: Its bytes, stored unchanged.
            content_type: Its Content-Type.
            if_match: Write only over the object with this ETag.
            if_absent: Write only where no object is.
            metadata: User metadata; what is not printable ASCII is percent-encoded.
            sha256: Hex digest of the body, which the store checks and keeps.
            content_disposition: `attachment` for what a browser must not open.

        Raises:
            PreconditionFailed: The condition does not hold; perhaps by an own earlier attempt: read back.
            StoreFailed: The store did not answer (whether it wrote is unknown), or failed.
            SetupError: Bucket, key or region are missing or refused.
        """
        arguments: dict[str, Any] = {"Bucket": self.bucket, "Key": key, "ContentType": content_type}
        if if_match is not None:
            arguments["IfMatch"] = if_match
        if if_absent:
            arguments["IfNoneMatch"] = "*"
        if metadata:
            arguments["Metadata"] = ascii_metadata(metadata)
        if sha256 is not None:
            arguments["ChecksumSHA256"] = base64.b64encode(bytes.fromhex(sha256)).decode()
        if content_disposition is not None:
            arguments["ContentDisposition"] = content_disposition
        if self.access.kms_key_id:
            arguments.update(ServerSideEncryption="aws:kms", SSEKMSKeyId=self.access.kms_key_id)
        if self.access.storage_class and (sha256 is not None or content_type.startswith("image/")):
            arguments["StorageClass"] = self.access.storage_class
        return await self._run(key, functools.partial(self._write, arguments, body), is_write=True)

    async def list(self, prefix: str) -> AsyncIterator[ListedObject]:
        """All objects whose key begins with `prefix`, in the order of their keys.

        One request for each 1,000. Raises as `get` does.
        """
        token: str | None = None
        while True:
            rows, token = await self._run(prefix, functools.partial(self._list_page, prefix, token))
            for row in rows:
                yield row
            if not token:
                return

    async def presigned_get(self, key: str, *, expires_seconds: int) -> str:
        """A URL that lets anybody read the object until it ends; it is a secret: never log it.

        Asks the bucket once for its region: a URL that was signed for another one is refused.
        """
        if not 1 <= expires_seconds <= MAX_PRESIGNED_SECONDS:
            raise BadInput(f"expires_seconds: {expires_seconds} must be 1 to {MAX_PRESIGNED_SECONDS} (7 days).")
        return await self._run(key, functools.partial(self._presign, key, expires_seconds))

    async def _run(self, key: str, call: Callable[[], T], *, is_write: bool = False) -> T:
        return await run_in_pool(call, self.access, uri=self.uri(key), is_write=is_write)

    # What follows runs in the pool's threads.

    def _get(self, key: str) -> StoredObject | None:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                answer = client_of(self.access).get_object(Bucket=self.bucket, Key=key)
            except ClientError as error:
                if code_and_status(error)[0] == "NoSuchKey":
                    return None
                if not _lacks_its_code(error) or attempt == ATTEMPTS:
                    raise
                continue
            try:
                with contextlib.closing(answer["Body"]) as stream:
                    return _stored_object(key, answer, body=stream.read())
            except CUT_OR_SILENT:
                # boto3 repeats requests, but not the reading of a body that was cut.
                if attempt == ATTEMPTS:
                    raise
        raise AssertionError("unreachable")

    def _head(self, key: str) -> StoredObject | None:
        try:
            return _stored_object(key, client_of(self.access).head_object(Bucket=self.bucket, Key=key))
        except ClientError as error:
            if code_and_status(error)[0] in ("404", "NoSuchKey"):
                return None
            raise

    def _write(self, arguments: dict[str, Any], body: bytes) -> str:
        try:
            return str(client_of(self.access).put_object(**arguments, Body=body)["ETag"])
        except ClientError as error:
            code, status = code_and_status(error)
            conditional = "IfMatch" in arguments or "IfNoneMatch" in arguments
            gone = "IfMatch" in arguments and (code == "NoSuchKey" or _lacks_its_code(error))
            if conditional and (status in (409, 412) or gone):
                raise PreconditionFailed(f"{self.uri(arguments['Key'])}: {code}") from error
            if conditional and (status == HTTPStatus.NOT_IMPLEMENTED or code == "NotImplemented"):
                raise SetupError(
                    f"The store of bucket {self.bucket!r} does not implement conditional writes (If-None-Match, "
                    "If-Match), which keep pictures from being bought twice: use a store that does, such as AWS S3."
                ) from error
            raise

    def _list_page(self, prefix: str, token: str | None) -> tuple[tuple[ListedObject, ...], str | None]:
        more = {"ContinuationToken": token} if token else {}
        page = client_of(self.access).list_objects_v2(Bucket=self.bucket, Prefix=prefix, **more)
        now = _date_of(page)
        rows = tuple(
            ListedObject(row["Key"], row.get("ETag", ""), row["Size"], (now - row["LastModified"]).total_seconds(), now)
            for row in page.get("Contents", ())
        )
        return rows, page.get("NextContinuationToken") if page.get("IsTruncated") else None

    def _presign(self, key: str, expires_seconds: int) -> str:
        client = client_of(self.access)
        region = this_process().region_of(self.bucket, self.access)
        if region is not None and region != client.meta.region_name:
            client = client_of(replace(self.access, region=region))
        arguments = {"Bucket": self.bucket, "Key": key}
        return str(client.generate_presigned_url("get_object", Params=arguments, ExpiresIn=expires_seconds))


def _lacks_its_code(error: ClientError) -> bool:
    """A 404 whose body was cut, which tells no missing object from a missing bucket: botocore makes the code up."""
    return code_and_status(error) == ("404", HTTPStatus.NOT_FOUND)


def _date_of(answer: Mapping[str, Any]) -> datetime:
    try:
        return parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
    except (KeyError, TypeError, ValueError):
        raise SetupError(
            "The store's answer has no Date header, without which the age of a claim cannot be told: use a store that "
            "sends it, or fix the proxy in between."
        ) from None


def _stored_object(key: str, answer: Mapping[str, Any], body: bytes = b"") -> StoredObject:
    date = _date_of(answer)
    return StoredObject(
        key=key,
        etag=answer["ETag"],
        age_seconds=(date - answer["LastModified"]).total_seconds(),
        date=date,
        size_bytes=answer["ContentLength"],
        metadata=dict(answer.get("Metadata", {})),
        body=body,
    )
