"""Ten minutes of batches with everything failing at rates, and then the books: `make soak` runs it.

    python benchmarks/soak.py                             ten minutes of faults, some fifteen in all
    python benchmarks/soak.py --minutes 1 --seed 7        a short one
    python benchmarks/soak.py --output docs/soak.md       the same, written as a page

Exit status: 0 nothing was billed twice, lost, left out or over a limit; 1 something was; 2 it could not be run.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import report
import soak_report
from processes import Trouble
from soak_chaos import Chaos
from soak_faults import ALWAYS, API_FAULTS, FILE_FAULTS
from soak_judge import Verdict, judge
from soak_report import Injected, Soaked
from soak_scenes import Scenes
from soak_world import Buyer, World

SAY_EVERY_SECONDS = 15.0
TICK_SECONDS = 0.2
BATCHES_END_WITHIN_SECONDS = 360.0
LAST_RUN_ENDS_WITHIN_SECONDS = 900.0
FIRST_MEMORY_AT_SECONDS = 60.0
SHOWN = 5


def say(text: str) -> None:
    print(text, flush=True)


class Soak:
    """One run: a stormy part, its end, a calm part, the books."""

    def __init__(self, world: World, seconds: float, seed: int) -> None:
        self._world, self._seconds, self._seed = world, seconds, seed
        self._chaos = Chaos(world, seconds, seed)
        self._scenes = Scenes(world, seed)
        self._began = time.monotonic()
        self._said_at = 0.0
        self._full_disk_ends: list[str] = []
        self._memory_mb = [0.0, 0.0]
        self._unexpected: list[str] = []

    def _now(self) -> float:
        return time.monotonic() - self._began

    def storm(self) -> None:
        """Everything fails, for so long."""
        world = self._world
        world.set_faults((*API_FAULTS, *FILE_FAULTS), s3=True)
        first_ones = (*world.pair, world.steady)
        for buyer in first_ones:
            buyer.start()
        # Importing takes seconds, and who has nothing in flight does not mind to be killed.
        while not world.emulator.tallies()["billed"] and all(buyer.is_running for buyer in first_ones):
            time.sleep(TICK_SECONDS)
        self._began = time.monotonic()
        first_memory_at = min(FIRST_MEMORY_AT_SECONDS, self._seconds / 2)
        while self._now() < self._seconds:
            self._chaos.look(self._now())
            self._scenes.look(self._now())
            self._see_to_buyers()
            if not self._memory_mb[0] and self._now() >= first_memory_at:
                self._memory_mb[0] = world.steady.memory_mb()
            self._progress("storm")
            time.sleep(TICK_SECONDS)
        self._memory_mb[1] = world.steady.memory_mb()

    def _see_to_buyers(self) -> None:
        """Who ended by itself begins again; only the one on a full disk may."""
        for buyer in (*self._world.pair, self._world.steady):
            if not buyer.is_running:
                self._note_end(buyer)
                buyer.start()

    def _note_end(self, buyer: Buyer) -> None:
        status = buyer.process.exit_status if buyer.process else None
        self._unexpected.append(f"{buyer.name} ended by itself with {status}:\n{(list(buyer.logs()) or [''])[-1]}")

    def calm(self) -> None:
        """Faults stop, batches that are under way end."""
        self._chaos.end()
        self._scenes.end()
        self._world.set_faults(ALWAYS, s3=False)
        self._world.prefect.wait()
        self._world.stop.touch()
        self._until_ended(self._world.all_buyers, BATCHES_END_WITHIN_SECONDS, "batches end")

    def last_run(self) -> tuple[Verdict, float]:
        """One more run over everything, then the books."""
        began, wanted, seen = self._now(), self._world.wanted(), self._scenes.seen
        last = self._world.start_the_last_run(wanted, self._world.replaced()[1])
        self._until_ended(last, LAST_RUN_ENDS_WITHIN_SECONDS, "last run")
        if (ended := self._world.last.process) is not None and ended.exit_status == 1:
            # It was the first to learn that a prediction ordered in the storm had failed: only then is it retried.
            self._world.last.start(source=self._world.everything, flags=("--retry-failed",))
            self._until_ended((self._world.last,), LAST_RUN_ENDS_WITHIN_SECONDS, "last run, again")
        seconds = self._now() - began
        say("reading the books")
        exceptions = [*self._unexpected, *self._world.tracebacks()]
        return judge(self._world, wanted, exceptions, (seen.not_asked, seen.not_ended)), seconds

    def _until_ended(self, buyers: Sequence[Buyer], seconds: float, what: str) -> None:
        """Waits; who takes longer is killed, and named in the verdict."""
        until = self._now() + seconds
        while running := [buyer for buyer in buyers if buyer.is_running]:
            if self._now() > until:
                self._scenes.seen.not_ended += [
                    f"{buyer.name}, life {buyer.lives}, {seconds:.0f} s after the faults" for buyer in running
                ]
                for buyer in running:
                    buyer.kill()
            self._progress(what)
            time.sleep(TICK_SECONDS)

    def _progress(self, what: str) -> None:
        now = self._now()
        if now - self._said_at < SAY_EVERY_SECONDS:
            return
        self._said_at = now
        tallies, injected = self._world.emulator.tallies(), self.injected()
        buyers = ", ".join(
            f"{buyer.name} {buyer.memory_mb():.0f} MB" + (" frozen" if buyer.is_frozen else "")
            for buyer in self._world.all_buyers
            if buyer.is_running
        )
        say(
            f"{now:5.0f} s  {what}: {injected.total:,} faults; {tallies['billed']:,} orders accepted, "
            f"{tallies['succeeded']:,} pictures paid; window {tallies['worst_window']}, "
            f"in flight {tallies['worst_in_flight']}; {buyers or 'no buyer'}"
        )

    def injected(self) -> Injected:
        """How many faults there were so far."""
        return Injected(
            self._world.emulator.tallies()["faults"],
            self._world.s3_faults(),
            {**self._chaos.counts, **self._scenes.seen.counts},
        )

    def soaked(self, minutes: float, last_run_seconds: float, load: str) -> Soaked:
        """What the run was."""
        world = self._world
        lives = [text for text in world.on_a_full_disk.logs() if text]
        ended = [one for one in world.batches() if "status" in one]
        clear = sum("prefect-eachlabs:" in text for text in lives)
        return Soaked(
            minutes=minutes,
            seed=self._seed,
            whole_minutes=self._now() / 60,
            last_run_seconds=last_run_seconds,
            exit_statuses=Counter(one["status"] for one in ended),
            full_disk_ends=f"{clear} with an error that says so, {world.on_a_full_disk.lives - clear} otherwise",
            memory_mb=(self._memory_mb[0], self._memory_mb[1]),
            memory_after_batches_mb=[one["memory_mb"] for one in ended if one["buyer"] == world.steady.name],
            load=(load, report.load_average()),
        )


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="how long everything fails (10)")
    parser.add_argument("--seed", type=int, default=0, help="draws what fails, and when (0)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the page, too")
    parser.add_argument("--prefect-home", type=Path, metavar="FOLDER", help="what the Prefect server begins with")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="leave all logs and sources here")
    arguments = parser.parse_args(words)
    if not 0.25 <= arguments.minutes <= 240:
        parser.error("--minutes: between 0.25 and 240")
    return arguments


def run(arguments: argparse.Namespace, folder: Path) -> int:
    load = report.load_average()
    say(f"{report.machine()}\nload average {load}; seed {arguments.seed}; starting servers")
    with World(folder, arguments.seed, arguments.prefect_home, arguments.minutes * 60) as world:
        soak = Soak(world, arguments.minutes * 60, arguments.seed)
        soak.storm()
        soak.calm()
        verdict, last_run_seconds = soak.last_run()
        injected = soak.injected()
        soaked = soak.soaked(arguments.minutes, last_run_seconds, load)
    for name, those in verdict.named.items():
        for one in those[:SHOWN]:
            say(f"{name}: {one}")
    say(f"\n{injected.total:,} faults injected\n{soak_report.as_text(injected.rows())}\n")
    say(soak_report.as_text([*injected.sums(), *soak_report.results(verdict, soaked)]))
    say("\nAll is well." if verdict.is_well else "\nSOMETHING IS WRONG: a number that must be 0 is not.")
    if arguments.output is not None:
        arguments.output.write_text(soak_report.document(verdict, injected, soaked), encoding="utf-8")
        say(f"Written to {arguments.output}.")
    return 0 if verdict.is_well else 1


def end_once(number: int, _: object) -> None:
    """Every process is ended on the way out; a second signal must not come between."""
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, signal.SIG_IGN)
    sys.exit(128 + number)


def main(words: Sequence[str] | None = None) -> int:
    arguments = parse(words)
    logging.basicConfig(level=logging.WARNING)
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, end_once)
    with tempfile.TemporaryDirectory(prefix="eachlabs-soak-") as temporary:
        try:
            return run(arguments, Path(temporary))
        except Trouble as trouble:
            say(f"Failed: {trouble}")
            return 2
        finally:
            if arguments.keep is not None:
                shutil.copytree(temporary, arguments.keep, dirs_exist_ok=True)


if __name__ == "__main__":
    sys.exit(main())
