"""Every kind of file of a store and of packed data, damaged by chance: an equal result, or a refusal that names it.

No error but the project's own, nothing touched outside. Always the same trials; `FUZZ=20` in the environment runs twenty
times as many.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from dbscale.data import open_dataset
from dbscale.data.dataset import _opened
from dbscale.data.stage import stage_subset
from dbscale.errors import ConfigError, DataError, FileError, TableError, TrainingError
from dbscale.files import LOCK_NAME, holder, is_held, read_model
from dbscale.launch.cli import main
from dbscale.launch.commands.submit import write_records
from dbscale.launch.slurm.queue import SubmitRecord, make_uid, read_records, write_record
from dbscale.launch.study import Study, load_study, plan_study
from dbscale.report import schema
from dbscale.report.findings import refresh
from dbscale.report.page import of_grid
from dbscale.report.reduce import load_plan, read_mistakes, reduce_grid
from dbscale.report.schema import BoundaryFile, LawsFile
from dbscale.report.table import to_csv
from dbscale.shards.pack import ensure_packed
from dbscale.study.cost import Calibration, write_calibration
from dbscale.study.resources import Resources, StopRequest
from dbscale.training.checkpoint import newest_whole
from dbscale.training.losses import CachedTeacher
from dbscale.training.models import verified_weights
from dbscale.training.progress import truncate_metrics
from dbscale.training.results import read_trained
from dbscale.training.run import run_cell
from tests.launch.conftest import GRID
from tests.shards.test_fuzz import mutate, no_hang

TIMES = int(os.environ.get("FUZZ", "1"))
FRACTALS = {"source": "fractals", "families": 4, "num_train": 24, "num_test": 12, "image_size": 16, "shard_samples": 12}
OURS = (ConfigError, DataError, FileError, TableError, TrainingError)
ONE = Resources(zero_stage=None, threads=1, checkpoint_interval_s=1e-9, checkpoint_stall_share=1e9)


@dataclass
class StopAfter(StopRequest):
    """Asks to stop once the loop has looked at it `steps` times."""

    steps: int = 4
    looks: list[None] = field(default_factory=list)

    @property
    def requested(self) -> bool:
        self.looks.append(None)
        self.reason = "SIGUSR2" if len(self.looks) >= self.steps else None
        return len(self.looks) >= self.steps


@dataclass
class Place:
    """A store with finished cells, one that was stopped half-way and one that was trained but not evaluated."""

    study: Study
    outside: Path
    stopped: str = ""
    trained: str = ""
    states: dict[str, str] = field(default_factory=dict)
    """Of all cells while nothing is damaged."""

    @property
    def root(self) -> Path:
        return self.study.store.root

    @property
    def staging(self) -> Path:
        return self.root.parent / "staging"

    @property
    def words(self) -> list[str]:
        study = self.study
        return ["--grid", str(study.grid_path), "--store", str(study.store.root), "--data", str(study.data_dir)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("corruption")
    small = {
        "datasets": {"up": FRACTALS, "down": FRACTALS}, "image_size": 16,
        "upstream": {"dataset": "up", "num_samples": [16]}, "downstream": [{"dataset": "down", "num_samples": [8]}],
    }  # fmt: skip
    (folder / "grid.yaml").write_text(yaml.safe_dump({**GRID, **small}))
    for name in ("up", "down"):
        ensure_packed(name, FRACTALS, folder / "data", jobs=1, progress=False)
    study = load_study(grid=folder / "grid.yaml", cluster="inline", store=folder / "out", data=folder / "data")
    (folder / "outside").mkdir()
    (folder / "outside" / "secret.json").write_text('{"not": "yours"}\n')
    made = Place(study, folder / "outside")
    _train(made)
    calibration = Calibration(
        host="h", device="cpu", created=1.0, flops_per_s=1e9, step_overhead_s=0.1, cell_overhead_s=0.1
    )
    write_calibration(study.store, calibration)
    teacher = CachedTeacher(torch.nn.Flatten(), made.root / "teacher_logits" / "one")
    for number in range(2):
        teacher(torch.full((2, 3, 2, 2), float(number)))
    refresh(study.store, "tiny")
    uid = make_uid()
    write_record(
        study.store,
        SubmitRecord(uid=uid, grid="other", kind="bundles", wave=1, created=1.0, job=7, elements=(("a", "b"),)),
    )
    (study.store.root / LOCK_NAME).write_text(
        '{"process": {"host": "h", "pid": 7}, "command": "c", "grid": "g", "started": 1.0}'
    )
    staged(made, made.outside)
    made.states = look(made)[0]
    return made


def _train(made: Place) -> None:
    """All cells of the grid but two: the last finetune stops half-way, the one before loses its row again."""
    study, threads = made.study, torch.get_num_threads()
    torch.set_num_threads(1)
    plan, cost = plan_study(study)
    write_records(study, plan, cost)
    finetunes = [cell.key for cell in plan.cells if cell.recipe.stage == "finetune"]
    made.stopped, made.trained = finetunes[-1], finetunes[-2]
    for cell in plan.cells:
        stop = StopAfter() if cell.key == made.stopped else StopRequest()
        with pytest.MonkeyPatch.context() as patch:
            if cell.key == made.trained:
                patch.setattr("dbscale.training.run.evaluate_cell", _die)
            run_cell(study.store, cell.key, data_dir=study.data_dir, resources=ONE, stop=stop)
    torch.set_num_threads(threads)


def _die(*_: Any) -> None:
    raise RuntimeError("as the test asked")


# What is read of each kind of file.


@dataclass(frozen=True)
class Kind:
    files: Callable[[Place], list[Path]]
    read: Callable[[Place, Path], Any]
    """What the product makes of the file; raises one of OURS that names it."""
    or_else: tuple[Any, ...] = ()
    """What is as good as an equal result: of what is made again, or does not decide anything."""
    is_history: bool = False
    """Nobody can tell that one is missing, or was written at another time."""


def cell_files(name: str, key: Callable[[Place], str] | None = None) -> Callable[[Place], list[Path]]:
    def files(place: Place) -> list[Path]:
        pattern = f"{'*' if key is None else key(place)}/{name}"
        return sorted(path for path in (place.root / "cells").glob(pattern) if path.is_file())

    return files


def of_done(name: str) -> Callable[[Place], list[Path]]:
    return lambda place: [row.with_name(name) for row in cell_files("row.json")(place)]


def grid_file(name: str) -> Callable[[Place], list[Path]]:
    return lambda place: [place.study.store.grid_dir("tiny") / name]


def data_files(pattern: str) -> Callable[[Place], list[Path]]:
    return lambda place: sorted((place.study.data_dir / "shards" / "up").glob(pattern))


def look(place: Place, _: Path | None = None) -> tuple[dict[str, str], str]:
    """States and table, once every command that reads the store has had its look."""
    store = place.study.store
    assert main(["status", *place.words]) in (0, 1)
    plan_study(place.study)
    plan = load_plan(store, "tiny")
    table = reduce_grid(store, "tiny")
    of_grid(store, plan, table)
    return {key: standing.state for key, standing in store.standings(plan.cells).items()}, to_csv(table)


def row(place: Place, path: Path) -> Any:
    """A row that cannot be used costs its own cell, and what builds on it a few columns."""
    own, (states, csv) = path.parent.name, look(place)
    standing = place.study.store.standing(own)
    if standing.state == "done":
        return states, csv
    assert {**states, own: "done"} == place.states
    raise FileError(standing.reason)


def attempt(place: Place, path: Path) -> Any:
    look(place)
    found = place.study.store.attempts(path.parents[1].name)
    for each in found:
        if each.reason and str(path) in each.reason:
            raise FileError(each.reason)
    return found


def recipe(place: Place, path: Path) -> Any:
    assert look(place)[0] == place.states
    return place.study.store.read_spec(path.parent.name)


def calibration(place: Place, path: Path) -> Any:
    assert look(place)[0] == place.states
    return read_model(Calibration, path)


def samples(place: Place, path: Path) -> Any:
    """Pixels and labels of both splits; where a sample is bad it is named by its number."""
    _opened.cache_clear()  # another process would look again
    tier, found = None if path.parent.name == "cache" else "raw", []
    for split in ("train", "test"):
        dataset = open_dataset(place.study.data_dir / "shards" / "up", split, tier=tier, image_size=16)
        pixels, bad = dataset.reader.fetch(np.arange(len(dataset.index)))
        if bad:
            raise DataError(f"{path}: samples {bad} of {split}")
        found.append((np.asarray(pixels).tobytes(), dataset.subset().labels.tobytes()))
    return found


def staged(place: Place, _: Path) -> Any:
    """A copy that is damaged is copied again."""
    dataset = open_dataset(place.study.data_dir / "shards" / "up", "train", tier="raw", image_size=16)
    copy = stage_subset(dataset.subset(), place.staging)
    pixels, bad = copy.dataset.reader.fetch(np.arange(len(copy)))
    return np.asarray(pixels).tobytes(), bad, copy.dataset.subset().labels.tobytes()


def submit_record(place: Place, path: Path) -> Any:
    """A damaged one counts as a submission that was cut off, and its jobs are looked for by name."""
    found = read_records(place.study.store, "other")
    if any(record.job is None for record in found) or not path.is_file():
        raise FileError(f"{path} is cut off")
    return found


def lock(place: Place, _: Path) -> Any:
    """It only says who drives the store; whether anybody does, the kernel knows."""
    str(holder(place.root))
    return is_held(place.root)


def checkpoint(place: Place, _: Path) -> Any:
    found = newest_whole(place.study.store.cell_dir(place.stopped) / "checkpoints")
    return None if found is None else found[1].state.step


def logits(_: Place, path: Path) -> Any:
    teacher = CachedTeacher(torch.nn.Flatten(), path.parent)
    return [teacher(torch.full((2, 3, 2, 2), float(number))).tolist() for number in range(2)]


def weights(place: Place, path: Path) -> Any:
    known = place.study.store.read_row(path.parent.name)
    assert known is not None
    return verified_weights(place.study.store, known).read_bytes()


def bitmap(place: Place, path: Path) -> Any:
    known = place.study.store.read_row(path.parent.name)
    assert known is not None
    return read_mistakes(path, known).tolist()


def made_again(place: Place, path: Path) -> Any:
    reduce_grid(place.study.store, "tiny")
    return path.read_bytes()


KINDS: dict[str, Kind] = {
    "row.json": Kind(cell_files("row.json"), row),
    "attempt": Kind(cell_files("attempts/*.json"), attempt, is_history=True),
    "recipe.json": Kind(cell_files("recipe.json"), recipe),
    "progress.json": Kind(cell_files("progress.json"), look, is_history=True),
    "plan.json": Kind(grid_file("plan.json"), look),
    "calibration.json": Kind(lambda place: [place.root / "calibration.json"], calibration),
    "laws.json": Kind(grid_file("laws.json"), lambda _, path: schema.read(LawsFile, path)),
    "boundary.json": Kind(grid_file("boundary.json"), lambda _, path: schema.read(BoundaryFile, path)),
    "rows.csv": Kind(grid_file("rows.csv"), made_again),
    "rows.parquet": Kind(grid_file("rows.parquet"), made_again),
    "weights": Kind(of_done("model.safetensors"), weights),
    "correct.npz": Kind(of_done("correct.npz"), bitmap),
    "metrics.jsonl": Kind(
        cell_files("metrics.jsonl"), lambda place, path: truncate_metrics(place.study.store, path.parent.name, 9)
    ),
    "checkpoint": Kind(cell_files("checkpoints/step-*/*", lambda place: place.stopped), checkpoint, (3, 4)),
    "trained.json": Kind(
        cell_files("trained.json", lambda place: place.trained), lambda _, path: read_trained(path.parent), (None,)
    ),
    "teacher's logits": Kind(lambda place: sorted(place.root.glob("teacher_logits/*/*")), logits),
    "manifest.json": Kind(data_files("manifest.json"), samples),
    "index": Kind(data_files("*.index.npy"), samples),
    "tar": Kind(data_files("*.tar"), samples),
    "cache": Kind(data_files("cache/*"), samples),
    "staged copy": Kind(lambda place: sorted(path for path in place.staging.glob("*/*") if path.is_file()), staged),
    "submit record": Kind(lambda place: sorted(place.root.glob("grids/other/submits/*")), submit_record),
    "driver's lock": Kind(lambda place: [place.root / LOCK_NAME], lock),
}


# One trial.


@contextmanager
def damaged(place: Place, path: Path, kind: Kind, generator: np.random.Generator) -> Iterator[None]:
    """The file cut, filled, flipped, emptied, swapped, removed, or a link or folder in its place; then as it was."""
    whole, others = path.read_bytes(), [each for each in kind.files(place) if each != path]
    way = int(generator.integers(9))
    path.unlink()  # a new file: what is mapped or cached of the old one stays what it was
    if way < 4 or (way == 5 and (kind.is_history or not others)):
        path.write_bytes(mutate(whole, generator))
    elif way == 4:
        path.write_bytes(b"")
    elif way == 5:
        path.write_bytes(others[int(generator.integers(len(others)))].read_bytes())
    elif way == 6:
        path.write_bytes((place.root / "calibration.json").read_bytes() if path.name != "calibration.json" else b"[]\n")
    elif way == 7:
        path.symlink_to(place.outside / "secret.json")
    elif generator.integers(2):
        path.mkdir()
    elif kind.is_history:
        path.write_bytes(whole)
    try:
        yield
    finally:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.write_bytes(whole)


def try_out(place: Place, kind: Kind, number: int, seed: int) -> str:
    """How the trial ended: the same, or refused by name. Anything else raises."""
    generator = np.random.default_rng([seed, number])
    files = kind.files(place)
    path = files[int(generator.integers(len(files)))]
    expected = kind.read(place, path)
    with damaged(place, path, kind, generator), no_hang():
        try:
            found = kind.read(place, path)
        except (*OURS, OSError) as error:
            said = str(error)
            assert path.name in said or path.parent.name in said or "plan of grid 'tiny'" in said, (path, said)
            return "refused"
        assert found == expected or found in kind.or_else, path
        return "same"


def survey(place: Place, kind: str, count: int, seed: int) -> Counter[str]:
    before = {path: path.read_bytes() for path in place.outside.rglob("*")}
    outcomes = Counter(try_out(place, KINDS[kind], number, seed) for number in range(count))
    assert {path: path.read_bytes() for path in place.outside.rglob("*")} == before, "nothing outside was touched"
    print(kind, dict(outcomes))
    return outcomes


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_of_each_kind(place: Place, kind: str) -> None:
    assert survey(place, kind, 5, seed=1).total() == 5


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_thousand(place: Place, kind: str) -> None:
    """One hundred of each of the twenty-three kinds; `FUZZ` multiplies."""
    found = survey(place, kind, 100 * TIMES, seed=2)
    made_anew = kind in ("rows.csv", "rows.parquet", "metrics.jsonl", "progress.json", "checkpoint", "trained.json",
                         "teacher's logits", "cache", "staged copy", "driver's lock")  # fmt: skip
    assert found["refused"] > 50 * TIMES or made_anew


def test_the_page_and_the_resumed_run_do_without_what_is_damaged(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    """One file of each kind damaged at once: the report is written, names them, and the run goes on to the same weights."""
    store = place.study.store
    rows = cell_files("row.json")(place)
    hurt = [rows[0], rows[1].with_name("recipe.json"), rows[2].with_name("correct.npz"), *grid_file("laws.json")(place)]
    whole = {path: path.read_bytes() for path in hurt}
    for path in hurt:
        path.write_bytes(whole[path][:-20])
    assert main(["report", *place.words]) == 0
    page = (store.grid_dir("tiny") / "report.html").read_text()
    for path in hurt[:3]:
        assert path.name in page and path.parent.name in page
    for path in hurt:
        path.write_bytes(whole[path])
    newest = max((store.cell_dir(place.stopped) / "checkpoints").glob("step-*"))
    (newest / "manifest.json").write_bytes(b"")
    copy = load_study(
        grid=place.study.grid_path, cluster="inline", store=place.outside.parent / "again", data=place.study.data_dir
    )
    shutil.copytree(place.root, copy.store.root)
    for study in (place.study, copy):
        if study is copy:
            shutil.rmtree(copy.store.cell_dir(place.stopped) / "checkpoints")
        outcome = run_cell(study.store, place.stopped, data_dir=study.data_dir, resources=ONE, stop=StopRequest())
        assert outcome.row is not None, outcome.reason
    assert "skipping the damaged checkpoint" in caplog.text
    ours, fresh = (study.store.read_row(place.stopped) for study in (place.study, copy))
    assert ours is not None and fresh is not None and ours.weights_sha256 == fresh.weights_sha256
