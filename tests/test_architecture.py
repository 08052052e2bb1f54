"""The house holds: floors and wings, no circles, no torch where a login node waits, rooms of a readable size.

Walks every import statement in the source, so an arrow cannot hide in a function.
"""

from __future__ import annotations

import ast
import graphlib
import statistics
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("dbscale", "launch", "shards")
"""Where source lies; `dbscale/launch` and `dbscale/shards` are links to the folders beside it, one package for all."""
GROUND = {"dbscale.errors", "dbscale.files", "dbscale.strict", "dbscale.keyed", "dbscale.plugins"}
"""What every wing may import."""
FLOOR = {
    "dbscale": 0, "dbscale.laws": 1, "dbscale.study": 1, "dbscale.kernels": 1, "dbscale.data": 1,
    "dbscale.report": 2, "dbscale.training": 2, "dbscale.shards": 2, "dbscale.launch": 3,
}  # fmt: skip
ARROWS = {
    ("dbscale.training", "dbscale.study"), ("dbscale.training", "dbscale.data"),
    ("dbscale.training", "dbscale.kernels"), ("dbscale.report", "dbscale.study"), ("dbscale.report", "dbscale.laws"),
    ("dbscale.shards", "dbscale.data"), ("dbscale.launch", "dbscale.study"), ("dbscale.launch", "dbscale.training"),
    ("dbscale.launch", "dbscale.report"), ("dbscale.launch", "dbscale.shards"), ("dbscale.launch", "dbscale.laws"),
    ("dbscale.launch", "dbscale.data"),
}  # fmt: skip
"""Every pair of wings that may touch; anything else is a new decision and belongs in ARCHITECTURE.md first."""
FORBIDDEN = {
    "dbscale.laws": {"torch", "pydantic", "yaml", "pandas", "sklearn"},
    "dbscale.study": {"torch", "numpy", "scipy", "accelerate", "timm", "submitit"},
    "dbscale.report": {"torch", "accelerate", "timm", "submitit"},
    "dbscale.kernels": {"accelerate", "deepspeed", "scipy", "pydantic"},
    "dbscale.data": {"accelerate", "deepspeed", "scipy", "submitit"},
}


def source_files() -> list[Path]:
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts if parts[0] == "dbscale" else ("dbscale", *parts)).removesuffix(".__init__")


def wing(module: str) -> str:
    parts = module.split(".")
    if module in GROUND:
        return "dbscale"
    return ".".join(parts[:2]) if parts[0] == "dbscale" and len(parts) > 1 else parts[0]


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imports(path: Path) -> Iterator[str]:
    """Full names of every module that `path` imports, at the top or inside functions."""
    modules = {module_name(each) for each in source_files()}
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            base = node.module or ""
            for alias in node.names:
                yield f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules else base


FILES = pytest.mark.parametrize("path", source_files(), ids=module_name)


@FILES
def test_imports_run_down_the_floors(path: Path) -> None:
    here = wing(module_name(path))
    for target in {wing(name) for name in imports(path) if name.split(".")[0] == "dbscale"}:
        if target in (here, "dbscale"):
            continue
        assert FLOOR[target] < FLOOR[here], f"{here} (floor {FLOOR[here]}) imports {target} (floor {FLOOR[target]})"
        assert (here, target) in ARROWS, f"{here} → {target} is a new arrow between wings"


@FILES
def test_wings_keep_to_their_packages(path: Path) -> None:
    used = {name.split(".")[0] for name in imports(path)}
    assert not used & FORBIDDEN.get(wing(module_name(path)), set())


def test_no_module_imports_itself_in_a_circle() -> None:
    modules = {module_name(path): path for path in source_files()}
    graph = {
        name: {each for each in imports(path) if each in modules and each != name} for name, path in modules.items()
    }
    list(graphlib.TopologicalSorter(graph).static_order())


def test_no_two_folders_import_each_other() -> None:
    """A folder and the one it lies in may; `launch/commands` and `launch/slurm` may not."""
    graph: dict[str, set[str]] = {}
    for path in source_files():
        here = module_name(path.parent / "__init__.py")
        for name in imports(path):
            there = name if (ROOT / name.replace(".", "/")).is_dir() else name.rpartition(".")[0]
            nested = f"{here}.".startswith(f"{there}.") or f"{there}.".startswith(f"{here}.")
            if name.split(".")[0] == "dbscale" and not nested:
                graph.setdefault(here, set()).add(there)
    list(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("command", [["--help"], ["plan", "--help"], ["status", "--help"]])
def test_the_command_starts_without_heavy_packages(command: list[str]) -> None:
    code = (
        "import sys, contextlib\n"
        "from dbscale.launch.cli import main\n"
        f"with contextlib.suppress(SystemExit): main({command!r})\n"
        "heavy = {'torch', 'scipy', 'sklearn', 'altair', 'vl_convert', 'pyarrow', 'deepspeed'} & set(sys.modules)\n"
        "sys.exit(f'imported at start-up: {sorted(heavy)}' if heavy else 0)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_a_wheel_puts_one_package_on_the_path(tmp_path: Path) -> None:
    """With no `launch`, `shards` or `configs` beside it that others might have too; the shipped configs travel inside."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {"dbscale"}
    assert {"dbscale/launch/cli.py", "dbscale/shards/pack.py", "dbscale/configs/grids/demo.yaml"} <= set(names)


@FILES
def test_files_tell_one_story(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= 600, f"{lines} lines: this is more than one story"


@FILES
def test_every_module_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(tree(path)), "a module begins with its purpose"


def is_kernel(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """A Triton kernel's loop carries its state in local names, which it cannot hand to another function to change."""
    return any(ast.unparse(decorator).startswith("triton.jit") for decorator in node.decorator_list)


def functions() -> Iterator[tuple[str, int]]:
    for path in source_files():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not is_kernel(node):
                first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
                yield f"{module_name(path)}.{node.name}", (node.end_lineno or first.lineno) - first.lineno + 1


def test_functions_are_short() -> None:
    lengths = dict(functions())
    too_long = {name: lines for name, lines in lengths.items() if lines > 40}
    assert not too_long
    assert statistics.median(lengths.values()) <= 10
