"""A batch's report in the bucket: parts as it goes, merged at the end; every run keeps its own.

    PREFIX/batches/BATCH_ID/report.json, report.jsonl, index.html, contact-sheet.png    of the last run that ended
    PREFIX/batches/BATCH_ID/runs/RUN/part-00001.jsonl ...    up to 1,000 rows or 4 MB, or what 60 s brought
    PREFIX/batches/BATCH_ID/runs/RUN/run.json                its run id, from before its first order on
    PREFIX/batches/BATCH_ID/runs/RUN/report.json             its totals, while it runs and afterwards
    PREFIX/batches/BATCH_ID/runs/RUN/report.jsonl            all its rows; a run without it was killed

A row that is as the last report has it is in no part: it is written once, at the end.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, TypeVar

from prefect_eachlabs.batch.files import S3Files
from prefect_eachlabs.batch.outcomes import NOT_THERE, THERE, Outcome, RowState
from prefect_eachlabs.batch.pages import MOST_FAILURES, MOST_PICTURES, index_page
from prefect_eachlabs.batch.sheet import MOST_FRAMES, THUMBNAIL_PX, draw_sheet
from prefect_eachlabs.batch.state import Scratch
from prefect_eachlabs.batch.thumbs import Thumbs, edge_px
from prefect_eachlabs.batch.worker import Worker, on_disk
from prefect_eachlabs.errors import BadInput, EachlabsError
from prefect_eachlabs.models import Destination, Media
from prefect_eachlabs.storage.base import ListedObject, ObjectStore, PreconditionFailed

logger = logging.getLogger(__name__)
T = TypeVar("T")

SCHEMA = "eachlabs-batch-report/1"
JSON_LINES = "application/x-ndjson"
RUN_SCHEMA = "eachlabs-batch-run/1"
PART_ROWS = 1_000
PART_BYTES = 4_000_000
PART_SECONDS = 60.0
LOADED_AT_A_TIME = 1_000
BATCH_ID_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")


FOLDERS = ("images", "records", "adopted", "batches")
"""A destination's own: below a destination `.../batches`, a batch of another one would write into them."""


def check_batch_id(batch_id: str) -> str:
    """The id itself. Raises BadInput when it cannot name a folder."""
    if batch_id in FOLDERS:
        raise BadInput(f"batch_id: {batch_id!r} is the name of a folder that every destination has; choose another.")
    if not BATCH_ID_PATTERN.fullmatch(batch_id):
        raise BadInput(
            f"batch_id: {batch_id[:140]!r} must be 1 to 128 of A-Z a-z 0-9 . _ - and begin with none of . and -."
        )
    return batch_id


def run_name(run_id: str, at: datetime) -> str:
    """Names a run so that names sort by time."""
    return f"{at.astimezone(timezone.utc):%Y%m%dT%H%M%S}Z-{_short(run_id)}"


def _short(run_id: str) -> str:
    return re.sub("[^A-Za-z0-9]", "", run_id)[:12]


@dataclass
class Run:
    """What the bucket holds of a run."""

    parts: list[ListedObject] = field(default_factory=list)
    report: ListedObject | None = None
    begun_at: datetime | None = None
    """When it began to buy, by the bucket's clock; None: it did not, or is of an earlier version."""


@dataclass
class EarlierRuns:
    """What the reports of earlier runs add up to.

    Attributes:
        rows: How many they hold.
        begun_at: When an earlier attempt of this very run began to buy, by the bucket's clock; None: there was none.
        has_whole_report: A run has come to its end.
        costs: Model → pictures whose cost was told, and their cost in USD.
    """

    rows: int = 0
    begun_at: datetime | None = None
    has_whole_report: bool = False
    costs: dict[str, tuple[int, float]] = field(default_factory=dict)
    _seconds: float = 0.0
    _timed: int = 0

    @property
    def mean_seconds(self) -> float | None:
        """The models' own time for a picture."""
        return self._seconds / self._timed if self._timed else None

    def add(self, outcome: Outcome) -> None:
        self.rows += 1
        if outcome.state not in THERE:
            return
        if outcome.predict_time_seconds:
            self._seconds += outcome.predict_time_seconds
            self._timed += 1
        if outcome.cost_usd:
            count, cost_usd = self.costs.get(outcome.model or "", (0, 0.0))
            self.costs[outcome.model or ""] = (count + 1, cost_usd + outcome.cost_usd)


@dataclass
class BatchFolder:
    """Where a batch's reports are: in the destination's bucket, `files` for what is too large for one piece."""

    store: ObjectStore
    files: S3Files
    destination: Destination
    batch_id: str
    worker: Worker
    has_sheet: bool = False

    def __post_init__(self) -> None:
        check_batch_id(self.batch_id)

    def key(self, name: str) -> str:
        return self.destination.key(f"batches/{self.batch_id}/{name}")

    def uri(self, name: str) -> str:
        return self.store.uri(self.key(name))

    async def runs(self) -> dict[str, Run]:
        """The runs there were, by name; one request for each 1,000 objects."""
        runs: dict[str, Run] = defaultdict(Run)
        self.has_sheet = False
        async for row in self.store.list(self.key("")):
            name = row.key.removeprefix(self.key(""))
            self.has_sheet = self.has_sheet or name == "contact-sheet.png"
            match = re.fullmatch(r"runs/([^/]+)/(part-\d+\.jsonl|report\.jsonl|run\.json)", name)
            if match is not None:
                if match[2] == "report.jsonl":
                    runs[match[1]].report = row
                elif match[2] == "run.json":
                    runs[match[1]].begun_at = row.modified_at
                else:
                    runs[match[1]].parts.append(row)
        return runs

    async def load_earlier(self, scratch: Scratch, ours: Collection[str]) -> EarlierRuns:
        """Reads the last report, and the parts of runs that were killed since, into the scratch file.

        `ours` are the ids of the runs whose purchases are this one's.
        """
        runs = await self.runs()
        last = max((name for name, run in runs.items() if run.report), default="")
        told = [report] if last and (report := runs[last].report) else []
        for name in sorted(runs):
            # An older one that was killed is in the last report: that run had read its parts.
            if name > last:
                told += sorted(runs[name].parts, key=lambda part: part.key)
        earlier = EarlierRuns(has_whole_report=bool(last))
        for one in told:
            await self.worker(self._load, one, scratch, earlier)
        names = tuple(f"-{_short(run_id)}" for run_id in ours)
        begun = [run.begun_at for name, run in runs.items() if name.endswith(names)]
        earlier.begun_at = min((at for at in begun if at is not None), default=None)
        return earlier

    def _load(self, told: ListedObject, scratch: Scratch, earlier: EarlierRuns) -> None:
        bad = 0
        with self.files.open(told.key) as stream:
            several: list[tuple[Outcome, bytes]] = []
            for line in stream:
                outcome = Outcome.from_line(line)
                if outcome is None:
                    bad += 1
                    continue
                earlier.add(outcome)
                several.append((outcome, line))
                if len(several) == LOADED_AT_A_TIME:
                    scratch.remember(several, told_at=told.modified_at)
                    several.clear()
            scratch.remember(several, told_at=told.modified_at)
        if bad:
            logger.warning("%s: %d lines are none of a report; their items are looked up one by one.", told.key, bad)


class ReportWriter:
    """Writes a run's report as it goes; `totals` says what `report.json` holds now."""

    def __init__(self, folder: BatchFolder, run: str, scratch: Scratch, totals: Callable[[], dict[str, Any]]) -> None:
        self._folder = folder
        self._run = run
        self._scratch = scratch
        self._totals = totals
        self._part: list[bytes] = []
        self._part_bytes = 0
        self._parts = 0
        self._writing = asyncio.Lock()
        self._under_way: set[asyncio.Task[None]] = set()
        self._shown: list[Outcome] = []
        self._thumbs = Thumbs(folder.store, folder.destination, folder.worker)

    async def begin(self, run_id: str) -> None:
        """Leaves a trace before anything is bought: who goes on with this run sees since when to look."""
        body = json.dumps({"schema": RUN_SCHEMA, "run_id": run_id}).encode()
        key = self._folder.key(f"runs/{self._run}/run.json")
        with suppress(PreconditionFailed):  # an earlier attempt of the same second
            await self._folder.store.put(key, body, content_type="application/json", if_absent=True)

    def add(self, outcome: Outcome, *, is_news: bool, lacks_cost: bool = False) -> None:
        """A row came to its end; its cost is looked up at the run's end where it lacks one."""
        line = outcome.to_line()
        self._scratch.add(outcome, line, lacks_cost=lacks_cost)
        if is_news:
            self._part.append(line)
            self._part_bytes += len(line)
            if len(self._part) % PART_ROWS == 0 or self._part_bytes > PART_BYTES:
                self._part_bytes = 0
                self.begin_part()

    def begin_part(self) -> None:
        """Writes a part beside whoever asks: a write that was begun goes on, also when its caller is cancelled."""
        task = asyncio.ensure_future(self.write_part())
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)

    async def write_part(self) -> None:
        """Writes what has come since the last part. A bucket that does not take it now gets it with the next one."""
        async with self._writing:
            count = size_bytes = 0
            while count < min(len(self._part), PART_ROWS) and size_bytes <= PART_BYTES:
                size_bytes += len(self._part[count])
                count += 1
            if not count:
                return
            name = f"runs/{self._run}/part-{self._parts + 1:05d}.jsonl"
            try:
                part = b"".join(self._part[:count])
                await self._folder.store.put(self._folder.key(name), part, content_type=JSON_LINES)
                self._parts += 1
                del self._part[:count]
                await self.write_totals(f"runs/{self._run}/report.json")
            except EachlabsError as error:
                logger.warning("A part of the report could not be written yet: %s", error)

    async def write_rest(self) -> None:
        """Writes parts until none is left, or the bucket refuses."""
        while self._part:
            left = len(self._part)
            await self.write_part()
            if len(self._part) == left:
                return

    async def write_totals(self, *names: str) -> None:
        body = json.dumps({"schema": SCHEMA, **self._totals()}, ensure_ascii=False, indent=1).encode()
        for name in names:
            await self._folder.store.put(self._folder.key(name), body, content_type="application/json")

    async def see(self, media: Media, count: int) -> None:
        """A picture is being stored: has its thumbnail, for a page of about so many, while it is in memory."""
        await self._thumbs.see(media, edge_px(count))

    async def see_pictures(self, *, may_read: bool) -> None:
        """Has the other thumbnails of the page: an earlier page's, and of pictures that are read where they may be."""
        folder = self._folder
        shown = self._shown = await folder.worker(lambda: list(self._outcomes(*THERE, most=MOST_PICTURES)))
        if self._thumbs.edge_px != edge_px(len(shown)):
            self._thumbs.resize(edge_px(len(shown)))
        await self._thumbs.learn(folder.key("index.html"), shown)
        if may_read:
            await self._thumbs.make(shown)

    def gallery(self, most: int) -> list[tuple[Outcome, str]]:
        """So many of the page's pictures, spread over it, each with its thumbnail's data URL."""
        urls = self._thumbs.urls
        there = [(one, urls[one.sha256]) for one in self._shown if one.sha256 in urls]
        return [there[number * len(there) // most] for number in range(most)] if len(there) > most else there

    async def write_page(self, presigned_seconds: int | None, *, home: str = "") -> None:
        """Writes `index.html` into the batch's folder, or into `home` below it.

        Its links are relative, or presigned URLs that last so long where they were asked for.
        """
        folder = self._folder
        links: dict[str, str] = {}
        end_at: datetime | None = None
        if presigned_seconds is not None:
            end_at = datetime.now(timezone.utc) + timedelta(seconds=presigned_seconds)
            for one in self._shown:
                key = folder.destination.stored_key(one.file_name)
                links[one.item_id or ""] = await folder.store.presigned_get(key, expires_seconds=presigned_seconds)
        totals = self._totals()

        def page() -> bytes:
            pieces = index_page(
                totals,
                pictures=self._shown,
                not_there=self._outcomes(*NOT_THERE, most=MOST_FAILURES),
                links=links,
                links_end_at=end_at,
                up="../" * (2 + home.count("/")),
                thumbs=self._thumbs.urls,
                edge_px=edge_px(len(self._shown)),
            )
            return "".join(pieces).encode()

        body = await folder.worker(page)
        await folder.store.put(folder.key(f"{home}index.html"), body, content_type="text/html; charset=utf-8")

    def _outcomes(self, *states: RowState, most: int) -> Iterator[Outcome]:
        for line in self._scratch.lines(*states, most=most):
            if (outcome := Outcome.from_line(line)) is not None:
                yield outcome

    async def write_sheet(self) -> bool:
        """Writes `contact-sheet.png` of up to 60 pictures; False where there is none to draw, or no Pillow."""
        folder = self._folder
        chosen = await folder.worker(self._scratch.pictures, MOST_FRAMES)
        try:
            small = self._thumbs.pictures(THUMBNAIL_PX)
            sheet = await draw_sheet(folder.store, folder.destination, chosen, self._totals(), folder.worker, small)
            if sheet is None:
                return False
            await folder.store.put(folder.key("contact-sheet.png"), sheet, content_type="image/png")
        except EachlabsError as error:
            logger.warning("The contact sheet could not be written: %s", error)
            return False
        return True

    async def merge(self, *, is_whole: bool) -> None:
        """Writes the report, in the order of the source: the run's own first, which marks one that lacks no row."""
        with on_disk(), tempfile.TemporaryDirectory(prefix="eachlabs-report-") as scratch_folder:
            path = Path(scratch_folder) / "report.jsonl"

            def write(*names: str) -> None:
                with path.open("wb") as file:
                    file.writelines(self._scratch.lines())
                for name in names:
                    self._folder.files.upload(self._folder.key(name), path, content_type=JSON_LINES)

            await self._folder.worker(write, *([f"runs/{self._run}/report.jsonl"] if is_whole else []), "report.jsonl")
        await self.write_totals(f"runs/{self._run}/report.json", "report.json")
