"""What a cell will cost before it runs: FLOPs of a model, seconds and memory on a device.

Counts a multiply-add as two operations and a backward pass as two forward passes, as is usual.
Calibrated by a probe of the machine that launch runs, and by finished rows; it never imports torch.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from pydantic import Field

from dbscale.files import hostname, read_model, write_model
from dbscale.strict import Strict
from dbscale.study.cell import Cell
from dbscale.study.recipe import DeiT, Model, Recipe, Stage
from dbscale.study.resources import Resources
from dbscale.study.store import Row, Store
from dbscale.study.task import DEFAULT_WIDTH

FORWARD_GFLOPS_224 = {"resnet18": 3.64, "resnet34": 7.34, "resnet50": 8.22, "resnet101": 15.7}
"""Published multiply-adds at 224 px, doubled; a timm model not listed counts as DeiT-S (9.2)."""
DEFAULT_GFLOPS_224 = 9.2
CALIBRATION_NAME = "calibration.json"
STAGES: tuple[Stage, ...] = ("pretrain", "distill", "finetune")


@dataclass(frozen=True)
class Device:
    """A kind of processor: its dense bf16 peak and the share that training small ViTs usually reaches."""

    name: str
    peak_flops: float
    utilisation: float
    step_overhead_s: float
    cell_overhead_s: float
    """Building the model, reading parents, evaluating and writing results."""
    memory_bytes: float | None = None
    """Memory of the largest kind on sale; None: the host's."""

    @property
    def flops_per_s(self) -> float:
        return self.peak_flops * self.utilisation


DEVICES = {
    "cpu": Device("cpu", 1e11, 0.30, 0.012, 0.3),
    "a100": Device("a100", 312e12, 0.35, 0.004, 20.0, 80e9),
    "h100": Device("h100", 989e12, 0.25, 0.004, 20.0, 80e9),
    "h200": Device("h200", 989e12, 0.25, 0.004, 20.0, 141e9),
}
"""Peaks and memory from the vendors' data sheets; `cpu` is one core, on images of 32 px, the others on 224 px."""


class Measured(Strict):
    """One cell of the probe."""

    cell: str
    stage: Stage
    num_steps: int
    step_flops: float
    step_time_s: float
    overhead_s: float
    """Wall time of the cell outside its steps."""


class Calibration(Strict):
    """Speed of one machine on one grid's cells."""

    host: str
    device: str
    """Kind, as the cluster file names it."""
    created: float
    """Unix time."""
    flops_per_s: float = Field(gt=0)
    step_overhead_s: float = Field(ge=0)
    cell_overhead_s: float = Field(ge=0)
    stage_scale: dict[Stage, float] = {}
    """Measured over fitted, by stage."""
    measured: tuple[Measured, ...] = ()

    def fits(self, device: str) -> bool:
        """Whether it speaks of such a device here; accelerators are alike on every host, CPUs are not."""
        return self.device == device and (device != "cpu" or self.host == hostname())


def read_calibration(store: Store) -> Calibration | None:
    """What `dbscale plan --calibrate` measured for this store. Raises FileError where the file is damaged."""
    with contextlib.suppress(FileNotFoundError):
        return read_model(Calibration, store.root / CALIBRATION_NAME)


def write_calibration(store: Store, calibration: Calibration) -> None:
    write_model(store.root / CALIBRATION_NAME, calibration)


@dataclass(frozen=True)
class CostModel:
    """Predicts seconds on one device."""

    device: Device = DEVICES["cpu"]
    scale: float = 1.0
    """Measured over predicted, of stages that are not in `stage_scale`."""
    stage_scale: Mapping[Stage, float] = field(default_factory=dict)
    """The same by stage: a teacher's forward or a short finetune has overheads of its own."""
    _known: dict[str, float] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Seconds of the cells asked for so far, by key: a plan of ten thousand cells asks five times for each."""

    def seconds(self, cell: Cell) -> float:
        """Predicted device-seconds of one cell."""
        if cell.key not in self._known:
            scale = self.stage_scale.get(cell.recipe.stage, self.scale)
            steps_s = cell.recipe.num_steps * self.step_seconds(step_flops(cell))
            self._known[cell.key] = scale * (steps_s + self.device.cell_overhead_s)
        return self._known[cell.key]

    def hours(self, cells: Iterable[Cell]) -> float:
        """Predicted device-hours of cells."""
        return sum(map(self.seconds, cells)) / 3600

    def step_seconds(self, flops: float) -> float:
        """Predicted seconds of one optimizer step, before scaling."""
        return flops / self.device.flops_per_s + self.device.step_overhead_s

    def probed(self, calibration: Calibration) -> CostModel:
        """The same model with what a probe of this machine measured."""
        speed, overheads = calibration.flops_per_s, (calibration.step_overhead_s, calibration.cell_overhead_s)
        return CostModel(Device(self.device.name, speed, 1.0, *overheads), 1.0, calibration.stage_scale)

    def calibrated(self, measured: Iterable[tuple[Cell, Row]]) -> CostModel:
        """The same model, scaled by the median of measured over predicted of each stage; unchanged without rows."""
        ratios: dict[Stage, list[float]] = {}
        for cell, row in measured:
            ratios.setdefault(cell.recipe.stage, []).append(row.timing.device_time_s / self.seconds(cell))
        if not ratios:
            return self
        overall = statistics.median(ratio for found in ratios.values() for ratio in found)
        known: dict[Stage, float] = {stage: self.stage_scale.get(stage, self.scale) for stage in STAGES}
        scales = {stage: known[stage] * statistics.median(ratios.get(stage, [overall])) for stage in STAGES}
        return replace(self, scale=self.scale * overall, stage_scale=scales)


def duration(seconds: float | None) -> str:
    """Seconds as people say them: 4.5 s, 45 s, 12 min, 3.5 h, 2.1 days; a dash for what nobody measured."""
    if seconds is None:
        return "–"
    if seconds < 90:
        return f"{seconds:.{0 if seconds >= 10 else 1}f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def fit_step_times(measured: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(operations a second, seconds a step) such that flops/speed + overhead meets `measured` (flops, seconds).

    Least squares of the relative errors, neither below zero. One size alone cannot tell the two apart: all of its time
    is then put down to operations.
    """
    # Minimise Σ (a·f/t + b·1/t − 1)², a = 1/speed, b = overhead.
    ff = sum((f / t) ** 2 for f, t in measured)
    fo = sum(f / t**2 for f, t in measured)
    oo = sum(1 / t**2 for _, t in measured)
    f1, o1 = sum(f / t for f, t in measured), sum(1 / t for _, t in measured)
    determinant = ff * oo - fo**2
    if determinant > 1e-9 * ff * oo:
        a, b = (f1 * oo - o1 * fo) / determinant, (o1 * ff - f1 * fo) / determinant
        if a > 0 and b >= 0:
            return 1 / a, b
        if a <= 0:  # larger models were not slower: overhead is all there is to see
            return max(f / t for f, t in measured) * 1e3, o1 / oo
    return ff / f1, 0.0


def step_flops(cell: Cell) -> float:
    """Operations of one optimizer step."""
    return train_flops(cell.recipe, cell.teacher_model) / cell.recipe.num_steps


def train_flops(
    recipe: Recipe, teacher: Model | None = None, forward: Callable[[Model, int], float] | None = None
) -> float:
    """Operations of a whole run: three student forwards a sample, one where the head alone trains, and the teacher's.

    `forward(model, image_size)` counts a forward pass; by default `forward_flops` predicts it.
    """
    head = head_flops(recipe) if forward is None else 0.0  # what is counted has its head already
    forward, size = forward or forward_flops, recipe.data.image_size
    a_sample = (forward(recipe.model, size) + head) * (1 if recipe.training.scope == "linear_probe" else 3)
    if teacher is not None:
        a_sample += forward(teacher, size)
    return a_sample * recipe.num_steps * recipe.training.global_batch


def matched_steps(plain: Recipe, distill: Cell) -> int:
    """Steps of `plain` that cost as many operations as the distilled run and its teacher's training together.

    Rounded to whole steps, so both costs differ by half a step at most. The number stands in recipes: whoever changes
    how operations are predicted here renames the cells of the arm `plain_matched`.
    """
    assert distill.teacher is not None, "a distill cell has a teacher"
    teacher = distill.teacher.recipe
    total = train_flops(teacher) + train_flops(distill.recipe, teacher.model)
    return max(1, round(total * plain.num_steps / train_flops(plain)))


def has_known_flops(model: Model) -> bool:
    """Whether `forward_flops` is more than a guess."""
    return as_deit(model) is not None or (not isinstance(model, DeiT) and _family(model.name) in FORWARD_GFLOPS_224)


def as_deit(model: Model | None) -> DeiT | None:
    """The sizes of a plain vision transformer, also where timm makes it from its keyword arguments; None for others."""
    if model is None or isinstance(model, DeiT):
        return model
    sizes = {name: model.kwargs.get(name) for name in ("embed_dim", "num_heads", "depth")}
    if not _family(model.name).startswith(("vit_", "deit_")) or not all(isinstance(v, int) for v in sizes.values()):
        return None
    width, heads, depth = map(int, sizes.values())  # type: ignore[arg-type]
    patch_size, mlp_ratio = int(model.kwargs.get("patch_size", 16)), float(model.kwargs.get("mlp_ratio", 4.0))
    return DeiT(heads=heads, head_width=width // heads, depth=depth, patch_size=patch_size, mlp_ratio=mlp_ratio)


def _family(timm_name: str) -> str:
    """The name without the tag of pretrained weights."""
    return timm_name.partition(".")[0]


def forward_flops(model: Model, image_size: int) -> float:
    """Operations of one forward pass on one square RGB image, the head left out."""
    transformer = as_deit(model)
    if transformer is None:
        assert not isinstance(model, DeiT)
        gflops = FORWARD_GFLOPS_224.get(_family(model.name), DEFAULT_GFLOPS_224)
        return gflops * 1e9 * (image_size / 224) ** 2
    patches, tokens = num_tokens(transformer, image_size)
    width = transformer.width
    dense = (8 + 4 * transformer.mlp_ratio) * width**2 * tokens
    attention = 4 * tokens**2 * width
    return transformer.depth * (dense + attention) + 6 * transformer.patch_size**2 * width * patches


def head_flops(recipe: Recipe) -> float:
    """Operations of one forward pass of a dense task's pyramid and head; 0 for linear ones, which cost next to nothing.

    Convolutions of 3 × 3 from `width` to `width` channels: at 4, 2, 1 and ½ times a ViT's resolution for segmentation (and
    one more at the finest), at 2, 1, ½ and ¼ for detection, which has two towers of them. Timm models count as patch 16.
    """
    task, size = recipe.task, recipe.data.image_size
    if task is None or (task.kind == "segmentation" and task.head == "linear"):
        return 0.0
    transformer = as_deit(recipe.model)
    patches = (size / (transformer.patch_size if transformer is not None else 16)) ** 2
    a_map = 2 * 9 * (task.width or DEFAULT_WIDTH) ** 2 * patches
    if task.kind == "segmentation":
        return a_map * (16 + 4 + 1 + 1 / 4 + 16)
    return a_map * (4 + 1 + 1 / 4 + 1 / 16) * (1 + 2 * task.num_convs)


def num_params(model: DeiT, image_size: int, num_classes: int) -> int:
    """Parameters of a DeiT with a linear head: 2.5M at 2 heads of 64 to 38.4M at 8, 12 deep, 224 px."""
    _, tokens = num_tokens(model, image_size)
    width, hidden = model.width, int(model.mlp_ratio * model.width)
    block = 4 * width**2 + 2 * width * hidden + 9 * width + hidden
    embedding = (3 * model.patch_size**2 + 1) * width + (tokens + 1) * width
    return model.depth * block + embedding + 2 * width + (width + 1) * num_classes


def num_tokens(model: DeiT, image_size: int) -> tuple[int, int]:
    """Patches, and tokens with the class token."""
    patches = (image_size // model.patch_size) ** 2
    return patches, patches + 1


@dataclass(frozen=True)
class Memory:
    """Bytes that each device holds while a cell trains; what engines need to talk to each other comes on top."""

    states: float
    """Weights, gradients, AdamW's moments, the moving average, and the teacher's weights."""
    activations: float
    micro_batch: int

    @property
    def total(self) -> float:
        return self.states + self.activations


def device_memory(cell: Cell, resources: Resources) -> Memory | None:
    """What one of the cell's devices holds at most; None for models outside the DeiT family, whose sizes nobody said.

    ZeRO partitions AdamW's moments and DeepSpeed's copy of the weights from stage 1 on, gradients from 2, weights and
    their average from 3 (1910.02054, section 5). The head counts 1,000 classes.
    """
    recipe, asked = cell.recipe, cell.teacher_model
    size, world_size, zero = recipe.data.image_size, resources.num_processes, resources.zero_stage or 0
    student, teacher = as_deit(recipe.model), as_deit(asked)
    if student is None or (teacher is None and asked is not None):
        return None
    micro_batch = min(resources.micro_batch or recipe.training.global_batch, recipe.training.global_batch // world_size)

    def held(copies: int, from_stage: int) -> float:
        return 4 * copies / (world_size if zero >= from_stage else 1)

    copies = held(2 if resources.zero_stage is None else 3, 1) + held(1, 2)
    copies += held(1 if recipe.training.ema_decay is None else 2, 3)
    # Autocast keeps 16-bit weights from forward to backward, gathered ones too.
    copies += 0 if recipe.training.precision == "fp32" else 2
    states = copies * num_params(student, size, 1000)
    activations = micro_batch * _activation_bytes(recipe, student, student.depth)
    if teacher is not None:
        # Without gradients a layer's activations go when the next one has them.
        states += 4 * num_params(teacher, size, 1000)
        activations += micro_batch * _activation_bytes(recipe, teacher, 1)
    return Memory(states, activations, micro_batch)


def _activation_bytes(recipe: Recipe, model: DeiT, depth: int) -> float:
    """Kept of one image for the backward pass of `depth` layers, attention fused.

    The residual stream and norms in float32; what enters matrix products, attention and GELU in the run's precision: so
    many bytes a token and unit of width. The last norm and the image itself come on top.
    """
    size, is_full = recipe.data.image_size, recipe.training.precision == "fp32"
    layer, norm, pixel = (32 + 8 * model.mlp_ratio, 8, 4) if is_full else (20 + 4 * model.mlp_ratio, 4, 2)
    return num_tokens(model, size)[1] * model.width * (depth * layer + norm) + 3 * pixel * size**2
