"""What the doctor says: one line about one thing, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from prefect_eachlabs.errors import EachlabsError


class State(str, Enum):
    """How it stands."""

    OK = "ok"
    MEND = "MEND"
    WRONG = "WRONG"
    SKIPPED = "-"


@dataclass(frozen=True)
class Finding:
    """One line.

    Attributes:
        about: The thing.
        state: `ok`; `MEND` (it works, and should be mended); `WRONG` (nothing works until it is mended); `-`.
        said: What was found.
        advice: What to do; empty when all is well.
    """

    about: str
    state: State
    said: str
    advice: str = ""


def ok(about: str, said: str) -> Finding:
    return Finding(about, State.OK, said)


def skipped(about: str, said: str) -> Finding:
    return Finding(about, State.SKIPPED, said)


def mend(about: str, said: str, advice: str) -> Finding:
    return Finding(about, State.MEND, said, advice)


def wrong(about: str, said: str, advice: str = "") -> Finding:
    return Finding(about, State.WRONG, said, advice)


def finding_of(about: str, error: EachlabsError) -> Finding:
    """An error's message says what to do next."""
    return wrong(about, " ".join(str(error).split()))
