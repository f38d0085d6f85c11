"""What a prediction has cost, told after its record was closed: written into the record, here alone."""

from __future__ import annotations

from prefect_eachlabs.ledger.records import Ledger, RecordChanged, RecordState, VersionedRecord, amended

CLOSED = (RecordState.STORED, RecordState.FAILED, RecordState.CANCELLED)
LEAST_DIFFERENCE_USD = 1e-9
"""Sums of floating-point dollars are off by this much."""


def lacks_cost(held: VersionedRecord, cost_usd: float | None) -> bool:
    """Whether a closed record says otherwise than the vendor, who tells 0 until a cost is settled."""
    if not cost_usd or held.record.state not in CLOSED:
        return False
    return abs((held.record.cost_usd or 0.0) - cost_usd) > LEAST_DIFFERENCE_USD


async def correct_cost(
    ledger: Ledger, held: VersionedRecord, prediction_id: str, cost_usd: float | None
) -> VersionedRecord | None:
    """Writes what the vendor says a prediction has cost into the record that names it. Free: one conditional put.

    Args:
        ledger: Where the record is.
        held: The record, as it was read.
        prediction_id: What the cost is of.
        cost_usd: What the vendor says; 0 and None mean that it is not settled, and change nothing.

    Returns:
        The record as it is now; None when there was nothing to correct: it says so already, it is not closed (whoever
        closes it writes the cost), or it names another prediction by now.

    Raises:
        StoreFailed, SetupError: The bucket did not take it.
    """
    while held.record.prediction_id == prediction_id and lacks_cost(held, cost_usd):
        try:
            return await ledger.write(amended(held.record, cost_usd=cost_usd), replacing=held)
        except RecordChanged as changed:
            if changed.current is None:
                return None
            held = changed.current
    return None
