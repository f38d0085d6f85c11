"""The tasks: create, await, cancel, store, and the composite; each written once, as a plan, with a sync and an async
form.

Retries are Prefect's, by one rule: the error's class says whether to repeat. No task sets `timeout_seconds`, which
cannot end what runs in the gateway; deadlines count from the POST. No task calls a task.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Literal, ParamSpec, TypeVar
from uuid import uuid4

from prefect import Task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.context import FlowRunContext, TaskRunContext
from prefect.exceptions import MissingContextError
from prefect.logging import get_run_logger

from prefect_eachlabs import events
from prefect_eachlabs.artifacts import show_picture
from prefect_eachlabs.blocks import EachlabsCredentials, S3Destination, gateway_of, where
from prefect_eachlabs.engine.runtime import Gateway
from prefect_eachlabs.engine.sync_async import Plan, alone, async_wrapper, beside_the_loop, on_the_loop, sync_wrapper
from prefect_eachlabs.errors import BadInput, EachlabsError
from prefect_eachlabs.images.formats import check_formats
from prefect_eachlabs.ledger.rules import PurchaseOptions
from prefect_eachlabs.models import DEFAULT_MODEL, Destination, Item, Prediction, StoredImage, parse_prediction_id
from prefect_eachlabs.net.redaction import visible
from prefect_eachlabs.reference_images import Picture, Roots, names_in, opened
from prefect_eachlabs.storage.s3_client import S3Access

logger = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")

Credentials = EachlabsCredentials | str | None
Target = S3Destination | str
Reference = str | bytes | os.PathLike[str] | Picture
OnAmbiguous = Literal["settle", "fail"]

RETRY_DELAYS_SECONDS = [2, 10, 30]


def may_be_repeated(task: Any, task_run: TaskRun, state: State[Any]) -> bool:
    """Whether Prefect may run a task again: a fact of the error's class.

    A plain function: Prefect drops a callable object, a method or a partial as `retry_condition_fn` without a word.
    """
    error = state.data
    return isinstance(error, EachlabsError) and error.retryable


def shortened(text: str, most: int = 48) -> str:
    """One line of at most so many characters; it names runs, and Prefect logs those names."""
    line = visible(" ".join(text.split()))
    return line if len(line) <= most else line[: most - 1] + "…"


def _named(verb: str) -> Callable[[dict[str, Any]], str]:
    """Names a task run for its item, so that a person finds it in the UI."""

    def run_name(parameters: dict[str, Any]) -> str:
        about = parameters.get("prediction") or parameters.get("finished")
        if isinstance(about, Prediction):
            return f"{verb} {shortened(about.item_id or about.id)}"
        about = parameters.get("item_id") or about or parameters.get("prompt") or parameters.get("model")
        return f"{verb} {shortened(str(about))}"

    return run_name


def run_id() -> str:
    """Who owns claims: the flow run, so that whoever cancels it knows which predictions are its own."""
    flow_context = FlowRunContext.get()
    task_context = TaskRunContext.get()
    if task_context is not None and task_context.task_run.flow_run_id is not None:
        return str(task_context.task_run.flow_run_id)
    if flow_context is not None and flow_context.flow_run is not None:
        return str(flow_context.flow_run.id)
    return str(task_context.task_run.id) if task_context is not None else uuid4().hex


_ALIKE: dict[str, Any] = {
    "retries": len(RETRY_DELAYS_SECONDS),
    "retry_delay_seconds": RETRY_DELAYS_SECONDS,
    "retry_jitter_factor": 0.5,
    "retry_condition_fn": may_be_repeated,
    # The record in the bucket knows what was bought, on every machine: no result storage and no cache is asked. Nor
    # are results kept where that is the default: those of predictions hold URLs, which may be signed.
    "persist_result": False,
    "cache_policy": NO_CACHE,
    # For who keeps them nevertheless: Prefect's own choice is pickle, which runs whatever was written there.
    "result_serializer": "json",
}
TAGS: set[str] = set()
"""Of all tasks: what an operator may limit."""


def _raised(error: EachlabsError) -> None:
    raise alone(error) from None


def sync_task(
    name: str, verb: str, kind: type[Task[Any, Any]] = Task, **unlike: Any
) -> Callable[[Callable[P, Plan[T]]], Task[P, T]]:
    """Makes a plan the task of that name, in its sync form, which blocks."""
    facts = {"tags": {"eachlabs", f"eachlabs-{verb}"}, "task_run_name": _named(verb), **_ALIKE, **unlike}
    TAGS.update(facts["tags"])
    return lambda plan: kind(sync_wrapper(plan, _raised), name=name, **facts)


def async_task(blocking: Task[P, T]) -> Task[P, Coroutine[Any, Any, T]]:
    """The same task in its async form, to be awaited."""
    kind: type[Task[Any, Any]] = type(blocking)
    facts = {fact: getattr(blocking, fact) for fact in ("name", "tags", "task_run_name", *_ALIKE)}
    return kind(async_wrapper(blocking.fn, _raised), **facts)


def _item(prompt: str | None, *, image_url: object, **wanted: Any) -> Plan[Item]:
    if image_url is not None and not (isinstance(image_url, str) and "://" in image_url):
        image_url = yield from beside_the_loop(lambda: opened(image_url, Roots.from_environment()))
    return Item.wanted(prompt, image_url=image_url, **wanted)


@sync_task("create-prediction", "create")
def create_prediction(
    prompt: str | None = None,
    *,
    image_url: Reference | None = None,
    model: str = DEFAULT_MODEL,
    version: str | None = None,
    item_id: str | None = None,
    input: Mapping[str, Any] | None = None,
    sample: int | None = None,
    formats: Sequence[str] | None = None,
    destination: Target | None = None,
    credentials: Credentials = None,
    replace: bool = False,
    rebuy_missing: bool = False,
    retry_failed: bool = False,
    retry_ambiguous: bool = False,
    on_ambiguous: OnAmbiguous = "settle",
) -> Plan[Prediction]:
    """Buys one prediction. **Each call costs money**, unless it finds what was bought before.

    The purchase goes under a record in the destination's bucket: a retry of the task or the flow, and the same call
    on another day or machine, finds what was bought.

    Args:
        prompt: What the picture shows.
        image_url: A reference picture: its public http(s) URL, `s3://bucket/key`, its bytes, or a file in a folder
            that EACHLABS_REFERENCE_ROOTS names. It goes into the field that the model has for it.
        model: The model's slug (the page of the first model: `gemini`).
        version: The model's version; the first model's own when left out.
        item_id: Names the item, 1 to 128 of `A-Z a-z 0-9 _ -`; the input's fingerprint when left out.
        input: Further fields of the model's input; `prefect-eachlabs models SLUG` shows what it takes.
        sample: The number of this one among several of the same input: 2, 3 ... are items of their own.
        formats: What may be stored of it, such as `("png", "jpeg")`; what else comes is refused. Left out: whatever
            the model gives. Pictures are verified; audio, video, 3D and text are stored as they came.
            Kept in the record.
        destination: `s3://bucket/prefix` or an `S3Destination` block: where the record goes, and later the picture;
            the environment's EACHLABS_DESTINATION when left out.
        credentials: An `EachlabsCredentials` block or its name; the environment's account when left out.
        replace: Buy although the item id stands for another input.
        rebuy_missing: Buy again when the stored picture is gone from the bucket.
        retry_failed: Buy again what failed for good.
        retry_ambiguous: Somebody has looked in the vendor's dashboard, and it was not bought: buy what stands as
            ambiguous, once. The record keeps that this was said.
        on_ambiguous: After a lost answer `settle` (find out what it bought) or `fail` (report it).

    Returns:
        The prediction, not finished yet; with a record that says `stored`, finished.

    Raises:
        BadInput, SetupError: Refused before anything was bought; SetupError also when no destination is named.
        NotSent, Throttled, InsufficientBalance, Rejected: The API did not take it; nothing was bought.
        OutcomeUnknown: It may have been bought; it is never repeated blindly.

    Example:
        ```python
        prediction = create_prediction("a red fox in the snow", destination="s3://acme/daily")
        ```
    """
    options = PurchaseOptions(
        run_id=run_id(),
        replace=replace,
        rebuy_missing=rebuy_missing,
        retry_failed=retry_failed,
        retry_ambiguous=retry_ambiguous,
        on_ambiguous=on_ambiguous,
        formats=check_formats(formats),
    )
    item = yield from _item(
        prompt, image_url=image_url, model=model, version=version, item_id=item_id, input=input, sample=sample
    )
    place, access = where(destination)
    gateway = gateway_of(credentials)
    prediction = yield from on_the_loop(gateway, gateway.engine.create(item, place, options=options, access=access))
    return _told("created", prediction)


acreate_prediction = async_task(create_prediction)
"""`create_prediction` for async flows: awaited. **Each call costs money**, under the same rules."""


def _told(what: str, prediction: Prediction) -> Prediction:
    """The one line that a person finds in the run's log."""
    cost = f", {prediction.cost_usd:.4f} USD" if prediction.cost_usd else ""
    item = f" for item {prediction.item_id}" if prediction.item_id else ""
    log(f"Prediction {prediction.id}{item} {what}{cost}.")
    return prediction


def log(message: str) -> None:
    """A line in the run's log, or in this module's where nothing runs."""
    try:
        get_run_logger().info(message)
    except MissingContextError:
        logger.info(message)


@sync_task("await-result", "await")
def await_result(
    prediction: Prediction | str, *, deadline_seconds: float | None = None, credentials: Credentials = None
) -> Plan[Prediction]:
    """Waits for a prediction's end. Free; asks as seldom as the account's limits make necessary.

    Args:
        prediction: What `create_prediction` returned, or a prediction's id.
        deadline_seconds: From the POST (from now, for a bare id); the account's (300) when left out.
        credentials: As for `create_prediction`.

    Returns:
        The prediction with its pictures' URLs, which last 24 hours: store them at once.

    Raises:
        PredictionFailed: The model failed; the API's code and message are kept. Nothing was billed.
        PredictionCancelled: It was cancelled.
        NotYetSafe: It succeeded and has no picture yet, which may still come: run again.
        PredictionTimedOut: Not ended by its deadline. It is paid for if it still ends: run again, it is stored then.
    """
    _id_of(prediction)
    if deadline_seconds is not None and not deadline_seconds > 0:
        raise BadInput(f"deadline_seconds: {deadline_seconds} must be greater than 0.")
    gateway = gateway_of(credentials)
    waiting = gateway.engine.wait(prediction, deadline_seconds=deadline_seconds, run_id=run_id())
    end = yield from on_the_loop(gateway, waiting)
    return _told("finished", end)


aawait_result = async_task(await_result)
"""`await_result` for async flows: awaited. Free."""


def _id_of(prediction: Prediction | str) -> str:
    found = prediction.id if isinstance(prediction, Prediction) else parse_prediction_id(prediction)
    if found is None:
        raise BadInput("prediction: must be a Prediction or its id, as create_prediction returned it.")
    return found


@sync_task("cancel-prediction", "cancel")
def cancel_prediction(prediction: Prediction | str, *, credentials: Credentials = None) -> Plan[Prediction]:
    """Asks the API to cancel, and looks again: best effort, it may still succeed. Free; a cancelled one costs nothing.

    Args:
        prediction: What `create_prediction` returned, or a prediction's id.
        credentials: As for `create_prediction`.

    Returns:
        The prediction as it stands then: `cancelled`, or `succeeded` when it was too late.

    Raises:
        Rejected: The API does not know it.
        Unanswered: The API gave no readable answer.
    """
    gateway = gateway_of(credentials)
    return _told("asked to cancel", (yield from on_the_loop(gateway, gateway.engine.cancel(_id_of(prediction)))))


acancel_prediction = async_task(cancel_prediction)
"""`cancel_prediction` for async flows: awaited. Free."""


@sync_task("store-image", "store")
def store_image(
    finished: Prediction,
    destination: Target | None = None,
    *,
    credentials: Credentials = None,
    formats: Sequence[str] | None = None,
    with_artifact: bool = False,
) -> Plan[StoredImage]:
    """Downloads a finished prediction's picture, verifies it and uploads it, its bytes unchanged. Free.

    A prediction that has no record there (ordered by another tool, or for another destination) gets one, so that
    storing it again finds it: under its item's id, or its own.

    Args:
        finished: What `await_result` returned.
        destination: `s3://bucket/prefix` or an `S3Destination` block; the key is `PREFIX/images/ITEM_ID.png`. When
            left out: where the prediction was bought, else the environment's EACHLABS_DESTINATION.
        credentials: As for `create_prediction`.
        formats: What may be stored, as for `create_prediction`; what its record says when left out. Several outputs
            are several files, `ITEM_ID.2.png` and so on.
        with_artifact: Show it in the Prefect UI: a thumbnail, its cost, its place. Reads it from the bucket once.

    Returns:
        Where it is, its SHA-256 and its size.

    Raises:
        NotAPng, DownloadFailed, StoreFailed: It is paid for and not yet safe: run again, the error keeps id and URL.
        FormatNotAllowed: It is of another format than `formats` allows.
        ItemConflict: The destination has a record of this item that names another prediction.
        BadInput, SetupError: The prediction has not ended, or there is no destination.
    """
    allowed = check_formats(formats)
    gateway = gateway_of(credentials)
    bought = gateway.engine.account.bought_here(finished.id)
    if destination is None and bought is not None:  # there, by the way in that it was bought by
        place, access = bought.ledger.destination, bought.ledger.access
    else:
        place, access = where(finished.destination if destination is None else destination)
    image = yield from on_the_loop(gateway, gateway.engine.store(finished, place, access=access, formats=allowed))
    return (yield from _stored(gateway, image, place, access, finished.input, with_artifact=with_artifact))


astore_image = async_task(store_image)
"""`store_image` for async flows: awaited. Free."""


def _stored(
    gateway: Gateway,
    image: StoredImage,
    place: Destination,
    access: S3Access | None,
    input: Mapping[str, Any] | None,
    *,
    with_artifact: bool,
) -> Plan[StoredImage]:
    """What the run's log, its artifact and an event say of the picture, its cost among it."""
    image = yield from on_the_loop(gateway, gateway.engine.with_cost(image, place, access=access))
    verb = "was bought earlier" if image.reused else "is stored"
    log(f"Item {image.item_id} {verb}: {image.uri} ({image.size}).")
    if with_artifact:
        yield from show_picture(gateway, image, place, access)
    events.picture_stored(image, names_in(input or {}))
    return image


@sync_task("generate-and-store", "generate")
def generate_and_store(
    prompt: str | None = None,
    *,
    destination: Target | None = None,
    image_url: Reference | None = None,
    model: str = DEFAULT_MODEL,
    version: str | None = None,
    item_id: str | None = None,
    input: Mapping[str, Any] | None = None,
    sample: int | None = None,
    formats: Sequence[str] | None = None,
    credentials: Credentials = None,
    deadline_seconds: float | None = None,
    replace: bool = False,
    rebuy_missing: bool = False,
    retry_failed: bool = False,
    retry_ambiguous: bool = False,
    on_ambiguous: OnAmbiguous = "settle",
    with_artifact: bool = False,
) -> Plan[StoredImage]:
    """From a prompt to its picture in the bucket, bought once: kill it and repeat it at will. **Costs money** once.

    Args:
        prompt: What the picture shows.
        destination: `s3://bucket/prefix` or an `S3Destination` block: picture and record go there; the environment's
            EACHLABS_DESTINATION when left out.
        image_url, model, version, item_id, input, sample, formats, credentials: As for `create_prediction`.
        deadline_seconds: From the POST; the account's (300) when left out.
        replace, rebuy_missing, retry_failed, retry_ambiguous, on_ambiguous: As for `create_prediction`.
        with_artifact: Show it in the Prefect UI, as `store_image` does.

    Returns:
        Where the picture is; `reused` when nothing had to be bought.

    Raises:
        EachlabsError: As `create_prediction`, `await_result` and `store_image` raise them.

    Example:
        ```python
        generate_and_store("a red fox in the snow", destination="s3://acme/daily", item_id="2026-11-22")
        ```
    """
    options = PurchaseOptions(
        run_id=run_id(),
        replace=replace,
        rebuy_missing=rebuy_missing,
        retry_failed=retry_failed,
        retry_ambiguous=retry_ambiguous,
        on_ambiguous=on_ambiguous,
        deadline_seconds=deadline_seconds,
        formats=check_formats(formats),
    )
    item = yield from _item(
        prompt, image_url=image_url, model=model, version=version, item_id=item_id, input=input, sample=sample
    )
    place, access = where(destination)
    gateway = gateway_of(credentials)
    work = gateway.engine.generate_and_store(item, place, options=options, access=access)
    image = yield from on_the_loop(gateway, work)
    return (yield from _stored(gateway, image, place, access, item.input, with_artifact=with_artifact))


agenerate_and_store = async_task(generate_and_store)
"""`generate_and_store` for async flows: awaited. **Costs money** once."""
