"""A stand-in for the Eachlabs API that keeps its rules, so that a program that is good here is good there.

It is a judge: it counts what was billed, the worst minute, the worst number in flight, and every request.
"""

from prefect_eachlabs.testing.emulator.app import create_app
from prefect_eachlabs.testing.emulator.clock import Clock
from prefect_eachlabs.testing.emulator.faults import Fault, kinds_of
from prefect_eachlabs.testing.emulator.options import EmulatorOptions
from prefect_eachlabs.testing.emulator.server import EmulatorServer, run_emulator
from prefect_eachlabs.testing.emulator.state import Emulator
from prefect_eachlabs.testing.emulator.transport import InProcessTransport

__all__ = [
    "Clock",
    "Emulator",
    "EmulatorOptions",
    "EmulatorServer",
    "Fault",
    "InProcessTransport",
    "create_app",
    "kinds_of",
    "run_emulator",
]
