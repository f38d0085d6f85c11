"""`python -m prefect_eachlabs` is the command `prefect-eachlabs`."""

from __future__ import annotations

from prefect_eachlabs.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
