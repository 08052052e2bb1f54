"""dbscale: scaling laws for visual transfer learning, and where distillation stops paying.

Four ground wings that know nothing of each other (`laws`, `study`, `kernels`, `data`), two rooms where they meet
(`training`, `report`), and `launch` on top, which decides where things run.  ARCHITECTURE.md draws the house.

The names below load on first use, so that `import dbscale` costs nothing and torch is imported only by those that need
it; their types are in `__init__.pyi`.
"""

# pyright: reportUnsupportedDunderAll=false
# A checker that reads this file, not `__init__.pyi`, cannot see names that appear on first use.
import importlib

__version__ = "0.1.0"

_HOME = {
    "load_grid": "launch.api",
    "plan": "launch.api",
    "read_rows": "launch.api",
    "compare": "launch.api",
    "find_boundary": "launch.api",
    "hunt_next": "launch.api",
    "hunt_verdicts": "launch.api",
    "fit_law": "laws",
    "select_law": "laws",
    "open_dataset": "data",
    "make_loader": "data",
    "kd_loss": "kernels",
}
__all__ = [
    "__version__", "compare", "find_boundary", "fit_law", "hunt_next", "hunt_verdicts", "kd_loss", "load_grid",
    "make_loader", "open_dataset", "plan", "read_rows", "select_law",
]  # fmt: skip


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
