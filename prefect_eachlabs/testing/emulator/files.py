"""What needs no key: the pictures, the presigned uploads and their public URLs; and POST /v1/upload/presign."""

from __future__ import annotations

import hmac
import re
import uuid
from datetime import timedelta

from fastapi import APIRouter, Request
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

from prefect_eachlabs.testing.emulator import wire
from prefect_eachlabs.testing.emulator.api import BadBody, base_url, read_json
from prefect_eachlabs.testing.emulator.clock import rfc3339
from prefect_eachlabs.testing.emulator.core import Emulator
from prefect_eachlabs.testing.emulator.responses import error
from prefect_eachlabs.testing.emulator.spoilt import redirected_again, spoil
from prefect_eachlabs.testing.emulator.uploads import (
    MAX_UPLOAD_BYTES,
    RETENTION_SECONDS,
    URL_LIFETIME_SECONDS,
    Upload,
)

_PICTURE = re.compile(r"([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})(?:-([0-9]{1,2}))?\.(png|jpeg|webp|gif)")
_CONTENT_TYPE = re.compile(r"[a-z0-9.+-]+/[a-z0-9.+-]+", re.IGNORECASE)


def xml_error(status: int, code: str, message: str) -> Response:
    """As the store behind the presigned URL words its refusals."""
    body = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>{message}</Message></Error>'
    return Response(body, status_code=status, media_type="application/xml")


def presign_faults(body: dict[str, object]) -> str | None:
    """What is wrong with the body of a presign request, if anything."""
    content_type = body.get("content_type")
    if not isinstance(content_type, str) or not _CONTENT_TYPE.fullmatch(content_type):
        return "content_type is required"
    if body.get("file_type", "image") not in ("image", "video", "audio", "other"):
        return "file_type must be one of image, video, audio, other"
    seconds = body.get("expires_in_seconds", RETENTION_SECONDS)
    if isinstance(seconds, bool) or not isinstance(seconds, int):
        return "expires_in_seconds must be an integer"
    return None


async def _read_upload(request: Request) -> bytes | None:
    """The body; None when it is longer than 100 MB.

    Raises:
        ClientDisconnect: The client left in the middle.
    """
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size <= MAX_UPLOAD_BYTES:
            parts.append(part)
    return b"".join(parts) if size <= MAX_UPLOAD_BYTES else None


def _refusal(emulator: Emulator, request: Request, upload: Upload | None) -> Response | None:
    """Why a PUT to a presigned URL is refused: signature, time, or headers that are not exactly the required ones."""
    signature = request.query_params.get("X-Amz-Signature", "")
    if upload is None or not hmac.compare_digest(signature.encode(), upload.signature.encode()):
        return xml_error(403, "SignatureDoesNotMatch", "The signature does not match.")
    if emulator.clock.now() > upload.created + URL_LIFETIME_SECONDS:
        return xml_error(403, "AccessDenied", "Request has expired")
    if "authorization" in request.headers:
        return xml_error(400, "InvalidArgument", "Only one auth mechanism allowed")
    for name, value in upload.required_headers.items():
        if request.headers.getlist(name) != [value]:
            return xml_error(403, "SignatureDoesNotMatch", f"The signed header {name} is missing or has another value.")
    for name in request.headers:
        if name.startswith("x-amz-") and name not in upload.required_headers:
            return xml_error(403, "AccessDenied", "There were headers present in the request which were not signed")
    return None


def file_routes(emulator: Emulator) -> APIRouter:
    """Routes for files."""
    router = APIRouter()

    @router.get("/files/{name}")
    @router.head("/files/{name}")
    async def download(request: Request, name: str) -> Response:
        match = _PICTURE.fullmatch(name)
        now = emulator.clock.now()
        job = emulator.ledger.get(match[1], now) if match else None
        number = int(match[2] or 1) if match else 1
        if match is None or job is None or job.status_at(now) != "success" or not 1 <= number <= job.pictures:
            return error(404, "Not Found")
        wire.entry_of(request).prediction_id = job.id
        hop = request.query_params.get("hop", "")
        if (again := redirected_again(request.url.path, hop)) is not None:
            return again
        picture = await emulator.pictures.picture(job, number, match[3])
        media_type = f"image/{match[3]}"
        if request.method == "HEAD":
            return Response(headers={"content-length": str(len(picture))}, media_type=media_type)
        emulator.downloads += 1
        fault = None if hop else emulator.faults.draw("picture", text=job.prompt, subject=name)
        if fault is None:
            return Response(picture, media_type=media_type)
        wire.note(request, fault)
        return spoil(picture, media_type, fault, emulator.clock, path=request.url.path)

    @router.post("/v1/upload/presign")
    @router.post("/v1/upload/presign/")
    async def presign(request: Request) -> Response:
        if (answer := await wire.before(emulator, request, "presign")) is not None:
            return answer
        try:
            body = await read_json(request)
        except BadBody as bad:
            return bad.answer
        if (wrong := presign_faults(body)) is not None:
            return error(400, wrong)
        now = emulator.clock.now()
        upload = emulator.uploads.presign(str(body["content_type"]), now)
        kept_seconds = min(max(int(str(body.get("expires_in_seconds", RETENTION_SECONDS))), 60), 31_536_000)
        base = emulator.options.public_url or base_url(request)
        said = {
            "id": upload.id,
            "presigned_url": f"{base}/storage/uploads/{upload.id}?X-Amz-Expires=900&X-Amz-Signature={upload.signature}",
            "public_url": f"{base}/uploads/{upload.id}.{upload.suffix}",
            "expires_at": rfc3339(emulator.calendar.date(now) + timedelta(seconds=kept_seconds)),
            "required_headers": upload.required_headers,
        }
        faults = wire.drawn_after(emulator, request, "presign")
        return await wire.after(emulator, JSONResponse(said), faults)

    @router.delete("/v1/files/{upload_id}")
    async def delete(upload_id: str) -> Response:
        try:
            emulator.uploads.delete(str(uuid.UUID(upload_id)))
        except ValueError:
            return error(400, "id must be a UUID")
        return Response(status_code=204)

    @router.put("/storage/uploads/{upload_id}")
    async def put(request: Request, upload_id: str) -> Response:
        if (answer := await wire.before(emulator, request, "upload")) is not None:
            return answer
        upload = emulator.uploads.get(upload_id)
        if (refusal := _refusal(emulator, request, upload)) is not None or upload is None:
            return refusal or error(404, "Not Found")
        try:
            body = await _read_upload(request)
        except ClientDisconnect:
            return xml_error(400, "IncompleteBody", "The request body terminated unexpectedly")
        if body is None:
            return xml_error(400, "EntityTooLarge", "Your proposed upload exceeds the maximum allowed size: 100 MB")
        emulator.uploads.receive(upload, body)
        faults = wire.drawn_after(emulator, request, "upload")
        return await wire.after(emulator, Response(headers={"etag": f'"{upload.id}"'}), faults)

    @router.get("/uploads/{name}")
    @router.head("/uploads/{name}")
    async def uploaded(name: str) -> Response:
        upload = emulator.uploads.get(name.partition(".")[0])
        if upload is None or upload.body is None or name != f"{upload.id}.{upload.suffix}":
            return xml_error(404, "NoSuchKey", "The specified key does not exist.")
        return Response(upload.body, media_type=upload.content_type)

    return router
