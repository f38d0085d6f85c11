"""A prediction whose end is not known yet, and what has been learned about it so far."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from prefect_eachlabs.limits.limiter import Slot
from prefect_eachlabs.models import Prediction


@dataclass(eq=False)
class Watched:
    """One entry of the watcher; all times are the loop's."""

    prediction: Prediction
    future: asyncio.Future[Prediction]
    slot: Slot | None
    watched_at: float
    began_at: float
    """Its creation, as far as known."""
    age_known: bool
    number: int
    """Counts what is watched: whose number is higher stands higher in the list of executions."""
    due_at: float = 0.0
    """When it is asked about where requests are free."""
    not_before: float = 0.0
    """A back-off, or a question that is out."""
    insisted: bool = False
    """It is asked about by id as soon as there is a slot: a row says that it ended, or somebody is in a hurry."""
    missing: bool = False
    """The last page did not show it."""
    doubtful: bool = False
    """The list says pending for longer than is likely: GET by id is asked whether that is so."""
    doubted_at_age: float = 0.0
    pending_at: float | None = None
    """When the last question was sent that found it pending."""
    failures: int = 0
    release: asyncio.TimerHandle | None = None
    """Gives its slot back when nobody has seen its end for too long."""

    @property
    def created_here(self) -> bool:
        """Whether it was watched right from its creation, so that its number says where it stands."""
        return self.age_known and self.watched_at - self.began_at < 1.0

    @property
    def alone(self) -> bool:
        """Whether a page of executions does not help: it is asked about by id."""
        return self.missing or self.doubtful

    def __lt__(self, other: Watched) -> bool:
        return self.number < other.number

    def take_over(self, slot: Slot | None) -> None:
        """Its slot in flight; of two the second is given back at once."""
        if self.slot is None:
            self.slot = slot
        elif slot is not None and slot is not self.slot:
            slot.done()

    def give_back_slot(self) -> None:
        if self.release is not None:
            self.release.cancel()
            self.release = None
        if self.slot is not None:
            self.slot.done()
            self.slot = None

    def forget(self) -> None:
        """Nobody will see its end here; its slot stays taken, for it goes on."""
        if self.release is not None:
            self.release.cancel()
        self.future.cancel()

    def know_more(self, prediction: Prediction) -> None:
        """It was known by its id alone, perhaps, and now comes with its input."""
        known = self.prediction
        more = {name: value for name, value in prediction if value is not None and getattr(known, name) is None}
        if more:
            self.prediction = known.model_copy(update=more)
