"""What tests of your own flows need: the emulator of the API, and an S3 of your own (extra `demo`).

A fixture: `pytest_plugins = ["prefect_eachlabs.testing.pytest_plugin"]`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefect_eachlabs._late import late

if TYPE_CHECKING:
    from prefect_eachlabs.testing.emulator.options import EmulatorOptions as EmulatorOptions
    from prefect_eachlabs.testing.emulator.server import EmulatorServer as EmulatorServer
    from prefect_eachlabs.testing.s3 import LocalS3 as LocalS3
else:
    __all__, __getattr__, __dir__ = late(
        __name__, {"emulator.options": "EmulatorOptions", "emulator.server": "EmulatorServer", "s3": "LocalS3"}
    )
