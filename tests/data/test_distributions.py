"""Batched augmentation draws as the per-sample libraries do: samples of both, compared by their distributions."""

import random

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing

from dbscale.data import make_transform, mix_batch
from dbscale.data.augment import erase_random


def kind_and_share(images: torch.Tensor, lam: float) -> tuple[str, float]:
    """Images of 0 and 1 tell what was done to them: lerped to one value, pasted, or left alone."""
    if lam == 1.0:
        return "none", 1.0
    return ("cutmix" if set(images[0].unique().tolist()) <= {0.0, 1.0} else "mixup"), lam


def test_mixing_is_distributed_as_timms() -> None:
    """How often each kind comes, and the shares each leaves, against timm's own Mixup (Kolmogorov-Smirnov)."""
    options = {"mixup": 0.8, "cutmix": 1.0, "prob": 0.7, "switch_prob": 0.4}
    images, labels = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 32, 32), torch.tensor([0, 1])
    ours, theirs = [], []
    np.random.seed(0)
    reference = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, prob=0.7, switch_prob=0.4, label_smoothing=0.0, num_classes=2)
    for step in range(2000):
        result, target = mix_batch(images, labels, num_classes=2, seed=1, step=step, **options)
        ours.append(kind_and_share(result, target.lam))
        result, dense = reference(images.clone(), labels)
        theirs.append(kind_and_share(result, float(dense[0, 0])))
    for kind in ("none", "mixup", "cutmix"):
        shares = [np.array([share for k, share in draws if k == kind]) for draws in (ours, theirs)]
        assert abs(len(shares[0]) - len(shares[1])) < 4 * np.sqrt(2 * 2000 * 0.25)
        assert kind == "none" or ks_2samp(*shares).pvalue > 0.01


@pytest.mark.parametrize("share", [0.3, 0.5])
def test_shifts_and_flips_are_drawn_evenly(share: float) -> None:
    """Each of the 5 × 5 shifts equally often (chi-square, 5 sigma), the given share mirrored."""
    n, pad = 6000, 2
    column, row = torch.arange(1, 13), 16 * torch.arange(1, 13)
    pixels = (row[:, None] + column).to(torch.uint8).expand(n, 3, 12, 12)  # every pixel names its place
    transform = make_transform(
        image_size=12, train=True, augment={"crop_padding": pad, "hflip": share}, mean=(0, 0, 0), std=(1, 1, 1)
    )
    shown = (255 * transform(pixels, epoch=torch.zeros(n, dtype=torch.int64), sample_ids=torch.arange(n))).round()
    left, center, right, below = (shown[:, 0, y, x] for y, x in ((6, 5), (6, 6), (6, 7), (7, 6)))
    assert ((right - left).abs() == 2).all() and (below - center == 16).all()
    mirrored = right < left
    assert abs(mirrored.float().mean() - share) < 4 * np.sqrt(share * (1 - share) / n)
    moved = center - torch.where(mirrored, 17 * 7 - 1, 17 * 7)  # 16 rows down and columns across
    counts = np.unique(moved.numpy(), return_counts=True)[1]
    assert len(counts) == 25
    expected = n / 25
    assert abs(((counts - expected) ** 2 / expected).sum() - 24) < 5 * np.sqrt(2 * 24)


def test_erasing_is_distributed_as_timms() -> None:
    n = 1500
    ours = erase_random(torch.full((n, 3, 32, 32), 100.0), 1.0, 0, np.zeros(n, np.int64), np.arange(n)) != 100.0
    random.seed(0)
    torch.manual_seed(0)
    reference = RandomErasing(probability=1.0, mode="pixel", device="cpu")
    theirs = torch.stack([reference(torch.full((3, 32, 32), 100.0)) for _ in range(n)]) != 100.0
    for along in (1, 2):
        extents = [
            (erased[:, 0].any(dim=along).sum(dim=1), erased[:, 0].any(dim=along).float().argmax(dim=1))
            for erased in (ours, theirs)
        ]
        for a, b in zip(*extents, strict=True):
            assert ks_2samp(a.numpy(), b.numpy()).pvalue > 0.01
