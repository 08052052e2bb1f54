"""What can be known before training: looked at by `plan`, and by `submit` before anything is queued.

From manifests, sources, disk and sizes alone, without torch: what cannot work is a problem, what should be known is a
note. What only a step on real data shows is `smoke`'s.
"""

from __future__ import annotations

import itertools
import operator
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from dbscale.errors import ConfigError
from dbscale.files import others_who_write
from dbscale.launch.study import Study
from dbscale.study.cell import Cell
from dbscale.study.cost import DEVICES, STAGES, device_memory, num_params
from dbscale.study.plan import Plan
from dbscale.study.recipe import DeiT

FLOAT_BYTES = 4
KEPT_CHECKPOINTS = 3
"""The last two, and the one that is being written."""
GIB = 2**30


@dataclass(frozen=True)
class Preflight:
    """What a look before training found."""

    problems: tuple[str, ...]
    """Training would fail of these."""
    notes: tuple[str, ...]

    @property
    def lines(self) -> list[str]:
        return [*(f"problem: {each}" for each in self.problems), *(f"note: {each}" for each in self.notes)]

    def refuse(self) -> None:
        """Raise ConfigError where there is a problem."""
        if self.problems:
            raise ConfigError("; ".join(self.problems))


def check(study: Study, plan: Plan) -> Preflight:
    """Look at everything that the cells still to run need. Raises ConfigError for a dataset entry that is not valid."""
    found = [
        dataset_problems(study),
        pair_problems(plan.todo),
        memory_problems(study, plan.todo),
        disk_problems(study, plan),
    ]
    problems = dict.fromkeys(itertools.chain.from_iterable(found))
    return Preflight(tuple(problems), (*source_notes(study), *store_notes(study.store.root)))


def store_notes(root: Path) -> Iterator[str]:
    """A warning where others can write to the store."""
    who = others_who_write(root)
    if who is not None:
        yield (
            f"{who} can write to the store {root}: damage is found by checksums, forgery is not (docs/security.md); "
            f"`chmod go-w {root}` keeps it to you"
        )


def source_notes(study: Study) -> Iterator[str]:
    """A sentence for each dataset whose source changed since it was packed, by a look at the times of a few files."""
    from dbscale.shards.sources import source_change, source_of

    for name in study.used_datasets:
        if name in study.missing_datasets:
            source_of(name, study.grid.datasets[name], study.data_dir)
            continue
        change = source_change(study.dataset_dir(name), study.data_dir)
        if change is not None:
            yield f"dataset {name}: {change}"


def dataset_problems(study: Study) -> Iterator[str]:
    """Classes that a packed dataset cannot teach or test."""
    for name, manifest in study.manifests.items():
        for split, info in manifest.splits.items():
            if len(info.class_counts) != manifest.num_strata or sum(info.class_counts) != info.num_samples:
                yield (
                    f"dataset {name!r}, split {split!r}: {info.num_samples:,} samples of {manifest.num_strata} classes, "
                    f"but its counts by class are {len(info.class_counts)}, {sum(info.class_counts):,} in all; "
                    f"remove {study.dataset_dir(name)} and pack it again"
                )
        train, test = manifest.split("train").class_counts, manifest.split("test").class_counts
        unseen = [label for label, (own, asked) in enumerate(zip(train, test, strict=False)) if asked and not own]
        if unseen:
            yield (
                f"dataset {name!r}: its test split asks for {len(unseen)} classes that no training sample shows, the first "
                f"{manifest.classes[unseen[0]]!r}; take them out of its test source, or add training images"
            )


def pair_problems(cells: Iterable[Cell]) -> Iterator[str]:
    """Teachers whose attention maps cannot guide their student: of the DeiT family, whose shape is known."""
    for cell in cells:
        settings, own, guide = cell.recipe.distill, cell.recipe.model, cell.teacher_model
        if settings is None or guide is None or settings.attention is None or not settings.attention.beta:
            continue
        if isinstance(own, DeiT) and isinstance(guide, DeiT):
            yield from _map_problems(own, guide, settings.attention.layers, settings.attention.head_map)


def _map_problems(own: DeiT, guide: DeiT, layers: tuple[int, ...] | str, head_map: str) -> Iterator[str]:
    names = f"a student of {own.heads} heads and a teacher of {guide.heads}"
    if own.patch_size != guide.patch_size:
        yield (
            f"distill.attention compares maps of equally many patches; {names} have patch_size {own.patch_size} and "
            f"{guide.patch_size}: give both the same"
        )
    if head_map == "repeat" and own.heads % guide.heads:
        yield f"distill.attention.head_map 'repeat' needs whole multiples, found {names}: take 'mean' or 'matrix'"
    wrong = [layer for layer in layers if isinstance(layer, int) and not -own.depth <= layer < own.depth]
    if wrong:
        yield f"distill.attention.layers {wrong}: the student of {own.heads} heads has layers 0 to {own.depth - 1}"


def memory_problems(study: Study, cells: Iterable[Cell]) -> Iterator[str]:
    """Models whose states alone are larger than the device that the cluster file names; activations come on top."""
    device = study.cluster.device
    limit = DEVICES[device].memory_bytes or psutil.virtual_memory().total / study.cluster.num_workers()
    shapes = {stage: study.cluster.shape(stage).resources for stage in STAGES}
    for cell in {_size_of(cell): cell for cell in cells}.values():
        needed = device_memory(cell, shapes[cell.recipe.stage])
        if needed is not None and needed.states > limit:
            yield (
                f"{cell.key}: weights, gradients and optimizer alone take {needed.states / GIB:.1f} GiB in each process, "
                f"and {'this machine' if device == 'cpu' else f'an {device}'} has {limit / GIB:.1f} GiB for it: raise "
                "resources.zero_stage and num_processes, lower `workers`, or take a smaller model"
            )


def _size_of(cell: Cell) -> tuple[object, ...]:
    """Equal for cells whose states are equally large."""
    recipe, training = cell.recipe, cell.recipe.training
    models = [model and model.model_dump_json() for model in (recipe.model, cell.teacher_model)]
    return recipe.stage, *models, recipe.data.dataset, training.ema_decay, training.precision


def _params(study: Study, cell: Cell) -> int:
    model, data = cell.recipe.model, cell.recipe.data
    manifest = study.manifests.get(data.dataset)
    num_classes = manifest.num_classes if manifest is not None else 0
    return num_params(model, data.image_size, num_classes) if isinstance(model, DeiT) else 0


def disk_problems(study: Study, plan: Plan) -> Iterator[str]:
    """A store whose disk cannot hold the weights of what is still to run, and the checkpoints of what runs at once."""
    needed = disk_bytes(study, plan.todo, at_once=sum(len(wave.bundles) for wave in plan.waves[:1]))
    folder = next(path for path in (study.store.root.absolute(), *study.store.root.absolute().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    if needed > free:
        yield (
            f"the store {study.store.root} needs about {_amount(needed)} for weights and checkpoints, its disk has "
            f"{_amount(free)} left: free some space, or choose another with --store"
        )


def _amount(num_bytes: float) -> str:
    """In GiB, or in MiB where that would read 0.0."""
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB / 10 else f"{num_bytes / 2**20:.1f} MiB"


def disk_bytes(study: Study, cells: Sequence[Cell], *, at_once: int) -> float:
    """Weights of all `cells`, and checkpoints of the largest `at_once` (of fewer, where the cluster runs fewer)."""
    slurm = study.cluster.slurm if study.cluster.executor == "slurm" else None
    slots = slurm.array_parallelism if slurm is not None else study.cluster.num_workers()
    weights = [FLOAT_BYTES * _params(study, cell) for cell in cells]
    copies = (3 if cell.recipe.training.ema_decay is None else 4 for cell in cells)
    states = sorted(map(operator.mul, weights, copies), reverse=True)
    return sum(weights) + KEPT_CHECKPOINTS * sum(states[: min(slots, max(at_once, 1))])
