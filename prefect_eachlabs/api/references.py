"""Reference pictures made reachable for the vendor, before anything is bought: looked at, signed for, or uploaded.

A picture of one's own is uploaded once for each SHA-256 and process: uploads are free.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta, timezone

import httpx

from prefect_eachlabs.api.client import EachlabsClient
from prefect_eachlabs.api.once import Once
from prefect_eachlabs.api.probing import Prober
from prefect_eachlabs.errors import BadInput, SetupError, Unanswered
from prefect_eachlabs.limits.limiter import RateLimiter
from prefect_eachlabs.models import Destination
from prefect_eachlabs.net.public_only import HostGuard, HostRefused, addresses_of
from prefect_eachlabs.reference_images import Picture, Roots, UploadSlot, parse_s3_name
from prefect_eachlabs.settings import AccountSettings
from prefect_eachlabs.storage.base import ObjectStore
from prefect_eachlabs.storage.s3_client import S3Access

logger = logging.getLogger(__name__)

KEPT_SECONDS = 30 * 86_400
"""How long the vendor is asked to keep an uploaded picture: a batch may be finished so much later."""
MOST_SIGNED_SECONDS = 7 * 86_400
UPLOADS_AT_A_TIME = 4
"""Each is in memory on its way: at most 4 of 100 MB."""
UPLOAD_SECONDS = 600.0
ATTEMPTS = 3
FIRST_PAUSE_SECONDS = 0.5

StoreFor = Callable[[Destination, "S3Access | None"], ObjectStore]
Url = Callable[[], Awaitable[str]]
"""Gives the URL that is sent, at the moment when it is sent."""


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
        resolve = addresses_of if transport is None else None
        hosts = HostGuard(settings.private_hosts, settings.api_host, resolve=resolve)
        self._prober = Prober(transport, hosts=hosts)
        self._looks: Once[str, object] = Once()
        self._uploads: Once[str, tuple[str, datetime]] = Once()
        self._turns = asyncio.Semaphore(UPLOADS_AT_A_TIME)

    async def ready(
        self,
        name: str,
        source: Picture | str | None,
        destination: Destination,
        access: S3Access | None,
        *,
        anywhere: bool = False,
    ) -> Url | None:
        """Makes one picture ready to be sent, and returns what gives its URL then; None: it is no picture's name.

        Args:
            name: What stands in the item's input: a URL, `s3://bucket/key` or `sha256:DIGEST`.
            source: What the item says it stands for: the picture, or the signed URL.
            destination: The item's. That a run writes there gives it no right to read there.
            access: How that bucket is reached, and others with it; given where an operator's block names the
                destination, below which objects may then be taken.
            anywhere: A person at the command line named it: every bucket will do.

        Raises:
            BadInput: It may not be taken, is not there, too large or no picture. Nothing was bought.
            Unanswered, Throttled, NotSent, StoreFailed: It could not be uploaded now: run again.
            KeyRefused, SetupError: The key or the bucket is refused.
        """
        if isinstance(source, Picture):
            return _always(await self._uploaded(source))
        if (object_name := parse_s3_name(name)) is not None:
            bucket, key = object_name
            roots = self._roots if access is None else self._roots.and_below(destination.bucket, destination.prefix)
            if not (anywhere or roots.allow_object(bucket, key)):
                raise BadInput(
                    f"image_url: s3://{bucket}/{key} may not be taken: EACHLABS_REFERENCE_ROOTS does not name its "
                    f"place. Set it to a list such as /data/pictures:s3://{bucket}/FOLDER on the machine that runs "
                    "this; or write to an S3Destination block, below which pictures may be taken. Nothing was bought."
                )
            store = self._store_for(Destination(bucket=bucket), access)
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

    async def _uploaded(self, picture: Picture) -> str:
        """The public URL of the picture, uploaded once; anew when its time is about to end."""
        longest = timedelta(seconds=max(3_600, 2 * self._settings.deadline_seconds))
        known = self._uploads.known(picture.sha256)
        if known is not None and known[1] < datetime.now(timezone.utc) + longest:
            self._uploads.forget(picture.sha256)
        url, _ = await self._uploads.get(picture.sha256, lambda: self._upload(picture))
        return url

    async def _upload(self, picture: Picture) -> tuple[str, datetime]:
        slot = await self._presign(picture)
        await self._put(picture, slot)
        return slot.public_url, slot.expires_at or datetime.now(timezone.utc) + timedelta(seconds=KEPT_SECONDS)

    async def _presign(self, picture: Picture) -> UploadSlot:
        request = await self._limiter.take_request()
        try:
            return await self._client.presign(content_type=picture.content_type, expires_in_seconds=KEPT_SECONDS)
        finally:
            request.done()

    async def _put(self, picture: Picture, slot: UploadSlot) -> None:
        """Puts the bytes where the API said; repeated, for the same bytes at the same slot change nothing."""
        pause_seconds, reason = FIRST_PAUSE_SECONDS, ""
        async with self._turns:
            # Where it is in memory there is nothing to wait for.
            data = picture.data if picture.data is not None else await asyncio.to_thread(picture.read)
            for attempt in range(1, ATTEMPTS + 1):
                reason, may_be_repeated = await self._put_once(slot, data)
                if not reason:
                    logger.info("Reference picture %s is uploaded.", picture.sha256[:12])
                    return
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
