"""What an audit has to remember of each execution and record, on disk: the memory stays flat at any number of them.

A private SQLite file, gone with the process.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from typing import Any, NamedTuple

from prefect_eachlabs.audit.report import ELSEWHERE, MOST_NAMED, ON_THE_BILL, Dear, Finding, Kind, Named, Spent
from prefect_eachlabs.batch.outcomes import money
from prefect_eachlabs.batch.state import scratch_database
from prefect_eachlabs.models import Execution, PredictionStatus

_TABLES = """
PRAGMA cache_size = -16000;
CREATE TABLE bill (
    id TEXT PRIMARY KEY, model TEXT, status TEXT, cost_usd REAL, created_at TEXT,
    rank INTEGER, destination TEXT, item_id TEXT, said TEXT DEFAULT '', pictures INTEGER DEFAULT 1, uri TEXT
) WITHOUT ROWID;
CREATE INDEX by_date ON bill (created_at);
CREATE TABLE pictures (key TEXT PRIMARY KEY, item_id TEXT, size_bytes INTEGER) WITHOUT ROWID;
CREATE TABLE recorded (item_id TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE lost (
    number INTEGER PRIMARY KEY, kind TEXT, destination TEXT, item_id TEXT, said TEXT, input TEXT,
    model TEXT, low TEXT, sent_at TEXT, high TEXT
);
CREATE TABLE names (model TEXT, listed TEXT, PRIMARY KEY (model, listed)) WITHOUT ROWID;
CREATE TABLE found (
    kind TEXT, prediction_id TEXT, destination TEXT, item_id TEXT, model TEXT, cost_usd REAL, said TEXT
);
"""
_RANKS = {kind: rank for rank, kind in enumerate(ON_THE_BILL)}
"""An execution that is named several times is what the best of its names makes it."""
FOREIGN = _RANKS[Kind.FOREIGN]
_MAY_HAVE_BOUGHT = (
    "bill.created_at BETWEEN low AND high AND (bill.model IS NULL OR bill.model = lost.model OR EXISTS "
    "(SELECT 1 FROM names WHERE names.model = lost.model AND names.listed = bill.model))"
)
_DISTANCE = "abs(julianday(bill.created_at) - julianday(lost.sent_at))"
_BOUGHT = (PredictionStatus.SUCCEEDED.value, PredictionStatus.PENDING.value)


class Billed(NamedTuple):
    """A row of the bill."""

    status: PredictionStatus
    cost_usd: float
    model: str | None
    kind: Kind
    item_id: str | None
    destination: str | None

    @property
    def is_paid(self) -> bool:
        """It was billed, or will be: the vendor tells costs after the end."""
        return self.status is PredictionStatus.SUCCEEDED or self.cost_usd > 0


class Lost(NamedTuple):
    """An order that may have bought an execution which no record names; what that is then, and what to say of it."""

    number: int | None
    kind: Kind
    destination: str
    item_id: str
    said: str
    input: dict[str, Any]


class Scratch:
    """The bill, what names its rows, and what else was found. A call takes milliseconds at most, but for the sums."""

    def __init__(self) -> None:
        self._db = scratch_database(_TABLES)

    def close(self) -> None:
        self._db.close()

    # The bill.

    def add_bill(self, rows: Iterable[Execution]) -> int:
        """Rows of a page; returns how many were new."""
        before = self._db.total_changes
        self._db.executemany(
            "INSERT OR IGNORE INTO bill (id, model, status, cost_usd, created_at) VALUES (?, ?, ?, ?, ?)",
            (
                (row.id, row.model, row.status.value, row.cost_usd or 0.0, row.created_at and as_text(row.created_at))
                for row in rows
            ),
        )
        return self._db.total_changes - before

    def has_bill(self) -> bool:
        """Whether the list has shown anything: one that is empty proves little."""
        return self._db.execute("SELECT 1 FROM bill LIMIT 1").fetchone() is not None

    def billed(self, prediction_id: str) -> Billed | None:
        query = "SELECT status, cost_usd, model, rank, item_id, destination FROM bill WHERE id = ?"
        found = self._db.execute(query, (prediction_id,)).fetchone()
        if found is None:
            return None
        status, cost_usd, model, rank, item_id, destination = found
        kind = ON_THE_BILL[FOREIGN if rank is None else rank]
        return Billed(PredictionStatus(status), cost_usd, model, kind, item_id, destination)

    def name(
        self,
        prediction_id: str,
        kind: Kind,
        *,
        destination: str,
        item_id: str,
        said: str = "",
        pictures: int = 1,
        uri: str | None = None,
    ) -> None:
        """A record, a picture or an echo says whose a row is; the best that is said of it counts."""
        self._db.execute(
            "UPDATE bill SET rank = ?1, destination = ?2, item_id = ?3, said = ?4, pictures = ?5, uri = ?6 "
            "WHERE id = ?7 AND (rank IS NULL OR rank > ?1)",
            (_RANKS[kind], destination, item_id, said, pictures, uri, prediction_id),
        )

    def note(self, prediction_id: str, said: str) -> None:
        """What is known of a row that stays foreign."""
        self._db.execute("UPDATE bill SET said = ? WHERE id = ? AND rank IS NULL", (said, prediction_id))

    # The bucket.

    def add_picture(self, key: str, item_id: str, size_bytes: int) -> None:
        self._db.execute("INSERT OR REPLACE INTO pictures VALUES (?, ?, ?)", (key, item_id, size_bytes))

    def picture_bytes(self, key: str) -> int | None:
        """The size of a picture that the listing showed."""
        found = self._db.execute("SELECT size_bytes FROM pictures WHERE key = ?", (key,)).fetchone()
        return found[0] if found else None

    def add_record(self, item_id: str) -> None:
        self._db.execute("INSERT OR IGNORE INTO recorded VALUES (?)", (item_id,))

    def without_record(self, most: int) -> list[tuple[str, str]]:
        """Key and item id of pictures of which there is no record; this destination is done with then."""
        query = "SELECT key, item_id FROM pictures WHERE item_id NOT IN (SELECT item_id FROM recorded) LIMIT ?"
        return self._db.execute(query, (most,)).fetchall()

    def next_destination(self) -> None:
        self._db.execute("DELETE FROM pictures")
        self._db.execute("DELETE FROM recorded")

    # Lost orders.

    def lose(self, lost: Lost, model: str, low: datetime, sent_at: datetime, high: datetime) -> None:
        """An order that was sent about then and may have bought a row created between two moments."""
        row = (*lost[:5], json.dumps(lost.input), model, *map(as_text, (low, sent_at, high)))
        self._db.execute("INSERT INTO lost VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)

    def find_lost(self, lost: Lost) -> None:
        """It was found: it has bought nothing else."""
        self._db.execute("DELETE FROM lost WHERE number = ?", (lost.number,))

    def add_name(self, model: str, listed: str) -> None:
        """The list calls a model by another name."""
        self._db.execute("INSERT OR IGNORE INTO names VALUES (?, ?)", (model, listed))

    def suspects(self, most: int) -> list[str]:
        """Rows that no record names and that a lost order may have bought, those first that are nearest to one."""
        query = (
            "SELECT bill.id FROM bill JOIN lost WHERE rank IS NULL AND (status IN (?, ?) OR cost_usd > 0) "
            f"AND {_MAY_HAVE_BOUGHT} GROUP BY bill.id ORDER BY min({_DISTANCE}) LIMIT ?"
        )
        return [one for (one,) in self._db.execute(query, (*_BOUGHT, most))]

    def lost_near(self, prediction_id: str) -> list[Lost]:
        """The lost orders that may have bought a row, the nearest first."""
        query = (
            "SELECT number, kind, lost.destination, lost.item_id, lost.said, input FROM lost JOIN bill ON bill.id = ? "
            f"WHERE {_MAY_HAVE_BOUGHT} ORDER BY {_DISTANCE}"
        )
        rows = self._db.execute(query, (prediction_id,)).fetchall()
        return [
            Lost(number, Kind(kind), place, item_id, said, json.loads(body))
            for number, kind, place, item_id, said, body in rows
        ]

    # What came of it.

    def find(self, kind: Kind, named: Named) -> None:
        """Something that is not a row of the bill, or is one besides."""
        row = (named.prediction_id, named.destination, named.item_id, named.model, named.cost_usd, named.said)
        self._db.execute("INSERT INTO found VALUES (?, ?, ?, ?, ?, ?, ?)", (kind.value, *row))

    def sums(self) -> tuple[int, float, int]:
        """How many executions, what they cost, and how many have no cost yet."""
        unsettled_rows = "total(status = ? AND cost_usd = 0 AND coalesce(rank, ?) != ?)"
        given = (PredictionStatus.SUCCEEDED.value, FOREIGN, _RANKS[Kind.ENDED])
        count, usd, unsettled = self._db.execute(
            f"SELECT count(*), total(cost_usd), {unsettled_rows} FROM bill", given
        ).fetchone()
        return count, money(usd), int(unsettled)

    def finding(self, kind: Kind) -> Finding:
        """All of a kind, the first 10,000 by name."""
        key: tuple[object, ...]
        if kind in _RANKS:
            where, key = "bill WHERE coalesce(rank, ?) = ?", (FOREIGN, _RANKS[kind])
            columns = "id, item_id, destination, model, created_at, cost_usd, said FROM"
            order = " ORDER BY created_at, id LIMIT ?"
        else:
            where, key = "found WHERE kind = ?", (kind.value,)
            columns = "prediction_id, item_id, destination, model, NULL, cost_usd, said FROM"
            order = " ORDER BY destination, item_id, prediction_id LIMIT ?"
        count, usd = self._db.execute(f"SELECT count(*), total(cost_usd) FROM {where}", key).fetchone()
        named: list[Named] = []
        if kind not in (Kind.STORED, Kind.ENDED):
            rows = self._db.execute(f"SELECT {columns} {where}{order}", (*key, MOST_NAMED))
            named = [Named(*row) for row in rows]
        return Finding(count, money(usd), named)

    def spent_by(self, what: str) -> list[Spent]:
        """What the account spent by `day`, `model` or `destination`: days in order, others the dearest first."""
        names: Mapping[str, str] = {
            "day": "coalesce(substr(created_at, 1, 10), 'no date')",
            "model": "coalesce(model, 'no model')",
            "destination": f"coalesce(destination, '{ELSEWHERE}')",
        }
        query = (
            f"SELECT {names[what]} AS name, total(cost_usd) AS usd, total(pictures) FROM bill WHERE cost_usd > 0 "
            f"GROUP BY name ORDER BY {'name' if what == 'day' else 'usd DESC, name'}"
        )
        return [Spent(name, money(usd), int(pictures)) for name, usd, pictures in self._db.execute(query)]

    def dearest(self, most: int) -> list[Dear]:
        """The stored pictures that cost most."""
        query = (
            "SELECT cost_usd, uri, item_id, coalesce(model, ''), coalesce(substr(created_at, 1, 10), ''), id FROM bill "
            "WHERE rank = ? AND cost_usd > 0 ORDER BY cost_usd DESC, created_at, id LIMIT ?"
        )
        return [Dear(*row) for row in self._db.execute(query, (_RANKS[Kind.STORED], most))]


def as_text(moment: datetime) -> str:
    """A date that sorts as text."""
    return moment.astimezone(timezone.utc).isoformat(timespec="milliseconds")
