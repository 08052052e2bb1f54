"""Real photographs, scikit-learn's two, with masks and boxes that thresholds cut out of them: VOC's, ADE20K's and COCO's
folders, packed, finetuned and judged as torchmetrics and pycocotools judge the same predictions."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy import ndimage
from sklearn.datasets import load_sample_images
from torch.nn import functional
from torchmetrics.classification import MulticlassJaccardIndex

from dbscale.data import make_eval_loader, make_transform, open_dataset
from dbscale.data.target import IGNORE
from dbscale.shards.pack import ensure_packed
from dbscale.study.recipe import Augment, Budget, Optim
from dbscale.study.task import Detection, Segmentation
from dbscale.training.export import export_cell, load_export

CLASSES = ["dark", "middle", "bright"]
NUM_VAL = 12
SIZE = 32


def photographs() -> list[np.ndarray]:
    """uint8 [H, W, 3], two of 427 × 640 px."""
    return [np.asarray(each) for each in load_sample_images().images]


def otsu(values: np.ndarray) -> int:
    """The grey level that parts a histogram with the largest variance between its halves (Otsu 1979)."""
    counts = np.bincount(values.ravel(), minlength=256).astype(float)
    below, levels = counts.cumsum(), np.arange(256)
    mass = (counts * levels).cumsum()
    with np.errstate(divide="ignore", invalid="ignore"):
        between = (mass[-1] * below / below[-1] - mass) ** 2 / (below * (below[-1] - below))
    return int(np.nanargmax(np.where(np.isfinite(between), between, -1)))


def regions(photograph: np.ndarray) -> np.ndarray:
    """uint8 [H, W]: 0 dark, 1 middle, 2 bright, each smoothed to regions; their borders are ignored, as VOC's are."""
    grey = np.asarray(Image.fromarray(photograph).convert("L"))
    first = otsu(grey)
    second = otsu(grey[grey > first])
    labels = ndimage.median_filter(np.digitize(grey, [first + 1, second + 1]).astype(np.uint8), size=9)
    border = ndimage.morphological_gradient(labels, size=3) > 0
    return np.where(border, IGNORE, labels).astype(np.uint8)


def crops() -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Name, photograph and mask of crops of many sizes, in an order that mixes the photographs."""
    found = []
    for number, photograph in enumerate(photographs()):
        mask = regions(photograph)
        for place in range(20):
            height, width = 84 + 5 * (place % 5), 110 + 7 * (place % 3)
            top, left = (place // 5) * (len(mask) - height) // 3, (place % 5) * (mask.shape[1] - width) // 4
            window = np.s_[top : top + height, left : left + width]
            found.append((f"2007_{place:02}{number:04}", photograph[window], mask[window]))
    return sorted(found, key=lambda each: each[0])


def write_images(folder: Path, some: list[tuple[str, np.ndarray, np.ndarray]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, photograph, _ in some:
        Image.fromarray(photograph).save(folder / f"{name}.jpg", quality=92)


def write_voc(root: Path) -> dict[str, Any]:
    """Masks with a palette, 255 on the borders of regions, and lists of names."""
    found = crops()
    write_images(root / "JPEGImages", found)
    for folder in ("SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    for name, _, mask in found:
        image = Image.fromarray(mask)
        image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0] + [0] * 756 + [224, 224, 192])
        image.save(root / f"SegmentationClass/{name}.png")
    for split, some in (("train", found[NUM_VAL:]), ("val", found[:NUM_VAL])):
        (root / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(name for name, *_ in some) + "\n")
    return {"source": "voc", "path": str(root), "class_names": CLASSES}


def write_ade20k(root: Path) -> dict[str, Any]:
    """Grey masks that count from 1, where 0 is ignored, and the list of 150 classes."""
    found = crops()
    rows = [f"{number}\t0.1\t10\t20\tthing {number}" for number in range(1, 151)]
    root.mkdir()
    (root / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tName", *rows]) + "\n")
    for split, some in (("training", found[NUM_VAL:]), ("validation", found[:NUM_VAL])):
        write_images(root / f"images/{split}", some)
        (root / f"annotations/{split}").mkdir(parents=True)
        for name, _, mask in some:
            Image.fromarray(np.where(mask == IGNORE, 0, mask + 1).astype(np.uint8)).save(
                root / f"annotations/{split}/{name}.png"
            )
    return {"source": "ade20k", "path": str(root)}


def boxes_of(mask: np.ndarray) -> list[tuple[str, list[int], int]]:
    """Class, [left, top, width, height] and whether it fills the image, of each region of 80 px or more."""
    found = []
    for label in (0, 2):
        components, _ = ndimage.label(mask == label)
        for number, (rows, columns) in enumerate(ndimage.find_objects(components), start=1):
            if (components == number).sum() >= 80:
                box = [columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start]
                found.append((CLASSES[label], box, int(box[2] * box[3] > 0.8 * mask.size)))
    return found


def write_coco(root: Path) -> dict[str, Any]:
    """Categories of one name have other numbers in the two splits."""
    found, numbers = crops(), {"train2017": {"dark": 4, "bright": 11}, "val2017": {"dark": 2, "bright": 1}}
    (root / "annotations").mkdir(parents=True)
    for split, some in (("train2017", found[NUM_VAL:]), ("val2017", found[:NUM_VAL])):
        write_images(root / split, some)
        content: dict[str, Any] = {
            "images": [{"id": n, "file_name": f"{name}.jpg", "height": len(mask), "width": mask.shape[1]}
                       for n, (name, _, mask) in enumerate(some)],
            "categories": [{"id": number, "name": name} for name, number in numbers[split].items()],
            "annotations": [],
        }  # fmt: skip
        for n, (_, _, mask) in enumerate(some):
            for name, box, crowd in boxes_of(mask):
                annotation = {"id": len(content["annotations"]) + 1, "image_id": n, "category_id": numbers[split][name],
                              "bbox": box, "area": box[2] * box[3], "iscrowd": crowd}  # fmt: skip
                content["annotations"].append(annotation)
        (root / f"annotations/instances_{split}.json").write_text(json.dumps(content))
    return {"source": "coco", "path": str(root), "unannotated": "keep"}


@pytest.fixture(scope="module")
def packed_photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data folder that holds the three of them."""
    root = tmp_path_factory.mktemp("photographs")
    for name, write in (("voc", write_voc), ("ade20k", write_ade20k), ("coco", write_coco)):
        ensure_packed(name, write(root / name), root, progress=False)
    return root


def finetuned(bench: Any, data_dir: Path, dataset: str, task: Any, **training: Any) -> tuple[Any, Any, Any]:
    """The bench on these photographs, the row, and the exported model."""
    bench = replace(bench, data_dir=data_dir)
    options: dict[str, Any] = {
        "budget": Budget(steps=60), "optim": Optim(lr=3e-3, warmup_share=0.2, clip_norm=1.0), "drop_path": 0.0,
        "augment": Augment(random_resized_crop=(0.5, 1.0), hflip=0.5), "label_smoothing": 0.0,
    }  # fmt: skip
    cell = bench.cell("finetune", dataset=dataset, num_samples=28, task=task, image_size=SIZE, tier="jpeg",
                      **{**options, **training})  # fmt: skip
    outcome = bench.run(cell)
    assert outcome.status == "done", outcome.reason
    return outcome.row, load_export(export_cell(bench.store, cell.key, data_dir / "out" / cell.key, data_dir)), cell


def judged(data_dir: Path, dataset: str) -> list[tuple[str, torch.Tensor]]:
    """Names and model inputs of the test images, in their order."""
    subset = open_dataset(data_dir / "shards" / dataset, "test", tier="jpeg").subset()
    transform = make_transform(image_size=SIZE, train=False, whole=True)
    ids = torch.arange(NUM_VAL)
    (batch,) = make_eval_loader(subset, batch_size=NUM_VAL)
    names = [bytes(key).decode().partition("-")[2] for key in subset.dataset.index["key"]]
    return list(zip(names, transform(list(batch.images), epoch=ids * 0, sample_ids=ids), strict=True))


def test_both_layouts_hold_the_same_masks(packed_photographs: Path) -> None:
    stored = {}
    for name in ("voc", "ade20k"):
        dataset = open_dataset(packed_photographs / "shards" / name, tier="jpeg")
        keys = [bytes(key).decode().partition("-")[2] for key in dataset.index["key"]]
        stored[name] = dict(zip(keys, dataset.targets.fetch(np.arange(len(keys)))[0], strict=True))
    expected = {name: mask for name, _, mask in crops()[NUM_VAL:]}
    assert stored["voc"].keys() == stored["ade20k"].keys() == expected.keys()
    assert len({mask.shape for mask in expected.values()}) > 4
    for name, mask in expected.items():
        assert np.array_equal(stored["voc"][name], mask) and np.array_equal(stored["ade20k"][name], mask)


@pytest.mark.parametrize(
    ("dataset", "task", "num_classes"),
    [("voc", Segmentation(), 3), ("voc", Segmentation(head="pyramid", width=16), 3), ("ade20k", Segmentation(), 150)],
    ids=["linear", "pyramid", "150 classes"],
)
def test_miou_on_photographs_is_that_of_torchmetrics(
    dataset: str, task: Segmentation, num_classes: int, bench: Any, packed_photographs: Path
) -> None:
    row, model, _ = finetuned(bench, packed_photographs, dataset, task)
    truth = {name: mask for name, _, mask in crops()}
    metric = MulticlassJaccardIndex(num_classes, average="macro", ignore_index=IGNORE)
    for name, image in judged(packed_photographs, dataset):
        mask = torch.from_numpy(truth[name].astype(np.int64))
        with torch.no_grad():
            logits = functional.interpolate(model(image[None]), tuple(mask.shape), mode="bilinear", align_corners=False)
        metric.update(logits.argmax(1), mask[None])
    assert row.error_rate == pytest.approx(1 - float(metric.compute()), abs=1e-6)
    assert row.error_rate < 0.6, "one class everywhere has more than .7"


def test_map_on_photographs_is_that_of_pycocotools(bench: Any, packed_photographs: Path) -> None:
    row, model, _ = finetuned(bench, packed_photographs, "coco", Detection(width=64, num_convs=1))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(packed_photographs / "coco/annotations/instances_val2017.json"))
        numbers = {Path(image["file_name"]).stem: image for image in truth.dataset["images"]}
        finds = []
        for name, image in judged(packed_photographs, "coco"):
            listed = numbers[name]
            scale = torch.tensor([listed["width"], listed["height"]] * 2) / SIZE
            (found,) = model.predict(image[None])
            for box, score, label in zip(found["boxes"] * scale, found["scores"], found["labels"], strict=True):
                left, top, right, bottom = box.tolist()
                finds.append({"image_id": listed["id"], "category_id": {0: 2, 1: 1}[int(label)], "score": float(score),
                              "bbox": [left, top, right - left, bottom - top]})  # fmt: skip
        evaluator = COCOeval(truth, truth.loadRes(finds), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    assert {each["iscrowd"] for each in truth.dataset["annotations"]} == {0, 1}
    assert row.error_rate == pytest.approx(1 - evaluator.stats[0], abs=1e-6)
    assert row.error_rate < 0.98, "something is found"
