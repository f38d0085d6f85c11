"""The catalogue of models: what each takes, asked for once a run; inputs are checked against it before they cost.

A schema comes from afar and is trusted with nothing: it can refuse an input, and it says which field takes the
reference picture. What it refers to elsewhere is not fetched; one that is not a schema checks nothing.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property, partial
from typing import Any, TypeVar

from prefect_eachlabs.api.client import EachlabsClient
from prefect_eachlabs.api.schema_check import faults_of, listed
from prefect_eachlabs.api.single_flight import SingleFlight
from prefect_eachlabs.confined import ConfinedError, JobFailed, TooCostly
from prefect_eachlabs.errors import BadInput, EachlabsError, KeyRefused, Rejected
from prefect_eachlabs.limits.limiter import RateLimiter
from prefect_eachlabs.models import DEFAULT_MODEL, Item
from prefect_eachlabs.reference_images import REFERENCE_FIELDS, with_names

logger = logging.getLogger(__name__)
T = TypeVar("T")

MOST_FAULTS = 8
MOST_SCHEMA_BYTES = 256 * 1024
ROWS_A_PAGE = 100
MOST_PAGES = 50
MOST_NEAR = 8


@dataclass(frozen=True)
class ReferenceField:
    """The field that takes the reference picture, and whether it takes a list of them."""

    name: str
    takes_list: bool


@dataclass
class Model:
    """A model of the catalogue, as far as it is described.

    Attributes:
        slug: What requests call it.
        title: What people call it.
        output_type: `string` or `array`, as the vendor says.
        request_schema: The JSON Schema of its input; None: there is none.
        is_checked: Whether inputs are held against it; not any more once that took too long.
    """

    slug: str
    title: str
    output_type: str
    request_schema: Mapping[str, Any] | None = None
    is_checked: bool = True

    @classmethod
    def parse(cls, answer: Mapping[str, Any], slug: str = "") -> Model:
        """What the API says of a model; a field of the wrong shape counts as not sent."""
        schema = answer.get("request_schema")
        usable = isinstance(schema, Mapping) and isinstance(schema.get("properties", {}), Mapping) and schema
        said = [answer.get(name) for name in ("slug", "title", "output_type")]
        found, title, output_type = (text[:200] if isinstance(text, str) else "" for text in said)
        return cls(found or slug, title or found or slug, output_type, dict(schema) if usable and schema else None)

    @cached_property
    def properties(self) -> dict[str, Mapping[str, Any]]:
        """Field → its schema."""
        properties = (self.request_schema or {}).get("properties", {})
        return {str(name): schema if isinstance(schema, Mapping) else {} for name, schema in properties.items()}

    @property
    def required(self) -> tuple[str, ...]:
        """The fields that must be there."""
        required = (self.request_schema or {}).get("required")
        return tuple(map(str, required)) if isinstance(required, list) else ()

    @cached_property
    def reference_field(self) -> ReferenceField | None:
        """Where the reference picture goes; None: it takes none, or nobody says."""
        known = [name for name in REFERENCE_FIELDS if name in self.properties]
        name = next((name for name in known if name in self.required), known[0] if known else None)
        return None if name is None else ReferenceField(name, _takes_list(self.properties[name]))

    def placed(self, input: Mapping[str, Any]) -> dict[str, Any]:
        """The input with its reference picture (`image_url`) in the field that the model has for it.

        Raises:
            BadInput: The model has none, or it is filled already.
        """
        picture = input.get("image_url")
        field = self.reference_field
        if picture is None or self.request_schema is None:
            return dict(input)
        if field is None:
            raise BadInput(
                f"image_url: model {self.slug!r} takes no reference picture (its fields: {listed(self.properties)}). "
                "Leave it out, or take another model. Nothing was bought."
            )
        if field.name == "image_url":
            return {**input, "image_url": [picture]} if field.takes_list else dict(input)
        placed = {name: value for name, value in input.items() if name != "image_url"}
        if not field.takes_list:
            if field.name in placed:
                raise BadInput(
                    f"image_url: model {self.slug!r} takes one reference picture, in its field {field.name!r}, which "
                    "the input fills already. Give one of the two. Nothing was bought."
                )
            return {**placed, field.name: picture}
        others = placed.get(field.name, [])
        return {**placed, field.name: [picture, *(others if isinstance(others, list) else [others])]}

    def faults_of(self, *inputs: Mapping[str, Any]) -> list[list[str]]:
        """What the model's schema has against each input, field by field; none where nothing is to go by. Blocks."""
        if self.request_schema is None or not self.is_checked or not inputs:
            return [[] for _ in inputs]
        try:
            schema = json.dumps(self.request_schema).encode()
            if len(schema) > MOST_SCHEMA_BYTES:
                raise JobFailed(f"it has {len(schema)} bytes")
            return faults_of(schema, *inputs)
        except (ConfinedError, OSError, ValueError, RecursionError) as error:
            if isinstance(error, TooCostly) and len(inputs) > 1:  # of one of them, or of all together
                return [faults for input in inputs for faults in self.faults_of(input)]
            logger.warning("Model %s: its schema cannot be used (%s): inputs go unchecked.", self.slug, error)
            # The next input would take as long, and be told the same.
            self.is_checked = not isinstance(error, TooCostly)
            return [[] for _ in inputs]


def _takes_list(schema: Mapping[str, Any]) -> bool:
    said = schema.get("type")
    kinds = list(said) if isinstance(said, list) else [said]
    for name in ("anyOf", "oneOf"):
        choices = schema.get(name)
        kinds += [c.get("type") for c in choices if isinstance(c, Mapping)] if isinstance(choices, list) else []
    return "array" in kinds and "string" not in kinds


class Catalogue:
    """The models, each asked for once a run.

    Args:
        limiter: The account's; each question takes a request slot. None: nobody counts (no key is sent).
    """

    def __init__(self, client: EachlabsClient, limiter: RateLimiter | None) -> None:
        self._client = client
        self._limiter = limiter
        self._models: SingleFlight[str, Model | None] = SingleFlight()
        self._nearest: SingleFlight[str, list[str]] = SingleFlight()
        self.beside_the_loop = asyncio.to_thread
        """Where inputs are checked; tests whose time is virtual have no threads."""

    async def model(self, slug: str) -> Model | None:
        """A model of the catalogue; None: it is not there. Free; a request the first time.

        Raises:
            Unanswered, Throttled, NotSent: The catalogue gave no answer: ask again.
            KeyRefused: The key is not accepted.
        """
        return await self._models.get(slug, lambda: self._ask(slug))

    async def _ask(self, slug: str) -> Model | None:
        try:
            return Model.parse(await self._asked(lambda: self._client.model(slug)), slug)
        except KeyRefused:
            raise
        except Rejected as error:
            logger.info("Model %s: the catalogue does not show it (%s): its inputs go unchecked.", slug, error)
            return None

    async def why_refused(self, item: Item) -> str | None:
        """Why the API has refused an order, in words of ours; None: the catalogue does not know. Free.

        Raises:
            EachlabsError: As for `model`.
        """
        model = await self.model(item.model)
        if model is None:
            near = await self._nearest.get(item.model, lambda: self._near(item.model))
            return _missing(item.model, near)
        (faults,) = await self.beside_the_loop(model.faults_of, _with_urls(item.input))
        return _refused(model.slug, faults) if faults else None

    async def _near(self, slug: str) -> list[str]:
        return nearest(slug, [model.slug for model in await self.find()])

    async def find(self, name: str = "") -> list[Model]:
        """The models whose name contains `name`. Free; a request for each 100.

        Raises:
            EachlabsError: As for `model`.
        """
        found: list[Model] = []
        for page in range(MOST_PAGES):
            offset = page * ROWS_A_PAGE
            rows = await self._asked(partial(self._client.models, name, limit=ROWS_A_PAGE, offset=offset))
            found += [Model.parse(row) for row in rows if isinstance(row, Mapping) and row.get("slug")]
            if len(rows) < ROWS_A_PAGE:
                break
        return found

    async def check_slug(self, slug: str) -> None:
        """Refuses a model that the catalogue does not have, before a batch orders anything of it. Free.

        Where nobody can tell, because the catalogue gives no answer or lists nothing, it passes: the order will tell.

        Raises:
            BadInput: There is none of that name; says which ones are near.
            KeyRefused: The key is not accepted.
        """
        try:
            if slug == DEFAULT_MODEL or await self.model(slug) is not None:
                return
            slugs = [model.slug for model in await self.find()]
        except KeyRefused:
            raise
        except EachlabsError as error:
            logger.info("The catalogue cannot tell whether there is a model %s: %s", slug, error)
            return
        if slugs and slug not in slugs:
            raise BadInput(f"{_missing(slug, nearest(slug, slugs))}. Nothing was bought.")

    async def checked(self, item: Item) -> dict[str, Any]:
        """The item's input as its model takes it: its reference picture in the right field, all of it checked.

        The first model's input was checked when the item was made, and needs no request. A model that the catalogue
        does not know, or of which it has no schema, gets what the user wrote.

        Raises:
            BadInput: The model would refuse it; says which fields and why. Nothing was bought.
            EachlabsError: As for `model`.
        """
        model = await self.model(item.model) if item.model != DEFAULT_MODEL else None
        if model is None:
            return dict(item.input)
        input = model.placed(item.input)
        (faults,) = await self.beside_the_loop(model.faults_of, _with_urls(input))
        if (error := _bad(item, faults)) is not None:
            raise error
        return input

    async def faults_of(self, items: Sequence[Item]) -> list[BadInput | None]:
        """What their model, one of the catalogue, has against items that nobody orders; of the first model, too.

        Raises:
            EachlabsError: As for `model`.
        """
        model = await self.model(items[0].model)
        if model is None:
            return [None] * len(items)
        found: list[BadInput | None] = []
        inputs: list[dict[str, Any]] = []
        for item in items:
            try:
                inputs.append(_with_urls(model.placed(item.input)))
                found.append(None)
            except BadInput as error:
                found.append(error)
        faults = iter(await self.beside_the_loop(model.faults_of, *inputs))
        return [error or _bad(item, next(faults)) for item, error in zip(items, found, strict=True)]

    async def _asked(self, question: Callable[[], Awaitable[T]]) -> T:
        """The answer, in a request slot of its own where somebody counts."""
        return await (question() if self._limiter is None else self._limiter.asked(question))

    async def aclose(self) -> None:
        await self._models.aclose()
        await self._nearest.aclose()


def _missing(slug: str, near: list[str]) -> str:
    meant = f" Did you mean {' or '.join(near)}?" if near else ""
    return f"model: the catalogue has no model {slug!r}.{meant} `prefect-eachlabs models` lists what there is"


def _bad(item: Item, faults: list[str]) -> BadInput | None:
    if not faults:
        return None
    return BadInput(f"{_refused(item.model, faults)}. Nothing was bought.", item_id=item.item_id)


def _refused(slug: str, faults: list[str]) -> str:
    more = f"; and {len(faults) - MOST_FAULTS} more" if len(faults) > MOST_FAULTS else ""
    return f"{'; '.join(faults[:MOST_FAULTS])}{more}. `prefect-eachlabs models {slug}` shows what {slug} takes"


def nearest(slug: str, slugs: list[str]) -> list[str]:
    """The models that may have been meant: those whose slug contains the word, then those written alike.

    >>> nearest("flux", ["imagen-4", "flux-pro"]), nearest("imagin-4", ["imagen-4", "flux-pro"])
    (['flux-pro'], ['imagen-4'])
    """
    containing = [known for known in slugs if slug.lower() in known.lower()]
    return list(dict.fromkeys([*containing, *get_close_matches(slug, slugs)]))[:MOST_NEAR]


def _with_urls(input: Mapping[str, Any]) -> dict[str, Any]:
    """The input with a URL wherever a picture of one's own will have one: schemas may ask for the form of a URL."""

    def url(name: str) -> str:
        return "https://pictures.invalid/reference.png" if name.startswith(("s3://", "sha256:")) else name

    return with_names(input, url)
