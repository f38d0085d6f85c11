"""Reference pictures that were uploaded through presigned URLs. Bounded in memory."""

from __future__ import annotations

import hashlib
import re
import secrets
import uuid
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any
from urllib.parse import parse_qs, urlsplit

MAX_UPLOAD_BYTES = 100_000_000
URL_LIFETIME_SECONDS = 15 * 60.0
RETENTION_SECONDS = 180 * 86_400
_MAX_KEPT_BYTES = 512 * 1024 * 1024
_PUBLIC = re.compile(r"/uploads/([^/.?#]+)")
SUFFIXES = {"image/png": "png", "image/jpeg": "jpg", "image/webp": "webp", "image/gif": "gif", "video/mp4": "mp4"}


@dataclass
class Upload:
    """A presigned upload: `body` is None until the PUT came."""

    id: str
    content_type: str
    signature: str
    created: float
    body: bytes | None = None

    @property
    def required_headers(self) -> dict[str, str]:
        return {"content-type": self.content_type, "x-amz-meta-file-id": self.id}

    @property
    def suffix(self) -> str:
        return SUFFIXES.get(self.content_type, "bin")


class UploadShelf:
    """Uploads by id; the oldest are thrown out when all together hold too many bytes."""

    _MAX_PRESIGNED = 100_000

    def __init__(self) -> None:
        self._uploads: OrderedDict[str, Upload] = OrderedDict()
        self._kept_bytes = 0
        self._by_sha256: Counter[str] = Counter()
        self.received = 0

    def presign(self, content_type: str, now: float) -> Upload:
        upload = Upload(str(uuid.uuid4()), content_type, secrets.token_hex(16), now)
        self._uploads[upload.id] = upload
        while len(self._uploads) > self._MAX_PRESIGNED:
            self.delete(next(iter(self._uploads)))
        return upload

    def get(self, upload_id: str) -> Upload | None:
        return self._uploads.get(upload_id)

    def receive(self, upload: Upload, body: bytes) -> None:
        self._kept_bytes += len(body) - len(upload.body or b"")
        upload.body = body
        self.received += 1
        self._by_sha256[hashlib.sha256(body).hexdigest()] += 1
        for oldest in list(self._uploads.values()):
            if self._kept_bytes <= _MAX_KEPT_BYTES:
                break
            if oldest is not upload and oldest.body is not None:
                self.delete(oldest.id)

    def delete(self, upload_id: str) -> None:
        upload = self._uploads.pop(upload_id, None)
        if upload is not None:
            self._kept_bytes -= len(upload.body or b"")

    def repeated(self) -> dict[str, int]:
        """SHA-256 → how often, of what was uploaded more than once."""
        return {sha256: count for sha256, count in self._by_sha256.items() if count > 1}

    def missing_from(self, input: Mapping[str, Any], base_url: str) -> list[str]:
        """URLs in an input that point to this server's uploads and lead to no uploaded file."""
        return [
            text
            for text in texts_in(input)
            if text.startswith(base_url)
            and (match := _PUBLIC.match(text[len(base_url) :]))
            and ((found := self.get(match[1])) is None or found.body is None)
        ]


def expiry_of(url: str) -> datetime | None:
    """When a presigned URL of S3's kind ends; None: it is none."""
    said = parse_qs(urlsplit(url).query)
    try:
        signed = datetime.strptime(said["X-Amz-Date"][0], "%Y%m%dT%H%M%SZ").replace(tzinfo=timezone.utc)
        return signed + timedelta(seconds=int(said["X-Amz-Expires"][0]))
    except (KeyError, ValueError, OverflowError):
        return None


def texts_in(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from texts_in(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from texts_in(inner)
