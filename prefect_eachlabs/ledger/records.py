"""The ledger in the bucket: one record an item, its states, and the one way to change it.

    (none) ──► claimed ──► created ──► stored
                 │            ├──────► failed      (bought again only when asked)
                 │            └──────► cancelled   (may be bought again)
                 ├──────────► failed               (the API refused the request: nothing was created)
                 └──────────► ambiguous            (nobody can tell whether the POST bought: nothing is repeated)

A record is changed by conditional puts alone: each change names the ETag it replaces and carries a `write_id` of
its own, so that a writer whose answer was lost can see whether it was its own body that got there.
"""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from enum import Enum
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from prefect_eachlabs.errors import BadInput, OutputMissing, PictureMissing, SetupError, StoreFailed
from prefect_eachlabs.models import Destination, Item, Prediction, parse_prediction_id
from prefect_eachlabs.net.redaction import visible
from prefect_eachlabs.storage.base import (
    ListedObject,
    ObjectStore,
    PreconditionFailed,
    StoredObject,
    honours_conditions,
)
from prefect_eachlabs.storage.s3_client import S3Access

logger = logging.getLogger(__name__)

SCHEMA = "eachlabs-record/1"
MAX_RECORD_BYTES = 1024 * 1024
MAX_CLAIM_BYTES = MAX_RECORD_BYTES // 4
"""Of a new record: it may come to hold the input a second time, and what became of it."""
INDENTED_BYTES = 64 * 1024
"""A larger record is on one line: what is nested deep would take many times as much."""


class RecordState(str, Enum):
    """Where an item stands."""

    CLAIMED = "claimed"
    CREATED = "created"
    STORED = "stored"
    FAILED = "failed"
    CANCELLED = "cancelled"
    AMBIGUOUS = "ambiguous"


class Intent(str, Enum):
    """What the owner of a claim is about to do; only `post` may have bought something."""

    POST = "post"
    SETTLE = "settle"
    IDLE = "idle"
    """Given back: nothing was created under this claim, anybody may take it over at once."""


class RecordError(BaseModel):
    """Why an item is not stored."""

    model_config = ConfigDict(extra="allow")

    kind: str
    message: str
    code: str | None = None


class Statement(BaseModel):
    """A person's word (`--retry-ambiguous`) that an order which nobody could settle was not bought."""

    model_config = ConfigDict(extra="allow")

    run_id: str = Field(description="The run that was given the word; it bought once, and makes no use of it again.")
    said_at: str = Field(description="The writer's clock; for people.")
    unsettled_since: datetime | None = Field(default=None, description="The bucket's time of the order in question.")
    unsettled: str = Field(default="", description="What could not be settled, and why.")


class Record(BaseModel):
    """What the bucket remembers of an item: a small JSON object that a person can read.

    Fields that are not known here survive a change. The JSON Schema is published in the docs (record.schema.json).
    """

    model_config = ConfigDict(extra="allow")

    schema_: str = Field(default=SCHEMA, alias="schema")
    item_id: str
    fingerprint: str
    model: str
    version: str | None = None
    input: dict[str, Any]
    sent_input: dict[str, Any] | None = Field(
        default=None, description="What the last POST sent in place of `input`, without signatures; where it differs."
    )
    sample: int | None = Field(default=None, description="The number among several of one input, from 2 on.")
    formats: list[str] = Field(default_factory=list, description="What may be stored; empty: whatever comes.")
    labels: dict[str, str] = Field(default_factory=dict)
    state: RecordState
    intent: Intent | None = Field(default=None, description="Of a claim: post, settle or idle.")
    epoch: int = Field(default=1, ge=1, description="One more each time the item's purchase begins anew.")
    write_id: str = Field(default="", description="Random, of this very write.")
    run_id: str = Field(default="", description="The run that owns the claim or bought the prediction.")
    ordered_as: list[str] = Field(
        default_factory=list,
        description="The `write_id` of each claim of this purchase whose order asked the vendor to call.",
    )
    ordered_by: str | None = Field(
        default=None, description="The run whose POST may have bought, where it is not `run_id`, which found it out."
    )
    written_at: str = Field(default="", description="The writer's clock; for people, never compared.")
    unsettled_since: datetime | None = Field(
        default=None, description="The bucket's time of the oldest claim whose POST may have bought unseen."
    )
    orders_without_trace: int = Field(
        default=0, ge=0, description="Orders of this purchase without an answer of which no trace was found."
    )
    statements: list[Statement] = Field(default_factory=list, description="Orders that a person called not bought.")
    possible_loss: str | None = Field(
        default=None, description="Why an earlier order of this item may have bought a prediction that nobody knows."
    )
    adopted_among: list[str] = Field(
        default_factory=list, description="Other predictions that could as well be what the lost order bought."
    )
    replaced_runs: list[str] = Field(
        default_factory=list, description="Runs whose purchase for this item id was replaced by another input."
    )
    prediction_id: str | None = None
    created_at: datetime | None = Field(default=None, description="When the POST was answered, the buyer's clock.")
    cancel_requested: bool = False
    resubmissions: int = Field(default=0, ge=0, description="How often it was bought again after a failure.")
    also_bought: list[str] = Field(default_factory=list, description="Predictions bought one too many; cancelled.")
    earlier: list[str] = Field(default_factory=list, description="Predictions of this item's earlier purchases.")
    uri: str | None = None
    more_uris: list[str] = Field(default_factory=list)
    sha256: str | None = None
    size_bytes: int | None = None
    width_px: int | None = None
    height_px: int | None = None
    verified: bool | None = Field(
        default=None, description="Whether its bytes were seen to be a whole picture; false: stored as it came."
    )
    content_type: str | None = Field(default=None, description="The media type of what is stored.")
    cost_usd: float | None = None
    predict_time_seconds: float | None = None
    error: RecordError | None = None

    @property
    def order(self) -> dict[str, Any]:
        """The input that the API was sent and echoes, but for signatures."""
        return self.input if self.sent_input is None else self.sent_input

    @property
    def bought_by(self) -> str:
        """The run that was billed: whose POST it was, whoever adopted what it bought."""
        return self.ordered_by or self.run_id

    @property
    def named_predictions(self) -> set[str]:
        """Every prediction that this record accounts for."""
        return {*self.also_bought, *self.earlier, *([self.prediction_id] if self.prediction_id else [])}

    @property
    def may_have_bought(self) -> bool:
        """Whether money may have been spent under this record."""
        return bool(self.named_predictions) or self.may_have_bought_unseen

    @property
    def may_have_bought_unseen(self) -> bool:
        """Whether a POST under this claim may have bought a prediction that nobody knows by id."""
        if self.state is RecordState.CLAIMED:
            return self.intent is not Intent.IDLE or self.unsettled_since is not None
        return self.state is RecordState.AMBIGUOUS

    @property
    def picture_is_gone(self) -> bool:
        """Whether it had a picture, which can be had nowhere any more."""
        return self.error is not None and self.error.kind == PictureMissing.default_kind

    @property
    def ended_free(self) -> bool:
        """Whether its prediction ended with nothing that is paid for: it failed or was cancelled."""
        if self.state is RecordState.FAILED:
            return not self.picture_is_gone and (self.error is None or self.error.kind != OutputMissing.default_kind)
        return self.state is RecordState.CANCELLED

    def to_bytes(self) -> bytes:
        try:
            text = self.model_dump_json(by_alias=True, exclude_none=True)
            if len(text) <= INDENTED_BYTES:
                text = self.model_dump_json(by_alias=True, exclude_none=True, indent=1)
        except ValueError:  # half a character: no input holds one, what the API says about a failure may
            text = json.dumps(self.model_dump(mode="json", by_alias=True, exclude_none=True), ensure_ascii=False)
        return text.encode("utf-8", "replace")

    def prediction(self) -> Prediction | None:
        """The prediction this record names, not yet asked about."""
        if self.prediction_id is None:
            return None
        return Prediction(
            id=self.prediction_id,
            model=self.model,
            version=self.version,
            input=self.input,
            created_at=self.created_at,
            item_id=self.item_id,
        )


def new_record(item: Item, *, run_id: str) -> Record:
    """The first claim of an item.

    Raises:
        BadInput: Its input and labels are so large that no record could hold them and be read back.
    """
    # No record is smaller than what it holds: what is too large is not made into one to be measured.
    size_bytes = len(json.dumps([item.input, item.labels], ensure_ascii=False, separators=(",", ":")))
    if size_bytes > MAX_CLAIM_BYTES:
        raise _too_large(item, size_bytes)
    record = Record(
        item_id=item.item_id,
        fingerprint=item.fingerprint,
        model=item.model,
        version=item.version,
        input=item.input,
        sample=item.sample,
        labels=item.labels,
        state=RecordState.CLAIMED,
        intent=Intent.POST,
        run_id=run_id,
    )
    size_bytes = len(record.to_bytes())
    if size_bytes > MAX_CLAIM_BYTES:
        raise _too_large(item, size_bytes)
    return record


def _too_large(item: Item, size_bytes: int) -> BadInput:
    return BadInput(
        f"The input and its labels make a record of {size_bytes} bytes, and {MAX_CLAIM_BYTES} are the most. Name "
        "pictures by their URL, file or object instead of writing them into the input; nothing was bought.",
        item_id=item.item_id,
    )


@dataclass(frozen=True)
class VersionedRecord:
    """A record as it was read, with what a conditional change of it needs.

    Attributes:
        record: The record.
        etag: Names the body that a change would replace.
        age_seconds: How old the body was when read, by the bucket's clock alone.
        modified_at: When it was written, the bucket's clock.
    """

    record: Record
    etag: str
    age_seconds: float
    modified_at: datetime

    @property
    def read_at(self) -> datetime:
        """The bucket's time when it was read; of a record just written this machine's, so read it first."""
        return self.modified_at + timedelta(seconds=self.age_seconds)


class RecordChanged(Exception):
    """Somebody else has changed the record in between; `current` is what it says now (None: it is gone)."""

    def __init__(self, current: VersionedRecord | None) -> None:
        super().__init__("the record was changed by another writer")
        self.current = current


class Ledger:
    """The records of one destination.

    Args:
        store: The destination's bucket.
        destination: Bucket and prefix.
        conditional: False only where the operator has accepted a store that ignores conditions.
        access: How the destination's bucket is reached, for those beside it; boto3's own chain when None.
    """

    def __init__(
        self,
        store: ObjectStore,
        destination: Destination,
        *,
        conditional: bool = True,
        access: S3Access | None = None,
    ) -> None:
        self.store = store
        self.access = access
        self.destination = destination
        self.conditional = conditional
        self._probed = not conditional
        self._probing = asyncio.Lock()

    @property
    def is_proven(self) -> bool:
        """Whether this store was seen to refuse what it must refuse."""
        return self.conditional and self._probed

    async def read(self, item_id: str) -> VersionedRecord | None:
        """The item's record, or None.

        Raises:
            StoreFailed: The bucket did not answer, or the object is no record.
            SetupError: The bucket is missing or refuses us.
        """
        found = await self.store.get(self.destination.record_key(item_id))
        return None if found is None else self._held(found)

    async def listed(self) -> AsyncIterator[tuple[str, ListedObject]]:
        """The items that have a record, each and its row of the listing; a request for each 1,000. Raises as `read`."""
        prefix = self.destination.key("records/")
        async for row in self.store.list(prefix):
            if row.key.endswith(".json"):
                yield row.key[len(prefix) : -len(".json")], row

    def _held(self, found: StoredObject) -> VersionedRecord:
        try:
            if len(found.body) > MAX_RECORD_BYTES:
                raise ValueError("it is larger than 1 MiB")
            record = Record.model_validate_json(found.body)
            if record.schema_ != SCHEMA:
                raise ValueError(f"its schema is {record.schema_[:40]!r}, this version reads {SCHEMA!r}")
            if self.destination.record_key(record.item_id) != found.key:
                # A copied file: whoever changed it would write the other item's record.
                raise ValueError(f"it is the record of another item, {record.item_id[:140]!r}")
            bought = record.prediction_id
            if (bought is None and record.state is RecordState.CREATED) or (
                bought is not None and parse_prediction_id(bought) is None
            ):
                raise ValueError("its prediction_id is no prediction's id")
            if any(visible(uri) != uri for uri in (record.uri or "", *record.more_uris)):
                raise ValueError("a uri of it holds signs that move terminals")
        except (ValidationError, ValueError) as error:
            reason = "it has no valid JSON of the schema" if isinstance(error, ValidationError) else str(error)
            raise StoreFailed(
                f"{self.store.uri(found.key)} is no record that can be read ({reason}). "
                "Look at it; nothing is bought while it stands."
            ) from None
        modified_at = found.date - timedelta(seconds=found.age_seconds)
        return VersionedRecord(record, found.etag, found.age_seconds, modified_at)

    async def write(self, record: Record, *, replacing: VersionedRecord | None) -> VersionedRecord:
        """Writes the record in place of `replacing` (None: there must be none yet), or finds that it was written.

        boto3 repeats a put whose answer was lost and is then refused although the stored body is its own; so after
        any refusal or failure the record is read: the own `write_id` means success.

        Raises:
            RecordChanged: Somebody else's body stands there.
            StoreFailed: Neither the write nor the reading got an answer, or the write did not take place.
            SetupError: The bucket is missing or refuses us, or it ignores conditions.
        """
        record = record.model_copy(
            update={
                "write_id": record.write_id or uuid.uuid4().hex,
                "written_at": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            }
        )
        key = self.destination.record_key(record.item_id)
        body = record.to_bytes()
        try:
            etag = await self.store.put(
                key,
                body,
                content_type="application/json",
                if_match=replacing.etag if replacing and self.conditional else None,
                if_absent=replacing is None and self.conditional,
            )
        except (PreconditionFailed, StoreFailed) as error:
            current = await self.read(record.item_id)
            if current is not None and current.record.write_id == record.write_id:
                await self._probe(key, body)
                return current
            unchanged = (current.etag if current else None) == (replacing.etag if replacing else None)
            if not unchanged:
                raise RecordChanged(current) from error
            if isinstance(error, StoreFailed):
                raise
            raise StoreFailed(
                f"{self.store.uri(key)}: the store refuses to write it although nothing else was written meanwhile.",
                item_id=record.item_id,
            ) from error
        await self._probe(key, body)
        return VersionedRecord(record, etag, 0.0, datetime.now(timezone.utc))

    async def _probe(self, key: str, body: bytes) -> None:
        """Once a process: would this store have refused?"""
        if self._probed:
            return
        async with self._probing:
            if not self._probed:
                if not await honours_conditions(self.store, key, body, content_type="application/json"):
                    raise SetupError(
                        f"{self.store.uri(key)}: this store ignores conditional writes (If-None-Match, If-Match), "
                        "without which two workers can buy the same picture. Nothing was bought. Use a store that "
                        "honours them, or set EACHLABS_CONDITIONAL_WRITES=ignore to go on with one worker at a time, "
                        "at your own risk."
                    )
                self._probed = True


def amended(record: Record, **changes: Any) -> Record:
    """A copy that is a new write (its `write_id` is drawn when it is written)."""
    return record.model_copy(update={"write_id": "", **changes})
