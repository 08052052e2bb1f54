"""The training loop on a CUDA device: every engine and precision, bitwise resume, compile; one device is enough."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from dbscale.data import load_manifest
from dbscale.study.cell import Cell
from dbscale.study.recipe import Attention, Augment, Budget, Data, DeiT, Distill, Optim, Recipe, Training
from dbscale.study.resources import Resources, StopRequest
from dbscale.study.store import Store

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; none is visible"),
]

ENGINES = [None, 0, 1, 2, 3]
MIXED_IN_HALF = Augment(cutmix=1.0, mixup=0.5, mix_share=0.5)
RECORDED: list[dict[str, Any]] = [{}, {"augment": MIXED_IN_HALF}, {"augment": Augment()}, {"micro_batch": 16}]


class StopAfter(StopRequest):
    """Asks to stop at the n-th look of the loop."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps

    @property
    def requested(self) -> bool:
        self.steps -= 1
        return self.steps <= 0


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    from dbscale.shards.pack import ensure_packed

    folder = tmp_path_factory.mktemp("data")
    spec = {"source": "fractals", "families": 8, "num_train": 512, "num_test": 128, "image_size": 32}
    ensure_packed("up", spec, folder)
    return folder


@pytest.fixture
def make(data_dir, tmp_path):
    """`make(store name, stage, …)` writes a cell and gives its store, itself, and a function that runs it."""

    def build(name: str, stage: str = "pretrain", *, teacher: Cell | None = None, heads: int = 2, **training):
        augment = training.pop("augment", Augment(crop_padding=2, mixup=0.2))
        recipe = Recipe(
            stage=stage,  # type: ignore[arg-type]
            model=DeiT(heads=heads, head_width=32, depth=4, patch_size=4),
            data=Data(dataset="up", num_samples=512, image_size=32),
            training=Training(
                budget=Budget(steps=60),
                optim=Optim(lr=1e-3, clip_norm=1.0),
                global_batch=64,
                augment=augment,
                drop_path=0.1,
                ema_decay=0.9,
                **{"precision": "bf16", **training},
            ),
            seed=0,
            distill=Distill(alpha=0.5, attention=Attention(layers="all")) if stage == "distill" else None,
        )
        cell = Cell(recipe, load_manifest(Path(data_dir) / "shards/up").fingerprint, teacher=teacher)
        store = Store(tmp_path / name)
        store.write_spec(cell.spec())
        return store, cell

    return build


def run(store, cell, data_dir, stop=None, **resources):
    from dbscale.training.run import run_cell

    how = Resources(**{"device": "cuda", "zero_stage": None, **resources})
    outcome: Any = run_cell(store, cell.key, data_dir=data_dir, resources=how, stop=stop or StopRequest())
    return outcome


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("stage", ENGINES)
def test_each_engine_and_precision_learns(stage, precision, make, data_dir):
    store, cell = make("store", precision=precision)
    outcome = run(store, cell, data_dir, zero_stage=stage)
    assert outcome.status == "done", outcome.reason
    row = outcome.row
    assert row.train_loss < math.log(8) and row.timing.device == torch.cuda.get_device_name()
    assert row.timing.peak_memory_bytes > 0


@pytest.mark.parametrize("stage", ENGINES)
def test_resume_is_bitwise(stage, make, data_dir):
    (whole, cell), (cut, _) = make("whole"), make("cut")
    run(whole, cell, data_dir, zero_stage=stage)
    assert run(cut, cell, data_dir, StopAfter(20), zero_stage=stage).status == "interrupted"
    assert run(cut, cell, data_dir, StopAfter(20), zero_stage=stage).status == "interrupted"
    assert run(cut, cell, data_dir, zero_stage=stage).status == "done"
    expected, found = (each.read_row(cell.key).model_dump(exclude={"timing"}) for each in (whole, cut))
    assert found == expected


@pytest.mark.parametrize("stage", ["pretrain", "distill"])
@pytest.mark.parametrize("how", RECORDED, ids=str)
def test_a_recorded_step_gives_the_weights_of_the_eager_one(how, stage, make, data_dir):
    how = dict(how)
    micro_batch = how.pop("micro_batch", None)
    rows = []
    for name in ("eager", "recorded"):
        store, teacher = make(name, heads=1)
        if stage == "distill":
            run(store, teacher, data_dir)
        store, cell = make(name, stage, teacher=teacher if stage == "distill" else None, **how)
        outcome = run(store, cell, data_dir, cuda_graph=name == "recorded", micro_batch=micro_batch)
        assert outcome.status == "done", outcome.reason
        rows.append(outcome.row.model_dump(exclude={"timing"}))
    assert rows[0] == rows[1]


def test_a_recorded_step_is_recorded(make, data_dir, monkeypatch):
    replays = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: replays.append(1) or replay(graph))
    store, cell = make("store")
    run(store, cell, data_dir)
    assert len(replays) == 60 - 3
    other, _ = make("other", precision="fp16")
    run(other, cell, data_dir, cuda_graph=False)
    assert len(replays) == 60 - 3


def test_the_feed_gives_on_the_device_what_it_gives_on_the_host(make, data_dir):
    from dbscale.data import make_loader, make_transform, open_dataset
    from dbscale.training.feed import feed

    _, cell = make("store", augment=Augment(crop_padding=2, hflip=0.5, cutmix=1.0))
    recipe, found = cell.recipe, {}
    for device in ("cpu", "cuda"):
        dataset = open_dataset(Path(data_dir) / "shards/up", "train", tier="resident", image_size=32)
        loader = make_loader(dataset.subset(512, 0), global_batch=64, seed=3)
        transform = make_transform(image_size=32, train=True, augment=recipe.training.augment.model_dump(), seed=5)
        found[device] = list(feed(loader, range(7), recipe, transform, torch.device(device)))
    assert len(found["cpu"]) == len(found["cuda"]) == 7
    for host, device in zip(found["cpu"], found["cuda"], strict=True):
        torch.testing.assert_close(device.images.cpu(), host.images, atol=1e-6, rtol=1e-6)
        assert torch.equal(device.target.y_a.cpu(), host.target.y_a) and device.target.lam == host.target.lam


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_distillation_with_maps(backend, make, data_dir):
    store, teacher = make("store", heads=1)
    run(store, teacher, data_dir)
    store, cell = make("store", "distill", teacher=teacher)
    outcome = run(store, cell, data_dir, kd_backend=backend)
    assert outcome.status == "done", outcome.reason
    assert outcome.row.kd_backend == ("triton" if backend == "auto" else "eager")


def test_compiled_student_learns_the_same(make, data_dir):
    (eager, cell), (compiled, _) = make("eager", precision="fp32"), make("compiled", precision="fp32")
    expected = run(eager, cell, data_dir).row
    outcome = run(compiled, cell, data_dir, compile=True)
    assert outcome.status == "done", outcome.reason
    assert outcome.row.train_loss == pytest.approx(expected.train_loss, rel=0.05)


def test_mfu_is_known_on_known_devices(make, data_dir):
    store, cell = make("store")
    timing = run(store, cell, data_dir).row.timing
    known = any(name in timing.device.lower() for name in ("a100", "h100", "h200"))
    assert (timing.mfu is not None) == known
    if timing.mfu is not None:
        assert 0 < timing.mfu < 1
