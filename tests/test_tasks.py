"""The tasks as people call them: from sync and async flows, repeated, failing, cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import State
from prefect.client.schemas.sorting import FlowRunSort
from prefect.states import Failed

from prefect_eachlabs import (
    Prediction,
    PredictionStatus,
    StoredImage,
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
from prefect_eachlabs.errors import BadInput, OutcomeUnknown, PredictionFailed, SetupError, Throttled
from prefect_eachlabs.flows import generate_image
from prefect_eachlabs.tasks import may_be_repeated
from tests.flows.flow_fixtures import Studio

TASKS = [
    *(create_prediction, await_result, cancel_prediction, store_image, generate_and_store),
    *(acreate_prediction, aawait_result, acancel_prediction, astore_image, agenerate_and_store),
]

pytestmark = pytest.mark.usefixtures("prefect_server")


def failed(error: BaseException) -> State[Any]:
    return Failed(data=error)


def test_a_prompt_becomes_a_picture_in_three_task_runs_that_are_named_for_the_item(studio: Studio) -> None:
    """create, await, store: one purchase, one picture."""
    image = generate_image("a red fox", studio.destination, item_id="fox-1")
    assert isinstance(image, StoredImage)
    assert (image.uri, image.width_px, image.height_px) == (f"{studio.destination}/images/fox-1.png", 64, 64)
    assert studio.billed == 1
    assert studio.keys() == ["fox-1.png"]
    assert studio.keys("records/") == ["fox-1.json"]
    with get_client(sync_client=True) as client:
        newest = client.read_flow_runs(limit=1, sort=FlowRunSort.EXPECTED_START_TIME_DESC)[0]
        runs = FlowRunFilter(id=FlowRunFilterId(any_=[newest.id]))
        for _ in range(100):
            names = {run.name for run in client.read_task_runs(flow_run_filter=runs)}
            if len(names) == 3:
                break
    assert names == {"create fox-1", "await fox-1", "store fox-1"}


def test_sync_tasks_go_through_direct_calls_submit_and_map(studio: Studio) -> None:
    """From a sync flow, all three ways, the composite and the steps."""

    @flow
    def pictures() -> list[StoredImage]:
        direct = generate_and_store("direct", destination=studio.destination)
        submitted = generate_and_store.submit("submitted", destination=studio.destination)
        predictions = create_prediction.map(["mapped 1", "mapped 2"], destination=studio.destination)
        finished = await_result.map(predictions)
        stored = store_image.map(finished, destination=studio.destination)
        return [direct, submitted.result(), *stored.result()]

    images = pictures()
    assert len({image.uri for image in images}) == 4
    assert studio.billed == 4
    assert len(studio.keys()) == 4


def test_async_tasks_are_awaited_and_sync_ones_submitted_from_an_async_flow(studio: Studio) -> None:
    @flow
    async def pictures() -> list[StoredImage]:
        prediction = await acreate_prediction("step by step", destination=studio.destination)
        finished = await aawait_result(prediction)
        stored = await astore_image(finished, studio.destination)
        gathered = await asyncio.gather(
            *(agenerate_and_store(f"gathered {n}", destination=studio.destination) for n in range(2))
        )
        submitted = generate_and_store.submit("submitted", destination=studio.destination)
        return [stored, *gathered, submitted.result()]

    images = asyncio.run(pictures())
    assert len({image.uri for image in images}) == 4
    assert studio.billed == 4


def test_a_flow_retry_does_not_create_a_second_prediction(studio: Studio) -> None:
    """Nor in a subflow; and equal prompts are one item, bought once."""
    attempts: list[list[str]] = []

    @flow
    def inner() -> str:
        return create_prediction("nested", destination=studio.destination).id

    @flow(retries=1)
    def outer() -> None:
        direct = [create_prediction("the same", destination=studio.destination).id for _ in range(2)]
        mapped = create_prediction.map(["other", "other"], destination=studio.destination)
        attempts.append([inner(), *direct, *(future.result().id for future in mapped)])
        if len(attempts) == 1:
            raise RuntimeError("after the purchases")

    outer()
    assert attempts[0] == attempts[1]
    assert len(set(attempts[0])) == 3
    assert studio.billed == 3


def test_a_retried_flow_finds_what_a_lost_answer_bought(studio: Studio) -> None:
    """The answer is lost, the task fails, Prefect repeats the flow: the record leads to what the order bought."""
    studio.api.set_faults("create:lost_answer,next=1")

    @flow(retries=2)
    def careful() -> StoredImage:
        prediction = create_prediction("once", destination=studio.destination, on_ambiguous="fail")
        return store_image(await_result(prediction))

    assert careful().uri.startswith(f"{studio.destination}/images/")
    assert studio.billed == 1


@pytest.mark.parametrize(
    "buy",
    [
        lambda: create_prediction.fn("a fox"),
        lambda: generate_and_store.fn("a fox"),
        lambda: asyncio.run(acreate_prediction.fn("a fox")),
        lambda: asyncio.run(agenerate_and_store.fn("a fox")),
        lambda: generate_image("a fox"),
    ],
    ids=["create", "generate", "acreate", "agenerate", "flow"],
)
def test_nothing_is_bought_without_a_record(studio: Studio, buy: Callable[[], object]) -> None:
    """No destination anywhere: one sentence that says where to put one, and no request."""
    with pytest.raises(SetupError, match=r"No destination: .*EACHLABS_DESTINATION.*Nothing was bought\."):
        buy()
    assert studio.api.tallies()["requests"] == 0


def test_the_environments_destination_is_for_calls_that_name_none(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EACHLABS_DESTINATION", studio.destination)

    @flow
    def pictures() -> list[StoredImage]:
        steps = store_image(await_result(create_prediction("step by step", item_id="steps")))
        elsewhere = generate_and_store("at once", item_id="named", destination=f"{studio.destination}/named")
        return [steps, generate_and_store("at once", item_id="at-once"), elsewhere]

    prefix = studio.destination
    assert [image.uri for image in pictures()] == [
        f"{prefix}/images/steps.png",
        f"{prefix}/images/at-once.png",
        f"{prefix}/named/images/named.png",
    ]


def test_what_another_tool_ordered_is_stored_under_a_record_of_its_own(studio: Studio) -> None:
    """By its id alone; storing it again finds the record."""
    order = {"model": "gemini", "version": "2.0-flash-exp-image-generation", "input": {"prompt": "an old order"}}
    key = {"X-API-Key": "a-key-of-tests"}
    answer = httpx.post(f"{studio.api.url}/v1/prediction/", json=order, headers=key).json()

    @flow
    def rescue() -> StoredImage:
        return store_image(await_result(answer["predictionID"]), studio.destination)

    first = rescue()
    again = store_image.fn(await_result.fn(answer["predictionID"]), studio.destination)
    assert first.uri == f"{studio.destination}/images/{answer['predictionID']}.png"
    assert (again.uri, again.reused) == (first.uri, True)
    assert studio.keys("records/") == [f"{answer['predictionID']}.json"]
    assert first.prompt == "an old order"
    assert studio.billed == 1


def test_cancelling_asks_the_api_and_tells_the_truth(studio: Studio) -> None:
    studio.api.set_faults("prediction:slow,seconds=30")

    @flow
    def change_of_mind() -> Prediction:
        return cancel_prediction(create_prediction("never mind", destination=studio.destination))

    assert change_of_mind().status is PredictionStatus.CANCELLED
    assert studio.api.tallies()["cancelled"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": ""}, "prompt: empty or blank"),
        ({"prompt": "x", "image_url": "ftp://example.com/a.png"}, "image_url: .* not an http"),
        ({"prompt": "x", "destination": "bucket/prefix"}, "must be s3://BUCKET"),
    ],
)
def test_bad_input_is_refused_before_anything_is_bought(
    studio: Studio, arguments: dict[str, Any], message: str
) -> None:
    given = {"destination": studio.destination, **arguments}
    with pytest.raises(BadInput, match=message):
        generate_and_store.fn(**given)
    assert studio.api.tallies()["requests"] == 0


def test_a_failed_prediction_fails_the_flow_and_stays_failed_until_asked(studio: Studio) -> None:
    studio.api.set_faults("prediction:fail,value=INVALID_INPUT,next=1")
    with pytest.raises(PredictionFailed):
        generate_image("a fox", studio.destination, item_id="fox")
    given: dict[str, Any] = {"destination": studio.destination, "item_id": "fox"}
    with pytest.raises(PredictionFailed, match="only when asked"):
        generate_and_store.fn("a fox", **given)
    assert studio.billed == 1
    again = generate_and_store.fn("a fox", **given, retry_failed=True)
    assert again.uri.endswith("/images/fox.png")


@pytest.mark.parametrize(
    ("error", "repeated"), [(Throttled("x"), True), (OutcomeUnknown("x"), False), (ValueError("x"), False)]
)
def test_whether_to_repeat_is_a_fact_of_the_errors_class(error: Exception, repeated: bool) -> None:
    assert may_be_repeated(None, None, failed(error)) is repeated  # type: ignore[arg-type]  # it looks at the state alone


def test_every_task_carries_its_tags_and_the_one_retry_rule() -> None:
    for each in TASKS:
        assert "eachlabs" in each.tags
        assert len(each.tags) == 2
        assert each.retry_condition_fn is may_be_repeated
        assert each.timeout_seconds is None, "it cannot end what runs in the gateway"
