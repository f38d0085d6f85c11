"""Small pictures for a batch's page, in its HTML itself: it shows in a mail, from a private bucket's download, offline.

That of a picture which this run stores is made while its bytes are in memory; the page of an earlier run has those
that it showed; for what else there is, the picture is read from the bucket at the batch's end. All together are
bounded, in bytes and time: what is beyond that shows where the page lies beside its pictures.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import re
import time
from collections.abc import Iterable, Sequence

from prefect_eachlabs.batch.outcomes import Outcome
from prefect_eachlabs.batch.worker import Worker
from prefect_eachlabs.confined import NotInstalled
from prefect_eachlabs.errors import EachlabsError
from prefect_eachlabs.images.formats import FORMATS, VERIFIED
from prefect_eachlabs.images.thumbnails import thumbnail
from prefect_eachlabs.models import Destination, Media
from prefect_eachlabs.storage.base import ObjectStore

logger = logging.getLogger(__name__)

MOST_CHARACTERS = 8_000_000
"""Of all data URLs together: what a mail may carry, and a browser opens in a second."""
MOST_SECONDS = 60.0
"""For those that are made while the batch runs, and as long at its end."""
LARGEST_BYTES = 32 * 1024 * 1024
AT_A_TIME = 4
QUALITY = 70
EDGES_PX = ((200, 240), (700, 160))
"""Up to so many pictures are shown so large; more of them in the smallest size."""
SMALLEST_PX = 96
SUFFIXES = tuple(f".{FORMATS[name].suffix}" for name in VERIFIED)
"""Pictures; what else a model gave is named, and neither shown nor linked: a click must not open an SVG or a page."""
_ON_A_PAGE = re.compile(
    rb'data-of="([0-9a-f]{64})" data-px="(\d{1,4})" src="(data:image/webp;base64,[A-Za-z0-9+/=]{1,200000})"'
)


def edge_px(count: int) -> int:
    """How large each of so many is shown."""
    return next((px for most, px in EDGES_PX if count <= most), SMALLEST_PX)


class Thumbs:
    """The thumbnails of a batch's page, by the SHA-256 of their pictures; each lies within a square of `edge_px`."""

    def __init__(self, store: ObjectStore, destination: Destination, worker: Worker) -> None:
        self._store = store
        self._destination = destination
        self._worker = worker
        self._one_at_a_time = asyncio.Lock()
        self._taken_seconds = 0.0
        self._without: set[str] = set()
        """Pictures of which none can be made."""
        self.resize(SMALLEST_PX)

    def resize(self, edge_px: int) -> None:
        """How large they are from now on: none that is there is of that size."""
        self.edge_px = edge_px
        self.urls: dict[str, str] = {}
        self._characters = 0
        self._is_full = False

    async def see(self, media: Media, edge_px: int) -> None:
        """Makes that of a picture which is being stored, and in memory still. Raises nothing but a cancel."""
        if media.format not in VERIFIED or len(media.data) > LARGEST_BYTES:
            return
        async with self._one_at_a_time:
            if edge_px != self.edge_px:
                self.resize(edge_px)
            if media.sha256 not in self.urls and not self._is_full and self._taken_seconds < MOST_SECONDS:
                await self._make(media.sha256, media.data)

    async def learn(self, page_key: str, wanted: Sequence[Outcome]) -> None:
        """Takes what an earlier page shows of them, in the same size."""
        try:
            found = await self._store.get(page_key)
        except EachlabsError as error:
            logger.info("The earlier page cannot be read: %s", error)
            return
        shas = {outcome.sha256 for outcome in wanted}
        for sha256, px, url in _ON_A_PAGE.findall(found.body if found is not None else b""):
            if int(px) == self.edge_px and sha256.decode() in shas:
                self._add(sha256.decode(), url.decode())

    async def make(self, wanted: Iterable[Outcome]) -> None:
        """Makes those that are missing, the first ones first. Raises nothing; a GET each."""
        until = time.monotonic() + MOST_SECONDS
        known = self._without.union(self.urls)
        left = iter([one for one in wanted if one.sha256 not in known and _is_picture(one)])

        async def some() -> None:
            for outcome in left:
                if self._is_full or time.monotonic() > until:
                    return
                try:
                    found = await self._store.get(self._destination.stored_key(outcome.file_name))
                except EachlabsError as error:
                    logger.info("Item %s is on the page without a thumbnail: %s", outcome.item_id, error)
                    continue
                if found is not None:
                    await self._make(outcome.sha256 or "", found.body)

        await asyncio.gather(*(some() for _ in range(AT_A_TIME)))
        if (rest := sum(1 for _ in left)) > 0:
            logger.info("The page shows %d pictures by their links alone: it would take too long, or too much.", rest)

    async def _make(self, sha256: str, picture: bytes) -> None:
        def make() -> bytes:
            began = time.monotonic()
            try:
                return thumbnail(picture, edge_px=self.edge_px, format="WEBP", quality=QUALITY)
            finally:
                self._taken_seconds += time.monotonic() - began

        try:
            small = await self._worker(make)
            self._add(sha256, f"data:image/webp;base64,{base64.b64encode(small).decode()}")
        except NotInstalled:
            logger.info("No thumbnails: they are made with Pillow: pip install 'prefect-eachlabs[demo]'.")
            self._is_full = True
        except Exception as error:  # what is paid for and stored is not called failed because it cannot be shown
            logger.info("The picture with SHA-256 %s is on the page without a thumbnail: %s", sha256, error)
            self._without.add(sha256)

    def pictures(self, least_px: int) -> dict[str, bytes]:
        """The thumbnails themselves, where they are large enough."""
        if self.edge_px < least_px:
            return {}
        return {sha256: base64.b64decode(url.partition(",")[2]) for sha256, url in self.urls.items()}

    def _add(self, sha256: str, url: str) -> None:
        self._characters += len(url)
        self._is_full = self._is_full or self._characters > MOST_CHARACTERS
        if not self._is_full:
            self.urls[sha256] = url


def _is_picture(outcome: Outcome) -> bool:
    is_small = (outcome.size_bytes or 0) <= LARGEST_BYTES
    return bool(outcome.sha256 and outcome.uri) and outcome.file_name.endswith(SUFFIXES) and is_small
