"""From a finished prediction to a picture that is safe in the bucket, and a record that says so."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import random
from collections.abc import Sequence

from prefect_eachlabs.errors import (
    DownloadFailed,
    EachlabsError,
    ItemConflict,
    NotYetSafe,
    OutputMissing,
    SetupError,
    StoreFailed,
)
from prefect_eachlabs.images.download import RETENTION_HOURS, Downloader
from prefect_eachlabs.images.formats import ANY, FORMATS, PNG_ALONE, VERIFIED, as_it_came, verify_in_turns
from prefect_eachlabs.images.png import MediaError
from prefect_eachlabs.ledger.adoption import yield_to_its_owner
from prefect_eachlabs.ledger.records import (
    Ledger,
    Record,
    RecordChanged,
    RecordError,
    RecordState,
    VersionedRecord,
    amended,
)
from prefect_eachlabs.ledger.rules import See
from prefect_eachlabs.models import Media, Prediction, PredictionStatus, StoredImage
from prefect_eachlabs.storage.base import PreconditionFailed, StoredObject

logger = logging.getLogger(__name__)

DOWNLOADS_AT_A_TIME = 8
"""Each picture is in memory while it is on its way: 8 of at most 64 MiB, or one of them of 256."""
ATTEMPTS = 4
FIRST_PAUSE_SECONDS = 0.5
GONE_STATUS_CODES = (403, 404, 410)
LOOKED_FOR_SECONDS = 30.0
"""A picture that its host does not have is looked for so long: it may be some seconds late."""
MAY_BE_GONE_AFTER_SECONDS = RETENTION_HOURS * 3600.0
"""The vendor keeps outputs at least so long: a younger picture that is not there is late, or kept from us, not gone."""
MOST_OUTPUTS = 64
OUTPUT_MISSING_AFTER_SECONDS = 3600.0
"""So long after the purchase a prediction that succeeded without an output may still get it."""


def stored_image(record: Record, *, reused: bool) -> StoredImage:
    """What callers are told about a record in state `stored`."""
    prompt = record.input.get("prompt")
    return StoredImage(
        item_id=record.item_id,
        prediction_id=record.prediction_id or "",
        uri=record.uri or "",
        sha256=record.sha256 or "",
        size_bytes=record.size_bytes or 0,
        width_px=record.width_px,
        height_px=record.height_px,
        # The vendor tells 0 until it has settled: what a picture cost is unknown then, not nothing.
        cost_usd=record.cost_usd or None,
        predict_time_seconds=record.predict_time_seconds,
        model=record.model,
        prompt=prompt if isinstance(prompt, str) else None,
        more_uris=tuple(record.more_uris),
        format=_format_of_key(record.uri or ""),
        verified=record.verified is not False,
        reused=reused,
        bought_by=record.bought_by or None,
    )


class ImageStore:
    """Downloads, verifies and stores what predictions gave; repeats what may be repeated, for it is paid for."""

    def __init__(self, downloader: Downloader) -> None:
        self._downloader = downloader
        self._at_a_time = asyncio.Semaphore(DOWNLOADS_AT_A_TIME)

    async def finish(
        self,
        ledger: Ledger,
        held: VersionedRecord,
        end: Prediction,
        *,
        fresh: bool,
        formats: Sequence[str] | None = None,
        see: See | None = None,
    ) -> VersionedRecord:
        """Stores the pictures of a prediction that has ended and changes its record.

        Args:
            ledger: Where the record is.
            held: The record, in state `created`, that names the prediction.
            end: How it ended.
            fresh: It was bought just now: no picture of it can be in the bucket yet.
            formats: What may be stored; None: what the record says.
            see: Shown the first picture once it is stored; it counts as a download as long as that takes.

        Returns:
            The record in state `stored`, `failed` or `cancelled`.

        Raises:
            NotYetSafe: The picture is paid for and could not be stored: run again.
            ItemConflict: An object that is not the item's stands where the picture goes.
            RecordChanged: Another writer changed the record, or its prediction is another item's: look again.
        """
        if not fresh:
            await yield_to_its_owner(ledger, held)
        while True:
            try:
                ended = await self._ended_record(ledger, held, end, fresh=fresh, formats=formats, see=see)
                return await ledger.write(ended, replacing=held)
            except RecordChanged as changed:
                current = changed.current
                if current is None or current.record.prediction_id != end.id:
                    raise
                if current.record.state is not RecordState.CREATED:
                    return current
                held, fresh = current, False

    async def _ended_record(
        self,
        ledger: Ledger,
        held: VersionedRecord,
        end: Prediction,
        *,
        fresh: bool,
        formats: Sequence[str] | None,
        see: See | None,
    ) -> Record:
        record = held.record
        if end.status is PredictionStatus.CANCELLED:
            return amended(record, state=RecordState.CANCELLED, cost_usd=end.cost_usd or 0.0)
        try:
            end.raise_for_end()
        except EachlabsError as error:
            if isinstance(error, OutputMissing) and held.age_seconds < OUTPUT_MISSING_AFTER_SECONDS:
                raise NotYetSafe(
                    f"Prediction {end.id} succeeded and has no picture yet. It is paid for and kept: run the same "
                    "again, which asks for the picture and buys nothing.",
                    item_id=record.item_id,
                    prediction_id=end.id,
                    kind=error.kind,
                ) from error
            said = RecordError(kind=error.kind, message=error.message, code=error.code)
            return amended(record, state=RecordState.FAILED, error=said, cost_usd=end.cost_usd)
        may_be = _allowed(record, formats)
        # The first picture goes last: where it is, the others are.
        found: list[str] = []
        media: Media | None = None
        for number in range(len(end.output_urls), 0, -1):
            seen = see if number == 1 else None
            media = await self._store_one(ledger, number, record, end, found, fresh=fresh, formats=may_be, see=seen)
            found.insert(0, media.format)
        assert media is not None, "a prediction that succeeded has a picture"
        return _stored(ledger, record, media, found, cost_usd=end.cost_usd, seconds=end.predict_time_seconds)

    async def recover(
        self, ledger: Ledger, held: VersionedRecord, *, formats: Sequence[str] | None = None
    ) -> VersionedRecord | None:
        """The record of a prediction whose picture is in the bucket already (a run died in between), made `stored`.

        Asks the API nothing. None when the picture is not there.
        """
        await yield_to_its_owner(ledger, held)
        found = await self.find(ledger, held.record, formats=formats)
        whole = found and await ledger.store.get(found.key)
        if not whole or not _is_of(whole, held.record.prediction_id):
            return None
        try:
            name = _format_of_key(whole.key)
            media = await verify_in_turns(whole.body) if name in VERIFIED else as_it_came(whole.body, name)
        except MediaError:
            return None
        said = whole.metadata
        more = [name for name in said.get("more-formats", "").split(",") if name in FORMATS][: MOST_OUTPUTS - 1]
        count = int(min(_number(said.get("outputs")) or 1, MOST_OUTPUTS))
        record = _stored(
            ledger,
            held.record,
            media,
            [media.format, *(more or ["png"] * (count - 1))],
            cost_usd=_number(said.get("cost-usd")),
            seconds=_number(said.get("predict-time-seconds")),
        )
        return await ledger.write(record, replacing=held)

    async def _store_one(
        self,
        ledger: Ledger,
        number: int,
        record: Record,
        end: Prediction,
        later: Sequence[str],
        *,
        fresh: bool,
        formats: Sequence[str] | None,
        see: See | None,
    ) -> Media:
        """Puts one picture, over none or over one of another prediction that its record no longer names.

        `later` are the formats of the pictures after it, which are in the bucket already.
        """
        url = end.output_urls[number - 1]
        loop = asyncio.get_running_loop()
        began, attempt, pause_seconds = loop.time(), 0, FIRST_PAUSE_SECONDS
        while True:
            attempt += 1
            async with self._at_a_time:
                try:
                    media = await self._downloader.fetch(
                        url, formats=formats, prediction_id=end.id, item_id=record.item_id
                    )
                except NotYetSafe as error:
                    # A cut or a hiccup is no reason to lose what was paid for. Another format comes again; but it is
                    # fetched once more, for a proxy may have sent another file.
                    if is_gone(error):
                        enough = loop.time() - began >= LOOKED_FOR_SECONDS
                    else:
                        enough = attempt == ATTEMPTS or (attempt > 1 and not error.retryable)
                    if enough:
                        raise
                    logger.info("Item %s: %s Trying again.", record.item_id, error.message)
                else:
                    await self._put(ledger, number, record, end, media, later, fresh=fresh)
                    if see is not None:
                        await see(media)
                    return media
            await asyncio.sleep(pause_seconds * (0.5 + random.random()))
            pause_seconds *= 2

    async def _put(
        self,
        ledger: Ledger,
        number: int,
        record: Record,
        end: Prediction,
        media: Media,
        later: Sequence[str],
        *,
        fresh: bool,
    ) -> None:
        kind = FORMATS[media.format]
        key = ledger.destination.image_key(record.item_id, number, kind.suffix)
        metadata = _metadata(end, record.model, record.fingerprint, later)
        present = None if fresh and ledger.conditional else await ledger.store.head(key)
        pause_seconds = FIRST_PAUSE_SECONDS
        attempt = 0
        while True:
            if present is not None:
                if _is_of(present, end.id) and present.size_bytes == len(media.data):
                    return
                # Something else stands there; only who is named in the record may replace it, and only the item's own.
                current = await ledger.read(record.item_id)
                if current is None or current.record.prediction_id != end.id:
                    raise RecordChanged(current)
                if not _is_of_any(present, current.record) and not await _is_same(ledger, present, media):
                    raise ItemConflict(
                        f"{ledger.store.uri(key)} is not a picture of item {record.item_id}, and is left as it is. The "
                        "item's picture is paid for and kept: move that object away and run the same again, which "
                        f"stores it and buys nothing. The vendor keeps it for {RETENTION_HOURS} h.",
                        item_id=record.item_id,
                        prediction_id=end.id,
                    )
            try:
                await ledger.store.put(
                    key,
                    media.data,
                    content_type=kind.stored_type,
                    content_disposition=kind.disposition,
                    if_match=present.etag if ledger.conditional and present is not None else None,
                    if_absent=ledger.conditional and present is None,
                    metadata=metadata,
                    sha256=media.sha256,
                )
                return
            except PreconditionFailed:
                present = await ledger.store.head(key)
            except StoreFailed as error:
                attempt += 1
                if attempt == ATTEMPTS:
                    url = end.output_urls[number - 1]
                    raise StoreFailed(error.message, item_id=record.item_id, prediction_id=end.id, url=url) from error
                await asyncio.sleep(pause_seconds * (0.5 + random.random()))
                pause_seconds *= 2
                present = await ledger.store.head(key)

    async def check_place(
        self, ledger: Ledger, item_id: str, held: VersionedRecord | None, formats: Sequence[str] | None
    ) -> None:
        """Looks, before the item is bought, at where its picture goes. One HEAD for each format that it may have.

        Where it may have any, at the place of a PNG alone: what stands elsewhere is found when it is in the way.

        Raises:
            ItemConflict: An object stands there that is not the item's own. Nothing was bought.
            RecordChanged: The record has changed meanwhile: look again.
        """
        record = None if held is None else held.record
        for name in _places(_allowed(record, formats)) or PNG_ALONE:
            key = ledger.destination.image_key(item_id, suffix=FORMATS[name].suffix)
            found = await ledger.store.head(key)
            if found is None or (record is not None and _is_of_any(found, record)):
                continue
            if record is not None and await self._is_picture_of(ledger, found, record):
                continue
            current = await ledger.read(item_id)
            if (current and current.etag) != (held and held.etag):
                raise RecordChanged(current)  # it is the picture of another run that was quicker, perhaps
            raise ItemConflict(
                f"{ledger.store.uri(key)} is there already and is not a picture of item {item_id}; it stays as it is. "
                "Choose another item id or destination, or move that object away. Nothing was bought.",
                item_id=item_id,
            )

    async def find(
        self, ledger: Ledger, record: Record, *, formats: Sequence[str] | None = None
    ) -> StoredObject | None:
        """The item's picture in the bucket, if it is of the prediction that the record names; the first of several.

        Of a stored item's several pictures all must be there. A picture that lost its metadata (some tools copy without
        them) is known by its size and SHA-256.
        """
        if record.uri is not None and record.state is RecordState.STORED:
            suffixes = [_suffix(record.uri)]
            for number, uri in enumerate(record.more_uris, start=2):
                key = ledger.destination.image_key(record.item_id, number, _suffix(uri))
                found = await ledger.store.head(key)
                # Only the first one's SHA-256 is written down.
                if found is None or found.metadata.get("prediction-id") not in (None, record.prediction_id):
                    return None
        else:
            suffixes = [FORMATS[name].suffix for name in await self._may_be(ledger, record, formats)]
        for suffix in suffixes:
            key = ledger.destination.image_key(record.item_id, suffix=suffix)
            found = await ledger.store.head(key)
            if found is not None and await self._is_picture_of(ledger, found, record):
                return found
        return None

    async def _may_be(self, ledger: Ledger, record: Record, formats: Sequence[str] | None) -> Sequence[str]:
        """The formats that the item's first picture may have; where it may have any, those that are in the bucket."""
        allowed = _places(_allowed(record, formats))
        if allowed is not None:
            return allowed
        place = ledger.destination.image_key(record.item_id, suffix="")
        suffixes = [row.key.removeprefix(place) async for row in ledger.store.list(place)]
        return [name for name, one in FORMATS.items() if one.suffix in suffixes]

    async def _is_picture_of(self, ledger: Ledger, found: StoredObject, record: Record) -> bool:
        """Whether an object is the first picture of the prediction that the record names."""
        if "prediction-id" in found.metadata or record.sha256 is None or found.size_bytes != record.size_bytes:
            return _is_of(found, record.prediction_id)
        whole = await ledger.store.get(found.key)
        if whole is None or hashlib.sha256(whole.body).hexdigest() != record.sha256:
            return False
        format = FORMATS.get(_format_of_key(found.key))
        if format is None:
            return True
        # Named again, it need not be read the next time, and what replaces it knows whose it is.
        named = {**whole.metadata, "prediction-id": record.prediction_id or "", "model": record.model}
        named |= {"fingerprint": record.fingerprint, "outputs": str(1 + len(record.more_uris))}
        try:
            await ledger.store.put(
                found.key,
                whole.body,
                content_type=format.stored_type,
                content_disposition=format.disposition,
                if_match=whole.etag if ledger.conditional else None,
                metadata=named,
                sha256=record.sha256,
            )
        except (PreconditionFailed, StoreFailed, SetupError) as error:
            logger.info("Item %s: its picture's metadata stay lost: %s", record.item_id, error)
        return True

    async def aclose(self) -> None:
        await self._downloader.aclose()


def _allowed(record: Record | None, formats: Sequence[str] | None) -> tuple[str, ...] | None:
    """What may be stored; None: anything. Another version may have named a format that this one does not know."""
    named = formats or (record.formats if record is not None else ())
    return tuple(name for name in named if name in FORMATS or name == ANY) or None


def _places(allowed: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """The formats under whose endings it may be; None: any."""
    return None if allowed is None or ANY in allowed else allowed


def _suffix(key: str) -> str:
    return key.rpartition(".")[2]


def _format_of_key(key: str) -> str:
    suffix = _suffix(key)
    return next((name for name, one in FORMATS.items() if one.suffix == suffix), suffix or "png")


def _metadata(end: Prediction, model: str, fingerprint: str, later: Sequence[str] = ()) -> dict[str, str]:
    """What a picture in the bucket says about itself: enough to write its record again."""
    said = {"prediction-id": end.id, "model": model, "fingerprint": fingerprint, "outputs": str(len(end.output_urls))}
    if set(later) - {"png"}:
        said["more-formats"] = ",".join(later)
    if end.cost_usd:
        said["cost-usd"] = repr(end.cost_usd)
    if end.predict_time_seconds is not None:
        said["predict-time-seconds"] = repr(end.predict_time_seconds)
    return said


def _number(text: str | None) -> float | None:
    """Of an object's metadata, which whoever may write the bucket can write: finite, and not below 0."""
    try:
        number = float(text) if text else -1.0
    except ValueError:
        return None
    return number if 0 <= number < math.inf else None


def _stored(
    ledger: Ledger,
    record: Record,
    media: Media,
    formats: Sequence[str],
    *,
    cost_usd: float | None,
    seconds: float | None,
) -> Record:
    """The record of an item whose pictures, of these formats, are in the bucket; `media` is the first."""
    keys = [
        ledger.destination.image_key(record.item_id, number, FORMATS[name].suffix)
        for number, name in enumerate(formats, start=1)
    ]
    return amended(
        record,
        state=RecordState.STORED,
        error=None,
        uri=ledger.store.uri(keys[0]),
        more_uris=[ledger.store.uri(key) for key in keys[1:]],
        sha256=media.sha256,
        size_bytes=len(media.data),
        width_px=media.width_px,
        height_px=media.height_px,
        verified=media.verified,
        content_type=FORMATS[media.format].content_type,
        cost_usd=cost_usd or None,
        predict_time_seconds=seconds,
    )


def _is_of(found: StoredObject, prediction_id: str | None) -> bool:
    return prediction_id is not None and found.metadata.get("prediction-id") == prediction_id


def _is_of_any(found: StoredObject, record: Record) -> bool:
    """Whether it is a picture of this item: of the record's prediction, or of one that was replaced."""
    return found.metadata.get("prediction-id") in record.named_predictions


async def _is_same(ledger: Ledger, found: StoredObject, media: Media) -> bool:
    """Whether an object that does not say what it is holds these very bytes."""
    if "prediction-id" in found.metadata or found.size_bytes != len(media.data):
        return False
    whole = await ledger.store.get(found.key)
    return whole is not None and hashlib.sha256(whole.body).hexdigest() == media.sha256


def is_gone(error: EachlabsError) -> bool:
    """Whether the picture's host says that it is not there, or not for us."""
    return isinstance(error, DownloadFailed) and error.status_code in GONE_STATUS_CODES
