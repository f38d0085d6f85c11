"""Names of a package that load on first use, so that `prefect-eachlabs --help` and a worker's start stay quick."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def late(package: str, names: Mapping[str, str]) -> tuple[list[str], Callable[[str], Any], Callable[[], list[str]]]:
    """A package's `__all__`, `__getattr__` and `__dir__`.

    Args:
        package: Its `__name__`.
        names: Module within the package → the public names it holds, in one string.
    """
    module_of = {name: module for module, held in names.items() for name in held.split()}

    def get(name: str) -> Any:
        if name == "__version__":
            return importlib.import_module("importlib.metadata").version("prefect-eachlabs")
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{package}.{module_of[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    return sorted(module_of), get, lambda: sorted({*vars(sys.modules[package]), *module_of})
