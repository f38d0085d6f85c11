"""Files as streams of bytes, on this machine or in a bucket: opened, read piece by piece, never held as a whole.

What is in a bucket is read in blocks, each a request of its own: a batch may take hours, and no store keeps a
connection open for as long. Everything here blocks and runs in a thread.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from botocore.exceptions import ClientError

from prefect_eachlabs.errors import BadInput, EachlabsError, SetupError, without_query
from prefect_eachlabs.models import Destination
from prefect_eachlabs.storage.s3_client import ATTEMPTS, CUT_OR_SILENT, S3Access, client_of, code_and_status, explain

BLOCK_BYTES = 4 * 1024 * 1024
BUFFER_BYTES = 64 * 1024


class Files(Protocol):
    """Objects of one bucket that are too large for one piece of memory; every method blocks."""

    def open(self, key: str) -> BinaryIO:
        """Reads an object as a stream. Raises BadInput when there is none."""
        ...

    def upload(self, key: str, path: Path, *, content_type: str) -> None:
        """Writes an object from a file of this machine."""
        ...


class S3Files:
    """The real one, through boto3.

    Args:
        bucket: The bucket's name.
        access: Endpoint, region and keys; boto3's own chain when left out.
    """

    def __init__(self, bucket: str, access: S3Access | None = None) -> None:
        self._bucket = bucket
        self._access = access or S3Access()

    def open(self, key: str) -> BinaryIO:
        return _buffered(S3Stream(self._bucket, key, self._access))

    def upload(self, key: str, path: Path, *, content_type: str) -> None:
        more: dict[str, Any] = {}
        if self._access.kms_key_id:
            more = {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": self._access.kms_key_id}
        try:
            # One put takes 5 GiB, which is millions of rows: no parts that could be left behind.
            with path.open("rb") as body:
                client_of(self._access).put_object(
                    Bucket=self._bucket, Key=key, Body=body, ContentType=content_type, **more
                )
        except Exception as error:
            raise _explained(error, self._bucket, key, self._access) from error


class S3Stream(io.RawIOBase):
    """An object, read in blocks as they are needed; it must not change meanwhile.

    Raises:
        BadInput: There is no such object, or it was replaced while it was read.
        StoreFailed, SetupError: As for every other request.
    """

    def __init__(self, bucket: str, key: str, access: S3Access) -> None:
        super().__init__()
        self._bucket, self._key, self._access = bucket, key, access
        self._place = 0
        self._etag: str | None = None
        self._size_bytes: int | None = None
        self._block = b""
        self._block_begins = 0
        self._load(0)

    @property
    def size_bytes(self) -> int:
        assert self._size_bytes is not None, "the first block tells it"
        return self._size_bytes

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self.size_bytes}[whence]
        self._place = max(0, base + offset)
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        if self._place >= self.size_bytes:
            return 0
        if not self._block_begins <= self._place < self._block_begins + len(self._block):
            self._load(self._place)
        begin = self._place - self._block_begins
        piece = self._block[begin : begin + len(view)]
        view[: len(piece)] = piece
        self._place += len(piece)
        if begin + len(piece) == len(self._block):
            # It has been handed on; two blocks at a time would be twice the memory.
            self._block, self._block_begins = b"", self._place
        return len(piece)

    def _load(self, begin: int) -> None:
        try:
            for attempt in range(1, ATTEMPTS + 1):
                try:
                    self._block, self._block_begins = self._get(begin), begin
                    return
                except CUT_OR_SILENT:
                    # boto3 repeats requests, but not the reading of a body that was cut.
                    if attempt == ATTEMPTS:
                        raise
        except ClientError as error:
            code, status = code_and_status(error)
            uri = f"s3://{self._bucket}/{self._key}"
            if code == "InvalidRange" and begin == 0:
                self._size_bytes = 0
                return
            if code == "NoSuchKey":
                raise BadInput(f"{uri} is not there: check the source's name.") from None
            if status == 412:
                raise BadInput(f"{uri} was replaced while it was read: run again, what is stored is kept.") from None
            raise _explained(error, self._bucket, self._key, self._access) from error
        except EachlabsError:
            raise
        except Exception as error:
            raise _explained(error, self._bucket, self._key, self._access) from error

    def _get(self, begin: int) -> bytes:
        same = {"IfMatch": self._etag} if self._etag else {}
        answer = client_of(self._access).get_object(
            Bucket=self._bucket, Key=self._key, Range=f"bytes={begin}-{begin + BLOCK_BYTES - 1}", **same
        )
        with answer["Body"] as stream:
            body: bytes = stream.read()
        self._etag = answer.get("ETag")
        told = str(answer.get("ContentRange", "")).rpartition("/")[2]
        self._size_bytes = int(told) if told.isdigit() else len(body)
        return body


def _buffered(stream: S3Stream) -> BinaryIO:
    return cast(BinaryIO, io.BufferedReader(stream, buffer_size=BUFFER_BYTES))


def _explained(error: Exception, bucket: str, key: str, access: S3Access) -> EachlabsError:
    endpoint = without_query(access.endpoint_url) if access.endpoint_url else "S3"
    return explain(error, uri=f"s3://{bucket}/{key}", endpoint=endpoint)


def open_bytes(source: str, access: S3Access | None) -> tuple[BinaryIO, int]:
    """A source's bytes as a stream, and how many there are. Blocks.

    Args:
        source: A path of this machine, or `s3://bucket/key`.
        access: How to reach the bucket; boto3's own chain when None.

    Raises:
        BadInput: It is not there, or no file.
        SetupError, StoreFailed: The bucket is missing, refuses us, or does not answer.
    """
    if source.startswith("s3://"):
        place = Destination.parse(source)
        if not place.prefix:
            raise BadInput(f"{source} names a bucket and no file in it: s3://BUCKET/KEY.")
        stream = S3Stream(place.bucket, source.removeprefix(f"s3://{place.bucket}/"), access or S3Access())
        return _buffered(stream), stream.size_bytes
    try:
        path = Path(source).expanduser()
        return path.open("rb"), path.stat().st_size
    except FileNotFoundError:
        raise BadInput(f"{source} is not there: check the source's name.") from None
    except IsADirectoryError:
        raise BadInput(f"{source} is a folder: name the file with the prompts.") from None
    except (OSError, ValueError, RuntimeError) as error:
        raise SetupError(f"{source} cannot be read: {error}.") from error
