"""FLOPs are what torch counts, peaks are known by name, peak memory starts anew with each cell."""

from __future__ import annotations

import mmap
import resource

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dbscale.study import cost
from dbscale.study.cell import Cell
from dbscale.study.cost import device_memory
from dbscale.study.recipe import Budget, Data, DeiT, Optim, Recipe, TimmModel, Training
from dbscale.study.resources import Resources
from dbscale.study.task import Segmentation
from dbscale.training import device
from dbscale.training.device import (
    count_train_flops,
    device_name,
    energy_j,
    measure,
    peak_flops,
    peak_memory_bytes,
    reset_peak_memory,
)
from dbscale.training.models import make_model


@pytest.mark.parametrize("heads", [1, 2])
def test_predicted_flops_are_the_counted_ones(heads):
    model = DeiT(heads=heads, head_width=16, depth=3, patch_size=8)
    counted = measure(model, num_classes=10, image_size=32).forward_flops
    head = 2 * model.width * 10
    assert counted - head == cost.forward_flops(model, 32)


def test_training_flops_are_what_torch_counts_in_a_step():
    model = DeiT(heads=2, head_width=16, depth=3, patch_size=8)
    recipe = Recipe(
        stage="pretrain",
        model=model,
        data=Data(dataset="x", num_samples=10, image_size=32),
        training=Training(budget=Budget(steps=7), optim=Optim(lr=1e-3), global_batch=4),
        seed=0,
    )
    network = make_model(model, num_classes=10, image_size=32)
    images = torch.randn(4, 3, 32, 32)
    with FlopCounterMode(display=False) as counter:
        network(images).sum().backward()
    # The first layer needs no gradient of its input, which the usual factor of three does not know.
    embedding = 2 * 3 * 8 * 8 * model.width * 16 * 4
    assert count_train_flops(recipe, None, 10) / 7 == pytest.approx(counter.get_total_flops() + embedding, rel=0.02)
    teacher = DeiT(heads=1, head_width=16, depth=3, patch_size=8)
    more = count_train_flops(recipe, teacher, 10) - count_train_flops(recipe, None, 10)
    assert more == 7 * 4 * measure(teacher, num_classes=10, image_size=32).forward_flops


def test_flops_of_any_timm_model():
    resnet = TimmModel(kind="timm", name="resnet18")
    counted = measure(resnet, num_classes=1000, image_size=224).forward_flops
    assert counted == pytest.approx(cost.forward_flops(resnet, 224), rel=0.01)


def test_peaks_are_known_by_name_and_only_for_16_bits():
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16") == cost.DEVICES["h100"].peak_flops
    assert peak_flops("NVIDIA A100-SXM4-80GB", "fp16") == cost.DEVICES["a100"].peak_flops
    assert peak_flops("NVIDIA H100 80GB HBM3", "fp32") is None
    assert peak_flops("cpu", "bf16") is None


def test_of_a_cpu_neither_name_nor_energy_is_known():
    cpu = torch.device("cpu")
    assert device_name(cpu) == "cpu" and energy_j(cpu) is None


def test_peak_memory_without_proc_is_that_of_the_process(monkeypatch, tmp_path):
    """In kibibytes where /proc says it, and as the system counts it where there is no /proc."""
    monkeypatch.setattr(device, "PROC", tmp_path)
    whole = peak_memory_bytes(torch.device("cpu"))
    assert whole == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    (tmp_path / "status").write_text("Name:\tx\nVmPeak:\t   900 kB\nVmHWM:\t   700 kB\nVmRSS:\t 10 kB\n")
    assert peak_memory_bytes(torch.device("cpu")) == 700 * 1024


def test_what_a_dense_head_adds_is_counted_too():
    model = DeiT(heads=2, head_width=16, depth=2, patch_size=8)
    plain = measure(model, num_classes=4, image_size=32)
    linear = measure(model, num_classes=4, image_size=32, task=Segmentation())
    # One linear layer on each of 16 patches instead of on the class token, of 32 channels and 4 classes.
    assert linear.forward_flops - plain.forward_flops == 2 * 32 * 4 * 15
    assert linear.num_params == plain.num_params


def test_peak_memory_starts_anew_with_each_cell():
    cpu = torch.device("cpu")
    # Mapped, and so given back at once: what an allocator frees stays with a process whose heap had room for it.
    with mmap.mmap(-1, 64 << 20) as big:
        for page in range(0, len(big), mmap.PAGESIZE):
            big[page] = 1
        before = peak_memory_bytes(cpu)
    reset_peak_memory(cpu)
    assert peak_memory_bytes(cpu) < before - (48 << 20)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize(("depth", "mlp_ratio"), [(2, 4.0), (5, 4.0), (2, 2.0)])
def test_predicted_activations_are_what_autograd_keeps(precision, depth, mlp_ratio, cell_of):
    """Counted by hooks on a real forward pass; what 8 more images add leaves weights and their casts out."""
    model = DeiT(heads=2, head_width=32, depth=depth, patch_size=16, mlp_ratio=mlp_ratio)
    network = make_model(model, num_classes=10, image_size=112, drop_path=0.1).train()
    own = {each.untyped_storage().data_ptr() for each in network.parameters()}

    def kept_by(num_images):
        kept = {}

        def note(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = (storage.nbytes(), tensor)
            return tensor

        autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), autocast:
            network(torch.randn(num_images, 3, 112, 112))
        return sum(size for size, _ in kept.values())

    found = device_memory(cell_of(model, precision), Resources(zero_stage=None, micro_batch=8))
    assert found is not None
    assert found.activations == pytest.approx(kept_by(16) - kept_by(8), rel=0.03)


@pytest.fixture
def cell_of():
    def make(model, precision):
        training = Training(budget=Budget(steps=1), optim=Optim(lr=1e-3), global_batch=64, precision=precision)
        data = Data(dataset="up", num_samples=64, image_size=112)
        return Cell(Recipe(stage="pretrain", model=model, data=data, training=training, seed=0), None)

    return make
