"""The reference shows a task as its callers know it: `-> Prediction`, not the plan behind both of its forms."""

from __future__ import annotations

from typing import Any

from griffe import ExprSubscript, Extension, Function


class Doors(Extension):
    def on_function_instance(self, *, func: Function, **_: Any) -> None:
        if isinstance(func.returns, ExprSubscript) and str(func.returns.left) == "Plan":
            func.returns = func.returns.slice
