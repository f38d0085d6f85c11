"""The account that the environment describes: its gateway, its settings, and who counts its slots."""

# ruff: noqa: PLC0415 - what is heavy is imported when a command runs, so that help and refusals answer at once

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prefect_eachlabs.engine.runtime import Gateway, MakeLimiter
    from prefect_eachlabs.settings import AccountSettings


@contextmanager
def account_gateway() -> Iterator[Gateway]:
    """The gateway of the environment's account, closed in the end."""
    from prefect_eachlabs.engine.runtime import close_gateways, gateway_for

    try:
        yield gateway_for(make_limiter=limiter_maker())
    finally:
        close_gateways()


def limiter_maker() -> MakeLimiter | None:
    """Who counts the slots: the Prefect server's limits where one may be configured, else this machine's."""
    if not may_have_prefect_server(os.environ, Path.cwd()):
        return None
    from prefect_eachlabs.limits.prefect_leases import limiter_for

    return limiter_for


def may_have_prefect_server(environ: Mapping[str, str], folder: Path) -> bool:
    """Whether Prefect's settings may name a server; only Prefect can tell, and asking it takes two seconds."""
    if environ.get("PREFECT_API_URL"):
        return True
    home = Path(environ.get("PREFECT_HOME") or "~/.prefect").expanduser()
    if Path(environ.get("PREFECT_PROFILES_PATH") or home / "profiles.toml").exists():
        return True
    # Prefect reads these files of the working directory, too.
    for name, sign in ((".env", "PREFECT_"), ("prefect.toml", ""), ("pyproject.toml", "tool.prefect")):
        try:
            if sign in (folder / name).read_text(encoding="utf-8", errors="replace"):
                return True
        except OSError:
            continue
    return False


def account_for_the_server() -> AccountSettings:
    """The account of the environment, for work on the Prefect server alone, which needs no key.

    Raises:
        SetupError: A setting is out of bounds.
    """
    from prefect_eachlabs.settings import ENVIRONMENT, settings_from_environment

    if os.environ.get(ENVIRONMENT["api_key"], "").strip():
        return settings_from_environment()
    return settings_from_environment(api_key="none")
