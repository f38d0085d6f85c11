"""A log that nobody reads any more ends nothing."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from io import StringIO

import pytest
from rich.console import Console

from prefect_eachlabs.engine.broken_pipes import ignore_broken_pipes


class ConsoleHandler(logging.Handler):
    """As Prefect's: through rich."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        self.console.print(self.format(record))


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    logger = logging.getLogger("tests.broken_pipes")
    logger.propagate = False
    yield logger
    for handler in list(logger.handlers):
        logger.removeHandler(handler)


@pytest.fixture
def unread() -> Iterator[int]:
    """The end of a pipe whose other end is closed."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    yield write_end
    os.close(write_end)


def test_a_log_line_without_a_reader_would_end_the_program(logger: logging.Logger, unread: int) -> None:
    """What rich does without us; it also points stdout at nothing, which is put right here."""
    stdout = os.dup(sys.stdout.fileno())
    try:
        with os.fdopen(os.dup(unread), "w", closefd=True) as pipe:
            logger.addHandler(ConsoleHandler(Console(file=pipe)))
            with pytest.raises(SystemExit):
                logger.warning("the server does not answer")
            with open(os.devnull, "w", encoding="utf-8") as nothing:
                os.dup2(nothing.fileno(), pipe.fileno())  # so that closing it does not fail again
    finally:
        os.dup2(stdout, sys.stdout.fileno())
        os.close(stdout)


def test_a_worker_that_died_does_not_end_the_run_that_writes_to_it(logger: logging.Logger, unread: int) -> None:
    with os.fdopen(os.dup(unread), "w") as pipe:
        logger.addHandler(ConsoleHandler(Console(file=pipe)))
        ignore_broken_pipes()
        for _ in range(3):
            logger.warning("the server does not answer")


def test_a_console_without_a_file_is_left_alone(logger: logging.Logger) -> None:
    text = StringIO()
    logger.addHandler(ConsoleHandler(Console(file=text)))
    ignore_broken_pipes()
    ignore_broken_pipes()
    logger.warning("said")
    assert text.getvalue() == "said\n"
