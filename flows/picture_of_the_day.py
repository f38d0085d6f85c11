"""A picture each day, in three task runs that the Prefect UI shows: bought, awaited, stored.

    python flows/picture_of_the_day.py s3://acme/daily                   # once
    prefect deploy flows/picture_of_the_day.py:picture_of_the_day ...    # on a schedule

The item is named for the day, so a run that is retried, repeated or killed buys one picture a day.
"""

from __future__ import annotations

import sys
from datetime import datetime, timezone

from prefect import flow

from prefect_eachlabs import await_result, create_prediction, store_image


@flow
def picture_of_the_day(destination: str, subject: str = "a lighthouse") -> str:
    """Today's picture. **Costs money** once a day.

    Args:
        destination: Where it goes: s3://bucket/prefix.
        subject: What it shows.
    """
    today = datetime.now(timezone.utc)
    prediction = create_prediction(
        f"{subject} on a {today:%A} in {today:%B}, watercolour", destination=destination, item_id=f"{today:%Y-%m-%d}"
    )
    finished = await_result(prediction)
    return store_image(finished, destination, with_artifact=True).uri


if __name__ == "__main__":
    print(picture_of_the_day(*sys.argv[1:]))
