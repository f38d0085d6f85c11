"""What a store of objects is to this project: the interface, its two answers, and the proof that conditions hold.

`storage.S3Store` is the real one. Nothing here knows boto3.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Awaitable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Protocol
from urllib.parse import quote

from prefect_eachlabs.errors import SetupError


class PreconditionFailed(Exception):
    """A conditional put was refused (412), met a concurrent one (409), or its If-Match object is gone (404)."""


class ConditionsNotSupported(SetupError):
    """The store answered that it does not implement conditional writes."""


@dataclass(frozen=True)
class StoredObject:
    """An object as one answer of the store described it.

    `age_seconds` is `Date` minus `Last-Modified` of that one answer, both whole seconds of the store's own clock:
    right to about a second, and slightly negative where the store's machines disagree.
    """

    key: str
    etag: str
    age_seconds: float
    date: datetime
    size_bytes: int
    metadata: dict[str, str]
    body: bytes = b""


@dataclass(frozen=True)
class ListedObject:
    """A row of a listing; `age_seconds` and `date` by the store's clock as in `StoredObject`."""

    key: str
    etag: str
    size_bytes: int
    age_seconds: float
    date: datetime

    @property
    def modified_at(self) -> datetime:
        return self.date - timedelta(seconds=self.age_seconds)


class ObjectStore(Protocol):
    """One bucket. `S3Store` is the real one; whatever has this shape and S3's semantics will do."""

    async def get(self, key: str) -> StoredObject | None: ...

    async def head(self, key: str) -> StoredObject | None: ...

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
    ) -> str: ...

    def list(self, prefix: str, *, start_after: str = "") -> AsyncIterator[ListedObject]: ...

    def uri(self, key: str) -> str: ...

    async def presigned_get(self, key: str, *, expires_seconds: int) -> str: ...


def ascii_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """Metadata travels in headers: lower-case names; values that are not printable ASCII percent-encoded."""
    return {
        name.lower(): value if value.isascii() and value.isprintable() else quote(value)
        for name, value in metadata.items()
    }


async def check_conditional_writes(store: ObjectStore, probe_key: str) -> bool:
    """Whether this store really honours `If-None-Match: *` and `If-Match`: it tries to break its own probe object.

    Sends 4 to 5 requests and leaves one small object at `probe_key`. Safe while others check with the same key.

    Raises:
        StoreFailed, SetupError: As any other write.
    """

    async def write(**condition: Any) -> str:
        # A body of its own each time: two equal bodies have one ETag, and a stale one would seem current.
        body = f"Written by prefect-eachlabs to see whether conditional writes work: {secrets.token_hex(8)}\n"
        return await store.put(probe_key, body.encode(), content_type="text/plain", **condition)

    try:
        if not await _is_refused(write(if_absent=True)) and not await _is_refused(write(if_absent=True)):
            return False
        for _ in range(5):
            if (seen := await store.head(probe_key)) is None:
                return False
            try:
                await write(if_match=seen.etag)
            except PreconditionFailed:
                continue  # somebody else writes the same probe
            return await _is_refused(write(if_match=seen.etag))
    except ConditionsNotSupported:
        return False
    return False


async def _is_refused(write: Awaitable[object]) -> bool:
    try:
        await write
    except PreconditionFailed:
        return True
    return False
