"""What a cell does, and nothing of how or where: every field here reaches the cell's identity.

Micro-batch, worker counts, ZeRO stage and paths are *how*; they live in `launch/` and cannot change a result's name.
A new optional field (default None) keeps old ids; a changed default changes them and bumps RECIPE_VERSION.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from dbscale.strict import Strict
from dbscale.study.task import DenseTask, TaskName, task_name

RECIPE_VERSION = 1

Stage = Literal["pretrain", "distill", "finetune"]
Precision = Literal["bf16", "fp16", "fp32"]
Tier = Literal["resident", "raw", "jpeg256", "jpeg"]
Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class DeiT(Strict):
    """The paper's family: `heads` of width `head_width`; 2…8 heads of 64 are 2.5M…38.4M parameters."""

    kind: Literal["deit"] = "deit"
    heads: Positive
    head_width: Positive = 64
    depth: Positive = 12
    patch_size: Positive = 16
    mlp_ratio: float = Field(default=4.0, gt=0)

    @property
    def width(self) -> int:
        return self.heads * self.head_width


class TimmModel(Strict):
    """Any classifier that timm creates by name."""

    kind: Literal["timm"]
    name: str
    kwargs: dict[str, bool | int | float | str] = {}
    """Passed to `timm.create_model`."""


Model = Annotated[DeiT | TimmModel, Field(discriminator="kind")]


class Data(Strict):
    """The training subset: the first `num_samples` of the dataset's window `subset_seed`."""

    dataset: str
    num_samples: Positive
    subset_seed: int = 0
    image_size: Positive
    """Pixels a side, as the model sees them."""
    tier: Tier = "resident"
    block_size: Positive | None = None
    """Samples read together by the block shuffle of network filesystems; None shuffles freely."""


class Budget(Strict):
    """How long to train: exactly one of epochs, steps, samples; `min_steps` keeps small subsets from undertraining."""

    epochs: float | None = Field(default=None, gt=0)
    steps: Positive | None = None
    samples: Positive | None = None
    min_steps: Positive | None = None
    max_steps: Positive | None = None

    @model_validator(mode="after")
    def _one_measure(self) -> Budget:
        given = [name for name in ("epochs", "steps", "samples") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"a budget takes exactly one of epochs, steps, samples; found {given or 'none'}")
        if self.max_steps is not None and (self.min_steps or 1) > self.max_steps:
            raise ValueError(f"min_steps {self.min_steps} exceeds max_steps {self.max_steps}")
        return self

    def num_steps(self, num_samples: int, global_batch: int) -> int:
        """Optimizer steps on `num_samples` at `global_batch`."""
        if self.steps is not None:
            return self.steps
        seen = self.samples if self.samples is not None else (self.epochs or 0) * num_samples
        steps = max(math.ceil(seen / global_batch), self.min_steps or 1)
        return min(steps, self.max_steps) if self.max_steps is not None else steps


class Optim(Strict):
    """AdamW with warm-up and cosine, stepped by optimizer step."""

    lr: float = Field(gt=0)
    lr_reference_batch: Positive | None = None
    """The global batch `lr` was chosen for; another batch scales it linearly. None: no scaling."""
    weight_decay: float = Field(default=0.05, ge=0)
    """Not applied to biases, norms, position and class tokens."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    warmup_share: Share = 0.05
    """Share of all steps."""
    min_lr: float = Field(default=0.0, ge=0)
    clip_norm: float | None = Field(default=None, gt=0)
    layer_decay: float | None = Field(default=None, gt=0, le=1)
    """Each block below the head learns at this factor of the one above."""


class Augment(Strict):
    """What an image may become; drawn per (seed, epoch, sample), so equal for both arms and any worker count."""

    crop_padding: int = Field(default=0, ge=0)
    """Zero padding in pixels before a random crop back to size."""
    random_resized_crop: tuple[float, float] | None = None
    """Range of the crop's area share; DeiT's is (0.08, 1)."""
    hflip: Share = 0.5
    color_jitter: float = Field(default=0.0, ge=0)
    rand_augment: str | None = None
    """timm's notation, e.g. rand-m9-mstd0.5-inc1."""
    random_erasing: Share = 0.0
    mixup: float = Field(default=0.0, ge=0)
    cutmix: float = Field(default=0.0, ge=0)
    mix_share: Share = 1.0
    """Share of batches that mixup or CutMix touches."""
    mix_switch_share: Share = 0.5
    """Share of touched batches that take CutMix when both are on."""
    repeats: Positive = 1
    """Repeated augmentation: views of one sample in an epoch."""


class Attention(Strict):
    """The attention-map term of distillation: KL between maps as distributions over keys."""

    beta: float = Field(default=1.0, ge=0)
    layers: tuple[int, ...] | Literal["all", "last"] = "last"
    head_map: Literal["repeat", "mean", "matrix"] = "mean"


class Distill(Strict):
    """loss = (1-alpha)·CE + alpha·guidance + beta·attention KL."""

    alpha: Share = 0.5
    temperature: float = Field(default=3.0, gt=0)
    target: Literal["soft", "hard", "mixed"] = "soft"
    """What the teacher guides with. soft: T²·KL(teacher ‖ student) (Hinton et al., 1503.02531); hard: cross-entropy to
    its decision (DeiT's hard distillation, 2012.12877, eq. 3); mixed: half of each."""
    attention: Attention | None = None
    head: Literal["class", "parallel"] | None = None
    """Which classifier the teacher guides. class, or left out: the only one. parallel: a second one on the same features
    (on its own token, where timm's model has a distillation token), which alone gets `alpha`'s term, while the first
    learns the labels; predictions average both (DeiT, 2012.12877, section 4). The average of two linear heads is a linear
    head, so what is exported is plain timm with one."""

    @field_validator("head")
    @classmethod
    def _one_spelling(cls, head: str | None) -> str | None:
        """`class` is what a recipe without the field says, and equal recipes have one id."""
        return None if head == "class" else head

    @model_validator(mode="after")
    def _both_heads_learn(self) -> Distill:
        if self.head == "parallel" and not 0 < self.alpha < 1:
            raise ValueError(
                f"head parallel with alpha {self.alpha:g}: one of both heads would learn nothing and spoil their "
                "average; set alpha between 0 and 1, or head: class"
            )
        return self


class Training(Strict):
    """How a stage trains; the part of a recipe that a grid writes once per stage."""

    budget: Budget
    optim: Optim
    global_batch: Positive
    precision: Precision = "bf16"
    augment: Augment = Augment()
    label_smoothing: Share = 0.0
    drop_path: Share = 0.0
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """The exported weights are a moving average with this decay, reached gradually: (1 + step) / (10 + step) until
    then. None: the weights of the last step."""
    scope: Literal["full", "linear_probe"] = "full"
    """What a finetune changes: everything, or the head alone."""
    loss_terms: dict[str, float] | None = None
    """Terms of plugins that are added to the loss, with their weights."""


Channels = tuple[float, float, float]


class Pretrained(Strict):
    """Weights that no cell trained, known by the hash of their file."""

    sha256: str | None = None
    """None until they are imported: ids are provisional."""
    model: Model
    mean: Channels | None = None
    std: Channels | None = None


def unfit_training(task: DenseTask | None, training: Training) -> str | None:
    """Why a task cannot be trained so: masks and boxes do not follow what mixes images or moves pixels freely."""
    if task is None:
        return None
    on = [name for name in ("rand_augment", "random_erasing", "mixup", "cutmix") if getattr(training.augment, name)]
    on += ["loss_terms"] if training.loss_terms else []
    on += ["label_smoothing"] if task.kind == "detection" and training.label_smoothing else []
    if not on:
        return None
    return f"{task.kind} takes no {' and no '.join(on)}: its targets would not follow; leave it out of its training"


class Recipe(Strict):
    """One training run, whole."""

    stage: Stage
    model: Model
    data: Data
    training: Training
    seed: int
    """Keys initialisation (of a finetune: its head), order and augmentation."""
    distill: Distill | None = None
    teacher: Pretrained | None = None
    """The teacher of a distill cell, where no cell trained it."""
    plugins: dict[str, str] | None = None
    """Hash of each plugin, by module."""
    metrics: tuple[str, ...] | None = None
    """Further means over the test split, of plugins."""
    start: Pretrained | None = None
    """What an upstream run begins with instead of random weights; its head is random all the same."""
    draw: Positive | None = None
    """Which further finetune of one upstream run this is; None for the first. `draw_seed` then gives `seed` and
    `data.subset_seed`."""
    task: DenseTask | None = None
    """What a finetune's dataset asks; None: classes of images."""

    @model_validator(mode="after")
    def _fits_its_stage(self) -> Recipe:
        distills, finetunes = self.stage == "distill", self.stage == "finetune"
        checks = {
            "has no draw; only finetunes are drawn several times": self.draw is None or finetunes,
            "takes no teacher": self.teacher is None or distills,
            "takes no start": self.start is None or not finetunes,
            f"{'needs' if distills else 'takes no'} distill settings": (self.distill is not None) == distills,
            "has no task; upstream sets are classified, finetunes have tasks": self.task is None or finetunes,
        }
        for problem, holds in checks.items():
            if not holds:
                raise ValueError(f"a {self.stage} recipe {problem}")
        if (unfit := unfit_training(self.task, self.training)) is not None:
            raise ValueError(unfit)
        return self

    @property
    def task_name(self) -> TaskName:
        return task_name(self.task)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.training.budget.num_steps(self.data.num_samples, self.training.global_batch)


SEEDS = 2**32
"""Seeds of a grid are below; `draw_seed` gives its draws the numbers above."""


def draw_seed(seed: int, draw: int) -> int:
    """The seed of a finetune's draw: the grid's own for draw 0, for each further one a number that no other pair has.

    Every consumer hashes it together with a purpose, so draws share no stream. Two draws read different windows of the
    downstream set; where draws x num_samples exceeds its labels, and by chance elsewhere, windows overlap.
    """
    return seed + draw * SEEDS
