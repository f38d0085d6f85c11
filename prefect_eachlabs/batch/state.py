"""What a batch has to remember of each row, on disk: the memory stays flat from a hundred rows to a million.

A private SQLite file, gone with the process. What a killed run knew is in its report, never here. It belongs to the
worker's thread: each query gives the interpreter's lock away, and the loop waits milliseconds to get it back.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from prefect_eachlabs.batch.outcomes import THERE, Outcome, RowState

_TABLES = """
CREATE TABLE earlier (
    item_id TEXT PRIMARY KEY, state TEXT, has_picture INTEGER DEFAULT 0, bought_by TEXT, model TEXT, cost_usd REAL,
    told_at REAL, line BLOB
) WITHOUT ROWID;
CREATE TABLE ids (item_id TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE counts (fingerprint TEXT PRIMARY KEY, count INTEGER) WITHOUT ROWID;
CREATE TABLE recorded (item_id TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE rows (row INTEGER PRIMARY KEY, state TEXT, unsettled TEXT, line BLOB);
CREATE INDEX unsettled ON rows (unsettled) WHERE unsettled IS NOT NULL;
"""


_THERE = tuple(state.value for state in THERE)


def scratch_database(tables: str) -> sqlite3.Connection:
    """A database on disk that is gone with the process; the empty name is a temporary file, which SQLite deletes."""
    database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
    database.executescript(f"PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; {tables}")
    database.execute("BEGIN")
    return database


@dataclass(frozen=True)
class Earlier:
    """What the last report says about an item, and whether the listing shows its picture."""

    outcome: Outcome
    has_picture: bool


class Scratch:
    """Facts by item id, and this run's rows in the order of the source.

    `add` is for the loop; everything else is called in the worker, one call at a time.
    """

    def __init__(self) -> None:
        self._db = scratch_database(_TABLES)
        self._added: list[tuple[Outcome, bytes, bool]] = []

    # What earlier runs left.

    def remember(self, told: Iterable[tuple[Outcome, bytes]], *, told_at: datetime) -> None:
        """Rows of an earlier report of that time and their lines; a later one of an item takes the former's place."""
        self._db.executemany(
            "INSERT OR REPLACE INTO earlier (item_id, state, bought_by, model, cost_usd, told_at, line) "
            "VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                (
                    *(one.item_id, one.state.value, one.bought_by, one.model or "", one.cost_usd or None),
                    *(told_at.timestamp(), line),
                )
                for one, line in told
                if one.item_id and one.fingerprint  # a row that was none says nothing of the item whose id it has
            ),
        )

    def has_pictures(self, pictures: Iterable[tuple[str, datetime]]) -> None:
        """These items' pictures are in the bucket since then: those that a report tells of, unless they are newer."""
        self._db.executemany(
            "UPDATE earlier SET has_picture = 1 WHERE item_id = ? AND told_at >= ?",
            ((item_id, put_at.timestamp()) for item_id, put_at in pictures),
        )

    def count_earlier(self) -> int:
        """How many items an earlier report says are stored."""
        found = self._db.execute("SELECT count(*) FROM earlier WHERE state IN (?, ?)", _THERE).fetchone()
        return int(found[0])

    def earlier(self, item_id: str) -> Earlier | None:
        found = self._db.execute("SELECT has_picture, line FROM earlier WHERE item_id = ?", (item_id,)).fetchone()
        outcome = Outcome.from_line(found[1]) if found else None
        return None if outcome is None else Earlier(outcome, bool(found[0]))

    def stored_by(self, runs: Collection[str]) -> list[tuple[str, int, float, float | None, int]]:
        """What these runs have stored: model, pictures whose cost was told, that cost, the highest, the other ones."""
        marks = ", ".join("?" * len(runs))
        query = (
            "SELECT model, count(cost_usd), total(cost_usd), max(cost_usd), count(*) - count(cost_usd) FROM earlier "
            f"WHERE state IN (?, ?) AND bought_by IN ({marks}) GROUP BY model"
        )
        return self._db.execute(query, (*_THERE, *runs)).fetchall()

    def not_stored_by(self, runs: Collection[str]) -> list[Outcome]:
        """Rows for which these runs have ordered, and which have no picture."""
        marks = ", ".join("?" * len(runs))
        query = f"SELECT line FROM earlier WHERE state NOT IN (?, ?) AND bought_by IN ({marks})"
        lines = self._db.execute(query, (*_THERE, *runs)).fetchall()
        return [outcome for (line,) in lines if (outcome := Outcome.from_line(line)) is not None]

    def not_told(self, item_ids: Sequence[str], runs: Collection[str]) -> list[str]:
        """Those of the items of which no report says that one of these runs has stored them."""
        marks, runs_marks = ", ".join("?" * len(item_ids)), ", ".join("?" * len(runs))
        query = (
            f"SELECT item_id FROM earlier WHERE item_id IN ({marks}) AND state IN (?, ?) "
            f"AND bought_by IN ({runs_marks})"
        )
        told = {item_id for (item_id,) in self._db.execute(query, (*item_ids, *_THERE, *runs))}
        return [item_id for item_id in item_ids if item_id not in told]

    def have_records(self, item_ids: Iterable[str]) -> None:
        """These items have a record in the bucket."""
        self._db.executemany("INSERT OR IGNORE INTO recorded VALUES (?)", ((one,) for one in item_ids))

    def has_record(self, item_id: str) -> bool:
        return self._db.execute("SELECT 1 FROM recorded WHERE item_id = ?", (item_id,)).fetchone() is not None

    # Which ids this run's rows have.

    def take_id(self, item_id: str) -> bool:
        """Takes a row's own id; False when an earlier row has it."""
        return self._db.execute("INSERT OR IGNORE INTO ids VALUES (?)", (item_id,)).rowcount == 1

    def take_fingerprint(self, fingerprint: str) -> str:
        """The id of a row without one: its fingerprint, for the second equal row `FINGERPRINT-2`, and so on."""
        found = self._db.execute("SELECT count FROM counts WHERE fingerprint = ?", (fingerprint,)).fetchone()
        count = found[0] if found else 0
        while True:
            count += 1
            item_id = fingerprint if count == 1 else f"{fingerprint}-{count}"
            if self.take_id(item_id):
                if count > 1:
                    # Nearly all prompts are different: only those that are not need a count.
                    self._db.execute("INSERT OR REPLACE INTO counts VALUES (?, ?)", (fingerprint, count))
                return item_id

    # This run's rows.

    def add(self, outcome: Outcome, line: bytes, *, lacks_cost: bool = False) -> None:
        """A row came to its end; written down by the next `flush`."""
        self._added.append((outcome, line, lacks_cost))

    def flush(self) -> None:
        added, self._added = self._added, []
        self._db.executemany(
            "INSERT OR REPLACE INTO rows VALUES (?, ?, ?, ?)",
            ((one.row, one.state.value, one.prediction_id if lacks else None, line) for one, line, lacks in added),
        )

    def lines(self, *states: RowState, most: int = -1) -> Iterator[bytes]:
        """The report's lines in the order of the source; only those of some states, when given."""
        words = [state.value for state in states or RowState]
        marks = ", ".join("?" * len(words))
        query = f"SELECT line FROM rows WHERE state IN ({marks}) ORDER BY row LIMIT ?"
        for (line,) in self._db.execute(query, (*words, most)):
            yield line

    def pictures(self, count: int) -> list[Outcome]:
        """About `count` of the rows with a picture, spread evenly over the source."""
        rows = [row for (row,) in self._db.execute("SELECT row FROM rows WHERE state IN (?, ?) ORDER BY row", _THERE)]
        chosen = [rows[number * len(rows) // count] for number in range(count)] if len(rows) > count else rows
        found = (self._db.execute("SELECT line FROM rows WHERE row = ?", (row,)).fetchone() for row in chosen)
        return [outcome for (line,) in found if (outcome := Outcome.from_line(line)) is not None]

    def count_unsettled(self) -> int:
        """How many rows came to their end before the vendor told what they cost."""
        return int(self._db.execute("SELECT count(*) FROM rows WHERE unsettled IS NOT NULL").fetchone()[0])

    def settle(self, costs: Mapping[str, float]) -> list[Outcome]:
        """Writes costs that the vendor told later, by prediction, into their rows; returns those."""
        marks = ", ".join("?" * len(costs))
        query = f"SELECT row, line FROM rows WHERE unsettled IN ({marks})"
        settled = []
        for row, line in self._db.execute(query, tuple(costs)).fetchall():
            outcome = Outcome.from_line(line)
            if outcome is not None and outcome.prediction_id is not None:
                outcome = replace(outcome, cost_usd=costs[outcome.prediction_id])
                told = (outcome.to_line(), row)
                self._db.execute("UPDATE rows SET unsettled = NULL, line = ? WHERE row = ?", told)
                settled.append(outcome)
        return settled

    def close(self) -> None:
        with contextlib.suppress(sqlite3.Error):
            self._db.close()
