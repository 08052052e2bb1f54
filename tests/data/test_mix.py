"""Mixup and CutMix: the same on any world size, true to their shares, distributed as timm's."""

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from timm.data import Mixup

from dbscale.data import DataError, mix_batch


def mixed(step: int, images: torch.Tensor, labels: torch.Tensor, **options: float):
    return mix_batch(images, labels, seed=1, step=step, **options)  # type: ignore[arg-type]


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


def test_rectangles_reach_every_edge() -> None:
    labels = torch.tensor([0, 1])
    images = labels.float().view(2, 1, 1, 1).expand(2, 3, 16, 16).contiguous()
    pasted = torch.stack([mixed(step, images, labels, cutmix=1.0)[0][0, 0] for step in range(60)]).amax(0)
    assert pasted.sum() == 256, "no pixel is out of reach"


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
        result, target = mix_batch(images, labels, seed=1, step=step, **options)
        ours.append(kind_and_share(result, target.lam))
        result, dense = reference(images.clone(), labels)
        theirs.append(kind_and_share(result, float(dense[0, 0])))
    for kind in ("none", "mixup", "cutmix"):
        shares = [np.array([share for k, share in draws if k == kind]) for draws in (ours, theirs)]
        assert abs(len(shares[0]) - len(shares[1])) < 4 * np.sqrt(2 * 2000 * 0.25)
        assert kind == "none" or ks_2samp(*shares).pvalue > 0.01
