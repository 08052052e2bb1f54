"""Every field of a recipe acts: a run that differs in it ends with other weights. No field is only written down."""

from __future__ import annotations

import pytest

from dbscale.study.cell import Cell
from dbscale.study.recipe import Attention, Augment, Budget, Data, DeiT, Distill, Optim, Training

OPTIM = {"lr": 1e-3, "warmup_share": 0.25, "clip_norm": 1.0}
MIXED = {"mixup": 0.8, "cutmix": 1.0}
CHANGES = {
    Optim: {
        "lr": 2e-3, "lr_reference_batch": 8, "weight_decay": 0.5, "betas": (0.8, 0.999), "eps": 1e-3,
        "warmup_share": 0.5, "min_lr": 5e-4, "clip_norm": 0.01, "layer_decay": 0.5,
    },
    Augment: {
        "crop_padding": 3, "random_resized_crop": (0.3, 1.0), "hflip": 0.0, "color_jitter": 0.4,
        "rand_augment": "rand-m9-mstd0.5-inc1", "random_erasing": 0.9, "mixup": 0.2, "cutmix": 0.2, "mix_share": 0.5,
        "mix_switch_share": 0.1, "repeats": 2,
    },
    Training: {
        "budget": Budget(epochs=2.0), "global_batch": 8, "precision": "bf16", "label_smoothing": 0.3, "drop_path": 0.5,
        "ema_decay": 0.9,
    },
    Data: {"dataset": "down", "num_samples": 30, "subset_seed": 1, "image_size": 24, "block_size": 8},
    Distill: {"alpha": 0.9, "temperature": 1.0, "target": "hard", "attention": Attention(), "head": "parallel"},
    Attention: {"beta": 3.0, "layers": "all", "head_map": "repeat"},
}  # fmt: skip
ELSEWHERE = {
    # Their own entries here; a linear probe is tested with the stages, loss terms with plugins.
    Training: {"optim", "augment", "scope", "loss_terms"},
    Data: {"tier"},  # other pixels only where a dataset is packed in another way
}
BASE = {"augment": Augment(crop_padding=1, hflip=0.5, **MIXED), "optim": Optim(**OPTIM)}
TEACHER = DeiT(heads=1, head_width=8, depth=2, patch_size=4)


def test_every_field_is_here():
    for owner, changes in CHANGES.items():
        assert changes.keys() | ELSEWHERE.get(owner, set()) == set(owner.model_fields), owner.__name__


@pytest.fixture
def weights_of(bench):
    """SHA-256 of the weights that a pretrain or distill cell ends with; training options in, data options apart."""

    def train(stage="pretrain", *, data=None, **options) -> str:
        teacher = bench.cell(model=TEACHER, **BASE) if stage == "distill" else None
        if teacher is not None:
            assert bench.run(teacher).status == "done"
        cell = bench.cell(stage, teacher=teacher, **{**BASE, **options})
        if data:
            changed = cell.recipe.data.model_copy(update=data)
            other = bench.cell(dataset=changed.dataset, num_samples=changed.num_samples, **{**BASE, **options})
            cell = Cell(other.recipe.model_copy(update={"data": changed}), other.fingerprint)
            bench.store.write_spec(cell.spec())
        outcome = bench.run(cell)
        assert outcome.status == "done", outcome.reason
        return outcome.row.weights_sha256

    return train


@pytest.mark.parametrize("name", CHANGES[Optim])
def test_optimizer_fields(name, weights_of):
    assert weights_of() != weights_of(optim=Optim(**{**OPTIM, name: CHANGES[Optim][name]}))


@pytest.mark.parametrize("name", CHANGES[Augment])
def test_augmentation_fields(name, weights_of):
    changed = {**BASE["augment"].model_dump(), name: CHANGES[Augment][name]}
    if name == "random_resized_crop":
        changed["crop_padding"] = 0
    assert weights_of() != weights_of(augment=Augment(**changed))


@pytest.mark.parametrize("name", CHANGES[Training])
def test_training_fields(name, weights_of):
    assert weights_of() != weights_of(**{name: CHANGES[Training][name]})


@pytest.mark.parametrize("name", CHANGES[Data])
def test_data_fields(name, weights_of):
    assert weights_of() != weights_of(data={name: CHANGES[Data][name]})


@pytest.mark.parametrize("name", CHANGES[Distill])
def test_distillation_fields(name, weights_of):
    assert weights_of("distill") != weights_of("distill", distill=Distill(**{name: CHANGES[Distill][name]}))


@pytest.mark.parametrize("name", CHANGES[Attention])
def test_attention_fields(name, weights_of):
    changed = Attention(**{name: CHANGES[Attention][name]})
    base = weights_of("distill", distill=Distill(attention=Attention()))
    assert base != weights_of("distill", distill=Distill(attention=changed))
