"""Cheap predictors of transfer: how well TransRate, linear-probe error and upstream error rank checkpoints.

Rank correlation with the finetuned error over upstream checkpoints, for every downstream set and D_f.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from dbscale.report.table import RunTable

PREDICTORS = {
    "upstream_error_rate": "error on the upstream test set",
    "linear_probe_error": "linear-probe error (upstream checkpoint)",
    "transrate": "TransRate (arXiv 2106.09719)",
}
FEWEST = 5
"""Checkpoints below which a rank correlation says nothing."""


@dataclass(frozen=True)
class Correlation:
    """Spearman's ρ between a predictor and the finetuned error."""

    dataset: str
    downstream_samples: int
    predictor: str
    num_checkpoints: int
    rho: float
    low: float | None
    high: float | None


def correlations(table: RunTable, *, level: float) -> Iterator[Correlation]:
    """For every predictor that the rows carry, downstream set and D_f with enough checkpoints."""
    for dataset in table.pretrained.values("dataset"):
        for labels in table.pretrained.where(dataset=dataset).values("downstream_samples"):
            runs = table.pretrained.where(dataset=dataset, downstream_samples=labels)
            for column, name in PREDICTORS.items():
                pairs = {run.upstream_key or run.key: (getattr(run, column), run.error_rate) for run in runs}
                known = np.array([pair for pair in pairs.values() if pair[0] is not None], dtype=float)
                if len(known) >= FEWEST and len(set(known[:, 0])) > 1 and len(set(known[:, 1])) > 1:
                    yield _correlation(dataset, labels, name, known, level)


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks [n] from 0; ties share their mean."""
    ordered = np.sort(values)
    return (np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right") - 1) / 2


def _correlation(dataset: str, labels: int, name: str, pairs: np.ndarray, level: float) -> Correlation:
    rho = float(np.corrcoef(ranks(pairs[:, 0]), ranks(pairs[:, 1]))[0, 1])
    low = high = None
    if abs(rho) < 1 and len(pairs) > 3:
        # Fisher's z with Bonett and Wright's variance for ranks.
        half = NormalDist().inv_cdf(0.5 + level / 2) * np.sqrt((1 + rho**2 / 2) / (len(pairs) - 3))
        low, high = (float(np.tanh(np.arctanh(rho) + sign * half)) for sign in (-1, 1))
    return Correlation(dataset, labels, name, len(pairs), rho, low, high)
