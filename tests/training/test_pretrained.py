"""Teachers and beginnings from elsewhere: imported by hash, noted in rows, alike to the same weights as a cell's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import safetensors.torch
import timm
import torch

from dbscale.data import IMAGENET_MEAN, IMAGENET_STD
from dbscale.errors import TrainingError
from dbscale.study.recipe import DeiT, Pretrained, TimmModel
from dbscale.study.store import Store
from dbscale.study.weights import Weights, imported_hash, read_origin
from dbscale.training.models import make_model, sha256_of, stored_weights
from dbscale.training.pretrained import import_weights, make_teacher

SMALL = DeiT(heads=1, head_width=8, depth=2, patch_size=4)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Weights of SMALL with 6 classes at 16 px."""
    path = tmp_path / "small.safetensors"
    safetensors.torch.save_file(make_model(SMALL, num_classes=6, image_size=16, seed=5).state_dict(), path)
    return path


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "out")


def weights(path: Path, **options: Any) -> Weights:
    return Weights(checkpoint=path.name, **{"model": SMALL, "licence": "apache-2.0", **options})


def test_a_file_is_imported_once_by_its_hash(file: Path, store: Store) -> None:
    named = weights(file)
    assert imported_hash(store, named.checkpoint) is None
    digest = import_weights(store, named, file.parent)
    assert digest == sha256_of(file) == imported_hash(store, named.checkpoint)
    origin = read_origin(store, digest)
    assert (origin.checkpoint, origin.licence) == ("small.safetensors", "apache-2.0")
    stored = stored_weights(store, named.identified(digest))
    before = stored.stat().st_mtime_ns
    assert import_weights(store, named, file.parent) == digest
    assert stored.stat().st_mtime_ns == before
    other = make_model(SMALL, num_classes=6, image_size=16, seed=6).state_dict()
    safetensors.torch.save_file(other, file)
    assert import_weights(store, named, file.parent) == sha256_of(file) != digest
    stored.write_bytes(b"damaged")
    with pytest.raises(TrainingError, match="is missing or damaged"):
        stored_weights(store, named.identified(digest))


@pytest.mark.parametrize(
    "wrap", [lambda state: state, lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}}]
)
def test_torch_checkpoints_of_plain_tensors_are_read(file: Path, store: Store, wrap: Any) -> None:
    state = safetensors.torch.load_file(file)
    torch.save(wrap(state), path := file.with_suffix(".pth"))
    digest = import_weights(store, weights(path), file.parent)
    kept = safetensors.torch.load_file(stored_weights(store, weights(path).identified(digest)))
    assert kept.keys() == state.keys()
    assert all(torch.equal(kept[name], state[name]) for name in state)


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"\x80\x04cos\nsystem\n(S'true'\ntR."])
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, store: Store, content: bytes) -> None:
    path = tmp_path / "bad.pth"
    path.write_bytes(content)
    with pytest.raises(TrainingError, match="not a checkpoint of plain tensors"):
        import_weights(store, weights(path), tmp_path)
    with pytest.raises(TrainingError, match="relative to the data folder"):
        import_weights(store, weights(tmp_path / "none.pth"), tmp_path)


def test_a_teacher_answers_as_the_model_it_was_saved_from(file: Path, store: Store) -> None:
    digest = import_weights(store, weights(file), file.parent)
    model = make_model(SMALL, num_classes=6, image_size=16, seed=5).eval()
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    teacher = make_teacher(store, weights(file).identified(digest), num_classes=6, image_size=16).eval()
    assert torch.equal(teacher(images), model(images))
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)
    other = weights(file, mean=mean, std=std).identified(digest)
    pixels = images * torch.tensor(IMAGENET_STD).view(3, 1, 1) + torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
    theirs = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    teacher = make_teacher(store, other, num_classes=6, image_size=16).eval()
    assert torch.allclose(teacher(images), model(theirs), atol=1e-5)
    assert not torch.allclose(teacher(images), model(images), atol=1e-3)
    larger = make_teacher(store, weights(file).identified(digest), num_classes=6, image_size=32)
    assert larger.pos_embed.shape[1] == 8 * 8 + 1  # type: ignore[index, union-attr]
    with pytest.raises(TrainingError, match=r"small.safetensors knows 6 classes, this cell's dataset has 10"):
        make_teacher(store, weights(file).identified(digest), num_classes=10, image_size=16)
    wrong = Pretrained(sha256=digest, model=TimmModel(kind="timm", name="resnet18"))
    with pytest.raises(TrainingError, match="does not fit this cell's model"):
        make_teacher(store, wrong, num_classes=6, image_size=16)


def test_a_foreign_teacher_guides_as_the_same_weights_of_a_cell_do(bench: Any) -> None:
    """Bitwise, maps of attention included; the row says where the teacher came from."""
    teacher = bench.cell("pretrain", model=SMALL)
    assert bench.run(teacher).status == "done"
    path = bench.store.cell_dir(teacher.key) / "model.safetensors"
    named = Weights(checkpoint="model.safetensors", model=SMALL, licence="mit")
    digest = import_weights(bench.store, named, path.parent)
    ours = bench.cell("distill", teacher=teacher)
    recipe = ours.recipe.model_copy(update={"teacher": named.identified(digest)})
    theirs = type(ours)(recipe, ours.fingerprint)
    bench.store.write_spec(theirs.spec())
    assert theirs.id != ours.id
    one, other = bench.run(ours), bench.run(theirs)
    assert (one.status, other.status) == ("done", "done"), other.reason
    assert one.row.weights_sha256 == other.row.weights_sha256
    assert one.row.train_flops == other.row.train_flops
    assert one.row.weights_from == {}
    origin = other.row.weights_from["teacher"]
    assert (origin.source, origin.licence, origin.sha256) == ("model.safetensors", "mit", digest)


def test_an_upstream_run_may_begin_with_weights_of_elsewhere(bench: Any, file: Path) -> None:
    model = DeiT(heads=1, head_width=8, depth=2, patch_size=4)
    plain = bench.cell("pretrain", model=model)
    digest = import_weights(bench.store, weights(file), file.parent)
    recipe = plain.recipe.model_copy(update={"start": weights(file).identified(digest)})
    begun = type(plain)(recipe, plain.fingerprint)
    bench.store.write_spec(begun.spec())
    rows = [bench.run(cell).row for cell in (plain, begun)]
    assert rows[0].weights_sha256 != rows[1].weights_sha256
    assert rows[1].weights_from["start"].sha256 == digest


# The hub, offline: a cache as huggingface_hub leaves it.


def cached(folder: Path, repository: str, files: dict[str, bytes]) -> None:
    root = folder / f"models--{repository.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("0" * 40)
    snapshot = root / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    for name, content in files.items():
        (snapshot / name).write_bytes(content)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A timm model in the hub's cache, and no network."""
    folder = tmp_path / "hub"
    model = timm.create_model("resnet10t", num_classes=6)
    config = {
        "architecture": "resnet10t",
        "num_classes": 6,
        "pretrained_cfg": {"mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)},
    }
    cached(folder, "lab/birds", {
        "config.json": json.dumps(config).encode(),
        "model.safetensors": safetensors.torch.save(model.state_dict()),
        "README.md": b"---\nlicense: apache-2.0\n---\n",
    })  # fmt: skip
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return folder


def test_a_model_of_the_hub_is_imported_from_its_cache(hub: Path, store: Store, tmp_path: Path) -> None:
    named = Weights(checkpoint="hf-hub:lab/birds", model=TimmModel(kind="timm", name="resnet10t"))
    digest = import_weights(store, named, tmp_path)
    assert read_origin(store, digest).licence == "apache-2.0"
    assert import_weights(store, named, tmp_path) == digest
    teacher = make_teacher(store, named.identified(digest), num_classes=6, image_size=32)
    assert type(teacher).__name__ == "ResNet"


def test_what_the_hub_does_not_have_is_told(hub: Path, store: Store, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="is a resnet10t, the grid says birds; set its model"):
        import_weights(store, Weights(checkpoint="hf-hub:lab/birds"), tmp_path)
    with pytest.raises(TrainingError, match="'hf-hub:lab/none' cannot be fetched"):
        import_weights(store, Weights(checkpoint="hf-hub:lab/none"), tmp_path)
    config = {"architecture": "resnet10t", "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    cached(hub, "lab/grey", {"config.json": json.dumps(config).encode(), "model.safetensors": b""})
    named = Weights(checkpoint="hf-hub:lab/grey", model=TimmModel(kind="timm", name="resnet10t"))
    with pytest.raises(TrainingError, match=r"mean \[0.5, 0.5, 0.5\]"):
        import_weights(store, named, tmp_path)
