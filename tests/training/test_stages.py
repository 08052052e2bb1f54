"""What each stage does: arms start alike, heads are replaced, teachers guide and nothing else, rows say it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from timm.utils.metrics import accuracy

from dbscale.study.cell import Cell
from dbscale.study.cost import num_params
from dbscale.study.recipe import Attention, Augment, Budget, Data, DeiT, Distill, Optim, Recipe, TimmModel, Training
from dbscale.study.resources import Resources
from dbscale.training import loop, losses, run
from dbscale.training.models import make_model, timm_arguments

SMALL, LARGE = DeiT(heads=1, head_width=8, depth=2, patch_size=4), DeiT(heads=3, head_width=8, depth=3, patch_size=4)


def weights_of(bench, cell):
    return safetensors.torch.load_file(bench.store.cell_dir(cell.key) / "model.safetensors")


@pytest.fixture
def spied(monkeypatch):
    """Hashes of the student's first weights and of every batch, by cell."""
    seen: dict[str, list[list[int]]] = {}
    original, step = run.train, loop._optimizer_step

    def noting_train(started):
        key = started.checkpointer.folder.parent.name
        seen[key] = [_hash(each for _, each in sorted(started.student.state_dict().items()))]
        return original(started)

    def noting_step(started, images, target):
        labels = target if isinstance(target, torch.Tensor) else torch.stack([target.y_a, target.y_b])
        seen[started.checkpointer.folder.parent.name].append(_hash([images, labels]))
        return step(started, images, target)

    monkeypatch.setattr(run, "train", noting_train)
    monkeypatch.setattr(loop, "_optimizer_step", noting_step)
    return seen


def _hash(tensors):
    return [hash(each.detach().numpy().tobytes()) for each in tensors]


def test_paired_arms_start_alike_and_see_the_same_batches(bench, spied):
    options = {"augment": Augment(crop_padding=1, mixup=0.8, cutmix=1.0)}
    teacher = bench.cell(model=SMALL, **options)
    plain, distilled = bench.cell(**options), bench.cell("distill", teacher=teacher, **options)
    for cell in (teacher, plain, distilled):
        assert bench.run(cell).status == "done"
    assert spied[plain.key] == spied[distilled.key]
    assert len(spied[plain.key]) == 13
    assert weights_of(bench, plain).keys() == weights_of(bench, distilled).keys()
    assert bench.fingerprint(plain)["row"]["weights_sha256"] != bench.fingerprint(distilled)["row"]["weights_sha256"]


@pytest.mark.parametrize("attention", [None, Attention(beta=0.0)])
def test_distilling_with_no_weight_is_plain_bitwise(attention, bench):
    teacher = bench.cell(model=SMALL)
    plain = bench.cell()
    idle = bench.cell("distill", teacher=teacher, distill=Distill(alpha=0.0, attention=attention))
    rows = [bench.run(cell).row for cell in (teacher, plain, idle)]
    assert rows[1].weights_sha256 == rows[2].weights_sha256
    assert rows[1].train_loss == rows[2].train_loss


@pytest.mark.parametrize(
    ("teacher_model", "distill", "terms"),
    [
        (SMALL, Distill(alpha=0.5), {"kl"}),
        (LARGE, Distill(alpha=1.0), {"kl"}),
        (SMALL, Distill(alpha=0.5, target="hard"), {"kl"}),
        (SMALL, Distill(alpha=0.5, attention=Attention(layers="all", head_map="repeat")), {"kl", "attention_kl"}),
        (LARGE, Distill(alpha=0.5, attention=Attention(layers=(0, -1), head_map="matrix")), {"kl", "attention_kl"}),
        (LARGE, Distill(alpha=0.0, attention=Attention(head_map="mean")), {"attention_kl"}),
    ],
    ids=["smaller", "larger", "hard", "all layers", "matrix", "maps only"],
)
def test_each_kind_of_distillation_trains_and_reports_its_terms(teacher_model, distill, terms, bench):
    options = {"augment": Augment(mixup=0.8), "budget": Budget(steps=10)}
    teacher = bench.cell(model=teacher_model, **options)
    cell = bench.cell("distill", teacher=teacher, distill=distill, **options)
    bench.run(teacher)
    before = weights_of(bench, teacher)
    outcome = bench.run(cell)
    assert outcome.status == "done", outcome.reason
    line = bench.fingerprint(cell)["metrics"][-1]
    assert line.keys() - {"step", "lr", "loss", "ce"} == terms
    expected = (1 - distill.alpha) * line["ce"]
    expected += distill.alpha * line.get("kl", 0) * (distill.temperature**2 if distill.target == "soft" else 1)
    expected += line.get("attention_kl", 0) * (distill.attention.beta if distill.attention else 0)
    assert line["loss"] == pytest.approx(expected, rel=1e-5)
    assert outcome.row.arm == "distilled" and outcome.row.teacher == teacher.key
    assert all(torch.equal(before[name], value) for name, value in weights_of(bench, teacher).items())


def test_finetune_starts_from_its_parent_with_a_new_head(bench, spied, monkeypatch):
    parent = bench.cell()
    child = bench.cell("finetune", init=parent)
    starts = {}
    original = run.train

    def noting(started):
        starts[started.checkpointer.folder.parent.name] = {
            name: value.clone() for name, value in started.student.state_dict().items()
        }
        return original(started)

    monkeypatch.setattr(run, "train", noting)
    bench.run(parent)
    outcome = bench.run(child)
    trained = weights_of(bench, parent)
    for name, value in starts[child.key].items():
        if name.startswith("head."):
            assert value.shape[0] == 3
        else:
            assert torch.equal(value, trained[name]), name
    assert outcome.row.arm == "plain"
    assert outcome.row.upstream.error_rate == bench.store.read_row(parent.key).error_rate
    assert outcome.row.upstream.num_samples == 40


def test_finetune_at_another_size_interpolates_positions(bench, data_dir):
    from dbscale.training.models import load_backbone

    parent = bench.cell()
    bench.run(parent)
    student = make_model(parent.recipe.model, num_classes=3, image_size=32, seed=0)
    load_backbone(student, bench.store.cell_dir(parent.key) / "model.safetensors")
    state = student.state_dict()
    assert state["pos_embed"].shape == (1, 65, 16)
    name = "blocks.0.attn.qkv.weight"
    assert torch.equal(state[name], weights_of(bench, parent)[name])


def test_linear_probe_changes_the_head_alone(bench):
    parent = bench.cell()
    child = bench.cell("finetune", init=parent, scope="linear_probe")
    bench.run(parent)
    outcome = bench.run(child)
    before, after = weights_of(bench, parent), weights_of(bench, child)
    changed = {name for name in after if name not in before or not torch.equal(before[name], after[name])}
    assert changed == {"head.weight", "head.bias"}
    whole = bench.cell("finetune", init=parent)
    assert outcome.row.train_flops == pytest.approx(bench.run(whole).row.train_flops / 3)


def test_scratch_finetune_has_no_upstream(bench):
    row = bench.run(bench.cell("finetune")).row
    assert (row.arm, row.upstream, row.teacher) == ("scratch", None, None)


def test_ema_is_what_is_exported(bench, monkeypatch):
    slow, none = bench.cell(ema_decay=0.999), bench.cell()
    starts = {}
    original = run.train

    def noting(started):
        starts.setdefault("w", started.student.head.weight.detach().clone())
        return original(started)

    monkeypatch.setattr(run, "train", noting)
    bench.run(slow)
    bench.run(none)
    moved = (weights_of(bench, none)["head.weight"] - starts["w"]).norm()
    averaged = (weights_of(bench, slow)["head.weight"] - starts["w"]).norm()
    assert 0 < averaged < 0.1 * moved


def test_resnet_pretrains_and_finetunes(bench):
    resnet = TimmModel(kind="timm", name="resnet10t")
    parent = bench.cell(model=resnet, budget=Budget(steps=3), drop_path=0.0, global_batch=8)
    child = bench.cell("finetune", init=parent, model=resnet, budget=Budget(steps=2), drop_path=0.0, global_batch=8)
    assert bench.run(parent).status == "done"
    outcome = bench.run(child)
    assert outcome.status == "done", outcome.reason
    assert outcome.row.model == "resnet10t" and outcome.row.num_params == sum(
        value.numel()
        for name, value in weights_of(bench, child).items()
        if not name.endswith(("running_mean", "running_var", "num_batches_tracked"))
    )


def test_weights_load_into_plain_timm(bench):
    cell = bench.cell()
    row = bench.run(cell).row
    name, arguments = timm_arguments(cell.recipe.model, num_classes=6, image_size=16)
    path = bench.store.cell_dir(cell.key) / "model.safetensors"
    model = timm.create_model(name, **arguments, checkpoint_path=str(path))
    assert all(torch.equal(value, weights_of(bench, cell)[key]) for key, value in model.state_dict().items())
    assert sum(each.numel() for each in model.parameters()) == row.num_params == num_params(cell.recipe.model, 16, 6)


def test_evaluation_agrees_with_timm_on_the_same_images(bench):
    from dbscale.data import make_transform, open_dataset

    cell = bench.cell(budget=Budget(steps=30))
    row = bench.run(cell).row
    test = open_dataset(bench.data_dir / "shards/up", "test", image_size=16)
    pixels, _ = test.reader.fetch(np.arange(test.num_samples))
    ids = torch.arange(test.num_samples)
    images = make_transform(image_size=16, train=False)(torch.from_numpy(pixels), epoch=ids * 0, sample_ids=ids)
    name, arguments = timm_arguments(cell.recipe.model, num_classes=6, image_size=16)
    path = bench.store.cell_dir(cell.key) / "model.safetensors"
    model = timm.create_model(name, **arguments, checkpoint_path=str(path)).eval()
    labels = torch.from_numpy(test.labels)
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
    assert all(torch.equal(value, weights_of(bench, cell)[key]) for key, value in model.state_dict().items())
    card = (folder / "README.md").read_text()
    assert row.weights_sha256 in card and parent.key in card
    assert json.loads((folder / "recipe.json").read_text())["key"] == cell.key


def test_more_data_than_micro_batches_gives_the_same_result_within_rounding(bench_of):
    rows = []
    for micro in (None, 8, 4):
        bench = bench_of(str(micro))
        cell = bench.cell(drop_path=0.0)
        resources = Resources(zero_stage=None, threads=1, micro_batch=micro)
        rows.append(bench.run(cell, resources).row)
    assert {row.resources["accumulation"] for row in rows} == {1, 2, 4}
    assert all(row.train_loss == pytest.approx(rows[0].train_loss, rel=1e-4) for row in rows)


def test_losses_match_their_formulas():
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 5), torch.randint(0, 5, (6,))
    from dbscale.data import MixTarget

    mixed = MixTarget(labels, labels.flip(0), 0.3)
    found = losses._cross_entropy(logits, mixed, 0.1)
    dense = mixed.dense(5, smoothing=0.1)
    assert found == pytest.approx(float(torch.nn.functional.cross_entropy(logits, dense)), rel=1e-6)


def test_recipe_of_the_paper_trains_one_step_of_each_field(bench):
    """DeiT's settings, all at once, at toy size."""
    recipe = Recipe(
        stage="pretrain",
        model=DeiT(heads=2, head_width=8, depth=2, patch_size=4),
        data=Data(dataset="up", num_samples=40, image_size=16),
        training=Training(
            budget=Budget(steps=3),
            optim=Optim(lr=1e-3, lr_reference_batch=512, layer_decay=0.75),
            global_batch=16,
            precision="bf16",
            augment=Augment(
                random_resized_crop=(0.08, 1.0), mixup=0.8, cutmix=1.0, random_erasing=0.25, repeats=2, hflip=0.5
            ),
            label_smoothing=0.1,
            drop_path=0.1,
            ema_decay=0.9,
        ),
        seed=3,
    )
    cell = bench.cell(**{name: getattr(recipe.training, name) for name in Training.model_fields})
    assert bench.run(cell).status == "done"


def test_export_command_writes_what_timm_loads(bench, tmp_path, capsys):
    from launch.cli import main

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
        assert all(torch.equal(value, weights_of(bench, cell)[key]) for key, value in model.state_dict().items())
    assert main(["export", "nothing", "--store", store]) == 1
    assert "no cell 'nothing'" in capsys.readouterr().err


def test_a_whole_finetune_at_another_size(bench):
    parent = bench.cell()
    bench.run(parent)
    plain = bench.cell("finetune", init=parent)
    data = plain.recipe.data.model_copy(update={"image_size": 24})
    larger = Cell(plain.recipe.model_copy(update={"data": data}), plain.fingerprint, init=parent)
    bench.store.write_spec(larger.spec())
    outcome = bench.run(larger)
    assert outcome.status == "done", outcome.reason
    assert weights_of(bench, larger)["pos_embed"].shape == (1, 37, 16)
    assert outcome.row.upstream.transrate is not None
    same_size = bench.run(plain).row
    assert outcome.row.train_flops > 2 * same_size.train_flops


def test_distilled_deit_learns_from_a_plain_teacher_with_other_tokens(bench):
    """Two prefix tokens against one, two heads of the classifier, three attention heads against two."""
    sizes = {"embed_dim": 24, "depth": 2, "num_heads": 3, "patch_size": 4}
    student = TimmModel(kind="timm", name="deit_tiny_distilled_patch16_224", kwargs=sizes)
    teacher = bench.cell()
    settings = Distill(alpha=0.5, attention=Attention(layers="all", head_map="matrix"))
    cell = bench.cell("distill", teacher=teacher, model=student, distill=settings)
    bench.run(teacher)
    outcome = bench.run(cell)
    assert outcome.status == "done", outcome.reason
    child = bench.cell("finetune", init=cell, model=student)
    outcome = bench.run(child)
    assert outcome.status == "done", outcome.reason
    assert outcome.row.arm == "distilled"
    weights = weights_of(bench, child)
    assert weights["head.weight"].shape == weights["head_dist.weight"].shape == (3, 24)
