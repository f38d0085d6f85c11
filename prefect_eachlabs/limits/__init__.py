"""The limits of an account on a Prefect server, shared by all its processes: a `SlotSource` over leased lots.

Without a `PREFECT_API_URL` (the embedded server of a plain script) the machine's processes share them: `machine`.

What is promised, and how:

- Never over: a slot is used under a lease that lasts until it has cooled, so a killed process's slots come back no
  sooner. A lease the server forgot (restarted with leases in memory) is still counted in its database, and here.
- Shared out: every process lists the leases every 4 s and holds no more than its fair share of the slots, so one
  that joins gets its part as the slots of the others cool: within 15 s under steady use. Who was killed has a
  share until its leases end, 75 s later at most.
- The server away: each process goes on with its last known share, at least 1 slot, counting what it used under
  leases. Nobody can do better without asking, and it has two gaps: a process that has never reached the server knows
  of no others and takes the whole limit, and one that starts meanwhile is not known to the others.
- A slot that the server counts as taken though no lease holds it is named in the log within 30 s of waiting.

From the outside in: `shared` (the `SlotSource`), `driver` (makes the calls), `lookout` (what others hold), `plan` (what
to ask next; pure), `pool` and `lot` (what is held; pure), `leases` (HTTP).
"""

from __future__ import annotations

from prefect_eachlabs.limits.shared import SharedLots, lot_source_for

__all__ = ["SharedLots", "lot_source_for"]
