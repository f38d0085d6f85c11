"""`prefect-eachlabs demo`: prompts become pictures in a bucket through a real flow, with nothing set up."""

# ruff: noqa: PLC0415 - what is heavy is imported when the command runs, Prefect only in an environment of the demo's

from __future__ import annotations

import asyncio
import logging
import queue
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NoReturn

from cyclopts import validators

from prefect_eachlabs.cli import demo_stage
from prefect_eachlabs.cli.options import flag, positive
from prefect_eachlabs.errors import SetupError

if TYPE_CHECKING:
    from prefect_eachlabs.models import StoredImage
    from prefect_eachlabs.storage.s3_client import S3Access

SHEET = "contact-sheet.png"

PROMPTS = {
    "lighthouse": "A lighthouse on a basalt cliff at dawn, long exposure, mist over a violet sea",
    "fox": "A red fox asleep under a paper lantern, snow falling, woodblock print",
    "greenhouse": "Inside a glass greenhouse at night, bioluminescent ferns, a robot gardener with a watering can",
    "tram": "An old yellow tram climbing a steep street in the rain, reflections, oil on canvas",
    "whale": "A whale swimming between clouds above a wheat field, golden hour, children's book illustration",
    "teapot": "A teapot in the shape of a mountain observatory, studio photograph, soft light",
    "market": "A floating market of hot-air balloons over a desert canyon, wide angle, morning haze",
    "library": "A spiral library carved into a giant redwood, warm lamps, cutaway drawing",
    "astronaut": "An astronaut repairing a grandfather clock on the Moon, cinematic, Earth rising behind",
    "harbour": "A harbour town made of folded blue paper, tilt-shift, tiny boats",
    "orchestra": "An orchestra of beetles on a mossy log, macro photograph, dew drops",
    "bicycle": "A red bicycle against a turquoise door, hard noon shadows, film grain",
}

CLOSING = """\
The pictures were drawn by the emulator: no model was asked, nothing was bought, and servers and bucket are gone.
For real ones, two environment variables say which API is asked:
  EACHLABS_API_KEY    your key from eachlabs.ai
  EACHLABS_BASE_URL   leave it unset: then it is the real API (the demo had set it to the emulator)
With AWS credentials as boto3 finds them (AWS_PROFILE, AWS_ACCESS_KEY_ID ...) and a bucket of yours:
  prefect-eachlabs generate "a red fox in the snow, watercolour" --to s3://your-bucket/prefix
"""


@dataclass
class Played:
    """How each flow run ended, by item id, and what the bucket held afterwards."""

    images: dict[str, StoredImage] = field(default_factory=dict)
    errors: dict[str, BaseException] = field(default_factory=dict)
    pictures: dict[str, bytes] = field(default_factory=dict)
    tallies: dict[str, Any] = field(default_factory=dict)


class Progress(logging.Handler):
    """Says how far each picture has come, a line a step; reads it in Prefect's log lines about task runs."""

    _AFTER: ClassVar = {"create": "being made", "await": "being stored"}
    """A task of the flow, by the first word of its run's name → where the picture stands once it has completed."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._begun_at = time.monotonic()

    def moved(self, item_id: str, stage: str) -> None:
        print(f"{time.monotonic() - self._begun_at:6.1f} s  {item_id:<16} {stage}", flush=True)

    def emit(self, record: logging.LogRecord) -> None:
        verb, _, item_id = str(getattr(record, "task_run_name", "")).partition(" ")
        if verb in self._AFTER and record.getMessage().startswith("Finished in state Completed"):
            self.moved(item_id, self._AFTER[verb])


def demo(
    *,
    output: Annotated[Path, flag("folder for the pictures (demo-output)")] = Path("demo-output"),
    pictures: Annotated[int, flag("1 to 12 (6)", validator=validators.Number(gte=1, lte=len(PROMPTS)))] = 6,
    service_seconds: Annotated[float, flag("the emulator's time a picture (5)", validator=positive)] = 5.0,
) -> NoReturn:
    """Pictures from the emulator into a local S3, through a real flow; nothing to set up."""
    demo_stage.refuse_a_used_process()
    begun_at = time.monotonic()
    folder = _folder(output)
    numbered = {f"{number:02d}-{name}": prompt for number, (name, prompt) in enumerate(PROMPTS.items(), 1)}
    prompts = dict(list(numbered.items())[:pictures])
    try:
        with demo_stage.Interrupts() as interrupts:
            played = _play(prompts, service_seconds, interrupts)
    except KeyboardInterrupt:
        print("Interrupted. The demo and all that it started have ended.", file=sys.stderr)
        demo_stage.leave(130)
    # Only what an earlier demo may have left: the folder may hold files of the user's own.
    for item_id in numbered:
        (folder / f"{item_id}.png").unlink(missing_ok=True)
    for item_id, picture in played.pictures.items():
        (folder / f"{item_id}.png").write_bytes(picture)
    (folder / SHEET).write_bytes(_sheet(played, prompts))
    print(f"\n{_table(played, prompts)}\n")
    print(f"Pictures and contact sheet: {folder}")
    print(f"{_tallies(played.tallies)} All of it took {time.monotonic() - begun_at:.0f} s.\n\n{CLOSING}", end="")
    demo_stage.leave(0 if set(played.pictures) == set(played.images) == set(prompts) else 1)


def _folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SetupError(f"--output {path}: {error.strerror}. Choose another folder.") from error
    return path.resolve()


def _play(prompts: Mapping[str, str], service_seconds: float, interrupts: demo_stage.Interrupts) -> Played:
    """Everything that needs the servers; when it comes back, or is interrupted, they are gone."""
    played = Played()
    with demo_stage.folder_of_its_own() as folder:
        demo_stage.replace_environment(folder)
        print("Starting Prefect's embedded server, an emulator of the API and a local S3 ...", flush=True)
        with demo_stage.Stage(interrupts, service_seconds=service_seconds) as stage:
            _run_flows(prompts, played, interrupts)
            played.pictures = asyncio.run(_fetch(stage.s3.access))
            played.tallies = stage.emulator.tallies()
    return played


def _run_flows(prompts: Mapping[str, str], played: Played, interrupts: demo_stage.Interrupts) -> None:
    """One run of the flow `generate_image` for each prompt, all at once; their slots are the account's."""
    from prefect_eachlabs.flows.image import generate_image

    progress = Progress()
    logging.getLogger("prefect.task_runs").addHandler(progress)
    ended: queue.Queue[tuple[str, StoredImage | BaseException]] = queue.Queue()

    def run_flow(item_id: str, prompt: str) -> None:
        try:
            ended.put((item_id, generate_image(prompt, f"s3://{demo_stage.BUCKET}", item_id=item_id)))
        except BaseException as error:
            ended.put((item_id, error))

    for item_id, prompt in prompts.items():
        # Daemons: an interrupted demo does not wait for them.
        threading.Thread(target=run_flow, args=(item_id, prompt), name=f"demo-{item_id}", daemon=True).start()
    while len(played.images) + len(played.errors) < len(prompts):
        interrupts.check()
        try:
            item_id, end = ended.get(timeout=0.2)
        except queue.Empty:
            continue
        if isinstance(end, BaseException):
            played.errors[item_id] = end
            progress.moved(item_id, "failed")
        else:
            played.images[item_id] = end
            progress.moved(item_id, "stored")


async def _fetch(access: S3Access) -> dict[str, bytes]:
    """What the bucket holds under images/, by item id."""
    from prefect_eachlabs.storage.s3 import S3Store

    store = S3Store(demo_stage.BUCKET, access)
    pictures = {}
    async for listed in store.list("images/"):
        found = await store.get(listed.key)
        if found is not None:
            pictures[Path(listed.key).stem] = found.body
    return pictures


def _facts(image: StoredImage) -> tuple[str, str, str]:
    """Size, seconds and cost, as a person reads them."""
    seconds = "" if image.predict_time_seconds is None else f"{image.predict_time_seconds:.1f} s"
    cost = "" if image.cost_usd is None else f"${image.cost_usd:.3f}"
    return image.size.removesuffix(" px"), seconds, cost


def _sheet(played: Played, prompts: Mapping[str, str]) -> bytes:
    from prefect_eachlabs.batch.sheet import contact_sheet, frame

    frames = []
    for item_id, prompt in prompts.items():
        facts = ", ".join(filter(None, _facts(played.images[item_id]))) if item_id in played.images else "failed"
        frames.append(frame(played.pictures.get(item_id), prompt, item_id, facts))
    return contact_sheet(
        frames, f"s3://{demo_stage.BUCKET} after {len(prompts)} runs of generate-image; drawn by the emulator"
    )


def _table(played: Played, prompts: Mapping[str, str]) -> str:
    """What was stored, a row each; on what failed, one line each."""
    rows = [("item", "S3 URI", "px", "time", "cost")]
    for item_id in prompts:
        if item_id in played.images:
            rows.append((item_id, played.images[item_id].uri, *_facts(played.images[item_id])))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([*lines, *(f"{item_id} failed: {error}" for item_id, error in played.errors.items())])


def _tallies(tallies: Mapping[str, Any]) -> str:
    """What the emulator counted, which is what the API would have billed."""
    return (
        f"The emulator counted {tallies['billed']} pictures billed, ${tallies['cost_usd']:.3f}; at most "
        f"{tallies['worst_in_flight']} of 10 in flight, {tallies['worst_window']} of 60 requests a minute."
    )
