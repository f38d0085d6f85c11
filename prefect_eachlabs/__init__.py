"""Generated pictures in Prefect pipelines: bought once, never in vain, as fast as the account allows.

Public beside these: `prefect_eachlabs.errors`, `prefect_eachlabs.flows` and `prefect_eachlabs.testing`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefect_eachlabs._late import late

if TYPE_CHECKING:  # what an editor and a type checker see of the map below
    from prefect_eachlabs.blocks import EachlabsCredentials as EachlabsCredentials
    from prefect_eachlabs.blocks import S3Destination as S3Destination
    from prefect_eachlabs.errors import EachlabsError as EachlabsError
    from prefect_eachlabs.models import Prediction as Prediction
    from prefect_eachlabs.models import PredictionStatus as PredictionStatus
    from prefect_eachlabs.models import StoredImage as StoredImage
    from prefect_eachlabs.rows import agenerate_rows as agenerate_rows
    from prefect_eachlabs.rows import generate_rows as generate_rows
    from prefect_eachlabs.tasks import aawait_result as aawait_result
    from prefect_eachlabs.tasks import acancel_prediction as acancel_prediction
    from prefect_eachlabs.tasks import acreate_prediction as acreate_prediction
    from prefect_eachlabs.tasks import agenerate_and_store as agenerate_and_store
    from prefect_eachlabs.tasks import astore_image as astore_image
    from prefect_eachlabs.tasks import await_result as await_result
    from prefect_eachlabs.tasks import cancel_prediction as cancel_prediction
    from prefect_eachlabs.tasks import create_prediction as create_prediction
    from prefect_eachlabs.tasks import generate_and_store as generate_and_store
    from prefect_eachlabs.tasks import store_image as store_image
else:
    __all__, __getattr__, __dir__ = late(
        __name__,
        {
            "blocks": "EachlabsCredentials S3Destination",
            "errors": "EachlabsError",
            "models": "Prediction PredictionStatus StoredImage",
            "rows": "generate_rows agenerate_rows",
            "tasks": "create_prediction await_result cancel_prediction store_image generate_and_store "
            "acreate_prediction aawait_result acancel_prediction astore_image agenerate_and_store",
        },
    )
