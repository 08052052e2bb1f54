"""A grid asks one question: its axes, its datasets and how each stage trains.  `expand` turns it into cells.

Pure apart from `load_grid`.  Knows nothing of states, schedulers or files of results.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from dbscale.errors import ConfigError, nearest
from dbscale.strict import Strict, load_extended, override, set_path, validate
from dbscale.study.cell import Arm, Cell
from dbscale.study.recipe import (
    SEEDS,
    Data,
    DeiT,
    Distill,
    Model,
    Positive,
    Recipe,
    Stage,
    Tier,
    Training,
    draw_seed,
    unfit_training,
)
from dbscale.study.task import BESIDE, TARGETS, WrittenTask, task_name

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=64)]
"""Becomes a folder name: letters, digits, dot, underscore and hyphen."""
Sizes = Annotated[tuple[Positive, ...], Field(min_length=1)]
Seed = Annotated[int, Field(ge=0, lt=SEEDS)]
RawValue = str | int | float | bool | None | list[Any] | dict[str, Any]


class DataAxis(Strict):
    """A dataset and the subset sizes taken from it."""

    dataset: Name
    num_samples: Sizes
    task: WrittenTask = None
    """What a downstream set asks: classification (which None means), segmentation or detection, or a mapping with their
    options, `{kind: segmentation, head: pyramid}`."""
    image_size: Positive | None = None
    """Pixels a side of a downstream set's images; None: the grid's."""
    finetune: Training | None = None
    """How a downstream set's finetunes train; None: as the grid's `finetune` says."""


class Variant(Strict):
    """A named change to the whole grid, for ablations: `set: {distill.alpha: 0.3}`."""

    name: Name
    set: dict[str, RawValue] = {}


class Grid(Strict):
    """`configs/grids/*.yaml`: the hashed *what* of a study."""

    name: Name
    question: str
    datasets: dict[Name, dict[str, RawValue]]
    """How each dataset is packed: `{source: cifar, path: …}`; see `shards/sources.py`."""
    upstream: DataAxis
    downstream: Annotated[tuple[DataAxis, ...], Field(min_length=1)]
    image_size: Positive
    tier: Tier = "resident"
    tiers: dict[Name, Tier] = {}
    """The tier of each dataset that is packed in another encoding."""
    block_size: Positive | None = None
    models: dict[Name, Model]
    students: Annotated[tuple[Name, ...], Field(min_length=1)]
    teachers: dict[Name, Name] = {}
    """Student → teacher of the distilled arm; a student without one has a plain arm only."""
    arms: tuple[Literal["plain", "distilled"], ...] = ("plain", "distilled")
    scratch: bool = False
    """Also finetune every student from random weights: the error without any upstream data."""
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)]
    finetunes: Positive = 1
    """Finetunes of each upstream run and of each scratch run, with other labels, head and order; alike in both arms."""
    min_effect: float = Field(default=0.005, gt=0, lt=1)
    """Difference of error rates that matters; the verdict calls what is surely smaller no difference."""
    noise: Name | None = None
    """Table of noise that `plan` takes for power before there are rows; None: the default one."""
    pretrain: Training
    finetune: Training
    distill: Distill | None = None
    distill_training: Training | None = None
    """How a distill cell trains; None: as `pretrain` says, so that the arms differ in the loss alone."""
    variants: tuple[Variant, ...] = ()

    @model_validator(mode="after")
    def _names_are_known(self) -> Grid:
        for role, names, known in self._references():
            for name in names:
                if name not in known:
                    raise ValueError(f"unknown {role} {name!r}; {nearest(name, list(known))}")
        for axis in ("students", "seeds", "arms"):
            values = getattr(self, axis)
            if len(set(values)) < len(values):
                raise ValueError(f"{axis} repeats a value: {list(values)}")
        if "distilled" in self.arms and (self.distill is None or not self.teachers):
            raise ValueError("the distilled arm needs `distill:` settings and `teachers:`, or leave it out of `arms:`")
        return self

    @model_validator(mode="after")
    def _patches_divide_images(self) -> Grid:
        teachers = (self.teachers.get(student, student) for student in self.students)
        pairs = [(name, self.image_size) for name in dict.fromkeys((*self.students, *teachers))]
        pairs += [(name, axis.image_size) for axis in self.downstream if axis.image_size for name in self.students]
        for name, size in pairs:
            model = self.models[name]
            if isinstance(model, DeiT) and size % model.patch_size:
                raise ValueError(
                    f"image_size {size} is not a multiple of patch_size {model.patch_size} of model {name!r}; "
                    "choose sizes that divide"
                )
        return self

    @model_validator(mode="after")
    def _tasks_are_downstream(self) -> Grid:
        extra = [name for name in ("task", "image_size", "finetune") if getattr(self.upstream, name) is not None]
        if extra:
            raise ValueError(f"upstream takes no {extra[0]}; it belongs to an entry of `downstream:`")
        ways: dict[str, DataAxis] = {}
        for axis in self.downstream:
            problem = unfit_training(axis.task, axis.finetune or self.finetune)
            if problem is not None:
                raise ValueError(f"downstream dataset {axis.dataset!r}: {problem}")
            other = ways.setdefault(axis.dataset, axis)
            if other.model_copy(update={"num_samples": axis.num_samples}) != axis:
                raise ValueError(
                    f"downstream names {axis.dataset!r} twice with different settings, and its results could not be told "
                    "apart; use `variants:`, or pack it under a second name"
                )
        return self

    def _references(self) -> Iterator[tuple[str, Sequence[str], Mapping[str, Any]]]:
        yield "student", self.students, self.models
        yield "student in teachers", tuple(self.teachers), self.models
        yield "teacher", tuple(self.teachers.values()), self.models
        yield "dataset in tiers", tuple(self.tiers), self.datasets
        yield "upstream dataset", (self.upstream.dataset,), self.datasets
        yield "downstream dataset", tuple(axis.dataset for axis in self.downstream), self.datasets

    @property
    def axes(self) -> tuple[DataAxis, ...]:
        return (self.upstream, *self.downstream)


@dataclass(frozen=True)
class Point:
    """One measured point of a study: a finetune cell and where it lies on the grid's axes."""

    cell: Cell
    variant: str
    student: str
    upstream_num_samples: int
    """0 for training from scratch."""
    seed: int
    """The repetition, as the grid names it."""
    finetune: int
    """Draw of the labels, head and order: 0 to `finetunes` - 1."""

    @property
    def arm(self) -> Arm:
        return self.cell.arm


def load_grid(path: Path, overrides: Sequence[str] = ()) -> Grid:
    """Read, override, validate. Raises ConfigError naming file, key, value and what is allowed."""
    return validate(Grid, override(load_extended(path), overrides), where=str(path))


def variants_of(grid: Grid) -> list[tuple[str, Grid]]:
    """Each variant's name with the grid it makes; a grid without variants is its own, named "base"."""
    if not grid.variants:
        return [("base", grid)]
    base = grid.model_copy(update={"variants": ()}).model_dump(mode="json")
    return [(variant.name, _apply(base, variant, grid.name)) for variant in grid.variants]


def _apply(base: dict[str, Any], variant: Variant, grid_name: str) -> Grid:
    data = base
    for path, value in variant.set.items():
        data = set_path(data, path, value)
    return validate(Grid, data, where=f"grid {grid_name}, variant {variant.name}")


def check_sizes(grid: Grid, available: Mapping[str, int]) -> None:
    """Raise ConfigError where an axis asks for more samples than its (packed) dataset holds."""
    for axis in grid.axes:
        largest = available.get(axis.dataset)
        too_large = [size for size in axis.num_samples if largest is not None and size > largest]
        if too_large:
            raise ConfigError(
                f"grid {grid.name}: num_samples {too_large} of dataset {axis.dataset!r} do not fit; "
                f"it holds {largest} training samples, so {largest} is the largest value"
            )


def misfit(grid: Grid, dataset: str, target: str | None) -> str | None:
    """Why a packed dataset cannot serve its axes: `target` is what lies beside its images, None where that is a label."""
    for axis in (axis for _, variant in variants_of(grid) for axis in variant.axes if axis.dataset == dataset):
        if TARGETS[task_name(axis.task)] != target:
            return (
                f"grid {grid.name}: {task_name(axis.task)} needs {BESIDE[TARGETS[task_name(axis.task)]]} beside each image, "
                f"and dataset {dataset!r} has {BESIDE[target]}; set `task` of its entry, or name another dataset"
            )
    return None


def overlapping_draws(grid: Grid, available: Mapping[str, int]) -> list[str]:
    """One sentence per downstream size whose finetune draws must share labels, because the dataset holds too few."""
    return [
        f"the {grid.finetunes} finetune draws of {size} labels overlap: dataset {axis.dataset!r} holds "
        f"{available[axis.dataset]} training samples"
        for axis in grid.downstream
        for size in axis.num_samples
        if grid.finetunes > 1 and grid.finetunes * size > available.get(axis.dataset, grid.finetunes * size)
    ]


def expand(grid: Grid, fingerprints: Mapping[str, str]) -> tuple[Point, ...]:
    """Every finetune of the grid, equal cells merged; a dataset without fingerprint gives provisional ids."""
    points: dict[tuple[str, str], Point] = {}
    for name, variant in variants_of(grid):
        for point in _Expansion(variant, name, fingerprints).points():
            points[name, point.cell.key] = point
    return tuple(points.values())


@dataclass
class _Expansion:
    """One variant's walk over its axes; equal cells are one object, so that a shared teacher is hashed once."""

    grid: Grid
    variant: str
    fingerprints: Mapping[str, str]
    cells: dict[str, Cell] = field(default_factory=dict)

    def points(self) -> Iterator[Point]:
        sizes: tuple[int, ...] = ((0,) if self.grid.scratch else ()) + self.grid.upstream.num_samples
        for seed, size, student in itertools.product(self.grid.seeds, sizes, self.grid.students):
            for init in self._upstream_cells(student, size, seed):
                for axis, labels, draw in self._downstream():
                    # A draw of one size and seed is the same labels in both arms.
                    training = axis.finetune or self.grid.finetune
                    cell = self._cell("finetune", student, axis, labels, seed, training, init=init, draw=draw)
                    yield Point(cell, self.variant, student, size, seed, draw)

    def _downstream(self) -> Iterator[tuple[DataAxis, int, int]]:
        draws = range(self.grid.finetunes)
        return ((axis, size, draw) for axis in self.grid.downstream for size in axis.num_samples for draw in draws)

    def _upstream_cells(self, student: str, size: int, seed: int) -> Iterator[Cell | None]:
        if size == 0:
            yield None
            return
        if "plain" in self.grid.arms:
            yield self._pretrain(student, size, seed)
        if "distilled" in self.grid.arms and student in self.grid.teachers:
            yield self._distill(student, size, seed)

    def _pretrain(self, model: str, size: int, seed: int) -> Cell:
        grid = self.grid
        return self._cell("pretrain", model, grid.upstream, size, seed, grid.pretrain)

    def _distill(self, student: str, size: int, seed: int) -> Cell:
        grid = self.grid
        teacher = self._pretrain(grid.teachers[student], size, seed)
        training = grid.distill_training or grid.pretrain
        return self._cell("distill", student, grid.upstream, size, seed, training, teacher=teacher)

    def _cell(
        self, stage: Stage, model: str, axis: DataAxis, size: int, seed: int, training: Training,
        *, teacher: Cell | None = None, init: Cell | None = None, draw: int = 0,
    ) -> Cell:  # fmt: skip
        grid, seed = self.grid, draw_seed(seed, draw)
        # Another seed is another window of the same order, so that seeds also sample the choice of images.
        data = Data(
            dataset=axis.dataset, num_samples=size, subset_seed=seed, image_size=axis.image_size or grid.image_size,
            tier=grid.tiers.get(axis.dataset, grid.tier), block_size=grid.block_size,
        )  # fmt: skip
        recipe = Recipe(
            stage=stage, model=grid.models[model], data=data, training=training, seed=seed, draw=draw or None,
            distill=grid.distill if stage == "distill" else None, task=axis.task,
        )  # fmt: skip
        cell = Cell(recipe, self.fingerprints.get(axis.dataset), teacher=teacher, init=init)
        return self.cells.setdefault(cell.key, cell)


def merged_cells(points: Sequence[Point]) -> tuple[Cell, ...]:
    """Every distinct cell that the points need, parents before children."""
    ordered: dict[str, Cell] = {}

    def visit(cell: Cell) -> None:
        if cell.key not in ordered:
            for parent in cell.parents:
                visit(parent)
            ordered[cell.key] = cell

    for point in points:
        visit(point.cell)
    return tuple(ordered.values())


def datasets_in_use(grid: Grid) -> tuple[str, ...]:
    """Names of the datasets any axis reads, in order, each once."""
    return tuple(dict.fromkeys(axis.dataset for _, variant in variants_of(grid) for axis in variant.axes))
