"""Which faults the fast tests would let pass: `make mutants WING=dbscale/laws`, or run this file.

Draws places in the code of a wing at random (by --seed), plants one of cosmic-ray's faults at each, and runs the tests of
that room (tests/laws/test_fit.py for dbscale/laws/fit.py) on a copy of the checkout; what survives them meets the tests of
the whole wing. Every mutant runs in a fork that has numpy, scipy and pytest loaded: seconds instead of half a minute.
Prints a markdown line for every survivor, then the count. docs/mutation.md keeps the last results.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import multiprocessing
import os
import random
import resource
import shutil
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cosmic_ray import plugins
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code

ROOT = Path(__file__).resolve().parents[2]
ROOMS = {"form": "forms", "table": "fit"}
"""Rooms whose tests stand in another file; the others' file has their name."""
CPU_SECONDS = 90
"""A mutant that computes longer than this never ends: it counts as killed."""


@dataclass(frozen=True)
class Mutant:
    """One fault in one file."""

    path: str
    line: int
    operator: str
    source: str
    """The whole file with the fault in it."""

    def changed(self) -> str:
        """The line that the fault changes, before and after."""
        lines = zip((ROOT / self.path).read_text().splitlines(), self.source.splitlines(), strict=False)
        old, new = next(pair for pair in lines if pair[0] != pair[1])
        return f"`{old.strip()}` → `{new.strip()}`"


def meaning(source: str) -> str:
    """The code without docstrings and annotations: what no fault in those can change."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        for name in ("annotation", "returns"):
            if getattr(node, name, None) is not None:
                setattr(node, name, ast.Constant(None))
        if isinstance(getattr(node, "body", None), list):
            node.body = [n for n in node.body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]
    return ast.dump(tree)


def mutants_of(path: Path) -> Iterator[tuple[tuple[int, int], str, int]]:
    """(position, operator, occurrence) of every fault that can be planted in a file."""
    tree = get_ast(path.read_text())
    for name in plugins.operator_names():
        kind = plugins.get_operator(name)
        if kind.arguments():
            continue
        places = [start for node in ast_nodes(tree) for start, _ in kind().mutation_positions(node)]
        yield from ((start, name, k) for k, start in enumerate(places))


def draw(wing: str, count: int, seed: int) -> list[Mutant]:
    """`count` places drawn at random, one fault at each; faults in annotations and docstrings are passed over."""
    rng, found = random.Random(seed), []
    by_place: dict[tuple[str, tuple[int, int]], list[tuple[str, int]]] = defaultdict(list)
    for path in sorted((ROOT / wing).glob("*.py")):
        for start, name, k in mutants_of(path) if path.name != "__init__.py" else ():
            by_place[str(path.relative_to(ROOT)), start].append((name, k))
    places = sorted(by_place)
    rng.shuffle(places)
    for path, start in places:
        if len(found) == count:
            break
        name, k = rng.choice(by_place[path, start])
        code = (ROOT / path).read_text()
        source = mutate_code(code, plugins.get_operator(name)(), k)
        if source is not None and meaning(source) != meaning(code):
            found.append(Mutant(path, start[0], name.removeprefix("core/"), source))
    return found


def run_tests(folder: str, tests: list[str]) -> None:
    """In a fork: exit 0 where the tests pass, 1 where one fails."""
    import pytest

    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    os.chdir(folder)
    sys.path.insert(0, folder)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow and not bench", *tests])
    os._exit(int(code != 0))


def survives(folder: str, tests: list[str]) -> bool:
    """Whether the tests pass on the copy of the checkout as it stands."""
    process = multiprocessing.get_context("fork").Process(target=run_tests, args=(folder, tests))
    process.start()
    process.join()
    return process.exitcode == 0


def tests_of(path: str, *, whole: bool) -> list[str]:
    """The tests of a file's room, or of its whole wing."""
    wing, room = Path("tests") / Path(path).parent.name, Path(path).stem
    return [str(wing if whole else wing / f"test_{ROOMS.get(room, room)}.py")]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":")[0])
    parser.add_argument("wing", help="folder of the code, such as dbscale/laws")
    parser.add_argument("--count", type=int, default=250, help="mutants to draw")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--room", action="store_true", help="do not try the wing's other tests on survivors")
    parser.add_argument("--only", default="", help="rooms to run of those drawn: fit,solver")
    options = parser.parse_args()
    import numpy  # noqa: F401, loaded once for all forks
    import scipy.optimize
    import scipy.sparse
    import scipy.special
    import scipy.stats  # noqa: F401

    wanted = set(filter(None, options.only.split(",")))
    drawn = [m for m in draw(options.wing, options.count, options.seed) if not wanted or Path(m.path).stem in wanted]
    killed, total = 0, len(drawn)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("dbscale", "tests", "pyproject.toml"):
            source, target = ROOT / name, Path(folder) / name
            shutil.copytree(source, target, symlinks=True) if source.is_dir() else shutil.copy(source, target)
        tries = (False,) if options.room else (False, True)
        for tests in sorted({tuple(tests_of(m.path, whole=whole)) for m in drawn for whole in tries}):
            if not survives(folder, list(tests)):
                raise SystemExit(f"{tests[0]} fails without any fault; mend that first")
        print(f"{total} mutants of {options.wing}, seed {options.seed}", flush=True)
        for mutant in drawn:
            target = Path(folder) / mutant.path
            target.write_text(mutant.source)
            try:
                alive = all(survives(folder, tests_of(mutant.path, whole=whole)) for whole in tries)
            finally:
                shutil.copy(ROOT / mutant.path, target)
            killed += not alive
            if alive:
                print(f"| {mutant.path}:{mutant.line} | {mutant.operator} | {mutant.changed()} |", flush=True)
    print(f"{killed} of {total} killed", flush=True)


if __name__ == "__main__":
    main()
