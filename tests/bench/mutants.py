"""Which faults the fast tests would let pass: `make mutants WING=dbscale/laws`, or run this file.

Draws places in the code of a wing at random (by --seed) and plants one of cosmic-ray's faults at each, on a copy of the
checkout. Every mutant meets the tests of its own room (tests/laws/test_fit.py for dbscale/laws/fit.py): those that reach
its statement first, and the quick ones before the slow ones. With --budget it meets those of the whole wing that reach it,
up to so many seconds of them. It runs in a fork that has the heavy libraries loaded, so that 250 mutants take minutes.
Prints a markdown line for every survivor, then the count; docs/mutation.md keeps the last results.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import io
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import coverage
import pytest
from cosmic_ray import plugins
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code

ROOT = Path(__file__).resolve().parents[2]
ROOMS = {
    "laws/form": "laws/forms", "laws/table": "laws/fit",
    "report/reader": "report/table", "report/sheet": "report/sheet report/table",
    "report/schema": "report/schemas report/findings",
    "study/recipe": "study/recipe study/cell study/task", "study/grid": "study/grid study/hunt study/task study/weights",
    "study/cost": "study/cost study/grid", "study/resources": "study/resources study/recipe",
    "data/geometry": "data/augment", "data/target": "data/dense",
    "shards/coco": "shards/dense_sources", "shards/maskfolder": "shards/dense_sources",
    "shards/scenes": "shards/dense_sources", "shards/target": "shards/dense_sources",
    "shards/publish": "shards/command", "shards/sources": "shards/source", "shards/tar": "shards/pack",
    "training/feed": "training/run", "training/graph": "training/run", "training/evaluation": "training/results",
    "training/models": "training/models training/prepare",
    "training/dense": "training/segmentation training/detection",
    "training/tasks": "training/segmentation training/detection", "training/loop": "training/run",
    "launch/api": "api", "launch/sbatch_options": "launch/cluster", "launch/smoke": "launch/preflight",
    "launch/study": "launch/cli launch/plan launch/preflight",
    "launch/submitit_names": "launch/slurm_queue launch/slurm_submit",
    "launch/commands/work": "launch/work", "launch/commands/hunt": "launch/hunt",
    "launch/commands/cells": "launch/cli", "launch/commands/laws": "launch/fit launch/cli",
    "launch/commands/plan": "launch/plan launch/cli", "launch/commands/results": "launch/cli launch/slurm_reducer",
    "launch/commands/shards": "shards/command", "launch/commands/submit": "launch/cli launch/slurm_submit",
}  # fmt: skip
"""Rooms whose tests stand in other files: the names of those, without `tests` and `test_`."""
NUMBERS = ("numpy", "scipy.optimize", "scipy.sparse", "scipy.special", "scipy.stats", "pydantic")
TORCH = (*NUMBERS, "torch", "torchvision", "timm", "PIL.Image")
HEAVY = {"laws": NUMBERS, "report": (*NUMBERS, "altair", "pyarrow.parquet"), "study": NUMBERS, "launch": NUMBERS,
         "training": TORCH, "kernels": TORCH, "data": TORCH, "shards": TORCH}  # fmt: skip
"""Loaded once for all forks, before the tests run without a fault: what does not bear it is seen there."""
MOVED = 60
"""Lines that code may have moved by since the log of an earlier run was written."""
PATIENCE = 4.0
"""A mutant that takes so many times as long as its tests without a fault never ends: it counts as killed."""


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
    for path in sorted((ROOT / wing).rglob("*.py")):
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


def survivors_of(log: Path) -> list[Mutant]:
    """The mutants that an earlier run printed, planted in the code of today; what is gone from it is passed over."""
    found = []
    for told in (line for line in log.read_text().splitlines() if line.startswith("| ")):
        (path, line), name, changed = told.split(" | ")[0][2:].split(":"), *told.removesuffix(" |").split(" | ", 2)[1:]
        code, near = (ROOT / path).read_text(), []
        for start, operator, k in mutants_of(ROOT / path):
            if operator.removeprefix("core/") == name and abs(start[0] - int(line)) <= MOVED:
                with contextlib.suppress(SyntaxError, AttributeError):
                    source = mutate_code(code, plugins.get_operator(operator)(), k)
                    if source is not None and source != code:
                        near.append(Mutant(path, start[0], name, source, code))
        alike = [mutant for mutant in near if mutant.changed() == changed]
        if alike:
            found.append(min(alike, key=lambda mutant: abs(mutant.line - int(line))))
        else:
            print(f"gone: {told}", file=sys.stderr)
    return found


@dataclass
class Record:
    """What the tests do without any fault."""

    lines: dict[str, dict[int, list[str]]]
    """File -> line -> tests that reach it."""
    seconds: dict[str, float]
    """Test -> how long it takes with its fixtures."""


class Recorder:
    """A pytest plugin that keeps a Record of one wing."""

    def __init__(self, folder: str, wing: str) -> None:
        self.folder, self.fixtures, self.calls = folder, {}, {}
        self.coverage = coverage.Coverage(data_file=None, include=[f"{folder}/{wing}/*"])
        self.coverage.start()

    @pytest.hookimpl(hookwrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.fixtures[fixturedef.argname] = time.perf_counter() - start

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Function) -> Iterator[None]:
        self.coverage.switch_context(item.nodeid)
        yield
        self.coverage.switch_context("")

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_call(self, item: pytest.Function) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.calls[item.nodeid] = time.perf_counter() - start, tuple(item.fixturenames)

    def record(self) -> Record:
        self.coverage.stop()
        data = self.coverage.get_data()
        lines = {str(Path(f).relative_to(self.folder)): data.contexts_by_lineno(f) for f in data.measured_files()}
        # A fixture of a whole file is waited for once, by whoever comes first: each test that asks for it may be that one.
        seconds = {t: own + sum(self.fixtures.get(f, 0.0) for f in names) for t, (own, names) in self.calls.items()}
        return Record(lines, seconds)


class Order:
    """A pytest plugin that runs these tests alone, in this order."""

    def __init__(self, tests: Sequence[str]) -> None:
        self.place = {test: number for number, test in enumerate(tests)}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted((i for i in items if i.nodeid in self.place), key=lambda item: self.place[item.nodeid])


def run_tests(folder: str, files: Sequence[str], plugin: Order | None, wing: str, out: str) -> None:
    """In a fork: exit with pytest's code; without a plugin, write a Record to `out`, and what pytest said."""
    os.setsid()
    os.chdir(folder)
    sys.path.insert(0, folder)
    # A fault of the same length within the same second would be taken for the code that was compiled before it.
    sys.dont_write_bytecode = plugin is not None
    # pytest's plugins have modules in common with the libraries that are loaded already, and it warns of that.
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    recorder = None if plugin else Recorder(folder, wing)
    options = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow and not bench and not gpu and not slurm"]
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.redirect_stderr(io.StringIO()):
        code = int(pytest.main([*options, *files], plugins=[plugin or recorder]))
    if recorder:
        Path(out).write_bytes(pickle.dumps((recorder.record(), text.getvalue()[-2000:])))
    os._exit(code)


def in_fork(*arguments: Any, timeout_s: float | None = None) -> int | None:
    """Exit code of `run_tests` in a process of its own; None where it did not end in time."""
    process = multiprocessing.get_context("fork").Process(target=run_tests, args=arguments)
    process.start()
    process.join(timeout_s)
    if process.exitcode is None:
        os.killpg(process.pid or 0, signal.SIGKILL)
        process.join()
        return None
    return process.exitcode


def record_of(folder: str, wing: str, files: Sequence[str]) -> Record:
    """Run these tests without any fault; end where they fail."""
    out = Path(folder) / "record.pickle"
    code = in_fork(folder, files, None, wing, str(out))
    record, text = pickle.loads(out.read_bytes()) if out.exists() else (None, "pytest did not even begin")
    out.unlink(missing_ok=True)
    if code or record is None:
        raise SystemExit(f"{' '.join(files)} fail without any fault; mend that first:\n{text}")
    return record


def statement_at(source: str, line: int) -> tuple[range, bool]:
    """Lines of the smallest statement that holds this line, and whether it is inside of a function."""
    tree = ast.walk(ast.parse(source))
    found = [(range(n.lineno, (n.end_lineno or n.lineno) + 1), n) for n in tree if isinstance(n, ast.stmt)]
    spans = [span for span, _ in found if line in span]
    bodies = [range(n.body[0].lineno, span.stop) for span, n in found if isinstance(n, ast.FunctionDef)]
    return min(spans, key=len, default=range(line, line + 1)), any(line in body for body in bodies)


def room_of(mutant: Mutant) -> list[str]:
    """Test files of the mutant's room, those that exist."""
    wing, *parts = Path(mutant.path).with_suffix("").parts[mutant.path.startswith("dbscale/") :]
    names = ROOMS.get(f"{wing}/{'/'.join(parts)}", f"{wing}/{'_'.join(parts)}").split()
    files = [
        f"tests/{folder}{'/' * bool(folder)}test_{stem}.py" for folder, _, stem in (n.rpartition("/") for n in names)
    ]
    return [file for file in files if (ROOT / file).exists()]


def tests_for(mutant: Mutant, record: Record, budget: float) -> list[str]:
    """Tests that the mutant meets: of its room, those that reach it first; or with a budget, what reaches it."""
    span, inside = statement_at(mutant.original, mutant.line)
    reached = record.lines.get(mutant.path, {})
    found = {test for line in span for test in reached.get(line, ()) if test} if inside else set()
    room = tuple(room_of(mutant))
    ordered = sorted(
        (test for test in record.seconds if test.startswith(room) or (budget and test in found)),
        key=lambda test: (test not in found, not test.startswith(room), record.seconds[test]),
    )
    total = accumulate(record.seconds[test] for test in ordered)
    return [test for test, sum_so_far in zip(ordered, total, strict=True) if not budget or sum_so_far <= budget]


def survives(folder: str, mutant: Mutant, tests: Sequence[str], record: Record) -> bool:
    """Whether every one of these tests passes with the fault in place."""
    target, files = Path(folder) / mutant.path, sorted({test.split("::")[0] for test in tests})
    before = target.stat()
    target.write_text(mutant.source)
    try:
        limit = 30 + PATIENCE * sum(record.seconds[test] for test in tests)
        return in_fork(folder, files, Order(tests), "", "", timeout_s=limit) == 0
    finally:
        target.write_text(mutant.original)
        os.utime(target, ns=(before.st_atime_ns, before.st_mtime_ns))


def make_record(folder: str, wing: str, drawn: Sequence[Mutant], budget: float) -> Record:
    """What the tests do without faults: the rooms' one by one, or with a budget the wing's."""
    rooms = [[f"tests/{Path(wing).name}"]] if budget else [list(t) for t in sorted({tuple(room_of(m)) for m in drawn})]
    whole = Record({}, {})
    for files in filter(None, rooms):
        record = record_of(folder, wing, files)
        for path, lines in record.lines.items():
            for line, tests in lines.items():
                whole.lines.setdefault(path, {}).setdefault(line, []).extend(tests)
        whole.seconds |= record.seconds
        print(f"{' '.join(files)}: {len(record.seconds)} tests", file=sys.stderr, flush=True)
    return whole


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":")[0])
    parser.add_argument("wing", help="folder of the code, such as dbscale/laws")
    parser.add_argument("--count", type=int, default=250, help="mutants to draw")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget", type=float, default=0.0, help="seconds of the wing's tests that a mutant meets "
                        "at most; 0: all of its own room")  # fmt: skip
    parser.add_argument("--only", default="", help="rooms to run of those drawn: fit,solver")
    parser.add_argument("--again", type=Path, help="a log of an earlier run, whose survivors are planted once more")
    options = parser.parse_args()
    wanted = set(filter(None, options.only.split(",")))
    drawn = survivors_of(options.again) if options.again else draw(options.wing, options.count, options.seed)
    drawn = [mutant for mutant in drawn if not wanted or Path(mutant.path).stem in wanted]
    if unheld := sorted({mutant.path for mutant in drawn if not room_of(mutant)}):
        raise SystemExit(f"no tests are known of {', '.join(unheld)}; name their files in ROOMS")
    killed, start = 0, time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for name in ("dbscale", "launch", "shards", "configs", "docs", "tests", "pyproject.toml"):
            source, target = ROOT / name, Path(folder) / name
            shutil.copytree(source, target, symlinks=True) if source.is_dir() else shutil.copy(source, target)
        for name in HEAVY[Path(options.wing).name]:
            importlib.import_module(name)
        record = make_record(folder, options.wing, drawn, options.budget)
        print(f"{len(drawn)} mutants of {options.wing}, seed {options.seed}", flush=True)
        for number, mutant in enumerate(drawn, 1):
            if survives(folder, mutant, tests_for(mutant, record, options.budget), record):
                print(f"| {mutant.path}:{mutant.line} | {mutant.operator} | {mutant.changed()} |", flush=True)
            else:
                killed += 1
            print(f"{killed} of {number} in {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    print(f"{killed} of {len(drawn)} killed", flush=True)


if __name__ == "__main__":
    main()
