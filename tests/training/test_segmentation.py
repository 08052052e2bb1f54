"""Segmentation: mIoU by hand and as torchmetrics has it, a loss that does not depend on how a batch is cut, heads on any
backbone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch.nn import functional
from torchmetrics.classification import MulticlassJaccardIndex

from dbscale.data.target import IGNORE
from dbscale.errors import TrainingError
from dbscale.study.task import Segmentation
from dbscale.training.segmentation import Segmenter, image_errors, judge, mean_iou, pixel_loss, summarize
from dbscale.training.tasks import join_head


def batch_of(masks: Any) -> Any:
    return SimpleNamespace(targets=masks)


def logits_of(labels_BHW: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Logits whose argmax are these labels."""
    return functional.one_hot(labels_BHW, num_classes).permute(0, 3, 1, 2).float() * 5


def test_miou_by_hand() -> None:
    truth = np.array([[0, 0, 1, 1], [0, 2, IGNORE, 1]], np.uint8)
    found = torch.tensor([[0, 1, 1, 1], [0, 0, 2, 1]])[None]
    row = judge(lambda _: logits_of(found, 4), torch.zeros(1), batch_of([truth]), 4)[0]
    # Counted: 7 pixels. Class 0: found at 3, true at 3, both 2. Class 1: found at 4, true at 3, both 3. Class 2: one missed.
    assert row[0] == 1
    assert row[2:6].tolist() == [2, 3, 0, 0]
    assert row[6:].tolist() == [4, 4, 1, 0]
    result = summarize(row.numpy()[None], 4)
    assert result.error_rate == pytest.approx(1 - (2 / 4 + 3 / 4 + 0) / 3), "class 3 never occurs"
    wrong = 5 + np.log(1 + 3 * np.exp(-5)) - 0  # cross-entropy of a pixel whose label is not the found one
    right = np.log(1 + 3 * np.exp(-5))
    assert result.loss == pytest.approx((5 * right + 2 * wrong) / 7)
    assert (result.top5_error_rate, result.calibration_error, result.correct_N) == (None, None, None)


def test_miou_agrees_with_torchmetrics_on_masks_of_several_sizes() -> None:
    generator = torch.Generator().manual_seed(0)
    num_classes, rows = 5, []
    metric = MulticlassJaccardIndex(num_classes, average="macro", ignore_index=IGNORE)
    for number in range(12):
        size = (9 + number, 17 - number)
        truth = torch.randint(0, 4, size, generator=generator)  # class 4 is only ever found
        truth[torch.rand(size, generator=generator) < 0.2] = IGNORE
        logits = torch.randn(1, num_classes, 4, 4, generator=generator)
        logits[:, 3] -= 9  # class 3 is never found
        enlarged = functional.interpolate(logits, size, mode="bilinear", align_corners=False)
        metric.update(enlarged.argmax(1), truth[None])
        rows.append(judge(lambda _, logits=logits: logits, torch.zeros(1), batch_of([truth.numpy()]), num_classes))
    table = torch.cat(rows).numpy()
    found = summarize(table, num_classes)
    assert found.error_rate == pytest.approx(1 - float(metric.compute()), abs=1e-6)
    assert found.counted_N.all() and found.errors_N is not None
    assert found.errors_N.mean() == pytest.approx(found.error_rate, abs=1e-6)


def test_samples_that_could_not_be_decoded_are_in_no_mean() -> None:
    table = np.zeros((3, 6))
    table[0] = [1, 0.5, 3, 1, 4, 2]
    table[2] = [1, 1.5, 1, 0, 4, 1]
    found = summarize(table, 2)
    assert found.error_rate == pytest.approx(1 - (4 / 8 + 1 / 3) / 2)
    assert found.loss == 1.0 and found.counted_N.tolist() == [True, False, True]
    assert np.isnan(found.errors_N[1])  # type: ignore[index]


def test_the_variance_of_image_errors_is_that_of_the_miou() -> None:
    """Against mIoUs of many samples of images from one population."""
    generator = np.random.default_rng(0)

    def draw(num: int) -> tuple[np.ndarray, np.ndarray]:
        either = generator.integers(20, 100, (num, 3)).astype(float)
        either[generator.random((num, 3)) < 0.3] = 0
        return np.floor(either * generator.beta(4, 2, (num, 3))), either

    num = 200
    errors = [1 - mean_iou(*(each.sum(0) for each in draw(num))) for _ in range(400)]
    predicted = [image_errors(*draw(num)).var() / num for _ in range(20)]
    assert np.mean(predicted) == pytest.approx(np.var(errors), rel=0.25)
    both, either = draw(7)
    assert image_errors(both, either).mean() == pytest.approx(1 - mean_iou(both.sum(0), either.sum(0)))


def test_the_gradient_does_not_depend_on_how_a_batch_is_cut() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 3, 2, 2, requires_grad=True)
    masks = torch.randint(0, 3, (4, 6, 6), dtype=torch.uint8)
    masks[0, :5] = IGNORE  # most of the first image
    whole = pixel_loss(logits, masks)
    parts = (pixel_loss(logits[:1], masks[:1]) * 1 + pixel_loss(logits[1:], masks[1:]) * 3) / 4
    assert whole.item() == pytest.approx(parts.item(), rel=1e-6)
    one, two = (torch.autograd.grad(each, logits, retain_graph=True)[0] for each in (whole, parts))
    assert torch.allclose(one, two, atol=1e-8)
    nothing = torch.full((1, 6, 6), IGNORE, dtype=torch.uint8)
    assert pixel_loss(logits[:1], nothing) == 0, "an image of which nothing counts is no NaN"
    counted = masks != IGNORE
    enlarged = functional.interpolate(logits, (6, 6), mode="bilinear", align_corners=False)
    by_hand = (
        -enlarged.log_softmax(1).gather(1, masks.long().clamp(max=2)[:, None])[:, 0][counted].sum() / masks.numel()
    )
    assert whole.item() == pytest.approx(by_hand.item(), rel=1e-5)
    assert pixel_loss(logits, masks, label_smoothing=0.3) != whole


BACKBONES = {
    "vit_tiny_patch16_224": {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2},
    "resnet10t": {},
    "convnext_atto": {},
}


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize(
    ("head", "stride"), [("linear", {"vit_tiny_patch16_224": 8}), ("pyramid", {"vit_tiny_patch16_224": 2})]
)
def test_heads_stand_on_any_backbone_and_every_weight_learns(name: str, head: Any, stride: dict[str, int]) -> None:
    task = Segmentation(head=head, width=8 if head == "pyramid" else None)
    model = join_head(timm.create_model(name, num_classes=0, **BACKBONES[name]), task, 5)
    logits = model(torch.randn(2, 3, 32, 32))
    side = 32 // stride.get(name, 32 if head == "linear" else 4)
    assert logits.shape == (2, 5, side, side)
    logits.square().mean().backward()
    without = [key for key, parameter in model.named_parameters() if parameter.grad is None]
    assert without == [], "DDP waits for the gradient of each"


def test_heads_are_drawn_by_the_seed_and_leave_the_generator_alone() -> None:
    def head(seed: int) -> torch.Tensor:
        backbone = timm.create_model("vit_tiny_patch16_224", num_classes=0, **BACKBONES["vit_tiny_patch16_224"])
        return join_head(backbone, Segmentation(), 5, seed).state_dict()["head.classify.weight"]

    state = torch.random.get_rng_state()
    first = head(1)
    assert torch.equal(first, head(1)) and not torch.equal(first, head(2))
    torch.random.set_rng_state(state)
    one = torch.rand(1)
    torch.random.set_rng_state(state)
    join_head(timm.create_model("resnet10t", num_classes=0), Segmentation(), 5, 3)
    assert one != torch.rand(1), "timm draws the backbone"


def test_models_without_feature_maps_are_named() -> None:
    with pytest.raises(TrainingError, match=r"timm's Linear shows no feature maps"):
        Segmenter(torch.nn.Linear(2, 2), Segmentation(), 3)


def test_layers_decay_below_the_head() -> None:
    from dbscale.study.recipe import Optim
    from dbscale.training.optimizer import make_optimizer

    backbone = timm.create_model("vit_tiny_patch16_224", num_classes=0, **BACKBONES["vit_tiny_patch16_224"])
    model = join_head(backbone, Segmentation(), 5)
    optimizer = make_optimizer(model, Optim(lr=1e-3, layer_decay=0.5))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {names[id(each)]: group for group in optimizer.param_groups for each in group["params"]}
    scales = {name: group["lr_scale"] for name, group in groups.items()}
    assert scales.keys() == dict(model.named_parameters()).keys()
    assert scales["head.classify.weight"] == 1.0
    block = [scales[f"backbone.blocks.{layer}.attn.qkv.weight"] for layer in range(3)]
    assert block[0] == block[1] / 2 == block[2] / 4 and block[2] < 1
    assert scales["backbone.pos_embed"] == block[0] / 2
    assert groups["backbone.pos_embed"]["weight_decay"] == 0, "timm says that position embeddings do not decay"
    assert groups["head.classify.weight"]["weight_decay"] == 0.05
