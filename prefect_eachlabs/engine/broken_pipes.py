"""Logs whose reader has gone: a worker that is killed takes with it the pipe into which its runs write theirs.

The runs live on, and finish what is paid for. But rich, through which Prefect writes, takes a broken pipe for the end
of the program and raises `SystemExit` out of whatever wrote the line: a thread that others wait for among them.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import sys
from functools import partial
from typing import Any


def ignore_broken_pipes() -> None:
    """From now on a log line that nobody can read any more ends nothing; as often as one likes."""
    rich_console: Any = sys.modules.get("rich.console")
    if rich_console is None:
        return
    loggers = [one for one in logging.root.manager.loggerDict.values() if isinstance(one, logging.Logger)]
    for handler in itertools.chain.from_iterable(logger.handlers for logger in (logging.root, *loggers)):
        console = getattr(handler, "console", None)
        if isinstance(console, rich_console.Console):
            console.on_broken_pipe = partial(_into_nothing, console)


def _into_nothing(console: Any) -> None:
    """What is written from here on is lost, instead of failing each time."""
    with contextlib.suppress(OSError, ValueError):  # the file has no descriptor, or is closed
        nothing = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nothing, console.file.fileno())
        finally:
            os.close(nothing)
