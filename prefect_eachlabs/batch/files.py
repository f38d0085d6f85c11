"""Files of this machine or of a bucket, as files: an object is downloaded first, whole, to a temporary file.

A batch may take hours, and no store keeps a connection open for as long. Everything here blocks and runs in a thread.
"""

from __future__ import annotations

import tempfile
from contextlib import closing
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from botocore.exceptions import BotoCoreError, ClientError

from prefect_eachlabs.batch.worker import on_disk
from prefect_eachlabs.errors import BadInput, EachlabsError, SetupError, without_query
from prefect_eachlabs.models import Destination
from prefect_eachlabs.reference_images import Roots
from prefect_eachlabs.storage.s3_client import ATTEMPTS, CUT_OR_SILENT, S3Access, client_of, code_and_status, explain

MOST_BYTES = 5 * 1024**3
"""What one put takes: millions of rows. More would fill the worker's disk."""
PIECE_BYTES = 1024 * 1024


class S3Files:
    """Objects of one bucket that are too large for one piece of memory, through boto3; every method blocks.

    Args:
        bucket: The bucket's name.
        access: Endpoint, region and keys; boto3's own chain when left out.
    """

    def __init__(self, bucket: str, access: S3Access | None = None) -> None:
        self._bucket = bucket
        self._access = access or S3Access()

    def open(self, key: str) -> BinaryIO:
        """Reads an object. Raises BadInput when there is none."""
        with on_disk():
            file = cast(BinaryIO, tempfile.TemporaryFile(prefix="eachlabs-"))  # noqa: SIM115 - the caller closes it
        try:
            self._download(key, file)
            file.seek(0)
            return file
        except BaseException:
            file.close()
            raise

    def _download(self, key: str, file: IO[bytes]) -> None:
        etag = ""
        for attempt in range(1, ATTEMPTS + 1):
            rest = {"Range": f"bytes={file.tell()}-", "IfMatch": etag} if file.tell() else {}
            try:
                answer = client_of(self._access).get_object(Bucket=self._bucket, Key=key, **rest)
                if answer["ContentLength"] > MOST_BYTES:
                    raise BadInput(f"s3://{self._bucket}/{key} is larger than 5 GiB: split it.")
                etag = answer["ETag"]
                with closing(answer["Body"]) as body:
                    for piece in body.iter_chunks(PIECE_BYTES):
                        file.write(piece)
                return
            except EachlabsError:
                raise
            except CUT_OR_SILENT as error:
                # boto3 repeats requests, but not the reading of a body that was cut.
                if attempt == ATTEMPTS:
                    raise self._explained(error, key) from error
            except (BotoCoreError, ClientError, ValueError) as error:
                raise self._explained(error, key) from error

    def upload(self, key: str, path: Path, *, content_type: str) -> None:
        """Writes an object from a file of this machine."""
        more: dict[str, Any] = {}
        if self._access.kms_key_id:
            more = {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": self._access.kms_key_id}
        try:
            # One put: no parts that could be left behind.
            with path.open("rb") as body:
                client_of(self._access).put_object(
                    Bucket=self._bucket, Key=key, Body=body, ContentType=content_type, **more
                )
        except Exception as error:
            raise self._explained(error, key) from error

    def _explained(self, error: Exception, key: str) -> EachlabsError:
        uri = f"s3://{self._bucket}/{key}"
        code, status = code_and_status(error) if isinstance(error, ClientError) else ("", 0)
        if code == "NoSuchKey":
            return BadInput(f"{uri}: there is no such object in the bucket.")
        if status == 412:
            return BadInput(f"{uri} was replaced while it was read: run again, what is stored is kept.")
        endpoint = without_query(self._access.endpoint_url) if self._access.endpoint_url else "S3"
        return explain(error, uri=uri, endpoint=endpoint)


def open_file(source: str, access: S3Access | None, within: Roots | None = None) -> BinaryIO:
    """A source, opened. Blocks.

    Args:
        source: A path of this machine, or `s3://bucket/key`, of 5 GiB at most.
        access: How to reach the bucket; boto3's own chain when None.
        within: Where a path must lead, as `Roots.source` gave it; None: anywhere.

    Raises:
        BadInput: It is not there, or not a file.
        SetupError, StoreFailed: The bucket is missing, refuses us, or does not answer.
    """
    if source.startswith("s3://"):
        place = Destination.parse(source)
        if not place.prefix:
            raise BadInput(f"{source} names a bucket and no file in it: s3://BUCKET/KEY.")
        return S3Files(place.bucket, access).open(source.removeprefix(f"s3://{place.bucket}/"))
    try:
        return Path(source).expanduser().open("rb") if within is None else within.stream(Path(source))
    except FileNotFoundError:
        raise BadInput(f"{source}: there is no such file.") from None
    except IsADirectoryError:
        raise BadInput(f"{source} is a folder: name the table in it.") from None
    except (OSError, ValueError, RuntimeError) as error:
        raise SetupError(f"{source} cannot be read: {error}.") from error
