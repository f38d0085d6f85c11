"""A child process for what strangers wrote: it does its job, or is ended, and the parent goes on either way."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing

import pytest

from prefect_eachlabs.confined import ConfinedProcess, JobFailed, NotInstalled, TooCostly

MIB = 1024 * 1024
IN_TIME = 30.0


@pytest.fixture(scope="module")
def process() -> Iterator[ConfinedProcess]:
    """Starting one takes as long as all jobs together."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EACHLABS_API_KEY", "a-key-of-the-team")
        with closing(ConfinedProcess("tests.confined_jobs:Job", may_grow_bytes=64 * MIB)) as one:
            yield one


def pid_of(process: ConfinedProcess) -> int:
    answer, _ = process.call({"do": "tell"}, seconds=IN_TIME)
    return int(answer["pid"])


def test_jobs_are_done_in_one_other_process_that_does_not_have_the_workers_secrets(process: ConfinedProcess) -> None:
    answer, data = process.call({"do": "tell"}, b"abc", seconds=IN_TIME)
    assert (answer["pid"] != os.getpid(), data) == (True, b"cba")
    assert not [name for name in answer["environment"] if name.startswith(("EACHLABS", "AWS", "PREFECT"))]
    assert pid_of(process) == answer["pid"]


def test_a_job_may_read_what_only_the_parent_can(process: ConfinedProcess) -> None:
    _, data = process.call({"do": "ask"}, seconds=IN_TIME, read=lambda offset, size: b"012345"[offset : offset + size])
    assert data == b"2340"


def test_what_the_parent_cannot_read_is_the_callers_error_and_the_next_job_is_done(process: ConfinedProcess) -> None:
    def lost(offset: int, size: int) -> bytes:
        raise RuntimeError("the bucket is away")

    with pytest.raises(RuntimeError, match="the bucket is away"):
        process.call({"do": "ask"}, seconds=IN_TIME, read=lost)
    assert pid_of(process)


@pytest.mark.parametrize(("do", "said"), [("refuse", "^no$"), ("what", "RuntimeError: not known")])
def test_a_job_that_raises_says_why_and_its_process_goes_on(process: ConfinedProcess, do: str, said: str) -> None:
    before = pid_of(process)
    with pytest.raises(JobFailed, match=said):
        process.call({"do": do}, seconds=IN_TIME)
    assert pid_of(process) == before


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux alone")
def test_a_job_that_needs_too_much_memory_is_given_up(process: ConfinedProcess) -> None:
    assert process.call({"do": "fill", "bytes": 32 * MIB}, seconds=IN_TIME)[0] == {"filled": 32 * MIB}
    with pytest.raises(TooCostly, match="needs more than 64 MB"):
        process.call({"do": "fill", "bytes": 96 * MIB}, seconds=IN_TIME)
    assert pid_of(process)


@pytest.mark.parametrize(("do", "seconds"), [("spin", 0.1), ("fall", IN_TIME)])
def test_a_job_without_end_or_that_falls_costs_its_process_alone(
    process: ConfinedProcess, do: str, seconds: float
) -> None:
    before = pid_of(process)
    with pytest.raises(TooCostly):
        process.call({"do": do}, seconds=seconds)
    assert not os.path.exists(f"/proc/{before}")
    assert pid_of(process) != before


def test_a_library_that_is_missing_is_named() -> None:
    with (
        closing(ConfinedProcess("tests.confined_jobs:Missing")) as process,
        pytest.raises(NotInstalled, match="a_library_that_nobody_has"),
    ):
        process.call({}, seconds=IN_TIME)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_fork_of_the_worker_uses_a_child_of_its_own_and_leaves_its_parents_alone(process: ConfinedProcess) -> None:
    before = pid_of(process)
    forked = os.fork()
    if forked == 0:
        os._exit(0 if pid_of(process) != before else 1)
    assert os.waitpid(forked, 0)[1] == 0
    assert pid_of(process) == before


@pytest.mark.skipif(sys.platform != "linux", reason="pidfds are Linux's")
def test_the_child_ends_with_a_worker_that_is_killed() -> None:
    code = (
        "import sys; from prefect_eachlabs.confined import ConfinedProcess;"
        "process = ConfinedProcess('tests.confined_jobs:Job');"
        "print(process.call({'do': 'tell'}, seconds=30)[0]['pid'], flush=True);"
        "sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as worker:
        assert worker.stdout is not None
        child = int(worker.stdout.readline())
        ended = os.pidfd_open(child)
        worker.kill()
    try:
        assert select.select([ended], [], [], IN_TIME)[0], "the child outlives its worker"
    finally:
        os.close(ended)
