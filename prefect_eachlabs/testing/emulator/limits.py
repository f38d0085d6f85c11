"""429 as documented, with or without `Retry-After`."""

from __future__ import annotations

import math
from datetime import timedelta
from email.utils import format_datetime

from starlette.responses import Response

from prefect_eachlabs.testing.emulator.core import Emulator
from prefect_eachlabs.testing.emulator.responses import error

_MAX_WAIT_SECONDS = 3_600.0


def throttled(details: str, *, emulator: Emulator, wait_seconds: float) -> Response:
    """The body names the cap; `Retry-After` says when to come again, if the options want it said."""
    options = emulator.options
    wait = math.ceil(min(max(wait_seconds, 1.0), _MAX_WAIT_SECONDS))
    headers: dict[str, str] = {}
    if options.retry_after == "seconds":
        headers["retry-after"] = str(wait)
    elif options.retry_after == "date":
        # A date is compared with the reader's own clock: the true one, whatever the emulator's skew.
        now = emulator.calendar.true_date(emulator.clock.now())
        headers["retry-after"] = format_datetime(now + timedelta(seconds=wait), usegmt=True)
    return error(429, "Too many requests", details, headers)
