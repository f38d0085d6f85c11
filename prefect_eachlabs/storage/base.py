"""What a store of objects is to this project: the interface, its two answers, and the proof that conditions hold.

`storage.S3Store` is the real one. Nothing here knows boto3.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Protocol
from urllib.parse import quote


class PreconditionFailed(Exception):
    """A conditional put was refused (412), met a concurrent one (409), or its If-Match object is gone (404)."""


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

    def list(self, prefix: str) -> AsyncIterator[ListedObject]: ...

    def uri(self, key: str) -> str: ...

    async def presigned_get(self, key: str, *, expires_seconds: int) -> str: ...


def ascii_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """Metadata travels in headers: lower-case names; values that are not printable ASCII percent-encoded."""
    return {
        name.lower(): value if value.isascii() and value.isprintable() else quote(value)
        for name, value in metadata.items()
    }


async def honours_conditions(store: ObjectStore, key: str, body: bytes, *, content_type: str) -> bool:
    """Whether a store refuses what `If-None-Match: *` and `If-Match` forbid, tried over the object at `key`.

    Two requests. `body` is what stands there: the same body again changes nothing, whatever the store answers.

    Raises:
        StoreFailed, SetupError: As any other write.
    """
    for condition in ({"if_absent": True}, {"if_match": '"00000000000000000000000000000000"'}):
        try:
            await store.put(key, body, content_type=content_type, **condition)
        except PreconditionFailed:
            continue
        return False
    return True
