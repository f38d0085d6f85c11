"""`prefect-eachlabs demo`: prompts become pictures in a bucket through a real flow, with nothing set up."""

# ruff: noqa: PLC0415 - what is heavy is imported when the command runs, Prefect only in an environment of the demo's

from __future__ import annotations

import asyncio
import logging
import re
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

from cyclopts import validators

from prefect_eachlabs.cli import demo_stage
from prefect_eachlabs.cli.options import Port, flag, positive
from prefect_eachlabs.errors import BadInput, SetupError

if TYPE_CHECKING:
    from prefect_eachlabs.batch.outcomes import BatchResult
    from prefect_eachlabs.storage.s3_client import S3Access

BATCH = "demo"
REPORT = ("index.html", "contact-sheet.png", "report.json", "report.jsonl")
PICTURES = 6

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
In the browser, in the Prefect UI: prefect-eachlabs demo --ui
"""


def demo(
    *,
    ui: Annotated[bool, flag("the Prefect UI instead, with a picture, a batch and forms, until Ctrl-C")] = False,
    output: Annotated[Path | None, flag("folder for the pictures (demo-output)")] = None,
    pictures: Annotated[int | None, flag("1 to 12 (6)", validator=validators.Number(gte=1, lte=len(PROMPTS)))] = None,
    port: Annotated[Port | None, flag("of the Prefect UI (a free one); only with --ui")] = None,
    service_seconds: Annotated[float, flag("the emulator's time a picture (5)", validator=positive)] = 5.0,
) -> NoReturn:
    """Pictures from the emulator into a local S3, through a real flow; nothing to set up.

    They end in the folder, with the report's page: open its index.html.

    With --ui, Prefect's server, a worker and the deployments of `setup --deploy` are
    there to click through, and end with it.
    """
    clock = demo_stage.Clock()
    demo_stage.refuse_what_cannot_work()
    if ui and (output or pictures):
        raise BadInput(
            "--ui shows its pictures in the Prefect UI: --output and --pictures are for the demo without it."
        )
    if port is not None and not ui:
        raise BadInput("--port is that of the Prefect UI: give --ui, too.")
    numbered = {f"{number:02d}-{name}": prompt for number, (name, prompt) in enumerate(PROMPTS.items(), 1)}
    folder = Path() if ui else _folder(output or Path("demo-output"))
    status = 0
    try:
        with demo_stage.Interrupts() as interrupts:
            clock.say("starting an emulator of the API, a local S3, and Prefect's server, which takes some 10 s")
            if ui:
                from prefect_eachlabs.cli.demo_ui import show

                first, *others = numbered.items()
                show(
                    first,
                    dict(others[:10]),
                    port=port or 0,
                    service_seconds=service_seconds,
                    interrupts=interrupts,
                    clock=clock,
                )
                print("All of it has ended.")
            else:
                prompts = dict(list(numbered.items())[: pictures or PICTURES])
                status = _buy(prompts, set(numbered), folder, service_seconds, interrupts, clock)
    except KeyboardInterrupt:
        print("Interrupted. The demo and all that it started have ended.", file=sys.stderr)
        demo_stage.leave(130)
    except SetupError as error:
        print(f"prefect-eachlabs: {error}", file=sys.stderr)
        demo_stage.leave(2)
    demo_stage.leave(status)


def _folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SetupError(f"--output {path}: {error.strerror}. Choose another folder.") from error
    return path.resolve()


def _buy(
    prompts: Mapping[str, str],
    every_name: set[str],
    output: Path,
    service_seconds: float,
    interrupts: demo_stage.Interrupts,
    clock: demo_stage.Clock,
) -> int:
    """The pictures in the folder, and what became of them on the terminal; the exit status."""
    with demo_stage.folder_of_its_own(interrupts) as folder:
        demo_stage.replace_environment(folder)
        with demo_stage.Stage(interrupts, service_seconds=service_seconds) as stage:
            clock.say(f"they are there; {len(prompts)} prompts are on their way, some {service_seconds:g} s each")
            result = _run_flow(prompts, interrupts, clock)
            files = asyncio.run(_fetch(stage.s3.access))
            tallies = stage.emulator.tallies()
    # Only what an earlier demo may have left: the folder may hold files of the user's own.
    for name in (*REPORT, *(f"{item_id}.png" for item_id in every_name)):
        (output / name).unlink(missing_ok=True)
    for name, data in files.items():
        (output / name).write_bytes(data)
    came = f"{result.stored} of {result.items} pictures{f' ({result.why})' if result.why else ''}, {result.money}"
    print(f"\n{came}, and a page of them: {output / 'index.html'}")
    print(f"{_tallies(tallies)} All of it took {clock.seconds:.0f} s.\n\n{CLOSING}", end="")
    return 0 if result.is_complete and {f"{item_id}.png" for item_id in prompts} <= set(files) else 1


def _run_flow(prompts: Mapping[str, str], interrupts: demo_stage.Interrupts, clock: demo_stage.Clock) -> BatchResult:
    """One run of a flow over the prompts, in a thread: an interrupted demo does not wait for it."""
    from prefect import flow

    from prefect_eachlabs import generate_rows

    logging.getLogger("prefect.task_runs").addHandler(Progress(list(prompts), clock))
    rows = [{"id": item_id, "prompt": prompt} for item_id, prompt in prompts.items()]

    @flow(name=BATCH)
    def pictures() -> BatchResult:
        return generate_rows(rows, destination=f"s3://{demo_stage.BUCKET}", chunk_size=1)

    ended = ThreadPoolExecutor(1, thread_name_prefix="demo").submit(pictures)
    while not ended.done():
        interrupts.check()
        wait([ended], timeout=0.2)
    return ended.result()


class Progress(logging.Handler):
    """Says what became of each row, read in Prefect's log lines about the task runs of rows."""

    def __init__(self, item_ids: list[str], clock: demo_stage.Clock) -> None:
        super().__init__(logging.INFO)
        self._item_ids, self._clock = item_ids, clock

    def emit(self, record: logging.LogRecord) -> None:
        row = re.fullmatch(r"rows (\d+) to \1", str(getattr(record, "task_run_name", "")))
        end = re.fullmatch(r"1 (\w+)", record.getMessage())
        if row and end:
            self._clock.say(f"{self._item_ids[int(row[1]) - 1]:<16} {end[1]}")


async def _fetch(access: S3Access) -> dict[str, bytes]:
    """Pictures and report by their names in one folder."""
    from prefect_eachlabs.storage.s3 import S3Store

    store = S3Store(demo_stage.BUCKET, access)
    keys = [listed.key async for listed in store.list("images/")] + [f"batches/{BATCH}/{name}" for name in REPORT]
    files = {}
    for key in keys:
        found = await store.get(key)
        if found is not None:
            files[key.rpartition("/")[2]] = found.body
    # In the bucket the pictures lie two folders above the page.
    files["index.html"] = files["index.html"].replace(b'"../../images/', b'"')
    return files


def _tallies(tallies: Mapping[str, Any]) -> str:
    """What the emulator counted, which is what the API would have billed."""
    return (
        f"The emulator counted {tallies['billed']} pictures billed, ${tallies['cost_usd']:.3f}; at most "
        f"{tallies['worst_in_flight']} of 10 in flight, {tallies['worst_window']} of 60 requests a minute."
    )
