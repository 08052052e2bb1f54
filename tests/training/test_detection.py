"""Detection: mAP as torchmetrics has it and by hand, losses that do not depend on how a batch is cut, finds in the pixels
of the stored image."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch

from dbscale.data.target import Boxes
from dbscale.study.task import Detection
from dbscale.training.detection import (
    MAX_DETECTIONS,
    as_tensors,
    image_errors,
    judge,
    match,
    mean_precision,
    objective,
    summarize,
)
from dbscale.training.tasks import join_head

VIT = {"img_size": 32, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}


def boxes_of(
    *boxes: tuple[float, ...], labels: Any = None, crowd: Any = None, size: tuple[int, int] = (40, 60)
) -> Boxes:
    number = len(boxes)
    return Boxes(
        size, np.array(boxes, np.float32).reshape(-1, 4),
        np.zeros(number, np.int64) if labels is None else np.array(labels),
        np.zeros(number, bool) if crowd is None else np.array(crowd, bool),
    )  # fmt: skip


def finds_of(*finds: tuple[float, ...]) -> np.ndarray:
    """left, top, right, bottom, score, class."""
    return np.array(finds, np.float64).reshape(-1, 6)


def test_map_by_hand() -> None:
    truths = [boxes_of((0, 0, 10, 10), (20, 20, 30, 30))]
    perfect = finds_of((0, 0, 10, 10, 0.9, 0), (20, 20, 30, 30, 0.8, 0))
    assert mean_precision(match(truths, [perfect], 2)) == pytest.approx(1.0), (
        "class 1, of which there is none, is no zero"
    )
    half = finds_of((0, 0, 10, 10, 0.9, 0))
    # Precision 1 up to recall .5: 51 of COCO's 101 recall levels.
    assert mean_precision(match(truths, [half], 2)) == pytest.approx(51 / 101)
    wide = finds_of((0, 0, 10, 10, 0.9, 0), (20, 20, 30, 26, 0.8, 0))  # IoU .6: counts at .50, .55 and .60
    assert mean_precision(match(truths, [wide], 2)) == pytest.approx((3 + 7 * 51 / 101) / 10)
    assert mean_precision(match(truths, [finds_of()], 2)) == 0
    assert mean_precision(match([boxes_of()], [half], 2)) == 0
    crowd = [boxes_of((0, 0, 10, 10), (20, 0, 40, 30), crowd=[0, 1])]
    inside = finds_of((0, 0, 10, 10, 0.5, 0), (25, 5, 30, 10, 0.9, 0))
    assert mean_precision(match(crowd, [inside], 1)) == pytest.approx(1.0), "a find inside of a crowd is no mistake"


def random_scenes(num: int, seed: int) -> tuple[list[Boxes], list[np.ndarray]]:
    generator = np.random.default_rng(seed)
    truths, finds = [], []
    for _ in range(num):
        count = int(generator.integers(0, 4))
        corner = generator.uniform(0, 30, (count, 2))
        boxes = np.concatenate([corner, corner + generator.uniform(4, 20, (count, 2))], 1)
        labels = generator.integers(0, 3, count)
        truths.append(boxes_of(*map(tuple, boxes), labels=labels))
        moved = boxes + generator.normal(0, 1.5, boxes.shape)
        stray = generator.uniform(0, 20, (2, 2))
        moved = np.concatenate([moved, np.concatenate([stray, stray + 8], 1)])
        scores = generator.random(len(moved))
        found = np.where(generator.random(len(moved)) < 0.8, [*labels, 0, 1], 2)
        finds.append(np.concatenate([moved, scores[:, None], found[:, None]], 1))
    return truths, finds


def test_map_agrees_with_torchmetrics() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchmetrics.detection import MeanAveragePrecision

        truths, finds = random_scenes(40, 0)
        metric = MeanAveragePrecision(box_format="xyxy", iou_type="bbox", backend="pycocotools")
        metric.update(
            [{"boxes": torch.from_numpy(each[:, :4]), "scores": torch.from_numpy(each[:, 4]),
              "labels": torch.from_numpy(each[:, 5]).long()} for each in finds],
            [{"boxes": torch.from_numpy(each.boxes_N4), "labels": torch.from_numpy(each.labels_N)} for each in truths],
        )  # fmt: skip
        expected = float(metric.compute()["map"])
    assert 0.05 < expected < 0.8
    assert mean_precision(match(truths, finds, 3)) == pytest.approx(expected, abs=1e-6)


def test_image_errors_have_the_mean_and_the_variance_of_the_error() -> None:
    truths, finds = random_scenes(60, 1)
    evaluator = match(truths, finds, 3)
    error = 1 - mean_precision(evaluator)
    errors = image_errors(evaluator, error)
    assert errors.shape == (60,) and errors.mean() == pytest.approx(error)
    of_samples = []
    for seed in range(60):
        scenes = random_scenes(60, seed + 100)
        of_samples.append(1 - mean_precision(match(*scenes, 3)))
    assert errors.var() / 60 == pytest.approx(np.var(of_samples), rel=1.0), "the right size; 25 groups say no more"
    assert 1 - mean_precision(evaluator) == pytest.approx(error), "leaving images out left the evaluator alone"
    assert image_errors(match(truths[:1], finds[:1], 3), 0.25).tolist() == [0.25]


@pytest.fixture(scope="module")
def detector() -> Any:
    torch.manual_seed(0)
    return join_head(
        timm.create_model("vit_tiny_patch16_224", num_classes=0, **VIT), Detection(width=64, num_convs=1), 3
    )


def test_losses_do_not_depend_on_how_a_batch_is_cut(detector: Any) -> None:
    torch.manual_seed(1)
    images = torch.randn(3, 3, 32, 32)
    targets = [
        as_tensors(each, torch.device("cpu"))
        for each in (boxes_of((2, 3, 12, 14), (8, 8, 30, 31), labels=[1, 2]), boxes_of(), boxes_of((0, 0, 5, 5)))
    ]
    whole = objective(detector, images, targets)
    one, two = objective(detector, images[:1], targets[:1]), objective(detector, images[1:], targets[1:])
    assert whole.loss.item() == pytest.approx((one.loss.item() + 2 * two.loss.item()) / 3, rel=1e-5)
    assert 0 < whole.ce.item() < whole.loss.item()
    whole.loss.backward()
    assert [name for name, parameter in detector.named_parameters() if parameter.grad is None] == []
    assert not any(name.startswith("_fcos") for name in detector.state_dict())


def test_crowds_are_not_learnt() -> None:
    found = as_tensors(boxes_of((1, 1, 5, 5), (0, 0, 20, 20), labels=[2, 1], crowd=[0, 1]), torch.device("cpu"))
    assert found["boxes"].tolist() == [[1, 1, 5, 5]] and found["labels"].tolist() == [2]


def test_finds_are_told_in_pixels_of_the_stored_image() -> None:
    stored = boxes_of((0, 0, 30, 40), size=(40, 60))  # the left half of 60 × 40 px
    seen: list[Any] = []

    def model(images: torch.Tensor, targets: Any, *, detect: bool) -> Any:
        assert detect
        seen.extend(targets)
        found = {"boxes": torch.tensor([[0.0, 0.0, 16.0, 32.0], [4.0, 8.0, 8.0, 16.0]]), "scores": torch.tensor([0.75, 0.5]),
                 "labels": torch.tensor([0, 2])}  # fmt: skip
        return torch.tensor([[1.0, 0.5, 0.25]]), [found]

    row = judge(model, torch.zeros(1, 3, 32, 32), SimpleNamespace(targets=[stored]))[0]  # type: ignore[arg-type]
    assert seen[0]["boxes"].tolist() == [[0, 0, 16, 32]], "losses are taken in the square that the model sees"
    assert row[:3].tolist() == [1, 1.75, 2]
    assert row[3:15].tolist() == [0, 0, 30, 40, 0.75, 0, 7.5, 10, 15, 20, 0.5, 2]
    assert len(row) == 3 + 6 * MAX_DETECTIONS and not row[15:].any()
    reader = SimpleNamespace(fetch=lambda positions: ([[stored, stored][place] for place in positions], []))
    subset: Any = SimpleNamespace(dataset=SimpleNamespace(targets=reader), indices=np.array([1, 0]))
    result = summarize(np.stack([row.numpy(), np.zeros(len(row))]), 3, subset)
    assert result.error_rate == pytest.approx(0.0), "the second sample could not be decoded"
    assert result.loss == 1.75 and result.counted_N.tolist() == [True, False] and result.correct_N is None


def test_a_detector_learns_one_scene(detector: Any) -> None:
    torch.manual_seed(0)
    image = torch.zeros(1, 3, 32, 32)
    image[:, :, 8:20, 4:24] = 2.0
    target = boxes_of((4, 8, 24, 20), labels=[1], size=(32, 32))
    optimizer = torch.optim.AdamW(detector.parameters(), lr=2e-3)
    for _ in range(60):
        optimizer.zero_grad()
        objective(detector, image, [as_tensors(target, torch.device("cpu"))]).loss.backward()
        optimizer.step()
    with torch.no_grad():
        row = judge(detector, image, SimpleNamespace(targets=[target]))[0]  # type: ignore[arg-type]
    best = row[3:9].numpy()
    assert row[2] >= 1 and best[5] == 1
    assert np.abs(best[:4] - [4, 8, 24, 20]).max() < 4
