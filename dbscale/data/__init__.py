"""Order, index and pixels: everything between packed shards on disk and the batches a training loop eats.

`open_dataset(path).subset(num_samples)` names the samples, `make_loader(subset, …)` serves them, `make_transform`
turns pixels into model input. Importing this package does not import torch: `plan` and `status` read manifests from
here and must answer at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from dbscale.data.manifest import Manifest, load_manifest
from dbscale.errors import DataError

if TYPE_CHECKING:
    from dbscale.data.augment import IMAGENET_MEAN, IMAGENET_STD, Transform, make_transform
    from dbscale.data.dataset import Dataset, Subset, open_dataset
    from dbscale.data.loader import Batch, EvalLoader, TrainLoader, make_eval_loader, make_loader
    from dbscale.data.mix import MixTarget, mix_batch

_HOME = {
    "Dataset": "dataset",
    "Subset": "dataset",
    "open_dataset": "dataset",
    "Batch": "loader",
    "EvalLoader": "loader",
    "TrainLoader": "loader",
    "make_eval_loader": "loader",
    "make_loader": "loader",
    "MixTarget": "mix",
    "mix_batch": "mix",
    "IMAGENET_MEAN": "augment",
    "IMAGENET_STD": "augment",
    "Transform": "augment",
    "make_transform": "augment",
}

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Batch",
    "DataError",
    "Dataset",
    "EvalLoader",
    "Manifest",
    "MixTarget",
    "Subset",
    "TrainLoader",
    "Transform",
    "load_manifest",
    "make_eval_loader",
    "make_loader",
    "make_transform",
    "mix_batch",
    "open_dataset",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
