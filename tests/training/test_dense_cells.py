"""Cells with a dense task: resumed bitwise, alike on any number of ranks, judged exactly, refused where the data does not
fit."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch

from dbscale.data import load_manifest, open_dataset
from dbscale.errors import FileError, TrainingError
from dbscale.shards.pack import ensure_packed
from dbscale.shards.publish import upload
from dbscale.study.recipe import Augment, Budget, TimmModel
from dbscale.study.resources import Resources
from dbscale.study.task import Detection, Segmentation
from dbscale.training import run
from dbscale.training.device import measure
from dbscale.training.export import export_cell, load_export
from dbscale.training.smoke import try_step
from dbscale.training.tasks import restore_student

SEGMENT = {"dataset": "masks", "task": Segmentation()}
PYRAMID = {"dataset": "masks", "task": Segmentation(head="pyramid", width=8)}
DETECT = {"dataset": "boxes", "task": Detection(width=64, num_convs=1), "label_smoothing": 0.0, "num_samples": 16}
SHORT: dict[str, Any] = {"budget": Budget(steps=8), "ema_decay": 0.9}


def finetune(bench: Any, kind: dict[str, Any], init: Any = None, **more: Any) -> Any:
    return bench.cell("finetune", init=init, **{**SHORT, **kind, **more})


@pytest.mark.parametrize("kind", [SEGMENT, PYRAMID, DETECT], ids=["linear", "pyramid", "detection"])
def test_a_stopped_cell_goes_on_bitwise(kind, bench_of, stop_after):
    whole, cut = bench_of("whole"), bench_of("cut")
    cells = [finetune(each, kind, drop_path=0.1) for each in (whole, cut)]
    assert whole.run(cells[0]).status == "done"
    assert cut.run(cells[1], stop=stop_after(3)).status == "interrupted"
    assert cut.run(cells[1]).status == "done"
    assert cut.store.attempts(cells[1].key)[-1].resumed_from_step == 3
    assert cut.fingerprint(cells[1]) == whole.fingerprint(cells[0])


@pytest.mark.parametrize("kind", [SEGMENT, DETECT], ids=["segmentation", "detection"])
def test_a_cell_on_remote_shards_ends_as_on_disk_though_it_was_stopped(
    kind, bench_of, stop_after, tmp_path, monkeypatch
):
    """Order, bytes, resume: whatever differed would show in the weights."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    near, far = bench_of("near"), bench_of("far")
    name = kind["dataset"]
    url = f"memory://dense-cells/{name}"
    upload(near.data_dir / "shards" / name, url, progress=False)
    far = replace(far, data_dir=tmp_path / "mirrors")
    folder = ensure_packed(name, {"source": "remote", "url": url}, far.data_dir, progress=False)
    assert not list(folder.glob("*.tar"))
    cells = [finetune(each, kind, tier="raw") for each in (near, far)]
    assert near.run(cells[0]).status == "done"
    assert far.run(cells[1], stop=stop_after(3)).status == "interrupted"
    assert far.run(cells[1]).status == "done"
    assert far.fingerprint(cells[1]) == near.fingerprint(cells[0])


def test_a_finetune_starts_from_its_parents_backbone_and_a_probe_keeps_it(bench):
    parent = bench.cell(budget=Budget(steps=4))
    bench.run(parent)
    before = bench.weights(parent)
    probe, full = (
        finetune(bench, SEGMENT, init=parent, scope=scope, ema_decay=None) for scope in ("linear_probe", "full")
    )
    rows = [bench.run(cell).row for cell in (probe, full)]
    assert [row.task for row in rows] == ["segmentation"] * 2 and rows[0].arm == "plain"
    assert rows[0].upstream.num_samples == 40 and rows[0].upstream.linear_probe_error is None
    for cell, same in ((probe, True), (full, False)):
        after = bench.weights(cell)
        assert {name.split(".")[0] for name in after} == {"backbone", "head"}
        shared = [name for name in before if not name.startswith("head.")]
        assert all(torch.equal(before[name], after[f"backbone.{name}"]) for name in shared) == same
    assert rows[0].weights_sha256 != rows[1].weights_sha256
    size = measure(full.recipe.model, num_classes=4, image_size=16, task=Segmentation())
    assert rows[1].num_params == size.num_params == sum(each.numel() for each in bench.weights(full).values())
    plain = measure(full.recipe.model, num_classes=4, image_size=16)
    assert rows[1].train_flops == 3 * size.forward_flops * 8 * 16
    # The same head, but on sixteen patches instead of one class token.
    assert size.forward_flops - plain.forward_flops == 2 * 16 * 4 * 15


@pytest.mark.parametrize("kind", [SEGMENT, DETECT], ids=["segmentation", "detection"])
def test_the_row_holds_what_the_saved_weights_find(kind, bench):
    cell = finetune(bench, kind)
    row = bench.run(cell).row
    folder = bench.store.cell_dir(cell.key)
    saved = np.load(folder / "correct.npz")
    assert set(saved.files) == {"num_samples", "counted", "errors"} and int(saved["num_samples"]) == 21
    assert saved["errors"].mean() == pytest.approx(row.error_rate, abs=1e-6)
    assert 0 < row.error_rate < 1 and row.num_test_samples == 21 and row.top5_error_rate is None
    classes = 4 if kind is SEGMENT else 3
    assert row.num_classes == classes
    if kind is SEGMENT:
        model = restore_student(cell.recipe, folder / "model.safetensors", classes).eval()
        test = open_dataset(bench.data_dir / "shards/masks", "test", image_size=16)
        truth, _ = test.targets.fetch(np.arange(21))
        from dbscale.data import make_transform

        pixels, _ = test.reader.fetch(np.arange(21))
        ids = torch.arange(21)
        images = make_transform(image_size=16, train=False)(torch.from_numpy(pixels), epoch=ids * 0, sample_ids=ids)
        with torch.no_grad():
            logits = torch.nn.functional.interpolate(model(images), (16, 16), mode="bilinear", align_corners=False)
        found, masks = logits.argmax(1).numpy(), np.stack(truth)
        ious = [((found == k) & (masks == k)).sum() / ((found == k) | (masks == k)).sum() for k in range(4)
                if ((found == k) | (masks == k)).any()]  # fmt: skip
        assert row.error_rate == pytest.approx(1 - np.mean(ious), abs=1e-6)


def test_any_number_of_ranks_and_micro_batches_trains_and_judges_alike(bench_of, ranks, kill_on_call):
    """Two ranks end within rounding of one; three ranks judge the same weights to the same error."""
    alone, together, judged = (bench_of(name) for name in ("alone", "together", "judged"))
    options = {"global_batch": 12, "ema_decay": None}
    kinds = (SEGMENT, DETECT)
    cells = [finetune(alone, kind, **options) for kind in kinds]
    expected = [alone.run(cell).row for cell in cells]
    how = {"num_processes": 2, "zero_stage": None, "threads": 1, "micro_batch": 3}
    runs = [{"store": str(together.store.root), "key": finetune(together, kind, **options).key, "resources": how}
            for kind in kinds]  # fmt: skip
    probe = finetune(together, {**DETECT, "scope": "linear_probe"}, **options)
    runs += [{"store": str(together.store.root), "key": probe.key, "resources": how}]
    (first, _) = ranks.run(runs)
    assert [each["status"] for each in first] == ["done"] * 3, [each["reason"] for each in first]
    for cell, row in zip(cells, expected, strict=True):
        found = together.store.read_row(cell.key)
        assert found.train_loss == pytest.approx(row.train_loss, rel=1e-4)
        assert found.test_loss == pytest.approx(row.test_loss, rel=1e-2)
    runs = []
    for kind in kinds:
        cell = finetune(judged, kind, **options)
        assert judged.run_killed(cell, kill_on_call(run, "evaluate_cell")) != 0
        runs.append({"store": str(judged.store.root), "key": cell.key,
                     "resources": {"num_processes": 3, "zero_stage": None, "threads": 1}})  # fmt: skip
    ranks.run(runs, world_size=3)
    for cell, row in zip(cells, expected, strict=True):
        found = judged.store.read_row(cell.key)
        assert found.weights_sha256 == row.weights_sha256
        assert (found.error_rate, found.num_test_samples) == (row.error_rate, row.num_test_samples)
        assert found.test_loss == pytest.approx(row.test_loss, rel=1e-6)
        assert judged.fingerprint(cell)["correct"] == alone.fingerprint(cell)["correct"]


def test_every_field_of_a_task_acts(bench):
    found = {}
    for task in (Segmentation(), Segmentation(head="pyramid", width=8), Segmentation(head="pyramid", width=16)):
        found[str(task)] = bench.run(finetune(bench, {"dataset": "masks", "task": task})).row.weights_sha256
    for task in (Detection(width=64, num_convs=1), Detection(width=96, num_convs=1), Detection(width=64, num_convs=2)):
        cell = finetune(bench, {**DETECT, "task": task}, budget=Budget(steps=1))
        found[str(task)] = bench.run(cell).row.weights_sha256
    assert len(set(found.values())) == len(found)


def test_augmentation_reaches_masks(bench):
    hashes = set()
    for augment in (Augment(hflip=0.0), Augment(hflip=0.0, crop_padding=4),
                    Augment(hflip=0.0, random_resized_crop=(0.3, 1.0)), Augment(hflip=1.0)):  # fmt: skip
        hashes.add(bench.run(finetune(bench, SEGMENT, augment=augment)).row.weights_sha256)
    assert len(hashes) == 4


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ({"dataset": "down", "task": Segmentation()}, "has a label beside each image, and segmentation needs a mask"),
        ({"dataset": "masks", "task": None}, "has a mask beside each image, and classification needs a label; set"),
        ({**DETECT, "dataset": "masks"}, "has a mask beside each image, and detection needs boxes"),
        ({**SEGMENT, "model": {"kind": "timm", "name": "mlp_mixer_none"}}, "timm knows no model"),
    ],
)  # fmt: skip
def test_data_that_does_not_fit_the_task_is_refused(kind, sentence, bench):
    if isinstance(kind.get("model"), dict):
        kind = {**kind, "model": TimmModel(**kind["model"])}
    outcome = bench.run(finetune(bench, kind))
    assert outcome.status == "failed" and sentence in outcome.reason


@pytest.mark.parametrize("kind", [SEGMENT, DETECT], ids=["segmentation", "detection"])
def test_the_trial_before_a_submission_tries_dense_cells_too(kind, bench, tmp_path):
    parent = bench.cell(budget=Budget(steps=1))
    cell = finetune(bench, kind, init=parent, budget=Budget(steps=1))
    lineage = [parent.spec(), cell.spec()]
    assert try_step(lineage, bench.data_dir, tmp_path, Resources(zero_stage=None, threads=1)) is None
    wrong = finetune(bench, {**kind, "dataset": "down"}, init=parent, budget=Budget(steps=1))
    assert "has a label beside each image" in try_step(
        [parent.spec(), wrong.spec()], bench.data_dir, tmp_path, Resources(zero_stage=None, threads=1)
    )


@pytest.mark.parametrize("kind", [SEGMENT, PYRAMID, DETECT], ids=["linear", "pyramid", "detection"])
def test_an_export_holds_backbone_and_head(kind, bench, tmp_path):
    cell = finetune(bench, kind)
    row = bench.run(cell).row
    folder = export_cell(bench.store, cell.key, tmp_path / "out", bench.data_dir)
    saved = bench.weights(cell)
    backbone = timm.create_model(f"local-dir:{folder}", pretrained=True)
    plain = safetensors.torch.load_file(folder / "model.safetensors")
    backbone.load_state_dict(plain, strict=True)
    assert backbone.num_classes == 0
    assert all(torch.equal(value, saved[f"backbone.{name}"]) for name, value in backbone.state_dict().items())
    head = safetensors.torch.load_file(folder / "head.safetensors")
    assert {*head, *(f"backbone.{name}" for name in plain)} == set(saved)
    assert all(torch.equal(value, saved[name]) for name, value in head.items())

    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    classes = load_manifest(bench.data_dir / "shards" / kind["dataset"]).classes
    model = load_export(folder)
    inside = restore_student(cell.recipe, bench.store.cell_dir(cell.key) / "model.safetensors", len(classes)).eval()
    with torch.no_grad():
        if kind is DETECT:
            nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
            expected = inside(images, [nothing] * 3, detect=True)[1]
            assert [each.keys() for each in expected] == [{"boxes", "scores", "labels"}] * 3
            for found, wanted in zip(model.predict(images), expected, strict=True):
                assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        else:
            whole = torch.nn.functional.interpolate(inside(images), (16, 16), mode="bilinear", align_corners=False)
            assert torch.equal(model.predict(images), whole.argmax(1))

    content = json.loads((folder / "head.json").read_text())
    assert (content["label_names"], content["num_classes"]) == (list(classes), row.num_classes)
    assert (content["image_size"], content["task"]["kind"]) == (16, cell.recipe.task.kind)
    card = (folder / "README.md").read_text()
    metric = {"segmentation": "1 − mIoU", "detection": "1 − mAP"}[cell.recipe.task.kind]
    assert f"error {row.error_rate:.2%} on 21 test images: {metric}" in card
    assert "by label in `label_names` of `head.json`" in card
    for name in ("model.safetensors", "head.safetensors"):
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() in card


def test_layers_behind_the_feature_maps_are_exported_as_timm_draws_them(bench, tmp_path):
    """A ViT that pools tokens has a norm after pooling, which no dense task passes through."""
    model = TimmModel(
        kind="timm",
        name="vit_tiny_patch16_224",
        kwargs={"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "global_pool": "avg"},
    )
    cell = finetune(bench, SEGMENT, model=model, budget=Budget(steps=1))
    assert bench.run(cell).status == "done"
    assert "backbone.fc_norm.weight" not in bench.weights(cell)
    folder = export_cell(bench.store, cell.key, tmp_path / "out")
    backbone = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert torch.equal(backbone.fc_norm.weight, torch.ones(24)) and backbone.global_pool == "avg"
    state = load_export(folder).state_dict()
    assert all(torch.equal(value, state[name]) for name, value in bench.weights(cell).items())
    assert "names of the classes: not known here" in (folder / "README.md").read_text()


def test_an_export_that_was_tampered_with_is_refused(bench, tmp_path):
    cell = finetune(bench, SEGMENT)
    bench.run(cell)
    folder = export_cell(bench.store, cell.key, tmp_path / "out")
    text = (folder / "head.json").read_text()
    (folder / "head.json").write_text(text.replace('"num_classes": 4', '"num_classes": 5'))
    with pytest.raises(FileError, match=r"head\.json"):
        load_export(folder)
    (folder / "head.json").write_text(text)
    (folder / "head.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(
        TrainingError, match=r"head.safetensors does not fit this cell's model: head.classify.weight is missing"
    ):
        load_export(folder)
    (folder / "head.json").unlink()
    with pytest.raises(TrainingError, match=r"has no head.json, so it is no export of a segmenter or a detector"):
        load_export(folder)


def test_compiled_and_bf16_students_keep_their_names(bench):
    cell = finetune(bench, PYRAMID, precision="bf16", ema_decay=None)
    assert bench.run(cell, Resources(zero_stage=0, threads=1)).status == "done"
    assert all(name.split(".")[0] in ("backbone", "head") for name in bench.weights(cell))
