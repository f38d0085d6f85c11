"""Reference pictures made reachable for the vendor, before anything is bought: looked at, signed for, or uploaded.

A picture of one's own is uploaded once for each SHA-256. `PREFIX/uploads/SHA256.json` says so, from before the upload:

    uploading ──► uploaded       its URL is good until it expires
        └───────► failed         whoever needs it next uploads it anew

A note that says `uploading` and is older than a claim is a dead process's: its URL is looked at, and what is there
need not be uploaded again.
"""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta, timezone

import httpx

from prefect_eachlabs.api.client import EachlabsClient
from prefect_eachlabs.api.once import Once
from prefect_eachlabs.api.probing import Prober
from prefect_eachlabs.errors import BadInput, EachlabsError, SetupError, StoreFailed, Unanswered
from prefect_eachlabs.ledger.records import Ledger
from prefect_eachlabs.limits.limiter import RateLimiter
from prefect_eachlabs.models import Destination
from prefect_eachlabs.net.public_only import HostGuard, HostRefused, addresses_of
from prefect_eachlabs.reference_images import Picture, Roots, UploadSlot, parse_date, parse_s3_name
from prefect_eachlabs.settings import AccountSettings
from prefect_eachlabs.storage.base import ObjectStore, PreconditionFailed, StoredObject
from prefect_eachlabs.storage.s3_client import S3Access

logger = logging.getLogger(__name__)

SCHEMA = "eachlabs-upload/1"
KEPT_SECONDS = 30 * 86_400
"""How long the vendor is asked to keep an uploaded picture: a batch may be finished so much later."""
MOST_SIGNED_SECONDS = 7 * 86_400
UPLOADS_AT_A_TIME = 4
"""Each is in memory on its way: at most 4 of 100 MB."""
UPLOAD_SECONDS = 600.0
ATTEMPTS = 3
FIRST_PAUSE_SECONDS = 0.5
LOOK_AGAIN_SECONDS = 2.0
REMEMBERED = 10_000

StoreFor = Callable[[Destination, "S3Access | None"], ObjectStore]
Url = Callable[[], Awaitable[str]]
"""Gives the URL that is sent, at the moment when it is sent."""


@dataclass(frozen=True)
class Upload:
    """A note about an uploaded picture, as it stands in the bucket."""

    sha256: str
    state: str
    public_url: str
    expires_at: str
    content_type: str
    size_bytes: int
    api: str
    write_id: str
    schema: str = SCHEMA

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode()

    @classmethod
    def read(cls, found: StoredObject | None) -> Upload | None:
        """The note in an object; None when it holds none that can be read."""
        try:
            body = json.loads(found.body) if found is not None else None
            note = cls(**{name: body[name] for name in cls.__dataclass_fields__}) if isinstance(body, dict) else None
        except (ValueError, KeyError, TypeError):
            return None
        return note if note is not None and note.schema == SCHEMA else None


class References:
    """Makes reference pictures reachable, each once a run.

    Args:
        client: Asks the API where a picture may be put.
        slots: The account's; each such question takes a request slot.
        settings: The account.
        store_for: Opens other buckets than the destination's.
        transport: Replaces the network for looks and uploads; it never sees the key.
    """

    def __init__(
        self,
        client: EachlabsClient,
        limiter: RateLimiter,
        settings: AccountSettings,
        store_for: StoreFor,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._client = client
        self._limiter = limiter
        self._settings = settings
        self._store_for = store_for
        self._roots = Roots.parse(settings.reference_roots)
        # What replaces the network finds the hosts by itself.
        hosts = HostGuard.of(settings, resolve=addresses_of if transport is None else None)
        self._prober = Prober(transport, hosts=hosts)
        self._looks: Once[str, object] = Once()
        self._uploads: Once[tuple[str, str], Upload] = Once()
        self._known: OrderedDict[str, Upload] = OrderedDict()
        self._turns = asyncio.Semaphore(UPLOADS_AT_A_TIME)

    async def ready(
        self, name: str, source: Picture | str | None, ledger: Ledger | None, *, anywhere: bool = False
    ) -> Url | None:
        """Makes one picture ready to be sent, and returns what gives its URL then; None: it is no picture's name.

        Args:
            name: What stands in the item's input: a URL, `s3://bucket/key` or `sha256:DIGEST`.
            source: What the item says it stands for: the picture, or the signed URL.
            ledger: Where the item's record is; uploads are remembered beside it.
            anywhere: A person at the command line named it: every bucket will do.

        Raises:
            BadInput: It may not be taken, is not there, too large or no picture. Nothing was bought.
            Unanswered, Throttled, NotSent, StoreFailed: It could not be uploaded now: run again.
            KeyRefused, SetupError: The key or the bucket is refused.
        """
        if isinstance(source, Picture):
            where = "" if ledger is None else str(ledger.destination)
            upload = await self._uploads.get((where, source.sha256), lambda: self._upload(source, ledger))
            return _always(upload.public_url)
        if (object_name := parse_s3_name(name)) is not None:
            bucket, key = object_name
            store = self._store_of(bucket, key, ledger, anywhere=anywhere)
            if self._settings.check_references == "yes":
                await self._looks.get(name, lambda: self._look_into(store, key, name))
            return lambda: self._signed(store, key)
        if name.startswith(("http://", "https://")):
            url = source or name
            if self._settings.check_references == "yes":
                await self._looks.get(url, lambda: self._prober.check(url))
            return _always(url)
        return None

    # ------------------------------------------------------------------------ in a bucket

    def _store_of(self, bucket: str, key: str, ledger: Ledger | None, *, anywhere: bool) -> ObjectStore:
        if ledger is not None and bucket == ledger.destination.bucket:
            return ledger.store
        if not anywhere and not self._roots.allow_object(bucket, key):
            raise BadInput(
                f"image_url: s3://{bucket}/{key} may not be taken: it is in another bucket than the destination, and "
                "EACHLABS_REFERENCE_ROOTS does not name it. Set it to a list such as "
                f"/data/pictures:s3://{bucket}, on the machine that runs this. Nothing was bought."
            )
        return self._store_for(Destination(bucket=bucket), None if ledger is None else ledger.access)

    async def _signed(self, store: ObjectStore, key: str) -> str:
        """A URL that outlives the prediction twice over, whatever its deadline."""
        seconds = max(3_600, int(2 * self._settings.deadline_seconds) + 600)
        return await store.presigned_get(key, expires_seconds=min(seconds, MOST_SIGNED_SECONDS))

    async def _look_into(self, store: ObjectStore, key: str, name: str) -> object:
        """Through the signed URL, as the vendor will: it is there, the signature is good, and it is a picture."""
        try:
            return await self._prober.check(await self._signed(store, key), shown=name, signed=True)
        except SetupError as error:
            # It is about this picture; the next one's bucket may be well.
            raise BadInput(f"image_url: {name}: {error.message} Nothing was bought.") from error

    # -------------------------------------------------------------------- of one's own

    async def _upload(self, picture: Picture, ledger: Ledger | None) -> Upload:
        known = self._known.get(picture.sha256)
        if ledger is None:
            if known is None or not self._is_good(known):
                known = await self._put(picture, await self._presign(picture))
        else:
            known = await self._remembered(picture, ledger, known)
        self._known[picture.sha256] = known
        if len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return known

    async def _remembered(self, picture: Picture, ledger: Ledger, known: Upload | None) -> Upload:
        """The picture's upload, found in the bucket or done now."""
        key = ledger.destination.key(f"uploads/{picture.sha256}.json")
        while True:
            found = await ledger.store.get(key)
            note = Upload.read(found)
            if note is not None and self._is_good(note) and note.state != "failed":
                assert found is not None, "a note was found"
                if note.state == "uploaded":
                    return note
                if await self._is_there(note):
                    done = replace(note, state="uploaded")
                    await self._note(ledger, key, done, found.etag)
                    return done
                if found.age_seconds <= self._settings.claim_seconds + 1:
                    logger.info("Another run uploads reference picture %s: waiting for it.", picture.sha256[:12])
                    await asyncio.sleep(LOOK_AGAIN_SECONDS)
                    continue
            etag = None if found is None else found.etag
            if known is not None and self._is_good(known):
                await self._note(ledger, key, known, etag)
                return known
            slot = await self._presign(picture)
            begun = await self._note(ledger, key, self._note_of(picture, slot, "uploading"), etag)
            if begun is None:
                continue  # another run was quicker
            try:
                done = await self._put(picture, slot)
            except EachlabsError:
                await self._note(ledger, key, self._note_of(picture, slot, "failed"), begun)
                raise
            await self._note(ledger, key, done, begun)
            return done

    async def _note(self, ledger: Ledger, key: str, note: Upload, etag: str | None) -> str | None:
        """Writes a note over the one that was read; its ETag, or None when another run has written meanwhile."""
        note = replace(note, write_id=uuid.uuid4().hex)
        try:
            return await ledger.store.put(
                key,
                note.to_bytes(),
                content_type="application/json",
                if_match=etag if ledger.conditional else None,
                if_absent=etag is None and ledger.conditional,
            )
        except PreconditionFailed:
            # boto3 repeats a put whose answer was lost: then it is our own that stands there.
            found = await ledger.store.get(key)
            current = Upload.read(found)
            ours = found is not None and current is not None and current.write_id == note.write_id
            return found.etag if ours and found is not None else None
        except StoreFailed as error:
            if note.state == "uploading":
                raise
            logger.warning("The note %s could not be written (%s).", ledger.store.uri(key), error)
            return None

    def _note_of(self, picture: Picture, slot: UploadSlot, state: str) -> Upload:
        expires_at = slot.expires_at or datetime.now(timezone.utc) + timedelta(seconds=KEPT_SECONDS)
        return Upload(
            sha256=picture.sha256,
            state=state,
            public_url=slot.public_url,
            expires_at=expires_at.isoformat(),
            content_type=picture.content_type,
            size_bytes=picture.size_bytes,
            api=self._settings.base_url,
            write_id="",
        )

    def _is_good(self, note: Upload) -> bool:
        """Whether its URL is of this API and outlives a prediction that begins now."""
        expires_at = parse_date(note.expires_at)
        soon = datetime.now(timezone.utc) + timedelta(seconds=max(3_600, 2 * self._settings.deadline_seconds))
        return note.api == self._settings.base_url and expires_at is not None and expires_at > soon

    async def _is_there(self, note: Upload) -> bool:
        try:
            return (await self._prober.check(note.public_url)).size_bytes == note.size_bytes
        except BadInput:
            return False

    async def _presign(self, picture: Picture) -> UploadSlot:
        request = await self._limiter.take_request()
        try:
            return await self._client.presign(content_type=picture.content_type, expires_in_seconds=KEPT_SECONDS)
        finally:
            request.done()

    async def _put(self, picture: Picture, slot: UploadSlot) -> Upload:
        """Puts the bytes where the API said; repeated, for the same bytes at the same slot change nothing."""
        pause_seconds, reason = FIRST_PAUSE_SECONDS, ""
        async with self._turns:
            # Where it is in memory there is nothing to wait for.
            data = picture.data if picture.data is not None else await asyncio.to_thread(picture.read)
            for attempt in range(1, ATTEMPTS + 1):
                reason, may_be_repeated = await self._put_once(slot, data)
                if not reason:
                    logger.info("Reference picture %s is uploaded.", picture.sha256[:12])
                    return self._note_of(picture, slot, "uploaded")
                if not may_be_repeated or attempt == ATTEMPTS:
                    break
                await asyncio.sleep(pause_seconds)
                pause_seconds *= 2
        raise Unanswered(
            f"Reference picture {picture.path or picture.name} could not be uploaded ({reason}): run again. "
            "Nothing was bought.",
            kind="upload failed",
        )

    async def _put_once(self, slot: UploadSlot, data: bytes) -> tuple[str, bool]:
        """What went wrong (empty: nothing), and whether it may go well next time. The key does not go along."""
        try:
            # The required headers as they are; httpx adds no Content-Type to bytes of its own accord.
            headers = slot.required_headers
            request = self._prober.client.build_request("PUT", slot.presigned_url, content=data, headers=headers)
            answer = await asyncio.wait_for(self._prober.client.send(request, stream=True), UPLOAD_SECONDS)
            await answer.aclose()  # its status is all that matters, and its body may be of any size
        except HostRefused as refused:
            return f"its place is said to be at {refused}; EACHLABS_PRIVATE_HOSTS could allow it", False
        except (asyncio.TimeoutError, httpx.TimeoutException):
            return "time-out", True
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            return type(error).__name__, True
        if answer.is_success:
            return "", False
        return f"HTTP {answer.status_code} from the store", answer.status_code >= 500 or answer.status_code == 429

    async def aclose(self) -> None:
        """Ends looks and uploads under way."""
        await self._looks.aclose()
        await self._uploads.aclose()
        await self._prober.aclose()


def _always(url: str) -> Url:
    async def give() -> str:
        return url

    return give
