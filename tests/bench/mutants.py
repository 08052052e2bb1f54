"""Which faults the fast tests would let pass: `make mutants WING=dbscale/laws`, or run this file.

Draws places in the code of a wing at random (by --seed) and plants one of cosmic-ray's faults at each, on a copy of the
checkout. Every mutant meets the tests that reach its statement, those of its own room (tests/laws/test_fit.py for
dbscale/laws/fit.py) first, the quick ones before the slow ones, up to --budget seconds of them. It runs in a fork that
has numpy, scipy and pytest loaded, so that 250 mutants take minutes. Prints a markdown line for every survivor, then the
count; docs/mutation.md keeps the last results.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import coverage
import pytest
from cosmic_ray import plugins
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code

ROOT = Path(__file__).resolve().parents[2]
ROOMS = {"laws/form": "forms", "laws/table": "fit", "report/reader": "table", "report/sheet": "table"}
"""Rooms whose tests stand in another file."""
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
    original: str
    """The file without it."""

    def changed(self) -> str:
        """The line that the fault changes, before and after."""
        lines = zip(self.original.splitlines(), self.source.splitlines(), strict=False)
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
    nodes = list(ast_nodes(get_ast(path.read_text())))
    for name in plugins.operator_names():
        kind = plugins.get_operator(name)
        if not kind.arguments():
            operator = kind()
            places = (start for node in nodes for start, _ in operator.mutation_positions(node))
            yield from ((start, name, k) for k, start in enumerate(places))


def draw(wing: str, count: int, seed: int) -> list[Mutant]:
    """`count` places drawn at random, one fault at each; faults in annotations and docstrings are passed over."""
    rng, found = random.Random(seed), []
    by_place: dict[tuple[str, tuple[int, int]], list[tuple[str, int]]] = defaultdict(list)
    for path in sorted((ROOT / wing).glob("*.py")):
        for start, name, k in mutants_of(path) if path.name != "__init__.py" else ():
            by_place[str(path.relative_to(ROOT)), start].append((name, k))
    places, code_of = sorted(by_place), {path: (ROOT / path).read_text() for path, _ in by_place}
    means = {path: meaning(code) for path, code in code_of.items()}
    rng.shuffle(places)
    for path, start in places:
        if len(found) == count:
            break
        name, k = rng.choice(by_place[path, start])
        # A fault in punctuation is none that tests could let pass; cosmic-ray cannot replace a dotted exception.
        with contextlib.suppress(SyntaxError, AttributeError):
            source = mutate_code(code_of[path], plugins.get_operator(name)(), k)
            if source is not None and meaning(source) != means[path]:
                found.append(Mutant(path, start[0], name.removeprefix("core/"), source, code_of[path]))
    return found


class Coverage:
    """A pytest plugin that writes down which test reaches which line of the wing, and how long each takes."""

    def __init__(self, folder: str, wing: str) -> None:
        self.coverage = coverage.Coverage(data_file=None, include=[f"{folder}/{wing}/*"])
        self.seconds: dict[str, float] = {}

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.coverage.switch_context(item.nodeid)
        start = time.process_time()
        yield
        self.seconds[item.nodeid] = time.process_time() - start
        self.coverage.switch_context("")


def run_tests(folder: str, tests: Sequence[str], wing: str = "", out: str = "") -> None:
    """In a fork: exit with pytest's code; with `out`, write {file: {line: tests}} and {test: seconds} there."""
    os.chdir(folder)
    sys.path.insert(0, folder)
    plugin = Coverage(folder, wing) if out else None
    if plugin is None:
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    else:
        plugin.coverage.start()
    options = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow and not bench and not gpu and not slurm"]
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.redirect_stderr(io.StringIO()):
        code = int(pytest.main([*options, *tests], plugins=[plugin] if plugin else None))
    if plugin is not None:
        plugin.coverage.stop()
        data = plugin.coverage.get_data()
        lines = {str(Path(f).relative_to(folder)): data.contexts_by_lineno(f) for f in data.measured_files()}
        Path(out).write_bytes(pickle.dumps((lines, plugin.seconds, text.getvalue()[-2000:])))
    os._exit(code)


def in_fork(*arguments) -> int | None:
    """Exit code of `run_tests` in a process of its own."""
    process = multiprocessing.get_context("fork").Process(target=run_tests, args=arguments)
    process.start()
    process.join()
    return process.exitcode


def reached_lines(folder: str, wing: str) -> tuple[Mapping, Mapping[str, float]]:
    """Which tests reach each line of each file, and how long each takes; ends where they fail without any fault."""
    out = Path(folder) / "coverage.pickle"
    code = in_fork(folder, [f"tests/{Path(wing).name}"], wing, str(out))
    lines, seconds, text = pickle.loads(out.read_bytes())
    if code:
        raise SystemExit(f"the tests of {wing} fail without any fault; mend that first:\n{text}")
    return lines, seconds


def statement_at(source: str, line: int) -> range:
    """Lines of the smallest statement that holds this line."""
    spans = [
        range(n.lineno, (n.end_lineno or n.lineno) + 1) for n in ast.walk(ast.parse(source)) if isinstance(n, ast.stmt)
    ]
    return min((span for span in spans if line in span), key=len, default=range(line, line + 1))


def tests_for(mutant: Mutant, lines: Mapping, seconds: Mapping[str, float], budget: float) -> list[str]:
    """Tests that reach the mutant's statement, its room's first and the quick ones before the slow, within the budget."""
    reached = lines.get(mutant.path, {})
    span = statement_at(mutant.original, mutant.line)
    found = {test for line in span for test in reached.get(line, ()) if test}
    path = Path(mutant.path)
    wing, stem = path.parent.name, path.stem
    room = f"tests/{wing}/test_{ROOMS.get(f'{wing}/{stem}', stem)}.py"
    if not budget:
        return [room]
    found = found or {test for test in seconds if test.startswith(room)}  # what runs at import
    ordered = sorted(found, key=lambda test: (not test.startswith(room), seconds.get(test, 0.0)))
    total = list(accumulate(seconds.get(test, 0.0) for test in ordered))
    return [test for test, sum_so_far in zip(ordered, total, strict=True) if sum_so_far <= budget] or ordered[:1]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":")[0])
    parser.add_argument("wing", help="folder of the code, such as dbscale/laws")
    parser.add_argument("--count", type=int, default=250, help="mutants to draw")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget", type=float, default=20.0, help="seconds of tests that a mutant meets at most; "
                        "0: its room's tests, whatever they reach")  # fmt: skip
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
        for name in ("dbscale", "launch", "shards", "configs", "docs", "tests", "pyproject.toml"):
            source, target = ROOT / name, Path(folder) / name
            shutil.copytree(source, target, symlinks=True) if source.is_dir() else shutil.copy(source, target)
        lines, seconds = reached_lines(folder, options.wing) if options.budget else ({}, {})
        print(f"{total} mutants of {options.wing}, seed {options.seed}", flush=True)
        for mutant in drawn:
            target = Path(folder) / mutant.path
            target.write_text(mutant.source)
            try:
                alive = in_fork(folder, tests_for(mutant, lines, seconds, options.budget)) == 0
            finally:
                target.write_text(mutant.original)
            killed += not alive
            if alive:
                print(f"| {mutant.path}:{mutant.line} | {mutant.operator} | {mutant.changed()} |", flush=True)
    print(f"{killed} of {total} killed", flush=True)


if __name__ == "__main__":
    main()
