"""`prefect-eachlabs generate`: one prompt becomes one PNG in the bucket, without a flow run."""

# ruff: noqa: PLC0415 - what is heavy is imported when the command runs, so that help and refusals answer at once

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any
from uuid import uuid4

from prefect_eachlabs.cli.account import limiter_maker
from prefect_eachlabs.cli.options import NONE_GIVEN, PurchaseFlags, destination_of, flag
from prefect_eachlabs.errors import BadInput, EachlabsError, SetupError
from prefect_eachlabs.net import safe_json

if TYPE_CHECKING:
    from prefect_eachlabs.engine.runtime import Gateway
    from prefect_eachlabs.models import Destination, Item, StoredImage

FIRST_PAUSE_SECONDS = 1.0


def generate(
    prompt: Annotated[
        str | None, flag("what the picture shows: subject, action, surroundings, style (some models take none)")
    ] = None,
    /,
    *,
    image_url: Annotated[
        str | None, flag("a reference picture, 100 MB at most: a public URL, s3://bucket/key or a file")
    ] = None,
    input: Annotated[Sequence[str], flag("NAME=JSON, a further field of the model's input; may be repeated")] = (),
    item_id: Annotated[str | None, flag("names the item: 1 to 128 of A-Z a-z 0-9 _ -")] = None,
    flags: PurchaseFlags = NONE_GIVEN,
) -> int:
    """One prompt becomes one PNG in your bucket, bought once.

    Running the same again buys nothing: the record in the bucket knows the item
    by its id, which is the fingerprint of model, version and input unless you
    name it with --item-id.

    A reference file is uploaded through the API and then public to whoever has
    its link. Another model gets it under the name it has for it; what a model
    takes shows `prefect-eachlabs models SLUG`.

    examples:
      prefect-eachlabs generate "a red fox, watercolour" --to s3://acme/daily
      prefect-eachlabs generate "in winter" --to s3://acme/daily --image-url fox.jpg
      prefect-eachlabs generate "a fox" --model imagen-4 --input num_images=2
    """
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")
    from prefect_eachlabs.models import DEFAULT_MODEL, Item
    from prefect_eachlabs.reference_images import Roots, opened

    item = Item.wanted(
        prompt,
        # Whoever is at the command line may publish what they may read.
        image_url=opened(image_url, Roots(anywhere=True)),
        model=DEFAULT_MODEL if flags.model is None else flags.model,
        version=flags.version,
        item_id=item_id,
        input=dict(map(named_value, input)),
    )
    destination = destination_of(flags.to)
    if sys.stderr.isatty() and not flags.in_json:
        print(f"{item.model} is asked for it; that takes some seconds ...", file=sys.stderr, flush=True)
    try:
        image = _generate(item, destination, flags)
    except EachlabsError as error:
        if not isinstance(error, SetupError):  # that is about every item
            error.item_id = error.item_id or item.item_id
        raise
    print(json.dumps(_as_json(image)) if flags.in_json else _as_line(image), flush=True)
    return 0


def named_value(text: str) -> tuple[str, Any]:
    """NAME=JSON; what is not JSON is text, so that `aspect_ratio=16:9` needs no quotes."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise BadInput(f"--input: {text!r} must be NAME=JSON, such as seed=7 or aspect_ratio=16:9.")
    try:
        return name.strip(), safe_json.strict(value)
    except (ValueError, RecursionError):
        return name.strip(), value


def _generate(item: Item, destination: Destination, flags: PurchaseFlags) -> StoredImage:
    from prefect_eachlabs.cli.interrupts import Interrupted, call, interrupt_summary
    from prefect_eachlabs.ledger.rules import PurchaseOptions
    from prefect_eachlabs.retry import retry_while_retryable

    options = PurchaseOptions(run_id=uuid4().hex, any_reference=True, **flags.options())

    async def work(gateway: Gateway) -> StoredImage:
        await gateway.engine.account.catalogue.check_slug(item.model)
        image = await retry_while_retryable(
            lambda: gateway.engine.generate_and_store(item, destination, options=options),
            first_pause_seconds=FIRST_PAUSE_SECONDS,
        )
        return await gateway.engine.with_cost(image, destination)

    def came_of(gateway: Gateway) -> Interrupted:
        ends = gateway.engine.account.interruptions
        text, numbers = interrupt_summary(ends, unanswered=gateway.engine.in_flight)
        again = " Run the same again, and it goes on from there."
        return Interrupted(text + again, {"item_id": item.item_id, "prediction_id": next(iter(ends), None), **numbers})

    image = call(limiter_maker(), work, came_of)
    # An attempt after the one that bought finds what is there, and it was bought all the same.
    return image.model_copy(update={"reused": image.reused and image.bought_by != options.run_id})


def _as_json(image: StoredImage) -> dict[str, object]:
    names = ("uri", "sha256", "width_px", "height_px", "cost_usd", "predict_time_seconds", "reused")
    return {
        "item_id": image.item_id,
        "prediction_id": image.prediction_id,
        "status": "stored",
        **{name: getattr(image, name) for name in names},
        **({"more_uris": list(image.more_uris)} if image.more_uris else {}),
        **({"format": image.format} if image.format != "png" else {}),
        **({} if image.verified else {"verified": False}),
    }


def _as_line(image: StoredImage) -> str:
    facts = [image.size]
    if image.predict_time_seconds is not None:
        facts.append(f"{image.predict_time_seconds:.1f} s")
    if image.cost_usd is not None:
        facts.append(f"${image.cost_usd:.4f}")
    if image.more_uris:
        facts.append(f"and {len(image.more_uris)} more: {', '.join(image.more_uris)}")
    if image.reused:
        facts.append("bought earlier, nothing was bought now")
    return f"{image.uri}  ({', '.join(facts)})"
