"""Draws: keyed, distributed as the published recipes have it, and refused where they cannot be honoured."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from dbscale.data import DataError, make_transform, mix_batch
from dbscale.data.augment import (
    OPERATIONS,
    Policy,
    color_jitter,
    draw_operations,
    erase_random,
    parse_policy,
    rand_augment,
)
from dbscale.keyed import keyed_bits, keyed_uniform

IDS = np.arange(64)
EPOCHS = np.zeros(64, np.int64)


def batch(seed: int = 0, size: int = 16, count: int = 64) -> torch.Tensor:
    generator = np.random.default_rng(seed)
    return torch.from_numpy(generator.integers(0, 256, (count, 3, size, size), dtype=np.uint8))


def test_keyed_draws_never_drift() -> None:
    """Old runs stay comparable: these numbers are part of the recipe."""
    assert keyed_bits(7, "place", 3, [11, 12], num_draws=2).tolist() == [
        [2980235430960381024, 9423503503639630040],
        [11867970194891825577, 2851268213815723437],
    ]


def test_keyed_draws_are_uniform_and_unrelated() -> None:
    draws = keyed_uniform(1, "test", 0, np.arange(20000), num_draws=3)
    assert np.abs(draws.mean(axis=0) - 0.5).max() < 4 / np.sqrt(12 * 20000)
    assert np.abs(draws.var(axis=0) - 1 / 12).max() < 0.005
    others = [
        keyed_uniform(2, "test", 0, np.arange(20000), num_draws=1)[:, 0],
        keyed_uniform(1, "other", 0, np.arange(20000), num_draws=1)[:, 0],
        keyed_uniform(1, "test", 1, np.arange(20000), num_draws=1)[:, 0],
        np.roll(draws[:, 0], 1),
        draws[:, 1],
    ]
    for other in others:
        assert abs(np.corrcoef(draws[:, 0], other)[0, 1]) < 4 / np.sqrt(20000)


@pytest.mark.parametrize(
    "augment",
    [
        {"crop_padding": 2, "hflip": 0.5},
        {"random_resized_crop": (0.3, 1.0)},
        {"color_jitter": 0.4},
        {"rand_augment": "rand-m9-mstd0.5-inc1"},
        {"random_erasing": 0.5},
    ],
)
def test_a_sample_looks_the_same_in_any_batch(augment: dict[str, object]) -> None:
    transform = make_transform(image_size=16, train=True, augment=augment, seed=4)
    images, epochs, ids = batch(), torch.from_numpy(EPOCHS + 2), torch.from_numpy(IDS)
    whole = transform(images, epoch=epochs, sample_ids=ids)
    shuffle = torch.randperm(64, generator=torch.Generator().manual_seed(0))[:20]
    part = transform(images[shuffle], epoch=epochs[shuffle], sample_ids=ids[shuffle])
    torch.testing.assert_close(part, whole[shuffle], rtol=0, atol=1e-6)
    again = transform(images, epoch=epochs + 1, sample_ids=ids)
    assert not torch.equal(again, whole)
    assert whole.shape == (64, 3, 16, 16) and whole.dtype == torch.float32


def test_normalisation_and_the_plain_transform() -> None:
    transform = make_transform(image_size=16, train=False, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    images = batch()
    result = transform(images, epoch=torch.from_numpy(EPOCHS), sample_ids=torch.from_numpy(IDS))
    mean, std = torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1), torch.tensor([0.2, 0.3, 0.4]).view(1, 3, 1, 1)
    torch.testing.assert_close(result, (images / 255 - mean) / std, rtol=1e-5, atol=1e-5)


def test_stored_pixels_are_never_written_to() -> None:
    augment = {"crop_padding": 2, "hflip": 1.0, "rand_augment": "rand-m9-inc1", "random_erasing": 1.0}
    images = batch()
    before = images.clone()
    for train in (True, False):
        transform = make_transform(image_size=16, train=train, augment=augment)
        transform(images, epoch=torch.from_numpy(EPOCHS), sample_ids=torch.from_numpy(IDS))
    assert torch.equal(images, before)


def test_unknown_and_contradictory_fields_are_refused() -> None:
    with pytest.raises(
        DataError, match=r"unknown field 'flip'; did you mean 'hflip'\? known: color_jitter, crop_padding, cutmix"
    ):
        make_transform(image_size=8, train=True, augment={"flip": 1})
    with pytest.raises(DataError, match="exclude each other"):
        make_transform(image_size=8, train=True, augment={"crop_padding": 2, "random_resized_crop": (0.1, 1)})
    for text in ("m9", "rand-m9", "rand-m9-w0-inc1", "rand-m11-inc1", "rand-mx-inc1"):
        with pytest.raises(DataError, match="rand_augment"):
            make_transform(image_size=8, train=True, augment={"rand_augment": text})


def test_every_recipe_field_is_understood() -> None:
    """The training wing passes the recipe's augment block as it is."""
    from dbscale.study.recipe import Augment

    make_transform(image_size=8, train=True, augment=Augment().model_dump())


def test_policies_parse_as_timms() -> None:
    assert parse_policy("rand-m9-mstd0.5-inc1") == Policy(9, 2, 0.5, 0.5)
    assert parse_policy("rand-m7-n3-p0.8-inc1") == Policy(7, 3, 0.8, 0.0)


def test_operations_are_drawn_as_timm_draws_them() -> None:
    """Half are left out, the rest even over 15; levels N(9, 0.5) clipped at 10; signs even."""
    draws = keyed_uniform(0, "test", np.arange(30000), num_draws=5)
    chosen, levels, signs = draw_operations(Policy(9, 2, 0.5, 0.5), draws)
    assert abs((chosen < 0).mean() - 0.5) < 0.012
    shares = np.bincount(chosen[chosen >= 0], minlength=15) / (chosen >= 0).sum()
    assert len(shares) == len(OPERATIONS) == 15
    assert np.abs(shares - 1 / 15).max() < 0.009
    reference = np.clip(np.random.default_rng(0).normal(9, 0.5, 30000), 0, 10)
    assert abs(levels.mean() - reference.mean()) < 0.015
    assert abs(levels.std() - reference.std()) < 0.015
    assert levels.max() <= 10
    assert abs(signs.mean()) < 0.025


def test_rand_augment_changes_about_what_timm_changes(make_photograph: Callable) -> None:
    """The mean change of a pixel, over many draws, against timm's own per-image implementation."""
    import random

    from timm.data.auto_augment import rand_augment_transform

    image = make_photograph(3, 24, 24)
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
    n = 400
    ids = np.arange(n)
    fill = (124, 116, 104)
    ours = rand_augment(pixels.expand(n, 3, 24, 24), parse_policy("rand-m7-mstd0.5-inc1"), fill, 0, ids * 0, ids)
    random.seed(0)
    np.random.seed(0)
    # Magnitude 10 would ask for posterising to 0 bits, which Pillow 13 refuses timm.
    timm = rand_augment_transform("rand-m7-mstd0.5-inc1", {"img_mean": fill})
    theirs = np.stack([np.asarray(timm(image)) for _ in range(n)])
    original = np.asarray(image).astype(float)
    changes = [
        np.abs(result - original).mean(axis=(1, 2, 3))
        for result in (ours.permute(0, 2, 3, 1).numpy().astype(float), theirs.astype(float))
    ]
    error = np.sqrt(sum(change.var() for change in changes) / n)
    assert abs(changes[0].mean() - changes[1].mean()) < 4 * error
    assert abs((changes[0] == 0).mean() - (changes[1] == 0).mean()) < 0.09
    for share in (0.25, 0.5, 0.75, 0.9):
        assert abs(np.quantile(changes[0], share) - np.quantile(changes[1], share)) < 9


def test_color_jitter_is_distributed_as_torchvisions(make_photograph: Callable) -> None:
    from torchvision.transforms import ColorJitter

    image = make_photograph(5, 16, 16)
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
    n = 400
    ids = np.arange(n)
    ours = color_jitter(pixels.expand(n, 3, 16, 16), 0.4, 0, ids * 0, ids).float()
    torch.manual_seed(0)
    jitter = ColorJitter(0.4, 0.4, 0.4)
    theirs = torch.stack([jitter(pixels) for _ in range(n)]).float()
    for measure in (lambda x: x.mean(dim=(1, 2, 3)), lambda x: x.std(dim=(1, 2, 3))):
        a, b = measure(ours), measure(theirs)
        assert (a.mean() - b.mean()).abs() < 4 * ((a.var() + b.var()) / n).sqrt()
        assert (a.std() - b.std()).abs() < 0.15 * b.std()


def test_erasing_follows_the_published_ranges() -> None:
    n = 2000
    images = torch.full((n, 3, 32, 32), 100.0)
    erased = erase_random(images, 0.25, 0, np.zeros(n, np.int64), np.arange(n)) != 100.0
    areas = erased[:, 0].float().mean(dim=(1, 2))
    touched = areas > 0
    assert abs(touched.float().mean() - 0.25) < 0.04
    assert areas[touched].min() > 0.01 and areas[touched].max() < 0.36
    assert abs(areas[touched].mean() - (0.02 + 1 / 3) / 2) < 0.02
    noise = images[erased]
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02


def mixed(step: int, images: torch.Tensor, labels: torch.Tensor, **options: float):
    return mix_batch(images, labels, num_classes=10, seed=1, step=step, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}])
def test_mixing_does_not_depend_on_the_world_size(options: dict[str, float]) -> None:
    images, labels = torch.randn(8, 3, 16, 16), torch.arange(8)
    for step in range(12):
        whole, target = mixed(step, images, labels, **options)
        for parts in (2, 4):
            halves = [
                mixed(step, i, t, **options) for i, t in zip(images.chunk(parts), labels.chunk(parts), strict=True)
            ]
            assert torch.equal(whole, torch.cat([half[0] for half in halves]))
            assert torch.equal(target.y_b, torch.cat([half[1].y_b for half in halves]))
            assert {half[1].lam for half in halves} == {target.lam}


def test_the_share_of_a_mix_is_what_the_pixels_say() -> None:
    labels = torch.tensor([0, 1, 2, 3])
    images = labels.float().view(4, 1, 1, 1).expand(4, 3, 16, 16).contiguous()
    for step in range(40):
        for options in ({"mixup": 0.8}, {"cutmix": 1.0}):
            result, target = mixed(step, images, labels, **options)
            expected = target.lam * images[:, 0, 0, 0] + (1 - target.lam) * images[target.y_b, 0, 0, 0]
            torch.testing.assert_close(result.mean(dim=(1, 2, 3)), expected, rtol=1e-4, atol=1e-4)
            dense = target.dense(10, smoothing=0.1)
            torch.testing.assert_close(dense.sum(dim=1), torch.ones(4))
            assert dense[0, 0] == pytest.approx(0.9 * target.lam + 0.01, abs=1e-6)


def test_mixing_shares_follow_beta_and_the_switches() -> None:
    images, labels = torch.zeros(2, 3, 4, 4), torch.arange(2)
    lams = np.array([mixed(step, images, labels, mixup=0.8)[1].lam for step in range(600)])
    # Beta(a, a): mean 1/2, variance 1 / (4 (2 a + 1)).
    assert abs(lams.mean() - 0.5) < 0.06
    assert abs(lams.var() - 1 / (4 * 2.6)) < 0.02
    shares = [mixed(step, images, labels, mixup=0.8, prob=0.3)[1].lam == 1.0 for step in range(300)]
    assert abs(np.mean(shares) - 0.7) < 0.12


def test_odd_batches_cannot_be_mixed() -> None:
    with pytest.raises(DataError, match="a rank's batch of 3 is odd"):
        mixed(0, torch.zeros(3, 3, 4, 4), torch.arange(3), mixup=0.8)
    images, target = mixed(0, torch.zeros(3, 3, 4, 4), torch.arange(3))
    assert target.lam == 1.0 and len(images) == 3


def test_importing_the_wing_does_not_import_torch(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = "import sys, dbscale.data.dataset, shards.pack, shards.verify; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
