"""What a record asks for: the rules of the purchase protocol that need no network; pure."""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from enum import Enum
from typing import Literal, Protocol, TypeVar

from prefect_eachlabs.errors import ContentRefused, ItemConflict, PredictionFailed
from prefect_eachlabs.ledger.records import Intent, Record, RecordError, RecordState, VersionedRecord
from prefect_eachlabs.limits.leases import clock
from prefect_eachlabs.models import Item, Media

SHOWN_CHARACTERS = 80
"""Of a prompt, in an error."""


class Approval(Protocol):
    """Who is asked before money is spent (both raise Skipped when it must not be), and told what it bought."""

    async def approve(self, item: Item) -> None:
        """Asked before slots are waited for; may wait itself. Once for each item that is approved, and again."""
        ...

    def check(self, item: Item) -> None:
        """Asked once more with the slots at hand, right before the claim of a POST."""
        ...

    def ordered(self, item: Item, prediction_id: str | None) -> None:
        """A POST of this run bought this prediction; None: its answer was lost, and it may have bought."""
        ...

    def disown(self, item: Item, prediction_id: str) -> None:
        """The prediction counts for another item's order: what this item's bought is not known any more."""
        ...


See = Callable[[Media], Awaitable[None]]

Options = TypeVar("Options", bound="PurchaseOptions")


@dataclass(frozen=True)
class PurchaseOptions:
    """What may be done about an item beyond the first purchase; the defaults never buy anything twice.

    Attributes:
        run_id: Names the run in records; only the run named there cancels.
        replace: Buy although the item id stands for another input (its picture is replaced).
        rebuy_missing: Buy again when a stored picture is gone from the bucket.
        retry_failed: Buy again what failed for good.
        on_ambiguous: `settle`: find out through the API's executions what a lost answer bought; `fail`: report it.
        deadline_seconds: From the POST; None: the account's.
        presume_new: Begin with the claim, which is refused where a record is: a read less for an item that is new.
        budget: Asked before each POST; None: nobody is.
        see: Shown the first picture when it is stored, while its bytes are in memory; raises nothing but a cancel.
        formats: What may be stored, such as `("png", "jpeg")`; None: what the record says, at first anything.
        any_reference: A person at the command line named the reference pictures: every bucket will do.
        retry_ambiguous: A person says that what nobody can decide was not bought: it is settled once more, and if that
            leaves it open, it is bought once. The record keeps the statement; the same run makes it once for an item.
        began_at: When the run began, by its loop's clock and what the machine was asleep: a person's word is about what
            stood as ambiguous then.
    """

    run_id: str = ""
    replace: bool = False
    rebuy_missing: bool = False
    retry_failed: bool = False
    on_ambiguous: Literal["settle", "fail"] = "settle"
    deadline_seconds: float | None = None
    presume_new: bool = False
    budget: Approval | None = None
    see: See | None = None
    formats: tuple[str, ...] | None = None
    any_reference: bool = False
    retry_ambiguous: bool = False
    began_at: float | None = None

    def begun(self: Options) -> Options:
        """These options for a run that begins now, unless it has begun: with a time, and a run id of its own."""
        began_at = clock() if self.began_at is None else self.began_at
        return replace(self, run_id=self.run_id or uuid.uuid4().hex, began_at=began_at)


class Step(str, Enum):
    """What a record asks for."""

    BUY = "buy"
    """Where an earlier order may have bought unseen, that is settled first."""
    LOOK_AGAIN = "look again"
    FINISH = "finish"
    REUSE = "reuse"


class Rules:
    """What one call may do about one item: it remembers what input stood there when the call began.

    Replacing replaces that input, once. An input that another run put there meanwhile is not this call's to replace,
    nor is one that has already replaced a purchase of this very run: two runs would buy against each other for ever.

    Args:
        item: What is wanted.
        options: What may be done; `run_id` is set.
        claim_seconds: How long a claim lives.
    """

    def __init__(self, item: Item, options: PurchaseOptions, *, claim_seconds: float) -> None:
        self._item = item
        self._claim_seconds = claim_seconds
        self._run_id = options.run_id
        self._first: str | None = None
        self._has_read = False

    def next_step(self, held: VersionedRecord | None, options: PurchaseOptions) -> Step:
        """What is to be done about the item whose record says `held`.

        Raises:
            ItemConflict, PredictionFailed: As the function of this name does; ItemConflict also when another run
                has replaced the input meanwhile.
        """
        fingerprint = None if held is None else held.record.fingerprint
        if not self._has_read:
            self._first, self._has_read = fingerprint, True
        if held is not None and fingerprint != self._item.fingerprint and held.record.may_have_bought:
            record = held.record
            if fingerprint != self._first or self._run_id in (record.bought_by, *record.replaced_runs):
                raise ItemConflict(
                    f"item_id {self._item.item_id!r} was given another input after this run had come to it "
                    f"({_difference(record, self._item)}): a run replaces once what was there before it. "
                    "Do not run two different tables at the same item ids; run it again to replace what stands now.",
                    item_id=self._item.item_id,
                    prediction_id=record.prediction_id,
                )
        return next_step(held, self._item, options, claim_seconds=self._claim_seconds)


def _difference(record: Record, item: Item) -> str:
    """What a record stands for and what is wanted now, the first of it that differs: the prompts, as a rule."""
    were = {"prompt": None, "model": record.model, "version": record.version, **record.input}
    are = {"prompt": None, "model": item.model, "version": item.version, **item.input}
    names = [name for name in dict.fromkeys([*were, *are]) if were.get(name) != are.get(name)]
    name = names[0] if names else "input"
    return f"its {name} is {_cut(were.get(name))}, here it is {_cut(are.get(name))}"


def _cut(value: object) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}… ({len(text):,} characters)"


def next_step(held: VersionedRecord | None, item: Item, options: PurchaseOptions, *, claim_seconds: float) -> Step:
    """What is to be done about an item whose record says `held`; pure.

    Raises:
        ItemConflict: The id stands for another input, for which money may have been spent.
        PredictionFailed: It failed for good, and nobody asked to try again.
    """
    if held is None:
        return Step.BUY
    record = held.record
    live_claim = (
        record.state is RecordState.CLAIMED
        and record.intent is not Intent.IDLE
        # Both times have a resolution of 1 s.
        and held.age_seconds <= claim_seconds + 1
    )
    if record.fingerprint != item.fingerprint and record.may_have_bought and not options.replace:
        raise ItemConflict(
            f"item_id {item.item_id!r} already stands for another input: {_difference(record, item)}. Choose "
            "another item id, or replace it on purpose (--replace, replace=True).",
            item_id=item.item_id,
            prediction_id=record.prediction_id,
        )
    if live_claim:
        return Step.LOOK_AGAIN
    if record.fingerprint != item.fingerprint:
        return Step.BUY
    if record.state is RecordState.CREATED:
        return Step.FINISH
    if record.state is RecordState.STORED:
        return Step.REUSE
    # A run may have died right before it bought again what it was asked to.
    may_try_again = options.retry_failed or (options.rebuy_missing and record.picture_is_gone)
    if record.state is RecordState.FAILED and not may_try_again:
        said = record.error or RecordError(kind="error", message="the record gives no reason")
        failed = ContentRefused if said.kind == ContentRefused.default_kind else PredictionFailed
        raise failed(
            f"It failed in an earlier run: {said.message} It is tried again only when asked (--retry-failed).",
            item_id=item.item_id,
            prediction_id=record.prediction_id,
            code=said.code,
            kind=said.kind,
        )
    return Step.BUY
