"""Reference pictures made reachable for the vendor, before anything is bought: looked at, signed for, or uploaded.

`prepare_input` is what buyers call. A picture at a URL is looked at as the vendor will see it, one in a bucket gets a
signed URL, and one of one's own is uploaded once for each SHA-256 and process: uploads are free. No API key goes along.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any

import httpx

from prefect_eachlabs.api.catalogue import Catalogue
from prefect_eachlabs.api.client import EachlabsClient
from prefect_eachlabs.api.single_flight import SingleFlight
from prefect_eachlabs.errors import BadInput, EachlabsError, SetupError, Unanswered, without_query
from prefect_eachlabs.limits.limiter import RateLimiter
from prefect_eachlabs.models import Destination, Item, UploadSlot, without_signature
from prefect_eachlabs.net.bodies import byte_count, encoding_of
from prefect_eachlabs.net.public_get import LeadsNowhere, PublicWeb
from prefect_eachlabs.net.public_only import SETTING, HostGuard, HostRefused, addresses_of
from prefect_eachlabs.reference_images import (
    MAX_PICTURE_BYTES,
    SNIFFED_BYTES,
    Picture,
    Roots,
    content_type_of,
    names_in,
    parse_s3_name,
    with_names,
)
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
LOOK_SECONDS = 30.0
PAUSES_SECONDS = (0.0, 0.5, 1.0)
"""Before each attempt of a look, or of an upload."""
_OF_OBJECTS = {403: "it is not there, or these credentials may not read it", 404: "there is no such object"}

StoreFor = Callable[[Destination, "S3Access | None"], ObjectStore]
Url = Callable[[], Awaitable[str]]
"""Gives the URL that is sent, at the moment when it is sent."""
Prepared = Callable[[], Awaitable[Item]]
"""Gives the item as it is sent; asked right before the POST, so that signed URLs are fresh."""


async def prepare_input(
    catalogue: Catalogue,
    references: References,
    item: Item,
    destination: Destination,
    access: S3Access | None,
    *,
    anywhere: bool = False,
) -> Prepared:
    """Checks an item's input and makes its reference pictures ready; nothing is bought when that fails.

    For the first model without a reference picture this asks nobody.

    Args:
        destination: Its bucket's objects may be reference pictures, and with `anywhere` every bucket's.
        access: How buckets are reached.
        anywhere: A person at the command line named the pictures.

    Raises:
        BadInput: Model or vendor would refuse it; says which field and why.
        EachlabsError: What must be known first could not be learned, or not be uploaded.
    """
    try:
        input = await catalogue.checked(item)
        urls: dict[str, Url] = {}
        for name in names_in(input):
            url = await references.ready(name, item.sources.get(name), destination, access, anywhere=anywhere)
            if url is not None:
                urls[name] = url
    except EachlabsError as error:
        error.item_id = error.item_id or item.item_id
        raise

    async def prepared() -> Item:
        if not urls and input == item.input:
            return item
        fresh = {name: await give() for name, give in urls.items()}
        return item.model_copy(update={"sent_input": with_names(input, lambda name: fresh.get(name, name))})

    return prepared


def recorded(item: Item) -> dict[str, Any] | None:
    """What a record keeps of what was sent: without signatures, and only where it is not the input itself."""
    if item.sent_input is None:
        return None
    kept = with_names(item.sent_input, without_signature)
    return None if kept == item.input else kept


# ------------------------------------------------------------------------------------------------------ made reachable


class References:
    """Makes reference pictures reachable, each once a run; asking where one may be put takes a request slot.

    Args:
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
        self._looks: SingleFlight[str, object] = SingleFlight()
        self._uploads: SingleFlight[str, tuple[str, datetime]] = SingleFlight()
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
        """Makes one picture ready to be sent, and returns what gives its URL then; None: it is not a picture's name.

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
        request = await self._limiter.take_request()
        try:
            slot = await self._client.presign(content_type=picture.content_type, expires_in_seconds=KEPT_SECONDS)
        finally:
            request.done()
        await self._put(picture, slot)
        return slot.public_url, slot.expires_at or datetime.now(timezone.utc) + timedelta(seconds=KEPT_SECONDS)

    async def _put(self, picture: Picture, slot: UploadSlot) -> None:
        """Puts the bytes where the API said; repeated, for the same bytes at the same slot change nothing."""
        reason = ""
        async with self._turns:
            # Where it is in memory there is nothing to wait for.
            data = picture.data if picture.data is not None else await asyncio.to_thread(picture.read)
            for pause_seconds in PAUSES_SECONDS:
                await asyncio.sleep(pause_seconds)
                reason, may_be_repeated = await self._put_once(slot, data)
                if not reason:
                    logger.info("Reference picture %s is uploaded.", picture.sha256[:12])
                    return
                if not may_be_repeated:
                    break
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
        except (httpx.HTTPError, httpx.InvalidURL, OSError, UnicodeError) as error:
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


# ----------------------------------------------------------------------------------------------------------- looked at


@dataclass(frozen=True)
class Seen:
    """What one answer says about a picture."""

    content_type: str
    size_bytes: int | None


class _Refused(Exception):
    """The host answered, and it is not a picture that could be had; `status_code` 0: it does not matter."""

    def __init__(self, reason: str, status_code: int = 0) -> None:
        super().__init__(reason)
        self.status_code = status_code


class Prober:
    """Asks for the head of pictures.

    Args:
        transport: Sends the requests (tests); the network, with the environment's proxies, when left out.
        hosts: Which hosts may be asked. When left out: public ones, and any by a given `transport`. A host of this
            network is refused for two reasons: the vendor cannot reach it, and a form must not make a worker knock
            there.
    """

    def __init__(self, transport: httpx.AsyncBaseTransport | None = None, *, hosts: HostGuard | None = None) -> None:
        self._web = PublicWeb(transport, hosts, timeout=httpx.Timeout(15.0, connect=10.0, write=60.0), accept="image/*")

    @property
    def client(self) -> httpx.AsyncClient:
        """Connections without key, cookies and redirects."""
        return self._web.client

    async def check(self, url: str, *, shown: str | None = None, signed: bool = False) -> Seen:
        """What is at the URL, once it is known to be a picture that the vendor can have.

        Args:
            url: Where it is.
            shown: What messages call it; the URL without its query when None.
            signed: It is presigned for GET alone: HEAD would be refused.

        Raises:
            BadInput: It cannot be had, is too large, or is not a picture; says which. Nothing was bought.
        """
        shown = shown or without_query(url)
        reason = ""
        for pause_seconds in PAUSES_SECONDS:
            await asyncio.sleep(pause_seconds)
            try:
                return await asyncio.wait_for(self._look(url, signed=signed), LOOK_SECONDS)
            except _Refused as refused:
                reason = str(refused)
                if signed and refused.status_code in _OF_OBJECTS:
                    reason = f"{_OF_OBJECTS[refused.status_code]} (HTTP {refused.status_code})"
                if refused.status_code != 429 and refused.status_code < 500:
                    break
            except HostRefused as refused:
                reason = f"its host is {refused}, and the vendor could not fetch it ({SETTING} names hosts that it can)"
                break
            except (asyncio.TimeoutError, httpx.TimeoutException):
                reason = "it did not answer in time"
            except (httpx.HTTPError, httpx.InvalidURL, OSError, UnicodeError) as error:
                reason = f"it could not be reached ({type(error).__name__})"
        raise BadInput(
            f"image_url: {shown}: {reason}. Give {'the name' if signed else 'the public URL'} of a picture of at most "
            "100 MB; nothing was bought."
        )

    async def _look(self, url: str, *, signed: bool) -> Seen:
        seen = None
        if not signed:
            try:
                seen = await self._ask("HEAD", url)
            except HostRefused:
                raise
            except (_Refused, httpx.HTTPError):
                seen = None  # many hosts refuse HEAD and serve GET
        if seen is None or seen.size_bytes is None or not _is_picture(seen.content_type):
            seen = await self._ask("GET", url)
        if not _is_picture(seen.content_type):
            raise _Refused(f"it is not a picture ({seen.content_type[:60] or 'of an unknown type'})")
        if seen.size_bytes is not None and seen.size_bytes > MAX_PICTURE_BYTES:
            raise _Refused(f"it has {seen.size_bytes} bytes, and at most 100 MB are taken")
        return seen

    async def _ask(self, method: str, url: str) -> Seen:
        headers = {"Range": f"bytes=0-{SNIFFED_BYTES - 1}"} if method == "GET" else {}
        try:
            async with self._web.ask(method, url, headers) as response:
                if response.status_code not in (200, 206):
                    raise _Refused(f"its host answers HTTP {response.status_code}", response.status_code)
                content_type = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
                if method == "GET":
                    content_type = await _sniffed(response, content_type)
                return Seen(content_type, _total_bytes(response))
        except LeadsNowhere as error:
            raise _Refused(f"it {error.reason}") from error

    async def aclose(self) -> None:
        await self._web.aclose()


def _is_picture(content_type: str) -> bool:
    return content_type.startswith("image/") and content_type != "image/svg+xml"


async def _sniffed(response: httpx.Response, said: str) -> str:
    """What the first bytes show; a host that ignores the range is cut off after them."""
    if encoding_of(response) != "identity":
        return said  # which was not asked for, and may inflate to any size
    head = b""
    async for piece in response.aiter_bytes(SNIFFED_BYTES):
        head += piece
        if len(head) >= SNIFFED_BYTES:
            break
    shown = content_type_of(head)
    if shown is not None:
        return shown
    # A format that is not known here may be one that the model knows; an error page is none.
    return "text/html" if not head or head.lstrip()[:1] in (b"<", b"{") else said


def _total_bytes(response: httpx.Response) -> int | None:
    if response.status_code == 206:
        total = response.headers.get("Content-Range", "").rpartition("/")[2]
    else:
        total = response.headers.get("Content-Length", "")
    return byte_count(total)
