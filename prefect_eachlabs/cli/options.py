"""Flags that several commands have, each declared here alone."""

# ruff: noqa: PLC0415 - what is heavy is imported when a command runs, so that help and refusals answer at once

from __future__ import annotations

import errno
import logging
import math
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from prefect_eachlabs.errors import SetupError

if TYPE_CHECKING:
    from prefect_eachlabs.models import Destination


def flag(text: str, **more: Any) -> Parameter:
    """A flag's help; `more` is what cyclopts' Parameter takes."""
    return Parameter(help=text, **more)


def positive(_: Any, number: object) -> None:
    """A validator: greater than 0, and not without end."""
    if isinstance(number, (int, float)) and not 0 < number < math.inf:
        raise ValueError("It must be greater than 0.")


def a_port(_: Any, number: object) -> None:
    """A validator: what a port can be."""
    if isinstance(number, int) and not 0 <= number <= 65_535:
        raise ValueError("A port is 0 to 65535.")


Port = Annotated[int, Parameter(validator=a_port)]
PositiveNumber = Annotated[float, Parameter(validator=positive)]
Verbose = Annotated[bool, flag("a line a request, on stderr")]
InJson = Annotated[bool, flag("print one JSON object and nothing else on stdout", name="--json")]


@Parameter(name="*")
@dataclass(frozen=True)
class PurchaseFlags:
    """What is bought where, what may be done about an item beyond the first purchase, and for how long."""

    to: Annotated[str | None, flag("s3://bucket/prefix for pictures and records (EACHLABS_DESTINATION)")] = None
    model: Annotated[str | None, flag("the model's slug (gemini)")] = None
    version: Annotated[str | None, flag("the model's version (the default model has its own)")] = None
    formats: Annotated[
        str | None,
        flag("what may be stored, after commas, such as png,jpeg (whatever the model gives)"),
    ] = None
    replace: Annotated[bool, flag("buy although the item id stands for another input")] = False
    rebuy_missing: Annotated[bool, flag("buy again when a stored picture is gone from the bucket")] = False
    retry_failed: Annotated[bool, flag("buy again what failed for good")] = False
    on_ambiguous: Annotated[
        Literal["settle", "fail"],
        flag("after a lost answer: find out what it bought (settle, the default), or report it (fail)"),
    ] = "settle"
    retry_ambiguous: Annotated[
        bool, flag("you have looked in the vendor's dashboard: what stands as ambiguous was not bought; buy it once")
    ] = False
    deadline_seconds: Annotated[
        PositiveNumber | None,
        flag("from the POST until an unfinished prediction counts as timed out (EACHLABS_DEADLINE_SECONDS, 300)"),
    ] = None
    in_json: InJson = False

    def options(self) -> dict[str, Any]:
        """What `PurchaseOptions` and `BatchOptions` both take."""
        from prefect_eachlabs.images.formats import check_formats

        names = ("replace", "rebuy_missing", "retry_failed", "on_ambiguous", "retry_ambiguous", "deadline_seconds")
        return {"formats": check_formats(self.formats), **{name: getattr(self, name) for name in names}}


NONE_GIVEN = PurchaseFlags()


def destination_of(text: str | None) -> Destination:
    """The destination that was named, or the environment's. Raises SetupError where neither says so."""
    from prefect_eachlabs.models import Destination
    from prefect_eachlabs.settings import destination_from_environment

    return Destination.parse(text or destination_from_environment())


def cannot_listen(error: OSError, port: int, host: str | None = None) -> SetupError:
    """Why nothing can listen there, in a line; `host` where the command has a flag for it."""
    if error.errno == errno.EADDRINUSE:
        return SetupError(f"Port {port} is taken: choose another with --port.")
    place, flags = (f"{host}:{port}", "--port or --host") if host else (f"port {port}", "--port")
    return SetupError(f"Cannot listen on {place} ({error.strerror or error}): choose another {flags}.")


def log_requests(name: str) -> None:
    """Shows what a stand-in logs, a line a request: for `--verbose`."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger = logging.getLogger(name)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
