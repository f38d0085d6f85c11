"""From a finished prediction to a picture that is safe in the bucket, and a record that says so."""

from __future__ import annotations

import asyncio
import logging
import random
from typing import Any

from prefect_eachlabs.download import Downloader
from prefect_eachlabs.errors import (
    DownloadFailed,
    EachlabsError,
    NotYetSafe,
    StoreFailed,
)
from prefect_eachlabs.models import (
    Destination,
    Png,
    Prediction,
    PredictionStatus,
    StoredImage,
    fingerprint_of,
)
from prefect_eachlabs.object_store import ObjectStore, PreconditionFailed, StoredObject
from prefect_eachlabs.png import PngError, verify_png
from prefect_eachlabs.records import Held, Ledger, Overtaken, Record, RecordError, RecordState, amended

logger = logging.getLogger(__name__)

DOWNLOADS_AT_A_TIME = 8
"""Each picture is in memory while it is on its way: 8 of at most 64 MiB."""
ATTEMPTS = 4
FIRST_PAUSE_SECONDS = 0.5


def _prompt(input: dict[str, Any] | None) -> str | None:
    prompt = (input or {}).get("prompt")
    return prompt if isinstance(prompt, str) else None


def stored_image(record: Record, *, reused: bool) -> StoredImage:
    """What callers are told about a record in state `stored`."""
    return StoredImage(
        item_id=record.item_id,
        prediction_id=record.prediction_id or "",
        uri=record.uri or "",
        sha256=record.sha256 or "",
        size_bytes=record.size_bytes or 0,
        width_px=record.width_px or 0,
        height_px=record.height_px or 0,
        cost_usd=record.cost_usd,
        predict_time_seconds=record.predict_time_seconds,
        model=record.model,
        prompt=_prompt(record.input),
        more_uris=tuple(record.more_uris),
        reused=reused,
    )


class Finisher:
    """Downloads, verifies and stores what predictions gave; repeats what may be repeated, for it is paid for.

    Args:
        downloader: Fetches and verifies a picture.
    """

    def __init__(self, downloader: Downloader) -> None:
        self._downloader = downloader
        self._at_a_time = asyncio.Semaphore(DOWNLOADS_AT_A_TIME)

    async def finish(self, ledger: Ledger, held: Held, end: Prediction, *, fresh: bool) -> Held:
        """Stores the pictures of a prediction that has ended and changes its record.

        Args:
            ledger: Where the record is.
            held: The record, in state `created`, that names the prediction.
            end: How it ended.
            fresh: It was bought just now: no picture of it can be in the bucket yet.

        Returns:
            The record in state `stored`, `failed` or `cancelled`.

        Raises:
            NotYetSafe: The picture is paid for and could not be stored: run again.
            Overtaken: Another writer changed the record: look again.
        """
        while True:
            try:
                return await ledger.write(await self._ended_record(ledger, held, end, fresh=fresh), replacing=held)
            except Overtaken as overtaken:
                current = overtaken.current
                if current is None or current.record.prediction_id != end.id:
                    raise
                if current.record.state is not RecordState.CREATED:
                    return current
                held, fresh = current, False

    async def _ended_record(self, ledger: Ledger, held: Held, end: Prediction, *, fresh: bool) -> Record:
        record = held.record
        if end.status is PredictionStatus.CANCELLED:
            return amended(record, state=RecordState.CANCELLED, cost_usd=end.cost_usd or 0.0)
        try:
            end.raise_for_end()
        except EachlabsError as error:
            said = RecordError(kind=error.kind, message=error.message, code=error.code)
            return amended(record, state=RecordState.FAILED, error=said, cost_usd=end.cost_usd)
        count = len(end.output_urls)
        # The first picture goes last: where it is, the others are.
        for number in range(count, 1, -1):
            await self._store_one(ledger, number, record, end, fresh=fresh)
        png = await self._store_one(ledger, 1, record, end, fresh=fresh)
        return _stored(ledger, record, png, count, cost_usd=end.cost_usd, seconds=end.predict_time_seconds)

    async def recover(self, ledger: Ledger, held: Held) -> Held | None:
        """The record of a prediction whose picture is in the bucket already (a run died in between), made `stored`.

        Asks the API nothing. None when the picture is not there.
        """
        found = await self.find(ledger, held.record)
        whole = found and await ledger.store.get(found.key)
        if not whole or not _is_of(whole, held.record.prediction_id):
            return None
        try:
            png = verify_png(whole.body)
        except PngError:
            return None
        said = whole.metadata
        record = _stored(
            ledger,
            held.record,
            png,
            int(_number(said.get("outputs")) or 1),
            cost_usd=_number(said.get("cost-usd")),
            seconds=_number(said.get("predict-time-seconds")),
        )
        return await ledger.write(record, replacing=held)

    async def _store_one(self, ledger: Ledger, number: int, record: Record, end: Prediction, *, fresh: bool) -> Png:
        """Puts one picture, over none or over one of another prediction that its record no longer names."""
        key, url = ledger.destination.image_key(record.item_id, number), end.output_urls[number - 1]
        async with self._at_a_time:
            png = await self._fetch(url, end, record.item_id)
            metadata = _metadata(end, record.model, record.fingerprint)
            present = None if fresh else await ledger.store.head(key)
            pause_seconds = FIRST_PAUSE_SECONDS
            attempt = 0
            while True:
                if present is not None:
                    if _is_of(present, end.id) and present.size_bytes == len(png.data):
                        return png
                    # A picture of another prediction stands there; only who is named in the record may replace it.
                    current = await ledger.read(record.item_id)
                    if current is None or current.record.prediction_id != end.id:
                        raise Overtaken(current)
                try:
                    await put_image(ledger.store, key, png, metadata, present, conditional=ledger.conditional)
                    return png
                except PreconditionFailed:
                    present = await ledger.store.head(key)
                except StoreFailed as error:
                    attempt += 1
                    if attempt == ATTEMPTS:
                        raise self._not_safe(error, end, record.item_id, url) from error
                    await asyncio.sleep(pause_seconds * (0.5 + random.random()))
                    pause_seconds *= 2
                    present = await ledger.store.head(key)

    async def store_bare(self, store: ObjectStore, destination: Destination, end: Prediction) -> StoredImage:
        """Stores a finished prediction's pictures without a record, under the item's id or the prediction's.

        Raises:
            NotYetSafe: As for `finish`.
            PredictionFailed, PredictionCancelled: There is no picture.
        """
        end.raise_for_end()
        item_id = end.item_id or end.id
        known = end.input is not None and end.model is not None
        fingerprint = fingerprint_of(end.model or "", end.version, end.input or {}) if known else ""
        metadata = _metadata(end, end.model or "", fingerprint)
        images: list[tuple[str, Png]] = []
        async with self._at_a_time:
            for number, url in enumerate(end.output_urls, start=1):
                key = destination.image_key(item_id, number)
                png = await self._fetch(url, end, item_id)
                try:
                    await put_image(store, key, png, metadata, None, conditional=False)
                except StoreFailed as error:
                    raise self._not_safe(error, end, item_id, url) from error
                images.append((key, png))
        (key, png), more = images[0], images[1:]
        return StoredImage(
            item_id=item_id,
            prediction_id=end.id,
            uri=store.uri(key),
            sha256=png.sha256,
            size_bytes=len(png.data),
            width_px=png.width_px,
            height_px=png.height_px,
            cost_usd=end.cost_usd,
            predict_time_seconds=end.predict_time_seconds,
            model=end.model,
            prompt=_prompt(end.input),
            more_uris=tuple(store.uri(key) for key, _ in more),
        )

    async def _fetch(self, url: str, end: Prediction, item_id: str) -> Png:
        """Downloads until it is whole: a cut or a hiccup is no reason to lose what was paid for."""
        pause_seconds = FIRST_PAUSE_SECONDS
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return await self._downloader.fetch_png(url, prediction_id=end.id, item_id=item_id)
            except NotYetSafe as error:
                gone = isinstance(error, DownloadFailed) and error.status_code in (403, 404, 410)
                if gone or attempt == ATTEMPTS:
                    raise
                logger.info("Item %s: %s Trying again.", item_id, error.message)
            await asyncio.sleep(pause_seconds * (0.5 + random.random()))
            pause_seconds *= 2
        raise AssertionError("unreachable")

    def _not_safe(self, error: StoreFailed, end: Prediction, item_id: str, url: str) -> StoreFailed:
        return StoreFailed(error.message, item_id=item_id, prediction_id=end.id, url=url)

    async def find(self, ledger: Ledger, record: Record) -> StoredObject | None:
        """The item's picture in the bucket, if it is of the prediction that the record names."""
        found = await ledger.store.head(ledger.destination.image_key(record.item_id))
        return found if found is not None and _is_of(found, record.prediction_id) else None

    async def aclose(self) -> None:
        await self._downloader.aclose()


def _metadata(end: Prediction, model: str, fingerprint: str) -> dict[str, str]:
    """What a picture in the bucket says about itself: enough to write its record again."""
    said = {"prediction-id": end.id, "model": model, "fingerprint": fingerprint, "outputs": str(len(end.output_urls))}
    if end.cost_usd is not None:
        said["cost-usd"] = repr(end.cost_usd)
    if end.predict_time_seconds is not None:
        said["predict-time-seconds"] = repr(end.predict_time_seconds)
    return said


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None


def _stored(
    ledger: Ledger, record: Record, png: Png, count: int, *, cost_usd: float | None, seconds: float | None
) -> Record:
    keys = [ledger.destination.image_key(record.item_id, number) for number in range(1, count + 1)]
    return amended(
        record,
        state=RecordState.STORED,
        error=None,
        uri=ledger.store.uri(keys[0]),
        more_uris=[ledger.store.uri(key) for key in keys[1:]],
        sha256=png.sha256,
        size_bytes=len(png.data),
        width_px=png.width_px,
        height_px=png.height_px,
        cost_usd=cost_usd,
        predict_time_seconds=seconds,
    )


def _is_of(found: StoredObject, prediction_id: str | None) -> bool:
    return prediction_id is not None and found.metadata.get("prediction-id") == prediction_id


async def put_image(
    store: ObjectStore, key: str, png: Png, metadata: dict[str, str], present: StoredObject | None, *, conditional: bool
) -> None:
    """One conditional put of a picture, unchanged, with its checksum and where it came from."""
    await store.put(
        key,
        png.data,
        content_type="image/png",
        if_match=present.etag if conditional and present is not None else None,
        if_absent=conditional and present is None,
        metadata=metadata,
        sha256=png.sha256,
    )
