"""Five parts of one's own, each by one decorator: a timm model, a data source, a loss term, a metric, a law.

`examples/plugins/stripes.yaml` uses the first four. For the fifth, write
`dbscale --plugin examples/plugins/parts.py fit runs.csv --law two_thirds --x size --y error`.
"""

from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from timm.models import register_model
from torch import Tensor, nn

from dbscale.data.manifest import Encoding
from dbscale.laws.form import Form, Param, Scaling, Variable
from dbscale.plugins import register_law, register_loss, register_metric, register_source
from dbscale.shards.source import Listing, Source


class PooledPatches(nn.Module):
    """A model with timm's interface: features, head, and the name of the classifier."""

    def __init__(self, num_classes: int, in_chans: int, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(in_chans, width, 4, 4), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(width, num_classes)
        self.pretrained_cfg = {"classifier": "head", "input_size": (3, 32, 32)}

    def forward_features(self, images: Tensor) -> Tensor:
        return self.body(images)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        return features if pre_logits else self.head(features)

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))


@register_model
def pooled_patches(num_classes: int = 10, in_chans: int = 3, width: int = 16, **_timm: object) -> nn.Module:
    """As timm registers it; a grid says `{kind: timm, name: pooled_patches, kwargs: {width: 8}}`."""
    return PooledPatches(num_classes, in_chans, width)


@register_source("stripes")
class Stripes(Source):
    """Stripes of two directions, drawn on demand: `{source: stripes, num_train: 200}`."""

    num_train: int = 200
    num_test: int = 50
    size: int = 32
    """Side in px."""
    default_encoding: ClassVar[Encoding] = "raw"

    @property
    def classes(self) -> tuple[str, ...]:
        return ("rows", "columns")

    def listings(self) -> dict[str, Listing]:
        counts = {"train": self.num_train, "test": self.num_test}
        return {split: Listing(np.arange(n) % 2, [f"{split}-{i}" for i in range(n)]) for split, n in counts.items()}

    def read(self, split: str, numbers: NDArray[np.int64], names: Sequence[str]) -> Iterator[NDArray[np.uint8]]:
        for number in numbers.tolist():
            phase, period = np.random.default_rng([number, split == "test"]).uniform([0, 4], [6.28, 10])
            stripe = (127 + 127 * np.sin(np.arange(self.size) * 6.28 / period + phase)).astype(np.uint8)
            rows = np.broadcast_to(stripe[:, None, None], (self.size, self.size, 3))
            yield np.ascontiguousarray(rows if number % 2 == 0 else rows.transpose(1, 0, 2))


@register_loss("confidence_penalty")
def confidence_penalty(logits: Tensor, target: object, images: Tensor) -> Tensor:
    """Minus the mean entropy (Pereyra et al., 1701.06548): `loss_terms: {confidence_penalty: 0.1}`."""
    log_p = logits.float().log_softmax(1)
    return (log_p.exp() * log_p).sum(1).mean()


@register_metric("brier")
def brier(logits: Tensor, labels: Tensor) -> Tensor:
    """Brier score of each sample: `metrics: [brier]` puts its mean into every row."""
    wanted = torch.nn.functional.one_hot(labels, logits.shape[1])
    return ((logits.softmax(1) - wanted) ** 2).sum(1)


register_law(
    Form(
        name="two_thirds",
        equation="y = E + b*x^(-2/3)",
        variables=(Variable("x", "x"),),
        params=(
            Param("E", "linear", (0.0, 0.98), 0.0, np.inf, unit="y_low"),
            Param("b", "log", (0.1, 10.0), unit="y_high"),
        ),
        scaling=(Scaling("b", "y", None, 1.0), Scaling("b", "x", None, 2 / 3)),  # how b moves with the units
        domain="any curve with this exponent",
        source="an example",
        value=lambda x, p: p["E"] + p["b"] * x["x"] ** (-2 / 3),
    )
)
