"""The forms of the flows: what Prefect's pages show of each parameter, and what they refuse before a run begins.

From Python a parameter is what the tasks take, None where it is left out. Prefect's pages have no field for that value,
so the form's schema leaves it out: what may be left empty is a field of text, or of a number. What is wrong and comes
past a form, from a caller of the API say, the flow refuses in one sentence.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike, fspath
from typing import TYPE_CHECKING, Annotated, Any, Literal

from prefect.blocks.core import Block
from pydantic import BeforeValidator, Field
from pydantic.annotated_handlers import GetJsonSchemaHandler

from prefect_eachlabs.blocks import EachlabsCredentials, S3Destination
from prefect_eachlabs.errors import BadInput
from prefect_eachlabs.images.formats import ANY, FORMATS
from prefect_eachlabs.models import ITEM_ID_PATTERN, MODEL_PATTERN
from prefect_eachlabs.reference_images import BUCKET_PATTERN


class _NoneUnsaid(dict[str, Any]):
    """A schema without the default that is None: pages would send it, and the server would refuse it."""

    def __setitem__(self, key: str, value: Any) -> None:
        if key != "default" or value is not None:
            super().__setitem__(key, value)


class _Shown:
    """How a parameter's type is told to a form: without None, with what JSON Schema says more precisely."""

    def __init__(self, schema: dict[str, Any]) -> None:
        self._schema = schema

    def __get_pydantic_json_schema__(self, core_schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        told = dict(handler(core_schema))
        kinds = [kind for kind in told.pop("anyOf", [told]) if kind.get("type") != "null"]
        shown = [kind if "$ref" in kind else {**kind, **self._schema} for kind in kinds]
        return _NoneUnsaid(shown[0] if len(shown) == 1 else {"anyOf": shown})


def field(title: str, /, **schema: Any) -> Any:
    """What goes into the `Annotated` of a parameter.

    Args:
        title: Its label.
        schema: JSON Schema's words for what is allowed.
    """
    declared = Field(json_schema_extra={"title": title})
    declared.metadata.append(_Shown(schema))
    return declared


def advanced(title: str, /, **schema: Any) -> Any:
    """A field that few people need: these come last."""
    return field(f"Advanced: {title}", **schema)


def _of_block(given: Any) -> Any:
    """A block that is given field by field would stand in the run's parameters with its secrets, and be nobody's."""
    if isinstance(given, dict):
        raise ValueError("choose a saved block, or give its name")
    return given


def name_of(given: Block | str | None) -> str | None:
    """What names a block, or the text itself: for runs on other workers, whose parameters are kept.

    Raises:
        BadInput: The block is not saved.
    """
    if not isinstance(given, Block):
        return given
    if given._block_document_name is None:
        raise BadInput("shards: the blocks must be saved ones, which other workers can load.")
    return f"{given.get_block_type_slug()}/{given._block_document_name}"


def _listed(given: Any) -> Any:
    return [name.strip() for name in given.split(",") if name.strip()] if isinstance(given, str) else given


def _as_text(given: Any) -> Any:
    return fspath(given) if isinstance(given, PathLike) else given


_SLUG = S3Destination.get_block_type_slug()

Prompt = Annotated[str, field("Prompt", minLength=1, pattern=r"\S")]
if TYPE_CHECKING:
    Table = str | PathLike[str]
else:  # a file's name, whose form has a field of text
    Table = Annotated[str, BeforeValidator(_as_text), field("Table of prompts", minLength=1, pattern=r"\S")]
Target = Annotated[
    S3Destination | str | None,
    BeforeValidator(_of_block),
    field("Destination", title="address", pattern=rf"^\s*((s3://{BUCKET_PATTERN.pattern}(/.*)?|{_SLUG}/.+))?\s*$"),
]
Account = Annotated[
    EachlabsCredentials | str | None, BeforeValidator(_of_block), field("Account", title="name of a block")
]
ItemId = Annotated[str | None, field("Name", pattern=f"^({ITEM_ID_PATTERN.pattern})?$")]
ReferencePicture = Annotated[str | None, field("Reference picture")]
Model = Annotated[str, field("Model", pattern=f"^{MODEL_PATTERN.pattern}$")]
Version = Annotated[str | None, advanced("model version")]
Formats = Annotated[
    Sequence[str] | None,
    BeforeValidator(_listed),
    field("Formats", items={"type": "string", "enum": [ANY, *FORMATS]}, uniqueItems=True),
]
OnAmbiguous = Annotated[Literal["settle", "fail"], advanced("after a lost answer")]
