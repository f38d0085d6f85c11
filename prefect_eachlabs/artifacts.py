"""What a person sees of a picture in the Prefect UI: a thumbnail and the facts, in a markdown artifact.

The bucket is private, so the thumbnail travels within the artifact as a `data:` URL. An image artifact would print
that URL whole as its caption; markdown shows the picture alone.

All of it is one block of HTML, which both of Prefect's UIs pass on to the browser as it is. Within markdown itself no
way of escaping is right in both: V1 shows most entities as they are written, V2 makes links of whatever looks like one.
"""

from __future__ import annotations

import base64
import hashlib
import html
import logging
import re
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

from prefect.artifacts import acreate_markdown_artifact, create_markdown_artifact

from prefect_eachlabs.confined import NotInstalled
from prefect_eachlabs.engine.cleanup import SettleReport
from prefect_eachlabs.engine.runtime import Gateway
from prefect_eachlabs.engine.sync_async import Plan, beside_the_loop, either, on_the_loop
from prefect_eachlabs.images.png import SIGNATURE
from prefect_eachlabs.images.thumbnails import NoThumbnail, thumbnail
from prefect_eachlabs.models import Destination, StoredImage
from prefect_eachlabs.net.redaction import visible
from prefect_eachlabs.storage.s3_client import S3Access, client_of

logger = logging.getLogger(__name__)
T = TypeVar("T")

THUMBNAIL_PX = 320
MOST_UNTOUCHED_BYTES = 200_000
"""Without Pillow a PNG up to this size is its own thumbnail."""
SHOWN_CHARACTERS = 2_000
UNSEEN = "&#8203;"
"""Breaks words in V2 as well, which drops `<wbr>`; not for what people copy, for it goes along."""
MOST_PROBLEMS = 200
WORDS_CHARACTERS = 6
"""Of a prompt in an artifact's key: 22 characters in all are as wide as a card of Prefect's."""
_FINGERPRINT = re.compile(r"[0-9a-f]{32}(-\d+)?")
_MARKUP = re.compile(r"[!-/:-@\[-`{-~]")
_LONG_WORD = re.compile(r"\S{16}(?=\S)")
_NO_WORD = re.compile(r"[^\w ,]|_")


def escaped(text: object, most: int = SHOWN_CHARACTERS, *, breaks: str = "<wbr>") -> str:
    """Text for a block of HTML, on one line: every ASCII sign is an entity, those of markdown too.

    Long words have places at which they may be broken: by `breaks`, which is empty within an attribute.

    >>> escaped("a | b <c>")
    'a &#124; b &#60;c&#62;'
    """
    line = visible(" ".join(str("" if text is None else text).split()))
    line = line if len(line) <= most else line[: most - 1] + "…"
    # A table that is wider than Prefect's page runs under what stands beside it.
    pieces = _LONG_WORD.sub(lambda found: f"{found[0]}\0", line).split("\0") if breaks else [line]
    return breaks.join(_MARKUP.sub(lambda sign: f"&#{ord(sign[0])};", piece) for piece in pieces)


def plain(text: str) -> str:
    """Text for an artifact's description, which V1 reads as Markdown and V2 does not: letters, digits, commas, dashes.

    >>> plain("Batch spring_2 ![x](http://evil)")
    'Batch spring-2 ---x--http---evil-'
    """
    return _NO_WORD.sub("-", visible(text))[:120]


def table(rows: Iterable[Sequence[str]], *, head: Sequence[str] = ()) -> str:
    """A table of HTML; its cells are HTML already. No line of it is blank, which would end the block."""
    lines = ['<table cellpadding="4">']
    if head:
        lines.append("<thead><tr>" + "".join(f'<th align="left">{cell}</th>' for cell in head) + "</tr></thead>")
    lines.append("<tbody>")
    lines += ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows]
    return "\n".join([*lines, "</tbody>", "</table>"])


def thumbnail_url(picture: bytes) -> str:
    """The picture as a `data:` URL: a JPEG of 320 px; without Pillow a small PNG itself. Blocks.

    Raises:
        NoThumbnail: There is none; says why.
    """
    try:
        return _data_url("image/jpeg", thumbnail(picture, edge_px=THUMBNAIL_PX))
    except NotInstalled as error:
        if picture.startswith(SIGNATURE) and len(picture) <= MOST_UNTOUCHED_BYTES:
            return _data_url("image/png", picture)
        raise NoThumbnail("thumbnails are made by Pillow, which is not installed on the worker") from error


def _data_url(media_type: str, data: bytes) -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def picture_markdown(image: StoredImage, *, thumbnail: str | None, note: str = "", link: str | None = None) -> str:
    """The thumbnail, the prompt, and a table of the facts; whatever others wrote is escaped.

    Args:
        image: The picture.
        thumbnail: Its `data:` URL.
        note: Why there is none.
        link: Where a person who may see the bucket opens it.
    """
    uri = escaped(image.uri)
    size = f"{image.width_px} × {image.height_px} px, {image.size_bytes / 1000:.0f} kB"
    facts = [
        ("picture", f'<a href="{html.escape(link)}">{uri}</a>' if link else uri),
        *(("further picture", escaped(more)) for more in image.more_uris),
        ("size", size if image.width_px else image.size),
        ("cost", "not told" if image.cost_usd is None else f"{image.cost_usd:.4f} USD"),
        ("model", escaped(image.model or "not told", 120)),
        ("the model’s time", "not told" if (took := image.predict_time_seconds) is None else f"{took:.1f} s"),
        ("item", escaped(image.item_id)),
        ("prediction", escaped(image.prediction_id)),
        ("SHA-256", escaped(image.sha256)),
    ]
    if image.reused:
        facts.insert(0, ("bought", "earlier; this run found it in the bucket and bought nothing"))
    lines = []
    if thumbnail is not None:
        lines.append(f'<p><img alt="{escaped(image.item_id, breaks="")}" width="{THUMBNAIL_PX}" src="{thumbnail}"></p>')
    elif note:
        lines.append(f"<p>No thumbnail: {escaped(note, 300)}.</p>")
    if image.prompt:
        lines.append(f"<p>{escaped(image.prompt)}</p>")
    return "\n".join([*lines, table(facts)])


def artifact_key(image: StoredImage) -> str:
    """The item's key on the page of artifacts: lower-case letters, digits and dashes, all that Prefect takes.

    An item that is named by a fingerprint is called by the first words of its prompt: a card is not so wide.
    """
    name, most = image.item_id, None
    if _FINGERPRINT.fullmatch(name):
        name, most = image.prompt or "", WORDS_CHARACTERS
    words = re.sub("[^a-z0-9]+", "-", name.lower())[:most].strip("-")
    if words != image.item_id:
        words = f"{words}-{hashlib.sha256(image.item_id.encode()).hexdigest()[:6]}".strip("-")
    return f"eachlabs-{words}"


def card(image: StoredImage) -> str:
    """What its card on the run's page says: the prompt and the cost."""
    cost = "cost not told" if image.cost_usd is None else f"${image.cost_usd:.4f}"
    return f"{cost} · {plain(image.prompt or f'Item {image.item_id}')}"  # what is last is cut off


def console_link(image: StoredImage, access: S3Access | None) -> str | None:
    """The object's page in the AWS console; None for stores that are not AWS. Holds no signature."""
    host = urlsplit(str(client_of(access or S3Access()).meta.endpoint_url)).hostname or ""
    if not host.endswith(".amazonaws.com"):
        return None
    bucket, _, key = image.uri.removeprefix("s3://").partition("/")
    return f"https://console.aws.amazon.com/s3/object/{quote(bucket)}?prefix={quote(key, safe='')}"


async def _read(gateway: Gateway, image: StoredImage, place: Destination, access: S3Access | None) -> bytes | None:
    key = image.uri.removeprefix(f"s3://{place.bucket}/")
    found = await gateway.engine.account.ledger(place, access).store.get(key)
    return found.body if found is not None else None


def show_picture(gateway: Gateway, image: StoredImage, place: Destination, access: S3Access | None) -> Plan[None]:
    """Makes the artifact of a stored picture; reads the picture once. Free.

    It never raises: a picture that is paid for and stored is not called failed because it cannot be shown.
    """

    def markdown(data: bytes | None) -> str:
        small, note = None, ""
        try:
            small = thumbnail_url(data) if data else None
        except NoThumbnail as error:
            note = str(error)
        return picture_markdown(image, thumbnail=small, note=note, link=console_link(image, access))

    def shown() -> Plan[None]:
        # What is not a picture may be a film, and has no thumbnail.
        data = (yield from on_the_loop(gateway, _read(gateway, image, place, access))) if image.verified else None
        text = yield from beside_the_loop(lambda: markdown(data))
        yield from _made(text, card(image), artifact_key(image))

    yield from quietly(shown(), f"The picture {image.uri} is stored; its artifact")


def quietly(show: Plan[T], what: str = "An artifact") -> Plan[T | None]:
    """An artifact that cannot be made is no reason to stop buying, or to call pictures lost."""
    try:
        return (yield from show)
    except Exception as error:
        logger.warning("%s could not be made: %s: %s", what, type(error).__name__, str(error)[:200])
        return None


def show_markdown(markdown: str, *, description: str, key: str | None = None) -> Plan[None]:
    """Makes a markdown artifact."""
    yield from quietly(_made(markdown, description, key))


def _made(markdown: str, description: str, key: str | None) -> Plan[Any]:
    return either(
        create_markdown_artifact, acreate_markdown_artifact, markdown=markdown, key=key, description=description
    )


def settle_markdown(destination: str, report: SettleReport) -> str:
    """What the janitor found, and what a person should do about the rest."""
    counts = [
        ("records", report.records),
        ("to settle", report.looked_at),
        ("stored now", report.stored),
        ("had failed or been cancelled", report.ended),
        ("had bought nothing", report.nothing_bought),
        ("pending", report.pending),
        ("ambiguous", report.ambiguous),
        ("too young to settle yet", report.too_young),
    ]
    lines = [f"<p>Destination: {escaped(destination)}</p>", table((name, str(count)) for name, count in counts)]
    if report.problems:
        shown = sorted(report.problems.items())[:MOST_PROBLEMS]
        rows = [(escaped(item), escaped(said, 600, breaks=UNSEEN)) for item, said in shown]
        lines.append(table(rows, head=("item", "what to do")))
        if len(report.problems) > MOST_PROBLEMS:
            lines.append(f"<p>And {len(report.problems) - MOST_PROBLEMS} more: prefect-eachlabs settle lists them.</p>")
    return "\n".join(lines)
