"""Cheap predictors of transfer: TransRate and linear-probe error of an upstream checkpoint on downstream images.

Both see the frozen features of the pretrained student, before anything is finetuned. How well they rank checkpoints is the
report's question.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dbscale.data import Subset, make_eval_loader, make_transform
from dbscale.study.cell import CellSpec
from dbscale.study.recipe import Data
from dbscale.training.models import make_student
from dbscale.training.prepare import Context, open_cell_dataset

MAX_IMAGES = 1024
"""Images taken of each split: more would cost as much as a short finetune, and hardly move a ranking."""
BATCH_PIXELS = 1 << 20
TRANSRATE_EPS = 1e-4
"""Distortion; the value of the paper."""
RIDGES = tuple(10.0**power for power in range(-4, 3))
"""Candidates for the ridge, per sample."""


@dataclass(frozen=True)
class Probe:
    """What the features of an upstream checkpoint say about a downstream set."""

    linear_probe_error: float
    """Top-1 error in [0, 1] on test images, of a linear classifier fitted to the training subset."""
    transrate: float
    """Nats; more is better."""


def probe_upstream(spec: CellSpec, context: Context) -> Probe:
    """Probe the checkpoint that the finetune `spec` starts from, on its downstream subset; one rank's work."""
    data = spec.recipe.data
    train, test = (open_cell_dataset(spec, context.data_dir, split) for split in ("train", "test"))
    device = context.accelerator.device
    student = make_student(spec, context.store, train.num_classes).to(device).eval()
    images = train.subset(min(data.num_samples, MAX_IMAGES), data.subset_seed)
    features_ND, labels_N = _features(student, images, data, device)
    test_MD, truth_M = _features(student, test.subset(min(test.num_samples, MAX_IMAGES)), data, device)
    error = linear_probe_error(features_ND, labels_N, test_MD, truth_M)
    return Probe(error, transrate(features_ND, labels_N))


@torch.inference_mode()
def _features(model: Any, subset: Subset, data: Data, device: torch.device) -> tuple[Tensor, Tensor]:
    """What the head of a timm model would see of each image, float64 [N, D] on the host, and the labels [N]."""
    loader = make_eval_loader(
        subset,
        batch_size=max(1, min(BATCH_PIXELS // data.image_size**2, len(subset))),
        transform=make_transform(image_size=data.image_size, train=False, tier=data.tier),
    )
    features, labels = [], []
    for batch in loader:
        counted = batch.weights > 0
        assert isinstance(batch.images, Tensor), "an evaluation loader transforms"
        found = model.forward_head(model.forward_features(batch.images.to(device)), pre_logits=True)
        features.append(found.cpu().double()[counted])
        labels.append(batch.labels[counted])
    return torch.cat(features), torch.cat(labels)


def transrate(features_ND: Tensor, labels_N: Tensor, eps: float = TRANSRATE_EPS) -> float:
    """R(Z) − R(Z | Y), the coding rates of centred features with and without the labels, nats.

    Source: Huang et al. (2106.09719), eq. 4–6; classes weigh by their share of the samples.
    """
    centred_ND = features_ND - features_ND.mean(0)
    within = 0.0
    for label in labels_N.unique():
        rows = centred_ND[labels_N == label]
        within += len(rows) / len(labels_N) * _coding_rate(rows, eps)
    return _coding_rate(centred_ND, eps) - within


def _coding_rate(centred_ND: Tensor, eps: float) -> float:
    """½·logdet(I + ZᵀZ/(n·ε)), nats."""
    num, dim = centred_ND.shape
    # det(I + AᵀA) = det(I + AAᵀ): the smaller of the two.
    gram = centred_ND.T @ centred_ND if dim <= num else centred_ND @ centred_ND.T
    identity = torch.eye(len(gram), dtype=gram.dtype)
    return 0.5 * float(torch.linalg.slogdet(identity + gram / (num * eps)).logabsdet)


def linear_probe_error(features_ND: Tensor, labels_N: Tensor, test_MD: Tensor, truth_M: Tensor) -> float:
    """Top-1 error on test features of a linear classifier fitted to the training features."""
    found_M = fit_linear_probe(features_ND, labels_N)[0](test_MD)
    return float((found_M != truth_M).double().mean())


def fit_linear_probe(features_ND: Tensor, labels_N: Tensor) -> tuple[Callable[[Tensor], Tensor], float]:
    """Predicted classes of features [M, D], and the ridge per sample: ridge regression of one-hot labels on standardised
    features, the ridge by generalised cross-validation (Golub, Heath, Wahba 1979).

    scikit-learn's RidgeClassifierCV finds as much, but takes 1 s to import in every job and 7 ms a fit (here 0.9 ms).
    """
    num, classes_C = len(features_ND), labels_N.unique()
    mean_D, scale_D = features_ND.mean(0), features_ND.std(0, correction=0).clamp_min(1e-12)
    x_ND = (features_ND - mean_D) / scale_D
    one_hot_NC = (labels_N[:, None] == classes_C).double()
    bias_C = one_hot_NC.mean(0)
    y_NC = one_hot_NC - bias_C
    eigenvalues_K, vectors_DK = torch.linalg.eigh(x_ND.T @ x_ND)
    eigenvalues_K = eigenvalues_K.clamp_min(0)
    projected_KC = vectors_DK.T @ (x_ND.T @ y_NC)
    # Energy of y along each left singular vector; directions without variance have none.
    energy_K = projected_KC.square().sum(1) / eigenvalues_K.clamp_min(1e-9 * max(float(eigenvalues_K[-1]), 1e-300))
    total = float(y_NC.square().sum())

    def gcv(ridge: float) -> float:
        kept_K = eigenvalues_K / (eigenvalues_K + ridge * num)
        residual = total - float((energy_K * (1 - (1 - kept_K).square())).sum())
        return residual / (num - 1 - float(kept_K.sum())) ** 2 if num - 1 > float(kept_K.sum()) else float("inf")

    ridge = min(RIDGES, key=gcv)
    weight_DC = vectors_DK @ (projected_KC / (eigenvalues_K + ridge * num)[:, None])
    return lambda test_MD: classes_C[((test_MD - mean_D) / scale_D @ weight_DC + bias_C).argmax(1)], ridge
