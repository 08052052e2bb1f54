"""What a cell leaves is plain timm: it loads there, and timm's own validation finds the same."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from timm.optim import create_optimizer_v2
from timm.utils.metrics import accuracy

from dbscale.data import make_eval_loader, make_transform, open_dataset
from dbscale.errors import TrainingError
from dbscale.study.cost import num_params
from dbscale.study.recipe import Budget, Distill, TimmModel
from dbscale.training import export
from dbscale.training.models import restore_model, timm_arguments
from dbscale.training.results import evaluate


def test_weights_load_into_plain_timm(bench):
    cell = bench.cell()
    row = bench.run(cell).row
    name, arguments = timm_arguments(cell.recipe.model, num_classes=6, image_size=16)
    path = bench.store.cell_dir(cell.key) / "model.safetensors"
    model = timm.create_model(name, **arguments, checkpoint_path=str(path))
    assert all(torch.equal(value, bench.weights(cell)[key]) for key, value in model.state_dict().items())
    assert sum(each.numel() for each in model.parameters()) == row.num_params == num_params(cell.recipe.model, 16, 6)


def test_evaluation_agrees_with_timm_on_the_same_images(bench):
    cell = bench.cell(budget=Budget(steps=30))
    row = bench.run(cell).row
    test = open_dataset(bench.data_dir / "shards/up", "test", image_size=16)
    pixels, _ = test.reader.fetch(np.arange(test.num_samples))
    ids = torch.arange(test.num_samples)
    images = make_transform(image_size=16, train=False)(torch.from_numpy(pixels), epoch=ids * 0, sample_ids=ids)
    name, arguments = timm_arguments(cell.recipe.model, num_classes=6, image_size=16)
    path = bench.store.cell_dir(cell.key) / "model.safetensors"
    model = timm.create_model(name, **arguments, checkpoint_path=str(path)).eval()
    labels = torch.from_numpy(test.labels_of(np.arange(test.num_samples)))
    with torch.no_grad():
        logits = model(images)
    top1, top5 = accuracy(logits, labels, topk=(1, 5))
    assert row.error_rate == pytest.approx(1 - float(top1) / 100)
    assert row.top5_error_rate == pytest.approx(1 - float(top5) / 100)
    assert row.test_loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-5)
    saved = np.load(bench.store.cell_dir(cell.key) / "correct.npz")
    bits = np.unpackbits(saved["correct"], count=int(saved["num_samples"]))
    assert bits.tolist() == (logits.argmax(1) == labels).int().tolist()
    assert np.unpackbits(saved["counted"], count=int(saved["num_samples"])).all()


def test_export_loads_with_timm_alone(bench, tmp_path):
    from dbscale.training.export import export_cell

    parent = bench.cell()
    cell = bench.cell("finetune", init=parent)
    bench.run(parent)
    row = bench.run(cell).row
    folder = export_cell(bench.store, cell.key, tmp_path / "export")
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert all(torch.equal(value, bench.weights(cell)[key]) for key, value in model.state_dict().items())
    card = (folder / "README.md").read_text()
    assert row.weights_sha256 in card and parent.key in card
    assert json.loads((folder / "recipe.json").read_text())["key"] == cell.key


def test_an_export_names_its_classes(bench, tmp_path):
    from dbscale.data import load_manifest
    from dbscale.training.export import export_cell

    cell = bench.cell()
    bench.run(cell)
    names = list(load_manifest(bench.data_dir / "shards" / "up").classes)
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "shards").mkdir(parents=True)
    (elsewhere / "shards" / "up").symlink_to(bench.data_dir / "shards" / "down")
    for data_dir, found in ((bench.data_dir, names), (None, None), (tmp_path, None), (elsewhere, None)):
        folder = export_cell(bench.store, cell.key, tmp_path / "export", data_dir)
        assert json.loads((folder / "config.json").read_text()).get("label_names") == found
        said = "by label in `label_names`" if found else "not known here: export again with --data"
        assert f"- names of the classes: {said}" in (folder / "README.md").read_text()
    assert timm.create_model(f"local-dir:{folder}", pretrained=True).num_classes == len(names) == 6


def test_two_heads_are_written_as_their_average(bench, monkeypatch):
    from dbscale.training import run

    trained, original = {}, run.finish_training

    def noting(finished, *rest):
        trained.update({name: value.clone() for name, value in finished.student.state_dict().items()})
        return original(finished, *rest)

    monkeypatch.setattr(run, "finish_training", noting)
    teacher = bench.cell(seed=1)
    bench.run(teacher)
    trained.clear()
    cell = bench.cell("distill", teacher=teacher, distill=Distill(head="parallel"))
    row = bench.run(cell).row
    assert not torch.equal(trained["head.weight"], trained["head.parallel.weight"])
    name, arguments = timm_arguments(cell.recipe.model, num_classes=6, image_size=16)
    path = bench.store.cell_dir(cell.key) / "model.safetensors"
    model = timm.create_model(name, **arguments, checkpoint_path=str(path))
    for part in ("weight", "bias"):
        mean = (trained[f"head.{part}"] + trained[f"head.parallel.{part}"]) / 2
        torch.testing.assert_close(model.state_dict()[f"head.{part}"], mean)
    assert row.num_params == sum(each.numel() for each in model.parameters()), "what is used counts, not what trained"
    child = bench.run(bench.cell("finetune", init=cell))
    assert child.status == "done", child.reason


def test_export_command_writes_what_timm_loads(bench, tmp_path, capsys):
    from dbscale.launch.cli import main

    cell = bench.cell()
    store = str(bench.store.root)
    assert main(["export", cell.id, "--store", store]) == 1
    assert f"cell {cell.key} is new; only finished cells are exported" in capsys.readouterr().err
    bench.run(cell)
    capsys.readouterr()
    for extra, folder in (
        ([], bench.store.root / "exports" / cell.key),
        (["--out", str(tmp_path / "x")], tmp_path / "x"),
    ):
        assert main(["export", cell.id, "--store", store, *extra]) == 0
        assert capsys.readouterr().out.strip() == str(folder)
        assert {path.name for path in folder.iterdir()} == {
            "model.safetensors", "config.json", "recipe.json", "row.json", "README.md"
        }  # fmt: skip
        name, arguments = timm_arguments(cell.recipe.model, num_classes=6, image_size=16)
        model = timm.create_model(name, **arguments, checkpoint_path=str(folder / "model.safetensors"))
        assert all(torch.equal(value, bench.weights(cell)[key]) for key, value in model.state_dict().items())
    assert main(["export", "nothing", "--store", store]) == 1
    assert "no cell 'nothing'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet10t"])
def test_a_timm_checkpoint_is_judged_as_timm_judges_it(name, bench, tmp_path):
    """Trained, saved and validated by timm's own parts; restored and evaluated by ours on the same images."""
    model_of = {
        "vit_tiny_patch16_224": {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3},
        "resnet10t": {},
    }
    test = open_dataset(bench.data_dir / "shards/up", "test", image_size=16)
    transform = make_transform(image_size=16, train=False)
    pixels, _ = test.reader.fetch(np.arange(test.num_samples))
    ids = torch.arange(test.num_samples)
    images, labels = (
        transform(torch.from_numpy(pixels), epoch=ids * 0, sample_ids=ids),
        torch.from_numpy(test.labels_of(np.arange(test.num_samples))),
    )
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=6, **model_of[name])
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3)
    for _ in range(8):
        torch.nn.functional.cross_entropy(model.train()(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    with torch.no_grad():
        logits = model.eval()(images)
    top1, top5 = accuracy(logits, labels, topk=(1, 5))

    recipe_model = TimmModel(
        kind="timm", name=name, kwargs={key: v for key, v in model_of[name].items() if key != "img_size"}
    )
    restored = restore_model(recipe_model, tmp_path / "model.safetensors", num_classes=6, image_size=16)
    loader = make_eval_loader(test.subset(), batch_size=7, transform=transform)
    alone: Any = SimpleNamespace(device=torch.device("cpu"), num_processes=1)
    found = evaluate(restored, loader, test.num_samples, alone)
    assert 0.2 < 1 - found.error_rate < 1
    assert (1 - found.error_rate, 1 - found.top5_error_rate) == pytest.approx((float(top1) / 100, float(top5) / 100))
    assert found.correct_N.tolist() == (logits.argmax(1) == labels).tolist()


def test_an_export_is_pushed_to_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of the hub's client, and what is said when there is no network."""
    asked: list[tuple[str, dict[str, Any]]] = []

    class Client:
        def __init__(self, **options: Any) -> None:
            asked.append(("client", options))

        def create_repo(self, repository: str, **options: Any) -> Any:
            asked.append(("create", {"repository": repository, **options}))
            return SimpleNamespace(repo_id="my-lab/birds")

        def upload_folder(self, **options: Any) -> str:
            asked.append(("upload", options))
            return "https://hub/my-lab/birds"

    with monkeypatch.context() as patched:
        patched.setattr(export, "HfApi", Client)
        assert export.push_export(tmp_path, "hf-hub:my-lab/birds", private=True) == "https://hub/my-lab/birds"
    assert [name for name, _ in asked] == ["client", "create", "upload"]
    assert asked[1][1] == {"repository": "my-lab/birds", "private": True, "exist_ok": True}
    assert (asked[2][1]["repo_id"], asked[2][1]["folder_path"]) == ("my-lab/birds", tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(TrainingError, match=r"hf-hub:my-lab/birds.*; log in with .*; the export is in "):
        export.push_export(tmp_path, "hf-hub:my-lab/birds")
    for name in ("birds", "hf-hub:birds", "hf-hub:a/b/c", "hf-hub:a/b c"):
        with pytest.raises(TrainingError, match="write hf-hub:owner/name"):
            export.push_export(tmp_path, name)
