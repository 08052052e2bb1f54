"""A grid asks one question: its axes, its datasets and how each stage trains.  `expand` turns it into cells.

Pure apart from `load_grid`.  Knows nothing of states, schedulers or files of results.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from dbscale import plugins
from dbscale.errors import ConfigError, nearest
from dbscale.strict import Strict, load_extended, override, set_path, validate
from dbscale.study.cell import Arm, Cell
from dbscale.study.cost import FORWARD_GFLOPS_224, has_known_flops, matched_steps
from dbscale.study.recipe import (
    SEEDS,
    Budget,
    Data,
    DeiT,
    Distill,
    Model,
    Positive,
    Pretrained,
    Recipe,
    Stage,
    Tier,
    TimmModel,
    Training,
    draw_seed,
    unfit_training,
)
from dbscale.study.task import BESIDE, TARGETS, WrittenTask, task_name
from dbscale.study.weights import Weights

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


class Hunt(Strict):
    """`hunt:` of a grid: over which range its boundary is looked for, how sharply, and at which price.

    `dbscale hunt` then chooses the runs; which of them stand in the grid's own axes makes no difference.
    """

    along: Literal["upstream_samples", "downstream_samples", "num_params"] = "upstream_samples"
    """The axis on which the boundary lies: D_p, D_f or M."""
    range: tuple[Positive, Positive] | None = None
    """Smallest and largest value of the axis; None: those of the grid. M has the grid's students and no range."""
    per_octave: float = Field(default=2.0, gt=0, le=8)
    """How many values each doubling of the axis has; the grid's own values within the range count in any case."""
    a: dict[Literal["arm", "variant", "student"], str] = {"arm": "plain"}
    b: dict[Literal["arm", "variant", "student"], str] = {"arm": "distilled"}
    """The two procedures that are compared, each by one value or several; Δ = a − b."""
    students: tuple[Name, ...] | None = None
    downstream: tuple[Name, ...] | None = None
    num_labels: Sizes | None = None
    """Students, downstream datasets and D_f that the hunt concerns; None: all of the grid."""
    pooled: bool = True
    """One boundary for each downstream dataset, students and D_f pooled; otherwise one for each of them."""
    metric: Literal["error_rate", "test_loss"] = "error_rate"
    target_octaves: float = Field(default=1.0, gt=0)
    """A crossing is found once its interval is no wider than this many doublings of the axis."""
    min_effect: float | None = Field(default=None, gt=0)
    """None: the grid's."""
    level: float = Field(default=0.9, gt=0.5, lt=1)
    """Share of hunts whose interval should hold the boundary."""
    least_doubt: float | None = Field(default=None, gt=0)
    """The hunt also ends, whatever the verdict, where fewer octaves of wrong advice are left over the whole range."""
    wave: Positive = 8
    """Pairs of one wave: as many as fill the machines."""
    waves_ahead: int = Field(default=0, ge=0, le=8)
    """Further waves that SLURM may hold while one is not finished."""
    finetunes: Literal["auto"] | Positive = "auto"
    """Finetunes of each upstream run; auto: as the noise measured so far makes cheapest."""
    budget_hours: float = Field(gt=0)
    """Device-hours of all runs that the hunt rests on, those of the grid that were finished before included."""
    most_seeds: Positive = 32
    """At one value of the axis. The grid's seeds come first, then the numbers after its largest."""

    @model_validator(mode="after")
    def _sides_differ(self) -> Hunt:
        if not self.a or self.a == self.b or self.a.keys() != self.b.keys():
            raise ValueError(f"a and b must give other values of the same columns; found {self.a} and {self.b}")
        if self.range is not None and self.range[0] >= self.range[1]:
            raise ValueError(f"range {list(self.range)} does not rise; write the smaller value first")
        return self


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
    teachers: dict[Name, Name | Weights] = {}
    """Student → teacher of the distilled arm: a model that the grid trains, or weights from elsewhere, alike at every
    size and seed. A student without one has a plain arm only."""
    init: dict[Name, Weights] = {}
    """Model → weights that its upstream runs begin with, in every arm; the head is new."""
    arms: tuple[Literal["plain", "distilled", "plain_matched", "self_distilled"], ...] = ("plain", "distilled")
    """What precedes the finetunes. plain: `pretrain` alone. distilled: guided by the teacher, pretrained on the same
    images. plain_matched: plain, with the steps that training the teacher, asking it and `distill_training` would have
    cost in operations (`cost.matched_steps`), and the schedule stretched over them. self_distilled: guided by a teacher
    of the student's own size, pretrained on the same images from other initial weights, in another order. All but plain
    are for students that have a teacher."""
    scratch: bool = False
    """Also finetune every student from random weights: the error without any upstream data."""
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)]
    finetunes: Positive = 1
    """Finetunes of each upstream run and of each scratch run, with other labels, head and order; alike in both arms."""
    min_effect: float = Field(default=0.005, gt=0, lt=1)
    """Difference of error rates that matters; the verdict calls what is surely smaller no difference."""
    noise: Name | None = None
    """Table of noise that `plan` takes for power before there are rows; None: the default one."""
    plugins: dict[str, str] = {}
    """Parts of your own: a list of modules, or of files beside this one, `plugins: [my_lab.models, parts.py]`; reading
    the grid imports them and notes their hashes. Cells are named after them too."""
    metrics: tuple[Name, ...] = ()
    """Further means over the test split that plugins register; every row has them."""
    pretrain: Training
    finetune: Training
    distill: Distill | None = None
    distill_training: Training | None = None
    """How a distill cell trains; None: as `pretrain` says, so that the arms differ in the loss alone."""
    variants: tuple[Variant, ...] = ()
    hunt: Hunt | None = None
    """How `dbscale hunt` looks for the boundary; it changes no cell."""

    @model_validator(mode="after")
    def _is_sound(self) -> Grid:
        checks = (self._unknown_names, self._unknown_costs, self._odd_patches, self._unfit_tasks)
        for problem in itertools.chain.from_iterable(check() for check in checks):
            raise ValueError(problem)
        return self

    def _unknown_names(self) -> Iterator[str]:
        for role, names, known in self._references():
            yield from (f"unknown {role} {name!r}; {nearest(name, list(known))}" for name in names if name not in known)
        for axis in ("students", "seeds", "arms"):
            values = getattr(self, axis)
            if len(set(values)) < len(values):
                yield f"{axis} repeats a value: {list(values)}"
        guided = [arm for arm in self.arms if arm != "plain"]
        if guided and (self.distill is None or not self.teachers):
            yield f"the {guided[0]} arm needs `distill:` settings and `teachers:`, or leave it out of `arms:`"

    def _unknown_costs(self) -> Iterator[str]:
        pairs = list(self.teachers.items()) if "plain_matched" in self.arms else []
        foreign = [student for student, teacher in pairs if not isinstance(teacher, str)]
        if foreign:
            yield (
                "the plain_matched arm spends what the teacher's training cost, and nobody knows it for the teacher of "
                f"{foreign[0]!r}, which comes from elsewhere; leave the arm out"
            )
        for model in (self.models[str(name)] for pair in pairs for name in pair):
            if isinstance(model, TimmModel) and not has_known_flops(model):
                yield (
                    f"the plain_matched arm needs the operations of every student and teacher, and those of {model.name!r} "
                    f"are not known; {nearest(model.name, list(FORWARD_GFLOPS_224))}, or leave it out of `arms:`"
                )

    def _odd_patches(self) -> Iterator[str]:
        teachers = (self.teachers.get(student, student) for student in self.students)
        named = dict.fromkeys((*self.students, *(name for name in teachers if isinstance(name, str))))
        pairs = [(name, self.image_size) for name in named]
        pairs += [(name, axis.image_size) for axis in self.downstream if axis.image_size for name in self.students]
        for name, size in pairs:
            model = self.models[name]
            if isinstance(model, DeiT) and size % model.patch_size:
                yield (
                    f"image_size {size} is not a multiple of patch_size {model.patch_size} of model {name!r}; "
                    "choose sizes that divide"
                )

    def _unfit_tasks(self) -> Iterator[str]:
        extra = (name for name in ("task", "image_size", "finetune") if getattr(self.upstream, name) is not None)
        yield from (f"upstream takes no {name}; it belongs to an entry of `downstream:`" for name in extra)
        ways: dict[str, DataAxis] = {}
        for axis in self.downstream:
            problem = unfit_training(axis.task, axis.finetune or self.finetune)
            if problem is not None:
                yield f"downstream dataset {axis.dataset!r}: {problem}"
            other = ways.setdefault(axis.dataset, axis)
            if other.model_copy(update={"num_samples": axis.num_samples}) != axis:
                yield (
                    f"downstream names {axis.dataset!r} twice with different settings, and its results could not be told "
                    "apart; use `variants:`, or pack it under a second name"
                )

    def _references(self) -> Iterator[tuple[str, Sequence[str], Mapping[str, Any]]]:
        yield "student", self.students, self.models
        yield "student in teachers", tuple(self.teachers), self.models
        yield "teacher", tuple(name for name in self.teachers.values() if isinstance(name, str)), self.models
        yield "model in init", tuple(self.init), self.models
        yield "dataset in tiers", tuple(self.tiers), self.datasets
        yield "upstream dataset", (self.upstream.dataset,), self.datasets
        yield "downstream dataset", tuple(axis.dataset for axis in self.downstream), self.datasets
        if self.hunt is not None:
            yield "student in hunt", self.hunt.students or (), dict.fromkeys(self.students)
            known = {axis.dataset: axis for axis in self.downstream}
            yield "downstream dataset in hunt", self.hunt.downstream or (), known

    @property
    def axes(self) -> tuple[DataAxis, ...]:
        return (self.upstream, *self.downstream)


@dataclass(frozen=True)
class Point:
    """One measured point of a study: a finetune cell and where it lies on the grid's axes."""

    cell: Cell
    variant: str
    arm: Arm
    student: str
    upstream_num_samples: int
    """0 for training from scratch."""
    seed: int
    """The repetition, as the grid names it."""
    finetune: int
    """Draw of the labels, head and order: 0 to `finetunes` - 1."""


def load_grid(path: str | Path, overrides: Sequence[str] = ()) -> Grid:
    """Read, override, import plugins, validate. Raises ConfigError naming file, key, value and what is allowed."""
    path = Path(path)
    data = override(load_extended(path), overrides)
    places = data.get("plugins")
    if isinstance(places, list):
        data = {**data, "plugins": plugins.load(map(str, places), path.parent)}
    return validate(Grid, data, where=str(path))


def variants_of(grid: Grid) -> list[tuple[str, Grid]]:
    """Each variant's name with the grid it makes; a grid without variants is its own, named "base"."""
    if not grid.variants:
        return [("base", grid)]
    base = grid.model_copy(update={"variants": ()}).model_dump(mode="json")
    found = []
    for variant in grid.variants:
        data = functools.reduce(lambda data, change: set_path(data, *change), variant.set.items(), base)
        found.append((variant.name, validate(Grid, data, where=f"grid {grid.name}, variant {variant.name}")))
    return found


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


def expand(grid: Grid, fingerprints: Mapping[str, str], weights: Mapping[str, str] | None = None) -> tuple[Point, ...]:
    """Every finetune of the grid, equal cells merged.

    `fingerprints` of datasets by name and hashes of `weights` by checkpoint; what lacks one has provisional ids.
    """
    points: dict[tuple[str, Arm, str], Point] = {}
    for name, variant in variants_of(grid):
        for point in _Expansion(variant, name, fingerprints, weights or {}).points():
            points[name, point.arm, point.cell.key] = point
    return tuple(points.values())


@dataclass
class _Expansion:
    """One variant's walk over its axes; equal cells are one object, so that a shared teacher is hashed once."""

    grid: Grid
    variant: str
    fingerprints: Mapping[str, str]
    weights: Mapping[str, str]
    cells: dict[str, Cell] = field(default_factory=dict)

    def points(self) -> Iterator[Point]:
        sizes: tuple[int, ...] = ((0,) if self.grid.scratch else ()) + self.grid.upstream.num_samples
        for seed in self.grid.seeds:
            # Alike whatever they begin with: a draw of one size and seed is the same labels in both arms.
            finetunes = {student: list(self._finetunes(student, seed)) for student in self.grid.students}
            for size, student in itertools.product(sizes, self.grid.students):
                for arm, init in self._upstream_cells(student, size, seed):
                    for recipe, draw in finetunes[student]:
                        cell = self._cell(recipe, init=init)
                        yield Point(cell, self.variant, arm, student, size, seed, draw)

    def _finetunes(self, student: str, seed: int) -> Iterator[tuple[Recipe, int]]:
        """Recipes of everything that follows one upstream run, with the draw of each."""
        for axis in self.grid.downstream:
            training = axis.finetune or self.grid.finetune
            for labels, draw in itertools.product(axis.num_samples, range(self.grid.finetunes)):
                yield self._recipe("finetune", student, axis, labels, seed, training, draw=draw), draw

    def _upstream_cells(self, student: str, size: int, seed: int) -> Iterator[tuple[Arm, Cell | None]]:
        if size == 0:
            yield "scratch", None
            return
        for arm in self.grid.arms:
            if arm == "plain":
                yield arm, self._pretrain(student, size, seed)
            elif student in self.grid.teachers:
                yield arm, self._guided(arm, student, size, seed)

    def _guided(self, arm: Arm, student: str, size: int, seed: int) -> Cell:
        """The upstream run of an arm that has to do with a teacher."""
        if arm == "self_distilled":
            # With the student's own seed, the teacher would start from the same weights: the plain arm's very run.
            teacher = self._pretrain(student, size, seed, init_seed=draw_seed(seed, 1))
            return self._distill(student, size, seed, teacher)
        teacher = self.grid.teachers[student]
        guide = self._pretrain(teacher, size, seed) if isinstance(teacher, str) else teacher
        distilled = self._distill(student, size, seed, guide)
        if arm == "distilled":
            return distilled
        steps = matched_steps(self._pretrain(student, size, seed).recipe, distilled)
        longer = self.grid.pretrain.model_copy(update={"budget": Budget(steps=steps)})
        return self._cell(self._recipe("pretrain", student, self.grid.upstream, size, seed, longer))

    def _pretrain(self, model: str, size: int, seed: int, *, init_seed: int | None = None) -> Cell:
        training = self.grid.pretrain
        return self._cell(
            self._recipe("pretrain", model, self.grid.upstream, size, seed, training, init_seed=init_seed)
        )

    def _distill(self, student: str, size: int, seed: int, teacher: Cell | Weights) -> Cell:
        training = self.grid.distill_training or self.grid.pretrain
        known, parent = (teacher, None) if isinstance(teacher, Weights) else (None, teacher)
        recipe = self._recipe("distill", student, self.grid.upstream, size, seed, training, teacher=known)
        return self._cell(recipe, teacher=parent)

    def _identified(self, weights: Weights | None) -> Pretrained | None:
        return weights.identified(self.weights.get(weights.checkpoint)) if weights is not None else None

    def _cell(self, recipe: Recipe, *, teacher: Cell | None = None, init: Cell | None = None) -> Cell:
        cell = Cell(recipe, self.fingerprints.get(recipe.data.dataset), teacher=teacher, init=init)
        return self.cells.setdefault(cell.key, cell)

    def _recipe(
        self, stage: Stage, model: str, axis: DataAxis, size: int, seed: int, training: Training,
        *, teacher: Weights | None = None, draw: int = 0, init_seed: int | None = None,
    ) -> Recipe:  # fmt: skip
        """`init_seed` stands in for `seed` in all but the choice of images."""
        grid, seed = self.grid, draw_seed(seed, draw)
        # Another seed is another window of the same order, so that seeds also sample the choice of images.
        data = Data(
            dataset=axis.dataset, num_samples=size, subset_seed=seed, image_size=axis.image_size or grid.image_size,
            tier=grid.tiers.get(axis.dataset, grid.tier), block_size=grid.block_size,
        )  # fmt: skip
        return Recipe(
            stage=stage, model=grid.models[model], data=data, training=training, draw=draw or None,
            seed=seed if init_seed is None else init_seed,
            distill=grid.distill if stage == "distill" else None, task=axis.task,
            teacher=self._identified(teacher),
            start=self._identified(grid.init.get(model)) if stage != "finetune" else None,
            plugins=grid.plugins or None,
            metrics=(grid.metrics or None) if axis.task is None else None,  # plugins' metrics take labels of images
        )  # fmt: skip


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


def unlike_cells(cells: Sequence[Cell]) -> list[Cell]:
    """The first of those that share one recipe on parents of the same models, as a grid's finetunes do by the dozen."""
    found: dict[tuple[int, ...], Cell] = {}
    for cell in cells:
        # By object, of which an expansion makes one for all: to compare what they hold takes as long as most work on it.
        found.setdefault((id(cell.recipe), *(id(parent.recipe.model) for parent in cell.parents)), cell)
    return list(found.values())


def datasets_in_use(grid: Grid) -> tuple[str, ...]:
    """Names of the datasets any axis reads, in order, each once."""
    return tuple(dict.fromkeys(axis.dataset for _, variant in variants_of(grid) for axis in variant.axes))


def weights_in_use(grid: Grid) -> tuple[Weights, ...]:
    """Weights from elsewhere that any variant names, each checkpoint once."""
    found = [
        weights
        for _, variant in variants_of(grid)
        for weights in (*variant.teachers.values(), *variant.init.values())
        if isinstance(weights, Weights)
    ]
    return tuple({weights.checkpoint: weights for weights in found}.values())
