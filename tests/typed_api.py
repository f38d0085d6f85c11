"""Every public name as users' code has it: checked by mypy (`make check`), never run.

What stands in `assert_type` is what an editor shows and a user's own type checker relies on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow
from prefect.futures import PrefectFuture, PrefectFutureList
from typing_extensions import assert_type

import prefect_eachlabs
from prefect_eachlabs import (
    EachlabsCredentials,
    EachlabsError,
    Prediction,
    PredictionStatus,
    S3Destination,
    StoredImage,
    aawait_result,
    acancel_prediction,
    acreate_prediction,
    agenerate_and_store,
    agenerate_rows,
    astore_image,
    await_result,
    cancel_prediction,
    create_prediction,
    errors,
    generate_and_store,
    generate_rows,
    store_image,
)
from prefect_eachlabs.batch.outcomes import BatchResult
from prefect_eachlabs.flows import (
    aaudit_bill,
    agenerate_batch,
    agenerate_image,
    ascheduled_image,
    asettle_leftovers,
    audit_bill,
    generate_batch,
    generate_image,
    scheduled_image,
    settle_leftovers,
)
from prefect_eachlabs.testing import EmulatorOptions, EmulatorServer, LocalS3

PLACE = "s3://acme/daily"


@flow
def step_by_step(prompt: str, place: S3Destination, credentials: EachlabsCredentials) -> StoredImage:
    prediction = create_prediction(prompt, destination=place, credentials=credentials, image_url="https://h/fox.jpg")
    assert_type(prediction, Prediction)
    assert_type(prediction.id, str)
    assert_type(prediction.status, PredictionStatus)
    finished = await_result(prediction, deadline_seconds=60.0)
    assert_type(finished, Prediction)
    assert_type(finished.cost_usd, float | None)
    if finished.status is PredictionStatus.CANCELLED:
        assert_type(cancel_prediction(finished), Prediction)
    image = store_image(finished, place, with_artifact=True)
    assert_type(image, StoredImage)
    assert_type((image.uri, image.sha256, image.width_px), tuple[str, str, int | None])
    return image


@flow
def in_the_background(prompts: list[str]) -> list[StoredImage]:
    future = generate_and_store.submit(prompts[0], destination=PLACE, item_id="fox")
    assert_type(future, PrefectFuture[StoredImage])
    futures = generate_and_store.map(prompts, destination=PLACE)
    assert_type(futures, PrefectFutureList[StoredImage])
    batch = generate_rows([{"prompt": prompt} for prompt in prompts], destination=PLACE, budget_usd=5)
    assert_type(batch, BatchResult)
    assert_type([(row.id, row.uri, row.cost_usd) for row in batch], list[tuple[str | None, str | None, float | None]])
    order = create_prediction.submit(prompts[0])
    assert_type(order, PrefectFuture[Prediction])
    return [future.result(), *futures.result()]


@flow
async def awaited(prompt: str) -> None:
    prediction = await acreate_prediction(prompt, destination=PLACE)
    assert_type(prediction, Prediction)
    finished = await aawait_result(prediction)
    assert_type(finished, Prediction)
    assert_type(await acancel_prediction(prediction.id), Prediction)
    assert_type(await astore_image(finished, PLACE), StoredImage)
    assert_type(await agenerate_and_store(prompt, destination=PLACE), StoredImage)
    assert_type(await agenerate_rows([{"prompt": prompt}], destination=PLACE), BatchResult)
    assert_type(await agenerate_image(prompt, PLACE), StoredImage)
    assert_type(await agenerate_batch("s3://acme/in/prompts.csv", PLACE), BatchResult)
    assert_type(await ascheduled_image("a fox on a {date:%A}", PLACE), StoredImage)
    assert_type(await asettle_leftovers(PLACE), dict[str, Any])
    assert_type(await aaudit_bill(PLACE, since="7d"), dict[str, Any])


def flows_within_flows() -> None:
    assert_type(generate_image("a red fox", PLACE), StoredImage)
    assert_type(scheduled_image("a fox on a {date:%A}", PLACE), StoredImage)
    assert_type(generate_batch(Path("prompts.csv"), PLACE, formats=("png", "jpeg")), BatchResult)
    assert_type(settle_leftovers(PLACE), dict[str, Any])
    assert_type(audit_bill(PLACE), dict[str, Any])


def testing() -> None:
    with EmulatorServer(EmulatorOptions(service_seconds=1)) as api, LocalS3(buckets=["acme"]) as s3:
        assert_type((api, s3), tuple[EmulatorServer, LocalS3])


def blocks() -> None:
    assert_type(EachlabsCredentials(api_key="key"), EachlabsCredentials)  # type: ignore[arg-type]  # pydantic takes a str
    assert_type(S3Destination(bucket="acme", prefix="daily"), S3Destination)


def in_the_tree_of_errors(prediction: Prediction) -> None:
    try:
        await_result(prediction)
    except errors.ItemConflict as error:
        wrong: errors.BadInput | ValueError = error
        print(wrong)
    except errors.KeyRefused as error:
        both: errors.Rejected | errors.SetupError = error
        print(both)
    except errors.InsufficientBalance as error:
        paused: errors.Throttled = error
        print(paused.retry_after_seconds)
    except (errors.ContentRefused, errors.OutputMissing) as error:
        failed: errors.PredictionFailed = error
        print(failed.code)
    except errors.FormatNotAllowed as error:
        no_png: errors.NotAPng = error
        print(no_png)
    except errors.HostNotAllowed as error:
        unreached: errors.DownloadFailed = error
        print(unreached.url)
    except (errors.DownloadFailed, errors.StoreFailed, errors.NotAPng) as error:
        not_yet_safe: errors.NotYetSafe = error
        print(not_yet_safe.url)
    except errors.PredictionTimedOut as error:
        late: TimeoutError = error
        print(late)
    except (
        errors.NotSent,
        errors.Unanswered,
        errors.OutcomeUnknown,
        errors.PredictionCancelled,
        errors.PictureMissing,
        errors.Skipped,
    ) as error:
        assert_type(error.retryable, bool)
        assert_type(error.item_id, str | None)
    except EachlabsError as error:
        assert_type(error.message, str)


print(prefect_eachlabs.StoredImage)
