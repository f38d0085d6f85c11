"""Generated pictures in Prefect pipelines: bought once, never in vain, as fast as the account allows.

The names below load on first use, so that `prefect-eachlabs --help` and a worker's start stay quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefect_eachlabs.blocks import EachlabsCredentials, S3Destination
    from prefect_eachlabs.errors import (
        BadInput,
        ContentRefused,
        DownloadFailed,
        EachlabsError,
        FormatNotAllowed,
        HostNotAllowed,
        InsufficientBalance,
        ItemConflict,
        KeyRefused,
        NotAPng,
        NotSent,
        NotYetSafe,
        OutcomeUnknown,
        OutputMissing,
        PictureMissing,
        PredictionCancelled,
        PredictionFailed,
        PredictionTimedOut,
        Rejected,
        SetupError,
        Skipped,
        StoreFailed,
        Throttled,
        Unanswered,
    )
    from prefect_eachlabs.flows.generate_image import generate_image
    from prefect_eachlabs.models import Prediction, PredictionStatus, StoredImage
    from prefect_eachlabs.tasks import (
        aawait_result,
        acancel_prediction,
        acreate_prediction,
        agenerate_and_store,
        astore_image,
        await_result,
        cancel_prediction,
        create_prediction,
        generate_and_store,
        store_image,
    )

_ROOMS = {
    "blocks": ("EachlabsCredentials", "S3Destination"),
    "errors": (
        "BadInput",
        "ContentRefused",
        "DownloadFailed",
        "EachlabsError",
        "FormatNotAllowed",
        "HostNotAllowed",
        "InsufficientBalance",
        "ItemConflict",
        "KeyRefused",
        "NotAPng",
        "NotSent",
        "NotYetSafe",
        "OutcomeUnknown",
        "OutputMissing",
        "PictureMissing",
        "PredictionCancelled",
        "PredictionFailed",
        "PredictionTimedOut",
        "Rejected",
        "SetupError",
        "Skipped",
        "StoreFailed",
        "Throttled",
        "Unanswered",
    ),
    "flows.generate_image": ("generate_image",),
    "models": ("Prediction", "PredictionStatus", "StoredImage"),
    "tasks": (
        "aawait_result",
        "acancel_prediction",
        "acreate_prediction",
        "agenerate_and_store",
        "astore_image",
        "await_result",
        "cancel_prediction",
        "create_prediction",
        "generate_and_store",
        "store_image",
    ),
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = [
    "BadInput",
    "ContentRefused",
    "DownloadFailed",
    "EachlabsCredentials",
    "EachlabsError",
    "FormatNotAllowed",
    "HostNotAllowed",
    "InsufficientBalance",
    "ItemConflict",
    "KeyRefused",
    "NotAPng",
    "NotSent",
    "NotYetSafe",
    "OutcomeUnknown",
    "OutputMissing",
    "PictureMissing",
    "Prediction",
    "PredictionCancelled",
    "PredictionFailed",
    "PredictionStatus",
    "PredictionTimedOut",
    "Rejected",
    "S3Destination",
    "SetupError",
    "Skipped",
    "StoreFailed",
    "StoredImage",
    "Throttled",
    "Unanswered",
    "aawait_result",
    "acancel_prediction",
    "acreate_prediction",
    "agenerate_and_store",
    "astore_image",
    "await_result",
    "cancel_prediction",
    "create_prediction",
    "generate_and_store",
    "generate_image",
    "store_image",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("prefect-eachlabs")
    room = _ROOM_OF.get(name)
    if room is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{room}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
