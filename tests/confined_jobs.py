"""What `test_confined.py` has done in the child: in a module that is imported in no time."""

from __future__ import annotations

import os
import signal
from typing import Any

from prefect_eachlabs.confined import Answer, JobFailed, Read


class Job:
    """Does what it is told."""

    def __call__(self, arguments: dict[str, Any], data: bytes, read: Read) -> Answer:
        match arguments["do"]:
            case "tell":
                print("what a library prints is no answer")
                return {"pid": os.getpid(), "environment": sorted(os.environ)}, data[::-1]
            case "fill":
                return {"filled": len(bytearray(arguments["bytes"]))}, b""
            case "spin":
                while True:
                    pass
            case "fall":
                os.kill(os.getpid(), signal.SIGSEGV)
            case "ask":
                return {}, read(2, 3) + read(0, 1)
            case "refuse":
                raise JobFailed("no")
        raise RuntimeError("not known")


class Missing:
    def __init__(self) -> None:
        import a_library_that_nobody_has  # type: ignore[import-not-found]  # noqa: F401
