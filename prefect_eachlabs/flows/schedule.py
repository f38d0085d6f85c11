"""The flow for schedules: a prompt with the run's date in it, bought once a date."""

from __future__ import annotations

import re
from datetime import datetime, timezone
from typing import Annotated
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from prefect.runtime import flow_run

from prefect_eachlabs.engine.sync_async import Plan
from prefect_eachlabs.errors import BadInput
from prefect_eachlabs.flows.decorators import async_flow, both, sync_flow
from prefect_eachlabs.flows.form import Account, Formats, Model, ReferencePicture, Target, Version, field
from prefect_eachlabs.images.formats import check_formats
from prefect_eachlabs.models import DEFAULT_MODEL, StoredImage
from prefect_eachlabs.tasks import agenerate_and_store, generate_and_store, shortened

__all__ = ["ascheduled_image", "scheduled_image"]

MOST_CHARACTERS = 20_000
_PART = re.compile(r"\{\{|\}\}|\{(?P<field>[^{}]*)\}|[{}]")
_CODE = re.compile(r"%[aAbBdHIjmMpSUwWyYGuVZ%]")
_CODES = re.compile(rf"(?:{_CODE.pattern}|[^%])*", re.DOTALL)
"""The codes of strftime that mean the same on every platform."""


def filled(template: str, date: datetime, *, name: str) -> str:
    """The template with the date in its places.

    Not `str.format`: whoever fills in a form must not reach into Python's objects (`{date.__class__}`), nor ask for a
    gigabyte of blanks (`{date:>1000000000}`).

    Args:
        template: Text with `{date:%A}` (any code of strftime that every platform knows), `{date}` (2026-11-22), and
            `{{` and `}}` for the braces themselves.
        date: With the time zone that counts.
        name: Of the parameter, for the message.

    Raises:
        BadInput: Something else stands in braces, or the template is longer than 20,000 characters.

    >>> filled("{date:%A} in {{braces}}", datetime(2026, 11, 22), name="prompt")
    'Sunday in {braces}'
    """
    if len(template) > MOST_CHARACTERS:
        raise BadInput(f"{name}: {len(template)} characters, and {MOST_CHARACTERS} are the most. Make it shorter.")

    def put(part: re.Match[str]) -> str:
        text = part.group()
        if text in ("{{", "}}"):
            return text[0]
        field = part.group("field")
        if field is None:
            raise BadInput(
                f"{name}: a single {text!r} at position {part.start()}: write {text * 2!r} for the sign itself."
            )
        word, _, spec = field.partition(":")
        if word.strip() != "date" or not _CODES.fullmatch(spec):
            raise BadInput(
                f"{name}: {'{' + field[:78] + '}'!r} is not known: write {{date}}, or {{date:%A}} with codes of "
                "strftime such as %A %d %B %Y %H %M %j %V."
            )
        # Code by code: strftime ends at a zero byte that stands between them.
        return _CODE.sub(lambda code: date.strftime(code.group()), spec or "%Y-%m-%d")

    return _PART.sub(put, template)


def zone(name: str) -> ZoneInfo:
    """The time zone of that name.

    Raises:
        BadInput: There is none.
    """
    try:
        return ZoneInfo(name.strip())
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise BadInput(
            f"time_zone: {name[:80]!r} is not a time zone: write one such as Europe/Berlin or UTC."
        ) from None


def _scheduled_for(time_zone: str) -> datetime:
    """The date it was scheduled for, not the one it started on: a run that is late, or retried, means the same."""
    scheduled: datetime = flow_run.scheduled_start_time or datetime.now(timezone.utc)
    return scheduled.astimezone(zone(time_zone))


def named_for_its_date() -> str:
    """Names a flow run for the item it makes."""
    parameters = flow_run.parameters
    try:
        date = _scheduled_for(parameters["time_zone"])
        return shortened(filled(parameters["item_id_template"], date, name="item_id_template"), 128) or "picture"
    except (BadInput, KeyError):
        return "picture"  # the flow says what is wrong


@sync_flow(
    "scheduled-image",
    description="A prompt with the run's date becomes one PNG in S3, bought once a date.",
    flow_run_name=named_for_its_date,
)
def scheduled_image(  # noqa: PLR0917 - the UI's form has no keywords
    prompt_template: Annotated[str, field("Prompt with the date", minLength=1, pattern=r"\S")],
    destination: Target = None,
    item_id_template: Annotated[str, field("Name with the date", minLength=1)] = "{date:%Y-%m-%d}",
    time_zone: Annotated[str, field("Time zone", minLength=1)] = "UTC",
    image_url: ReferencePicture = None,
    model: Model = DEFAULT_MODEL,
    formats: Formats = None,
    credentials: Account = None,
    version: Version = None,
) -> Plan[StoredImage]:
    """A prompt with the scheduled date in it becomes one PNG in S3. **Costs money** once a date.

    Args:
        prompt_template: What the picture shows, with the date the run was scheduled for: {date:%A} is the weekday,
            {date:%d %B %Y} the day; any code of strftime.
        destination: Where the picture goes: a saved block, or s3://bucket/prefix, or eachlabs-s3-destination/NAME.
            Empty: the worker's setting EACHLABS_DESTINATION. A prefix for each schedule keeps their dates apart.
        item_id_template: Names the picture. Runs with the same name buy once: with %Y-%m-%d once a day, with
            %Y-%m-%d-%H once an hour.
        time_zone: In which the date is told, such as Europe/Berlin. Give the schedule the same.
        image_url: Its public https URL, s3://bucket/key, or a file in a folder that the worker's setting
            EACHLABS_REFERENCE_ROOTS names.
        model: The model's slug; `prefect-eachlabs models` lists them.
        formats: What may be stored; what else comes is refused. Empty: whatever the model gives.
        credentials: An Eachlabs Credentials block. Empty: the worker's environment.
        version: Empty: the default model has its own, and others need none.

    Returns:
        Where the picture is.
    """
    date = _scheduled_for(time_zone)
    return (
        yield from both(
            generate_and_store,
            agenerate_and_store,
            filled(prompt_template, date, name="prompt_template"),
            destination=destination,
            item_id=filled(item_id_template, date, name="item_id_template"),
            image_url=image_url or None,
            model=model,
            version=version or None,
            credentials=credentials or None,
            formats=check_formats(formats or None),
            with_artifact=True,
        )
    )


ascheduled_image = async_flow(scheduled_image)
"""`scheduled_image` for async callers: awaited. **Costs money** once a date."""
