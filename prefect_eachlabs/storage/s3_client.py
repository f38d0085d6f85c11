"""How this process reaches S3: access, the client and the threads of a process, and errors in plain words."""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import io
import logging
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, TypeVar
from urllib.parse import urlsplit

import boto3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectTimeoutError,
    CredentialRetrievalError,
    EndpointConnectionError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
    SSOError,
    TokenRetrievalError,
)
from botocore.exceptions import ConnectionError as BotoConnectionError

from prefect_eachlabs.errors import EachlabsError, SetupError, StoreFailed, without_query
from prefect_eachlabs.net import redaction
from prefect_eachlabs.net.public_only import is_loopback
from prefect_eachlabs.storage.base import PreconditionFailed

logger = logging.getLogger(__name__)
T = TypeVar("T")

THREADS = 16
CONNECT_SECONDS = 5.0
READ_SECONDS = 15.0
ATTEMPTS = 3
SENT_AT_ONCE_BYTES = 64 * 1024
"""What a connection takes unread: whoever refuses a larger body need not be sent it."""
MOST_WORDS = 8_000
"""Characters of what S3 says, at most, that are looked through."""
MOST_CODE_CHARACTERS = 100
MOST_XML_BYTES = 8_000_000
"""A list of 1,000 objects, S3's largest answer, is 4 MB where every character of their keys is escaped."""
CUT_OR_SILENT = (BotoConnectionError, HTTPClientError, IncompleteReadError)
"""What botocore raises when no answer came, or not the whole of it."""

_NO_CREDENTIALS = (
    NoCredentialsError,
    PartialCredentialsError,
    CredentialRetrievalError,
    ProfileNotFound,
    SSOError,
    TokenRetrievalError,
)
_SETUP_ADVICE = {
    "NoSuchBucket": "there is no such bucket: create it, or fix the destination",
    "InvalidBucketName": "this is not a valid bucket name: fix the destination",
    "InvalidAccessKeyId": "the access key is not known there: check AWS_ACCESS_KEY_ID or the S3Destination block",
    "SignatureDoesNotMatch": "the secret key does not fit the access key: check AWS_SECRET_ACCESS_KEY or the block",
    "ExpiredToken": "the session token has expired: log in again or renew AWS_SESSION_TOKEN",
    "InvalidToken": "the session token is not valid: renew AWS_SESSION_TOKEN or the block",
    "RequestTimeTooSkewed": "this machine's clock is wrong by more than 15 minutes: set it",
    "InvalidStorageClass": "the storage class is not known there: fix storage_class of the S3Destination block",
    "AccountProblem": "the AWS account is suspended or has a problem: ask its owner",
}
_WRONG_REGION = {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "301"}
_PASSING_REFUSALS = {
    "BadDigest",
    "IncompleteBody",
    "OperationAborted",
    "RequestTimeout",
    "RequestTimeoutException",
    "SlowDown",
    "Throttling",
    "XAmzContentSHA256Mismatch",
}
"""Refusals with a 4xx status that a repetition may fix."""


@dataclass(frozen=True, repr=False)
class S3Access:
    """How to reach S3; what is None comes from boto3's own chain (`AWS_*`, `AWS_ENDPOINT_URL_S3`, profiles, roles).

    `kms_key_id` encrypts every object with that key (SSE-KMS). `storage_class` is for pictures alone: records must
    stay readable at once.
    """

    endpoint_url: str | None = None
    region: str | None = None
    access_key_id: str | None = None
    secret_access_key: str | None = None
    session_token: str | None = None
    kms_key_id: str | None = None
    storage_class: str | None = None

    def __repr__(self) -> str:
        endpoint = without_query(self.endpoint_url) if self.endpoint_url else None
        keys = "given" if self.access_key_id or self.secret_access_key else "boto3's chain"
        return f"S3Access(endpoint_url={endpoint!r}, region={self.region!r}, credentials={keys})"


class S3Process:
    """The thread pool and the clients of one process."""

    def __init__(self) -> None:
        self.pool = concurrent.futures.ThreadPoolExecutor(THREADS, thread_name_prefix="eachlabs-s3")
        self._lock = threading.Lock()
        self._clients: dict[object, Any] = {}
        self._regions: dict[object, str | None] = {}

    def client(self, access: S3Access) -> Any:
        """The client of this access, made at first use; a changed AWS_ environment makes another one."""
        key = (access, frozenset((name, os.environ[name]) for name in os.environ if name.startswith("AWS_")))
        with self._lock:
            if key not in self._clients:
                self._clients[key] = _make_client(access)
            return self._clients[key]

    def region_of(self, bucket: str, access: S3Access) -> str | None:
        """The region that a bucket says it is in, asked once; None: it does not say."""
        client = self.client(access)
        key = (id(client), bucket)
        with self._lock:
            if key in self._regions:
                return self._regions[key]
        try:
            answer: dict[str, Any] = client.head_bucket(Bucket=bucket)
        except ClientError as error:
            answer = dict(error.response)  # a refusal names the region, too
        except BotoCoreError:
            return None
        region: str | None = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("x-amz-bucket-region")
        with self._lock:
            self._regions[key] = region
        return region


def _make_client(access: S3Access) -> Any:
    redaction.install()
    redaction.hide(access.secret_access_key, access.session_token)
    # A session of its own: boto3's default one is shared with the user's code and not safe across threads.
    session = boto3.session.Session()
    client = session.client(
        "s3",
        endpoint_url=access.endpoint_url,
        region_name=access.region,
        aws_access_key_id=access.access_key_id,
        aws_secret_access_key=access.secret_access_key,
        aws_session_token=access.session_token,
        config=Config(
            signature_version="s3v4",
            max_pool_connections=THREADS,
            connect_timeout=CONNECT_SECONDS,
            read_timeout=READ_SECONDS,
            retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
            # boto3's own is put together anew for each request, twice.
            user_agent="prefect-eachlabs",
            # boto3's default sends CRC trailers, which S3-compatible stores refuse or keep as part of the object.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        ),
    )
    client.meta.events.register("before-parse.s3", _refuse_entities)
    client.meta.events.register_last("before-call.s3", _send_at_once)
    if access.access_key_id is None:
        with suppress(BotoCoreError):  # the first request says what is wrong
            keys = session.get_credentials()
            frozen = keys.get_frozen_credentials() if keys is not None else None
            redaction.hide(*(frozen.secret_key, frozen.token) if frozen is not None else ())
    return client


_processes: dict[int, S3Process] = {}


def this_process() -> S3Process:
    """The pool and clients of this process; a forked child makes its own, threads and sockets are not inherited."""
    process_id = os.getpid()
    return _processes.get(process_id) or _processes.setdefault(process_id, S3Process())


def client_of(access: S3Access) -> Any:
    """The boto3 client of this process for that access."""
    return this_process().client(access)


async def run_in_pool(call: Callable[[], T], access: S3Access, *, uri: str, is_write: bool = False) -> T:
    """What `call` returns, run in the pool; what botocore raises comes out explained.

    A cancelled caller takes `call` back while it waits for a thread. Once begun it goes on; a write's end is logged.
    """
    work = this_process().pool.submit(_explained, call, access, uri)
    try:
        return await asyncio.wrap_future(work)
    except asyncio.CancelledError:
        if is_write and not work.cancelled():
            work.add_done_callback(functools.partial(_log_orphaned_write, uri))
        raise


def _explained(call: Callable[[], T], access: S3Access, uri: str) -> T:
    try:
        return call()
    except (EachlabsError, PreconditionFailed):
        raise
    except Exception as error:
        raise explain(error, uri=uri, endpoint=_endpoint(access)) from error


def _endpoint(access: S3Access) -> str:
    try:
        return without_query(str(client_of(access).meta.endpoint_url))
    except (BotoCoreError, ValueError):
        return without_query(access.endpoint_url) if access.endpoint_url else "S3"


def _log_orphaned_write(uri: str, work: concurrent.futures.Future[Any]) -> None:
    error = work.exception()
    if error is None:
        logger.info("The write of %s went through after its caller had been cancelled.", uri)
    else:
        logger.warning("The write of %s failed after its caller had been cancelled: %s", uri, error)


def code_and_status(error: ClientError) -> tuple[str, int]:
    """S3's error code (for HEAD the status as text) and the HTTP status (0 when not told)."""
    answer: dict[str, Any] = dict(error.response)
    code = str(answer.get("Error", {}).get("Code") or "")
    return code[:MOST_CODE_CHARACTERS], int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode") or 0)


def _send_at_once(params: dict[str, Any], **_: Any) -> None:
    """A small body goes with its headers: asking before it is sent (100-continue) takes a round trip more."""
    body = params.get("body")
    if isinstance(body, io.BytesIO) and body.getbuffer().nbytes <= SENT_AT_ONCE_BYTES:
        params["headers"].pop("Expect", None)


def _refuse_entities(response_dict: dict[str, Any], **_: Any) -> None:
    """S3 declares no document type: entities in one would be unfolded to a hundred times their size.

    What is put in place of such a body cannot be parsed, so that a refusal is told by its status all the same.
    """
    body = response_dict.get("body")  # of an object that is read it is a stream, and not parsed
    if isinstance(body, bytes) and (len(body) > MOST_XML_BYTES or b"<!DOCTYPE" in body):
        response_dict["body"] = b"<"


def explain(error: Exception, *, uri: str, endpoint: str) -> EachlabsError:
    """What botocore raised, as an error of ours that names the object, the endpoint and what to do.

    `uri` is `s3://bucket/key`. Keys and signed URLs never get into the message. What S3 said is cleaned in `error`,
    too: it becomes the cause, which tracebacks print as it stands.
    """
    error.args = tuple(
        redaction.shown(said[:MOST_WORDS])[: MOST_WORDS - 200] if isinstance(said, str) else said for said in error.args
    )
    place = f"{uri} at {endpoint}"
    if isinstance(error, ClientError):
        return _explain_refusal(error, place)
    if isinstance(error, _NO_CREDENTIALS):
        return SetupError(
            f"No usable AWS credentials for {place} ({type(error).__name__}): set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or an S3Destination block."
        )
    if isinstance(error, CUT_OR_SILENT):
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            return SetupError(f"The certificate of {endpoint} is not trusted: set AWS_CA_BUNDLE, or fix the endpoint.")
        nobody = isinstance(error, (EndpointConnectionError, ConnectTimeoutError))
        said = f"{'No S3 answers' if nobody else 'S3 gave no whole answer'} at {endpoint} (AWS_ENDPOINT_URL_S3)"
        here = nobody and is_loopback(urlsplit(endpoint).hostname or "")
        hint = " Is `prefect-eachlabs s3` running?" if here else ""
        return StoreFailed(f"{said} for {uri} ({type(error).__name__}).{hint} Run again: nothing is bought twice.")
    if isinstance(error, (BotoCoreError, ValueError)):
        return SetupError(f"boto3 cannot ask for {place}: {type(error).__name__}: {str(error)[:300]}. Fix the set-up.")
    return StoreFailed(f"The store's answer for {place} was not understood ({type(error).__name__}): run again.")


def _explain_refusal(error: ClientError, place: str) -> EachlabsError:
    code, status = code_and_status(error)
    said = f"S3 refused {place} ({code or 'no code'}, HTTP {status or 'unknown'})"
    if advice := _SETUP_ADVICE.get(code):
        return SetupError(f"{said}: {advice}.", status_code=status, code=code)
    if code in _WRONG_REGION or status == HTTPStatus.MOVED_PERMANENTLY:
        answer: dict[str, Any] = dict(error.response)
        headers = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {})
        region = headers.get("x-amz-bucket-region") or answer.get("Error", {}).get("Region")
        there = f"its region is {str(region)[:MOST_CODE_CHARACTERS]}" if region else "the bucket is in another region"
        return SetupError(f"{said}: {there}; set AWS_REGION or the block's region.", status_code=status, code=code)
    if code.startswith("KMS."):
        return SetupError(f"{said}: the KMS key cannot be used: check kms_key_id and its policy.", code=code)
    if status in (401, 403) or code == "AccessDenied":
        return SetupError(
            f"{said}: these credentials need s3:GetObject, s3:PutObject and s3:ListBucket there (without ListBucket, "
            "S3 says 403 for objects that do not exist), and the KMS key's permissions where one is set.",
            status_code=status,
            code=code,
        )
    if (
        status in (408, 409, 429)
        or status >= HTTPStatus.INTERNAL_SERVER_ERROR
        or not status
        or code in _PASSING_REFUSALS
    ):
        return StoreFailed(
            f"{said}: run again; nothing is bought twice.",
            status_code=status or None,
            code=code,
        )
    # Cleaned before it is cut: half a secret is not known any more.
    words = redaction.shown(str(error.response.get("Error", {}).get("Message") or "")[:MOST_WORDS])
    return SetupError(f"{said}: {words[:300]} Fix the destination or the S3 settings.", status_code=status, code=code)
