"""What a recipe and its resources may say: every bound at its edge, defaults, and how many steps a budget makes."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from dbscale.study.recipe import Attention, Augment, Budget, Data, DeiT, Distill, Optim, Recipe, Training
from dbscale.study.resources import Resources

TINY = 1e-9
BUDGET, OPTIM = Budget(steps=1), Optim(lr=1e-3)
TRAINING: dict[str, Any] = {"budget": BUDGET, "optim": OPTIM, "global_batch": 8}
DATA: dict[str, Any] = {"dataset": "up", "num_samples": 8, "image_size": 16}
EDGES: list[tuple[type, dict[str, Any], str, Any, Any]] = [
    # Kind, what else it needs, field, the last value that is taken, the first that is not.
    (DeiT, {}, "heads", 1, 0), (DeiT, {"heads": 1}, "head_width", 1, 0), (DeiT, {"heads": 1}, "depth", 1, 0),
    (DeiT, {"heads": 1}, "patch_size", 1, 0), (DeiT, {"heads": 1}, "mlp_ratio", TINY, 0.0),
    (Data, DATA, "num_samples", 1, 0), (Data, DATA, "image_size", 1, 0), (Data, DATA, "block_size", 1, 0),
    (Budget, {}, "epochs", TINY, 0.0), (Budget, {}, "steps", 1, 0), (Budget, {}, "samples", 1, 0),
    (Budget, {"steps": 1}, "min_steps", 1, 0), (Budget, {"steps": 1}, "max_steps", 1, 0),
    (Budget, {"steps": 1, "min_steps": 5}, "max_steps", 5, 4),
    (Optim, {}, "lr", TINY, 0.0), (Optim, {"lr": 1.0}, "lr_reference_batch", 1, 0),
    (Optim, {"lr": 1.0}, "weight_decay", 0.0, -TINY), (Optim, {"lr": 1.0}, "eps", TINY, 0.0),
    (Optim, {"lr": 1.0}, "warmup_share", 0.0, -TINY), (Optim, {"lr": 1.0}, "warmup_share", 1.0, 1 + TINY),
    (Optim, {"lr": 1.0}, "min_lr", 0.0, -TINY), (Optim, {"lr": 1.0}, "clip_norm", TINY, 0.0),
    (Optim, {"lr": 1.0}, "layer_decay", TINY, 0.0), (Optim, {"lr": 1.0}, "layer_decay", 1.0, 1 + TINY),
    (Augment, {}, "crop_padding", 0, -1), (Augment, {}, "hflip", 0.0, -TINY), (Augment, {}, "hflip", 1.0, 1 + TINY),
    (Augment, {}, "color_jitter", 0.0, -TINY), (Augment, {}, "mixup", 0.0, -TINY), (Augment, {}, "cutmix", 0.0, -TINY),
    (Augment, {}, "repeats", 1, 0), (Attention, {}, "beta", 0.0, -TINY), (Distill, {}, "alpha", 0.0, -TINY),
    (Distill, {}, "alpha", 1.0, 1 + TINY), (Distill, {}, "temperature", TINY, 0.0),
    (Distill, {"head": "parallel"}, "alpha", TINY, 0.0), (Distill, {"head": "parallel"}, "alpha", 1 - TINY, 1.0),
    (Training, TRAINING, "global_batch", 1, 0), (Training, TRAINING, "label_smoothing", 0.0, -TINY),
    (Training, TRAINING, "drop_path", 1.0, 1 + TINY), (Training, TRAINING, "ema_decay", TINY, 0.0),
    (Training, TRAINING, "ema_decay", 1 - TINY, 1.0),
    (Resources, {}, "num_processes", 1, 0), (Resources, {}, "micro_batch", 1, 0), (Resources, {}, "num_workers", 0, -1),
    (Resources, {}, "threads", 1, 0), (Resources, {}, "checkpoint_interval_s", TINY, 0.0),
    (Resources, {}, "checkpoint_stall_share", TINY, 0.0), (Resources, {}, "zero_stage", 0, -1),
    (Resources, {}, "zero_stage", 3, 4),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "rest", "name", "taken", "refused"), EDGES)
def test_every_field_ends_where_it_says(kind: type, rest: dict[str, Any], name: str, taken: Any, refused: Any) -> None:
    assert getattr(kind(**rest | {name: taken}), name) == taken
    with pytest.raises(ValidationError):
        kind(**rest | {name: refused})


def test_a_cluster_that_says_nothing_gets_one_process_with_zero_1_that_resumes_bitwise() -> None:
    known = {
        "num_processes": 1, "micro_batch": None, "num_workers": 0, "zero_stage": 1, "device": "auto", "threads": None,
        "checkpoint_interval_s": 300.0, "checkpoint_stall_share": 0.01, "deterministic": True, "compile": False,
        "cuda_graph": True, "kd_backend": "auto", "teacher_cache": False, "tracker": None,
    }  # fmt: skip
    assert known.items() <= Resources().model_dump().items()


@pytest.mark.parametrize(
    ("budget", "steps"),
    [
        ({"steps": 7}, 7),
        ({"steps": 7, "min_steps": 9}, 7),  # steps are meant as they stand
        ({"samples": 3}, 1),
        ({"samples": 8}, 1),
        ({"samples": 9}, 2),
        ({"epochs": 2.0}, 25),  # 2 · 100 images at 8 a step
        ({"epochs": 2.01}, 26),
        ({"epochs": 2.0, "min_steps": 30}, 30),
        ({"epochs": 2.0, "min_steps": 20}, 25),
        ({"epochs": 2.0, "max_steps": 20}, 20),
        ({"epochs": 2.0, "max_steps": 30}, 25),
    ],
)
def test_steps_of_a_budget_by_hand(budget: dict[str, Any], steps: int) -> None:
    assert Budget(**budget).num_steps(100, 8) == steps
    training = Training(budget=Budget(**budget), optim=OPTIM, global_batch=8)
    data = Data(dataset="up", num_samples=100, image_size=16)
    assert Recipe(stage="pretrain", model=DeiT(heads=1), data=data, training=training, seed=0).num_steps == steps


@pytest.mark.parametrize("given", [{}, {"epochs": 1.0, "steps": 1}, {"steps": 1, "samples": 1}])
def test_a_budget_has_one_measure(given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="exactly one of epochs, steps, samples"):
        Budget(**given)


def test_stages_take_what_belongs_to_them() -> None:
    def recipe(stage: str, **fields: Any) -> Recipe:
        about = {"model": DeiT(heads=1), "data": Data(**DATA), "training": Training(**TRAINING), "seed": 0}
        return Recipe.model_validate({"stage": stage, **about, **fields})

    foreign = {"sha256": None, "model": DeiT(heads=2)}
    for stage, fields, told in (
        ("pretrain", {"distill": Distill()}, "a pretrain recipe takes no distill settings"),
        ("distill", {}, "a distill recipe needs distill settings"),
        ("pretrain", {"teacher": foreign}, "a pretrain recipe takes no teacher"),
        ("finetune", {"start": foreign}, "a finetune recipe takes no start"),
        ("distill", {"distill": Distill(), "draw": 1}, "a distill recipe has no draw"),
    ):
        with pytest.raises(ValidationError, match=told):
            recipe(stage, **fields)
    assert recipe("pretrain", start=foreign).start is not None and recipe("finetune", draw=1).draw == 1
    assert recipe("distill", distill=Distill(), teacher=foreign, start=foreign).teacher is not None
